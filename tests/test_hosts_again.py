"""A merge by many workers whose OUT is finished, planned anew or changed meanwhile: no bytes but those of the plan."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from checkpoints import contents, language_model, load_file, save_file, save_model
from merge_tool import OutputError, RecipeError
from merge_tool.api import finish_parts, merge, merge_recipe, plan_parts
from merge_tool.checkpoint.writer import ShardWriter
from merge_tool.files import remove_tree
from merge_tool.hosts.receipts import PartsFolder
from merge_tool.hosts.worker import Worker
from merge_tool.recipe.pair import pair as pair_of
from merge_tool.recipe.recipe import Recipe
from test_hosts import killed, reference, run, ties_of_three
from test_vocab import tokenizer

Pair = tuple[Path, Path]


def small(pair: Pair, t: float = 0.4) -> Recipe:
    return pair_of(*pair, t, max_shard_bytes=20_000)


def make_all(plan_file: object, *rest: object) -> None:
    run("work", plan_file, *rest)


def change(model: Path) -> None:
    """Other values in a file of the same size."""
    shard = next(model.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-200:] = bytes(200)
    shard.write_bytes(data)


def test_a_finish_that_sees_other_inputs_keeps_the_work_and_the_old_model(pair: Pair, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    merge_recipe(small(pair, 0.7), out)
    before = contents(out)
    run("plan", *pair, out, "--t", "0.4", "--overwrite", "-o", plan)
    make_all(plan)
    began = contents(out)
    shard = next(pair[1].glob("*.safetensors"))
    kept, times = shard.read_bytes(), shard.stat()
    change(pair[1])
    for words in ([], ["--fill"]):
        assert "the inputs here differ from the plan's" in run("finish", plan, *words, code=1)
    assert {name: data for name, data in contents(out).items() if not name.startswith(".slerp-merge")} == before
    assert {name for name in contents(out) if "/owner" not in name} == {n for n in began if "/owner" not in n}
    shard.write_bytes(kept)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    run("finish", plan)
    assert contents(out) == reference(pair_of(*pair, 0.4), tmp_path)


def test_a_finish_that_is_repeated_says_that_all_is_there(pair: Pair, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    merge_recipe(pair_of(*pair, 0.7), out)
    run("plan", *pair, out, "--t", "0.4", "--overwrite", "-o", plan)
    make_all(plan)
    run("finish", plan)
    expected = reference(pair_of(*pair, 0.4), tmp_path)
    assert contents(out) == expected
    for words in ([], ["--fill"]):
        assert "already" in run("finish", plan, *words)
        assert contents(out) == expected


def test_a_finish_of_an_older_plan_leaves_the_newer_one_alone(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    older = plan_parts(small(pair, 0.7), out, 3, overwrite=True)
    Worker(older).make(older.parts[0])
    newer = plan_parts(small(pair), out, 3, overwrite=True)
    Worker(newer).make(range(len(newer.pieces)))
    began = contents(out)
    with pytest.raises(OutputError, match="is not the folder in which this merge was planned"):
        finish_parts(older, fill=True)
    assert contents(out).keys() == began.keys()
    finish_parts(newer)
    assert contents(out) == reference(small(pair), tmp_path)


@pytest.mark.parametrize("size", [20_000, 5_000_000])
def test_a_worker_of_an_older_plan_writes_nothing_into_the_newer_one(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Even if it is killed before it could leave its receipt."""
    out = tmp_path / "out"
    older = plan_parts(pair_of(*pair, 0.7, max_shard_bytes=size), out, 3)
    late = Worker(older)
    newer = plan_parts(pair_of(*pair, 0.4, max_shard_bytes=size), out, 3, overwrite=True)
    Worker(newer).make(range(len(newer.pieces)))
    with monkeypatch.context() as patched:
        patched.setattr(PartsFolder, "write", killed)
        with pytest.raises(OutputError, match="or planned anew"):
            late.make([0])
    finish_parts(newer)
    assert contents(out) == reference(pair_of(*pair, 0.4, max_shard_bytes=size), tmp_path)


@pytest.mark.parametrize("size", [20_000, 5_000_000])
def test_a_worker_that_comes_late_leaves_nothing_behind(pair: Pair, tmp_path: Path, size: int) -> None:
    out, recipe = tmp_path / "out", pair_of(*pair, 0.4, max_shard_bytes=size)
    plan = plan_parts(recipe, out, 3)
    late = Worker(plan)
    Worker(plan).make(range(len(plan.pieces)))
    finish_parts(plan)
    with pytest.raises(OutputError, match="or the merge was finished"):
        late.make([0])
    assert contents(out) == reference(recipe, tmp_path)


