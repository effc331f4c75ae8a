"""A recipe of any number of models + headers -> MergePlan: the same plan, with another method or other sources."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_tool._version import __version__
from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from merge_tool.checkpoint.source import TensorSource
from merge_tool.errors import MismatchError, RecipeError, listed, shown
from merge_tool.matching import UNLIKE_IN_SOME, natural_key
from merge_tool.methods.passes import check_given
from merge_tool.methods.steps import Given, StepsMethod, seed_key
from merge_tool.plan import MergePlan, TensorJob, input_facts, lay_out, output_dtype, output_stem
from merge_tool.recipe import Recipe
from merge_tool.recipes.expand import Ask, unused_filters
from merge_tool.recipes.models_recipe import ModelsRecipe
from merge_tool.rows import rows_note
from merge_tool.schedule import split_layer

_MOST = 5  # mismatches that are named
_NO_T = (0.0,)


def plan_models(
    recipe: Recipe,
    asked: ModelsRecipe,
    asks: Sequence[Ask],
    models: Sequence[Checkpoint],
    method: StepsMethod | None,
    *,
    seed: int = 0,
    single_file: str | None = None,
) -> MergePlan:
    """Plan the merge of `models`, one output tensor for each of `asks`. `method` is None for SLERP of pairs.

    Raises MismatchError with all tensors whose shapes or types do not fit, unless the base's are to be kept then.
    """
    asks, told = _fitting(recipe, asked, asks, models)
    by_name = {ask.name: ask for ask in sorted(sorted(asks, key=lambda a: a.name), key=lambda a: natural_key(a.name))}
    infos = [_output_info(recipe, ask, models) for ask in by_name.values()]
    donor = models[asked.donor]
    stem, text = output_stem(donor), _published(asked, models)
    given = _Givens(asked, method, seed)

    def job(number: int, out: TensorInfo) -> TensorJob:
        return _job(number, out, by_name[out.name], models, given)

    shards = lay_out(infos, donor, stem, None if single_file else recipe.max_shard_bytes, single_file, job)
    names = tuple(model.name for model in models)
    facts: dict[str, Any] = {
        "version": __version__,
        "method": asked.method,
        "t": [],
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": seed,
        "dtype": recipe.dtype,
        "max_shard_bytes": None if single_file else recipe.max_shard_bytes,
        "on_mismatch": recipe.on_mismatch,
        "one_file": single_file is not None,
        "stem": stem,
        **recipe.selection,
        **{f"model-{k + 1}": input_facts(model) for k, model in enumerate(models)},
    }
    sides = tuple(f"model-{k + 1}" for k in range(len(models)))
    return MergePlan(
        recipe,
        names,
        shards,
        stem,
        facts,
        (*asked.warnings, *unused_filters(asked, asks), *told),
        sides,
        method,
        method_name=asked.method,
        text=text,
        donor=asked.donor,
        layers=_layers(asks, donor),
        seed=seed,
    )


def _layers(asks: Sequence[Ask], donor: Checkpoint) -> tuple[int, ...]:
    """Which layer of its first source each of the output's layers was, in the stack that has most tensors; nothing
    if they are the donor's in their order."""
    stacks: dict[str, dict[int, int]] = {}
    counts: Counter[str] = Counter()
    for ask in asks:
        ours, theirs = split_layer(ask.name), split_layer((ask.base or ask.inputs[0])[1])
        if ours is not None and theirs is not None:
            counts[ours[0]] += 1
            stacks.setdefault(ours[0], {})[ours[1]] = theirs[1]
    if not counts:
        return ()
    stack = counts.most_common(1)[0][0]
    origin = tuple(stacks[stack][k] for k in sorted(stacks[stack]))
    num_layers = len({found for name in donor.tensors if (found := split_layer(name)) and found[0] == stack})
    return () if origin == tuple(range(num_layers)) else origin


def _published(asked: ModelsRecipe, models: Sequence[Checkpoint]) -> str:
    """The recipe as the output tells it: a model on this disk by its name, not by the user's path."""
    text: str = asked.text
    names = {ref.path: model.name for ref, model in zip(asked.models, models, strict=True) if Path(ref.path).exists()}
    for path in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])", names[path].replace("\\", "/"), text)
    return text


def _output_info(recipe: Recipe, ask: Ask, models: Sequence[Checkpoint]) -> TensorInfo:
    """The output tensor: shape and dtype of the base's, or the first input's, but for a dtype that is asked for."""
    number, name = ask.base or ask.inputs[0]
    info: TensorInfo = models[number].tensors[name]
    stored = models[number].stored_dtype(name)
    return replace(info, name=ask.name, dtype=stored if ask.kept else output_dtype(recipe, stored))


