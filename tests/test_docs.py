"""The documents are run: every command in a console block prints what stands below it (times, sizes of memory and disks
apart), every Python block runs, every YAML block is read, every link leads somewhere, every option exists.

Commands that need the network, a GPU or much time stand in `text` blocks, which say so; those of slerp-merge and
merge-tool are parsed even there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
import yaml

from merge_tool.cli import merge_tool, slerp_merge
from merge_tool.methods.registry import METHODS
from merge_tool.recipe.mergekit import read_recipe
from merge_tool.recipe.parts import read_parts
from train.config import TrainConfig

ROOT = Path(__file__).parents[1]
TRAINING = {"docs/training.md", "docs/training_memory.md", "docs/contrast.md"}  # of mixce-train: see test_train_docs.py
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "examples/*/README.md", "bench/*.md")
    for page in (path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
    if page not in TRAINING
)
BIN = Path(sys.executable).parent
# For programs that a command of a document starts, and for `python` in a command that another command starts.
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
}
PROGRAMS = {
    "python",
    "ls",
    "cat",
    "head",
    "grep",
    "diff",
    "cmp",
    "sha256sum",
    "slerp-merge",
    "merge-tool",
    "mixce-train",
}
COMMANDS = {"slerp-merge": slerp_merge, **{f"merge-tool {name}": one for name, one in merge_tool.commands.items()}}
WHY_NOT_RUN = re.compile(r"network|the Hub|GPU|minutes?|hours?|gigabytes")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[tuple[str, str]]:
    """(command, shown output) of every `$` line in the console blocks; a line that ends in a backslash goes on."""
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = re.sub(r"\\\n *", "", part).partition("\n")
            yield command, output


def plain(text: str) -> str:
    """Without what changes from run to run."""
    text = re.sub(r"\d[\d.,]* s, [\d.,]+ MB/s", "N s, N MB/s", text)
    text = re.sub(r"peak memory \S+ MB", "peak memory N MB", text)
    text = re.sub(r"disk      .* free", "disk N free", text)
    text = re.sub(r"(verified: \d+ files), [\d.]+ kB", r"\1, N kB", text)  # the card's and the report's words count
    return re.sub(r"memory    about .*", "memory N", text)


def check_output(command: str, printed: str, shown: str) -> None:
    """A line of three dots stands for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", plain(shown), flags=re.MULTILINE)]
    if not re.fullmatch(".*".join(parts), plain(printed), re.DOTALL):
        assert plain(printed) == plain(shown), command


