"""Many settings of one merge, one evaluation command: merge, run the command on the models, keep its scores, delete the
models.

The scores go into `sweep.jsonl` line by line, so a sweep that was stopped can continue. At most `batch` models are on
disk at a time. This module knows of a score only whether more or less is better.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_tool.api import check_plan, merge_recipe, plan_recipe
from merge_tool.errors import OutputError, RecipeError, output_failed, shown
from merge_tool.methods.registry import METHODS
from merge_tool.models.lora import parts
from merge_tool.output.marks import check_apart_by_mark
from merge_tool.output.merge_report import Watch
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.target import Target, check_target
from merge_tool.progress import Progress
from merge_tool.recipe.model_ref import ModelRef
from merge_tool.recipe.pair import check_ts, pair
from merge_tool.recipe.ranges import BadRange, parse_range
from merge_tool.recipe.recipe import Recipe, label_of, label_t
from merge_tool.sweeps.journal import Journal, read_scored, write_beside
from merge_tool.sweeps.results import SweepPoint, SweepReport, build_report, check_minimize, values_text
from merge_tool.sweeps.scores import evaluate, judge

TABLE = "sweep.csv"
MODELS = "models"  # the merges that are scored now, below the sweep's folder
Vary = Mapping[str, Sequence[Any]]


def sweep(
    base: str | Path,
    ft: str | Path,
    out: str | Path,
    ts: Iterable[float],
    command: Sequence[str],
    *,
    batch: int = 1,
    keep: bool = False,
    minimize: Sequence[str] = (),
    overwrite: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: str = "auto",
    on_scores: Callable[[SweepPoint], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    **options: Any,
) -> SweepReport:
    """Merge `base` and `ft` at every t, and score each merge by `command`.

    The command gets the folders of up to `batch` merges as its last arguments (or in the place of an argument `{}`)
    and prints `name value` lines, in the folders' order, or JSON: an object of numbers, or a list of them. No shell is
    involved. `["lm-eval:gsm8k,arc_easy", "--limit", "100"]` is lm-evaluation-harness with its own options. Merges are
    deleted once they are scored, unless `keep`. `minimize` names scores for which less is better, besides scores with
    loss, perplexity, ppl, nll, error or wer in their name. `options` and `progress` are as for `merge`. The same call
    continues a sweep that was stopped, and may add values of t.

    Raises EvaluationError when the command fails or its scores cannot be read; the errors of `merge`.
    """
    return sweep_outputs(
        pair_at(base, ft, ts, **options),
        out,
        ["t"],
        command,
        batch=batch,
        keep=keep,
        minimize=minimize,
        overwrite=overwrite,
        memory_bytes=memory_bytes,
        jobs=jobs,
        progress=progress,
        on_scores=on_scores,
        on_warning=on_warning,
    )


def sweep_recipe(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    vary: Vary | Sequence[str],
    command: Sequence[str],
    *,
    batch: int = 1,
    keep: bool = False,
    minimize: Sequence[str] = (),
    overwrite: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: str = "auto",
    on_scores: Callable[[SweepPoint], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    **options: Any,
) -> SweepReport:
    """Make the merge of `recipe` with every combination of the parameters' values in `vary`, and score each by
    `command`: as `sweep`, for any parameter of any method.

    `vary` is a mapping, or texts: {"density": [0.2, 0.5]}, "density=0.2,0.5", "parameters.t=0:1:0.1". A parameter has
    the same value in the whole merge; `models.1.parameters.weight` is the weight of the second entry of the recipe's
    models only. `options` are the options of `merge_models`. Raises the errors of `sweep` and `merge_models`.
    """
    return sweep_outputs(
        recipe_at(recipe, vary, **options),
        out,
        list(parse_vary(vary)),
        command,
        batch=batch,
        keep=keep,
        minimize=minimize,
        overwrite=overwrite,
        memory_bytes=memory_bytes,
        jobs=jobs,
        progress=progress,
        on_scores=on_scores,
        on_warning=on_warning,
    )


# ------------------------------------------------------------------------------------------- the recipe


def pair_at(base: str | Path, ft: str | Path, ts: Iterable[float], **options: Any) -> Recipe:
    """The recipe of a pair with an output for each t. Raises RecipeError."""
    return pair(base, ft, check_ts(ts, bool(options.get("extrapolate"))), **options)


def recipe_at(recipe: str | Path | Mapping[str, Any], vary: Vary | Sequence[str], **options: Any) -> Recipe:
    """The recipe with an output for each combination of values in `vary`. Raises RecipeError."""
    from merge_tool.recipe.mergekit import read_recipe

    values = parse_vary(vary)
    try:
        return read_recipe(recipe, METHODS, **{**options, "values": values})
    except RecipeError as e:
        raise RecipeError(str(e).replace("--set: ", "--vary: ")) from e


def parse_vary(vary: Vary | Sequence[str]) -> dict[str, list[Any]]:
    """The values of each parameter, from a mapping or from texts NAME=VALUES, where VALUES are numbers or words with
    commas between them, or a range START:STOP:STEP. Raises RecipeError."""
    if isinstance(vary, str):
        vary = [vary]
    pairs = list(vary.items()) if isinstance(vary, Mapping) else list(map(_varied, vary))
    varied: dict[str, list[Any]] = {}
    for name, values in pairs:
        name = name.removeprefix("parameters.")
        if name in varied:
            raise RecipeError(f"--vary: '{shown(name)}' is given twice; write {shown(name)}=VALUE,VALUE.")
        varied[name] = list(values)
    if not varied or not all(varied.values()):
        raise RecipeError("--vary names no parameter with values. Write --vary 'density=0.2,0.5' or 't=0:1:0.1'.")
    return varied


def _varied(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    try:
        parsed = [one for part in values.split(",") for one in _values(part.strip())]
    except BadRange as e:
        raise RecipeError(f"--vary {shown(text)}: {e}. Write START:STOP:STEP, as in t=0:1:0.1.") from e
    if not name.strip() or not all(part.strip() for part in values.split(",")):
        raise RecipeError(f"--vary: '{shown(text)}' is not NAME=VALUES, as in density=0.2,0.5 or t=0:1:0.1.")
    return name.strip(), parsed


def _values(part: str) -> list[Any]:
    try:
        return [label_t(number) for number in parse_range(part)]
    except (ValueError, ArithmeticError):
        return [part]  # a word, which the method may know


# ----------------------------------------------------------------------------------------- the sweep


def sweep_outputs(
    recipe: Recipe,
    out: str | Path,
    keys: Sequence[str],
    command: Sequence[str],
    *,
    batch: int,
    keep: bool,
    minimize: Sequence[str],
    overwrite: bool,
    memory_bytes: int | None,
    jobs: int | None,
    progress: str,
    on_scores: Callable[[SweepPoint], None] | None,
    on_warning: Callable[[str], None] | None,
) -> SweepReport:
    """Merge and score every output of `recipe`. The outputs differ in the parameters `keys`."""
    words, folder, watch = judge(command), Path(out), Watch(on_warning)
    limits: dict[str, Any] = {"memory_bytes": memory_bytes, "jobs": jobs}
    plan = _Plan.of(recipe, keys, batch)
    prepared = plan.prepare(folder, read_samples=True, **limits)
    check_target(Target(folder / MODELS), prepared.inputs)  # its content is removed
    watch.warn(prepared.warnings)
    facts, names = sweep_facts(prepared, keys, command), prepared.plan.names
    plan = replace(plan, recipe=_pinned(recipe, prepared))
    del prepared
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder, facts, overwrite=overwrite)
    except OSError as e:
        raise output_failed(folder, e) from e
    try:
        with Progress(progress) as shown_progress:
            done = journal.scores
            _put_away(folder, [model for model in journal.begun if model in done], keep=keep)
            for chosen in plan.batches(done):
                shown_progress.begin(plan.title(chosen))
                folders = _merge(plan, chosen, folder, journal, limits, shown_progress)
                shown_progress.begin(f"{plan.title(chosen)}, scoring")
                results = evaluate(words, folders, folder, names=journal.names, beat=_beats(journal, shown_progress))
                check_minimize(tuple(results[0]), minimize)
                for model, scores in zip(chosen, results, strict=True):
                    journal.add(model, plan.values(model), scores)
                    if on_scores is not None:
                        shown_progress.close()
                        on_scores(SweepPoint(plan.values(model), scores))
                _put_away(folder, chosen, keep=keep)
        report = build_report(folder, [(journal.values[m], s) for m, s in done.items()], minimize, names)
        write_beside(folder / TABLE, report.as_csv())
        return report
    except OSError as e:
        raise output_failed(folder, e) from e
    finally:
        journal.close()


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep: the plan of its first merge, all points, and the number of points with scores already."""

    first: Prepared
    points: tuple[Mapping[str, Any], ...]
    num_done: int
    batch: int


