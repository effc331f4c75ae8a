"""`slerp-merge`, and what the commands that merge share: parse, call, print, exit code.

What only a running command needs is imported inside it: `--help` needs no numpy, and each command only its own modules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge_tool._version import __version__
from merge_tool.checkpoint.streaming import Streaming
from merge_tool.cli.frame import (
    CONTINUES,
    Command,
    check_written,
    given,
    print_errors,
    print_result,
    progress_kind,
)
from merge_tool.cli.options import (
    HUB_OPTIONS,
    MACHINE_OPTIONS,
    OUTPUT_OPTIONS,
    PRINT_OPTIONS,
    STREAM_OPTIONS,
    recipe_options,
    t_option,
    with_options,
)
from merge_tool.cli.pages import check_page, write_merge_page
from merge_tool.errors import MismatchError, OutputError, RecipeError, counted, reason, shown
from merge_tool.recipe.options import Options
from merge_tool.recipe.pair import PairOptions, pair
from merge_tool.recipe.recipe import Recipe

if TYPE_CHECKING:
    from merge_tool.compare.prompting import Answer
    from merge_tool.output.merge_report import MergeReport, Watch
    from merge_tool.plan.prepare import Prepared
    from merge_tool.recipe.parts import Part

# --------------------------------------------------------------------------------------- slerp-merge


@click.command(
    "slerp-merge", cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.argument("base", type=click.Path())
@click.argument("ft", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@t_option("How far to go from BASE (0) to FT (1). Several (0.3,0.5 or 0:1:0.1) are made in one pass.")
@with_options(recipe_options(PairOptions, Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(HUB_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@with_options(PRINT_OPTIONS)
@click.option(
    "--names-to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="If FT has other names than BASE: write the pairs that shapes suggest to FILE, for --names-from.",
)
@click.version_option(__version__, "--version", prog_name="slerp-merge")
@print_errors(CONTINUES)
def slerp_merge(base: str, ft: str, out: Path, ts: tuple[float, ...], names_to: Path | None, **options: Any) -> None:
    """Merge the models BASE (t=0) and FT (t=1) into OUT, tensor by tensor, in bounded memory.

    BASE and FT are model folders, files of weights, or models of the Hub: org/name, org/name@revision (checked by
    their headers, then fetched); a PEFT LoRA adapter follows its model as MODEL+ADAPTER, or is FT alone, applied to
    BASE. OUT is a folder, one file if it ends in .safetensors, or hub:org/name, a repository of the Hub. All of them
    may be in buckets: s3://bucket/folder, gs://..., az://...
    A merge that was stopped continues with the same command.
    """
    run, chosen = parted(options)
    try:
        make(lambda: pair(base, ft, ts, **chosen), out, **run)
    except MismatchError as e:
        if names_to is None:
            raise
        raise _with_names_written(e, names_to) from e


def _with_names_written(error: MismatchError, file: Path) -> MismatchError:
    """The error, after the names that it suggests have been written. Raises OutputError where that cannot be."""
    if not error.suggested:
        return MismatchError(f"{error}\n--names-to: shapes suggest no pairs of names; nothing is written.")
    if os.path.lexists(file):
        raise OutputError(f"--names-to {shown(file)}: is there already. Choose another name.")
    from merge_tool.files import write_whole

    text = json.dumps(dict(sorted(error.suggested.items())), indent=2, ensure_ascii=False)
    try:
        write_whole(file, [text.encode(), b"\n"])
    except OSError as e:
        raise OutputError(f"--names-to {shown(file)}: cannot be written ({reason(e)}).") from e
    pairs = counted(len(error.suggested), "pair")
    return MismatchError(f"{error}\n{shown(file)} has {pairs}: check them, then give --names-from {shown(file)}.")


_HOW = (*MACHINE_OPTIONS, *STREAM_OPTIONS, *HUB_OPTIONS, *OUTPUT_OPTIONS, *PRINT_OPTIONS)


def parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What says how a merge is made, and what says which."""
    names = [option.name for option in _params(_HOW)]
    return {n: options.pop(n) for n in names}, given(options)


def _params(options: Iterable[Callable[[Any], Any]]) -> list[click.Parameter]:
    """The click parameters that the option decorators make."""
    return with_options(list(options))(click.Command("all", callback=lambda: None)).params  # type: ignore[no-any-return]