PAGES_WITH_COMMANDS = [page for page in PAGES if [*commands(page)] or blocks(page, "python")]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_commands_print_what_the_page_shows(page: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command, shown in commands(page):
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            check_extras(words[2:])
            continue
        assert words[0] in PROGRAMS, command
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        fails = re.search(r"^Error: |NOT VERIFIED", shown, re.MULTILINE) is not None
        assert done.returncode == fails, f"{command}\n{done.stdout}"
        check_output(command, done.stdout, shown)
    if programs := blocks(page, "python"):
        subprocess.run(
            [sys.executable, "-c", "\n".join(programs)], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True
        )


def check_extras(words: list[str]) -> None:
    """`pip install .` needs the network; `make test` does it. Here the extras are those that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target in (word for word in words if not word.startswith("-")):
        name, _, wanted = target.rstrip("]").partition("[")
        assert name == ".", target
        assert set(filter(None, wanted.split(","))) <= extras.keys(), target


# --------------------------------------------------------------------------------------- what is not run


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page: str) -> None:
    opened = re.findall(r"^[ \t]*```(.*)\n(?:.*\n)*?[ \t]*```$", text_of(page), re.MULTILINE)
    assert {*opened} <= {"console", "python", "yaml", "json", "text"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_say_why_and_are_right(page: str) -> None:
    for block in blocks(page, "text"):
        found = [
            line for line in block.splitlines() if re.match(r"(slerp-merge|merge-tool|mixce-train|make|python) ", line)
        ]
        assert not found or WHY_NOT_RUN.search(block), block
        for line in found:
            check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets, words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file() or words[1].startswith("-"), words
    elif words[0] in ("slerp-merge", "merge-tool"):
        name = words[0] if words[0] == "slerp-merge" else " ".join(words[:2])
        arguments = words[1:] if words[0] == "slerp-merge" else words[2:]
        COMMANDS[name].make_context(name, arguments)  # click.UsageError for what it does not know


@pytest.mark.parametrize("page", PAGES)
def test_recipes_and_json_are_read(page: str, tmp_path: Path) -> None:
    for block in blocks(page, "json"):
        json.loads(block)
    for block in blocks(page, "yaml"):
        if "\n---\n" in block:
            (tmp_path / "recipe.yaml").write_text(block)
            assert len(read_parts(tmp_path / "recipe.yaml", METHODS)) == block.count("\n---\n") + 1
            continue
        found = yaml.safe_load(block)
        if isinstance(found, dict) and "merge_method" in found:
            read_recipe(found, METHODS)


# ------------------------------------------------------------------------------------- links and options


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *sorted(TRAINING)])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page: str) -> None:
    text = re.sub(r"```console\n.*?```", "", text_of(page), flags=re.DOTALL)
    for path in set(re.findall(r"\b(?:merge_tool|train|tests|bench|fuzz|docs|examples)/[\w./*-]+\.\w+", text)):
        assert list(ROOT.glob(path)), path
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for name in set(re.findall(r"`(test_\w+?)(?:\.\.\.)?`", text)):
        assert f"def {name}" in tests, name


def test_the_readme_leads_to_every_document() -> None:
    linked = set(re.findall(r"\]\(([^)#]+\.md)", text_of("README.md")))
    documents = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"))}
    for page in [*linked]:
        linked |= {
            os.path.relpath((ROOT / page).parent / to, ROOT) for to in re.findall(r"\]\(([^)#]+\.md)", text_of(page))
        }
    assert documents - {"README.md"} <= linked


def own_options(command: click.Command) -> dict[str, tuple[str, str]]:
    """What --help shows of each option: `-j, --jobs INTEGER` -> (the default, the text)."""
    context = click.Context(command, **command.context_settings)
    found = {}
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record is not None and isinstance(option, click.Option) and "--help" not in option.opts:
            text, _, more = record[1].partition("  [")
            default = re.search(r"default: \(?([^;\])]*)|(required)", more)
            found[record[0]] = (default[1] or default[2] if default else "-", text)
    return found


def documented_options(section: str, text: str) -> dict[str, str]:
    """The table rows of a section of docs/cli.md, and of the sections that its first lines link to: flag -> default."""
    body = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert body is not None, section
    rows = re.findall(r"^\| `(-[^`]*)` \| (.*?) \|", body[1], re.MULTILINE)
    found = {flag.replace("\\|", "|"): default.strip("`") for flag, default in rows}
    heads = {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-"): head
        for head in re.findall(r"^## (.*)$", text, re.MULTILINE)
    }
    for anchor in re.findall(r"\(#(options-[a-z-]+)\)", body[1].split("\n|")[0]):
        found |= documented_options(heads[anchor], text)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_commands_has_every_option_and_default(name: str) -> None:
    section = "slerp-merge" if name == "merge-tool merge" else name
    told = documented_options(section, text_of("docs/cli.md"))
    assert told == {flag: default for flag, (default, _) in own_options(COMMANDS[name]).items()}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_named_exists(page: str) -> None:
    known = {
        option
        for command in COMMANDS.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "--check", "--nproc-per-node", "--no-python"}  # everybody's, sha256sum's, torchrun's
    known |= {"--outfile"}  # of convert_hf_to_gguf.py
    known |= {"--limit", "--num_fewshot", "--batch_size", "--model_args", "--apply_chat_template"}  # lm_eval's
    for script in (
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("bench/*.py"),
        *ROOT.glob("fuzz/*.py"),
        *ROOT.glob("examples/**/*.py"),
    ):
        known |= set(re.findall(r'"(--[a-z][a-z-]*)"', script.read_text()))
    known |= {f"--{key.name}" for key in fields(TrainConfig)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+\w", text_of(page)))
    assert named <= known
