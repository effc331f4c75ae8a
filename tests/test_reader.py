"""Opening checkpoints: what is read, what is refused, and where links may lead."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import DTYPES, language_model, load_folder, save_file, save_model
from merge_tool import CheckpointError, HeaderError, open_checkpoint
from merge_tool.arrays import NUMPY_DTYPES

linux_only = pytest.mark.skipif(os.name == "nt", reason="needs symlinks and FIFOs")


@given(st.sampled_from(sorted(DTYPES)), st.integers(1, 50), st.data())
@settings(max_examples=60, deadline=None)
def test_reading_by_range_equals_reading_whole(tmp_path_factory: Any, code: str, size: int, data: Any) -> None:
    raw = np.random.default_rng(size).integers(0, 2, size * DTYPES[code].itemsize, dtype=np.uint8)
    whole = raw.view(DTYPES[code])
    path = tmp_path_factory.mktemp("r") / "x.safetensors"
    save_file({"before": np.zeros(3, np.uint8), "a": whole.reshape(1, -1)}, path)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read("a", start, stop, np.empty(stop - start, NUMPY_DTYPES[code]))
    assert found.tobytes() == whole[start:stop].tobytes()


def test_a_range_that_does_not_fit_is_our_callers_mistake(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint, pytest.raises(ValueError, match=r"\[2, 5\) of 4"):
        checkpoint.read("a", 2, 5, np.empty(3, np.float32))


def test_sharded_and_single_checkpoints_hold_the_same(tmp_path: Path) -> None:
    tensors = language_model(0)
    for shards in (1, 2, 5):
        folder = save_model(tmp_path / f"m{shards}", tensors, shards=shards)
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.tensors) == set(tensors)
            for name, expected in tensors.items():
                found = checkpoint.read(name, 0, expected.size, np.empty(expected.size, expected.dtype))
                assert found.tobytes() == expected.tobytes()
        assert load_folder(folder).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "adapter_model.safetensors"])
def test_a_folder_with_one_file_of_any_name_is_a_checkpoint(tmp_path: Path, name: str) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert [file.file_name for file in checkpoint.files] == [name]


def refusal(ref: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ref)
    return str(caught.value)


def test_what_is_not_there_says_so(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no weights found" in refusal(tmp_path / "empty")


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    assert "formats that are not read (tf_model.h5)" in refusal(tmp_path)
    (tmp_path / "tf_model.h5").rename(tmp_path / "m.gguf")
    assert "GGUF weights (m.gguf) are not read" in refusal(tmp_path)
    assert "GGUF" in refusal(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / "optimizer.pt")
    assert "no weights found, only a training's state (optimizer.pt)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
            "is a Git LFS pointer, not the file",
        ),
        (b"<!DOCTYPE html><html></html>", "is a web page, not the file itself. Fetch it again"),
        (b'<?xml version="1.0"?><Error/>', r"is a text \(XML or HTML\), not weights"),
        (b'{"error": "Repository not found"}', r"is a text \(JSON\), not weights"),
        (b"Entry not found", r"is a text, not weights \(perhaps a saved error page\)\. Fetch it again"),
        (b"{}", r"is a text \(JSON\), not weights"),
        (b"GGUF\3\0\0\0" + bytes(80), "is a GGUF file"),
        (b"", "has 0 bytes, too few for a safetensors file"),
    ],
)
def test_what_only_has_the_name_of_weights_is_told_by_what_it_is(tmp_path: Path, start: bytes, message: str) -> None:
    """A single file, and a shard among others."""
    (tmp_path / "x.safetensors").write_bytes(start)
    with pytest.raises(HeaderError, match=f"^x.safetensors: {message}"):
        open_checkpoint(tmp_path / "x.safetensors")
    folder = save_model(tmp_path / "m", language_model(0), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(start)
    with pytest.raises(HeaderError, match=f"^m/model-00002-of-00002.safetensors: {message}"):
        open_checkpoint(folder)


def test_a_pointer_in_place_of_a_json_file_is_told(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", language_model(0))
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "m/config.json: is a Git LFS pointer" in refusal(folder)


def test_a_pipelines_components_are_named(tmp_path: Path) -> None:
    """A folder of diffusers: which of its folders to give, and each of them opens."""
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / "sd" / part).mkdir(parents=True)
        save_file({"a": np.zeros(4, np.float32)}, tmp_path / "sd" / part / f"{file}.safetensors")
        assert open_checkpoint(tmp_path / "sd" / part).tensors.keys() == {"a"}
    (tmp_path / "sd/scheduler").mkdir()
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text("{}")
    (tmp_path / "sd/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    said = "sd: is a pipeline of diffusers (model_index.json), of several models. Give the folder of one of them"
    assert refusal(tmp_path / "sd") == f"{said}: {tmp_path}/sd/text_encoder, {tmp_path}/sd/unet."
    for part in ("unet", "text_encoder"):
        shutil.rmtree(tmp_path / "sd" / part)
    assert refusal(tmp_path / "sd") == f"{said}; none is here yet: finish the download."


def test_two_files_without_an_index_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"a": np.zeros(4, np.float32)}, tmp_path / name)
    assert "neither model.safetensors nor one index" in refusal(tmp_path)


def edit_index(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    def model(name: str) -> Path:
        return save_model(tmp_path / name, language_model(0), shards=2)

    missing = model("missing")
    (missing / "model-00002-of-00002.safetensors").unlink()
    assert "names 1 missing shard: model-00002-of-00002.safetensors" in refusal(missing)

    lacking = model("lacking")
    edit_index(lacking, lambda m: m.update({"ghost.weight": "model-00001-of-00002.safetensors"}))
    assert "names 1 tensor that the shard lacks: ghost.weight" in refusal(lacking)

    for bad in ("../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "", "x\0y"):
        outside = model(f"outside{abs(hash(bad))}")
        edit_index(outside, lambda m, bad=bad: m.update({"model.norm.bias": bad}))
        assert "is not a path inside the folder" in refusal(outside) or "missing" in refusal(outside)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[" * 99999]
)
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_tensors_that_the_index_forgets_are_taken_and_told(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", language_model(0), shards=2)
    edit_index(folder, lambda m: m.pop("model.norm.bias"))
    with open_checkpoint(folder) as checkpoint:
        assert "model.norm.bias" in checkpoint.tensors
        assert "1 tensor is in the shards but not in the index: model.norm.bias" in checkpoint.notices[0]


@pytest.mark.parametrize(
    ("config", "names", "found"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, [], "quantization_config in config.json, method gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, [], "method fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, [], "is quantised by MLX (quantization in config.json)"),
        ({"compression_config": {"format": "pack-quantized"}}, [], "compressed-tensors (compression_config in"),
        ({}, ["a.weight", "a.weight_scale_inv"], "scales in tensor 'a.weight_scale_inv'"),
        ({}, ["a.weight", "a.weight_scale"], "scales in tensor 'a.weight_scale'"),
        ({}, ["a.qweight", "a.scales"], "'a.qweight'"),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, config: Any, names: list[str], found: str) -> None:
    tensors = {name: np.zeros(4, np.float32) for name in names or ["a"]}
    message = refusal(save_model(tmp_path / "m", tensors, config=config))
    assert found in message
    assert "is quantised" in message


def test_a_learned_logit_scale_is_not_a_quantisation_scale(tmp_path: Path) -> None:
    tensors = {"logit_scale": np.ones(1, np.float32), "text.weight": np.zeros(4, DTYPES["F8_E4M3"])}
    with open_checkpoint(save_model(tmp_path / "m", tensors)) as checkpoint:
        assert len(checkpoint.tensors) == 2


def test_sub_byte_and_odd_dtypes_name_the_tensor(tmp_path: Path) -> None:
    header = b'{"odd.weight":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert "tensor 'odd.weight' has dtype F4, which cannot be merged" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["[1]", "{", '"x"', "[" * 99999])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = save_model(tmp_path / "m", language_model(0))
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


@linux_only
def test_links_inside_are_followed_and_links_outside_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", language_model(0))
    (folder / "model.safetensors").rename(folder / "real.bin.safetensors")
    (folder / "model.safetensors").symlink_to("real.bin.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "real.bin.safetensors").rename(outside)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)
    assert f"is a link to {outside}, outside the folder" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone.safetensors")
    assert "is a link to gone.safetensors, which is missing" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "cannot be followed" in refusal(folder)


@linux_only
def test_a_hub_caches_links_to_its_blobs_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = save_model(repo / "snapshots" / "abc123", language_model(0))
    (repo / "blobs").mkdir()
    for place, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(place))
        path.symlink_to(f"../../blobs/{place}")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.name == "org/name"
        assert checkpoint.config is not None
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (repo / "blobs" / "1").rename(other / "1")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "1")
    assert "outside the folder" in refusal(snapshot)


@linux_only
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pipes_and_folders_in_place_of_files_do_not_hang(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "m", language_model(0))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "is not a regular file" in refusal(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert "is not a regular file" in refusal(folder)
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a regular file" in refusal(tmp_path / "pipe")


def test_a_file_that_changes_between_plan_and_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, path)
    checkpoint = open_checkpoint(path)
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(path)
    with pytest.raises(CheckpointError, match="the file changed while it was being merged"):
        checkpoint.read("a", 0, 4, np.empty(4, np.float32))


@pytest.mark.parametrize("variants", [["fp16"], ["fp16", "non_ema"]])
def test_of_variants_the_plain_file_is_the_model(tmp_path: Path, variants: list[str]) -> None:
    """As diffusers loads a folder; a file that is no variant of it makes the folder unclear."""
    for number, name in enumerate(["", *(f".{variant}" for variant in variants)]):
        save_file({"w": np.full(3, float(number))}, tmp_path / f"diffusion_pytorch_model{name}.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.read_new("w", 0, 3) == 0).all()
        assert checkpoint.weight_files >= {"diffusion_pytorch_model.safetensors"}
    save_file({"w": np.zeros(3)}, tmp_path / "another.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor one index"):
        open_checkpoint(tmp_path)
