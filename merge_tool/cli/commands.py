"""`merge-tool`: the group of all commands. Its `merge` is slerp-merge; `run`, `fold` and `average` are here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from merge_tool._version import __version__
from merge_tool.cli import hosts
from merge_tool.cli.frame import CONTINUES, Group, print_errors
from merge_tool.cli.look import diff_command, inspect_command, verify_command
from merge_tool.cli.merging import make, make_parts, parted, slerp_merge
from merge_tool.cli.options import (
    HUB_OPTIONS,
    MACHINE_OPTIONS,
    MODELS_DIR,
    OUTPUT_OPTIONS,
    PRINT_OPTIONS,
    STREAM_OPTIONS,
    field_options,
    recipe_options,
    set_option,
    with_options,
)
from merge_tool.cli.pages import report_command
from merge_tool.cli.push import push_command
from merge_tool.cli.search import search_command
from merge_tool.cli.sweep import sweep_command
from merge_tool.errors import RecipeError
from merge_tool.recipe.average import AverageOptions
from merge_tool.recipe.options import Options


@click.group("merge-tool", cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="merge-tool")
def merge_tool() -> None:
    """Merge model checkpoints, and inspect them."""


merge_tool.add_command(slerp_merge, "merge")
_LOOK = (diff_command, inspect_command, verify_command, report_command)
for command in (sweep_command, search_command, *_LOOK, push_command, *hosts.COMMANDS):
    merge_tool.add_command(command)


@merge_tool.command("run", context_settings={"show_default": True})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@set_option("A parameter for all tensors, in place of the recipe's; several values make an output each, in one pass.")
@with_options([MODELS_DIR])
@with_options(recipe_options(Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(HUB_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@with_options(PRINT_OPTIONS)
@print_errors(CONTINUES)
def run_command(recipe: Path, out: Path, **options: Any) -> None:
    """Merge the models that RECIPE, a YAML file as mergekit reads it, names into OUT.

    Any number of models, by any of the methods in docs/methods.md. BASE is base_model, or else the first one listed.
    Several recipes in one file, with a name each but for the last, are made one after the other.
    A merge that was stopped continues with the same command.
    """
    from merge_tool.methods.registry import METHODS
    from merge_tool.recipe.mergekit import read_recipe
    from merge_tool.recipe.parts import read_parts

    run, chosen = parted(options)
    values, models_dir = chosen.get("values"), chosen.get("models_dir")
    if parts := read_parts(recipe, METHODS, **{k: v for k, v in chosen.items() if k not in ("values", "models_dir")}):
        for option, is_given in (("--set", values), ("--models-dir", models_dir), ("--dry-run", run["dry_run"])):
            if is_given:
                raise RecipeError(f"{option} is for a file of one recipe. Give each part a file of its own.")
        make_parts(parts, out, run)
        return
    make(lambda: read_recipe(recipe, METHODS, **chosen), out, **run)


@merge_tool.command("fold", context_settings={"show_default": True})
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@with_options(field_options(Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(HUB_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@with_options(PRINT_OPTIONS)
@print_errors(CONTINUES)
def fold_command(base: str, adapter: str, out: Path, **options: Any) -> None:
    """Write the model BASE with the PEFT LoRA adapter ADAPTER folded into its weights to OUT.

    The same weights as `slerp-merge BASE ADAPTER OUT --t 1`, but BASE is read once.
    """
    from merge_tool.methods.registry import METHODS
    from merge_tool.recipe.mergekit import read_recipe

    run, chosen = parted(options)
    model = {"model": {"path": base}, "lora": {"path": adapter}}
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    make(lambda: read_recipe(recipe, METHODS, **chosen), out, **run)


@merge_tool.command("average", context_settings={"show_default": True})
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT... OUT", type=click.Path())
@with_options(field_options(AverageOptions, Options))
@with_options(MACHINE_OPTIONS)
@with_options(STREAM_OPTIONS)
@with_options(HUB_OPTIONS)
@with_options(OUTPUT_OPTIONS)
@with_options(PRINT_OPTIONS)
@print_errors(CONTINUES)
def average_command(checkpoints: tuple[str, ...], **options: Any) -> None:
    """Average the CHECKPOINTs of one training run, the oldest first, into OUT.

    A CHECKPOINT is a model's folder or file, a glob ('runs/x/checkpoints/step-*', taken in the order of the numbers),
    or a model of the Hub (org/name@step1000). Several windows or weights are made from one reading, each in a folder in
    OUT. Memory does not grow with the number of checkpoints.
    """
    from merge_tool.api import averaging

    if len(checkpoints) < 2:
        raise click.UsageError("Give CHECKPOINT... OUT: the checkpoints, then where their average goes.")
    run, chosen = parted(options)
    make(lambda: averaging(checkpoints[:-1], **chosen), Path(checkpoints[-1]), **run)