def make(
    recipe_of: Callable[[], Recipe],
    out: Path,
    *,
    memory_bytes: int | None,
    jobs: int | None,
    overwrite: bool,
    check_resumed: bool,
    stream: bool | None,
    downloads: int,
    spool_bytes: int | None,
    private: bool,
    no_publish: bool,
    work: Path | None,
    report_path: Path | None,
    page: Path | None,
    executor: str | None,
    prompt: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: str,
) -> None:
    """Run a recipe's merge with a progress bar, or plan it, and print the result."""
    from merge_tool.api import check_plan, merge_recipe, plan_recipe
    from merge_tool.cli.show import answer_lines
    from merge_tool.output.publishing import Publishing
    from merge_tool.plan.target import is_remote

    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    recipe, streaming = recipe_of(), Streaming(stream, downloads, spool_bytes)
    publishing = Publishing(private, not no_publish, work)
    if prompt is not None and is_remote(out):
        raise RecipeError(f"--try loads OUT from this disk, and {shown(out)} is not here. Leave it out.")
    if prompt is not None:
        from merge_tool.compare.prompting import check_can_answer

        check_can_answer(prompt)
    if page is not None:
        check_page(page, len(recipe.outputs), out)
    if dry_run:
        prepared = plan_recipe(
            recipe,
            out,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            streaming=streaming,
            publishing=publishing,
        )
        _print_plan(prepared, complete=check_plan(prepared, overwrite=overwrite), as_json=as_json)
        check_written()
        return
    with watched(progress, quiet=quiet) as watch, _engine(executor, memory_bytes, jobs) as on_engine:
        report = merge_recipe(
            recipe,
            out,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            check_resumed=check_resumed,
            streaming=streaming,
            publishing=publishing,
            report_path=report_path,
            watch=watch,
            **on_engine,
        )
    if page is not None:
        write_merge_page(page, report)
    said = [] if prompt is None else _answers(recipe, report.outputs, prompt)
    print_report(report, said, as_json=as_json, quiet=quiet)
    if said and not as_json:
        click.echo("\n".join(answer_lines(said)))


@contextmanager
def watched(progress: str, *, quiet: bool) -> Iterator[Watch]:
    """Warnings, notes and progress on standard error, as --progress and --quiet ask for."""
    from merge_tool.output.merge_report import Watch
    from merge_tool.progress import Progress

    with Progress(progress_kind(progress, quiet=quiet)) as bar:
        note = None if quiet else bar.say
        yield Watch(lambda message: bar.say(f"Warning: {message}"), bar.start, bar.advance, note)


@contextmanager
def _engine(name: str | None, memory_bytes: int | None, jobs: int | None) -> Iterator[dict[str, Any]]:
    """The executor of that name as arguments of merge_recipe."""
    if name is None:
        yield {}
        return
    from merge_tool.hosts.engines import PARTS_A_WORKER, engine

    with engine(name, memory_bytes=memory_bytes, jobs=jobs) as (executor, workers):
        yield {"executor": executor, "num_parts": PARTS_A_WORKER * workers}


def print_report(report: MergeReport, said: Sequence[Answer] = (), *, as_json: bool, quiet: bool) -> None:
    """The result of a merge, as --json and --quiet ask for."""
    from merge_tool.cli.show import report_json
    from merge_tool.output.merge_report import summary_lines

    print_result(lambda: report_json(report, said), lambda: summary_lines(report), as_json, quiet)


def _answers(recipe: Recipe, outputs: Iterable[Path], prompt: str) -> list[Answer]:
    """What the parents and the outputs say."""
    from merge_tool.compare.prompting import answers

    return list(answers([*map(str, recipe.models), *outputs], prompt))


def make_parts(parts: Sequence[Part], out: Path, run: dict[str, Any]) -> None:
    """Run the merges of a file of several recipes; what is printed as JSON is the last one's report."""
    from merge_tool.plan.target import is_remote
    from merge_tool.sweeps.chain import merge_parts

    if is_remote(out):
        raise RecipeError(f"{shown(out)}: a file of several recipes needs a folder as OUT. Then: merge-tool push.")

    def make_part(recipe: Recipe, target: Path, name: str) -> None:
        quiet = run["quiet"] or run["as_json"]
        of_part = {"report_path": None, "page": None, "prompt": None, "as_json": False, "quiet": quiet} if name else {}
        make(lambda: recipe, target, **{**run, **of_part})

    merge_parts(parts, out, make_part)


def _print_plan(prepared: Prepared, *, complete: bool, as_json: bool) -> None:
    from merge_tool.cli.show import plan_json, plan_lines

    for warning in prepared.warnings:
        click.echo(f"Warning: {warning}", err=True)
    print_result(lambda: plan_json(prepared, complete), lambda: plan_lines(prepared, complete), as_json)
