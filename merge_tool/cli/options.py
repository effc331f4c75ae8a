"""The commands' options: their names, and how their values are parsed. Texts and numbers only."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, fields
from functools import reduce
from pathlib import Path
from typing import Any

import click

from merge_tool.checkpoint.streaming import DOWNLOADS
from merge_tool.cli.pages import PAGE_OPTION
from merge_tool.errors import shown
from merge_tool.plan.limits import LEAST_BYTES, MAX_JOBS
from merge_tool.progress import KINDS
from merge_tool.recipe.pair import DEFAULT_T
from merge_tool.recipe.ranges import BadRange, parse_range
from merge_tool.recipe.recipe import label_t

_UNITS = {
    "": 1,
    **{f"{u}b": 1000**n for n, u in enumerate("kmgt", 1)},
    **{f"{u}ib": 1024**n for n, u in enumerate("kmgt", 1)},
}
LEAST_SHARD_BYTES = 1_000_000  # a smaller number is a number of gigabytes, or of parameters, that lacks its unit


# ---------------------------------------------------------------------------------------- parameters


def parse_size(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> int | None:
    """Bytes, with a unit or without: 500MB, 1.5GB, 2GiB, 1000000."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", value.strip().lower(), re.ASCII)
    if match is not None and match[2] == "b":
        raise click.BadParameter(
            f"'{shown(value)}': a B alone may mean bytes or billions of parameters; sizes are bytes here. Write "
            f"{match[1]}GB, for example.",
            ctx,
            param,
        )
    if match is None or match[2] not in _UNITS or ("." in match[1] and not match[2]):
        raise click.BadParameter(
            f"'{shown(value)}' is not a size. Write 500MB, 1.5GB, 2GiB or a number of bytes.", ctx, param
        )
    whole, _, part = match[1].partition(".")
    nbytes: int = int(whole + part) * _UNITS[match[2]] // 10 ** len(part)
    return nbytes


