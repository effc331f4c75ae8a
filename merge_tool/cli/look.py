"""The commands that look and change nothing: inspect, verify, diff."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from merge_tool.cli.frame import READS, Command, given, print_errors, print_result, progress_kind
from merge_tool.cli.options import (
    MACHINE_OPTIONS,
    MODELS_DIR,
    PRINT_OPTIONS,
    field_options,
    parse_share,
    with_options,
)
from merge_tool.cli.pages import PAGE_OPTION
from merge_tool.recipe.options import OUTPUT_DTYPES, STOP_BASE_OR_FT, Options

_SHOWN = {"show_default": True}


@click.command("inspect", cls=Command)
@click.argument("path", type=click.Path())
@click.option("--health", is_flag=True, help="Read the weights too: norms, and whether every value is finite.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only; with --health the exit code tells.")
@print_errors(READS)
def inspect_command(path: str, health: bool, as_json: bool, quiet: bool) -> None:
    """Show the shards, tensors, parameters and dtypes of the checkpoint at PATH.

    With --health the exit code is 1 if a value is NaN or infinite.
    """
    from merge_tool.cli.show import health_json, health_lines, inspection_lines
    from merge_tool.verification.inspection import check_health, inspect

    inspection = inspect(path)
    tensors = check_health(path) if health else []
    print_result(
        lambda: inspection.as_json() | (health_json(tensors) if health else {}),
        lambda: [*inspection_lines(inspection), *(health_lines(tensors) if health else ())],
        as_json,
        quiet,
    )
    if any(tensor.num_nonfinite for tensor in tensors):
        sys.exit(1)


@click.command("verify", cls=Command, context_settings=_SHOWN)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--against",
    nargs=2,
    type=click.Path(),
    metavar="BASE FT",
    help="Also merge elements of these parents again, and compare them bit for bit.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Of an output of `run`: also merge elements by this recipe again, and compare them bit for bit.",
)
@with_options([MODELS_DIR])
@click.option(
    "--sample",
    default="1%",
    callback=parse_share,
    metavar="SHARE",
    help="How many elements are compared: blocks of every tensor, chosen anew in every run.",
)
@click.option("--full", is_flag=True, help="Compare all elements, and make every sum and line of the report again.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The report of a one-file OUT, as --report of its merge wrote it.",
)
@with_options(field_options(Options))
@with_options(MACHINE_OPTIONS)
@with_options(PRINT_OPTIONS)
@print_errors(READS)
def verify_command(
    out: Path,
    against: tuple[str, str] | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: str,
    **options: Any,
) -> None:
    """Check the output OUT of a merge: digests, names, shapes, dtypes, index and sizes.

    Options of a merge (--dtype, --on-missing ...) say what OUT must have been made with; without them its report is
    taken at its word. The exit code is 1 if anything is wrong. Nothing is written.
    """
    from merge_tool.cli.show import verification_json, verification_lines, verify_plan_lines
    from merge_tool.verification.verify import plan_verify, verify

    if against is not None and options["recipe"] is not None:
        raise click.UsageError("Give either --against BASE FT or --recipe RECIPE.")
    if options["full"] and against is None and options["recipe"] is None:
        raise click.UsageError(
            "--full compares with the parents: give --against BASE FT, or for an output of `run` --recipe RECIPE."
        )
    asked = given(options)
    if dry_run:
        plans = plan_verify(out, against, **asked)
        print_result(
            lambda: [plan.as_json() for plan in plans],
            lambda: [line for plan in plans for line in verify_plan_lines(plan)],
            as_json,
        )
        return
    verifications = verify(out, against, progress=progress_kind(progress, quiet=quiet), **asked)
    wrong = any(one.problems for one in verifications)
    print_result(
        lambda: [verification_json(one) for one in verifications],
        lambda: [line for one in verifications for line in verification_lines(one)],
        as_json,
        quiet and not wrong,
    )
    if wrong:
        sys.exit(1)


@click.command("diff", cls=Command, context_settings=_SHOWN)
@click.argument("base", type=click.Path())
@click.argument("ft", type=click.Path())
@click.option("--tensors", "every_tensor", is_flag=True, help="List every tensor, too.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the angles into this picture: layers by modules.",
)
@PAGE_OPTION
@click.option(
    "--on-missing",
    type=click.Choice(STOP_BASE_OR_FT),
    default="ft",
    help="If a model lacks a tensor: stop; list what FT lacks; or (ft) list what either model lacks.",
)
@click.option(
    "--dtype",
    type=click.Choice([*OUTPUT_DTYPES]),
    help="Round the floats of both to this type first. base: FT's to BASE's types.",
)
@with_options(MACHINE_OPTIONS)
@with_options(PRINT_OPTIONS)
@print_errors(READS)
def diff_command(
    base: str,
    ft: str,
    every_tensor: bool,
    picture: Path | None,
    page: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: str,
    **options: Any,
) -> None:
    """Show how far apart two checkpoints are: angles, norm ratios and relative change, by layer and module; and what
    differs in their configurations and tokenizers.

    Any two checkpoints will do; tensors that only one has are listed. The angle is that between the two tensors as
    vectors, the norm ratio |FT| / |BASE|, the relative change |FT - BASE| / |BASE|.
    """
    from merge_tool.cli.plot import check_plot_path, plot_diff
    from merge_tool.cli.show import diff_lines, diff_plan_lines
    from merge_tool.compare.diff import diff, plan_diff
    from merge_tool.pages.page import check_page_path, write_page

    if picture is not None:
        check_plot_path(picture)
    if page is not None:
        check_page_path(page)
    if dry_run:
        plan = plan_diff(base, ft, **options)
        print_result(plan.as_json, lambda: diff_plan_lines(plan), as_json)
        return
    compared = diff(base, ft, progress=progress_kind(progress, quiet=quiet), **options)
    if picture is not None:
        plot_diff(compared, picture)
    if page is not None:
        from merge_tool.pages.other_pages import diff_data

        write_page(page, f"{' and '.join(compared.names)}: comparison", diff_data(compared))
    print_result(compared.as_json, lambda: diff_lines(compared, every_tensor=every_tensor), as_json, quiet)