class _Givens:
    """What the method is told about each tensor; equal parameters are kept once."""

    def __init__(self, asked: ModelsRecipe, method: StepsMethod | None, seed: int) -> None:
        self.asked, self.method, self.seed = asked, method, seed
        self._kept: dict[str, Any] = {}  # keeps what _checked knows by its id
        self._checked: set[tuple[int, int, bool]] = set()

    def __call__(self, ask: Ask, shape: tuple[int, ...]) -> Given:
        shared, each = (self._kept.setdefault(repr(sorted(m.items())), m) for m in (ask.shared, ask.each))
        found = Given(shape, len(ask.inputs), ask.base is not None, shared, each, seed_key(self.seed, ask.name))
        self._check(ask.name, found)
        return found

    def _check(self, name: str, given: Given) -> None:
        """Raise RecipeError for parameters that the method cannot work with, before anything is read."""
        key = id(given.shared), id(given.each), given.has_base
        if self.method is None or key in self._checked:
            return
        self._checked.add(key)
        try:
            check_given(self.method, given)
        except ValueError as e:
            raise RecipeError(f"{self._place(str(e))}: {e} (The first such tensor: {shown(name)}.)") from e

    def _place(self, problem: str) -> str:
        """Where the recipe sets the parameters that a method's message speaks of."""
        words = set(re.findall(r"\w+", problem))
        settings = (setting for scope in self.asked.scopes for key, setting in scope.items() if key in words)
        lines = sorted({choice.line for setting in settings for choice in setting.choices})
        return shown(self.asked.where) + (f", line {listed(lines)}" if lines else "")


def _job(number: int, out: TensorInfo, ask: Ask, models: Sequence[Checkpoint], given: _Givens) -> TensorJob:
    places = [*([ask.base] if ask.base is not None else []), *ask.inputs]
    sources: tuple[TensorSource, ...] = tuple(models[k].source(name) for k, name in places)
    sides = tuple(k for k, _ in places)
    exact = sources[0].info.dtype not in FLOAT_DTYPES
    if ask.kept:
        return TensorJob(number, out, sources, sides, False, _NO_T, ask.kept)
    if out.numel == 0:
        return TensorJob(number, out, sources[:1], sides[:1], False, _NO_T, "empty: copied")
    if len(sources) == 1 and (exact or given.method is None or _is_plain_copy(ask)):
        return TensorJob(number, out, sources, sides, False, _NO_T, "only one model has it: copied")
    if given.method is None:
        return TensorJob(number, out, sources, sides, exact, (float(ask.shared["t"]),), rows_note(sources[0]))
    return TensorJob(number, out, sources, sides, exact, _NO_T, given=given(ask, out.shape))


def _is_plain_copy(ask: Ask) -> bool:
    """Whether a passthrough takes its one tensor as it is."""
    return set(ask.each) <= {"scale"} and all(scale in (None, 1, 1.0) for scale in ask.each.get("scale", ()))


def _fitting(
    recipe: Recipe, asked: ModelsRecipe, asks: Sequence[Ask], models: Sequence[Checkpoint]
) -> tuple[Sequence[Ask], list[str]]:
    """The asks with tensors that do not fit each other taken from the base, if that is asked; and what to tell."""
    misfits = {ask.name: problem for ask in asks for problem in _misfits(ask, models)}
    if not misfits:
        return asks, []
    if recipe.on_mismatch == "error":
        more = [f"and {len(misfits) - _MOST:,} more"] if len(misfits) > _MOST else []
        raise MismatchError(
            f"{len(misfits):,} tensors of the recipe's models do not fit together:\n  "
            + "\n  ".join([*list(misfits.values())[:_MOST], *more])
            + "\nAll models must be the same architecture, with one vocabulary. Vocabularies that differ are brought "
            "together by `tokenizer_source: union` (or base, or a model) in the recipe; --on-mismatch base keeps such "
            "tensors of the base as they are."
        )
    told = f"{len(misfits):,} tensors have other shapes or types in some models; the base's are kept: "
    found = [_kept(asked, ask) if ask.name in misfits else ask for ask in asks]
    return found, [f"{told}{listed(misfits, 50)}."]


def _kept(asked: ModelsRecipe, ask: Ask) -> Ask:
    """The tensor of the base, or of the donor, or of the first model, as it is."""
    of_donor = (place for place in ask.inputs if place[0] == asked.donor)
    return replace(
        ask, base=None, inputs=(ask.base or next(of_donor, ask.inputs[0]),), shared={}, each={}, kept=UNLIKE_IN_SOME
    )


def _misfits(ask: Ask, models: Sequence[Checkpoint]) -> Iterator[str]:
    places = [*([ask.base] if ask.base is not None else []), *ask.inputs]
    first, *others = (models[k].tensors[name] for k, name in places)
    for (k, _), info in zip(places[1:], others, strict=True):
        if info.shape != first.shape:
            yield (
                f"{shown(ask.name)}: {list(first.shape)} in {models[places[0][0]].name}, {list(info.shape)} in "
                f"{models[k].name}"
            )
            return
        if info.dtype != first.dtype and not {info.dtype, first.dtype} <= FLOAT_DTYPES:
            yield f"{shown(ask.name)}: {first.dtype} in {models[places[0][0]].name}, {info.dtype} in {models[k].name}"
            return
