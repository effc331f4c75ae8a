"""Check that layers stacked from several models fit each other, and fit the config.json that the output gets.

Needs names and shapes only, so it runs before a weight is read or fetched. Layers of one model may have several shapes
(dense layers and layers with experts, widths that a list gives). A combination that no single model has is a mismatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from merge_tool.checkpoint.header import TensorInfo
from merge_tool.checkpoint.reader import Checkpoint
from merge_tool.errors import MismatchError, counted, shown
from merge_tool.models.naming import comes_last, has_token_rows
from merge_tool.plan.expand import Expansion
from merge_tool.plan.stacks import split_layer
from merge_tool.recipe.recipe import Recipe

Shape = tuple[int, ...]
_ROWS = "{}: rows are matched by token; embedding and head then have those tokens"
_SHAPES = "Stack layers of models whose tensors have one shape; the numbers of heads and the widths must be the same"
_FILES = "--files-from MODEL copies the config.json of another model, which must fit all tensors"
_LAYER_TABLES = ("embed_tokens_per_layer", "per_layer_model_projection")
_MOST = 5


def check_stack(recipe: Recipe, expansion: Expansion, models: Sequence[Checkpoint], names: Iterable[str]) -> None:
    """Raise MismatchError with all mismatches at once: layers, embedding and head that no model has together."""
    if not expansion.sliced_stacks:
        return
    stacked = expansion.stacked_layers()
    inside: dict[tuple[str, str], dict[int, tuple[int, TensorInfo]]] = {}
    outside: dict[str, tuple[int, TensorInfo]] = {}
    for name in names:
        number, info = _origin(expansion, models, name)
        layer = split_layer(name)
        if layer is None or layer[0] not in expansion.sliced_stacks:
            outside[name] = number, info
        else:
            rest = name[len(layer[0]) + len(str(layer[1])) :]
            inside.setdefault((layer[0], rest), {})[layer[1]] = number, info
    problems, ways = list[str](), dict[str, None]()
    for text in _rows(recipe, models, expansion, outside):
        problems.append(text)
        ways[_ROWS.format(recipe.rows_option)] = None
    for (stack, rest), tensors in inside.items():
        own = {k: _shapes(expansion, models[k], k, stack, rest) for k in {*recipe.sources, recipe.donor}}
        if text := _mixture(models, own, tensors):
            problems.append(f"{shown(stack)}*{shown(rest)}: {text}")
            ways[_SHAPES] = None
        elif text := _unlike_donor(models, own[recipe.donor], recipe.donor, tensors, stacked.get(stack, ())):
            problems.append(f"{shown(stack)}*{shown(rest)}: {text}")
            ways[_FILES] = None
    for name, text in _unlike_outside(models, recipe.donor, outside):
        problems.append(f"{shown(name)}: {text}")
        ways[_FILES] = None
    tables = [name for name in outside if stacked and any(word in name for word in _LAYER_TABLES)]
    if tables:
        problems.append(f"{shown(tables[0])} has a part for each layer, in the order of the model's own layers")
        ways["Use `models` instead of `slices`, or layers in the order that they have in the model"] = None
    if problems:
        more = [f"and {len(problems) - _MOST:,} more"] if len(problems) > _MOST else []
        raise MismatchError(
            "The stacked layers do not fit together: no configuration describes them, so nothing could load the "
            "output.\n  " + "\n  ".join(problems[:_MOST] + more) + "\nWays out:\n  " + ".\n  ".join(ways) + "."
        )


def _origin(expansion: Expansion, models: Sequence[Checkpoint], name: str) -> tuple[int, TensorInfo]:
    """The model and tensor whose shape an output tensor has."""
    tensor = expansion.tensor(name)
    base = expansion.base_of(tensor)
    sources = [source for source in expansion.sources(tensor) if source[1] in models[source[0]].tensors]
    number, own = sources[0] if sources else base or (0, name)
    return number, models[number].tensors[own]


def _rows(
    recipe: Recipe, models: Sequence[Checkpoint], expansion: Expansion, outside: dict[str, tuple[int, TensorInfo]]
) -> Iterator[str]:
    """Embedding, head and its bias with different numbers of rows, unless one model has just these."""
    tokens = {name: one for name, one in outside.items() if has_token_rows(name) and one[1].shape}
    rows = {name: info.shape[0] for name, (_, info) in tokens.items()}
    if len({*rows.values()}) < 2:
        return
    for k in recipe.sources:
        own = {name: models[k].tensors.get(expansion.known[k].own(name)) for name in rows}
        if all(info is not None and info.shape[:1] == (rows[name],) for name, info in own.items()):
            return
    sides = [
        f"{rows[name]:,} tokens in {shown(name)} ({models[tokens[name][0]].name})"
        for name in sorted(tokens, key=comes_last)
    ]
    yield f"a vocabulary mismatch: {' and '.join(sides)}"


def _shapes(expansion: Expansion, model: Checkpoint, number: int, stack: str, rest: str) -> dict[int, Shape]:
    """The shapes that a tensor has along a model's own layers."""
    known = expansion.known[number]
    count, shapes = expansion.depth(number, stack), dict[int, Shape]()
    for layer in range(count):
        name = f"{stack}{layer}{rest}"
        if name in known:
            shapes[layer] = model.tensors[known.own(name)].shape
    return shapes


def _mixture(
    models: Sequence[Checkpoint], own: dict[int, dict[int, Shape]], tensors: dict[int, tuple[int, TensorInfo]]
) -> str:
    """The shapes along the output's layers, in words, if no model has them all."""
    shapes: dict[Shape, list[int]] = {}
    for layer, (_, info) in sorted(tensors.items()):
        shapes.setdefault(info.shape, []).append(layer)
    if len(shapes) < 2 or any(shapes.keys() <= {*mine.values()} for mine in own.values()):
        return ""
    return ", ".join(
        f"{list(shape)} in {counted(len(layers), 'layer')} ({models[tensors[layers[0]][0]].name})"
        for shape, layers in shapes.items()
    )


def _unlike_donor(
    models: Sequence[Checkpoint],
    own: dict[int, Shape],
    donor: int,
    tensors: dict[int, tuple[int, TensorInfo]],
    layers: Sequence[int],
) -> str:
    """The first layer whose shape is not the one that the copied config.json describes."""
    for layer, (number, info) in sorted(tensors.items()):
        donors = own.get(layers[layer] if layer < len(layers) else layer)
        expected = {*own.values()} if donors is None else {donors}
        if number != donor and expected and info.shape not in expected:
            there = " or ".join(str(list(shape)) for shape in expected)
            return (
                f"{list(info.shape)} in layer {layer} ({models[number].name}), {there} in {models[donor].name}, "
                "whose config.json the output has"
            )
    return ""


def _unlike_outside(
    models: Sequence[Checkpoint], donor: int, outside: dict[str, tuple[int, TensorInfo]]
) -> Iterator[tuple[str, str]]:
    """Tensors outside the layers whose shape differs from the model whose config.json is copied. The number of token
    rows may differ."""
    for name, (number, info) in outside.items():
        there = models[donor].tensors.get(name)
        if there is None or number == donor:
            continue
        skip = int(has_token_rows(name))
        if info.shape[skip:] != there.shape[skip:]:
            yield (
                name,
                (
                    f"{list(info.shape)} ({models[number].name}), {list(there.shape)} in {models[donor].name}, whose "
                    "config.json the output has"
                ),
            )
