"""The command sweep: many settings of one merge, scored by a command."""

from __future__ import annotations

import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from merge_tool.cli.frame import CONTINUES, Command, given, print_errors, print_result, progress_kind
from merge_tool.cli.options import MACHINE_OPTIONS, MODELS_DIR, PRINT_OPTIONS, parse_ts, recipe_options, with_options
from merge_tool.errors import RecipeError, shown
from merge_tool.recipe.options import Options
from merge_tool.recipe.pair import PairOptions
from merge_tool.recipe.recipe import Recipe

_USAGE = "Give BASE FT OUT, or a recipe: RECIPE.yaml OUT."


@click.command("sweep", cls=Command, context_settings={"show_default": True})
@click.argument("models", nargs=-1, required=True, metavar="{BASE FT | RECIPE} OUT", type=click.Path())
@click.option(
    "--t",
    "ts",
    multiple=True,
    default=["0:1:0.1"],
    callback=parse_ts,
    metavar="RANGE",
    help="Every t to try, of a pair.",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="NAME=VALUES",
    help="Of a recipe: the values of a parameter to try, as density=0.2,0.5, parameters.t=0:1:0.1 or "
    "models.1.parameters.weight=0.5,1. May be given several times: every combination is tried.",
)
@click.option(
    "--eval",
    "command",
    required=True,
    metavar="COMMAND",
    help="Scores models: gets their folders as last arguments (or in place of {}), prints `name value` lines or JSON. "
    "'lm-eval:TASK,TASK --limit 100' is lm-evaluation-harness with its options.",
)
@click.option("--batch", type=click.IntRange(1), default=1, help="Models merged in one pass and given to one COMMAND.")
@click.option("--keep", is_flag=True, help="Keep the merged models; otherwise each is deleted once it has its scores.")
@click.option("--minimize", multiple=True, metavar="NAME", help="A score where less is better.  [default: by its name]")
@with_options([MODELS_DIR])
@with_options(recipe_options(PairOptions, Options))
@with_options(MACHINE_OPTIONS)
@click.option("--overwrite", is_flag=True, help="Forget the scores that are in OUT and start anew.")
@with_options(PRINT_OPTIONS)
@print_errors(CONTINUES)
def sweep_command(
    models: tuple[str, ...],
    ts: tuple[float, ...],
    vary: tuple[str, ...],
    command: str,
    batch: int,
    keep: bool,
    minimize: tuple[str, ...],
    models_dir: str | None,
    memory_bytes: int | None,
    jobs: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: str,
    **options: Any,
) -> None:
    """Merge BASE and FT at many t, or RECIPE with many values of its parameters, score each merge with a command, and
    mark the Pareto-optimal ones.

    OUT gets sweep.jsonl, sweep.csv, sweep.html and (with matplotlib) sweep.png. A sweep that was stopped continues with
    the same command; more values may be added. COMMAND is not run through a shell; for pipes use sh -c '...'.
    """
    from merge_tool.cli.plot import can_plot, plot_sweep
    from merge_tool.cli.show import sweep_lines, sweep_plan_json, sweep_plan_lines
    from merge_tool.pages.other_pages import sweep_data
    from merge_tool.pages.page import write_page
    from merge_tool.plan.target import is_remote
    from merge_tool.sweeps.results import SweepPoint, point_text
    from merge_tool.sweeps.sweep import plan_sweep, sweep_outputs

    try:
        words = shlex.split(command, posix=os.name == "posix")
    except ValueError as e:
        raise click.BadParameter(f"'{shown(command)}' cannot be split into words ({e}).", param_hint="--eval") from e
    recipe, keys = _recipe(models, ts, vary, models_dir, given(options))
    out = Path(models[-1])
    if is_remote(out):
        raise RecipeError(f"{shown(out)}: a sweep needs a folder as OUT. Then: merge-tool push, or merge to the Hub.")
    limits: dict[str, Any] = {"memory_bytes": memory_bytes, "jobs": jobs}
    if dry_run:
        plan = plan_sweep(recipe, out, keys, words, batch=batch, overwrite=overwrite, **limits)
        for warning in plan.first.warnings:
            click.echo(f"Warning: {warning}", err=True)
        print_result(lambda: sweep_plan_json(plan), lambda: sweep_plan_lines(plan), as_json)
        return

    def on_scores(point: SweepPoint) -> None:
        if not quiet:
            click.echo(f"  {point_text(point)}", err=True)

    report = sweep_outputs(
        recipe,
        out,
        keys,
        words,
        batch=batch,
        keep=keep,
        minimize=minimize,
        overwrite=overwrite,
        progress=progress_kind(progress, quiet=quiet),
        on_scores=on_scores,
        on_warning=lambda message: click.echo(f"Warning: {message}", err=True),
        **limits,
    )
    if can_plot():
        plot_sweep(report, out / "sweep.png")
    write_page(out / "sweep.html", f"{out.absolute().name}: a sweep", sweep_data(report))
    print_result(report.as_json, lambda: sweep_lines(report), as_json, quiet)


def _recipe(
    models: tuple[str, ...],
    ts: tuple[float, ...],
    vary: tuple[str, ...],
    models_dir: str | None,
    options: dict[str, Any],
) -> tuple[Recipe, list[str]]:
    """The recipe of all merges, and the parameters in which they differ. Raises UsageError, RecipeError."""
    from merge_tool.sweeps.sweep import pair_at, parse_vary, recipe_at

    if len(models) == 3:
        if vary or models_dir is not None:
            wrong = "--vary" if vary else "--models-dir"
            raise click.UsageError(f"{wrong} goes with a recipe; BASE and FT are merged at every --t. {_USAGE}")
        return pair_at(models[0], models[1], ts, **options), ["t"]
    if len(models) != 2:
        raise click.UsageError(f"{len(models)} paths are given. {_USAGE}")
    context = click.get_current_context()
    if context.get_parameter_source("ts") is not ParameterSource.DEFAULT:
        raise click.UsageError("--t goes with BASE and FT. Of a recipe give --vary 't=0:1:0.1'.")
    if not vary:
        raise click.UsageError(
            f"--vary is missing: the recipe's parameters to vary, as in --vary 'density=0.2,0.5'. {_USAGE}"
        )
    if of_pairs := [field for field in fields(PairOptions) if field.name in options]:
        raise click.UsageError(f"{of_pairs[0].metadata['flag']} goes with BASE and FT; a recipe says it in its text.")
    return recipe_at(models[0], vary, models_dir=models_dir, **options), list(parse_vary(vary))