def plan_sweep(
    recipe: Recipe,
    out: str | Path,
    keys: Sequence[str],
    command: Sequence[str],
    *,
    batch: int,
    overwrite: bool,
    memory_bytes: int | None,
    jobs: int | None,
) -> SweepPlan:
    """Plan a sweep from headers; nothing is fetched or written. Raises the errors that the sweep would raise first."""
    judge(command)
    folder, plan = Path(out), _Plan.of(recipe, keys, batch)
    prepared = plan.prepare(folder, memory_bytes=memory_bytes, jobs=jobs)
    check_target(Target(folder / MODELS), prepared.inputs)
    check_plan(prepared)
    scored = set() if overwrite else read_scored(folder)
    points = tuple(map(plan.values, plan.models))
    return SweepPlan(prepared, points, len(scored & set(plan.models)), batch)


@dataclass(frozen=True)
class _Plan:
    """The models of a sweep, by their names, as outputs of one recipe."""

    recipe: Recipe
    keys: tuple[str, ...]
    models: tuple[str, ...]
    batch: int

    @classmethod
    def of(cls, recipe: Recipe, keys: Sequence[str], batch: int) -> _Plan:
        if batch < 1:
            raise RecipeError(f"The batch is {batch} models, expected at least 1.")
        names = [label_of({key: output.words[key] for key in keys}) for output in recipe.outputs]
        return cls(recipe, tuple(keys), tuple(names), batch)

    def values(self, model: str) -> Mapping[str, Any]:
        words = self.recipe.outputs[self.models.index(model)].words
        return {key: words[key] for key in self.keys}

    def title(self, models: Sequence[str]) -> str:
        """`t = 0.3 (4 of 11)`."""
        numbers = [str(self.models.index(model) + 1) for model in models]
        which = numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        return f"{'; '.join(values_text(self.values(model)) for model in models)} ({which} of {len(self.models)})"

    def batches(self, done: Mapping[str, Any]) -> list[list[str]]:
        rest = [model for model in self.models if model not in done]
        return [rest[start : start + self.batch] for start in range(0, len(rest), self.batch)]

    def of_models(self, models: Sequence[str]) -> Recipe:
        """The recipe of these models alone."""
        outputs = [self.recipe.outputs[self.models.index(model)] for model in models]
        labels = models if len(models) > 1 else [""]
        return replace(
            self.recipe, outputs=tuple(replace(o, label=label) for o, label in zip(outputs, labels, strict=True))
        )

    def prepare(self, folder: Path, **settings: Any) -> Prepared:
        return plan_recipe(self.of_models(self.models[:1]), folder / self.models[0], **settings)


