"""The command that makes a page to look at, and what other commands need for their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from merge_tool.cli.frame import READS, Command, print_errors
from merge_tool.errors import RecipeError, shown

if TYPE_CHECKING:
    from merge_tool.output.merge_report import MergeReport

PAGE_OPTION = click.option(
    "--report-html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PAGE.html",
    help="Also write a page to look at: angles by layer and module, files, another schedule. One file, no network.",
)


@click.command("report", cls=Command)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("page", type=click.Path(path_type=Path, dir_okay=False), required=False, metavar="[PAGE.html]")
@print_errors(READS)
def report_command(out: Path, page: Path | None) -> None:
    """Write a page about the finished merge in OUT: what was merged, the angles by layer and module, the files.

    PAGE.html (without it: OUT.html beside OUT) is one file that any browser opens, and fetches nothing. A schedule of
    t can be drawn on it, which becomes a command and a recipe.
    """
    from merge_tool.pages.merge_page import merge_data
    from merge_tool.pages.page import check_page_path, write_page

    if page is None:
        page = out.with_name(f"{out.name}.html") if out.name else Path(f"{out.absolute().name}.html")
    check_page_path(page)
    write_page(page, f"{out.absolute().name}: merge report", merge_data(out))
    click.echo(f"{shown(page)}: open it in a browser.")


def check_page(page: Path, num_outputs: int, out: Path) -> None:
    """Raise an error, before the merge, for a page that could not be made after it."""
    from merge_tool.pages.page import check_page_path
    from merge_tool.plan.target import is_remote

    check_page_path(page)
    if is_remote(out):
        raise RecipeError(
            f"--report-html: {shown(out)} is not here. Fetch it afterwards (hf download), then make its page "
            "with merge-tool report."
        )
    if out.suffix == ".safetensors":
        raise RecipeError(f"--report-html: {shown(out)} is one file, without a report. Give OUT as a folder.")
    if num_outputs > 1:
        raise RecipeError(f"--report-html: {num_outputs} outputs. Make their pages with merge-tool report OUT/NAME.")


def write_merge_page(page: Path, report: MergeReport) -> None:
    """The page of the merge that was just made."""
    from merge_tool.pages.merge_page import merge_data
    from merge_tool.pages.page import write_page

    out = report.outputs[0]
    write_page(page, f"{out.absolute().name}: merge report", merge_data(out, report))
