"""A merge shared by many workers: the same files as on one machine, whoever made which part, and whoever was killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from checkpoints import contents, language_model, save_model
from merge_tool import DataError, MergeToolError, OutputError, RecipeError
from merge_tool.api import finish_parts, merge_models, merge_recipe, plan_parts
from merge_tool.cli import merge_tool
from merge_tool.hosts import claims
from merge_tool.hosts.pieces import Piece, share_out
from merge_tool.hosts.plan_file import PlanFile, read_plan_file, write_plan_file
from merge_tool.hosts.ranks import Rank, pieces_of, rank_of
from merge_tool.hosts.receipts import PartsFolder
from merge_tool.hosts.worker import Worker
from merge_tool.methods.registry import METHODS
from merge_tool.recipe.mergekit import read_recipe
from merge_tool.recipe.pair import pair as pair_of
from merge_tool.recipe.recipe import Recipe
from test_fp8_output import fp8_pair  # noqa: F401  a fixture
from test_vocab import tokenizer


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(merge_tool, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def ties_of_three(folder: Path, **options: Any) -> Recipe:
    for seed in range(3):
        save_model(folder / f"m{seed}", language_model(seed), shards=seed + 1)
    text = f"""
merge_method: ties
base_model: {folder}/m0
models:
  - {{model: {folder}/m1, parameters: {{weight: 0.5, density: 0.6}}}}
  - {{model: {folder}/m2, parameters: {{weight: 0.5, density: 0.3}}}}