def _pinned(recipe: Recipe, prepared: Prepared) -> Recipe:
    """The recipe with local paths for the Hub's models, because their newest revision may change during the sweep."""
    refs = [
        ref if all(map(os.path.lexists, parts(str(ref)))) else ModelRef(str(path))
        for ref, path in zip(recipe.models, prepared.refs, strict=True)
    ]
    return replace(recipe, models=tuple(refs))


def sweep_facts(prepared: Prepared, keys: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """The facts that must be equal to continue a sweep: the inputs, the merge's options, the command."""
    merged = {key: value for key, value in prepared.plan.facts.items() if key not in (*keys, "version")}
    return {**merged, "samples": list(prepared.samples), "vary": sorted(keys), "command": list(command)}


def _beats(journal: Journal, progress: Progress) -> Callable[[], None]:
    def beat() -> None:
        journal.beat()
        progress.beat()

    return beat


def _merge(
    plan: _Plan, chosen: Sequence[str], folder: Path, journal: Journal, limits: Mapping[str, Any], progress: Progress
) -> list[Path]:
    """The folders of the merges, made in one pass over the inputs; a merge that an earlier run began is continued."""
    models = folder / MODELS
    recipe = plan.of_models(chosen)
    if not journal.begin(chosen) and models.exists():
        check_apart_by_mark(models, [Path(part) for ref in recipe.models for part in parts(str(ref))])
        shutil.rmtree(models)
    folders = [models / model for model in chosen]

    def on_progress(nbytes: int, tensor: str) -> None:
        journal.beat()
        progress.advance(nbytes, tensor)

    watch = Watch(on_start=progress.start, on_progress=on_progress)  # the first plan has given the warnings
    merge_recipe(recipe, folders[0] if len(chosen) == 1 else models, watch=watch, **limits)
    return folders


def _put_away(folder: Path, models: Iterable[str], *, keep: bool) -> None:
    """Move scored models under their names into the sweep's folder if `keep`, else delete them."""
    for model in (folder / MODELS / name for name in models):
        if model.is_dir() and keep:
            if (folder / model.name).exists():
                raise OutputError(f"{shown(folder / model.name)}: exists, so no model can be kept there. Move it away.")
            model.rename(folder / model.name)
        elif model.is_dir():
            shutil.rmtree(model)
    if (folder / MODELS).is_dir() and not any((folder / MODELS).iterdir()):
        (folder / MODELS).rmdir()
