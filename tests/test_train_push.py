"""`push_to`: the result is on the Hub as one commit; what would keep it from there is found before the training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import contents
from hub_replica import TOKEN, Replica, serve
from train.errors import TrainError
from train.hub import open_repository
from train_fixtures import (
    config_values,
    copy_rows,
    environment,
    make_config,
    run_cli,
    save_model,
    write_config,
    write_jsonl,
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Replica]:
    (tmp_path / "hub/models/you/model").mkdir(parents=True)
    (tmp_path / "hub/models/me/scribe").mkdir(parents=True)
    for name in ("old-00001-of-00002.safetensors", "notes.txt"):
        (tmp_path / "hub/models/me/scribe" / name).write_bytes(b"x")
    with serve(tmp_path / "hub") as replica:
        yield replica


def test_the_result_is_pushed_and_a_missing_token_is_found_first(hub: Replica, tmp_path: Path) -> None:
    """The repository has `final` and what is no model's; the older weights are gone. Without a token nothing trains."""
    base, output = save_model(tmp_path / "base"), tmp_path / "out"
    data = write_jsonl(tmp_path / "d.jsonl", copy_rows())
    config = write_config(
        tmp_path / "c.yaml", config_values(base, data, output, max_steps=2, push_to="hub:me/scribe", report_to=[])
    )
    env = {**environment(), **hub.environment(tmp_path / "home")}
    refused = run_cli(config, env=env)
    assert refused.returncode == 1
    assert "push_to is hub:me/scribe" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert not (output / "data").exists()

    done = run_cli(config, env={**env, "HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr
    assert f"Pushed: {hub.url}/me/scribe" in done.stderr
    found = {k: v for k, v in contents(hub.root / "models/me/scribe").items() if k != ".gitattributes"}
    assert found == {**contents(output / "final"), "notes.txt": b"x"}
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("target", ["me/scribe", "hub:scribe", "hub:", "s3://a/b"])
def test_a_target_has_one_form(target: str) -> None:
    with pytest.raises(TrainError, match=r"push_to is .*, expected hub:ORG/NAME"):
        make_config(push_to=target)


def test_without_a_connection_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrainError, match=r"push_to is hub:me/scribe: http://127.0.0.1:9 cannot be reached"):
        open_repository("hub:me/scribe")
