"""Disks with odd habits: nothing of the user's is lost on them, and nothing is refused without need.

The disks are `fuse_disk.disk`: a driver of our own, with one oddity or several.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints import contents, language_model, save_file, save_model
from fuse_disk import DRIVERS, disk
from merge_tool import CheckpointError, MergeToolError, OutputError, api, files, merge
from merge_tool.api import plan_recipe
from merge_tool.checkpoint.source import LocalFile, has_stable_inodes
from merge_tool.checkpoint.writer import ShardWriter
from merge_tool.cli.show import plan_json, plan_lines
from merge_tool.files import free_bytes, leads_out, mounted_kinds
from merge_tool.models.inputs import Download
from merge_tool.models.side_files import folded
from merge_tool.models.side_names import check_names
from merge_tool.output import lock, owner
from merge_tool.output.journal import Journal
from merge_tool.output.marks import MARK
from merge_tool.output.older import read_sums
from merge_tool.output.work_folder import WorkFolder
from merge_tool.plan import prepare
from merge_tool.recipe.pair import pair as pair_recipe
from merge_tool.sweeps.sweep import sweep
from merge_tool.verification.inspection import inspect
from merge_tool.verification.verify import verify
from test_faults import small_disk
from test_overlap import REFUSED, mount

__all__ = ["mount", "small_disk"]  # fixtures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs FUSE")
SMALL: dict[str, Any] = {"max_shard_bytes": 20_000}


def big(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((200, 256)).astype("float32")


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
        save_file(language_model(1), place / "single.safetensors")
        before = contents(place)
        with pytest.raises(MergeToolError, match="input"):
            merge(base, place / "single.safetensors", tmp_path / "out2", report_path=place / "SINGLE.safetensors")
        merge(base, place / "single.safetensors", tmp_path / "out3", report_path=place / "single.json")
        (place / "single.json").unlink()
        (place / "sweep.jsonl").write_text("")
        with pytest.raises(OutputError, match=REFUSED):
            sweep(place / "Models/base", place / "Models/ft", place, [0.5], ["true"], overwrite=True)
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


# -------------------------------------------------------------------------------------- names of files


def test_files_that_differ_by_case_alone_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """Nor by the normalisation of their letters. A card is the card in any spelling; of the rest one is renamed, which
    is said. So it is on every disk, with the same bytes."""
    names = [
        "readme.md",
        "Vocab.txt",
        "vocab.txt",
        "Merge_Report.json",
        "caf\u00e9.txt",
        "cafe\u0301.txt",
        "Sub",
        "sub/x",
    ]
    side_files = {name: name for name in names}
    base = save_model(tmp_path / "base", language_model(0), side_files=side_files)
    ft = save_model(tmp_path / "ft", language_model(1))
    told: list[str] = []
    merge(base, ft, tmp_path / "out", on_warning=told.append)
    found = contents(tmp_path / "out")
    assert found["README.base.md"] == b"readme.md"
    assert found["vocab.txt"] == b"vocab.txt"
    assert found["Vocab.2.txt"] == b"Vocab.txt"
    assert found["Sub.2"] == b"Sub"
    assert {b"caf\xc3\xa9.txt", b"cafe\xcc\x81.txt"} <= set(found.values())
    assert "Merge_Report.json" not in found
    assert len({folded(name) for name in found}) == len(found)
    assert any(
        "Vocab.txt is copied as Vocab.2.txt: on disks that ignore case it would overwrite vocab.txt" in t for t in told
    )
    assert any("Not copied: Merge_Report.json" in line for line in told)
    assert not verify(tmp_path / "out")[0].problems
    with disk(tmp_path / "real", tmp_path / "disk", "ignores-case") as place:
        merge(base, ft, place / "out")
        assert contents(place / "out") == found
        assert not verify(place / "out")[0].problems


def test_a_card_in_small_letters_gives_the_output_its_licence(tmp_path: Path) -> None:
    card = "---\nlicense: mit\n---\n# Mine\n"
    base = save_model(tmp_path / "base", language_model(0), side_files={"Readme.md": card})
    merge(base, save_model(tmp_path / "ft", language_model(1)), tmp_path / "out")
    assert "license: mit" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/README.base.md").read_text() == card


def test_names_that_a_disk_cannot_hold_are_found_before_the_work(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0), side_files={"what?.txt": "x"})
    ft = save_model(tmp_path / "ft", language_model(1))
    merge(base, ft, tmp_path / "out")
    with disk(tmp_path / "real", tmp_path / "disk", "no-signs") as place:
        with pytest.raises(OutputError, match=r"what\?\.txt: the disk of .* cannot hold this name"):
            merge(base, ft, place / "out")
        assert not list(place.iterdir())
        merge(base, ft, place / "out", files_from="ft")


@pytest.mark.parametrize("name", ["a:b", "what?.txt", "x/nul.json", "COM1", "end.", "end ", "a\\b", "tab\t"])
def test_names_that_windows_cannot_hold_are_found_when_planning(name: str) -> None:
    with pytest.raises(CheckpointError, match="Windows has no file names"):
        check_names(["config.json", name], is_windows=True)
    check_names([name], is_windows=False)
    check_names(["config.json", "sub/console.py", "a b.txt", ".gitattributes"], is_windows=True)


def test_what_systems_leave_in_folders_is_never_published(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Neither from an input nor from the work folder, where a file browser leaves them while a merge runs."""
    merge(*pair, tmp_path / "whole", [0.3, 0.5], **SMALL)
    names = ["._config.json", ".DS_Store", "desktop.ini", "Thumbs.db", "sub/._x"]
    for name in names:
        (pair[0] / name).write_text("junk")
    add = WorkFolder.add

    def with_junk(self: WorkFolder, label: str, name: str, chunks: Any) -> str:
        for folder in (self.path, self.path / "files", self.folder(label), self.folder(label) / "sub"):
            for junk in (".DS_Store", "._journal.jsonl", "Thumbs.db"):
                if folder.exists():
                    (folder / junk).write_text("junk")
        return add(self, label, name, chunks)

    (tmp_path / "out").mkdir()
    (tmp_path / "out/.DS_Store").write_text("junk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "add", with_junk)
        merge(*pair, tmp_path / "out", [0.3, 0.5], **SMALL)
    (tmp_path / "out/.DS_Store").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    (tmp_path / "out/.DS_Store").write_text("junk")
    assert merge(*pair, tmp_path / "out", [0.3, 0.5], **SMALL).already_complete
    (tmp_path / "again/.slerp-merge").mkdir(parents=True)
    (tmp_path / "again/.slerp-merge/._lock").write_text("junk")
    told: list[str] = []
    merge(*pair, tmp_path / "again", [0.3, 0.5], on_warning=told.append, **SMALL)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert not any("DS_Store" in line or "Thumbs" in line for line in told)


@pytest.mark.parametrize("name", [r"..\x", r"C:\x", r"\x", "C:/x", "../x", "/x", r"a\..\..\x", "", "a\0"])
def test_no_name_in_a_file_leads_out_of_its_folder_on_any_system(name: str) -> None:
    assert leads_out(name, is_windows=True)
    assert leads_out(name) or name == "C:/x"
    assert not any(
        leads_out(good, is_windows=True) for good in ("a.json", "sub/a.json", "a..b", "..a/b", r"sub\a.json")
    )


def test_a_strangers_folder_names_nothing_outside_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """In SHA256SUMS, behind a link, in an index, in a journal: with --overwrite nothing there is touched."""
    merge(*pair, tmp_path / "whole", **SMALL)
    for name in ("victim.txt", "far/victim.txt", r"..\victim.txt", r"C:\victim.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    (out / "link").symlink_to(tmp_path / "far")
    names = ["../victim.txt", r"..\\victim.txt", r"C:\\victim.txt", "link/victim.txt", str(tmp_path / "victim.txt")]
    with (out / "SHA256SUMS").open("a") as sums:
        sums.writelines(f"\\{'0' * 64}  {name}\n" for name in names)
    assert not {name for name in read_sums(out) if "victim" in name} - {"link/victim.txt"}
    merge(*pair, out, 0.7, overwrite=True)
    index = pair[1] / "model.safetensors.index.json"
    for outside in (r"..\model-00001-of-00003.safetensors", r"C:\x.safetensors"):
        whole = index.read_text()
        index.write_text(whole.replace("model-00001-of-00003.safetensors", outside.replace("\\", "\\\\")))
        with pytest.raises(CheckpointError, match="is not a path inside the folder"):
            merge(*pair, tmp_path / "new")
        index.write_text(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "_move", lambda *words: (_ for _ in ()).throw(OutputError("stopped")))
        with pytest.raises(OutputError, match="stopped"):
            merge(*pair, tmp_path / "half", **SMALL)
    journal = Journal(tmp_path / "half/.slerp-merge/journal.jsonl")
    records = list(journal.records())
    for name in ("../victim.txt", r"..\victim.txt", r"C:\victim.txt", str(tmp_path / "victim.txt")):
        journal.path.unlink()
        bad = [{**r, "remove": {"": [name]}} if r["record"] == "publish" else r for r in records]
        journal.append(bad)
        with pytest.raises(OutputError, match="which is not a path inside OUT"):
            merge(*pair, tmp_path / "half", **SMALL)
    assert sorted(p.name for p in tmp_path.rglob("*victim.txt")) == sorted(
        ["victim.txt", "victim.txt", r"..\victim.txt", r"C:\victim.txt"]
    )


# ------------------------------------------------------------------------ two runs that no lock separates


def no_lock(fd: int) -> None:
    """Two machines on a mount with local locks."""


def record(**changes: Any) -> bytes:
    """What a run of another machine leaves."""
    other = {"run": "0" * 16, "machine": "far-away 1", "process": 1, "started": "1", "beats": 0}
    return json.dumps({**other, **changes}).encode()


def interrupted(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    """Work with some shards done."""
    with pytest.MonkeyPatch.context() as patch:
        publish, left = ShardWriter.publish, [2]

        def stop(self: ShardWriter) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OutputError("stopped")
            publish(self)

        patch.setattr(ShardWriter, "publish", stop)
        with pytest.raises(OutputError, match="stopped"):
            merge(*pair, tmp_path / "out", jobs=1, **SMALL)
    return tmp_path / "out/.slerp-merge"


def test_a_run_that_another_machines_lock_does_not_hold_up_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the other's record changes, or its process lives on this machine."""
    monkeypatch.setattr(lock, "lock_file", no_lock)
    monkeypatch.setattr(owner, "_PATIENCE_SECONDS", 5)
    work = tmp_path / "out/.slerp-merge"
    work.mkdir(parents=True)
    (work / "owner").write_bytes(record())
    timer = threading.Timer(0.5, lambda: (work / "owner").write_bytes(record(beats=1)))
    timer.start()
    with pytest.raises(OutputError, match=r"another merge is writing here .process 1 on far-away."):
        merge(*pair, tmp_path / "out")
    timer.join()
    assert (work / "owner").read_bytes() == record(beats=1)
    with subprocess.Popen(["sleep", "60"]) as process:
        here = record(machine=owner.machine(), process=process.pid, started=owner._started(process.pid))
        (work / "owner").write_bytes(here)
        with pytest.raises(OutputError, match=f"another merge is writing here .process {process.pid} on"):
            merge(*pair, tmp_path / "out")
        process.kill()
    merge(*pair, tmp_path / "out")
    assert not work.exists()


def test_work_whose_run_may_not_have_ended_is_hashed_before_it_is_published(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that the other run finished, and one that it did not rename yet."""
    monkeypatch.setattr(owner, "_PATIENCE_SECONDS", 0.1)
    merge(*pair, tmp_path / "whole", **SMALL)
    work = interrupted(tmp_path, pair)
    done, part = next((work / "files").glob("*.safetensors")), next((work / "files").glob("*.part"))
    for path in (done, part):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    (work / "owner").write_bytes(record())
    told: list[str] = []
    merge(*pair, tmp_path / "out", on_warning=told.append, **SMALL)
    assert any("was begun on another machine" in line for line in told)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_is_renamed_only_if_its_own_run_had_finished_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Parts of other runs, of the right size, are never published."""
    merge(*pair, tmp_path / "whole", **SMALL)
    work = interrupted(tmp_path, pair)
    (part,) = (work / "files").glob("*.part")
    whole = part.read_bytes()
    other = part.with_name(f"{part.name.removesuffix('.part').rpartition('.')[0]}.{'0' * 16}.part")
    other.write_bytes(bytes(len(whole)))
    part.write_bytes(bytes(len(whole)))
    merge(*pair, tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_at_once_without_a_lock_make_one_whole_output(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the first is when the second comes: it takes the folder, and the first ends with a plain message."""
    merge(*pair, tmp_path / "whole", **SMALL)
    monkeypatch.setattr(lock, "lock_file", no_lock)
    monkeypatch.setattr(owner, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(owner, "has_ended", lambda content: None if content else True)
    moments = ((ShardWriter, "sync"), (ShardWriter, "publish"), (WorkFolder, "add"), (WorkFolder, "publish"),
               (WorkFolder, "findings"), (WorkFolder, "_move"))  # fmt: skip
    for kind, name in moments:
        real, begun = getattr(kind, name), list[bool]()

        def come_between(*words: Any, real: Any = real, begun: list[bool] = begun, **more: Any) -> Any:
            if not begun:
                begun.append(True)
                with contextlib.suppress(OutputError):
                    merge(*pair, tmp_path / "out", **SMALL)
            return real(*words, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, name, come_between)
            try:
                merge(*pair, tmp_path / "out", **SMALL)
            except MergeToolError as e:
                assert str(e).startswith(str(tmp_path / "out")), str(e)  # noqa: PT017
        merge(*pair, tmp_path / "out", **SMALL)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), name
        shutil.rmtree(tmp_path / "out")


def test_the_record_of_a_run_changes_while_it_works_and_goes_with_it(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "_BEAT_SECONDS", 0.0)
    seen = set()
    path = tmp_path / "out/.slerp-merge/owner"
    merge(*pair, tmp_path / "out", on_progress=lambda *_: seen.add(path.read_bytes()), **SMALL)
    assert len(seen) > 3
    assert not path.exists()


def test_a_work_folder_that_another_run_has_just_removed_is_said(tmp_path: Path) -> None:
    """No advice to correct anything: that run has finished."""
    with pytest.raises(OutputError, match=r"out: another merge has just ended here\. Run the same command"):
        owner.Owner(tmp_path / "out/.slerp-merge")


def test_a_share_without_locks_is_used_on_every_system(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no names in the kernel to lock instead: the record alone keeps two runs apart."""
    import fcntl

    def refuse(*words: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "sys", SimpleNamespace(platform="darwin"))
    merge(*pair, tmp_path / "out")


# ---------------------------------------------------------------------------------- refused without need


@pytest.mark.parametrize("oddity", ["new-inodes", "no-sizes", "no-folder-sync"])
def test_an_odd_disk_is_merged_from_and_into(tmp_path: Path, oddity: str) -> None:
    """Inode numbers that change, sizes that are not known, folders that cannot be synced: of inputs and of OUT."""
    base, ft = models(tmp_path / "plain")
    merge(base, ft, tmp_path / "whole", **SMALL)
    with disk(tmp_path / "real", tmp_path / "disk", oddity) as place:
        models(place)
        told: list[str] = []
        merge(place / "base", place / "ft", place / "out", on_warning=told.append, **SMALL)
        assert contents(place / "out") == contents(tmp_path / "whole")
        merge(place / "base", place / "ft", place / "out", 0.7, overwrite=True)
        merge(place / "base", place / "ft", place / "one.safetensors")
        assert not verify(place / "out", (place / "base", place / "ft"), full=True)[0].problems
        said = [line for line in told if "power cut" in line]
        assert len(said) == (oddity == "no-folder-sync")


def test_an_input_that_changes_on_such_a_disk_is_noticed(tmp_path: Path) -> None:
    """By its size or time; the advice is the plain command."""
    with disk(tmp_path / "real", tmp_path / "disk", "new-inodes") as place:
        base, _ = models(place)
        file = LocalFile(base / "model.safetensors", "model.safetensors")
        file.read_into(0, memoryview(bytearray(8)))
        os.utime(base / "model.safetensors", (1, 1))
        with pytest.raises(CheckpointError, match=r"changed while it was being merged.*run the same command") as caught:
            file.read_into(0, memoryview(bytearray(8)))
        assert "--overwrite" not in str(caught.value)


def test_inodes_count_where_they_are_a_files_own(tmp_path: Path) -> None:
    """A file that was replaced by one of the same size and time is another, on Linux's own disks."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:50 / /m rw - fuse.sshfs host rw\n3 1 0:51 / /n rw - nfs4 host rw\n"
    )
    kinds = [mounted_kinds(os.makedev(*pair), mounts) for pair in ((8, 1), (0, 50), (0, 51), (0, 52))]
    assert kinds == [["ext4"], ["fuse.sshfs"], ["nfs4"], []]
    assert [has_stable_inodes(kind) for kind in kinds] == [True, False, True, False]
    assert mounted_kinds(os.makedev(8, 1), tmp_path / "no-such-file") == []
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    os.utime(path, (1, 1))
    file = LocalFile(path, "x")
    (tmp_path / "y").write_bytes(b"87654321")
    os.utime(tmp_path / "y", (1, 1))
    (tmp_path / "y").replace(path)
    with pytest.raises(CheckpointError, match="changed"):
        file.read_into(0, memoryview(bytearray(8)))


def test_a_disk_that_says_no_sizes_is_told_as_unknown(tmp_path: Path) -> None:
    """Zero bytes of zero are no full disk; some free bytes too few are."""
    with disk(tmp_path / "real", tmp_path / "disk", "no-sizes") as place:
        base, ft = models(place)
        prepared = plan_recipe(pair_recipe(base, ft), place / "out")
        assert prepared.free_disk_bytes is None
        assert "  disk      free space unknown" in plan_lines(prepared, complete=False)
        assert plan_json(prepared, complete=False)["free_disk_bytes"] is None
        Download(nbytes=10**15, cache=place).check_room()
    assert free_bytes(tmp_path / "missing") is None


def test_a_small_model_fits_a_small_disk(tmp_path: Path, pair: tuple[Path, Path], small_disk: Path) -> None:
    """The reserve for report and journal is in proportion; the message names it apart from the output."""
    subprocess.run(["mount", "-o", "remount,size=100k", small_disk], check=True)
    with pytest.raises(OutputError, match=r"the output takes .* kB, its report and journal up to 2.. kB; the disk"):
        merge(*pair, small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    merge(*pair, small_disk / "out")


def test_shards_are_no_larger_than_the_disk_takes(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known beforehand, smaller ones are made, and that is said. The same command continues, and knows its output."""
    monkeypatch.setattr(prepare, "largest_file", lambda folder: 30_000)
    with disk(tmp_path / "real", tmp_path / "disk", "largest=30000") as place:
        told: list[str] = []
        merge(*pair, place / "out", on_warning=told.append)
        assert any("files of at most 30,000 bytes, so the shards have at most 28,125" in line for line in told)
        assert merge(*pair, place / "out").already_complete
        merge(*pair, tmp_path / "whole", max_shard_bytes=28_125)
        assert contents(place / "out") == contents(tmp_path / "whole")
        assert not verify(place / "out", pair, full=True)[0].problems
        with pytest.raises(OutputError, match=r"files of at most 30,000 bytes, this one has .*, or give a folder"):
            merge(*pair, place / "out.safetensors")
    monkeypatch.setattr(prepare, "largest_file", lambda folder: 1_000)
    with pytest.raises(OutputError, match=r"files of at most 1,000 bytes, and .* alone needs a larger one"):
        merge(*pair, tmp_path / "new")
    monkeypatch.setattr(prepare, "largest_file", lambda folder: 10**9)
    warned: list[str] = []
    merge(*pair, tmp_path / "one", on_warning=warned.append)
    assert not any("its disk holds" in line for line in warned)


def test_shards_are_no_larger_than_a_limit_of_the_process(tmp_path: Path) -> None:
    """`ulimit -f` can be asked beforehand, too."""
    base, ft = (save_model(tmp_path / name, {"a": big(n), "b": big(n + 2)}) for n, name in enumerate(("base", "ft")))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))  # noqa: E731

    def run(out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "merge_tool", "merge", base, ft, tmp_path / out]
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)

    done = run("out")
    assert done.returncode == 0, done.stderr
    assert "ulimit -f allows files of at most 250,000 bytes, so the shards have at most 234,375" in done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert "Raise that limit, or give a folder as OUT" in run("out.safetensors").stderr


def test_a_limit_that_was_not_known_is_told_as_one(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Freeing space would not help; another shard size does, and is taken while no shard is finished."""
    with disk(tmp_path / "real", tmp_path / "disk", "largest=30000") as place:
        with pytest.raises(OutputError, match=r"File too large.*Give a smaller max_shard_bytes"):
            merge(*pair, place / "out")
        merge(*pair, place / "out", **SMALL)
        merge(*pair, tmp_path / "whole", **SMALL)
        assert contents(place / "out") == contents(tmp_path / "whole")


def test_a_drive_that_is_missing_is_said(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows the root of a drive is its own parent, and may not exist."""
    real = Path.exists
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: path.is_relative_to(tmp_path) and real(path))
        with pytest.raises(OutputError, match=r"there is no /\. Mount that disk, or choose another OUT"):
            merge(*pair, "/no-such-drive/out")


def test_hints_that_the_system_refuses_end_nothing(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """posix_fadvise and sched_getaffinity; and a truncation that changes nothing is not asked for."""
    merge(*pair, tmp_path / "whole", **SMALL)

    def refuse(*words: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    monkeypatch.setattr(os, "ftruncate", refuse)
    monkeypatch.setattr(api, "under_pressure", lambda budget: True)
    merge(*pair, tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EPERM, errno.ENOSYS])
def test_folders_that_cannot_be_synced_are_told_once(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file that cannot be synced is an error still, and so is a disk that fails."""
    fsync = os.fsync

    def refuse(fd: int, of_folders: bool = True) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    told: list[str] = []
    merge(*pair, tmp_path / "out", on_warning=told.append, **SMALL)
    assert sum("cannot sync folders" in line for line in told) == 1
    monkeypatch.setattr(os, "fsync", lambda fd: refuse(fd, False))
    with pytest.raises(OutputError, match=r"writing failed|Correct that"):
        merge(*pair, tmp_path / "new", **SMALL)


def test_a_sync_on_macos_empties_the_drives_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By F_FULLFSYNC; by fsync on a share that has no such call."""
    asked: list[Any] = []

    def fcntl(fd: int, call: int) -> None:
        asked.append(call)
        if len(asked) > 1:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=fcntl))
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append("fsync"))
    files.write_whole(tmp_path / "a", [b"x"])
    files.write_whole(tmp_path / "b", [b"x"])
    assert asked == [51, 51, "fsync"]


# ------------------------------------------------------------------------------------- inputs that are gone


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ECONNABORTED, errno.ENOTCONN, errno.EIO])
@pytest.mark.parametrize("call", ["preadv", "open", "fstat"])
def test_an_input_that_is_gone_is_named(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    """Wherever it fails: not OUT, nor "None"."""
    real, begun = getattr(os, call), list[bool]()
    victim = str(pair[1].resolve() / "model-00002-of-00003.safetensors")

    def fail(first: Any, *words: Any, **more: Any) -> Any:
        path = first if call == "open" else f"/proc/self/fd/{first}"
        if begun and os.path.realpath(path) == victim:
            raise OSError(number, os.strerror(number))
        return real(first, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"ft/model-00002-of-00003\.safetensors: ") as caught:
            merge(*pair, tmp_path / "out", on_start=lambda total: begun.append(True), **SMALL)
    assert "None" not in str(caught.value)
    assert ("mount it again" in str(caught.value)) == (number != errno.EIO)
    merge(*pair, tmp_path / "out", **SMALL)


@pytest.mark.parametrize("moment", ["before", "while it is planned", "while it is merged"])
def test_a_disk_that_dies_is_named_by_its_input(tmp_path: Path, pair: tuple[Path, Path], moment: str) -> None:
    with disk(tmp_path / "real", tmp_path / "disk") as place:
        _, ft = models(place)

        def die(*words: Any) -> None:
            DRIVERS[place].kill()
            DRIVERS[place].wait()

        with pytest.MonkeyPatch.context() as patch:
            if moment == "before":
                die()
            elif moment == "while it is planned":
                patch.setattr(api, "check_apart", die)
            on_start = die if moment == "while it is merged" else None
            with pytest.raises(MergeToolError) as caught:
                merge(pair[0], ft, tmp_path / "out", on_start=on_start, overwrite=True)
        assert not str(caught.value).startswith(str(tmp_path / "out")), str(caught.value)
        assert "None" not in str(caught.value)
        assert "ft" in str(caught.value)
        assert "mount it again" in str(caught.value)


def test_a_hidden_input_is_not_called_missing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Nor looked up on the Hub: behind a dead mount nothing can be seen, so the spelling is not to blame."""
    with disk(tmp_path / "real", tmp_path / "disk") as place, pytest.MonkeyPatch.context() as patch:
        models(place)
        DRIVERS[place].kill()
        DRIVERS[place].wait()
        patch.chdir(tmp_path)
        for ref in ("disk/ft", "disk/ft/model-00001-of-00003.safetensors", f"{pair[0]}+disk/adapter", place / "ft"):
            for act in (lambda ref: merge(pair[0], ref, tmp_path / "out"), inspect):
                with pytest.raises(CheckpointError, match=r"disk/(ft|adapter).*: cannot be read .* mount it again"):
                    act(ref)


@pytest.mark.parametrize("victim", ["base", "ft"])
@pytest.mark.parametrize("vocab", [None, "union"])
def test_a_tokenizer_that_cannot_be_read_is_named_with_its_model(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, victim: str, vocab: str | None
) -> None:
    for path in pair:
        (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    real = Path.open

    def fail(self: Path, *words: Any, **more: Any) -> Any:
        if self.parts[-2:] == (victim, "tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *words, **more)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointError, match=rf"{victim}/tokenizer\.json: cannot be read \(Permission denied\)"):
        merge(*pair, tmp_path / "out", vocab=vocab)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_file_that_cannot_be_looked_at_is_not_taken_for_missing(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The output would silently be another one: a model without its configuration, for example."""
    (pair[0] / "generation_config.json").write_text('{"eos_token_id": 3}')
    (pair[0] / "tokenizer.json").write_text("{}")
    real, victim = os.lstat, str(pair[0].resolve() / name)

    def fail(path: Any, **more: Any) -> os.stat_result:
        if os.fspath(path) == victim:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **more)

    monkeypatch.setattr(os, "lstat", fail)
    with pytest.raises(CheckpointError, match=rf"base/{name}: cannot be "):
        merge(*pair, tmp_path / "out", vocab="base" if name == "tokenizer.json" else None)
    assert not (tmp_path / "out").exists()


def test_a_sweep_shows_other_machines_that_it_works(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it merges, and while its command runs, which may take hours."""
    monkeypatch.setattr(owner, "_BEAT_SECONDS", 0.0)
    monkeypatch.setattr("merge_tool.sweeps.scores._BEAT_SECONDS", 0.05)
    path, beats = tmp_path / "lab/.sweep/owner", list[bool]()
    beat = owner.Owner.beat
    monkeypatch.setattr(owner.Owner, "beat", lambda self: (beats.append(".sweep" in self.path.parts), beat(self))[1])
    watch = tmp_path / "watch.py"
    watch.write_text(
        "import json, sys, time\nbeats = set()\n"
        "for _ in range(40):\n    time.sleep(0.02)\n    text = open(sys.argv[1]).read()\n"
        "    beats.add(json.loads(text)['beats'] if text else 0)\nprint('beats', len(beats))\n"
    )
    command = [sys.executable, str(watch), str(path)]
    report = sweep(*pair, tmp_path / "lab", [0.3, 0.6], command)
    assert all(point.scores["beats"] > 2 for point in report.points)
    assert sum(beats) > 60  # of the sweep's own folder, at each piece of a merge
