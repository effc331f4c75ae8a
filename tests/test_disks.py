"""Disks with odd habits: nothing of the user's is lost on them, and nothing is refused without need.

The disks are `fuse_disk.disk`: a driver of our own, with one oddity or several.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents, language_model, save_file, save_model
from fuse_disk import disk
from merge_tool import MergeToolError, OutputError, merge
from merge_tool.output.marks import MARK
from merge_tool.sweep import sweep
from test_overlap import REFUSED, mount

__all__ = ["mount"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs FUSE")
SMALL: dict[str, Any] = {"max_shard_bytes": 20_000}


def models(folder: Path) -> tuple[Path, Path]:
    side_files = {"tokenizer.json": "{}", "sub/chat.jinja": "x"}
    base = save_model(folder / "base", language_model(0), side_files=side_files)
    return base, save_model(folder / "ft", language_model(1), shards=3)


# ------------------------------------------------------------------- an input by another spelling or mount


@pytest.mark.parametrize("oddities", [("ignores-case",), ("ignores-case", "two-inodes")])
def test_no_spelling_of_an_input_is_overwritten(tmp_path: Path, oddities: tuple[str, ...]) -> None:
    """Of its folder, of a folder above or inside it, or of a file of it; not even with --overwrite."""
    with disk(tmp_path / "real", tmp_path / "disk", *oddities) as place:
        base, ft = models(place / "lab")
        single = place / "lab/a.safetensors"
        save_file(language_model(0), single)
        before = contents(place)
        for first, out in (
            (base, place / "lab/Base"), (base, place / "LAB/FT"), (base, place / "lab/BASE/Sub"), (base, place / "Lab"),
            (base, place / "LAB/base/new"), (base, place / "lab/BASE/model.safetensors"),
            (single, place / "lab/A.safetensors"), (single, place / "LAB/a.safetensors"), (single, place / "LAB"),
        ):  # fmt: skip
            for overwrite in (False, True):
                with pytest.raises(OutputError) as caught:
                    merge(first, ft, out, overwrite=overwrite)
                assert "--overwrite" not in str(caught.value), out
            assert REFUSED in str(caught.value), out
            assert contents(place) == before
        merge(base, ft, place / "LAB/out", **SMALL)
        merge(base, ft, place / "lab/Out.safetensors")
        merge(base, ft, place / "whole", **SMALL)
        assert contents(place / "lab/out") == contents(place / "whole")


@pytest.mark.parametrize("oddities", [("ignores-case",), ("ignores-case", "two-inodes")])
def test_no_report_and_no_sweep_replaces_an_input(tmp_path: Path, oddities: tuple[str, ...]) -> None:
    with disk(tmp_path / "real", tmp_path / "disk", *oddities) as place:
        base, ft = models(place / "models")
        before = contents(place)
        with pytest.raises(MergeToolError, match="input"):
            merge(base, ft, tmp_path / "out", report_path=place / "models/Base/config.json")
        (place / "sweep.jsonl").write_text("")
        with pytest.raises(OutputError, match=REFUSED):
            sweep(place / "Models/base", place / "Models/ft", place, [0.5], ["true"], overwrite=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        after = contents(place)
        assert {name: after.get(name) for name in before} == before


def test_a_mount_or_link_inside_out_is_known_by_a_mark(tmp_path: Path) -> None:
    """In place of an output of several, or of a folder of one; with a driver that gives one folder two inodes."""
    with disk(tmp_path / "real", tmp_path / "disk", "ignores-case", "two-inodes") as place:
        base, ft = models(place)
        before = contents(place)
        for number, (label, folder) in enumerate({"t-0.3": "Base", "t-0.6": "FT", "sub": "BASE/Sub"}.items()):
            out = place / f"out{number}"
            out.mkdir()
            (tmp_path / f"real/out{number}/{label}").symlink_to(place / folder)
            with pytest.raises(OutputError, match=REFUSED):
                merge(base, ft, out, 0.5 if label == "sub" else [0.3, 0.6], overwrite=True)
            (out / label).unlink()
            assert not list(out.rglob("*"))
        assert contents(place) == before


def test_an_output_of_several_on_a_disk_of_its_own_is_found_before_the_first_byte(
    tmp_path: Path, pair: tuple[Path, Path], mount: Any
) -> None:
    """Finished files could not be renamed into it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/notes.txt").write_text("precious")
    place = mount(tmp_path / "elsewhere", tmp_path / "out/t-0.6")
    with pytest.raises(OutputError, match=r"t-0\.6: is on another disk than .*choose another OUT"):
        merge(*pair, tmp_path / "out", [0.3, 0.6], overwrite=True)
    assert contents(place) == {"notes.txt": b"precious"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["t-0.6"]


def test_a_mark_that_a_kill_left_is_no_trouble(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", [0.3, 0.6])
    (tmp_path / f"out/t-0.3/{MARK}").write_bytes(b"0" * 32)
    (tmp_path / "out/.slerp-merge").mkdir()
    (tmp_path / f"out/.slerp-merge/{MARK}").write_bytes(b"0" * 32)
    merge(*pair, tmp_path / "out", [0.3, 0.6], overwrite=True)
    merge(*pair, tmp_path / "whole", [0.3, 0.6])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