def test_a_folder_that_is_not_shared_is_not_begun_by_finish(pair: Pair, tmp_path: Path) -> None:
    plan = plan_parts(small(pair), tmp_path / "out", 3)
    elsewhere = replace(plan, out=str(tmp_path / "elsewhere"))
    with pytest.raises(OutputError, match="is not the folder in which this merge was planned"):
        finish_parts(elsewhere, fill=True)
    assert not (tmp_path / "elsewhere").exists()


def test_what_workers_have_finished_is_taken_by_any_merge(pair: Pair, tmp_path: Path) -> None:
    """By the same merge here, on an engine with other parts, and after a second plan."""
    expected = reference(small(pair), tmp_path)
    for number, name in enumerate(("here", "engine", "planned")):
        out = tmp_path / name
        plan = plan_parts(small(pair), out, 2)
        Worker(plan).make(plan.parts[0])
        if number == 0:
            assert merge_recipe(small(pair), out).num_resumed == len(plan.parts[0])
        elif number == 1:
            with ThreadPoolExecutor(1) as pool:
                report = merge_recipe(small(pair), out, executor=pool, num_parts=3)
            assert report.num_resumed == len(plan.parts[0])
        else:
            again = plan_parts(small(pair), out, 3)
            Worker(again).make(range(len(again.pieces)))
            Worker(plan).make(plan.parts[1])
            finish_parts(plan)
        assert contents(out) == expected


def test_several_values_of_several_parameters_are_planned(tmp_path: Path) -> None:
    ties_of_three(tmp_path)
    words = ["--set", "lambda=0.5,1", "--set", "weight=0.2,0.4", "--set", "density=0.5"]
    run("plan", tmp_path / "ties.yaml", tmp_path / "out", *words, "-o", tmp_path / "p.json")
    make_all(tmp_path / "p.json")
    run("finish", tmp_path / "p.json")
    run("run", tmp_path / "ties.yaml", tmp_path / "alone" / "out", *words)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")