"""
    (folder / "ties.yaml").write_text(text)
    return read_recipe(folder / "ties.yaml", METHODS, values=["lambda=0.5,1"], **options)


def union(folder: Path, **options: Any) -> Recipe:
    models = []
    for seed, extra in ((0, "b"), (1, "f")):
        words = tokenizer([*(f"t{k}" for k in range(99)), extra])
        models.append(save_model(folder / f"v{seed}", language_model(seed), side_files={"tokenizer.json": words}))
    return pair_of(*models, 0.4, vocab="union", **options)


@pytest.fixture(params=["ties", "union", "fp8"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    small = {"max_shard_bytes": 20_000}
    if request.param == "fp8":
        return pair_of(*request.getfixturevalue("fp8_pair"), 0.4, dtype="base", max_shard_bytes=2_000)
    return {"ties": ties_of_three, "union": union}[request.param](tmp_path, **small)


def reference(recipe: Recipe, tmp_path: Path) -> dict[str, bytes]:
    merge_recipe(recipe, tmp_path / "alone" / "out")
    return contents(tmp_path / "alone" / "out")


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
def test_any_parts_in_any_order_give_the_same_files(pair: tuple[Path, Path], tmp_path: Path, parts: int) -> None:
    """Several outputs with a t of their own for some tensors."""
    recipe = pair_of(*pair, (0.3, 0.6), t_for={"mlp": [0.0, 1.0]}, max_shard_bytes=20_000)
    make_in_parts(recipe, tmp_path, parts)


def test_any_kind_of_merge_gives_the_same_files(recipe: Recipe, tmp_path: Path) -> None:
    make_in_parts(recipe, tmp_path, 3)


def make_in_parts(recipe: Recipe, tmp_path: Path, parts: int) -> None:
    """With a few large shards, which are cut, and with many small ones, which are shared out."""
    chance = random.Random(parts)
    for name, size in (("small", recipe.options.max_shard_bytes), ("large", 5_000_000)):
        asked = replace(recipe, options=replace(recipe.options, max_shard_bytes=size))
        plan = plan_parts(asked, tmp_path / name / "out", parts)
        assert sorted(n for part in plan.parts for n in part) == list(range(len(plan.pieces)))
        for share in chance.sample(plan.parts, len(plan.parts)):
            Worker(plan, jobs=chance.choice([1, 2])).make(share)
        finish_parts(plan)
        assert contents(tmp_path / name / "out") == reference(asked, tmp_path / name)


def test_the_commands_of_a_readme(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    said = run("plan", *pair, out, "--t", "0.4", "--parts", 3, "-o", plan)
    assert "1 shard in 3 pieces, 3 parts of" in said
    assert f"merge-tool work {plan}" in said
    assert not list(out.glob("*")) or [p.name for p in out.iterdir()] == [".slerp-merge"]  # no model yet
    run("finish", plan, code=1)
    assert "1 piece made" in run("work", plan, "--part", 1, "--of", 3)
    assert "0 pieces made, 1 were there" in run("work", plan, "--part", 1, "--of", 3)
    run("work", plan)  # all that is left
    assert "already" not in run("finish", plan)
    assert contents(out) == reference(pair_of(*pair, 0.4), tmp_path)
    assert "already" in run("finish", plan)


def test_a_recipe_is_planned_by_its_file(tmp_path: Path) -> None:
    recipe = ties_of_three(tmp_path)
    run("plan", tmp_path / "ties.yaml", tmp_path / "out", "--set", "lambda=0.5,1", "-o", tmp_path / "p.json")
    run("work", tmp_path / "p.json")
    run("finish", tmp_path / "p.json")
    assert contents(tmp_path / "out") == reference(recipe, tmp_path)
    assert "is of a pair" in run("plan", tmp_path / "ties.yaml", tmp_path / "o", "--t", "0.3", code=2)
    assert "is of a recipe" in run("plan", "a", "b", tmp_path / "o", "--set", "t=0.3", code=2)
    assert "1 paths were given" in run("plan", "a", code=2)


def test_the_merge_on_one_machine_continues_what_was_planned(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """And finds its parts where a worker made them."""
    plan = plan_parts(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path / "out", 4)
    Worker(plan).make(plan.parts[0])
    merge_recipe(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path / "out")
    assert contents(tmp_path / "out") == reference(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path)


# ------------------------------------------------------------------------------------------ engines


def test_executors_give_the_same_files(recipe: Recipe, tmp_path: Path) -> None:
    expected = reference(recipe, tmp_path)
    with ThreadPoolExecutor(2) as threads:
        merge_recipe(recipe, tmp_path / "threads" / "out", executor=threads, num_parts=5, jobs=1)
    assert contents(tmp_path / "threads" / "out") == expected


def test_a_pool_of_processes_by_name_and_from_python(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = reference(pair_of(*pair, 0.4), tmp_path)
    run("merge", *pair, tmp_path / "named" / "out", "--t", "0.4", "--executor", "processes:2")
    assert contents(tmp_path / "named" / "out") == expected
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in pair]}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        report = merge_models(recipe, tmp_path / "own" / "out", executor=pool)
    merge_models(recipe, tmp_path / "plain" / "out")
    assert contents(tmp_path / "own" / "out") == contents(tmp_path / "plain" / "out")
    assert report.summary == merge_models(recipe, tmp_path / "own" / "out").summary


def dies(path: str, pieces: list[int], *rest: object) -> None:
    os._exit(1)


def test_an_engine_that_fails_is_named_and_the_merge_goes_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_tool.hosts.engines.make_parts", dies)
    recipe = pair_of(*pair, 0.4)
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(OutputError, match="engine ProcessPoolExecutor has failed"),
    ):
        merge_recipe(recipe, tmp_path / "out", executor=pool)
    merge_recipe(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == reference(recipe, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spark", "expected processes:N (N processes), ray"),
        ("processes:0", "as in processes:4"),
        ("processes", "as in processes:4"),
        ("ray", "Ray is not installed. pip install"),
        ("dask:host:1", "Dask is not installed. pip install"),
    ],
)
def test_engines_that_are_not_there(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert message in run("merge", *pair, tmp_path / "out", "--executor", name, code=1).replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_values_that_cannot_be_merged_leave_nothing(tmp_path: Path) -> None:
    tensors = language_model(0)
    broken = {name: values.copy() for name, values in tensors.items()}
    broken["lm_head.weight"][3, 3] = float("nan")
    models = save_model(tmp_path / "a", tensors), save_model(tmp_path / "b", broken)
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="lm_head"):
        merge_recipe(pair_of(*models), tmp_path / "out", executor=pool)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- stealing, kills


def test_idle_workers_take_what_nobody_makes(recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_parts(recipe, tmp_path / "out", 4)
    made: list[list[int]] = [[], [], []]

    def work(number: int) -> None:
        made[number] = claims.steal(Worker(plan, jobs=1), pieces_of(plan.parts, number, 4), lease=30)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]  # the fourth never comes
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n for one in made for n in one) == list(range(len(plan.pieces)))
    finish_parts(plan)
    assert contents(tmp_path / "out") == reference(recipe, tmp_path)


def test_a_dead_worker_s_claim_is_taken_over(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_parts(pair_of(*pair, max_shard_bytes=20_000), tmp_path / "out", 2)
    living, dead = Worker(plan), Worker(plan)
    of_dead = claims.Claims(dead, lease=5)
    assert of_dead.take(0)
    now = claims.Claims(living, lease=5)
    assert not now.take(0)
    past = time.time() - 60
    os.utime(living.parts.claim(0), (past, past))
    assert now.take(0)
    now.touch(0)
    assert not of_dead.take(0)  # it is the living one's now
    now.drop(0)
    now.close()
    of_dead.close()
    waits: list[float] = []
    assert claims.steal(living, [], lease=5, wait=waits.append) == list(range(len(plan.pieces)))
    assert not waits
    assert not list(living.parts.path.glob("*.claim"))
    assert not list(living.parts.path.glob("clock*"))


STEAL = "from merge_tool.cli import merge_tool; merge_tool()"


def kill_at_random(plan: Path, out: Path, expected: dict[str, bytes], chance: random.Random) -> None:
    """Two stealing workers and then the finish, any of them killed at a random moment and started again."""
    command = [sys.executable, "-c", STEAL]
    workers = [
        subprocess.Popen([*command, "work", str(plan), "--part", str(n), "--of", "2", "--steal", "--lease", "1", "-q"])
        for n in range(2)
    ]
    time.sleep(chance.uniform(0.2, 1.2))
    workers[chance.randrange(2)].send_signal(signal.SIGKILL)
    for one in workers:
        one.wait()
        assert not (out / "config.json").exists()
    subprocess.run([*command, "work", str(plan), "--steal", "--lease", "1", "-q"], check=True)
    finish = subprocess.Popen([*command, "finish", str(plan), "-q"])
    time.sleep(chance.uniform(0.2, 1.0))
    finish.send_signal(signal.SIGKILL)
    finish.wait()
    if (out / "model.safetensors.index.json").exists():  # it looks like a model: then it is one
        assert {k: v for k, v in contents(out).items() if not k.startswith(".slerp-merge")} == expected
    subprocess.run([*command, "finish", str(plan), "-q"], check=True)
    assert contents(out) == expected


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_workers_and_finishers(pair: tuple[Path, Path], tmp_path: Path, rounds: int) -> None:
    recipe = pair_of(*pair, (0.3, 0.6), max_shard_bytes=20_000)
    expected = reference(recipe, tmp_path)
    for number in range(rounds):
        out, plan = tmp_path / f"{number}" / "out", tmp_path / f"{number}.json"
        write_plan_file(plan_parts(recipe, out, 5), plan)
        kill_at_random(plan, out, expected, random.Random(number))
        shutil.rmtree(out)


def test_a_finish_that_was_killed_between_move_and_record(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_parts(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path / "out", 3)
    Worker(plan).make(range(len(plan.pieces)))
    with monkeypatch.context() as patched:
        patched.setattr("merge_tool.output.work_folder.WorkFolder._record", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_parts(plan)
    finish_parts(plan)
    assert contents(tmp_path / "out") == reference(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path)


def killed(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform != "linux", reason="torchrun on loopback")
def test_torchrun_says_each_process_its_rank(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    recipe = pair_of(*pair, 0.4, max_shard_bytes=20_000)
    write_plan_file(plan_parts(recipe, tmp_path / "out", 4), plan)
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--no-python",
        sys.executable,
        "-m",
        "merge_tool",
    ]
    subprocess.run([sys.executable, *command, "work", str(plan), "-j", "1"], check=True, capture_output=True)
    finish_parts(read_plan_file(plan))
    assert contents(tmp_path / "out") == reference(recipe, tmp_path)


# ------------------------------------------------------------------- engines of others, and the examples


EXAMPLES = Path(__file__).parents[1] / "examples" / "hosts"


def test_the_job_array_of_slurm(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """By its environment: three tasks, one of which never runs."""
    recipe = pair_of(*pair, 0.4, max_shard_bytes=20_000)
    plan = tmp_path / "plan.json"
    write_plan_file(plan_parts(recipe, tmp_path / "out", 6), plan)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_CPUS_PER_TASK": "1", "PATH": path}
    for task in (2, 0):
        env = {**os.environ, **array, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", str(EXAMPLES / "slurm.sh"), str(plan)], env=env, check=True)
    finish_parts(read_plan_file(plan))
    assert contents(tmp_path / "out") == reference(recipe, tmp_path)


def test_the_indexed_job_of_kubernetes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    recipe = pair_of(*pair, 0.4, max_shard_bytes=20_000)
    plan = plan_parts(recipe, tmp_path / "out", job["spec"]["completions"])
    write_plan_file(plan, tmp_path / "plan.json")
    words = [str(tmp_path / "plan.json") if word == "plan.json" else word for word in container["command"]]
    del words[words.index("--memory") : words.index("--memory") + 2]  # this process has torch in it
    for index in random.Random(0).sample(range(16), 4):  # one of them makes all that is left
        done = CliRunner().invoke(merge_tool, words[1:], env={"JOB_COMPLETION_INDEX": str(index)})
        assert done.exit_code == 0, done.output
    finish_parts(plan)
    assert contents(tmp_path / "out") == reference(recipe, tmp_path)


@pytest.mark.slow
def test_a_real_ray_cluster_that_loses_a_node(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """By the example, by name, and while a node is lost: Ray runs its tasks again on the other."""
    pytest.importorskip("ray")
    program = Path(__file__).with_name("ray_cluster.py")
    subprocess.run([sys.executable, str(program), *map(str, pair), str(tmp_path)], check=True, timeout=400)
    expected = reference(pair_of(*pair, 0.4), tmp_path)
    assert contents(tmp_path / "example" / "out") == contents(tmp_path / "named" / "out") == expected
    shutil.rmtree(tmp_path / "alone")
    assert contents(tmp_path / "lost" / "out") == reference(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path)


@pytest.mark.slow
def test_a_real_dask_cluster(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """By the example, which starts one here, and by name."""
    distributed = pytest.importorskip("distributed")
    command = [sys.executable, str(EXAMPLES / "dask_merge.py"), *map(str, pair), str(tmp_path / "example" / "out")]
    subprocess.run(command, check=True, timeout=300)
    code = (
        "import sys, distributed, merge_tool.cli\n"
        "if __name__ == '__main__':\n"
        "    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:\n"
        "        merge_tool.cli.merge_tool([*sys.argv[1:], '--executor', f'dask:{cluster.scheduler_address}'])\n"
    )
    (tmp_path / "run.py").write_text(code)
    words = ["merge", *map(str, pair), str(tmp_path / "named" / "out"), "--t", "0.4"]
    subprocess.run([sys.executable, str(tmp_path / "run.py"), *words], check=True, timeout=300)
    expected = reference(pair_of(*pair, 0.4), tmp_path)
    assert contents(tmp_path / "example" / "out") == contents(tmp_path / "named" / "out") == expected
    assert distributed.__version__


# ------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (3, 8)),  # torchrun in a step
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (0, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
          "SLURM_ARRAY_TASK_STEP": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 4)),
        ({"JOB_COMPLETION_INDEX": "5"}, (5, None)),
    ],
)  # fmt: skip
def test_ranks_of_the_environment(environment: dict[str, str], expected: tuple[int, int | None] | None) -> None:
    found = rank_of(environment)
    assert (None if found is None else (found.rank, found.size)) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK is 8 of 8, expected 0 to 7"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK is 'x'"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"},
         "several ranks: SLURM_PROCID is 1 of 2, SLURM_ARRAY_TASK_ID is 1 of 4"),
    ],
)  # fmt: skip
def test_ranks_that_contradict_each_other(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rank_of(environment)


def test_every_rank_has_its_pieces() -> None:
    parts = ((0, 3), (1,), (2,))
    assert pieces_of(parts, 0, 2) == [0, 3, 2]
    assert pieces_of(parts, 1, 2) == [1]
    assert pieces_of(parts, 4, 5) == []
    assert pieces_of(parts, 2, None) == [2]
    with pytest.raises(RecipeError, match="part is 5 of 5, expected 0 to 4"):
        pieces_of(parts, 5, 5)
    assert Rank(0, 1, "").size == 1


def test_parts_read_about_as_much() -> None:
    pieces = [Piece(k, 0, 1, size) for k, size in enumerate((9, 7, 6, 5, 5, 4, 4, 2))]
    shares = share_out(pieces, 3)
    loads = [sum(pieces[n].read_bytes for n in share) for share in shares]
    assert max(loads) <= 4 / 3 * sum(loads) / 3  # Graham's bound


# ------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def planned(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, PlanFile]:
    path = tmp_path / "plan.json"
    plan = plan_parts(pair_of(*pair, 0.4, max_shard_bytes=20_000), tmp_path / "out", 4)
    write_plan_file(plan, path)
    return path, plan


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text(path.read_text()[:500]), "is not a whole plan file"),
        (lambda path: path.write_text("[]"), "is not a whole plan file"),
        (edited(lambda plan: plan.update(format=9)), "its format is 9, expected 1"),
        (edited(lambda plan: plan.update(out="/elsewhere")), "its content does not match its SHA-256"),
        (edited(lambda plan: plan["parts"].pop()), "its content does not match its SHA-256"),
        (edited(lambda plan: plan["versions"].pop("numpy")), "its content does not match its SHA-256"),
    ],
)
def test_damaged_plans(planned: tuple[Path, PlanFile], damage: Callable[[Path], None], message: str) -> None:
    path, _ = planned
    damage(path)
    for command in ("work", "finish"):
        assert message in run(command, path, code=1)


def test_other_versions_and_other_inputs_are_refused_by_name(
    planned: tuple[Path, PlanFile], pair: tuple[Path, Path]
) -> None:
    path, plan = planned
    other = replace(plan, versions={**plan.versions, "numpy": "1.0"})
    write_plan_file(other, path)
    for command in ("work", "finish"):
        assert "was made by numpy 1.0, this worker has" in run(command, path, code=1)
    write_plan_file(plan, path)
    shard = next(pair[1].glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-200:] = bytes(200)
    shard.write_bytes(data)
    assert "the inputs here differ from the plan's" in run("work", path, code=1)
    assert "the inputs here differ from the plan's" in run("finish", path, "--fill", code=1)


def test_a_folder_that_is_not_shared(planned: tuple[Path, PlanFile]) -> None:
    path, plan = planned
    shutil.rmtree(plan.out)
    assert "is not the folder in which this merge was planned" in run("work", path, code=1)


def test_receipts_that_are_missing_torn_or_without_their_file(planned: tuple[Path, PlanFile], tmp_path: Path) -> None:
    path, plan = planned
    one = Worker(plan)
    one.make(range(len(plan.pieces)))
    parts: PartsFolder = one.parts
    kept = parts.receipt(1).read_bytes()

    parts.receipt(1).unlink()
    said = run("finish", path, code=1)
    assert "1 of" in said
    assert plan.shards[plan.pieces[1].shard][0] in said
    assert "merge-tool work" in said

    parts.receipt(1).write_bytes(kept[: len(kept) // 2])
    assert "is a damaged receipt" in run("finish", path, code=1)
    assert "is a damaged receipt" in run("work", path, code=1)
    parts.receipt(1).write_bytes(kept.replace(plan.sha256.encode(), b"0" * 64))
    assert "is a receipt of another plan" in run("finish", path, code=1)

    parts.receipt(1).write_bytes(kept)
    parts.file(0, 2).unlink()
    assert parts.missing([0, 1, 2]) == [2] or parts.missing([0, 1, 2]) == [1, 2]  # two pieces of one file
    assert "not finished" in run("finish", path, code=1)
    assert not (Path(plan.out) / "config.json").exists()
    run("finish", path, "--fill")
    expected = reference(pair_of(*(plan.recipe["models"]), 0.4, max_shard_bytes=20_000), tmp_path)
    assert contents(Path(plan.out)) == expected


def test_bytes_that_are_not_their_receipt_s_are_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In shards that several workers write always, in others with --check-resumed."""
    for name, size, check in (("cut", 5_000_000, False), ("whole", 20_000, True)):
        plan = plan_parts(pair_of(*pair, 0.4, max_shard_bytes=size), tmp_path / name, 3)
        one = Worker(plan)
        one.make(range(len(plan.pieces)))
        path = one.parts.file(0, 1)
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)
        with pytest.raises(OutputError, match="do not match the receipt"):
            finish_parts(plan, check=check)
        finish_parts(plan, check=check, fill=True)
        assert contents(tmp_path / name) == reference(pair_of(*pair, 0.4, max_shard_bytes=size), tmp_path / "r" / name)


