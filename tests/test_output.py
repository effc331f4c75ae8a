"""The output appears whole: work folder, journal, lock, publishing, resuming, overwriting."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import DataError, MergeToolError, OutputError, merge
from merge_tool.api import plan_recipe
from merge_tool.checkpoint import writer as writer_module
from merge_tool.methods.inner import PairSums
from merge_tool.output.journal import Journal
from merge_tool.output.lock import FolderLock
from merge_tool.output.marks import MARK
from merge_tool.output.work_folder import WorkFolder
from merge_tool.plan.target import Target
from merge_tool.recipe.pair import pair as pair_recipe
from merge_tool.run.findings import Finding, from_record, to_record

SMALL = {"max_shard_bytes": 10_000}
COMMAND = [sys.executable, str(Path(__file__).with_name("small_shards.py")), "merge"]


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(OutputError) as caught:
        merge(*args, **options)
    return str(caught.value)


def test_the_same_merge_again_is_already_complete(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    first = merge(*pair, tmp_path / "out", [0.3, 0.5], **SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = merge(*pair, tmp_path / "out", [0.3, 0.5], **SMALL)
    assert (first.already_complete, again.already_complete) == (False, True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert again.summary == first.summary


def test_an_output_whose_inputs_changed_is_not_complete(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    save_model(pair[1], language_model(2), shards=3)
    assert "not the result of this merge" in refusal(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "out", overwrite=True)
    merge(*pair, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"t": 0.6}, "t was 0.5, now 0.6"),
        ({"t": [0.5, 0.6]}, "t was 0.5, now 0.5, 0.6"),
        ({"method": "linear"}, "method was slerp, now linear"),
        ({"dtype": "float32"}, "dtype was none, now float32"),
        ({"max_shard_bytes": 5000}, "max_shard_bytes was 5,000,000,000, now 5,000"),
        ({"t_for": {"mlp": 0.2}, "exclude": ["norm"]}, "t_for was none, now mlp=0.2; exclude was none, now norm"),
    ],
)
def test_an_output_of_another_merge_says_what_differs(
    tmp_path: Path, pair: tuple[Path, Path], other: Any, what: str
) -> None:
    merge(*pair, tmp_path / "out")
    before = contents(tmp_path / "out")
    said = refusal(*pair, tmp_path / "out", **other)
    assert f"{tmp_path}/out: is not empty, and not the result of this merge: {what}. " in said
    assert said.endswith("Choose another OUT, or overwrite=True.")
    assert contents(tmp_path / "out") == before


def test_an_output_of_other_models_or_several_t_says_what_differs(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", t=[0.3, 0.6])
    assert "this merge: t was 0.3, 0.6, now 0.3. Choose" in refusal(*pair, tmp_path / "out", t=0.3)
    other = save_model(tmp_path / "other", language_model(1), shards=3)
    assert "this merge: ft was ft, now other. Choose" in refusal(pair[0], other, tmp_path / "out", t=[0.3, 0.6])
    save_model(pair[1], language_model(7), shards=3)
    assert "this merge: the weights of ft changed. Choose" in refusal(*pair, tmp_path / "out", t=[0.3, 0.6])
    save_model(pair[1], language_model(1), shards=4)
    assert "this merge: the files of ft changed. Choose" in refusal(*pair, tmp_path / "out", t=[0.3, 0.6])
    (tmp_path / "out/t-0.3/merge_report.json").write_text("{}")
    (tmp_path / "out/t-0.6/merge_report.json").write_text('{\n "t": []\n,\n "tensors": [\n ]\n}\n')
    assert "not the result of this merge. Choose" in refusal(*pair, tmp_path / "out", t=[0.3, 0.6])


def test_a_damaged_output_is_not_complete(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", **SMALL)
    (tmp_path / "out/model.safetensors.index.json").unlink()
    said = refusal(*pair, tmp_path / "out", **SMALL)
    assert "not the result of this merge: model.safetensors.index.json changed or missing. Choose" in said


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    assert "is not empty" in refusal(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/thesis.txt").read_text() == "precious"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "empty").mkdir()
    merge(*pair, tmp_path / "empty")
    merge(*pair, tmp_path / "a/b/c")
    assert contents(tmp_path / "empty") == contents(tmp_path / "a/b/c")


def test_overwrite_replaces_an_older_model_completely(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """From many shards to one and back: nothing of the older model's weights or index stays."""
    merge(*pair, tmp_path / "out", **SMALL)
    (tmp_path / "out/pytorch_model.bin").write_bytes(b"stale")
    merge(*pair, tmp_path / "out", overwrite=True)
    merge(*pair, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    merge(*pair, tmp_path / "out", overwrite=True, **SMALL)
    merge(*pair, tmp_path / "many", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "many")


def test_a_failing_overwrite_keeps_the_old_output(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    before = contents(tmp_path / "out")
    bad = language_model(1)
    bad["model.norm.bias"][3] = float("nan")
    with pytest.raises(DataError):
        merge(pair[0], save_model(tmp_path / "bad", bad), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_outputs_inside_or_around_inputs_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, ft = pair
    before = contents(tmp_path)
    for out in (base, ft, base / "out", ft / "a" / "b", tmp_path, base / "model.safetensors"):
        assert "inside or around" in refusal(base, ft, out)
        assert "inside or around" in refusal(base, ft, out, overwrite=True)
    assert contents(tmp_path) == before


def test_kinds_of_out_that_do_not_fit(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file, expected a folder" in refusal(*pair, tmp_path / "file")
    (tmp_path / "dir.safetensors").mkdir()
    assert "is a folder, but a name ending in .safetensors" in refusal(*pair, tmp_path / "dir.safetensors")
    (tmp_path / "x.safetensors").write_text("x")
    assert "exists already" in refusal(*pair, tmp_path / "x.safetensors")
    merge(*pair, tmp_path / "x.safetensors", overwrite=True)
    assert not (tmp_path / "x.safetensors.partial").exists()


def test_too_little_disk_is_said_before_starting(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "the disk has 1 kB free" in refusal(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- resuming


class Stop(Exception):
    """Stands for a kill at a point of our choice."""


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let `owner.name` be called so many times, then stop the run for good."""
    original, left = getattr(owner, name), [calls]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("calls", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Journal, "append"),
        (writer_module.ShardWriter, "publish"),
        (writer_module.ShardWriter, "sync"),
        (WorkFolder, "add"),
        (WorkFolder, "publish"),
        (Path, "replace"),
        (Path, "unlink"),
    ],
)
def test_a_run_stopped_anywhere_continues_to_the_same_bytes(
    tmp_path: Path, pair: tuple[Path, Path], owner: Any, name: str, calls: int
) -> None:
    """Into a new folder and over an older output; what it leaves meanwhile never looks like a model."""
    merge(*pair, tmp_path / "whole", [0.3, 0.5], **SMALL)
    merge(*pair, tmp_path / "out", [0.3, 0.7], **SMALL)
    for out in (tmp_path / "out", tmp_path / "new"):
        before = contents(out)
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, owner, name, calls)
            try:
                merge(*pair, out, [0.3, 0.5], overwrite=True, **SMALL)
            except Stop:
                left = {name: content for name, content in contents(out).items() if MARK not in name}
                assert (out / ".slerp-merge").exists() or left == before
        for label in ("t-0.3", "t-0.5"):
            index = out / label / "model.safetensors.index.json"
            if index.exists():
                weight_map = json.loads(index.read_text())["weight_map"]
                assert {p.name for p in (out / label).glob("*.safetensors")} >= set(weight_map.values())
        merge(*pair, out, [0.3, 0.5], overwrite=True, **SMALL)
        for label in ("t-0.3", "t-0.5"):
            assert contents(out / label) == contents(tmp_path / "whole" / label)
        assert not (out / ".slerp-merge").exists()


def test_finished_shards_are_not_made_again(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, writer_module.ShardWriter, "sync", 2)
        with pytest.raises(Stop):
            merge(*pair, tmp_path / "out", jobs=1, **SMALL)
    opened: list[int] = []
    original = WorkFolder.open_shard

    def recorded(self: WorkFolder, shard: Any, header: bytes) -> Any:
        opened.append(shard.number)
        return original(self, shard, header)

    monkeypatch.setattr(WorkFolder, "open_shard", recorded)
    totals: list[int] = []
    merge(*pair, tmp_path / "out", on_start=totals.append, **SMALL)
    assert 0 not in opened
    assert opened
    merge(*pair, tmp_path / "whole", on_start=totals.append, **SMALL)
    assert totals[0] < totals[1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def unfinished(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        stop_after(patch, writer_module.ShardWriter, "sync", 2)
        with pytest.raises(Stop):
            merge(*pair, tmp_path / "out", jobs=1, **SMALL)
    return tmp_path / "out"


def test_another_merge_over_unfinished_work_names_the_difference(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unfinished(tmp_path, pair, monkeypatch)
    assert "t was 0.5, now 0.7" in refusal(*pair, out, 0.7, **SMALL)
    assert "method was slerp, now linear" in refusal(*pair, out, method="linear", **SMALL)
    os.utime(pair[1] / "model-00002-of-00003.safetensors")
    message = refusal(*pair, out, **SMALL)
    assert "ft/model-00002-of-00003.safetensors changed since" in message
    assert "overwrite=True to start anew" in message
    merge(*pair, out, 0.7, overwrite=True, **SMALL)
    merge(*pair, tmp_path / "whole", 0.7, **SMALL)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"record": "plan"}\n', b"\xff\xfe", b"[]\n"])
def test_a_journal_that_is_not_ours_starts_anew(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    out = unfinished(tmp_path, pair, monkeypatch)
    (out / ".slerp-merge/journal.jsonl").write_bytes(damage)
    merge(*pair, out, **SMALL)
    merge(*pair, tmp_path / "whole", **SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_journal_ends_at_the_first_line_that_is_damaged(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digit, a letter or a bracket changed, in any line: what it and those after it speak of is merged again."""
    merge(*pair, tmp_path / "whole", **SMALL)
    out = unfinished(tmp_path, pair, monkeypatch)
    shutil.copytree(out, tmp_path / "kept")
    lines = (out / ".slerp-merge/journal.jsonl").read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        place = len(line) * (number + 1) // (len(lines) + 1)
        damaged = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
        (out / ".slerp-merge/journal.jsonl").write_bytes(b"".join([*lines[:number], damaged, *lines[number + 1 :]]))
        merge(*pair, out, **SMALL)
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_is_half_published_is_checked_where_it_is(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """With `check_resumed`: a shard that is in OUT already, or not yet, and was damaged since, is named, and nothing
    goes on; undamaged ones are published."""
    options: dict[str, Any] = {} if "." in out else {"t": [0.3, 0.5], **SMALL}
    merge(*pair, tmp_path / "whole" / out, **options)
    with monkeypatch.context() as patch:
        if options:
            stop_after(patch, WorkFolder, "_move", 1)
        else:
            stop_after(patch, FolderLock, "remove_with", 0)
        with pytest.raises(Stop):
            merge(*pair, tmp_path / "half" / out, **options)
    shards = sorted((tmp_path / "half").rglob("*.safetensors"))
    places = {".slerp-merge" in shard.parts for shard in shards}
    assert places == ({False, True} if options else {False})
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        before = contents(tmp_path / "half")
        told = refusal(*pair, tmp_path / "half" / out, check_resumed=True, overwrite=not options, **options)
        assert f"was half published, and {shard.name} was damaged since" in told
        changed = {name for name, content in contents(tmp_path / "half").items() if content != before[name]}
        assert {name.split("/")[-1] for name in changed} == {"lock"}
        shard.write_bytes(whole)
    merge(*pair, tmp_path / "half" / out, check_resumed=True, overwrite=not options, **options)
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


# ------------------------------------------------------------------------- other people's files, other models


def test_two_finetunes_of_one_name_and_layout_are_told_apart(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0))
    first, second = (save_model(tmp_path / f"run{n}/ft", language_model(n)) for n in (1, 2))
    for path in second.iterdir():
        os.utime(path, (1, 1))
    merge(base, first, tmp_path / "out")
    assert "not the result of this merge" in refusal(base, second, tmp_path / "out")
    assert merge(base, first, tmp_path / "out").already_complete


@pytest.mark.parametrize("name", ["config.json", "README.md", "SHA256SUMS", "sub/chat.jinja"])
def test_an_output_that_lacks_a_file_is_not_complete(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    merge(*pair, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    assert "not empty" in refusal(*pair, tmp_path / "out") or name == "SHA256SUMS"


def test_an_output_whose_side_files_changed_is_not_complete(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    (pair[0] / "tokenizer.json").write_text("{ }")
    assert "tokenizer.json changed since" in refusal(*pair, tmp_path / "out")


def test_work_folders_that_are_not_ours_are_left_alone(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "x.safetensors.partial").mkdir()
    (tmp_path / "x.safetensors.partial/thesis.txt").write_text("precious")
    assert "holds other files (thesis.txt)" in refusal(*pair, tmp_path / "x.safetensors", overwrite=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.txt").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.slerp-merge").symlink_to("../elsewhere")
    assert ".slerp-merge: is a link" in refusal(*pair, tmp_path / "out")
    (tmp_path / "y.safetensors.partial").write_text("precious")
    assert "partial: is a file" in refusal(*pair, tmp_path / "y.safetensors")
    assert (tmp_path / "elsewhere/thesis.txt").read_text() == "precious"
    assert (tmp_path / "x.safetensors.partial/thesis.txt").read_text() == "precious"


def test_an_empty_work_folder_does_not_make_out_ours(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "out/.slerp-merge").mkdir(parents=True)
    (tmp_path / "out/model.safetensors").write_text("precious")
    assert "is not empty" in refusal(*pair, tmp_path / "out")
    assert contents(tmp_path / "out") == {"model.safetensors": b"precious"}


def test_a_run_that_finishes_first_is_not_merged_over(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look at OUT and our lock, another process completes a merge there."""
    from merge_tool import api

    original = api.check_room

    def other_first(prepared: Any, *, overwrite: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(api, "check_room", original)
            merge(*pair, tmp_path / "out", 0.25)
        original(prepared, overwrite=overwrite)

    monkeypatch.setattr(api, "check_room", other_first)
    assert "is not empty" in refusal(*pair, tmp_path / "out", 0.75)
    monkeypatch.setattr(api, "check_room", original)
    assert merge(*pair, tmp_path / "out", 0.25).already_complete


def test_a_half_done_overwrite_wants_its_flag_again(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(*pair, tmp_path / "out", 0.1)
    with monkeypatch.context() as patch:
        stop_after(patch, writer_module.ShardWriter, "sync", 0)
        with pytest.raises(Stop):
            merge(*pair, tmp_path / "out", 0.5, overwrite=True)
    assert "was begun with overwrite=True" in refusal(*pair, tmp_path / "out", 0.5)
    merge(*pair, tmp_path / "out", 0.5, overwrite=True)


def test_overwrite_leaves_no_older_model_in_any_corner(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Single, sweep, single; and what a loader would read from a stranger's folder."""
    out = tmp_path / "out"
    merge(*pair, out)
    merge(*pair, out, [0.3, 0.5], overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["t-0.3", "t-0.5"]
    (out / "t-notes").mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "thesis.txt").write_text("precious")
    warnings: list[str] = []
    merge(*pair, out, overwrite=True, on_warning=warnings.append)
    merge(*pair, tmp_path / "fresh")
    (out / "t-notes").rmdir()
    assert contents(out) == {**contents(tmp_path / "fresh"), "thesis.txt": b"precious"}
    assert any("also holds what was there before: t-notes, thesis.txt" in w for w in warnings)


def test_given_up_publishing_leaves_nothing_to_the_next_merge(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (pair[1] / "only_ft.txt").write_text("x")
    merge(*pair, out, 0.1)
    with monkeypatch.context() as patch:
        stop_after(patch, Path, "replace", 14)
        with pytest.raises(Stop):
            merge(*pair, out, 0.2, files_from="ft", overwrite=True, **SMALL)
    merge(*pair, out, 0.3, overwrite=True)
    merge(*pair, tmp_path / "fresh", 0.3)
    assert contents(out) == contents(tmp_path / "fresh")


def test_folders_in_the_way_are_named_before_the_work(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    (out / "config.json/x").mkdir(parents=True)
    (out / "model.safetensors").write_text("old")
    assert "config.json: is a folder where the new model has a file" in refusal(*pair, out, overwrite=True)
    (out / "config.json/x").rmdir()
    (out / "config.json").rmdir()
    (out / "sub").write_text("a file")
    assert "sub: is a file where the new model has a folder" in refusal(*pair, out, overwrite=True)
    assert contents(out) == {"model.safetensors": b"old", "sub": b"a file"}


def test_reports_go_where_they_harm_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"

    def report_refusal(path: Path, **options: Any) -> str:
        with pytest.raises(MergeToolError) as caught:
            merge(*pair, out, report_path=path, **options)
        return str(caught.value)

    for path in (pair[0] / "config.json", out / "r.json", out / ".slerp-merge/files/x"):
        assert "lies inside an input or the output" in report_refusal(path) or "folder is missing" in report_refusal(
            path
        )
    assert "its folder is missing" in report_refusal(tmp_path / "no/r.json")
    assert "is a folder" in report_refusal(tmp_path)
    assert "one report for one output" in report_refusal(tmp_path / "r.json", t=[0.1, 0.2])
    assert not out.exists()
    merge(*pair, out)
    merge(*pair, out, report_path=tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == (out / "merge_report.json").read_bytes()


def test_paths_that_the_system_refuses_are_our_errors(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for out in (tmp_path / ("x" * 300), tmp_path / "loop", tmp_path / "dangling"):
        refusal(*pair, out)
    with pytest.raises(MergeToolError):
        merge(tmp_path / "loop", pair[1], tmp_path / "out")
    with pytest.raises(MergeToolError):
        merge(tmp_path / ("x" * 300), pair[1], tmp_path / "out")


def test_a_journal_line_cut_short_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append([{"a": 1}, {"b": 2}])
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"c": 3')
    assert list(journal.records()) == [{"a": 1}, {"b": 2}]
    journal.trim()
    journal.append([{"d": 4}])
    assert list(journal.records()) == [{"a": 1}, {"b": 2}, {"d": 4}]


def test_records_come_back_exactly() -> None:
    sums = PairSums(0.1, -1e-300, 1 / 3, 2.0**-600, (-1, 0.7, 1e300, 5e-324))
    passes = [[0.1, [1 / 3, 5e-324]], [-1e300, []]]
    for finding in (Finding(), Finding(equal=True), Finding(sums, kept_base=True), Finding(passes=passes)):
        assert from_record(json.loads(json.dumps(to_record(finding)))) == finding


def test_two_merges_into_one_folder_exclude_each_other(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    prepared = plan_recipe(pair_recipe(*pair), tmp_path / "out", read_samples=True)
    with WorkFolder(Target(tmp_path / "out"), prepared.plan):
        assert "another merge is writing here" in refusal(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "out")


def test_a_lock_does_not_survive_its_process(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from merge_tool.output.lock import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    work = tmp_path / "out/.slerp-merge"
    work.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", hold, str(work)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert "another merge is writing here" in refusal(*pair, tmp_path / "out")
        process.kill()
    merge(*pair, tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (9, -9)])
def test_signals_leave_work_that_continues(tmp_path: Path, number: int, code: int) -> None:
    base = save_model(tmp_path / "base", language_model(0, hidden=512, layers=24, vocab=20000))
    ft = save_model(tmp_path / "ft", language_model(1, hidden=512, layers=24, vocab=20000))
    out = tmp_path / "out"
    command = [*COMMAND, str(base), str(ft), str(out), "--t", "0.2,0.4,0.6,0.8", "--max-shard-size", "4MB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    journal = out / ".slerp-merge/journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b'"record": "shard"') >= 2):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == code
    if code > 0:
        assert b"Run the same command to continue." in complaint
        assert b"Traceback" not in complaint
    assert not list(out.glob("t-*/*.index.json"))
    done = subprocess.run(command, check=True, capture_output=True)
    assert done.stderr.startswith(b"Continuing: an earlier run finished ")
    assert done.stderr.count(b"\n") == 1
    merge(base, ft, tmp_path / "whole", [0.2, 0.4, 0.6, 0.8], max_shard_bytes=4_000_000)
    assert contents(out) == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------------ durability


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_syscall_trace_shows_writes_then_sync_then_rename_then_sync_of_the_folder(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    """For every shard; and the index after all of them."""
    trace = tmp_path / "trace"
    calls = "trace=openat,pwrite64,write,fsync,fdatasync,rename,renameat,renameat2"
    command = [*COMMAND, *map(str, pair), str(tmp_path / "out"), "--max-shard-size", "10kB"]
    subprocess.run(["strace", "-f", "-y", "-e", calls, "-o", str(trace), *command], check=True, capture_output=True)
    events = parse_trace(trace.read_text(), tmp_path / "out")
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3

    def places(call: str, path: str, place: int = 1) -> list[int]:
        return [n for n, event in enumerate(events) if event[0] == call and event[place] == path]

    published = []
    for shard in shards:
        part = next(event[1] for event in events if re.fullmatch(rf".*/{shard}\.\w+\.part", event[1]))
        renamed, final = places("rename", part)[0], places("rename", shard, 2)[0]
        synced = places("sync", part)[-1]
        folder = min(n for n in places("sync", ".slerp-merge/files") if n > renamed)
        assert max(places("write", part)) < synced < renamed < folder < final
        published.append(final)
    index = places("rename", "model.safetensors.index.json", 2)[0]
    assert any(max(published) < n < index for n in places("sync", ""))
    assert any(n > index for n in places("sync", ""))
    assert index == max(n for n, event in enumerate(events) if event[0] == "rename")


def parse_trace(text: str, out: Path) -> list[tuple[str, str, str]]:
    """(write|sync|rename, path, second path) below `out`, in order of completion."""
    names = {"pwrite64": "write", "write": "write", "fsync": "sync", "fdatasync": "sync"}
    pending: dict[str, str] = {}
    events = []
    for line in text.splitlines():
        pid, rest = line.split(None, 1)
        if "<unfinished ...>" in rest:
            pending[pid] = rest.split("<unfinished")[0]
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = pending.pop(pid) + resumed[1]
        call = rest.split("(")[0]
        if call in names and (match := re.search(r"\(\d+<([^>]*)>", rest)):
            paths = [match[1]]
        elif call.startswith("rename"):
            paths = re.findall(r'"([^"]*)"', rest)
        else:
            continue
        if all(p == str(out) or p.startswith(f"{out}/") for p in paths):
            relative = [
                os.path.relpath(p, out).removeprefix(".") if p == str(out) else os.path.relpath(p, out) for p in paths
            ]
            events.append((names.get(call, "rename"), relative[0], relative[-1]))
    return events


def test_errors_of_fsync_are_errors(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(MergeToolError, match="Input/output error"):
            merge(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_says_so_and_continues(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system says it, at a write in the middle of the third shard."""
    original, left = writer_module.ShardWriter._write_some, [7]

    def full(self: Any, offset: int, data: memoryview) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return original(self, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.ShardWriter, "_write_some", full)
        message = refusal(*pair, tmp_path / "out", **SMALL)
    assert "No space left on device" in message
    assert "Free some space, then make the same call" in message
    merge(*pair, tmp_path / "out", **SMALL)
    merge(*pair, tmp_path / "whole", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_the_library_reads_otherwise_is_not_published(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit before publishing: here the last tensor's name is damaged on its way to the disk."""
    original = writer_module.ShardWriter.write

    def damaged(self: Any, offset: int, data: memoryview) -> None:
        text = bytes(data).replace(b"lm_head.weight", b"lm_head.wright") if offset == 0 else data
        original(self, offset, memoryview(text))

    monkeypatch.setattr(writer_module.ShardWriter, "write", damaged)
    assert "the safetensors library finds" in refusal(*pair, tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()


def test_nothing_is_written_outside_out(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "sub/out")
    merge(*pair, tmp_path / "sub2/one.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "ft", "sub", "sub2"}
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "sub2").iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize("changed", [0, 1])
def test_a_change_is_seen_in_either_of_two_folders_of_one_name(tmp_path: Path, changed: int) -> None:
    """What training leaves is called `final` on both sides."""
    sides = [save_model(tmp_path / run / "final", language_model(k)) for k, run in enumerate("ab")]
    merge(*sides, tmp_path / "out")
    later = (tmp_path / "out/merge_report.json").stat().st_mtime_ns + 10**9
    os.utime(sides[changed] / "model.safetensors", ns=(later, later))
    with pytest.raises(OutputError, match=r"final/model.safetensors changed since"):
        merge(*sides, tmp_path / "out")