PARAMETERS = {"weight": 0.5, "density": 0.5}
NAMED = {
    "dots": {"models": [{"model": "./m1", "parameters": PARAMETERS}, {"model": "sub/../m2", "parameters": PARAMETERS}]},
    "folders": {
        "models": [
            {"model": {"model": {"path": "./m1"}}, "parameters": PARAMETERS},
            {"model": "sub/m1", "parameters": PARAMETERS},
        ]
    },
    "options": {"dtype": "float32", "out_dtype": "float16", "parameters": {"normalize": False}},
    "tokenizer": {"tokenizer": {"source": "./m1", "tokens": {"d": {"source": "sub/m1"}}, "pad_to_multiple_of": 8}},
    "chosen": {},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_of_relative_paths_is_worked_on_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And the published recipe has the same names."""
    there = tmp_path / "there"
    for number, path in enumerate(("m0", "m1", "m2", "sub/m1")):
        tokens = tokenizer([*(f"t{k}" for k in range(99)), "bcad"[number]])
        settings = json.dumps({"chat_template": f"{{{{ messages }}}} {number}"})
        side = {"tokenizer.json": tokens, "tokenizer_config.json": settings}
        save_model(there / path, language_model(number), shards=2, side_files=side)
    models = [{"model": path, "parameters": PARAMETERS} for path in ("./m1", "./sub/m1")]
    recipe = {"merge_method": "ties", "base_model": "m0", "models": models, "tokenizer": {"source": "union"}}
    (there / "r.yaml").write_text(yaml.safe_dump(recipe | NAMED[name], sort_keys=False))
    monkeypatch.chdir(there)
    words = ["--chat-template", "./m1", "--files-from", "./sub/m1"] if name == "chosen" else []
    run("plan", "r.yaml", "out", "--parts", 3, *words, "-o", tmp_path / "p.json")
    run("run", "r.yaml", "alone/out", *words)
    monkeypatch.chdir(tmp_path)
    make_all("p.json")
    run("finish", "p.json")
    assert contents(there / "out") == contents(there / "alone" / "out")


@pytest.mark.parametrize("words", [[], ["--files-from", "ft"], ["--chat-template", "ft"]])
def test_a_pair_of_relative_paths_is_worked_on_from_anywhere(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    (pair[1] / "chat_template.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(pair[0])
    run("plan", ".", "../ft", "../out", *words, "-o", tmp_path / "p.json")
    run("merge", ".", "../ft", "../alone/out", *words)
    monkeypatch.chdir("/")
    make_all(tmp_path / "p.json")
    run("finish", tmp_path / "p.json")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")


def test_a_plan_is_written_over_no_file_of_yours(tmp_path: Path, pair: Pair) -> None:
    ties_of_three(tmp_path)
    recipe = tmp_path / "ties.yaml"
    text = recipe.read_text()
    cases = {
        recipe: "is a file, but not a plan",
        tmp_path / "m1" / "plan.json": "lies inside an input or the output",
        tmp_path / "out" / "plan.json": "lies inside an input or the output",
        tmp_path / "none" / "plan.json": "its folder is missing",
    }
    for path, message in cases.items():
        done = run("plan", recipe, tmp_path / "out", "-o", path, code=1)
        assert message in done.replace("\n", " ")
    assert recipe.read_text() == text
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # over a plan
        run("plan", recipe, tmp_path / "out", "-o", tmp_path / "p.json")


def test_an_engine_s_processes_may_be_in_another_folder(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    with ProcessPoolExecutor(1, get_context("spawn"), os.chdir, (there,)) as pool:
        merge("base", "ft", "out", t=0.4, executor=pool, num_parts=3, max_shard_bytes=20_000)
    assert contents(tmp_path / "out") == reference(small(pair), tmp_path)
    assert not list(there.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda receipt: receipt.update(sha256=[]),
        lambda receipt: receipt.update(sha256=["abc"]),
        lambda receipt: receipt.update(sha256="a" * 64),
        lambda receipt: receipt["sha256"].append("0" * 64),
    ],
)
def test_receipts_without_digests_are_refused(
    pair: Pair, tmp_path: Path, damage: Callable[[dict[str, object]], None]
) -> None:
    plan = plan_parts(small(pair), tmp_path / "out", 3)
    one = Worker(plan)
    one.make(range(len(plan.pieces)))
    path = one.parts.receipt(1)
    receipt = json.loads(path.read_text())
    damage(receipt)
    path.write_text(json.dumps(receipt))
    with pytest.raises(OutputError, match="is a damaged receipt"):
        finish_parts(plan)
    finish_parts(plan, fill=True)
    assert contents(tmp_path / "out") == reference(small(pair), tmp_path)


def test_a_folder_in_which_others_work_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    (folder / "0").mkdir(parents=True)
    started = threading.Event()

    def work() -> None:
        number = 0
        while True:
            number += 1
            try:
                (folder / f"{number}.claim").touch()
                started.set()
                (folder / f"{number - 40}.claim").unlink(missing_ok=True)
            except OSError:
                return

    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    remove_tree(folder)
    worker.join()
    assert not folder.exists()


def test_workers_are_counted_from_one(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("plan", *pair, tmp_path / "out", "-o", tmp_path / "p.json")
    assert "number of workers is 0" in run("work", tmp_path / "p.json", "--part", 0, "--of", 0, code=1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "number of workers is 0" in run("work", tmp_path / "p.json", "--of", 0, code=1)


def test_another_source_under_one_version_number_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkouts of one version would make parts that do not belong together."""
    plan = plan_parts(small(pair), tmp_path / "out", 2)
    monkeypatch.setattr("merge_tool.output.versions._source_sha256", lambda: "f" * 64)
    with pytest.raises(RecipeError, match=r"was made by slerp-merge .* this worker has .*\(f{16}\)"):
        Worker(plan)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_file_changed_in_place_ends_a_merge_that_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    """In the Hub's cache, too, where the folder still has its commit's name: half of the output would be of the old
    weights. What changes lies between the samples."""
    folder = tmp_path / "models--org--base/snapshots" / ("0123456789" * 4) if is_cached else tmp_path / "base"
    base, ft = (save_model(path, language_model(k), shards=3) for k, path in enumerate((folder, tmp_path / "ft")))
    original, left = ShardWriter.sync, [2]

    def stopping(self: ShardWriter) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "sync", stopping)
        with pytest.raises(KeyboardInterrupt):
            merge_recipe(small((base, ft)), tmp_path / "out", jobs=1)
    shard = base / "model-00003-of-00003.safetensors"
    tensors = {name: values.copy() for name, values in load_file(shard).items()}
    name = max(tensors, key=lambda n: tensors[n].size)
    tensors[name].ravel()[:1] = 3.0
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(OutputError, match=r"model-00003-of-00003\.safetensors changed since"):
        merge_recipe(small((base, ft)), tmp_path / "out")