def parse_shard_size(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> int | None:
    """As parse_size; nothing below a megabyte, which would make thousands of files."""
    nbytes = parse_size(ctx, param, value)
    if nbytes is not None and nbytes < LEAST_SHARD_BYTES:
        raise click.BadParameter(f"'{shown(value)}' is {nbytes:,} bytes, expected at least 1MB. Write 5GB.", ctx, param)
    return nbytes


def parse_ts(ctx: click.Context | None, param: click.Parameter | None, value: tuple[str, ...]) -> tuple[float, ...]:
    """Every t in the texts: a number, several with commas, or a range START:STOP:STEP, its ends included."""
    ts: list[float] = []
    for text in value:
        try:
            ts.extend(t for part in text.split(",") for t in parse_range(part))
        except BadRange as e:
            raise click.BadParameter(f"{e}. Write START:STOP:STEP, as in --t 0:1:0.1.", ctx, param) from e
        except (ValueError, ArithmeticError) as e:
            raise click.BadParameter(
                f"'{shown(text)}' is not a number. Write --t 0.5, or --t 0.3,0.5,0.7 or --t 0:1:0.1 for several.",
                ctx,
                param,
            ) from e
    return tuple(ts)


def parse_share(ctx: click.Context | None, param: click.Parameter | None, value: str) -> float:
    """A share of the whole: 1%, 0.5% or 0.01."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", value.strip(), re.ASCII)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise click.BadParameter(f"'{shown(value)}' is not a share. Write 1%, 100% or 0.01.", ctx, param)
    return share


# ---------------------------------------------------------------------------------------- options


def field_options(*kinds: type) -> list[Callable[[Any], Any]]:
    """A click option for each field of these dataclasses of options."""
    return [_option_of(field) for kind in kinds for field in fields(kind)]


def recipe_options(*kinds: type) -> list[Callable[[Any], Any]]:
    """As field_options, and --extrapolate."""
    return [*field_options(*kinds), click.option("--extrapolate", is_flag=True, help="Allow t below 0 or above 1.")]


def _option_of(field: Field[Any]) -> Callable[[Any], Any]:
    about = dict(field.metadata)
    settings: dict[str, Any] = {"help": about["help"], "default": field.default}
    if "show_default" in about:
        settings["default"] = about["show_default"]  # the default is parsed like a user's text
    if "metavar" in about:
        settings["metavar"] = about["metavar"]
    if about.get("choices"):
        settings["type"] = click.Choice(about["choices"])
    if about.get("is_size"):
        settings["callback"] = parse_shard_size
    if about.get("is_whole"):
        settings["type"] = int
    if about.get("is_flag"):
        settings["is_flag"] = True
    if about.get("is_many"):
        settings |= {"multiple": True, "default": None}
    return click.option(about["flag"], field.name, **settings)


MACHINE_OPTIONS = [
    click.option(
        "--memory",
        "memory_bytes",
        callback=parse_size,
        metavar="SIZE",
        help=f"Most memory for the whole process, at least {LEAST_BYTES // 10**6}MB.  [default: at most 256MB]",
    ),
    click.option("--jobs", "-j", type=int, help=f"Number of threads.  [default: one a core, at most {MAX_JOBS}]"),
]


MODELS_DIR = click.option(
    "--models-dir",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Where the recipe's models are, by their names: for the mergekit_config.yml of an output.",
)


STREAM_OPTIONS = [
    click.option(
        "--stream/--no-stream",
        "stream",
        default=None,
        help="Read weights of the Hub by range and keep nothing of them; or insist on the Hub's cache.  "
        "[default: by range if the disk lacks the room]",
    ),
    click.option(
        "--downloads",
        type=click.IntRange(1, 64),
        default=DOWNLOADS,
        metavar="N",
        help="Ranges that are downloaded at a time.",
    ),
    click.option(
        "--spool",
        "spool_bytes",
        callback=parse_size,
        metavar="SIZE",
        help="Most disk for weights that are read by range and needed twice; with 0 they are downloaded twice.  "
        "[default: a quarter of the free disk, at most 5GB]",
    ),
]


HUB_OPTIONS = [
    click.option(
        "--private", is_flag=True, help="If OUT is hub:org/name, and not there: make it a private repository."
    ),
    click.option("--no-publish", is_flag=True, help="If OUT is hub:org/name: leave the pull request open."),
    click.option(
        "--work",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="If OUT is hub:org/name: where at most two shards wait for their upload.  [default: in HF_ASSETS_CACHE]",
    ),
]


def t_option(text: str) -> Callable[[Any], Any]:
    """--t of a pair: one number, several, or a range."""
    default = [label_t(DEFAULT_T)]
    return click.option("--t", "ts", multiple=True, default=default, callback=parse_ts, metavar="NUMBER", help=text)


def set_option(text: str) -> Callable[[Any], Any]:
    """--set of a recipe."""
    return click.option("--set", "values", multiple=True, metavar="NAME=VALUE[,VALUE...]", help=text)


OUTPUT_OPTIONS = [
    click.option("--overwrite", is_flag=True, help="Replace what is in OUT, after the new model is complete."),
    click.option(
        "--executor",
        metavar="ENGINE",
        help="Have processes of an engine make the weights: processes:N, ray, ray:ADDRESS or dask:ADDRESS.",
    ),
    click.option(
        "--try",
        "prompt",
        metavar="PROMPT",
        help="After the merge let its parents and OUT continue this text, side by side: loads each model whole (needs "
        "transformers).",
    ),
    click.option(
        "--check-resumed", is_flag=True, help="When a merge continues, check the SHA-256 of the finished shards first."
    ),
    click.option(
        "--report",
        "report_path",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Also write merge_report.json to this path. (If OUT is one file, it has no report of its own.)",
    ),
    PAGE_OPTION,
]


PROGRESS = click.option(
    "--progress",
    type=click.Choice(KINDS),
    default="auto",
    help="On stderr: a bar, or a line every half minute (log). auto: a bar on a terminal, else log.",
)


PRINT_OPTIONS = [
    click.option(
        "--dry-run", is_flag=True, help="Read headers only: show what would be done, and downloaded; write nothing."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON."),
    click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors only; of a dry run, the plan."),
    PROGRESS,
]


def with_options(options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Several options as one decorator."""
    return lambda command: reduce(lambda done, option: option(done), reversed(options), command)
