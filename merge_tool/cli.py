"""The two commands: parse, call, print, exit code. Never a tensor, an offset or a default value.

`slerp-merge` is the main job; `merge-tool` a group whose `merge` is the same command.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import click

from merge_tool._version import __version__
from merge_tool.api import MergeReport, Prepared, check_room, is_complete, merge, prepare
from merge_tool.compare import Inspection, inspect_checkpoint
from merge_tool.errors import MergeToolError, shown
from merge_tool.memory import LEAST_BYTES, MAX_JOBS
from merge_tool.methods import METHODS
from merge_tool.recipe import (
    DEFAULT_MAX_SHARD_BYTES,
    DEFAULT_T,
    ON_MISMATCH,
    OUTPUT_DTYPES,
    SIDES,
    Recipe,
    label_t,
)
from merge_tool.report import remarks

P = ParamSpec("P")
R = TypeVar("R")

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}b": 1000**n for n, u in enumerate("kmgt", 1)},
    **{f"{u}ib": 1024**n for n, u in enumerate("kmgt", 1)},
}


# ---------------------------------------------------------------------------------------- parameters


def parse_size(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> int | None:
    """Bytes, with a unit or without: 500MB, 1.5GB, 2GiB, 1000000."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", value.strip().lower(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise click.BadParameter(
            f"'{shown(value)}' is not a size. Write 500MB, 1.5GB, 2GiB or a number of bytes.", ctx, param
        )
    whole, _, part = match[1].partition(".")
    nbytes: int = int(whole + part) * _UNITS[match[2]] // 10 ** len(part)
    return nbytes


def parse_ts(ctx: click.Context | None, param: click.Parameter | None, value: tuple[str, ...]) -> tuple[float, ...]:
    """Every t of options that hold one number each, or several with commas."""
    found: list[float] = []
    for text in value:
        try:
            found.extend(float(part) for part in text.split(","))
        except ValueError as e:
            raise click.BadParameter(
                f"'{shown(text)}' is not a number. Write --t 0.5, or --t 0.3,0.5,0.7 for several.", ctx, param
            ) from e
    return tuple(found)


def _print_errors(function: Callable[P, R]) -> Callable[P, R]:
    """MergeToolError -> `Error: ...` and exit code 1; signals -> 130 and 143, with how to go on."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _terminable():
                return function(*args, **kwargs)
        except MergeToolError as e:
            raise click.ClickException(str(e)) from e
        except KeyboardInterrupt:
            click.echo("\nInterrupted. Run the same command to continue.", err=True)
            sys.exit(130)
        except _TerminatedError:
            click.echo("\nTerminated. Run the same command to continue.", err=True)
            sys.exit(143)

    return wrapped


class _TerminatedError(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------- slerp-merge


@click.command("slerp-merge", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("ft", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--t",
    "ts",
    multiple=True,
    default=[label_t(DEFAULT_T)],
    show_default=label_t(DEFAULT_T),
    callback=parse_ts,
    metavar="NUMBER",
    help="How far to go from BASE (0) to FT (1). Several (--t 0.3 --t 0.5, or --t 0.3,0.5) are made in one pass.",
)
@click.option("--method", type=click.Choice(list(METHODS)), default="slerp", help="How to interpolate.")
@click.option(
    "--dtype",
    type=click.Choice(list(OUTPUT_DTYPES)),
    help="Type of the output's floats.  [default: BASE's, tensor by tensor; bfloat16 for 8-bit floats]",
)
@click.option(
    "--max-shard-size",
    "max_shard_bytes",
    callback=parse_size,
    metavar="SIZE",
    default=str(DEFAULT_MAX_SHARD_BYTES),
    show_default="5GB",
    help="Largest size of one output file, in bytes or with a unit.",
)
@click.option(
    "--files-from",
    type=click.Choice(SIDES),
    default="base",
    help="Whose configuration and tokenizer files the output gets.",
)
@click.option(
    "--on-mismatch",
    type=click.Choice(ON_MISMATCH),
    default="error",
    help="What to do with integer tensors that differ: stop, or keep BASE's.",
)
@click.option("--extrapolate", is_flag=True, help="Allow t below 0 or above 1.")
@click.option(
    "--memory",
    "memory_bytes",
    callback=parse_size,
    metavar="SIZE",
    help=f"Keep the whole process below this, at least {LEAST_BYTES // 10**6}MB.  [default: at most 256MB]",
)
@click.option("--jobs", "-j", type=int, help=f"Threads.  [default: the cores, at most {MAX_JOBS}]")
@click.option("--overwrite", is_flag=True, help="Replace what is in OUT, once the new model is complete.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write merge_report.json here (a one-file OUT has none of its own).",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, from the headers alone; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the summary as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary; warnings and errors only.")
@click.version_option(__version__, "--version", prog_name="slerp-merge")
@_print_errors
def slerp_merge(
    base: Path,
    ft: Path,
    out: Path,
    ts: tuple[float, ...],
    memory_bytes: int | None,
    jobs: int | None,
    overwrite: bool,
    report_path: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge the models BASE (t=0) and FT (t=1) into OUT, tensor by tensor, in bounded memory.

    BASE and FT are model folders or .safetensors files. OUT is a folder, or one file if it ends in .safetensors.
    A merge that was stopped continues with the same command.
    """
    if dry_run:
        recipe = Recipe(ts, **options)
        prepared = prepare(base, ft, out, recipe, memory_bytes=memory_bytes, jobs=jobs)
        complete = not overwrite and is_complete(prepared)
        if not complete:
            check_room(prepared, overwrite=overwrite)
        _print_plan(prepared, complete=complete, as_json=as_json)
        return
    with _Bar(wanted=not quiet and sys.stderr.isatty()) as bar:
        report = merge(
            base,
            ft,
            out,
            ts,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            report_path=report_path,
            on_warning=lambda message: click.echo(f"Warning: {message}", err=True),
            on_start=bar.start,
            on_progress=bar.advance,
            **options,
        )
    if as_json:
        click.echo(json.dumps(_report_json(report), indent=2))
    elif not quiet:
        click.echo("\n".join(_report_lines(report)))


class _Bar:
    """One tqdm bar in bytes on stderr; does nothing unless wanted."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        if self._wanted:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, leave=False)

    def advance(self, nbytes: int, name: str) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.set_postfix_str(shown(name, 40), refresh=False)
                self._bar.update(nbytes)


# ----------------------------------------------------------------------------------------- merge-tool


@click.group("merge-tool", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="merge-tool")
def merge_tool() -> None:
    """Merge model checkpoints, and look into them."""


merge_tool.add_command(slerp_merge, "merge")


@merge_tool.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_print_errors
def inspect_command(path: Path, as_json: bool) -> None:
    """Show the shards, tensors, parameters and dtypes of the checkpoint at PATH."""
    found = inspect_checkpoint(path)
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(_inspection_lines(found)))


def _inspection_lines(found: Inspection) -> Iterator[str]:
    counts = f"{found.num_tensors:,} tensors, {found.num_parameters:,} parameters"
    yield f"{shown(found.name)}: {counts}, {_size(found.nbytes)}"
    for shard in found.shards:
        yield f"  {shown(shard.name)}: {shard.num_tensors:,} tensors, {_size(shard.nbytes)}"
    for dtype, (tensors, parameters) in found.dtypes.items():
        yield f"  {dtype}: {tensors:,} tensors, {parameters:,} parameters"
    for key, value in found.metadata.items():
        yield f"  metadata {shown(key)}: {shown(value)}"
    for notice in found.notices:
        yield f"  note: {notice}"


# ------------------------------------------------------------------------------------------- printing


def _print_plan(prepared: Prepared, *, complete: bool, as_json: bool) -> None:
    for warning in prepared.warnings:
        click.echo(f"Warning: {warning}", err=True)
    content = _plan_json(prepared, complete)
    click.echo(json.dumps(content, indent=2) if as_json else "\n".join(_plan_lines(prepared, complete)))


def _plan_json(prepared: Prepared, complete: bool) -> dict[str, Any]:
    plan, layout = prepared.plan, prepared.layout
    return {
        "base": plan.names[0],
        "ft": plan.names[1],
        "out": str(prepared.target.path),
        "method": plan.recipe.method,
        "t": list(plan.ts),
        "num_tensors": plan.num_tensors,
        "num_parameters": plan.num_parameters,
        "read_bytes": plan.input_bytes,
        "write_bytes": prepared.disk_bytes,
        "free_disk_bytes": prepared.free_disk_bytes,
        "shards": [{"name": s.file_name, "bytes": s.size, "num_tensors": len(s.jobs)} for s in plan.shards],
        "jobs": layout.jobs,
        "memory_budget_bytes": prepared.budget,
        "expected_peak_bytes": prepared.expected_peak_bytes,
        "side_files": [file.target for file in prepared.side_files.copied],
        "skipped_files": list(prepared.side_files.skipped),
        "already_complete": complete,
        "warnings": list(prepared.warnings),
    }


def _plan_lines(prepared: Prepared, complete: bool) -> Iterator[str]:
    plan, layout = prepared.plan, prepared.layout
    base, ft = (shown(name) for name in plan.names)
    many = len(plan.ts) > 1
    yield f"Plan: {plan.recipe.method} at t = {_ts(plan.ts)}; t=0 is BASE ({base}), t=1 is FT ({ft})"
    yield f"  tensors   {plan.num_tensors:,} ({plan.num_parameters:,} parameters)"
    yield f"  read      {_size(plan.input_bytes)} (tensors larger than the budget twice)"
    yield f"  write     {_size(prepared.disk_bytes)} to {shown(prepared.target.path)}" + (
        f" ({len(plan.ts)} outputs)" if many else ""
    )
    yield f"  disk      {_size(prepared.free_disk_bytes)} free"
    peak, allowed = _size(prepared.expected_peak_bytes), _size(prepared.budget)
    yield f"  memory    about {peak} at the peak, {allowed} allowed, {layout.jobs} jobs"
    yield f"  shards    {len(plan.shards):,}"
    for shard in plan.shards[:10]:
        yield f"            {shown(shard.file_name)}: {len(shard.jobs):,} tensors, {_size(shard.size)}"
    if len(plan.shards) > 10:
        yield f"            and {len(plan.shards) - 10:,} more"
    yield f"  copied    {len(prepared.side_files.copied):,} other files"
    yield (
        "Already complete; nothing would be done." if complete else "Nothing was read but headers; nothing was written."
    )


def _report_json(report: MergeReport) -> dict[str, Any]:
    summary = report.summary
    return {
        "outputs": [str(path) for path in report.outputs],
        "method": report.method,
        "t": list(report.ts),
        "num_tensors": summary.num_tensors,
        "num_parameters": summary.num_parameters,
        "num_equal": summary.num_equal,
        "median_angle_degrees": summary.median_degrees,
        "largest_angle_degrees": summary.largest_degrees,
        "largest_angle_tensor": summary.largest_name,
        "input_bytes": report.input_bytes,
        "output_bytes": report.output_bytes,
        "seconds": round(report.seconds, 3),
        "peak_bytes": report.peak_bytes,
        "already_complete": report.already_complete,
        "warnings": list(report.warnings),
    }


def _report_lines(report: MergeReport) -> Iterator[str]:
    summary, where = report.summary, ", ".join(shown(path) for path in report.outputs)
    if report.already_complete:
        yield f"{where}: already complete, nothing to do."
        return
    moved = report.input_bytes + report.output_bytes
    what = f"{report.method} at t = {_ts(report.ts)}"
    yield f"{where}: {what}, {summary.num_tensors:,} tensors, {_size(report.output_bytes)}"
    yield (
        f"{report.seconds:.1f} s, {moved / 1e6 / max(report.seconds, 1e-9):,.0f} MB/s read and written, "
        f"peak memory {_size(report.peak_bytes)}"
    )
    if summary.median_degrees is not None and summary.largest_degrees is not None:
        yield (
            f"Angle between the models: median {summary.median_degrees:.3g} degrees, largest "
            f"{summary.largest_degrees:.3g} ({shown(summary.largest_name)})"
        )
    yield from remarks(summary)


def _ts(ts: Sequence[float]) -> str:
    return ", ".join(label_t(t) for t in ts)


def _size(nbytes: int) -> str:
    for unit, width in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= width:
            return f"{nbytes / width:.3g} {unit}" if nbytes < 1000 * width else f"{nbytes / width:,.0f} {unit}"
    return f"{nbytes} bytes"
