"""Every command in the README runs, and prints what the README shows (times, sizes of memory and disks apart)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from merge_tool.cli import merge_tool

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def console_blocks() -> list[tuple[str, str]]:
    """(command, shown output) of every `$` line in a console block."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def plain(text: str) -> str:
    """Without what changes from run to run."""
    text = re.sub(r"\d[\d.,]* s, [\d.,]+ MB/s", "N s, N MB/s", text)
    text = re.sub(r"peak memory \S+ MB", "peak memory N MB", text)
    text = re.sub(r"disk      .* free", "disk N free", text)
    return re.sub(r"memory    about .*", "memory N", text)


def test_commands_print_what_the_readme_shows(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    bin_folder = Path(sys.executable).parent
    assert len(console_blocks()) >= 8
    for command, shown in console_blocks():
        words = shlex.split(command)
        program = {"python": sys.executable, "ls": "ls"}.get(words[0], str(bin_folder / words[0]))
        # For `python` in a command that a command runs.
        env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            [program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=True, env=env
        )  # fmt: skip
        assert all(line.startswith("  t = ") for line in done.stderr.splitlines())  # a sweep tells of each score
        if shown:
            assert plain(done.stdout) == plain(shown), command


def test_every_option_is_in_the_help_and_described() -> None:
    group = CliRunner().invoke(merge_tool, ["--help"])
    assert all(command in group.stdout for command in merge_tool.commands)
    helps = "".join(CliRunner().invoke(merge_tool, [command, "--help"]).stdout for command in merge_tool.commands)
    for option in set(re.findall(r"--[a-z][a-z-]+", README)) - {"--check"}:
        assert option in helps, option


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_python_example_is_short_and_runs(tmp_path: Path) -> None:
    script = ROOT / "examples/merge_in_python.py"
    assert len(script.read_text().splitlines()) < 25
    subprocess.run([sys.executable, ROOT / "examples/make_tiny_pair.py", tmp_path], check=True)
    command = [sys.executable, script, tmp_path / "base", tmp_path / "ft", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("23 tensors in ")
    assert subprocess.run([*command[:-1], tmp_path], capture_output=True).returncode == 1


def test_nothing_names_this_workplace() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        text = (ROOT / name).read_bytes()
        assert b"/wo" + b"rk/" not in text, name
        assert b"../sha" + b"red" not in text, name
