"""An output goes to the Hub in one visible step; what was interrupted continues; what others have is not touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import contents, language_model, save_model
from hub_replica import TOKEN, Replica, refusal, run, serve
from hub_writes import Pull
from merge_tool import OutputError, merge, push

CONFIG = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
PUSH = ("push", "merged", "hub:me/merged")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    """A Hub with a repository of others; in the current folder, a merge in several shards."""
    folders = [save_model(tmp_path / name, language_model(k), config=CONFIG) for k, name in enumerate(("base", "ft"))]
    merge(*folders, tmp_path / "cwd/merged", 0.4, max_shard_bytes=30_000)
    (tmp_path / "hub/models/you/model").mkdir(parents=True)
    with serve(tmp_path / "hub") as replica:
        yield replica


@pytest.fixture
def here(hub: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    monkeypatch.chdir(tmp_path / "cwd")
    for key, value in hub.environment(tmp_path / "home", HF_TOKEN=TOKEN).items():
        monkeypatch.setenv(key, value)
    return hub


def on_the_hub(hub: Replica, repo: str = "me/merged") -> dict[str, bytes]:
    return {k: v for k, v in contents(hub.root / "models" / repo).items() if k != ".gitattributes"}


def test_a_push_is_published_whole_and_verifies_there(hub: Replica, tmp_path: Path) -> None:
    """The repository is made, and has every file; the pull request is merged; the second time nothing is done."""
    done = run(hub, tmp_path, *PUSH, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "me/merged: published; " in done.stdout
    assert on_the_hub(hub) == contents(tmp_path / "cwd/merged")
    assert [pull.status for pull in hub.writes.pulls["me/merged"]] == ["merged"]
    again = run(hub, tmp_path, *PUSH, HF_TOKEN=TOKEN)
    assert "has this output already" in again.stdout
    assert len(hub.writes.pulls["me/merged"]) == 1
    assert TOKEN not in done.stdout + done.stderr


def test_nothing_is_visible_before_the_last_step(here: Replica) -> None:
    """--no-publish leaves the pull request; main is as it was. The same command without it publishes that one, and
    uploads nothing."""
    pushed = push("merged", "hub:me/merged", publish=False, private=True)
    assert (pushed.is_published, pushed.number) == (False, 1)
    assert on_the_hub(here) == {}
    assert "me/merged" in here.private
    again = push("merged", "hub:me/merged")
    assert (again.is_published, again.number, again.uploaded_bytes) == (True, 1, 0)
    assert on_the_hub(here) == contents(Path("merged"))


def test_whatever_fails_the_same_command_continues_also_elsewhere(here: Replica, tmp_path: Path) -> None:
    """Requests fail one after the other, the line too: main is empty or whole, no byte of a large file is sent twice
    once its commit is made, no stray pull request stays open."""
    folder, number = Path("merged"), 3
    for attempt in range(40):
        here.count, here.faults = 0, {number: "403"}
        try:
            push(folder, "hub:me/merged")
        except OutputError as e:
            said = str(e)
        else:
            break
        assert "me/merged" in said
        assert on_the_hub(here) in ({}, contents(Path("merged")))
        number += 5
        if attempt == 1:  # another machine: a copy, and no state
            folder = Path(shutil.copytree("merged", "copy"))
            shutil.rmtree(tmp_path / "home", ignore_errors=True)
    assert attempt
    assert on_the_hub(here) == contents(Path("merged"))
    assert [pull.status for pull in here.writes.pulls["me/merged"]].count("merged") == 1
    assert not {"open", "draft"} & {pull.status for pull in here.writes.pulls["me/merged"]}
    sizes = sorted(path.stat().st_size for path in Path("merged").glob("*.safetensors"))
    assert sorted(here.writes.uploaded.values()) == sizes


def test_a_repository_with_weights_is_replaced_only_if_asked(here: Replica, tmp_path: Path) -> None:
    """The old model's files go, in the same step; what is no model's stays."""
    old = save_model(here.root / "models/me/merged", language_model(2), config=CONFIG)
    (old / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"me/merged: has weights already \(model.safetensors\)"):
        push("merged", "hub:me/merged")
    assert not here.writes.uploaded
    pushed = push("merged", "hub:me/merged", overwrite=True)
    assert pushed.others == ("notes.txt",)
    assert on_the_hub(here) == {**contents(Path("merged")), "notes.txt": b"mine"}


def test_a_pull_request_with_strange_files_is_not_merged(here: Replica) -> None:
    """Anybody may open one under our title."""
    push("merged", "hub:me/merged", publish=False)
    (here.root / "pulls/me/merged/1/evil.py").write_text("import os")
    with pytest.raises(OutputError, match=r"pull request 1 also changes evil.py"):
        push("merged", "hub:me/merged")
    assert on_the_hub(here) == {}


def test_another_merges_pull_request_is_left_alone(here: Replica) -> None:
    (here.root / "models/me/merged").mkdir(parents=True)
    here.writes.pulls["me/merged"] = [Pull("slerp-merge 0123456789abcdef"), Pull("Fix a typo")]
    assert push("merged", "hub:me/merged").number == 3
    assert [pull.status for pull in here.writes.pulls["me/merged"]] == ["draft", "draft", "merged"]


def test_who_may_not_write_is_told_before_anything_is_uploaded(
    here: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token, a repository of others, a folder that is no output or has changed, a name that is none."""
    here.of_others = {"you/model"}
    with pytest.raises(OutputError, match=r"let you write there \(it answers 403, and says: You have no write"):
        push("merged", "hub:you/model")
    assert "me/merged: writing needs a token. Give it by " in refusal(here, tmp_path, *PUSH, HF_TOKEN="")
    assert "(it answers 401: it does not know the token)" in refusal(here, tmp_path, *PUSH, HF_TOKEN="hf_another")
    with pytest.raises(OutputError, match="is no repository of the Hub"):
        push("merged", "me/merged")
    with pytest.raises(OutputError, match="is not an output of slerp-merge"):
        push(tmp_path / "ft", "hub:me/x")
    Path("merged/config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config\.json changed since the merge"):
        push("merged", "hub:me/merged")
    assert not here.writes.uploaded


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kills_of_a_push(hub: Replica, tmp_path: Path) -> None:
    """At 20 moments: main is empty or whole after each, and whole at the end."""
    whole = contents(tmp_path / "cwd/merged")
    environment = {**os.environ, **hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)}
    for moment in range(20):
        hub.latency = 0.05
        words = [sys.executable, "-m", "merge_tool", *PUSH]
        process = subprocess.Popen(words, cwd=tmp_path / "cwd", env=environment, stderr=subprocess.DEVNULL)
        try:
            process.wait(0.5 + 0.2 * moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert not (hub.root / "models/me/merged").exists() or on_the_hub(hub) in ({}, whole)
    hub.latency = 0.0
    assert run(hub, tmp_path, *PUSH, HF_TOKEN=TOKEN).returncode == 0
    assert on_the_hub(hub) == whole
