"""Folders that are no model themselves: the message says which folder to give or which command to run."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import as_torch, language_model, load_folder, save_file, save_model, save_pickles
from merge_tool import CheckpointError, MergeToolError, merge, open_checkpoint
from merge_tool.models.lora import open_model
from test_lora import LINEAR, normal, save_adapter

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ZERO = ("zero_to_fp32.py", "latest", "global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt")
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "MLX": (("adapter_config.json", "adapters.safetensors"), "mlx_lm.fuse --model MODEL --adapter-path here "),
    "MLX, steps": (("adapter_config.json", "0000100_adapters.safetensors"), "is an adapter of MLX"),
    "MLX, old": (("adapters.npz",), "is an adapter of MLX"),
    "MLX, without settings": (("adapters.safetensors",), "is an adapter of MLX"),
    "FSDP": (("__0_0.distcp", ".metadata"), "accelerate merge-weights here OUT, and give OUT"),
    "FSDP, above": (
        ("optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth"),
        "accelerate merge-weights here/pytorch_model_fsdp_0 OUT",
    ),
    "DeepSpeed": ((*ZERO, "rng_state_0.pth", "training_args.bin"), "python here/zero_to_fp32.py here OUT, and"),
    "DeepSpeed, pieces": (("zero_pp_rank_0_mp_rank_00_optim_states.pt",), "In the folder above it: python zero_to"),
    "DeepSpeed, states": (
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"),
        "In the folder above it: python zero_to",
    ),
    "training": (
        ("checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors", "training_args.bin"),
        "with models in checkpoint-500, checkpoint-1000. Give one of these, for example the last: here/checkpoint-1000",
    ),
    "training, sharded": (
        ("checkpoint-2/model.safetensors.index.json", "trainer_state.json"), "the last: here/checkpoint-2",
    ),
    "training of adapters": (
        tuple(f"checkpoint-{step}/{file}" for step in (20, 100, 3) for file in ADAPTER),
        r"with adapters in checkpoint-3, checkpoint-20, checkpoint-100. .*: MODEL\+here/checkpoint-100\.",
    ),
    "adapters": (
        ("default/adapter_config.json", "other/adapter_config.json", "README.md"),
        r"adapters in default, other\. Give one of these: MODEL\+here/default\.",
    ),
    "models": (("a/model.safetensors", "b/pytorch_model.bin"), "models in a, b. Give one of these: here/a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_model_says_what_to_give(tmp_path: Path, kind: str) -> None:
    """As BASE, as FT, and as an adapter."""
    names, expected = KINDS[kind]
    base = save_model(tmp_path / "base", {"q.weight": normal(4, 4)})
    for name in names:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("{}")
    here = tmp_path / "here"
    as_base = [] if "adapter_config.json" in names else [(here, base)]  # BASE is an adapter, FT is none: said before
    for refs in (*as_base, (base, here), (base, f"{base}+{here}"), (here, here)):
        with pytest.raises(CheckpointError, match=expected):
            merge(*refs, tmp_path / "out")


def test_a_model_beside_its_training_is_read(tmp_path: Path) -> None:
    tensors = {"q.weight": normal(4, 4)}
    for name in ("checkpoint-5", "."):
        save_model(tmp_path / "m" / name, tensors)
    for name in ("zero_to_fp32.py", "global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt", "x/__0_0.distcp"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_bytes(b"x")
    assert open_checkpoint(tmp_path / "m").tensors.keys() == {"q.weight"}


@pytest.mark.slow
def test_the_command_for_fsdps_pieces_makes_a_folder_that_is_read(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from torch.distributed import checkpoint

    tensors = {"q.weight": normal(4, 4), "norm.weight": normal(4)}
    state = {"model": {name: as_torch(array) for name, array in tensors.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(state, checkpoint_id=tmp_path / "run/pytorch_model_fsdp_0")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "run")
    command = str(caught.value).partition("together: ")[2].partition(",")[0].split()
    assert command[0] == "accelerate"
    code = f"import sys; sys.argv = {command}; from accelerate.commands.accelerate_cli import main; main()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    found = load_folder(tmp_path / "OUT")
    assert all(found[name].tobytes() == array.tobytes() for name, array in tensors.items())
    assert open_checkpoint(tmp_path / "OUT").tensors.keys() == tensors.keys()


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_empty_weights_of_zero_3_are_refused(tmp_path: Path, name: str) -> None:
    """In a model on either side or both, and whatever is kept on a mismatch."""
    tensors = language_model(0)
    base, ft = save_model(tmp_path / "base", tensors), save_model(tmp_path / "ft", {**tensors, name: np.zeros(0)})
    for pair in ((base, ft), (ft, base), (ft, ft)):
        with pytest.raises(CheckpointError, match=rf"ft: 1 weight is empty: {name}\. .*zero_to_fp32\.py"):
            merge(*pair, tmp_path / "out", on_mismatch="base")


@pytest.mark.parametrize("name", ["q.lora_A.weight", "q.lora_B.weight", "norm.weight"])
def test_empty_tensors_of_an_adapter_are_refused(tmp_path: Path, name: str) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(40, 24), "norm.weight": normal(24)})
    tensors = {n: normal(*shape) for n, shape in LINEAR.items()} | {name: np.zeros(0, np.float32)}
    with pytest.raises(MergeToolError, match=r"DeepSpeed saved it without gathering it: run zero_to_fp32\.py"):
        open_model(f"{base}+{save_adapter(tmp_path / 'lora', tensors)}")


# ---------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("pickled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_shards_are_read_without_their_index(tmp_path: Path, pickled: bool) -> None:
    save = save_pickles if pickled else save_model
    whole = save(tmp_path / "whole", language_model(0), shards=3)
    bare = save(tmp_path / "bare", language_model(0), shards=3)
    next(bare.glob("*.index.json")).unlink()
    other = save_model(tmp_path / "other", language_model(1))
    report = merge(other, bare, tmp_path / "out", 0.4)
    merge(other, whole, tmp_path / "expected", 0.4)
    assert any("bare has 3 shards and no index: all their tensors are read" in line for line in report.warnings)
    found, expected = load_folder(tmp_path / "out"), load_folder(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def bare_shards(folder: Path) -> list[Path]:
    save_model(folder, language_model(0), shards=3)
    (folder / "model.safetensors.index.json").unlink()
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("lacking", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_shards_without_an_index_must_be_complete(tmp_path: Path, lacking: tuple[int, ...]) -> None:
    """One of several is no model, either."""
    shards = bare_shards(tmp_path / "m")
    for number in lacking:
        shards[number].unlink()
    numbers = ", ".join(str(number + 1) for number in lacking)
    with pytest.raises(CheckpointError, match=rf"but shards? {numbers} of 3 are missing, and so is an index"):
        open_checkpoint(tmp_path / "m")


def test_shards_without_an_index_must_be_of_one_model(tmp_path: Path) -> None:
    shards = bare_shards(tmp_path / "m")
    extra = tmp_path / "m/model-00001-of-00002.safetensors"
    extra.write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"m: has 4 \.safetensors files but neither model\.safetensors nor one"):
        open_checkpoint(tmp_path / "m")
    extra.rename(tmp_path / "m/consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"m: has 4 \.safetensors files but neither"):
        open_checkpoint(tmp_path / "m")


def test_a_tensor_in_two_shards_without_an_index_is_refused(tmp_path: Path) -> None:
    shards = bare_shards(tmp_path / "m")
    save_file({"model.norm.weight": np.ones(3)}, shards[0])
    save_file({"model.norm.weight": np.zeros(3)}, shards[1])
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.weight' is in two shards and there is no index to choose"
    ):
        open_checkpoint(tmp_path / "m")


def test_one_file_that_calls_itself_the_only_shard_is_a_model(tmp_path: Path) -> None:
    save_model(tmp_path / "m", {"q.weight": normal(3)})
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path / "m").tensors.keys() == {"q.weight"}
    assert json.loads((tmp_path / "m/config.json").read_text())
    assert torch.tensor(open_checkpoint(tmp_path / "m").read_new("q.weight", 0, 3)).isfinite().all()
