"""One set of options in all commands; and what a wrong command line is told: by meaning first, then by spelling."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from checkpoints import language_model, save_model
from merge_tool import merge
from merge_tool.cli import meanings, merge_tool, slerp_merge

SHARED = {"--dry-run", "--quiet", "-q", "--json", "--memory", "--jobs", "--progress", "--on-missing", "--dtype"}


def run(*words: Any) -> Result:
    return CliRunner().invoke(merge_tool, [str(word) for word in words])


def last_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["merge", "run", "fold", "sweep", "verify", "diff"])
def test_the_shared_options_have_one_name_everywhere(name: str) -> None:
    options = {option for param in merge_tool.commands[name].params for option in param.opts}
    assert options >= SHARED


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--cuda"], "Not needed: merges run on the CPU"),
        (["--device", "cuda:0"], "Not needed: merges run on the CPU"),
        (["--out-shard-size", "5B"], "Write --max-shard-size 5GB"),
        (["--lazy-unpickle"], "Not needed: weights are always read in pieces"),
        (["--copy-tokenizer"], "--files-from takes another model's"),
        (["--allow-crimes"], "--allow-different-architectures, --on-missing base, --on-mismatch base"),
        (["--trust-remote-code"], "no code of a model is run"),
        (["--method", "ties"], "merge-tool run RECIPE.yaml OUT"),
        (["--method=dare_ties"], "merge-tool run RECIPE.yaml OUT"),
        (["--density", "0.5"], "--set NAME=VALUE"),
        (["--merge-method", "ties"], "merge-tool run RECIPE.yaml OUT"),
        (["--lora-merge-dtype", "float32"], "MODEL+ADAPTER"),
        (["--write-threads", "2"], "Write --jobs."),
        (["--push-to-hub", "a/b"], "merge-tool push OUT hub:ORG/NAME"),
        (["--no-write-model-card"], "'--no-write-model-card'. It is always done."),
        (["--random-seed", "1"], "Write --seed"),
        (["--set", "t=1"], "It is an option of merge-tool plan, merge-tool run."),
        (["--max_shard_size", "1GB"], "Write --max-shard-size."),
        (["--exclud", "x"], "Did you mean --exclude"),
        (["--zzz"], "--help lists the options."),
    ],
)
def test_an_option_that_there_is_not_is_told_by_its_meaning(words: list[str], advice: str) -> None:
    result = CliRunner().invoke(slerp_merge, ["a", "b", "out", *words])
    assert advice in last_line(result)
    assert advice in last_line(run("merge", "a", "b", "out", *words))


def test_every_advice_names_options_and_commands_that_exist() -> None:
    """A renamed option must not live on in an advice."""
    known = {option for c in merge_tool.commands.values() for param in c.params for option in param.opts}
    for advice in meanings._BY_NAME.values():
        assert {*re.findall(r"--[a-z][a-z-]+", advice.replace("{name}", "method"))} <= known, advice
        assert {*re.findall(r"merge-tool (\w+)", advice)} <= merge_tool.commands.keys(), advice
    assert {*meanings._COMMAND_OF.values()} <= merge_tool.commands.keys()
    assert not {f"--{name}" for name in meanings._BY_NAME} & {
        option for param in slerp_merge.params for option in param.opts
    }


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("ties", "run"),
        ("compare", "diff"),
        ("verfy", "verify"),
        ("lora", "fold"),
        ("grid", "sweep"),
        ("tune", "search"),
    ],
)
def test_a_command_that_there_is_not_is_told(word: str, command: str) -> None:
    assert f"No such command '{word}'. Did you mean {command}?" in last_line(run(word, "x"))


def test_an_option_before_the_command_is_told_too() -> None:
    assert "merges run on the CPU" in last_line(run("--cuda"))


def test_other_usage_errors_stay_as_they_are() -> None:
    assert "Missing argument 'OUT'" in last_line(run("merge", "a", "b"))
    assert "'slrp' is not one of" in last_line(run("merge", "a", "b", "c", "--method", "slrp"))
    assert run("merge", "--help").exit_code == 0


# ------------------------------------------------------------------------------------- what they do


def test_a_dry_run_of_verify_and_diff_reads_headers_only(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(*pair, tmp_path / "out")

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("merge_tool.compare.diff._compare_all", read)
    monkeypatch.setattr("merge_tool.verification.verify.sha256_of", read)
    (found,) = json.loads(run("verify", tmp_path / "out", "--against", *pair, "--full", "--dry-run", "--json").stdout)
    listed = (tmp_path / "out/SHA256SUMS").read_text().splitlines()
    assert found["num_files"] == len(listed)
    assert found["nbytes"] == sum((tmp_path / "out" / line[66:]).stat().st_size for line in listed)
    assert found["num_compare"] == found["num_elements"] == sum(x.size for x in language_model(0).values())
    planned = json.loads(run("diff", *pair, "--dry-run", "--json").stdout)
    assert planned["num_tensors"] == len(language_model(0))
    assert planned["nbytes"] == 2 * 2 * found["num_elements"]  # two models in bfloat16
    assert "elements to merge again" in run("verify", tmp_path / "out", "--against", *pair, "--dry-run").stdout


def test_verify_says_when_out_is_another_merge_than_was_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*pair, tmp_path / "out", dtype="float32", exclude="norm")
    asked = ("--dtype", "float32", "--exclude", "norm", "--on-missing", "error")
    assert run("verify", tmp_path / "out", *asked).exit_code == 0
    wrong = run("verify", tmp_path / "out", "--dtype", "bfloat16", "-q")
    assert wrong.exit_code == 1
    assert "--dtype was float32, expected bfloat16: OUT is another merge." in wrong.stdout
    assert run("verify", tmp_path / "out", "--seed", 1).exit_code == 1


def test_quiet_prints_nothing_where_nothing_is_wrong(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*pair, tmp_path / "out")
    for words in (("verify", tmp_path / "out"), ("diff", *pair), ("inspect", pair[0])):
        assert run(*words, "-q").output == ""


def test_diff_takes_missing_tensors_and_types_as_asked(tmp_path: Path) -> None:
    x, y = language_model(0), language_model(0)
    whole = save_model(tmp_path / "whole", {name: a.astype("f4") for name, a in x.items()})
    del y["lm_head.weight"]
    part = save_model(tmp_path / "part", y)
    refused = run("diff", whole, part, "--on-missing", "error")
    assert refused.exit_code == 1
    assert "part lacks 1 tensor: lm_head.weight. Give --on-missing ft" in refused.stderr
    assert "only in part" not in run("diff", part, whole, "--on-missing", "base").stdout
    assert "only in whole: lm_head.weight" in run("diff", part, whole).stdout
    assert "only in whole" not in run("diff", part, whole, "--on-missing", "base").stdout
    # bfloat16 weights widened to float32 are the same, and rounding them again changes nothing
    rounded = save_model(tmp_path / "fine", {name: a.astype("f4") * (1 + 2**-12) for name, a in x.items()})
    assert "0 of them equal" in run("diff", whole, rounded).stdout
    assert f"{len(x)} of them equal" in run("diff", whole, rounded, "--dtype", "bfloat16").stdout


@pytest.mark.parametrize("program", ["slerp-merge", "merge-tool"])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_there_as_documented(program: str, shell: str) -> None:
    """The line in docs/cli.md gives a script; and the script's own question is answered."""
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        pytest.skip("is not installed here")
    text = (Path(__file__).parents[1] / "docs/cli.md").read_text()
    assert f"{variable}={shell}_source {program}" in text or shell != "bash"
    environment = {**os.environ, variable: f"{shell}_source"}
    script = subprocess.run([path], env=environment, capture_output=True, text=True, check=False).stdout
    assert variable in script
    words = f"{program} --on-m" if program == "slerp-merge" else f"{program} verify --on-m"
    asked = {
        **os.environ,
        variable: f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run([path], env=asked, capture_output=True, text=True, check=False)
    if shell == "bash":
        assert "--on-missing" in done.stdout


def test_a_click_command_of_ours_has_no_option_without_help() -> None:
    for command in merge_tool.commands.values():
        for param in command.params:
            assert not isinstance(param, click.Option) or param.help, (command.name, param.name)
