"""Pickled weights: the same tensors as torch reads, wherever they lie in the file, and nothing run on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import DTYPES, as_torch, contents, language_model, load_folder, save_model, save_pickles
from merge_tool import CheckpointError, merge, open_checkpoint
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.pickle import read_pickles
from merge_tool.checkpoint.source import LocalFile
from merge_tool.checkpoint.strided import StridedTensor
from merge_tool.checkpoint.unpickle import _why, describe
from merge_tool.compare.diff import diff
from merge_tool.verification.verify import verify

ROOT = Path(__file__).parents[1]


def values(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def refusal(ref: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ref)
    return str(caught.value)


def refused(path: Path) -> str:
    """Why the process that unpickles refuses a file: asked in this one, which has torch already."""
    return str(describe(str(path), path.name)["refused"])


def all_kinds() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and every way to lie in a storage."""
    torch.manual_seed(0)
    whole = torch.randn(60, 40)
    return {
        **{code: as_torch(np.arange(24, dtype=np.uint8).view(dtype)) for code, dtype in DTYPES.items()},
        "whole": whole,
        "shared": whole,
        "rows": whole[7:20],
        "transposed": whole.t(),
        "sliced": whole[3:50:2, 5:30],
        "steps": whole[:, ::3],
        "column": whole[:, 7],
        "expanded": torch.randn(1, 5).expand(6, 5),
        "permuted": torch.randn(4, 5, 6).bfloat16().permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "large": torch.randn(300, 300).half(),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickles")
    torch.save(all_kinds(), folder / "new.bin")
    old = {name: tensor for name, tensor in all_kinds().items() if not name.startswith("F8")}  # younger than it
    torch.save(old, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.parametrize("name", ["new.bin", "old.pt"])
def test_every_tensor_is_as_torch_reads_it(saved: Path, name: str) -> None:
    """In either of torch's formats: shared storages, views of all kinds, scalars, every dtype."""
    loaded = torch.load(saved / name, weights_only=True)
    with open_checkpoint(saved / name) as checkpoint:
        assert set(checkpoint.tensors) == set(loaded)
        for key, tensor in loaded.items():
            assert checkpoint.tensors[key].shape == tuple(tensor.shape)
            assert checkpoint.read_new(key, 0, tensor.numel()).tobytes() == values(tensor), key
        codes = {code for code in DTYPES if code in loaded}
        assert all(checkpoint.tensors[code].dtype == code for code in codes)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_views_are_read_by_range_as_whole(tmp_path_factory: Any, data: Any) -> None:
    """Any shape, any strides, any range: the elements that as_strided has there."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    storage = np.arange(size, dtype="<i4")
    path = tmp_path_factory.mktemp("s") / "x"
    path.write_bytes(b"before" + storage.tobytes())
    tensor = StridedTensor(TensorInfo("x", "I32", tuple(shape), 6), LocalFile(path, "x"), tuple(strides))
    whole = torch.from_numpy(storage).as_strided(shape, strides).flatten().numpy()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    found = np.empty(stop - start, "<i4")
    tensor.read_into(start, found)
    assert np.array_equal(found, whole[start:stop])


def test_a_run_longer_than_its_buffer_is_read_in_pieces(tmp_path: Path) -> None:
    """A column of a tensor of 9 MB: never more than a megabyte at a time."""
    whole = torch.arange(9 * 2**18, dtype=torch.int32).reshape(-1, 9)
    torch.save({"x": whole[:, 4]}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        found = checkpoint.read_new("x", 5, len(whole))
    assert np.array_equal(found, whole[5:, 4].numpy())


# -------------------------------------------------------------------------------------- merges of them


def test_a_merge_of_pickles_is_the_merge_of_their_safetensors(tmp_path: Path) -> None:
    """Byte for byte, under transformers' names; verify and diff read them too."""
    models = language_model(0), language_model(1)
    plain = [save_model(tmp_path / f"s{k}", model) for k, model in enumerate(models)]
    pickled = [save_pickles(tmp_path / f"p{k}", model, shards=1 + 2 * k) for k, model in enumerate(models)]
    merge(*plain, tmp_path / "expected", t=0.3)
    merge(*pickled, tmp_path / "out", t=0.3)
    names = {"model.safetensors", "config.json", "README.md", "merge_report.json", "SHA256SUMS"}
    assert contents(tmp_path / "out").keys() == names
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    assert not verify(tmp_path / "out", tuple(pickled), full=True)[0].problems
    assert diff(plain[0], pickled[1]).tensors == diff(*plain).tensors


def test_transformers_loads_the_merge_of_its_pickles(tmp_path: Path) -> None:
    """A tied head under both its names, shards with an index on one side; the output's shards have their own."""
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        folder = save_pickles(tmp_path / f"m{seed}", arrays, shards=2 - seed, config=model.config.to_dict())
        folders.append(folder)
    merge(*folders, tmp_path / "out", t=1.0, max_shard_bytes=20_000)
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_safetensors_win_over_pickles_and_pickles_are_not_copied(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0))
    save_pickles(base, language_model(5))
    merge(base, save_model(tmp_path / "ft", language_model(1)), tmp_path / "out", t=0)
    merged = load_folder(tmp_path / "out")
    assert all(merged[name].tobytes() == array.tobytes() for name, array in language_model(0).items())
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_training_state_beside_the_weights_is_no_model(tmp_path: Path) -> None:
    folder = save_pickles(tmp_path / "m", language_model(0))
    for name in ("optimizer.bin", "training_args.bin", "scheduler.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"\x80evil")
    (folder / "pytorch_model.bin").rename(folder / "weights.bin")
    with open_checkpoint(folder) as checkpoint:
        assert [file.file_name for file in checkpoint.files] == ["weights.bin"]
    (folder / "other.bin").write_bytes(b"\x80")
    assert "2 pickled files of weights but neither pytorch_model.bin nor one index (other.bin, weights.bin)" in refusal(
        folder
    )


# ------------------------------------------------------------------------------------- what is in a pickle

WEIGHTS = {"a": torch.ones(2)}
NESTED: dict[str, tuple[Any, str]] = {
    "Lightning": ({"state_dict": WEIGHTS, "epoch": 3, "optimizer_states": [WEIGHTS]}, "under 'state_dict' are taken"),
    "a trainer": ({"model": WEIGHTS, "optimizer": {"state": {0: WEIGHTS}}, "step": 7}, "not read: optimizer, step"),
    "DeepSpeed": ({"module": WEIGHTS, "global_steps": 1}, "under 'module' are taken"),
    "one dict of another name": ({"params": WEIGHTS}, "under 'params' are taken"),
    "an EMA beside it": ({"model": WEIGHTS, "ema": WEIGHTS}, "not read: ema"),
    "two deep": ({"checkpoint": {"model": WEIGHTS}}, "under 'model' are taken"),
    "other entries": ({**WEIGHTS, "version": 3, "_extra_state": None}, "2 entries that are no tensors are left out"),
}


@pytest.mark.parametrize("kind", NESTED)
def test_the_weights_inside_are_taken_and_told(tmp_path: Path, kind: str) -> None:
    content, notice = NESTED[kind]
    torch.save(content, tmp_path / "x.ckpt")
    found = describe(str(tmp_path / "x.ckpt"), "x.ckpt")
    assert [tensor[:3] for tensor in found["tensors"]] == [["a", "F32", [2]]]
    assert any(notice in told for told in found["notices"]), found["notices"]


UNCLEAR: dict[str, tuple[Any, str]] = {
    "two models": ({"generator": WEIGHTS, "discriminator": WEIGHTS}, "it has generator, discriminator. Save the one"),
    "two usual names": ({"model": WEIGHTS, "state_dict": WEIGHTS}, "it has model, state_dict"),
    "tensors and a dict of them": ({**WEIGHTS, "more": WEIGHTS}, "it has more and tensors of its own"),
    "no tensors": ({"epoch": 3, "x\x1b[2J": 1}, "holds no tensors under names; its keys are epoch, x\\x1b[2J"),
    "a tensor": (torch.ones(2), "one tensor without a name"),
    "a list": ([torch.ones(2)], "a list, expected a state dict"),
    "names that are numbers": ({0: torch.ones(2), **WEIGHTS}, "1 tensor under a name that is no string"),
    "a sparse tensor": ({"s": torch.eye(3).to_sparse()}, "tensor 's' is sparse"),
    "complex numbers": ({"c": torch.ones(2, dtype=torch.complex128)}, "tensor 'c' has dtype torch.complex128"),
    "a name that is no tensor's": ({"__metadata__": torch.ones(2)}, "tensor '__metadata__' has a name that"),
    "half a character": ({"a\ud800": torch.ones(2)}, "tensor 'a\\ud800' has a name that safetensors cannot have"),
    "a conjugate": ({"c": torch.ones(2, dtype=torch.complex64).conj()}, "tensor 'c'"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_is_no_state_dict_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, message = UNCLEAR[kind]
    torch.save(content, tmp_path / "x.pt")
    found = refused(tmp_path / "x.pt")
    assert found.startswith("x.pt: ")
    assert message in found
    assert "\x1b" not in found


# --------------------------------------------------------------------------------------------- attacks


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "as a tensor", "at the top"])
def test_code_in_a_pickle_never_runs_and_is_named(tmp_path: Path, zipped: bool, where: str) -> None:
    evil = Evil(tmp_path / "pwned")
    content = {"beside": {**WEIGHTS, "x": evil}, "as a tensor": {"a": evil}, "at the top": evil}[where]
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = refused(tmp_path / "x.pt")
    assert "x.pt: holds more than weights: posix.mkdir, which torch's weights_only refuses" in found
    assert not (tmp_path / "pwned").exists()


def test_a_whole_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    found = refused(tmp_path / "x.pt")
    assert "torch.nn.modules.linear.Linear" in found
    assert "save the weights alone: torch.save(" in found


def rewritten(path: Path, edit: Callable[[str, bytes], bytes], **options: Any) -> Path:
    """The same zip file with other contents of its records, or compressed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("new.pt"), "w", **options) as new:
        for info in old.infolist():
            new.writestr(info.filename, edit(info.filename, old.read(info)))
    return path.with_name("new.pt")


def test_zip_files_that_are_not_torchs_or_lie_are_refused(tmp_path: Path) -> None:
    """Compressed, big-endian, truncated, records moved, no pickle: a sentence each, and no values made up."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000), "b": torch.ones(2000)}, path)
    assert "has compressed records (data.pkl" in refused(
        rewritten(path, lambda _, raw: raw, compression=zipfile.ZIP_DEFLATED)
    )
    order = rewritten(path, lambda name, raw: b"big" if name.endswith("byteorder") else raw)
    assert "big-endian" in refused(order)
    shorter = rewritten(path, lambda name, raw: raw[:100] if name.endswith("/data/0") else raw)
    assert "where the zip file's directory says" in refused(shorter)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("x/readme\x1b", "hello")
    assert "not one of torch's: it holds readme\\x1b" in refused(tmp_path / "other.pt")
    path.write_bytes(path.read_bytes()[:-30])
    assert "is not a whole zip file" in refused(path)


def test_an_old_pickle_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(10_000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "x.pt: " in refused(path)


def test_a_version_of_torch_that_puts_tensors_elsewhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not say where in memory it mapped the file."""
    torch.save({"a": torch.ones(2000)}, tmp_path / "m.bin")
    monkeypatch.setattr("merge_tool.checkpoint.unpickle._load_zip", lambda torch, path, regions: torch.load(path))
    said = refused(tmp_path / "m.bin")
    assert f"torch {torch.__version__} does not map its tensors where torch 2.6 to 2.13 does. Install" in said


def test_every_damage_is_refused_or_reads_what_torch_reads(tmp_path: Path) -> None:
    """Bytes changed anywhere, in both formats: an error of ours, or the tensors that weights_only gives."""
    chance = np.random.default_rng(1)
    files = []
    for zipped in (True, False):
        torch.save(
            {"a": torch.arange(40.0), "b": torch.ones(3, 4).t()}, tmp_path / "x", _use_new_zipfile_serialization=zipped
        )
        raw = (tmp_path / "x").read_bytes()
        for number in range(40):
            damaged = bytearray(raw)
            for place in chance.integers(0, len(raw), 3):
                damaged[place] = chance.integers(0, 256)
            if damaged.startswith((b"PK\x03\x04", b"\x80")):
                path = tmp_path / f"{number}{zipped}.pt"
                path.write_bytes(damaged)
                files.append(path)
    found = [describe(str(path), path.name) for path in files]
    for path, told in zip(files, found, strict=True):
        if "refused" in told:
            assert told["refused"].startswith(f"{path.name}: ")
            continue
        loaded = torch.load(path, weights_only=True)
        assert [tensor[0] for tensor in told["tensors"]] == [key for key in loaded if torch.is_tensor(loaded[key])]
    assert 5 < sum("refused" in told for told in found) < len(files)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"<!DOCTYPE html>", "is a web page, not the file itself. Fetch it again"),
        (b"hello", "is a text, not weights"),
        (b"(dp0\xff", "no file of torch.save"),
        (b"", "no file of torch.save"),
    ],
)
def test_files_that_only_have_the_name_are_refused(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(start)
    assert message in refusal(tmp_path)


def test_without_torch_the_message_has_the_pip_line(tmp_path: Path) -> None:
    """And an old torch, whose weights_only can be broken, is not used."""
    torch.save(WEIGHTS, tmp_path / "x.pt")
    code = "import sys; from merge_tool import open_checkpoint; open_checkpoint(sys.argv[1])"
    for content, message in (
        ("raise ImportError('No module named torch')", "pip install '.[train]'"),
        ("__version__ = '2.5.1+cpu'", "can be made to run code"),
    ):
        (tmp_path / "path").mkdir(exist_ok=True)
        (tmp_path / "path/torch.py").write_text(content)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(ROOT)])}
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.pt"], env=environment, capture_output=True)
        assert message in done.stderr.decode()


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    torch.save({"a": torch.ones(2000)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="changed while"):
        checkpoint.read_new("a", 0, 10)


def test_a_description_larger_than_the_memory_budget_says_so(tmp_path: Path) -> None:
    torch.save({f"tensor {k}": torch.ones(1) for k in range(100)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"Give at least --memory \d+MB"):
        read_pickles([LocalFile(tmp_path / "x.pt", "x.pt")], 1000)


# --------------------------------------------------------------------------------------------- memory


def test_a_merge_of_pickles_stays_in_its_budget_and_loads_no_torch(tmp_path: Path) -> None:
    """Two models of 80 MB, with views, in 64 MB: this process reads the files by position."""
    whole = torch.randn(20, 1000, 1000)
    torch.save({f"x{k}": whole[k] for k in range(20)}, tmp_path / "base.bin")
    torch.save({f"x{k}": whole[k].t() if k < 3 else whole[k] * 2 for k in range(20)}, tmp_path / "ft.bin")
    code = (
        "import sys; from merge_tool import merge; from merge_tool.plan.system_memory import peak_bytes\n"
        "merge(*sys.argv[1:4], t=0.5, memory_bytes=64_000_000); assert 'torch' not in sys.modules; print(peak_bytes())"
    )
    words = [str(tmp_path / name) for name in ("base.bin", "ft.bin", "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64_000_000
    merged = load_folder(tmp_path / "out")
    for k in (0, 2):
        a, b = (v.double().flatten() for v in (whole[k], whole[k].t().contiguous()))
        theta = torch.acos(torch.dot(a, b) / a.norm() / b.norm())
        expected = torch.sin(theta / 2) / torch.sin(theta) * (a + b)
        assert np.allclose(merged[f"x{k}"].ravel(), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt", ".jit"])
def test_a_torchscript_archive_says_how_to_save_its_weights(tmp_path: Path, suffix: str) -> None:
    """And what it says works: the weights are read then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(3, 2)).save(tmp_path / f"m{suffix}")
        with pytest.raises(CheckpointError, match="is a TorchScript archive, which holds code as well"):
            open_checkpoint(tmp_path / f"m{suffix}")
        torch.save(torch.jit.load(tmp_path / f"m{suffix}").state_dict(), tmp_path / "weights.pt")
    assert open_checkpoint(tmp_path / "weights.pt").tensors.keys() == {"weight", "bias"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("\n   \n  PytorchStreamReader failed  \nmore of it", "(PytorchStreamReader failed)"),
        ("Weights only load failed.\n\nWeightsUnpickler error: Unsupported operand 149\n", "(Unsupported operand 149)"),
        ("", "(RuntimeError)"),
        ("   \n", "(RuntimeError)"),
    ],
)
def test_the_first_line_that_says_something_is_the_reason(message: str, said: str) -> None:
    assert said in _why(RuntimeError(message))


def test_what_was_refused_is_named() -> None:
    error = Exception("WeightsUnpickler error: Unsupported global: GLOBAL os.system was not an allowed global")
    assert "holds more than weights: os.system" in _why(error)
