"""Named attacks on whoever merges files from strangers. Those on headers: test_header.py; on links: test_reader.py."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import CheckpointError, MergeToolError, merge, open_checkpoint
from merge_tool.models.cards import inherited

ROOT = Path(__file__).parents[1]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs links, pipes and /proc")


# ------------------------------------------------------------------------------------------- fuzzing


def test_mutated_headers_are_read_as_the_library_reads_them_or_refused_for_a_reason() -> None:
    """The fuzzer of `make fuzz` in small; the library accepts between a tenth and nine tenths of its inputs."""
    found = fuzzing.fuzz("header", 12_000, 3, 1e9)
    accepted = sum(n for what, n in found.items() if what == "both accept" or what.startswith("only the library"))
    assert 0.1 < accepted / found["inputs"] < 0.9
    assert found["inputs"] == 12_000


@pytest.mark.parametrize("target", [name for name in fuzzing.TARGETS if name != "header"])
def test_other_readers_survive_mutations(target: str) -> None:
    assert fuzzing.fuzz(target, 500, 4, 1e9)["inputs"] == 500


@pytest.mark.slow
def test_a_million_mutated_headers() -> None:
    print(fuzzing.fuzz("header", 1_000_000, 5, 1e9))


EMPTY = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
DIFFERENT: dict[str, bytes] = {
    "a name twice": b"{" + EMPTY + b"," + EMPTY + b"}",
    "a key twice": b'{"__metadata__":{"k":"1","k":"2"},' + EMPTY + b"}",
    "an unknown key in an entry": b"{" + EMPTY[:-1] + b',"x":1}}',
    "a size of 2^63 or more beside a size of 0": b"{" + EMPTY.replace(b"[0]", b"[0,9223372036854775808]") + b"}",
    "space before the first brace": b" {" + EMPTY + b"}",
    "an entry of more than 65,536 characters": b"{" + EMPTY.replace(b'"shape"', b" " * 70_000 + b'"shape"') + b"}",
}


@pytest.mark.parametrize("what", fuzzing.DIFFERENCES)
def test_every_listed_difference_from_the_library_is_one_and_is_argued(what: str) -> None:
    """The library accepts it, we do not, and docs/reliability.md says why."""
    assert fuzzing.check_header(DIFFERENT[what] + b"\0\0") == f"only the library: {what}"
    assert what in (ROOT / "docs/reliability.md").read_text()


# --------------------------------------------------------------------------------------------- cards

CARDS: dict[str, str] = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    + "license: *i\n",
    "merge keys": "a: &a {x: 1}\n"
    + "".join(f"{c}: &{c} {{<<: [{', '.join([f'*{p}'] * 9)}]}}\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "depth": "license: " + "[" * 20_000,
    "a huge number": "license: " + "9" * 60_000,
    "sexagesimal": "license: " + "1:" * 400 + "1.5",
    "a broken tag": "license: !!timestamp x\nlanguage: !!int ''\n",
    "code": "license: !!python/object/apply:os.system ['touch /tmp/pwned']\n",
    "an endless alias": "license: &a [*a]\n",
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_that_are_bombs_cost_nothing(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    """YAML that multiplies, nests or runs code: the merge succeeds, and inherits nothing odd."""
    (pair[0] / "README.md").write_text(f"---\n{CARDS[name]}---\n# x\n")
    merge(*pair, tmp_path / "out")
    assert len((tmp_path / "out/README.md").read_text()) < 20_000
    assert "python/object" not in (tmp_path / "out/README.md").read_text()


def test_what_a_plain_card_says_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage:\n- no\n- en\npipeline_tag: null\nx: 1\n---\n")
    assert inherited(tmp_path / "README.md") == {"license": "mit", "language": ["no", "en"]}


# ---------------------------------------------------------------------------------------- side files


@linux_only
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer.json", "modules.json", "model_index.json", "config.json", "other.txt", "sub/x.py"]
)
def test_pipes_in_place_of_side_files_never_hang(tmp_path: Path, pair: tuple[Path, Path], name: str, side: int) -> None:
    """On either side, whichever side's files are asked for: a refusal, or a merge that does not look."""
    path = pair[side] / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    (pair[1 - side] / name).parent.mkdir(exist_ok=True)
    if not name.startswith("config"):
        (pair[1 - side] / name).write_text("")
    for files_from in ("base", "ft"):
        code = (
            "import sys; from merge_tool import merge, MergeToolError\n"
            "try: merge(*sys.argv[1:4], files_from=sys.argv[4], overwrite=True)\n"
            "except MergeToolError as e: print(e)\n"
        )
        words = [*map(str, pair), str(tmp_path / "out"), files_from]
        done = subprocess.run([sys.executable, "-c", code, *words], timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@linux_only
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "../elsewhere", "/proc/self/environ"])
def test_side_files_that_lead_out_are_refused(tmp_path: Path, pair: tuple[Path, Path], target: str) -> None:
    """Nothing outside BASE is ever copied."""
    (tmp_path / "elsewhere").write_text("secret")
    (pair[0] / "special_tokens_map.json").symlink_to(target)
    with pytest.raises(CheckpointError, match="outside the folder"):
        merge(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@linux_only
def test_loops_of_links_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (pair[0] / "a.txt").symlink_to("b.txt")
    (pair[0] / "b.txt").symlink_to("a.txt")
    with pytest.raises(CheckpointError, match=r"a\.txt: cannot be followed"):
        merge(*pair, tmp_path / "out")
    (pair[0] / "a.txt").unlink()
    (pair[0] / "b.txt").unlink()
    (pair[0] / "sub/up").symlink_to("..")
    with pytest.raises(CheckpointError, match="is a link to a folder above it"):
        merge(*pair, tmp_path / "out")


def test_files_that_claim_our_names_are_not_copied(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A manifest, a report, a work folder or a card of ours in BASE: the output has its own."""
    merge(*pair, tmp_path / "clean")
    for name in ("SHA256SUMS", "merge_report.json"):
        (pair[0] / name).write_text("evil")
    (pair[0] / ".slerp-merge").mkdir()
    (pair[0] / ".slerp-merge/journal.jsonl").write_text("evil")
    merge(*pair, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_side_files_never_stand_in_for_weights(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Weights, indices and pickles of other names in BASE are not copied, wherever they would be loaded first."""
    merge(*pair, tmp_path / "clean")
    names = ["pytorch_model.bin", "model.safetensors", "x.pt", "consolidated.safetensors", "adapter_model.safetensors"]
    for name in [*names[:1], *names[2:], "pytorch_model.bin.index.json"]:
        (pair[0] / name).write_bytes(b"\x80\x04evil")
    merge(*pair, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_code_in_base_is_copied_unrun_and_the_card_says_so(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    code = f"open({str(tmp_path / 'pwned')!r}, 'w')\n"
    (pair[0] / "modeling_evil.py").write_text(code)
    (pair[0] / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_evil.X"}}))
    merge(*pair, tmp_path / "out")
    assert (tmp_path / "out/modeling_evil.py").read_text() == code
    assert not (tmp_path / "pwned").exists()
    assert "holds Python code" in (tmp_path / "out/README.md").read_text()


@linux_only
def test_names_with_shell_signs_and_newlines_are_only_names(tmp_path: Path) -> None:
    """No shell sees a file name; `sha256sum --check` reads the manifest all the same."""
    side = {"$(touch pwned)": "a", "; rm -rf x": "b", "new\nline": "c", "back\\slash": "d", "-rf": "e", "\x1b[2J": "f"}
    base = save_model(tmp_path / "base", language_model(0), side_files=side)
    ft = save_model(tmp_path / "ft", language_model(1))
    merge(base, ft, tmp_path / "out")
    for name, content in side.items():
        assert (tmp_path / "out" / name).read_text() == content
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out/pwned").exists()


@linux_only
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, pair: tuple[Path, Path], umask: int) -> None:
    """Whatever the modes in BASE: no file of the output is executable, setuid, or more open than new files are."""
    (pair[0] / "tokenizer.json").chmod(0o4777)
    (pair[0] / "generation_config.json").chmod(0o400)
    before = os.umask(umask)
    try:
        merge(*pair, tmp_path / "out", max_shard_bytes=20_000)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        expected = 0o777 & ~umask if path.is_dir() else 0o666 & ~umask
        assert path.stat().st_mode & 0o7777 == expected, path


# ------------------------------------------------------------------------------------- deep and huge


@pytest.mark.parametrize("depth", [100, 900, 990, 20_000, 200_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json", "model_index.json"])
def test_deep_json_is_refused_or_passed_over(tmp_path: Path, pair: tuple[Path, Path], name: str, depth: int) -> None:
    """Never a crash: not when it is read, compared, shown or edited."""
    deep = "[" * depth + "]" * depth
    text = f'[{{"path": {deep}}}]' if name == "modules.json" else f'{{"rope_scaling": {deep}, "x_config": {deep}}}'
    (pair[0] / name).write_text(text)
    for options in ({}, {"dtype": "float32"}):
        try:
            merge(*pair, tmp_path / "out", overwrite=True, **options)
        except MergeToolError as e:
            assert name in str(e)  # noqa: PT017 - either is fine


def test_a_huge_config_or_index_is_refused_unread(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        with (pair[0] / name).open("r+b") as file:
            file.truncate(33_000_000)
        with pytest.raises(CheckpointError, match="33,000,000 bytes, at most 32,000,000 are read"):
            open_checkpoint(pair[0])


def test_pickles_are_never_opened(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as input nor on the way: nothing of ours imports pickle, and a .bin beside the weights is not read."""
    (pair[0] / "pytorch_model.bin").write_bytes(b"\x80\x04evil")
    (pair[0] / "pytorch_model.bin").chmod(0)
    merge(*pair, tmp_path / "out")
    for path in (ROOT / "merge_tool").rglob("*.py"):
        assert "import pickle" not in path.read_text()
    opened = json.dumps(sorted(p.name for p in (tmp_path / "out").iterdir()))
    assert ".bin" not in opened


def test_random_bytes_are_never_a_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    for number in range(300):
        path = tmp_path / "x.safetensors"
        path.write_bytes(chance.randbytes(number))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
