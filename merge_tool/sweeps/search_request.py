"""The request for a search, checked before any model is opened; and the facts that must be equal to continue it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_tool.api import check_plan
from merge_tool.errors import RecipeError
from merge_tool.plan.target import Target, check_target
from merge_tool.sweeps.scores import judge as judge_words
from merge_tool.sweeps.search_plan import Models, SearchPlan, plan_search
from merge_tool.sweeps.search_results import check_choose
from merge_tool.sweeps.study import Objective, check_sampler

UNIFORM = tuple(k / 10 for k in range(11))  # the first points: one value everywhere
MODELS = "models"  # the candidate that is judged now, below OUT
Judge = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class SearchRequest:
    """A request for a search; the docstring of `search` explains each field."""

    models: Models
    out: Path
    command: tuple[str, ...] | None
    judge: Judge | None
    objectives: tuple[Objective, ...]
    trials: int = 60
    space: str | Path | Mapping[str, Any] | None = None
    method: str | None = None
    uniform: tuple[float, ...] = UNIFORM
    sampler: str = "auto"
    pruner: str = "median"
    seed: int = 0
    storage: str | None = None
    choose: str | None = None
    test: tuple[str, ...] | None = None
    overwrite: bool = False
    limits: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, *, read_samples: bool) -> SearchPlan:
        """Make the checks that need no model, then plan the first candidate. Raises a MergeToolError."""
        if (self.command is None) == (self.judge is None):
            raise RecipeError("A search needs one judge: --eval COMMAND, or --in-process FILE.py:FUNCTION.")
        for words in filter(None, (self.command, self.test)):
            judge_words(words)
        if self.trials < 1:
            raise RecipeError(f"--trials is {self.trials}, expected at least 1.")
        check_sampler(self.sampler, self.pruner, self.objectives)
        if self.overwrite and self.storage is not None:
            raise RecipeError("--overwrite is for the study in OUT; the study in --storage may be other hosts', too.")
        check_choose(self.objectives, self.choose)
        plan = plan_search(
            self.models,
            self.out / MODELS / "candidate",
            space=self.space,
            method=self.method,
            options=self.options,
            read_samples=read_samples,
            memory_bytes=self.limits.get("memory_bytes"),
            jobs=self.limits.get("jobs"),
        )
        check_target(Target(self.out / MODELS), plan.first.inputs)  # its content is removed
        return plan

    @property
    def is_pair(self) -> bool:
        """Whether a sweep of t scores candidates of this search."""
        models = self.models
        if isinstance(models, str | Path | Mapping):
            return False
        return len(models) == 2 and self.method in (None, "slerp")

    def facts(self, plan: SearchPlan) -> dict[str, Any]:
        """The facts that must be equal to continue a study."""
        words = None if self.command is None else [word.replace("{out}", "{}") for word in self.command]
        named = [[one.name, one.direction] for one in self.objectives]
        return {**plan.facts, "judge": words or "a function", "objectives": named}


def plan_only(request: SearchRequest) -> SearchPlan:
    """Plan a search from headers; nothing is fetched or written. Raises the errors that the search would raise
    first."""
    plan = request.plan(read_samples=False)
    if request.judge is None:
        check_plan(plan.first)
    return plan
