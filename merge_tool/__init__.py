"""Merge model checkpoints of any size by SLERP, streamed in bounded memory.

    from merge_tool import merge
    merge("memphis-cot", "scribe-ft", "memphis-scribe", t=0.4)

Names are imported when they are first used, so that `import merge_tool` costs nothing. Functions speak to a Python
program here: their messages name keyword arguments, and their warnings go to the logger `merge_tool`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from merge_tool._version import __version__

if TYPE_CHECKING:
    from merge_tool.api import average, merge, merge_models, merge_recipe, plan_recipe
    from merge_tool.checkpoint.reader import Checkpoint, open_checkpoint
    from merge_tool.compare.diff import Diff, diff
    from merge_tool.compare.prompting import Answer, answers
    from merge_tool.errors import (
        CheckpointError,
        DataError,
        EvaluationError,
        FetchError,
        HeaderError,
        MergeToolError,
        MismatchError,
        OutputError,
        RecipeError,
    )
    from merge_tool.methods.steps import Method
    from merge_tool.output.merge_report import MergeReport, Watch
    from merge_tool.plan.memory import Layout, plan_layout
    from merge_tool.plan.plan import MergePlan
    from merge_tool.plan.plan_merge import plan_merge
    from merge_tool.recipe.mergekit import read_recipe
    from merge_tool.recipe.pair import pair
    from merge_tool.recipe.recipe import Recipe
    from merge_tool.run.run import run_plan
    from merge_tool.sweeps.results import SweepReport
    from merge_tool.sweeps.search import search
    from merge_tool.sweeps.search_results import SearchReport
    from merge_tool.sweeps.sweep import sweep, sweep_recipe
    from merge_tool.verification.inspection import Inspection, inspect
    from merge_tool.verification.verify import Verification, verify

_HOMES = {
    "MergeReport": "merge_tool.output.merge_report",
    "Watch": "merge_tool.output.merge_report",
    "Answer": "merge_tool.compare.prompting",
    "answers": "merge_tool.compare.prompting",
    "average": "merge_tool.api",
    "merge": "merge_tool.api",
    "merge_models": "merge_tool.api",
    "merge_recipe": "merge_tool.api",
    "push": "merge_tool.output.upload",
    "plan_recipe": "merge_tool.api",
    "Checkpoint": "merge_tool.checkpoint.reader",
    "open_checkpoint": "merge_tool.checkpoint.reader",
    "Diff": "merge_tool.compare.diff",
    "diff": "merge_tool.compare.diff",
    "CheckpointError": "merge_tool.errors",
    "DataError": "merge_tool.errors",
    "EvaluationError": "merge_tool.errors",
    "FetchError": "merge_tool.errors",
    "HeaderError": "merge_tool.errors",
    "MergeToolError": "merge_tool.errors",
    "MismatchError": "merge_tool.errors",
    "OutputError": "merge_tool.errors",
    "RecipeError": "merge_tool.errors",
    "Method": "merge_tool.methods.steps",
    "Layout": "merge_tool.plan.memory",
    "plan_layout": "merge_tool.plan.memory",
    "MergePlan": "merge_tool.plan.plan",
    "plan_merge": "merge_tool.plan.plan_merge",
    "pair": "merge_tool.recipe.pair",
    "read_recipe": "merge_tool.recipe.mergekit",
    "Recipe": "merge_tool.recipe.recipe",
    "run_plan": "merge_tool.run.run",
    "SweepReport": "merge_tool.sweeps.results",
    "SearchReport": "merge_tool.sweeps.search_results",
    "search": "merge_tool.sweeps.search",
    "sweep": "merge_tool.sweeps.sweep",
    "sweep_recipe": "merge_tool.sweeps.sweep",
    "Inspection": "merge_tool.verification.inspection",
    "inspect": "merge_tool.verification.inspection",
    "Verification": "merge_tool.verification.verify",
    "verify": "merge_tool.verification.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'merge_tool' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    if callable(found) and not isinstance(found, type):
        from merge_tool.python_words import spoken

        found = spoken(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Answer",
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "Diff",
    "EvaluationError",
    "FetchError",
    "HeaderError",
    "Inspection",
    "Layout",
    "MergePlan",
    "MergeReport",
    "MergeToolError",
    "Method",
    "MismatchError",
    "OutputError",
    "Recipe",
    "RecipeError",
    "SearchReport",
    "SweepReport",
    "Verification",
    "Watch",
    "__version__",
    "answers",
    "average",
    "diff",
    "inspect",
    "merge",
    "merge_models",
    "merge_recipe",
    "open_checkpoint",
    "pair",
    "plan_layout",
    "plan_merge",
    "plan_recipe",
    "push",
    "read_recipe",
    "run_plan",
    "search",
    "sweep",
    "sweep_recipe",
    "verify",
]
