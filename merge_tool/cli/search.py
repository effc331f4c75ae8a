"""The command search: the parameters of a merge by evaluation."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from merge_tool.cli.frame import CONTINUES, Command, given, print_errors, print_result, progress_kind
from merge_tool.cli.options import MACHINE_OPTIONS, PRINT_OPTIONS, parse_ts, recipe_options, with_options
from merge_tool.errors import RecipeError, counted, shown
from merge_tool.recipe.options import Options

_USAGE = "Give BASE FT [FT ...] OUT, or a recipe: RECIPE.yaml OUT --space SPACE.yaml."


@click.command("search", cls=Command, context_settings={"show_default": True})
@click.argument("models", nargs=-1, required=True, metavar="{BASE FT [FT ...] | RECIPE} OUT", type=click.Path())
@click.option(
    "--eval",
    "command",
    metavar="COMMAND",
    help="The judge: gets a candidate's folder in place of {out} (or as last argument), prints `name value` lines or "
    "JSON. 'lm-eval:TASK,TASK --limit 100' is lm-evaluation-harness with its options.",
)
@click.option(
    "--in-process",
    metavar="FILE.py:FUNCTION",
    help="The judge in place of --eval: a Python function that gets the merged tensors by their names, without a disk.",
)
@click.option("--maximize", multiple=True, metavar="NAME", help="A score to make large.")
@click.option("--minimize", multiple=True, metavar="NAME", help="A score to make small.")
@click.option("--trials", type=click.IntRange(1), default=60, help="Candidates to try, those of earlier runs included.")
@click.option(
    "--space",
    type=click.Path(),
    metavar="SPACE.yaml",
    help="What to search: parameters, by groups of tensors and bands of layers.  [default: t or weights of attention, "
    "MLP and the rest, in four bands]",
)
@click.option(
    "--method", metavar="NAME", help="Of BASE and FTs: how to merge.  [default: slerp; task_arithmetic for several FTs]"
)
@click.option(
    "--uniform",
    multiple=True,
    default=["0:1:0.1"],
    callback=parse_ts,
    metavar="RANGE",
    help="Values of t to try first, the same for all tensors; a sweep in OUT gives their scores.",
)
@click.option(
    "--sampler",
    type=click.Choice(["auto", "tpe", "cmaes", "nsga2", "random"]),
    default="auto",
    help="Optuna's sampler. auto: tpe for one score, else nsga2.",
)
@click.option(
    "--pruner",
    type=click.Choice(["median", "none"]),
    default="median",
    help="Stop a candidate early if its intermediate score is below the others' median at that step.",
)
@click.option("--search-seed", type=int, default=0, help="Decides the sampler's random numbers.")
@click.option(
    "--storage", metavar="URL", help="A database of Optuna's, for many hosts on one study.  [default: OUT/study.db]"
)
@click.option(
    "--choose", metavar="NAME", help="Choose the point of the front with the best NAME.  [default: nearest to the best]"
)
@click.option("--test", metavar="COMMAND", help="Score the chosen candidate once, at the end, on data of its own.")
@with_options(recipe_options(Options))
@with_options(MACHINE_OPTIONS)
@click.option("--overwrite", is_flag=True, help="Forget the study that is in OUT and start anew.")
@with_options(PRINT_OPTIONS)
@print_errors(CONTINUES)
def search_command(
    models: tuple[str, ...],
    command: str | None,
    in_process: str | None,
    maximize: tuple[str, ...],
    minimize: tuple[str, ...],
    trials: int,
    space: str | None,
    method: str | None,
    uniform: tuple[float, ...],
    sampler: str,
    pruner: str,
    search_seed: int,
    storage: str | None,
    choose: str | None,
    test: str | None,
    memory_bytes: int | None,
    jobs: int | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    progress: str,
    **options: Any,
) -> None:
    """Search for the parameters of a merge that score best: of BASE and FTs, t or weights for attention, MLP and the
    rest along the layers; of RECIPE, what SPACE.yaml says.

    OUT gets study.db, search.csv, front/ (a recipe for each point of the Pareto front) and chosen.yaml. A search that
    was stopped continues with the same command. COMMAND is not run through a shell; for pipes use sh -c '...'.
    """
    from merge_tool.sweeps.search import search
    from merge_tool.sweeps.search_request import SearchRequest, plan_only
    from merge_tool.sweeps.search_results import report_lines, tried_text
    from merge_tool.sweeps.study import Tried, objectives_of

    if len(models) < 2:
        raise click.UsageError(f"{len(models)} path is given. {_USAGE}")
    what: Any = models[0] if len(models) == 2 else models[:-1]
    objectives = objectives_of(maximize, minimize)
    asked: dict[str, Any] = {
        "command": _words(command, "--eval"),
        "judge": None if in_process is None else _function(in_process),
        "trials": trials,
        "space": space,
        "method": method,
        "uniform": uniform,
        "sampler": sampler,
        "pruner": pruner,
        "storage": storage,
        "choose": choose,
        "test": _words(test, "--test"),
        "overwrite": overwrite,
    }
    own = given(options)
    limits: dict[str, Any] = {"memory_bytes": memory_bytes, "jobs": jobs}
    if dry_run:
        request = SearchRequest(what, Path(models[-1]), objectives=objectives, limits=limits, options=own, **asked)
        plan = plan_only(request)
        for warning in plan.first.warnings:
            click.echo(f"Warning: {warning}", err=True)
        print_result(lambda: _plan_json(plan, trials), lambda: _plan_lines(plan, request), as_json)
        return

    def on_tried(one: Tried) -> None:
        if not quiet:
            click.echo(f"  {tried_text(one, objectives)}", err=True)

    report = search(
        what,
        models[-1],
        maximize=maximize,
        minimize=minimize,
        search_seed=search_seed,
        progress=progress_kind(progress, quiet=quiet),
        on_tried=on_tried,
        on_warning=lambda message: click.echo(f"Warning: {message}", err=True),
        **asked,
        **limits,
        **own,
    )
    print_result(report.as_json, lambda: report_lines(report), as_json, quiet)


def _words(command: str | None, option: str) -> tuple[str, ...] | None:
    if command is None:
        return None
    try:
        return tuple(shlex.split(command, posix=os.name == "posix"))
    except ValueError as e:
        raise click.BadParameter(f"'{shown(command)}' cannot be split into words ({e}).", param_hint=option) from e


def _function(place: str) -> Any:
    """The function that FILE.py:FUNCTION names. Raises RecipeError."""
    path, _, name = place.rpartition(":")
    if not path or not name:
        raise RecipeError(f"--in-process '{shown(place)}' is not FILE.py:FUNCTION, as in judge.py:judge.")
    spec = importlib.util.spec_from_file_location("merge_tool_judge", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise RecipeError(f"--in-process {shown(path)}: no such Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise RecipeError(f"--in-process {shown(path)}: cannot be loaded ({type(e).__name__}: {shown(e)}).") from e
    if not callable(function := getattr(module, name, None)):
        raise RecipeError(f"--in-process {shown(path)}: has no function {shown(name)}.")
    return function


def _plan_json(plan: Any, trials: int) -> dict[str, Any]:
    from merge_tool.cli.show import plan_json

    knobs = {knob.name: list(knob.choices) or [knob.low, knob.high] for knob in plan.space.knobs.values()}
    return {"trials": trials, "knobs": knobs, "first": plan_json(plan.first, False)}


def _plan_lines(plan: Any, request: Any) -> Iterator[str]:
    from merge_tool.cli.show import plan_lines

    first = sum(plan.space.uniform(t) is not None for t in request.uniform) + len(plan.space.points)
    yield (
        f"Search: {counted(request.trials, 'candidate')}, one on disk at a time; the first {first:,} are given, "
        f"{counted(len(plan.space.knobs), 'number')} are searched after them:"
    )
    for key, groups in plan.space.parameters.items():
        for group in groups:
            what = ", ".join(group.filters) or "all other tensors"
            ends = f"one of {list(group.choices)}" if group.choices else f"{group.low:g} to {group.high:g}"
            yield f"  {shown(key)} of {shown(what)}: {ends}, {counted(group.bands, 'band')} of layers"
    yield "The first of them:"
    yield from plan_lines(plan.first, False)
