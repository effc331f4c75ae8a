"""Coefficients by evaluation: Optuna says which recipe to try next; merge it, judge it, forget the model, go on.

The first merge's sums are kept, so that every further candidate is one pass over the inputs. One model is on disk at a
time. What the judge cannot score is recorded, and the search goes on.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_tool.api import check_plan, merge_recipe, plan_recipe
from merge_tool.errors import DataError, EvaluationError, OutputError, RecipeError, output_failed, shown
from merge_tool.files import write_whole
from merge_tool.models.lora import parts
from merge_tool.models.side_files import REPORT
from merge_tool.output.known import EarlierFindings
from merge_tool.output.lock import FolderLock
from merge_tool.output.marks import check_apart_by_mark
from merge_tool.output.merge_report import Watch
from merge_tool.output.older import strangers
from merge_tool.output.report import report_lines
from merge_tool.plan.target import Target, check_target
from merge_tool.progress import Progress
from merge_tool.recipe.recipe import Recipe
from merge_tool.sweeps.in_memory import merge_in_memory
from merge_tool.sweeps.journal import JOURNAL
from merge_tool.sweeps.judging import Hopeless, Judgement, Names, judge_by_command, judge_by_function
from merge_tool.sweeps.scores import judge as judge_words
from merge_tool.sweeps.search_plan import Models, SearchPlan, plan_search
from merge_tool.sweeps.search_results import (
    CHOSEN,
    FRONT,
    RESULT,
    TABLE,
    SearchReport,
    build_report,
    check_choose,
)
from merge_tool.sweeps.study import STUDY, Objective, Study, Tried, check_sampler, objectives_of
from merge_tool.sweeps.warm_start import sweep_scores

UNIFORM = tuple(k / 10 for k in range(11))  # the first points: one value everywhere
MODELS = "models"  # the candidate that is judged now
_HIDDEN, _OWNER, _TESTS = ".search", "owner.txt", "test.json"
_MOST_FAILURES = 5  # in a row: then it is not the candidates
Judge = Callable[[Mapping[str, Any]], Any]


def search(
    models: Models,
    out: str | Path,
    command: Sequence[str] | None = None,
    *,
    judge: Judge | None = None,
    maximize: Sequence[str] = (),
    minimize: Sequence[str] = (),
    trials: int = 60,
    space: str | Path | Mapping[str, Any] | None = None,
    method: str | None = None,
    uniform: Iterable[float] = UNIFORM,
    sampler: str = "auto",
    pruner: str = "median",
    search_seed: int = 0,
    storage: str | None = None,
    choose: str | None = None,
    test: Sequence[str] | None = None,
    overwrite: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: str = "auto",
    on_tried: Callable[[Tried], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    **options: Any,
) -> SearchReport:
    """Search for the parameters of a merge whose scores are best.

    `models` are a base and finetunes, or a recipe (a file or a mapping), which needs a `space` (docs/search.md). The
    `command` gets a candidate's folder in place of `{out}` and prints scores, as in `sweep`; or `judge` gets its
    tensors (name -> array) in this process and returns scores by name. `maximize` and `minimize` name the scores that
    count. `trials` is the number of candidates in all; the same call continues. `uniform` are values of t that are
    tried first. `sampler` is one of auto (tpe for one score, else nsga2), tpe, cmaes, nsga2, random; `storage` is the
    address of a database of Optuna's in place of OUT/study.db. `test` scores the chosen candidate once, on other data.
    `options` are those of `merge_models`.

    Raises EvaluationError if the judge fails for the first candidate or for many in a row; the errors of
    `merge_models`.
    """
    request = SearchRequest(
        models=models,
        out=Path(out),
        command=None if command is None else tuple(command),
        judge=judge,
        objectives=objectives_of(maximize, minimize),
        trials=trials,
        space=space,
        method=method,
        uniform=tuple(uniform),
        sampler=sampler,
        pruner=pruner,
        seed=search_seed,
        storage=storage,
        choose=choose,
        test=None if test is None else tuple(test),
        overwrite=overwrite,
        limits={"memory_bytes": memory_bytes, "jobs": jobs},
        options=options,
    )
    watch = Watch(on_warning)
    plan = request.plan(read_samples=True)
    watch.warn(plan.first.warnings)
    folder = request.out
    try:
        with _held(folder, request, plan) as lock, Progress(progress) as bar:
            running = _Search(request, plan, lock, bar, watch, on_tried)
            try:
                return running.run()
            finally:
                running.close()
    except OSError as e:
        raise output_failed(folder, e) from e


@dataclass(frozen=True)
class SearchRequest:
    """What a search is asked: `search` has the meaning of each field."""

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
        """Check what needs no model, then plan the first candidate. Raises a MergeToolError."""
        if (self.command is None) == (self.judge is None):
            raise RecipeError("A search needs one judge: --eval COMMAND, or --in-process FILE.py:FUNCTION.")
        for words in filter(None, (self.command, self.test)):
            judge_words(words)
        if self.trials < 1:
            raise RecipeError(f"--trials is {self.trials}, expected at least 1.")
        check_sampler(self.sampler, self.pruner, self.objectives)
        if self.overwrite and self.storage is not None:
            raise RecipeError("--overwrite goes with the study in OUT; the one in --storage may be other hosts', too.")
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
        """What must be equal to go on with a study."""
        words = None if self.command is None else [word.replace("{out}", "{}") for word in self.command]
        named = [[one.name, one.direction] for one in self.objectives]
        return {**plan.facts, "judge": words or "a function", "objectives": named}


def plan_only(request: SearchRequest) -> SearchPlan:
    """Plan a search from headers; nothing is fetched or written. Raises the errors that it would begin with."""
    plan = request.plan(read_samples=False)
    if request.judge is None:
        check_plan(plan.first)
    return plan


class _held:  # noqa: N801 - a context
    """OUT, made and locked; what a search with --overwrite leaves out is removed."""

    def __init__(self, folder: Path, request: SearchRequest, plan: SearchPlan) -> None:
        self._folder, self._request, self._plan = folder, request, plan

    def __enter__(self) -> FolderLock:
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = any((folder / name).exists() for name in (_OWNER, STUDY, JOURNAL))
        if not is_ours and (others := strangers(folder, [_HIDDEN], ())):
            raise OutputError(
                f"{shown(folder)}: is not empty ({shown(others[0])}) and holds no search. Choose another folder."
            )
        (folder / _HIDDEN).mkdir(exist_ok=True)
        self._lock = FolderLock(folder / _HIDDEN)
        if self._request.overwrite:
            for name in (STUDY, f"{STUDY}-journal", CHOSEN, TABLE, RESULT, _TESTS):
                (folder / name).unlink(missing_ok=True)
            for path in folder.glob("sums-*.json"):
                path.unlink()
            shutil.rmtree(folder / FRONT, ignore_errors=True)
        return self._lock

    def __exit__(self, *exc: object) -> None:
        self._lock.remove_with(self._folder / _HIDDEN)


class _Search:
    """A search that runs."""

    def __init__(
        self,
        request: SearchRequest,
        plan: SearchPlan,
        lock: FolderLock,
        bar: Progress,
        watch: Watch,
        on_tried: Callable[[Tried], None] | None,
    ) -> None:
        self._request, self._plan, self._lock, self._bar = request, plan, lock, bar
        self._watch, self._on_tried, self._folder = watch, on_tried, request.out
        self._names = Names([one.name for one in request.objectives])
        facts = request.facts(plan)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self._sums_stem = f"sums-{digest}-"
        points = {t: values for t in request.uniform if (values := plan.space.uniform(t)) is not None}
        self._study = Study(
            self._folder,
            plan.space.knobs,
            request.objectives,
            facts,
            owner=self._owner(),
            storage=request.storage,
            sampler=request.sampler,
            pruner=request.pruner,
            seed=request.seed,
            trials=request.trials,
            num_points=len(points) + len(plan.space.points),
        )
        self._check_facts(facts)
        self._points = points

    def close(self) -> None:
        self._study.close()

    def run(self) -> SearchReport:
        """Try candidates until there are enough, then score the chosen one on test data."""
        self._begin()
        tried = self._study.tried()
        failures = 0
        while len(tried) < self._request.trials:
            number, values = self._study.ask()
            self._bar.begin(f"candidate {number} ({len(tried) + 1} of {self._request.trials})")
            self._try(number, values, has_scores=any(one.scores is not None for one in tried))
            tried = self._study.tried()
            report = self._write(tried)
            last = next(one for one in tried if one.number == number)
            failures = failures + 1 if last.error else 0
            if self._on_tried is not None:
                self._bar.close()
                self._on_tried(last)
            if failures == _MOST_FAILURES:
                raise EvaluationError(
                    f"The judge failed for {failures} candidates in a row. The last one:\n{last.error}\nCorrect it, "
                    "then run the same command: it continues."
                )
        report = self._write(tried)
        if self._request.test is not None and report.chosen is not None:
            self._test(report)
            report = self._write(tried)
        self._remove_models()
        return report

    # ------------------------------------------------------------------------------------ the study

    def _owner(self) -> str:
        """A name for this OUT among the hosts of a study."""
        path = self._folder / _OWNER
        if not path.exists():
            write_whole(path, [secrets.token_hex(8).encode()], self._folder / _HIDDEN / "owner.part")
        return path.read_text(encoding="ascii", errors="replace").strip()

    def _check_facts(self, facts: Mapping[str, Any]) -> None:
        now, before = json.loads(json.dumps(facts)), self._study.facts
        if different := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
            key = different[0]
            raise OutputError(
                f"{shown(self._folder)}: holds another search: {', '.join(different)} differ ({key}: "
                f"{shown(before.get(key, 'nothing'), 80)} there, {shown(now.get(key, 'nothing'), 80)} now). Choose "
                "another folder, or --overwrite to start anew."
            )

    def _begin(self) -> None:
        """What was left is tried again; then the sweep's points, one value everywhere, and the points of the space."""
        self._study.recover()
        request, tried = self._request, self._study.tried()
        for one in tried:
            if one.scores is not None:
                self._names.learn(one.scores, one.items or {})
        if request.is_pair and request.command is not None:
            self._take_sweep({one.t for one in tried if one.scores is not None})
        for t, values in self._points.items():
            self._study.enqueue(values, "uniform", t)
        for point in self._plan.space.points:
            self._study.enqueue(self._plan.space.filled(point), "start")

    def _take_sweep(self, have: set[float | None]) -> None:
        request = self._request
        models, command = request.models, request.command
        assert command is not None
        assert not isinstance(models, str | Path | Mapping)
        scored, why = sweep_scores(self._folder, models, request.options, command)
        self._watch.warn([why] if why else [])
        for t, scores in scored:
            values = self._plan.space.uniform(t)
            if values is None or t in have or any(one.name not in scores for one in request.objectives):
                continue
            self._study.add(values, scores, "sweep", t)
            self._names.learn(scores, {})

    # -------------------------------------------------------------------------------- one candidate

    def _try(self, number: int, values: Mapping[str, Any], *, has_scores: bool) -> None:
        """Merge and judge a candidate, and tell the study. The judge's failure is told, too; if nothing has scores yet,
        the judge is wrong, and this candidate is left to be tried again."""
        try:
            judgement = self._judged(number, values)
        except Hopeless:
            self._study.tell_pruned()
        except (EvaluationError, DataError) as e:
            if not has_scores and isinstance(e, EvaluationError):
                raise EvaluationError(f"{e}\nCorrect it, then run the same command: it continues.") from e
            self._study.tell_failed(str(e))
            self._watch.warn([f"Candidate {number} has no scores: {str(e).splitlines()[0]}"])
        else:
            self._study.tell(judgement.scores, judgement.items)

    def _judged(self, number: int, values: Mapping[str, Any]) -> Judgement:
        recipe = self._plan.recipe_of(values, f"candidate {number}")
        if self._request.judge is not None:
            tensors = self._merge_in_memory(recipe)
            return judge_by_function(self._request.judge, tensors, self._names, on_step=self._study.is_hopeless)
        assert self._request.command is not None
        model = self._merge(recipe)
        self._bar.begin(f"candidate {number}, judging")
        judgement = judge_by_command(
            judge_words(self._request.command),
            model,
            self._folder,
            self._names,
            beat=self._beat,
            on_step=self._study.is_hopeless,
        )
        shutil.rmtree(model, ignore_errors=True)
        return judgement

    def _merge(self, recipe: Recipe) -> Path:
        """The merged model, below OUT; one that a stopped run began is continued, any other is removed."""
        digest = hashlib.sha256(recipe.text.encode()).hexdigest()[:8]
        models, folder = self._folder / MODELS, self._folder / MODELS / f"candidate-{digest}"
        if models.exists():
            check_apart_by_mark(models, [Path(part) for ref in recipe.models for part in parts(str(ref))])
            for other in models.iterdir():
                if other != folder:
                    shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        earlier = self._sums()
        watch = Watch(on_start=self._bar.start, on_progress=self._on_progress)  # the first plan has given the warnings
        merge_recipe(recipe, folder, watch=watch, earlier=earlier, **self._request.limits)
        if earlier is None:
            self._keep_sums((folder / REPORT).read_bytes())
        return folder

    def _merge_in_memory(self, recipe: Recipe) -> Mapping[str, Any]:
        limits = self._request.limits
        prepared = plan_recipe(recipe, self._folder / MODELS / "candidate", read_samples=True, **limits)
        earlier = self._sums()
        known = None if earlier is None else EarlierFindings(earlier, prepared)
        tensors, findings = merge_in_memory(prepared, known=known, on_progress=self._on_progress)
        if known is None:
            lines = report_lines(prepared.plan, findings, 0, prepared.samples)
            self._keep_sums("".join(lines).encode())
        return tensors

    def _sums(self) -> Path | None:
        """The report of the first merge, if it is as it was written: its name has its digest."""
        for path in self._folder.glob(f"{self._sums_stem}*.json"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
            if path.name == f"{self._sums_stem}{digest}.json":
                return path
            path.unlink()
        return None

    def _keep_sums(self, report: bytes) -> None:
        digest = hashlib.sha256(report).hexdigest()[:32]
        self._write_file(f"{self._sums_stem}{digest}.json", report)

    def _on_progress(self, nbytes: int, tensor: str) -> None:
        self._lock.owner.beat()
        self._bar.advance(nbytes, tensor)

    def _beat(self) -> None:
        self._lock.owner.beat()
        self._bar.beat()

    def _remove_models(self) -> None:
        shutil.rmtree(self._folder / MODELS, ignore_errors=True)

    # ----------------------------------------------------------------------------------- the results

    def _write(self, tried: Sequence[Tried]) -> SearchReport:
        """Table, front and chosen recipe, as far as the search has come."""
        tests = self._tests()
        scores = {one["candidate"]: one["scores"] for one in tests if one["command"] == self._test_words()}
        report = build_report(self._folder, self._request.objectives, tried, self._request.choose, scores)
        self._write_file(TABLE, report.as_csv().encode())
        self._write_file(RESULT, (json.dumps(report.as_json(), indent=1) + "\n").encode())
        if report.chosen is None:
            return report
        front = self._folder / FRONT
        front.mkdir(exist_ok=True)
        texts = {f"candidate-{k}.yaml": self._plan.text_of(report.point(k).values) for k in report.front}
        for path in front.iterdir():
            if path.name.startswith("candidate-") and path.name not in texts:
                path.unlink()
        for name, text in texts.items():
            if not (front / name).exists() or (front / name).read_text(encoding="utf-8") != text:
                self._write_file(f"{FRONT}/{name}", text.encode())
        self._write_file(CHOSEN, texts[f"candidate-{report.chosen}.yaml"].encode())
        return report

    def _write_file(self, name: str, content: bytes) -> None:
        write_whole(self._folder / name, [content], self._folder / _HIDDEN / f"{Path(name).name}.part")

    # -------------------------------------------------------------------------------------- test data

    def _test_words(self) -> list[str]:
        return [] if self._request.test is None else list(self._request.test)

    def _tests(self) -> list[dict[str, Any]]:
        path = self._folder / _TESTS
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
        except ValueError as e:
            raise OutputError(f"{shown(path)}: is damaged. Remove it; the chosen model is then tested again.") from e

    def _test(self, report: SearchReport) -> None:
        """Score the chosen candidate on test data, unless that was done."""
        if report.test_scores is not None or report.chosen is None:
            return
        words, tests = self._test_words(), self._tests()
        if earlier := [one["candidate"] for one in tests if one["command"] == words]:
            self._watch.warn(
                [
                    f"The test data have scored {len(earlier)} other candidate(s) before, and another one is chosen "
                    "now: its score on them is no longer that of data never seen."
                ]
            )
        self._bar.begin(f"candidate {report.chosen}, on test data")
        model = self._merge(self._plan.recipe_of(report.point(report.chosen).values, f"candidate {report.chosen}"))
        judgement = judge_by_command(
            judge_words(words), model, self._folder, Names([]), beat=self._beat, on_step=lambda step, scores: False
        )
        entry = {"candidate": report.chosen, "command": words, "scores": dict(judgement.scores)}
        self._write_file(_TESTS, (json.dumps([*tests, entry], indent=1) + "\n").encode())
