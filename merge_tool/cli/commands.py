"""The two commands: parse, call, print, exit code. Never a tensor, an offset or a default value.

`slerp-merge` is the main job; `merge-tool` a group whose `merge` is the same command. What only a running command needs
is imported inside it: `--help` needs no numpy, and each command only its own modules.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from merge_tool._version import __version__
from merge_tool.checkpoint.streaming import Streaming
from merge_tool.cli import hosts
from merge_tool.cli.frame import CONTINUES, READS, Command, Group, check_written, print_errors
from merge_tool.cli.options import (
    MACHINE_OPTIONS,
    MODELS_DIR,
    OUTPUT_OPTIONS,
    STREAM_OPTIONS,
    parse_share,
    parse_ts,
    recipe_options,
    with_options,
)
from merge_tool.errors import shown
from merge_tool.recipe.options import Options
from merge_tool.recipe.pair import DEFAULT_T, PairOptions, pair
from merge_tool.recipe.recipe import Recipe, label_t

if TYPE_CHECKING:
    from merge_tool.api import MergeReport, Watch
    from merge_tool.plan.prepare import Prepared

# --------------------------------------------------------------------------------------- slerp-merge


@click.command(
    "slerp-merge", cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.argument("base", type=click.Path())
@click.argument("ft", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--t",
    "ts",
    multiple=True,
    default=[label_t(DEFAULT_T)],
    callback=parse_ts,
    metavar="NUMBER",
    help="How far to go from BASE (0) to FT (1). Several (0.3,0.5 or 0:1:0.1) are made in one pass.",
)
@with_options(recipe_options(PairOptions, Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@click.version_option(__version__, "--version", prog_name="slerp-merge")
@print_errors(CONTINUES)
def slerp_merge(base: str, ft: str, out: Path, ts: tuple[float, ...], **options: Any) -> None:
    """Merge the models BASE (t=0) and FT (t=1) into OUT, tensor by tensor, in bounded memory.

    BASE and FT are model folders, files of weights, or models of the Hub: org/name, org/name@revision (checked by
    their headers, then fetched); a PEFT LoRA adapter follows its model as MODEL+ADAPTER, or is FT alone, applied to
    BASE. OUT is a folder, or one file if it ends in .safetensors.
    A merge that was stopped continues with the same command.
    """
    run, chosen = _parted(options)
    _make(lambda: pair(base, ft, ts, **chosen), out, **run)


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What says how a merge is made, and what says which."""
    names = [option.name for option in _params((*MACHINE_OPTIONS, *STREAM_OPTIONS, *OUTPUT_OPTIONS))]
    return {n: options.pop(n) for n in names}, given(options)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the command line without their defaults: what a recipe says counts before a default."""
    source = click.get_current_context().get_parameter_source
    return {n: value for n, value in options.items() if source(n) is not ParameterSource.DEFAULT}


def _params(options: Iterable[Callable[[Any], Any]]) -> list[click.Parameter]:
    """The click parameters that the option decorators make."""
    return with_options(list(options))(click.Command("all", callback=lambda: None)).params  # type: ignore[no-any-return]


def _make(
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
    report_path: Path | None,
    executor: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a recipe's merge with a progress bar, or plan it, and print the result."""
    from merge_tool.api import check_plan, merge_recipe, plan_recipe

    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    recipe, streaming = recipe_of(), Streaming(stream, downloads, spool_bytes)
    if dry_run:
        prepared = plan_recipe(
            recipe, out, memory_bytes=memory_bytes, jobs=jobs, overwrite=overwrite, streaming=streaming
        )
        _print_plan(prepared, complete=check_plan(prepared, overwrite=overwrite), as_json=as_json)
        check_written()
        return
    with watched(quiet=quiet) as watch, _engine(executor, memory_bytes, jobs) as on_engine:
        report = merge_recipe(
            recipe,
            out,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            check_resumed=check_resumed,
            streaming=streaming,
            report_path=report_path,
            watch=watch,
            **on_engine,
        )
    print_report(report, as_json=as_json, quiet=quiet)


@contextmanager
def watched(*, quiet: bool) -> Iterator[Watch]:
    """Warnings on standard error, and a progress bar if that is a terminal."""
    from merge_tool.api import Watch

    with Bar(wanted=not quiet and sys.stderr.isatty()) as bar:
        yield Watch(lambda message: click.echo(f"Warning: {message}", err=True), bar.start, bar.advance)


