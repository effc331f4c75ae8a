"""The commands of a merge on many hosts: plan, work, finish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from merge_tool.cli.frame import CONTINUES, Command, given, print_errors, progress_kind
from merge_tool.cli.options import (
    MACHINE_OPTIONS,
    MODELS_DIR,
    PROGRESS,
    recipe_options,
    set_option,
    t_option,
    with_options,
)
from merge_tool.recipe.options import Options
from merge_tool.recipe.pair import PairOptions
from merge_tool.recipe.recipe import Recipe

_PLAN_FILE = click.argument("plan_file", metavar="PLAN.json", type=click.Path(path_type=Path))
_QUIET = click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors only.")


@click.command("plan", cls=Command, context_settings={"show_default": True})
@click.argument("paths", metavar="RECIPE OUT | BASE FT OUT", nargs=-1, required=True)
@click.option("--parts", type=int, default=16, help="The number of parts: at least as many as there are workers.")
@click.option(
    "-o",
    "--plan-file",
    "plan_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("plan.json"),
    help="The plan file to write.",
)
@t_option("Of a pair: how far to go from BASE (0) to FT (1). Several are made in one pass.")
@set_option("Of a recipe: as in `merge-tool run`.")
@with_options([MODELS_DIR])
@with_options(recipe_options(PairOptions, Options))
@click.option("--overwrite", is_flag=True, help="Replace what is in OUT, when the merge is finished.")
@_QUIET
@print_errors(CONTINUES)
def plan_command(paths: Sequence[str], plan_file: Path, parts: int, **options: Any) -> None:
    """Plan a merge for many workers: write PLAN.json, and begin the merge in OUT, a folder that all of them see.

    Only headers are read, and a few bytes of local weights; models of the Hub are pinned to their commits. Then run
    `merge-tool work PLAN.json` on every host, and `merge-tool finish PLAN.json` on one.
    """
    from merge_tool.api import plan_parts
    from merge_tool.errors import counted, shown, sized
    from merge_tool.hosts.plan_file import check_plan_path, write_plan_file
    from merge_tool.output.merge_report import Watch

    overwrite, quiet = options.pop("overwrite"), options.pop("quiet")
    watch = Watch(on_warning=lambda message: click.echo(f"Warning: {message}", err=True))
    recipe = _recipe(paths, options)
    check_plan_path(plan_file, recipe, Path(paths[-1]))
    plan = plan_parts(recipe, paths[-1], parts, overwrite=overwrite, watch=watch)
    write_plan_file(plan, plan_file)
    if quiet:
        return
    reads = [sum(plan.pieces[number].read_bytes for number in part) for part in plan.parts]
    busy = [nbytes for nbytes in reads if nbytes]
    click.echo(
        f"{shown(plan_file)}: {counted(len(plan.shards), 'shard')} in {counted(len(plan.pieces), 'piece')}, "
        f"{counted(len(plan.parts), 'part')} of "
        f"{sized(min(busy, default=0))} to {sized(max(busy, default=0))} to read"
    )
    if idle := len(reads) - len(busy):
        click.echo(f"  {counted(idle, 'part')} without any: there are too few tensors for so many.")
    click.echo(f"  on every host:  merge-tool work {plan_file}\n  at the end:     merge-tool finish {plan_file}")


def _recipe(paths: Sequence[str], options: dict[str, Any]) -> Recipe:
    """The recipe of a pair, or of a file."""
    from merge_tool.methods.registry import METHODS
    from merge_tool.recipe.mergekit import read_recipe
    from merge_tool.recipe.pair import pair

    chosen = given(options)
    if len(paths) == 3:
        if wrong := sorted({"values", "models_dir"} & chosen.keys()):
            raise click.UsageError(
                f"--{'set' if wrong[0] == 'values' else 'models-dir'} is of a recipe, not of a pair."
            )
        return pair(paths[0], paths[1], chosen.pop("ts", options["ts"]), **chosen)
    if len(paths) == 2:
        own = {"ts", *PairOptions.__dataclass_fields__}
        if wrong := sorted(own & chosen.keys()):
            raise click.UsageError(f"--{wrong[0].replace('_', '-')} is of a pair; a recipe has that in its text.")
        return read_recipe(Path(paths[0]), METHODS, **chosen)
    raise click.UsageError(f"{len(paths)} paths were given, expected RECIPE OUT or BASE FT OUT.")


@click.command("work", cls=Command, context_settings={"show_default": True})
@_PLAN_FILE
@click.option("--part", type=int, metavar="I", help="This worker's number, from 0.  [default: by the environment]")
@click.option("--of", "size", type=int, metavar="N", help="The number of workers.  [default: by the environment]")
@click.option("--steal", is_flag=True, help="After its own parts, make the parts that no living worker makes.")
@click.option(
    "--lease", type=click.FloatRange(min=1), default=60.0, help="With --steal: seconds until a silent worker is dead."
)
@with_options(MACHINE_OPTIONS)
@_QUIET
@with_options([PROGRESS])
@print_errors(CONTINUES)
def work_command(
    plan_file: Path,
    part: int | None,
    size: int | None,
    *,
    steal: bool,
    lease: float,
    memory_bytes: int | None,
    jobs: int | None,
    quiet: bool,
    progress: str,
) -> None:
    """Make this worker's parts of PLAN.json, and leave a receipt for each in OUT. What has a receipt is skipped.

    The number of this worker and of all workers comes from RANK and WORLD_SIZE (torchrun), OMPI_COMM_WORLD_*, SLURM_*
    (tasks or job arrays) or JOB_COMPLETION_INDEX (Kubernetes). Without any, all parts are made.
    """
    from merge_tool.errors import counted
    from merge_tool.hosts.claims import steal as steal_pieces
    from merge_tool.hosts.plan_file import read_plan_file
    from merge_tool.hosts.ranks import pieces_of, rank_of
    from merge_tool.hosts.worker import Worker
    from merge_tool.progress import Progress

    plan = read_plan_file(plan_file)
    rank = rank_of() if part is None else None
    if part is None and rank is None and size not in (None, 1):
        raise click.UsageError("--of is given without --part, and nothing in the environment says a rank.")
    number, count = (rank.rank, rank.size if size is None else size) if rank else (part, size)
    mine = pieces_of(plan.parts, number or 0, count if number is not None else 1)
    worker = Worker(plan, memory_bytes=memory_bytes, jobs=jobs)
    missing = worker.parts.missing(mine)
    with Progress(progress_kind(progress, quiet=quiet)) as bar:
        bar.start(worker.progress_bytes(range(len(plan.pieces)) if steal else missing))
        if steal:
            made = steal_pieces(worker, mine, lease=lease, on_progress=bar.advance)
        else:
            worker.make(missing, bar.advance)
            made = missing
    if not quiet:
        whose = "all workers" if number is None else f"worker {number} of {count or len(plan.parts)}"
        click.echo(
            f"{counted(len(made), 'piece')} made, {len(mine) - len(missing):,} were there, of {len(mine):,} for {whose}"
        )


@click.command("finish", cls=Command, context_settings={"show_default": True})
@_PLAN_FILE
@click.option("--fill", is_flag=True, help="Make the parts that are missing.")
@click.option("--check-resumed", "check", is_flag=True, help="Make the SHA-256 of every shard again.")
@with_options(MACHINE_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_QUIET
@with_options([PROGRESS])
@print_errors(CONTINUES)
def finish_command(plan_file: Path, *, as_json: bool, quiet: bool, progress: str, **options: Any) -> None:
    """Complete the merge of PLAN.json: check all receipts, write index, card, report and checksums, publish OUT.

    The files are the same bytes as those of the merge on one machine.
    """
    from merge_tool.api import finish_parts
    from merge_tool.cli.merging import print_report, watched
    from merge_tool.hosts.plan_file import read_plan_file

    plan = read_plan_file(plan_file)
    with watched(progress, quiet=quiet) as watch:
        report = finish_parts(plan, watch=watch, **options)
    print_report(report, as_json=as_json, quiet=quiet)


COMMANDS = (plan_command, work_command, finish_command)
