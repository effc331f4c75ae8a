"""Coefficients by evaluation: Optuna chooses the next recipe; merge it, judge the model, delete the model, repeat.

The sums of the first merge are kept, so every further candidate takes one pass over the inputs. One model is on disk at
a time. A candidate that the judge cannot score is recorded, and the search continues.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tool.api import merge_recipe, plan_recipe
from merge_tool.errors import DataError, EvaluationError, OutputError, output_failed, shown
from merge_tool.models.lora import parts
from merge_tool.models.side_files import REPORT
from merge_tool.output.known import EarlierFindings
from merge_tool.output.marks import check_apart_by_mark
from merge_tool.output.merge_report import Watch
from merge_tool.output.report import report_lines
from merge_tool.progress import Progress
from merge_tool.recipe.recipe import Recipe
from merge_tool.sweeps.in_memory import merge_in_memory
from merge_tool.sweeps.judging import Hopeless, Judgement, Names, judge_by_command, judge_by_function
from merge_tool.sweeps.scores import judge as judge_words
from merge_tool.sweeps.search_folder import SearchFolder
from merge_tool.sweeps.search_plan import Models, SearchPlan
from merge_tool.sweeps.search_request import MODELS, UNIFORM, Judge, SearchRequest
from merge_tool.sweeps.search_results import SearchReport, build_report
from merge_tool.sweeps.study import Study, Tried, objectives_of
from merge_tool.sweeps.warm_start import sweep_scores

_MOST_FAILURES = 5  # after so many in a row the fault is the judge's, not the candidates'


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

    `models` are a base and finetunes, or a recipe (a file or a mapping); a recipe needs a `space` (docs/search.md). The
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
    try:
        with SearchFolder(request.out, overwrite=overwrite) as folder, Progress(progress) as bar:
            running = _Search(request, plan, folder, bar, watch, on_tried)
            try:
                return running.run()
            finally:
                running.close()
    except OSError as e:
        raise output_failed(request.out, e) from e


class _Search:
    """A search that runs."""

    def __init__(
        self,
        request: SearchRequest,
        plan: SearchPlan,
        folder: SearchFolder,
        bar: Progress,
        watch: Watch,
        on_tried: Callable[[Tried], None] | None,
    ) -> None:
        self._request, self._plan, self._folder, self._bar = request, plan, folder, bar
        self._watch, self._on_tried, self._facts = watch, on_tried, request.facts(plan)
        self._names = Names([one.name for one in request.objectives])
        values = {t: plan.space.uniform(t) for t in request.uniform}
        self._points = {t: point for t, point in values.items() if point is not None}
        self._study = Study(
            request.out,
            plan.space.knobs,
            request.objectives,
            self._facts,
            owner=folder.owner(),
            storage=request.storage,
            sampler=request.sampler,
            pruner=request.pruner,
            seed=request.seed,
            trials=request.trials,
            num_points=len(self._points) + len(plan.space.points),
        )

    def close(self) -> None:
        self._study.close()

    def run(self) -> SearchReport:
        """Try candidates until there are enough, then score the chosen one on test data."""
        self._begin()
        tried, failures = self._study.tried(), 0
        while len(tried) < self._request.trials:
            number, values = self._study.ask()
            self._bar.begin(f"candidate {number} ({len(tried) + 1} of {self._request.trials})")
            self._try(number, values, has_scores=any(one.scores is not None for one in tried))
            tried = self._study.tried()
            self._write(tried, compare=False)
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
        if self._request.test is not None and report.test_scores is None:
            self._test(report)
            report = self._write(tried)
        self._remove_models()
        return report

    # ------------------------------------------------------------------------------------ the study

    def _check_facts(self) -> None:
        now, before = json.loads(json.dumps(self._facts)), self._study.facts
        if different := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
            key = different[0]
            raise OutputError(
                f"{shown(self._request.out)}: holds another search: {', '.join(different)} differ ({key}: "
                f"{shown(before.get(key, 'nothing'), 80)} there, {shown(now.get(key, 'nothing'), 80)} now). Choose "
                "another folder, or --overwrite to start anew."
            )

    def _begin(self) -> None:
        """Queue unfinished candidates again; then the sweep's points, uniform values, and the points of the space."""
        self._check_facts()
        self._study.recover()
        request, tried = self._request, self._study.tried()
        for one in tried:
            if one.scores is not None:
                self._names.learn(one.scores, None if one.kind == "sweep" else one.items)
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
        scored, why = sweep_scores(request.out, models, request.options, command)
        self._watch.warn([why] if why else [])
        for t, scores in scored:
            values = self._plan.space.uniform(t)
            if values is None or t in have or any(one.name not in scores for one in request.objectives):
                continue
            self._study.add(values, scores, "sweep", t)
            self._names.learn(scores, None)

    # -------------------------------------------------------------------------------- one candidate

    def _try(self, number: int, values: Mapping[str, Any], *, has_scores: bool) -> None:
        """Merge and judge a candidate, and record the scores, or the judge's failure, in the study. If no candidate has
        scores yet, the judge itself is wrong: this candidate is then tried again in the next run."""
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
            self._request.out,
            self._names,
            beat=self._beat,
            on_step=self._study.is_hopeless,
        )
        shutil.rmtree(model, ignore_errors=True)
        return judgement

    def _merge(self, recipe: Recipe) -> Path:
        """The merged model, below OUT. A model that a stopped run began is continued, any other model is removed."""
        digest = hashlib.sha256(recipe.text.encode()).hexdigest()[:8]
        models = self._request.out / MODELS
        folder = models / f"candidate-{digest}"
        if models.exists():
            check_apart_by_mark(models, [Path(part) for ref in recipe.models for part in parts(str(ref))])
            for other in models.iterdir():
                if other != folder:
                    shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        earlier = self._folder.sums(self._facts)
        watch = Watch(on_start=self._bar.start, on_progress=self._on_progress)  # the first plan has given the warnings
        merge_recipe(recipe, folder, watch=watch, earlier=earlier, **self._request.limits)
        if earlier is None:
            self._folder.keep_sums(self._facts, (folder / REPORT).read_bytes())
        return folder

    def _merge_in_memory(self, recipe: Recipe) -> Mapping[str, Any]:
        limits = self._request.limits
        prepared = plan_recipe(recipe, self._request.out / MODELS / "candidate", read_samples=True, **limits)
        earlier = self._folder.sums(self._facts)
        known = None if earlier is None else EarlierFindings(earlier, prepared)
        tensors, findings = merge_in_memory(prepared, known=known, on_progress=self._on_progress)
        if known is None:
            lines = report_lines(prepared.plan, findings, 0, prepared.samples)
            self._folder.keep_sums(self._facts, "".join(lines).encode())
        return tensors

    def _on_progress(self, nbytes: int, tensor: str) -> None:
        self._folder.beat()
        self._bar.advance(nbytes, tensor)

    def _beat(self) -> None:
        self._folder.beat()
        self._bar.beat()

    def _remove_models(self) -> None:
        shutil.rmtree(self._request.out / MODELS, ignore_errors=True)

    # ----------------------------------------------------------------------------------- the results

    def _write(self, tried: Sequence[Tried], *, compare: bool = True) -> SearchReport:
        """Write table, front and chosen recipe of the search so far."""
        request = self._request
        tests = self._folder.tests(request.test or ())
        report = build_report(request.out, request.objectives, tried, request.choose, tests, compare=compare)
        self._folder.write_report(report, {k: self._plan.text_of(report.point(k).values) for k in report.front})
        return report

    def _test(self, report: SearchReport) -> None:
        """Score the chosen candidate on test data, unless it has such scores."""
        words = self._request.test
        if words is None or report.test_scores is not None or report.chosen is None:
            return
        if earlier := self._folder.tests(words):
            self._watch.warn(
                [
                    f"The test data have already scored {len(earlier)} other candidate(s), and now another one is "
                    "chosen: these data are no longer unseen."
                ]
            )
        self._bar.begin(f"candidate {report.chosen}, on test data")
        model = self._merge(self._plan.recipe_of(report.point(report.chosen).values, f"candidate {report.chosen}"))
        judgement = judge_by_command(
            judge_words(words),
            model,
            self._request.out,
            Names([]),
            beat=self._beat,
            on_step=lambda step, scores: False,
        )
        self._folder.add_test(report.chosen, words, judgement.scores)