def test_what_cannot_be_planned(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = pair_of(*pair, 0.4)
    with pytest.raises(RecipeError, match="number of parts is 0"):
        plan_parts(recipe, tmp_path / "out", 0)
    with pytest.raises(RecipeError, match="Many hosts need a folder"):
        plan_parts(recipe, tmp_path / "out.safetensors", 2)
    merge_recipe(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="holds this merge already"):
        plan_parts(recipe, tmp_path / "out", 2)
    with pytest.raises(MergeToolError):
        plan_parts(pair_of(*pair, 0.5), tmp_path / "out", 2)
    plan = plan_parts(pair_of(*pair, 0.5), tmp_path / "out", 2, overwrite=True)
    Worker(plan).make(range(len(plan.pieces)))
    finish_parts(plan)
    assert contents(tmp_path / "out") == reference(pair_of(*pair, 0.5), tmp_path)


def test_a_worker_keeps_its_memory(tmp_path: Path) -> None:
    """The whole process, while it makes a part of a merge of 100 MB."""
    big = {f"w{k}": language_model(0, hidden=512, vocab=20_000)["lm_head.weight"] for k in range(2)}
    models = save_model(tmp_path / "a", big), save_model(tmp_path / "b", {k: v * 2 for k, v in big.items()})
    plan = tmp_path / "plan.json"
    write_plan_file(plan_parts(pair_of(*models), tmp_path / "out", 2), plan)
    code = (
        "import sys; from merge_tool.cli import merge_tool; merge_tool(sys.argv[1:], standalone_mode=False); "
        "from merge_tool.plan.system_memory import peak_bytes; print(peak_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "work", str(plan), "--memory", "64MB", "-q"], capture_output=True, check=True
    )
    assert int(done.stdout) < 64_000_000