@contextmanager
def _engine(name: str | None, memory_bytes: int | None, jobs: int | None) -> Iterator[dict[str, Any]]:
    """The executor of that name as arguments of merge_recipe."""
    if name is None:
        yield {}
        return
    from merge_tool.hosts.engines import PARTS_A_WORKER, engine

    with engine(name, memory_bytes=memory_bytes, jobs=jobs) as (executor, workers):
        yield {"executor": executor, "num_parts": PARTS_A_WORKER * workers}


def print_report(report: MergeReport, *, as_json: bool, quiet: bool) -> None:
    from merge_tool.cli.show import report_json, summary_lines

    if as_json:
        click.echo(json.dumps(report_json(report), indent=2))
    elif not quiet:
        click.echo("\n".join(summary_lines(report)))


class Bar:
    """One tqdm bar in bytes on stderr; no bar unless wanted."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Bar:
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


@click.group("merge-tool", cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="merge-tool")
def merge_tool() -> None:
    """Merge model checkpoints, and inspect them."""


merge_tool.add_command(slerp_merge, "merge")


@merge_tool.command("run", context_settings={"show_default": True})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="NAME=VALUE[,VALUE...]",
    help="A parameter for all tensors, in place of the recipe's; several values make an output each, in one pass.",
)
@with_options([MODELS_DIR])
@with_options(recipe_options(Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@print_errors(CONTINUES)
def run_command(recipe: Path, out: Path, **options: Any) -> None:
    """Merge the models that RECIPE, a YAML file as mergekit reads it, names into OUT.

    Any number of models, by any of the methods in docs/methods.md. BASE is base_model, or else the first one listed.
    A merge that was stopped continues with the same command.
    """
    from merge_tool.methods.registry import METHODS
    from merge_tool.recipe.mergekit import read_recipe

    run, chosen = _parted(options)
    _make(lambda: read_recipe(recipe, METHODS, **chosen), out, **run)


@merge_tool.command("fold", context_settings={"show_default": True})
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@with_options(recipe_options(Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@print_errors(CONTINUES)
def fold_command(base: str, adapter: str, out: Path, **options: Any) -> None:
    """Write the model BASE with the PEFT LoRA adapter ADAPTER folded into its weights to OUT.

    The same weights as `slerp-merge BASE ADAPTER OUT --t 1`, but BASE is read once.
    """
    from merge_tool.methods.registry import METHODS
    from merge_tool.recipe.mergekit import read_recipe

    run, chosen = _parted(options)
    model = {"model": {"path": base}, "lora": {"path": adapter}}
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    _make(lambda: read_recipe(recipe, METHODS, **chosen), out, **run)


@merge_tool.command("inspect")
@click.argument("path", type=click.Path())
@click.option("--health", is_flag=True, help="Read the weights too: norms, and whether every value is finite.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@print_errors(READS)
def inspect_command(path: str, health: bool, as_json: bool) -> None:
    """Show the shards, tensors, parameters and dtypes of the checkpoint at PATH.

    With --health the exit code is 1 if a value is NaN or infinite.
    """
    from merge_tool.cli.show import health_json, health_lines, inspection_lines
    from merge_tool.verify.inspection import check_health, inspect_checkpoint

    inspection = inspect_checkpoint(path)
    tensors = check_health(path) if health else []
    if as_json:
        click.echo(json.dumps(inspection.as_json() | (health_json(tensors) if health else {}), indent=2))
    else:
        click.echo("\n".join([*inspection_lines(inspection), *(health_lines(tensors) if health else ())]))
    if any(tensor.num_nonfinite for tensor in tensors):
        sys.exit(1)


@merge_tool.command("verify", context_settings={"show_default": True})
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
@with_options(MACHINE_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@print_errors(READS)
def verify_command(out: Path, against: tuple[str, str] | None, as_json: bool, **options: Any) -> None:
    """Check the output OUT of a merge: digests, names, shapes, dtypes, index and sizes.

    The exit code is 1 if anything is wrong. Nothing is written.
    """
    from merge_tool.cli.show import verification_json, verification_lines
    from merge_tool.verify.verify import verify

    if against is not None and options["recipe"] is not None:
        raise click.UsageError("Give either --against BASE FT or --recipe RECIPE.")
    if options["full"] and against is None and options["recipe"] is None:
        raise click.UsageError(
            "--full compares with the parents: give --against BASE FT, or for an output of `run` --recipe RECIPE."
        )
    verifications = verify(out, against, **options)
    if as_json:
        click.echo(json.dumps([verification_json(one) for one in verifications], indent=2))
    else:
        click.echo("\n".join(line for one in verifications for line in verification_lines(one)))
    if any(one.problems for one in verifications):
        sys.exit(1)


@merge_tool.command("push", context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("target", metavar="hub:ORG/NAME")
@click.option("--private", is_flag=True, help="If the repository is not there: make it a private one.")
@click.option("--no-publish", is_flag=True, help="Leave the pull request open.")
@click.option("--overwrite", is_flag=True, help="Replace the model that the repository has.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@print_errors(CONTINUES)
def push_command(out: Path, target: str, no_publish: bool, quiet: bool, **options: bool) -> None:
    """Push the output OUT of a merge to the Hub's repository ORG/NAME, which shows all of it at once.

    Everything goes to a pull request, which is merged last. A push that was stopped continues with the same command,
    also on another machine.
    """
    from merge_tool.cli.show import push_lines
    from merge_tool.output.upload import push

    pushed = push(out, target, publish=not no_publish, **options)
    if not quiet:
        click.echo("\n".join(push_lines(pushed)))


@merge_tool.command("diff", context_settings={"show_default": True})
@click.argument("base", type=click.Path())
@click.argument("ft", type=click.Path())
@click.option("--tensors", "every_tensor", is_flag=True, help="List every tensor, too.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the angles into this picture: layers by modules.",
)
@with_options(MACHINE_OPTIONS)
@print_errors(READS)
def diff_command(
    base: str, ft: str, every_tensor: bool, as_json: bool, picture: Path | None, **machine: int | None
) -> None:
    """Show how far apart two checkpoints are: angles, norm ratios and relative change, by layer and module.

    Any two checkpoints will do; tensors that only one has are listed. The angle is that between the two tensors as
    vectors, the norm ratio |FT| / |BASE|, the relative change |FT - BASE| / |BASE|.
    """
    from merge_tool.cli.plot import check_plot_path, plot_diff
    from merge_tool.cli.show import diff_lines
    from merge_tool.diff import diff_checkpoints

    if picture is not None:
        check_plot_path(picture)
    diff = diff_checkpoints(base, ft, **machine)
    if picture is not None:
        plot_diff(diff, picture)
    click.echo(
        json.dumps(diff.as_json(), indent=1) if as_json else "\n".join(diff_lines(diff, every_tensor=every_tensor))
    )


@merge_tool.command("sweep", context_settings={"show_default": True})
@click.argument("base", type=click.Path())
@click.argument("ft", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--t", "ts", multiple=True, default=["0:1:0.1"], callback=parse_ts, metavar="RANGE", help="Every t to try."
)
@click.option(
    "--eval",
    "command",
    required=True,
    metavar="COMMAND",
    help="Scores models: gets their folders as last arguments (or in place of {}), prints `name value` lines or JSON.",
)
@click.option("--batch", type=click.IntRange(1), default=1, help="Models merged in one pass and given to one COMMAND.")
@click.option("--keep", is_flag=True, help="Keep the merged models; otherwise each is deleted once it has its scores.")
@click.option("--minimize", multiple=True, metavar="NAME", help="A score where less is better.  [default: by its name]")
@with_options(recipe_options(PairOptions, Options))
@with_options(MACHINE_OPTIONS)
@click.option("--overwrite", is_flag=True, help="Forget the scores that are in OUT and start anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
@print_errors(CONTINUES)
def sweep_command(
    base: str, ft: str, out: Path, ts: tuple[float, ...], command: str, as_json: bool, **options: Any
) -> None:
    """Merge BASE and FT at many t, score each merge with a command, and mark the Pareto-optimal t.

    OUT gets sweep.jsonl, sweep.csv and (with matplotlib) sweep.png. A sweep that was stopped continues with the same
    command; more values of t may be added. COMMAND is not run through a shell; for pipes use sh -c '...'.
    """
    from merge_tool.cli.plot import can_plot, plot_sweep
    from merge_tool.cli.show import scores_line, sweep_lines
    from merge_tool.sweep import sweep

    try:
        words = shlex.split(command, posix=os.name == "posix")
    except ValueError as e:
        raise click.BadParameter(f"'{shown(command)}' cannot be split into words ({e}).", param_hint="--eval") from e
    on_scores = lambda point: click.echo(f"  {scores_line(point)}", err=True)  # noqa: E731
    report = sweep(base, ft, out, ts, words, on_scores=on_scores, **given(options))
    if can_plot():
        plot_sweep(report, out / "sweep.png")
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else "\n".join(sweep_lines(report)))


def _print_plan(prepared: Prepared, *, complete: bool, as_json: bool) -> None:
    from merge_tool.cli.show import plan_json, plan_lines

    for warning in prepared.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(plan_json(prepared, complete), indent=2))
    else:
        click.echo("\n".join(plan_lines(prepared, complete)))


for command in hosts.COMMANDS:
    merge_tool.add_command(command)
