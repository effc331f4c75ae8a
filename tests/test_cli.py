"""The commands: exit codes, whole messages, and the frozen list of options."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from checkpoints import contents, language_model, load_folder, save_file, save_model
from merge_tool.cli import merge_tool, slerp_merge
from merge_tool.cli.options import parse_size


def run(*words: Any) -> Result:
    return CliRunner().invoke(slerp_merge, [str(word) for word in words])


def test_the_one_line_that_matters(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = run(*pair, tmp_path / "out", "--t", "0.5")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out: slerp at t = 0.5, {len(language_model(0))} tensors, ")
    assert "MB/s read and written, peak memory" in lines[1]
    assert lines[2].startswith("Angle between the models: median 8.")
    assert load_folder(tmp_path / "out").keys() == language_model(0).keys()
    again = run(*pair, tmp_path / "out", "--t", "0.5")
    assert (again.exit_code, again.stdout) == (0, f"{tmp_path}/out: already complete, nothing to do.\n")


def test_close_models_are_said_to_be_close(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", language_model(0))
    ft = save_model(tmp_path / "ft", language_model(1, delta=0.1))
    nearly = {
        k: (v + 0.01 * language_model(3, delta=1)[k].astype(np.float32)).astype(v.dtype)
        for k, v in language_model(0).items()
    }
    result = run(base, save_model(tmp_path / "near", nearly), tmp_path / "out")
    assert "tensors the models are within 1.8 degrees: SLERP and linear interpolation agree there" in result.stdout
    same = run(base, save_model(tmp_path / "same", language_model(0)), tmp_path / "same-out")
    assert same.stderr == "Warning: The models are the same in every tensor: the output equals them.\n"
    assert "1.8 degrees" not in run(base, ft, tmp_path / "far").stdout


@pytest.mark.parametrize("line", ["import no_such_library", "raise SystemError('error return without exception set')"])
def test_a_library_that_cannot_be_loaded_is_an_error_and_the_next_run_continues(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """As when memory gets short: some libraries are imported late, here the one that looks at the output."""
    (tmp_path / "broken/safetensors").mkdir(parents=True)
    (tmp_path / "broken/safetensors/__init__.py").write_text(f"{line}\n")
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(tmp_path / "broken")
        said = message(run(*pair, tmp_path / "out"))
        sys.modules.pop("safetensors", None)
    assert said.startswith("Error: A library cannot be loaded (")
    assert not list((tmp_path / "out").glob("model*"))
    assert run(*pair, tmp_path / "out").exit_code == 0


def test_several_t(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = run(*pair, tmp_path / "out", "--t", "0.3", "--t", "0.5,0.7")
    assert result.exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["t-0.3", "t-0.5", "t-0.7"]


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    before = contents(tmp_path)
    result = run(*pair, tmp_path / "out", "--dry-run", "--t", "0.25")
    assert result.exit_code == 0
    assert "Plan: slerp at t = 0.25; t=0 is BASE (base), t=1 is FT (ft)" in result.stdout
    assert "Nothing was read but headers; nothing was written." in result.stdout
    plan = json.loads(run(*pair, tmp_path / "out", "--dry-run", "--json", "--max-shard-size", "10kB").stdout)
    assert contents(tmp_path) == before
    report = run(*pair, tmp_path / "out", "--json", "--max-shard-size", "10kB")
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert {s["name"]: s["bytes"] for s in plan["shards"]} == written
    assert plan["num_parameters"] == json.loads(report.stdout)["num_parameters"]
    assert plan["read_bytes"] == plan["input_bytes"] == json.loads(report.stdout)["input_bytes"]


def test_a_dry_run_finds_what_headers_show(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = save_model(tmp_path / "other", language_model(1, vocab=101))
    assert run(pair[0], other, tmp_path / "out", "--dry-run").exit_code == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert run(*pair, tmp_path / "full", "--dry-run").exit_code == 1


def message(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ") or code == 2
    assert "Traceback" not in result.stderr
    return result.stderr


def test_tensor_sets_that_differ_are_listed_from_both_sides(tmp_path: Path) -> None:
    x, y = language_model(0), language_model(1)
    for n in range(7):
        x[f"extra.{n}.weight"] = np.zeros(2, np.float32)
    y["new.bias"] = np.zeros(2, np.float32)
    y["model.norm.bias"] = np.zeros(5, np.float32)
    y["lm_head.weight"] = np.zeros((104, 32), np.float32)
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    assert message(run(base, ft, tmp_path / "out")) == (
        "Error: base and ft do not have the same tensors.\n"
        "  7 tensors only in base: extra.0.weight, extra.1.weight, extra.2.weight, extra.3.weight, extra.4.weight and "
        "2 more\n"
        "  1 tensor only in ft: new.bias\n"
        "  2 shapes differ:\n"
        "    lm_head.weight: [100, 32] in base, [104, 32] in ft (a vocabulary mismatch: 100 and 104 tokens)\n"
        "    model.norm.bias: [32] in base, [5] in ft\n"
        "base has 28,174 parameters and 3 layers; ft has 28,263 parameters and 3 layers.\n"
        "All must be the same architecture, with one vocabulary. To merge them anyway:\n"
        "  --on-missing base: tensors that a model lacks are copied from BASE; tensors that BASE lacks are left out.\n"
        "  --on-missing ft: the same, but tensors that BASE lacks are copied from a model that has them.\n"
        "  --on-mismatch base: such tensors are copied from BASE.\n"
        "  --vocab base, ft or union: rows are matched by token; the output has those tokens.\n"
        "  --exclude PATTERN: matching tensors are copied from BASE.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--t", "1.5"], "t is 1.5, expected 0 to 1. Give --extrapolate if you mean it."),
        (["--t", "-0.1"], "t is -0.1, expected 0 to 1."),
        (["--t", "nan"], "t is nan, expected a finite number"),
        (["--t", "inf", "--extrapolate"], "t is inf, expected a finite number"),
        (["--t", "0.3", "--t", "0.30"], "t = 0.3 is given more than once."),
        (["--t", "0,-0"], "t = 0 is given more than once."),
        (["--memory", "10MB"], "The memory budget is 10,000,000 bytes, expected at least 64MB."),
        (["--jobs", "0"], "jobs is 0, expected at least 1."),
    ],
)
def test_requests_that_make_no_sense(tmp_path: Path, pair: tuple[Path, Path], words: list[str], expected: str) -> None:
    assert expected in message(run(*pair, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--t", "half"], "'half' is not a number. Write --t 0.5, or --t 0.3,0.5,0.7 or --t 0:1:0.1 for several."),
        (["--t", "0.5;0.7"], "'0.5;0.7' is not a number."),
        (["--t", "0:1:0"], "the step of '0:1:0' is 0. Write START:STOP:STEP, as in --t 0:1:0.1."),
        (["--t", "1:0:0.1"], "'1:0:0.1' is empty: steps of 0.1 do not lead from 1 to 0."),
        (["--t", "0:1:0.0001"], "'0:1:0.0001' has more than 10,000 values."),
        (["--t", "0:1e999999:1"], "'0:1e999999:1' has more than 10,000 values."),
        (["--t", "0:1"], "'0:1' has 2 parts, expected 3."),
        (["--t", "0:nan:0.1"], "'0:nan:0.1' is not a number."),
        (["--max-shard-size", "2XB"], "'2XB' is not a size. Write 500MB, 1.5GB, 2GiB or a number of bytes."),
        (["--max-shard-size", "-5"], "'-5' is not a size."),
        (["--max-shard-size", "5B"], "'5B': a B alone may mean bytes or billions of parameters; sizes are bytes here."),
        (["--max-shard-size", "5b"], "Write 5GB, for example."),
        (["--max-shard-size", "5"], "'5' is 5 bytes, expected at least 1MB. Write 5GB."),
        (["--max-shard-size", "999kB"], "'999kB' is 999,000 bytes, expected at least 1MB."),
        (["--max-shard-size", "0"], "'0' is 0 bytes, expected at least 1MB."),
        (["--memory", "64000000B"], "a B alone"),
        (["--memry", "1GB"], "No such option '--memry'"),
        (["--memry", "1GB"], "--memory"),
        (["--method", "slrp"], "'slrp' is not one of 'slerp', 'linear'"),
    ],
)
def test_usage_errors_exit_2_and_help(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.undo()  # the fixture that allows small shards
    assert expected in message(run(*pair, tmp_path / "out", *words), 2)


def test_missing_arguments_and_paths(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    assert "Missing argument 'FT'" in message(run(pair[0]), 2)
    assert message(run(tmp_path / "nope", pair[1], tmp_path / "out")).endswith(
        "nope: no such file or folder. Check the spelling.\n"
    )


def test_extrapolation_is_possible_when_asked_for(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    assert run(*pair, tmp_path / "out", "--t", "1.2", "--extrapolate").exit_code == 0
    assert "--extrapolate" in (tmp_path / "out/README.md").read_text()


def test_one_file_takes_one_t(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    text = message(run(*pair, tmp_path / "x.safetensors", "--t", "0.1,0.2"))
    assert "is one file, but 2 outputs need a folder" in text


def test_quiet_prints_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = run(*pair, tmp_path / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500MB", 500_000_000),
        ("2GB", 2_000_000_000),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2**31),
        ("1000000", 1_000_000),
        ("0.1 kb", 100),
        ("64mb", 64_000_000),
        ("3TiB", 3 * 2**40),
        ("1.1GB", 1_100_000_000),
    ],
)
def test_sizes_mean_bytes(text: str, expected: int) -> None:
    assert parse_size(None, None, text) == expected


@pytest.mark.parametrize("text", ["", "MB", "1e9", "1.5", "1,5GB", "0x10", "2 G B", "²GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_size(None, None, text)


OPTIONS = [
    "--allow-different-architectures", "--chat-template", "--check-resumed", "--downloads", "--dry-run", "--dtype",
    "--exclude", "--executor", "--extrapolate", "--files-from", "--help", "--id", "--jobs", "--json",
    "--max-shard-size", "--memory", "--method", "--names-from", "--names-to", "--no-publish", "--on-mismatch",
    "--on-missing", "--only", "--overwrite", "--pad-vocab-to-multiple-of", "--private", "--progress", "--quiet",
    "--report", "--report-html", "--seed", "--spool", "--stream", "--t", "--t-for", "--try", "--untie", "--variant",
    "--version", "--vocab", "--work",
]  # fmt: skip
OF_PAIRS = [
    "--method",
    "--names-from",
    "--names-to",
    "--pad-vocab-to-multiple-of",
    "--t",
    "--t-for",
    "--version",
    "--vocab",
]  # a recipe says them


def options_of(command: click.Command) -> list[str]:
    parameters = command.get_params(click.Context(command))
    return sorted(option for p in parameters for option in p.opts if option.startswith("--"))


def test_the_options_are_frozen() -> None:
    """A new option is a decision: add it here, to docs/cli.md and to the changelog."""
    assert options_of(slerp_merge) == OPTIONS
    assert options_of(merge_tool.commands["run"]) == sorted({*OPTIONS, "--set", "--models-dir"} - {*OF_PAIRS})
    assert options_of(merge_tool.commands["fold"]) == sorted({*OPTIONS} - {*OF_PAIRS, "--extrapolate"})
    of_averages = {"--weights", "--window", "--last", "--every"}
    assert options_of(merge_tool.commands["average"]) == sorted({*OPTIONS} - {*OF_PAIRS, "--extrapolate"} | of_averages)
    assert sorted(merge_tool.commands) == [
        "average", "diff", "finish", "fold", "inspect", "merge", "plan", "push", "report", "run", "search", "sweep",
        "verify",
        "work",
    ]  # fmt: skip


def test_merge_tool_merge_is_slerp_merge(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    assert merge_tool.commands["merge"] is slerp_merge
    result = CliRunner().invoke(merge_tool, ["merge", *map(str, pair), str(tmp_path / "out")])
    assert result.exit_code == 0


def test_inspect(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(merge_tool, ["inspect", str(pair[0])])
    tensors = language_model(0)
    parameters = sum(a.size for a in tensors.values())
    assert result.stdout.splitlines()[0].startswith(f"base: {len(tensors)} tensors, {parameters:,} parameters, ")
    assert "model-00002-of-00002.safetensors" in result.stdout
    found = json.loads(CliRunner().invoke(merge_tool, ["inspect", str(pair[0]), "--json"]).stdout)
    assert found["dtypes"] == {"BF16": {"num_tensors": len(tensors), "num_parameters": parameters}}
    assert sum(shard["num_tensors"] for shard in found["shards"]) == len(tensors)
    save_file({"q.weight": np.zeros(2, np.uint8), "q.weight_scale": np.zeros(1)}, tmp_path / "quantised.safetensors")
    assert CliRunner().invoke(merge_tool, ["inspect", str(tmp_path / "quantised.safetensors")]).exit_code == 0
    assert "Error: " in CliRunner().invoke(merge_tool, ["inspect", str(tmp_path / "none")]).stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_the_bar_shows_bytes_on_a_terminal_only(tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    base = save_model(tmp_path / "base", language_model(0, hidden=256, layers=8))
    ft = save_model(tmp_path / "ft", language_model(1, hidden=256, layers=8))
    command = [sys.executable, "-m", "merge_tool", "merge", str(base), str(ft)]
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([*command, str(tmp_path / "a")], stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux tells the end of a terminal
        while chunk := os.read(main, 65536):
            shown += chunk
    os.close(main)
    assert process.wait() == 0
    assert b"B/s" in shown
    done = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, check=True)
    assert done.stderr == b""


def test_a_terminal_code_in_a_name_is_not_printed(tmp_path: Path) -> None:
    x = {"evil\x1b[2J": np.zeros(3, np.float32)}
    base, ft = save_model(tmp_path / "a", x), save_model(tmp_path / "b", {"fine": np.zeros(3, np.float32)})
    assert "\x1b" not in message(run(base, ft, tmp_path / "out"))
    result = run(base, save_model(tmp_path / "c", {"evil\x1b[2J": np.ones(3, np.float32)}), tmp_path / "out")
    assert result.exit_code == 0
    assert "\x1b" not in result.output + (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("command", "work", "told"),
    [
        ("verify", "verification.verify.verify", "Nothing was changed."),
        ("merge", "api.merge_recipe", "Run the same command"),
        ("run", "api.merge_recipe", "Run the same command"),
    ],
)
def test_an_interrupt_says_what_it_means_for_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, work: str, told: str
) -> None:
    """What only reads has nothing to continue."""

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"merge_tool.{work}", interrupted)
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    paths = {"verify": ["out"], "merge": ["a", "b", "out"], "run": ["r.yaml", "out"]}[command]
    result = CliRunner().invoke(merge_tool, [command, *(str(tmp_path / path) for path in paths)])
    assert result.exit_code == 130
    assert told in result.stderr
