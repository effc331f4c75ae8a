"""Merge methods of many models against oracles of whole tensors, and the laws they keep."""

from __future__ import annotations

import math
import random
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merge_tool.methods.geometric import arc_weights
from merge_tool.methods.inner import Scratch, combine, pair_angle, slerp_weights
from merge_tool.methods.passes import check_spec, cut_tile, drive, run_steps, start_pass
from merge_tool.methods.registry import METHODS
from merge_tool.methods.rowwise import divergence, mean_ranks
from merge_tool.methods.sparse import _sum_of_agreeing
from merge_tool.methods.steps import (
    REQUIRED,
    TILE,
    MergeSpec,
    Method,
    OrderStatistics,
    Steps,
    Sums,
    Tile,
    seed_key,
    tile_elements,
)
from oracle import Array, exact_angle, exact_weights
from steps_oracle import ORACLES, uniform
from test_methods import pair_at_angle, sums_of

DOCS = Path(__file__).parents[1] / "docs"
STEPS_METHODS = {name: method for name, method in METHODS.items() if method.steps}
NAMES = sorted(STEPS_METHODS)
KEY = seed_key(0, "model.layers.0.mlp.up_proj.weight")
WEIGHTS = (0.7, 0.2, 0.4, 0.3)
WEIGHTS5 = (0.7, 0.2, 0.4, 0.3, 0.45)


def asked(
    name: str, shape: tuple[int, ...], n: int | None = None, *, base: bool | None = None, **more: Any
) -> MergeSpec:
    """A request with the defaults, some weights, and what is given: one value for all inputs, or a tuple of them."""
    method = METHODS[name]
    n = min(3, method.inputs[1]) if n is None else n
    shared = {k: more.get(k, 0.05 if v is REQUIRED else v) for k, v in method.shared.items()}
    each = {k: more.get(k, WEIGHTS[:n] if v is REQUIRED else v) for k, v in method.each.items()}
    assert more.keys() <= shared.keys() | each.keys()
    each = {k: v if isinstance(v, tuple) else (v,) * n for k, v in each.items()}
    return MergeSpec(shape, n, method.base == "required" if base is None else base, shared, each, KEY)


def tensors(request: MergeSpec, seed: int = 0, apart: float = 0.3) -> tuple[Array | None, list[Array]]:
    """A base and models near it, which went some of the way together."""
    rng = np.random.default_rng(seed)
    base, common = rng.standard_normal(request.shape), rng.standard_normal(request.shape)
    inputs = [base + apart * (common + rng.standard_normal(request.shape)) for _ in range(request.num_inputs)]
    return (base if request.has_base else None), inputs


def merged(name: str, request: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    return run_steps(STEPS_METHODS[name], request, base, inputs)


def check(name: str, request: MergeSpec, seed: int = 0, apart: float = 0.3, rtol: float = 1e-11) -> None:
    base, inputs = tensors(request, seed, apart)
    found = merged(name, request, base, inputs)
    np.testing.assert_allclose(found, ORACLES[name](request, base, inputs), rtol=rtol, atol=1e-12)


# ------------------------------------------------------------------------------------------- oracles

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"normalize": False}, {"n": 1}, {"weight": (2.0, -1.0, 0.0)}],
    "nuslerp": [
        {"base": base, "nuslerp_flatten": flat, "nuslerp_row_wise": rows}
        for base in (False, True)
        for flat, rows in ((True, False), (False, False), (False, True))
    ],
    "multislerp": [{}, {"base": True}, {"normalize_weights": False}, {"n": 1}, {"n": 4, "base": True}],
    "karcher": [{}, {"max_iter": 100, "tol": 1e-7}, {"max_iter": 0}, {"n": 1}, {"n": 4}],
    "model_stock": [{}, {"filter_wise": True}, {"n": 2}, {"n": 4}],
    "passthrough": [{}, {"scale": 0.5}],
    "task_arithmetic": [{}, {"normalize": True, "lambda": 0.7}, {"weight": (1.0, -1.0, 0.5)}],
    "ties": [
        {"density": (0.2, 0.5, 1.0)}, {}, {"density": 0.3, "rescale": True, "lambda": 1.5}, {"density": 0.0},
        {"density": 0.4, "normalize": False}, {"weight": (1.0, -0.5, 0.3), "density": 0.9}, {"n": 1, "density": 0.1},
    ],
    "dare_linear": [{"density": 0.3}, {"density": (1.0, 0.0, 0.5), "rescale": False, "normalize": True}],
    "dare_ties": [{"density": 0.3}, {"density": (1.0, 0.0, 0.5), "rescale": False, "normalize": True}],
    "breadcrumbs": [
        {"density": 0.4, "gamma": (0.0, 0.1, 0.9)}, {}, {"density": 0.0}, {"density": 0.5, "rescale": True},
    ],
    "breadcrumbs_ties": [
        {"density": 0.4, "gamma": (0.0, 0.1, 0.9)}, {"density": 0.9, "rescale": True, "normalize": True},
    ],
    "della": [{"density": (0.3, 0.85, 1.0)}, {"density": (0.0, 0.5, 0.5), "epsilon": 0.4, "rescale": False}],
    "della_linear": [{"density": (0.3, 0.85, 1.0)}, {"density": 0.5, "epsilon": 0.0, "lambda": 0.5}],
    "sce": [{}, {"select_topk": 0.1}, {"select_topk": 0.0}, {"n": 1}, {"n": 2, "select_topk": 0.7}],
    "nearswap": [{}, {"t": 0.0}, {"t": 10.0}],
    "arcee_fusion": [{}],
    "geometric_median": [
        {}, {"weight": (2.5, 1.0, 1.0)}, {"weight": (0.0, 1.0, 0.7)}, {"n": 5, "weight": WEIGHTS5, "tol": 1e-14},
    ],
    "warp": [
        {}, {"eta": 1.7}, {"n": 1, "eta": 1.3}, {"n": 2, "eta": 0.4, "weight": (0.7, 0.3)},
        {"n": 4, "weight": (0.0, 1.0, 2.0, 0.5), "eta": -0.5},
    ],
    "ram": [{}, {"epsilon": 0.4}, {"n": 1, "epsilon": 0.3}, {"epsilon": 100.0}],
    "ramplus_tl": [{}, {"epsilon": 0.4}, {"n": 2, "epsilon": 0.3, "alpha": 3.0, "r": 0.5}, {"n": 4, "epsilon": 0.5}],
}  # fmt: skip
CASES = [(name, variant) for name, variants in sorted(VARIANTS.items()) for variant in variants]
SHAPES = [(), (1,), (2,), (1, 1), (700,), (9, 40), (5, 1), (1, 30), (4, 3, 6)]


def test_every_method_has_an_oracle_and_variants() -> None:
    assert STEPS_METHODS.keys() == ORACLES.keys() == VARIANTS.keys()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_small_tensors_of_any_shape_equal_the_oracle(name: str, variant: dict[str, Any]) -> None:
    for shape in SHAPES:
        if name in ("multislerp", "karcher") and math.prod(shape) == 1:
            continue  # the sphere is two points: see test_where_directions_cancel
        check(name, asked(name, shape, **variant), seed=len(shape))


MASKED = sorted({"sce", "nearswap", "ram", "ramplus_tl"} | {n for n in NAMES if "density" in STEPS_METHODS[n].each})


@given_(st.data())
@settings(max_examples=300, deadline=None)
def test_a_few_values_that_are_often_equal_equal_the_oracle(data: st.DataObject) -> None:
    """Thresholds that many elements have, sums that balance, zeros: small integers, so that all of it is exact."""
    name = data.draw(st.sampled_from(MASKED))
    shape = data.draw(st.sampled_from([(1,), (12,), (3, 5), (2, 1), (2, 2, 3)]))
    n = data.draw(st.integers(1, STEPS_METHODS[name].inputs[1] if name == "nearswap" else 4))
    steps = hnp.arrays(np.float64, shape, elements=st.integers(-2, 2).map(float))
    more: dict[str, Any] = {}
    if name == "sce":
        more["select_topk"] = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    elif name.startswith("ram"):
        more["epsilon"] = data.draw(st.sampled_from([0.0, 1.0, 1.5]))
    elif name == "nearswap":
        more["t"] = data.draw(st.sampled_from([0.0, 1.0, 1.5]))
    else:
        more["density"] = data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
        more["weight"] = tuple(data.draw(st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=n, max_size=n)))
        more["normalize"], more["rescale"] = data.draw(st.booleans()), data.draw(st.booleans())
    request = asked(name, shape, n, **more)
    base, inputs = data.draw(steps), [data.draw(steps) for _ in range(n)]
    found = merged(name, request, base, inputs)
    np.testing.assert_allclose(found, ORACLES[name](request, base, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_several_tiles_equal_the_oracle(name: str) -> None:
    """Rows that do not divide a tile."""
    check(name, asked(name, (301, 700), **VARIANTS[name][-1]))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("della", {"density": 0.5}),
        ("arcee_fusion", {}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ],
)
def test_rows_longer_than_a_tile_equal_the_oracle(name: str, variant: dict[str, Any]) -> None:
    check(name, asked(name, (2, TILE + 9), **variant))


def test_a_vector_of_several_tiles_equals_the_oracle() -> None:
    for name, variant in (("ties", {"density": 0.2}), ("dare_linear", {"density": 0.2}), ("sce", {"select_topk": 0.3})):
        check(name, asked(name, (2 * TILE + 3,), **variant))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_empty_tensors_stay_empty(name: str, variant: dict[str, Any]) -> None:
    for shape in ((0,), (0, 3), (3, 0)):
        request = asked(name, shape, **variant)
        assert merged(name, request, *tensors(request)).shape == shape


# ---------------------------------------------------------------------------------- laws of all methods


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_equal_tensors_stay_where_a_method_says_so(name: str, variant: dict[str, Any]) -> None:
    """`copies_equal` lets the merger copy bytes: the result is within rounding of what would be computed."""
    request = asked(name, (6, 50), **variant)
    x = np.random.default_rng(1).standard_normal(request.shape)
    base = x.copy() if request.has_base else None
    found = merged(name, request, base, [x.copy() for _ in range(request.num_inputs)])
    if STEPS_METHODS[name].copies_equal(request):
        np.testing.assert_allclose(found, x, rtol=1e-15)
    else:
        assert not np.allclose(found, x)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_zeros_merge_to_zeros(name: str, variant: dict[str, Any]) -> None:
    request = asked(name, (6, 50), **variant)
    zeros = np.zeros(request.shape)
    assert not merged(name, request, zeros if request.has_base else None, [zeros] * request.num_inputs).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_in_which_tiles_are_added_changes_no_bit(name: str) -> None:
    for variant in VARIANTS[name]:
        request = asked(name, (301, 1_000), **variant)
        base, inputs = tensors(request)
        assert shuffled_merge(name, request, base, inputs).tobytes() == merged(name, request, base, inputs).tobytes()


def shuffled_merge(name: str, request: MergeSpec, base: Any, inputs: list[Array]) -> Array:
    method, shuffle = STEPS_METHODS[name], random.Random(5).shuffle
    granularity = method.granularity(request)
    size = tile_elements(request, granularity)
    starts = list(range(0, request.numel, size))

    def tile(begin: int) -> Tile:
        return cut_tile(begin, size, request, granularity, base, inputs)

    def visit(add: Callable[[int, Tile], None]) -> None:
        numbers = list(range(len(starts)))
        if not add.__self__.in_order:  # type: ignore[attr-defined]  # the pass under way
            shuffle(numbers)
        for number in numbers:
            add(number, tile(starts[number]))

    combine_ = drive(method, request, len(starts), visit)
    parts = {begin: combine_(tile(begin)) for begin in sorted(starts, reverse=True)}
    return np.concatenate([parts[begin].reshape(-1) for begin in starts]).reshape(request.shape)


ORDERLESS = sorted(n for n in NAMES if STEPS_METHODS[n].inputs[1] > 2 and not n.startswith(("dare", "della", "warp")))


@pytest.mark.parametrize("name", ORDERLESS)
def test_the_order_of_the_models_does_not_matter(name: str) -> None:
    request = asked(name, (20, 30), **VARIANTS[name][-1])
    base, inputs = tensors(request)
    turned = {k: v[::-1] for k, v in request.each.items()}
    other = MergeSpec(request.shape, request.num_inputs, request.has_base, request.shared, turned, KEY)
    found = merged(name, other, base, inputs[::-1])
    np.testing.assert_allclose(found, merged(name, request, base, inputs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("power", [-700, 600])
@pytest.mark.parametrize(
    "name",
    ["linear", "nuslerp", "multislerp", "karcher", "model_stock", "task_arithmetic", "sce", "geometric_median", "warp"],
)
def test_tensors_whose_squares_leave_float64_merge_as_others(name: str, power: int) -> None:
    """f(s x) = s f(x), s a power of two."""
    request = asked(name, (30, 40), base=True if name == "nuslerp" else None)
    base, inputs = tensors(request)
    size = 2.0**power
    found = merged(name, request, None if base is None else base * size, [x * size for x in inputs])
    np.testing.assert_allclose(found / size, merged(name, request, base, inputs), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_method_holds_at_most_six_tiles_besides_its_inputs(name: str, variant: dict[str, Any]) -> None:
    """In pass and combine: what the memory budget counts on."""
    request = asked(name, (1_024, 256), **variant)
    base, inputs = tensors(request)
    method = STEPS_METHODS[name]
    granularity = method.granularity(request)
    size = tile_elements(request, granularity)
    most = 0

    def visit(add: Callable[[int, Tile], None]) -> None:
        for number, begin in enumerate(range(0, request.numel, size)):
            watched(add, number, cut_tile(begin, size, request, granularity, base, inputs))

    def watched(act: Callable[..., Any], *args: Any) -> None:
        nonlocal most
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        act(*args)
        most = max(most, tracemalloc.get_traced_memory()[1] - held)

    tracemalloc.start()
    try:
        combine_ = drive(method, request, request.numel // size, visit)
        watched(combine_, cut_tile(0, size, request, granularity, base, inputs))
    finally:
        tracemalloc.stop()
    assert most <= 6 * 8 * TILE + 100_000


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_state_bytes_covers_what_the_passes_hold(name: str, variant: dict[str, Any]) -> None:
    """Histograms and column sums, whichever pass holds the most."""
    request = asked(name, (200, 1_000), **variant)
    base, inputs = tensors(request)
    method = STEPS_METHODS[name]
    granularity = method.granularity(request)
    size = tile_elements(request, granularity)
    starts = range(0, request.numel, size)
    held = [0]

    def visit(add: Callable[[int, Tile], None]) -> None:
        for number, begin in enumerate(starts):
            add(number, cut_tile(begin, size, request, granularity, base, inputs))
        state = vars(add.__self__)  # type: ignore[attr-defined]  # the pass under way
        held.append(sum(array_bytes(state.get(part)) for part in ("upper", "lower", "found")))

    drive(method, request, len(starts), visit)
    assert max(held) <= method.state_bytes(request)


def array_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(array_bytes, value.values()))
    return value.nbytes if isinstance(value, np.ndarray) else 0


# ------------------------------------------------------------------------------------ bad parameters

REFUSED = [
    ("linear", {"weight": (1.0, -1.0, 0.0)}, "weight .1, -1, 0. add up to 0"),
    ("linear", {"weight": (1e308, 1e308, 0.0)}, "weight .1e.308, 1e.308, 0. are too large to be added"),
    ("ties", {"weight": (1e308, 1e308, 0.0)}, "weight .1e.308, 1e.308, 0. are too large to be added"),
    ("della", {"weight": (1e308, 1e308, 0.0)}, "weight .1e.308, 1e.308, 0. are too large to be added"),
    ("karcher", {"max_iter": 10**12}, "max_iter is .*; it must be between 0 and 10000"),
    ("linear", {"weight": (0.1, 0.2, -0.3)}, "weight"),
    ("linear", {"weight": 0.0}, "weight"),
    ("linear", {"weight": math.nan}, "weight is nan"),
    ("linear", {"weight": "half"}, "weight is 'half'"),
    ("nuslerp", {"weight": (1.0, -1.0)}, "weight"),
    ("multislerp", {"weight": (1.0, -1.0, 0.0)}, "weight"),
    ("multislerp", {"eps": -1.0}, "eps is -1.0; it must be at least 0"),
    ("karcher", {"max_iter": -1}, "max_iter"),
    ("karcher", {"tol": math.inf}, "tol"),
    ("passthrough", {"scale": math.inf}, "scale"),
    ("task_arithmetic", {"lambda": math.nan}, "lambda is nan"),
    ("task_arithmetic", {"normalize": True, "weight": (1.0, -1.0, 0.0)}, "set normalize to false"),
    ("ties", {"density": 1.5}, "density is 1.5; it must be between 0 and 1"),
    ("ties", {"weight": math.inf, "density": 0.5}, "weight"),
    ("breadcrumbs", {"gamma": -0.1}, "gamma"),
    ("dare_linear", {"density": -0.1}, "density"),
    ("dare_ties", {"density": math.nan}, "density"),
    ("della", {"density": 0.1}, "epsilon is 0.15 at a density of 0.1"),
    ("della_linear", {"density": 0.9}, "epsilon"),
    ("sce", {"select_topk": 2.0}, "select_topk"),
    ("nearswap", {"t": -0.1}, "t is -0.1"),
    ("ram", {"epsilon": -1e-5}, "epsilon is -1e-05; it must be at least 0"),
    ("ramplus_tl", {"alpha": -1.0}, "alpha is -1.0; it must be at least 0"),
    ("ramplus_tl", {"r": math.inf}, "r is inf"),
    ("warp", {"weight": (1.0, -1.0, 1.0)}, "weight is -1.0; it must be at least 0"),
    ("warp", {"weight": 0.0}, "weight .0, 0, 0. add up to 0 .*; one of them must be above 0; change weight"),
    ("warp", {"eta": math.nan}, "eta is nan"),
    ("geometric_median", {"weight": 0.0}, "one of them must be above 0"),
    ("geometric_median", {"max_iter": -1}, "max_iter"),
    ("geometric_median", {"weight": (1.0, -0.5, 1.0)}, "weight is -0.5"),
    ("slerp", {"t": math.nan}, "t is nan"),
    ("slerp", {"t": "half"}, "t is 'half'"),
]


@pytest.mark.parametrize(("name", "bad", "words"), REFUSED)
def test_a_parameter_that_means_nothing_is_refused_before_any_pass(name: str, bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_spec(METHODS[name], asked(name, (4, 4), **bad))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_good_parameters_pass_the_check(name: str, variant: dict[str, Any]) -> None:
    check_spec(STEPS_METHODS[name], asked(name, (4, 4), **variant))


# ------------------------------------------------------------------------------ the geometric methods

ROW_WISE = [{"nuslerp_flatten": False, "nuslerp_row_wise": flag} for flag in (False, True)]


@pytest.mark.parametrize("variant", [{}, *ROW_WISE])
@pytest.mark.parametrize("base", [False, True])
def test_nuslerp_ends_at_its_models(variant: dict[str, Any], base: bool) -> None:
    for weight, end in (((1.0, 0.0), 0), ((0.0, 3.0), 1)):
        request = asked("nuslerp", (20, 30), base=base, weight=weight, **variant)
        origin, inputs = tensors(request)
        np.testing.assert_allclose(merged("nuslerp", request, origin, inputs), inputs[end], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("theta", [1e-7, 1e-3, 1.0, 3.0, math.pi - 1e-5])
def test_nuslerp_of_whole_tensors_is_slerp(theta: float) -> None:
    """With weights 1 - t and t: within rounding of the weights of `slerp`."""
    x, y = pair_at_angle(theta, 1.3)
    out, scratch = np.empty_like(x), Scratch(np.zeros(Scratch.NBYTES, np.uint8))
    sums = sums_of(x, y)
    assert pair_angle(sums) is not None
    combine(x, y, slerp_weights(sums, 0.25), out, scratch)
    found = merged("nuslerp", asked("nuslerp", x.shape, weight=(0.75, 0.25)), None, [x, y])
    np.testing.assert_allclose(found, out, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("variant", ROW_WISE)
@pytest.mark.parametrize("theta", [1e-8, 1e-5, 0.3, 1.6, 3.1, math.pi - 1e-5, math.pi - 1e-8])
def test_nuslerp_row_by_row_keeps_the_digits_of_any_angle(theta: float, variant: dict[str, Any]) -> None:
    x, y = (v[None, :] for v in pair_at_angle(theta, 2.0, size=400))
    w0, w1 = exact_weights(exact_angle(x, y), 0.25)
    if variant["nuslerp_row_wise"]:
        x, y = x.T.copy(), y.T.copy()
    found = merged("nuslerp", asked("nuslerp", x.shape, weight=(3.0, 1.0), **variant), None, [x, y])
    w0, w1 = float(w0), float(w1)
    np.testing.assert_allclose(found, w0 * x + w1 * y, rtol=0, atol=1e-9 * max(abs(w0), abs(w1)))


def test_nuslerp_flags_choose_the_dimension_they_choose_in_mergekit() -> None:
    """Not flattened: vectors along the last dimension; with nuslerp_row_wise: along the first."""
    x, y = np.eye(2), np.array([[0.0, 1.0], [2.0, 0.0]])
    half = math.sqrt(0.5)
    last = merged("nuslerp", asked("nuslerp", (2, 2), weight=1.0, nuslerp_flatten=False), None, [x, y])
    np.testing.assert_allclose(last, [[half, half], [2 * half, half]])
    first = merged("nuslerp", asked("nuslerp", (2, 2), weight=1.0, **ROW_WISE[1]), None, [x, y])
    np.testing.assert_allclose(first, [[half, half], [2 * half, half]])
    x, y = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([[1.0, -1.0], [0.0, 0.0]])
    last = merged("nuslerp", asked("nuslerp", (2, 2), weight=1.0, nuslerp_flatten=False), None, [x, y])
    np.testing.assert_allclose(last, [[2 * half, 0], [0, 0]], atol=1e-15)
    first = merged("nuslerp", asked("nuslerp", (2, 2), weight=1.0, **ROW_WISE[1]), None, [x, y])
    np.testing.assert_allclose(first, [[1, 0], [0, 0]], atol=1e-15)


def test_warp_of_two_is_nuslerp_stretched_by_eta() -> None:
    """At eta 1 it is nuslerp of the differences, bit for bit. Of one model it is task arithmetic (ExPO)."""
    request = asked("warp", (30, 40), 2, weight=(0.7, 0.3))
    base, inputs = tensors(request)
    spherical = merged("nuslerp", asked("nuslerp", (30, 40), base=True, weight=(0.7, 0.3)), base, inputs)
    assert merged("warp", request, base, inputs).tobytes() == spherical.tobytes()
    further = merged("warp", asked("warp", (30, 40), 2, weight=(0.7, 0.3), eta=1.5), base, inputs)
    np.testing.assert_allclose(further, base + 1.5 * (spherical - base), rtol=1e-13, atol=1e-14)
    request = asked("task_arithmetic", (30, 40), 1, weight=1.0, **{"lambda": 1.5})
    straight = merged("task_arithmetic", request, base, inputs[:1])
    np.testing.assert_allclose(merged("warp", asked("warp", (30, 40), 1, eta=1.5), base, inputs[:1]), straight)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    """No neighbour has less; one wild model of five moves it no further than the others' spread, the mean much more."""
    request = asked("geometric_median", (20, 30), 5)
    _, inputs = tensors(request)
    inputs[3] += 1e6

    def distances(x: Array) -> float:
        return math.fsum(float(np.linalg.norm(x - one)) for one in inputs)

    found, rng = merged("geometric_median", request, None, inputs), np.random.default_rng(3)
    least = distances(found)
    for size in (1e-3, 1e-1, 1.0):
        assert all(distances(found + size * rng.standard_normal((20, 30))) > least for _ in range(20))
    tame = [x for k, x in enumerate(inputs) if k != 3]
    middle = np.mean(tame, axis=0)
    assert np.linalg.norm(found - middle) < max(np.linalg.norm(x - middle) for x in tame)
    assert np.linalg.norm(np.mean(inputs, axis=0) - middle) > 1e5


def test_a_model_that_is_the_geometric_median_is_copied() -> None:
    """Where one model outweighs the others, or lies between them: its values, bit for bit."""
    request = asked("geometric_median", (20, 30), 3, weight=(1.0, 5.0, 1.0))
    _, inputs = tensors(request)
    assert merged("geometric_median", request, None, inputs).tobytes() == inputs[1].tobytes()
    x, step = inputs[0], np.full((20, 30), 0.5)
    request = asked("geometric_median", (20, 30), 3)
    np.testing.assert_array_equal(merged("geometric_median", request, None, [x - step, x + step, x]), x)


def test_ram_plus_lifts_what_one_model_alone_changed() -> None:
    """Model 0 changed 4 elements alone and 1 together with model 1: a quarter, of which alpha lets 0.2 count."""
    base, inputs = np.zeros(8), [np.zeros(8), np.zeros(8)]
    inputs[0][:5], inputs[1][4:6] = 1.0, 3.0
    found = merged("ramplus_tl", asked("ramplus_tl", (8,), 2, r=0.5), base, inputs)
    np.testing.assert_allclose(found, [1.1, 1.1, 1.1, 1.1, 2.0, 3.3, 0, 0])
    np.testing.assert_array_equal(merged("ram", asked("ram", (8,), 2), base, inputs), [1, 1, 1, 1, 2, 3, 0, 0])


@pytest.mark.parametrize("weight", [(0.7, 0.3), (3.0, -1.0), (0.0, 2.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_two_weights_are_the_steps_of_linear(weight: tuple[float, float], normalize: bool) -> None:
    """Two models are merged by weights, more by steps: one result."""
    request = asked("linear", (700,), 2, weight=weight, normalize=normalize)
    _, (x, y) = tensors(request)
    method, out, scratch = METHODS["linear"], np.empty_like(x), Scratch(np.zeros(Scratch.NBYTES, np.uint8))
    assert method.is_weighted(2, has_base=False)
    assert not any(method.is_weighted(n, has_base=base) for n, base in ((1, False), (3, False), (2, True)))
    assert method.weights is not None
    assert combine(x, y, method.weights(sums_of(x, y), request), out, scratch)
    np.testing.assert_allclose(out, merged("linear", request, None, [x, y]), rtol=1e-15, atol=1e-15)


def test_arc_weights_of_no_arc_are_linear() -> None:
    w0, w1 = arc_weights(np.array([0.0, 2.0, 1e-10]), np.array([1.0, 0.0, 2.0]), 0.25)
    assert w0.tolist() == [0.75] * 3
    assert w1.tolist() == [0.25] * 3


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@pytest.mark.parametrize("theta", [1e-6, 0.4, 1.5, 3.0])
def test_two_models_of_one_length_meet_in_the_middle_of_the_arc(name: str, theta: float) -> None:
    x, y = pair_at_angle(theta)
    found = merged(name, asked(name, x.shape, 2, **({"weight": 1.0} if name == "multislerp" else {})), None, [x, y])
    weights = slerp_weights(sums_of(x, y), 0.5)
    np.testing.assert_allclose(found, weights.w0 * x + weights.w1 * y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_where_directions_cancel_the_average_is_linear(name: str) -> None:
    """Antiparallel tensors, scalars of different sign, and only zeros: no direction is preferred."""
    x = np.random.default_rng(0).standard_normal(50)
    more = {"weight": 1.0} if name == "multislerp" else {}
    for tensors_ in ([x, -2 * x], [np.array(0.5), np.array(-0.25)], [np.zeros(4), np.zeros(4)]):
        found = merged(name, asked(name, tensors_[0].shape, 2, **more), None, list(tensors_))
        np.testing.assert_allclose(found, (tensors_[0] + tensors_[1]) / 2, rtol=1e-12)


def test_scalars_of_mixed_signs_take_the_sign_of_most() -> None:
    """The sphere of one dimension is two points: no arc leads to the other."""
    x = [np.array(0.5), np.array(-0.1), np.array(0.3)]
    assert merged("karcher", asked("karcher", (), 3), None, list(x)) == pytest.approx(0.3)
    assert merged("multislerp", asked("multislerp", (), 3, weight=1.0), None, list(x)) == pytest.approx(0.3)


def test_multislerp_keeps_its_digits_where_directions_nearly_cancel() -> None:
    x, y = pair_at_angle(math.pi - 1e-4)
    found = merged("multislerp", asked("multislerp", x.shape, 2, weight=1.0), None, [x, y])
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(x), rel=1e-9)


@pytest.mark.parametrize("power", [-700, 600])
@pytest.mark.parametrize(("name", "apart"), [("multislerp", math.pi - 1e-4), ("nuslerp", 1e-8)])
def test_where_digits_are_lost_tensors_of_any_size_merge_as_others(name: str, apart: float, power: int) -> None:
    """f(s x) = s f(x), s a power of two, also where a second sum is made of what the first said."""
    request = asked(name, (3000,), 2, weight=1.0)
    pair, size = list(pair_at_angle(apart)), 2.0**power
    found = merged(name, request, None, [x * size for x in pair])
    np.testing.assert_allclose(found / size, merged(name, request, None, pair), rtol=1e-13, atol=1e-14)


def test_karcher_is_where_the_arcs_balance() -> None:
    """At the mean, the unit vectors' logarithms add up to nothing."""
    request = asked("karcher", (200,), 4, max_iter=100, tol=1e-7)
    _, inputs = tensors(request, apart=1.5)
    mean = merged("karcher", request, None, inputs)
    mean = mean / np.linalg.norm(mean)
    total = np.zeros(200)
    for x in inputs:
        u = x / np.linalg.norm(x)
        across = u - (u @ mean) * mean
        total += math.acos(float(u @ mean)) * across / np.linalg.norm(across)
    assert np.linalg.norm(total) < 1e-6


def test_a_zero_model_has_no_direction_but_counts_in_the_length() -> None:
    x, y = pair_at_angle(0.5)
    for name, more in (("karcher", {}), ("multislerp", {"weight": 1.0})):
        two = merged(name, asked(name, x.shape, 2, **more), None, [x, y])
        three = merged(name, asked(name, x.shape, 3, **more), None, [x, y, np.zeros_like(x)])
        np.testing.assert_allclose(three, two * 2 / 3, rtol=1e-12)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_from_base_to_average_as_the_models_agree(filter_wise: bool) -> None:
    base = np.random.default_rng(0).standard_normal((2, 4))
    e0, e1 = (np.tile(np.eye(4)[i], (2, 1)) for i in (0, 1))
    request = asked("model_stock", (2, 4), 2, filter_wise=filter_wise)
    for second, share in ((e0, 1.0), (e1, 0.0), (-e0, 0.0), ((e0 + e1) * 3, 2 * math.sqrt(0.5) / (1 + math.sqrt(0.5)))):
        found = merged("model_stock", request, base, [base + e0, base + second])
        np.testing.assert_allclose(found, base + share * (e0 + second) / 2, rtol=1e-14, atol=1e-15)


# -------------------------------------------------------------------------------- task vectors, masks


@pytest.mark.parametrize("name", ["dare_linear", "breadcrumbs", "della_linear"])
def test_a_density_of_one_is_task_arithmetic(name: str) -> None:
    request = asked(name, (30, 40), density=1.0)
    base, inputs = tensors(request)
    plain = merged("task_arithmetic", asked("task_arithmetic", (30, 40)), base, inputs)
    assert merged(name, request, base, inputs).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "name", ["ties", "dare_ties", "breadcrumbs_ties", "della", "dare_linear", "breadcrumbs", "sce"]
)
def test_a_density_of_zero_is_the_base(name: str) -> None:
    request = asked(name, (30, 40), **({"select_topk": 0.0} if name == "sce" else {"density": 0.0}))
    base, inputs = tensors(request)
    assert base is not None
    assert merged(name, request, base, inputs).tobytes() == base.tobytes()


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "weight" in STEPS_METHODS[n].each and "lambda" in STEPS_METHODS[n].shared]
)
def test_weights_of_zero_are_the_base(name: str) -> None:
    more = {"density": 0.5} if "density" in STEPS_METHODS[name].each else {}
    request = asked(name, (30, 40), weight=0.0, normalize=True, **more)
    base, inputs = tensors(request)
    assert base is not None
    np.testing.assert_array_equal(merged(name, request, base, inputs), base)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs_ties", "della", "sce"])
def test_opposite_differences_have_no_sign_to_elect(name: str) -> None:
    """And leave the base, rather than the positive one."""
    base = np.arange(24.0).reshape(4, 6)
    d = np.full((4, 6), 0.5)
    request = asked(name, (4, 6), 2, **({} if name == "sce" else {"weight": 0.3}))
    np.testing.assert_array_equal(merged(name, request, base, [base + d, base - d]), base)


def test_what_equals_a_threshold_is_kept() -> None:
    base = np.zeros(8)
    x = np.array([1.0, 2, 2, 2, 3, -2, 0, 0])
    ties = merged("ties", asked("ties", (8,), 1, density=0.25, weight=1.0), base, [x])
    assert ties.tolist() == [0, 2, 2, 2, 3, -2, 0, 0]
    crumbs = merged("breadcrumbs", asked("breadcrumbs", (8,), 1, density=0.25, gamma=0.125, weight=1.0), base, [x])
    assert crumbs.tolist() == [0, 2, 2, 2, 0, -2, 0, 0]


def test_ties_of_the_papers_figure() -> None:
    """Trim, elect, merge, by hand."""
    base = np.zeros(4)
    a, b, c = np.array([3.0, -1, 2, 0.1]), np.array([2.0, 4, -5, 0.1]), np.array([-4.0, 0.5, 1, 0.1])
    found = merged("ties", asked("ties", (4,), 3, density=0.5, weight=1.0), base, [a, b, c])
    assert found.tolist() == [-4, 4, -5, 0]  # trimmed: [3, 0, 2, 0], [0, 4, -5, 0], [-4, 0, 1, 0]


@given_(st.data())
@settings(max_examples=60, deadline=None)
def test_a_mask_by_magnitude_keeps_what_is_larger(data: st.DataObject) -> None:
    """Nothing dropped is larger than anything kept, and at least the asked share is kept."""
    d = data.draw(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-9, 9, width=16))).astype(np.float64)
    density = data.draw(st.floats(0.01, 0.99))
    found = merged("ties", asked("ties", d.shape, 1, density=density, weight=1.0), np.zeros_like(d), [d])
    kept = found != 0
    assert np.abs(d[kept]).min(initial=np.inf) >= np.abs(d[~kept]).max(initial=0)
    assert kept.sum() >= min(np.count_nonzero(d), max(1, int(density * d.size)))


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_rescaling_restores_the_sum_of_magnitudes(name: str) -> None:
    request = asked(name, (30, 40), 1, density=0.3, rescale=True, weight=1.0)
    base, (x,) = tensors(request)
    found = merged(name, request, base, [x]) - base
    assert np.abs(found).sum() == pytest.approx(np.abs(x - base).sum(), rel=1e-12)
    assert np.count_nonzero(np.abs(found) > 1e-12) == int(0.3 * found.size)


def test_dare_keeps_the_asked_share_and_scales_it_up() -> None:
    request = asked("dare_linear", (2, TILE), 1, density=0.3, weight=1.0)
    found = merged("dare_linear", request, np.zeros(request.shape), [np.ones(request.shape)])
    assert set(np.unique(found)) == {0.0, 1 / 0.3}
    share = np.count_nonzero(found) / found.size
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / found.size)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_at_random_is_right_on_average(name: str) -> None:
    """Over 4,000 seeds the mean is the difference, each element within five standard errors."""
    request = asked(name, (3, 4), 1, density=0.5, weight=1.0)
    base, (x,) = tensors(request)
    assert base is not None
    found = []
    for seed in range(4_000):
        one = MergeSpec(request.shape, 1, True, request.shared, request.each, seed_key(seed, "w"))
        found.append(merged(name, one, base, [x]))
    slack = 5 * np.abs(x - base) * math.sqrt((1 - 0.35) / 0.35 / 4_000)
    assert (np.abs(np.mean(found, axis=0) - x) <= slack).all()


def test_della_keeps_large_elements_of_a_row_more_often() -> None:
    """Evenly by rank: about density - epsilon + 2 epsilon q at quantile q."""
    request = asked("della_linear", (400, 500), 1, density=0.5, epsilon=0.3, weight=1.0)
    d = np.tile(np.arange(1.0, 501.0), (400, 1))
    kept = merged("della_linear", request, np.zeros(d.shape), [d]) != 0
    np.testing.assert_allclose(kept.mean(axis=0), np.linspace(0.2, 0.8, 500), atol=5 * math.sqrt(0.25 / 400))


@given_(hnp.arrays(np.float64, (3, 7), elements=st.integers(0, 4).map(float)))
@settings(max_examples=100, deadline=None)
def test_equal_magnitudes_share_their_ranks(values: Any) -> None:
    expected = [[((row < v).sum() + (row <= v).sum() - 1) / 2 for v in row] for row in values]
    assert mean_ranks(values).tolist() == expected


def test_random_numbers_belong_to_the_place_not_to_the_tile() -> None:
    request = asked("dare_linear", (50,), 2)
    whole = uniform(request, 1)
    for start, size in ((0, 50), (1, 3), (2, 48), (7, 10), (49, 1)):
        part = Tile(start, None, [np.empty(size)], KEY).uniform(1)
        assert part.tobytes() == whole[start : start + size].tobytes()
    assert not (uniform(request, 0) == whole).any()
    assert not (Tile(0, None, [np.empty(50)], seed_key(1, "w")).uniform(1) == whole).any()


# --------------------------------------------------------------------------- nearswap, fusion, selection


@given_(hnp.arrays(np.float64, (2, 9), elements=st.floats(-5, 5)), st.floats(0, 3))
@settings(max_examples=100, deadline=None)
def test_nearswap_goes_at_most_t_and_all_the_way_where_it_is_near(both: Any, t: float) -> None:
    base, x = both
    found = merged("nearswap", asked("nearswap", (9,), t=t), base, [x])
    near = np.abs(x - base) <= t
    assert (found[near] == x[near]).all()
    np.testing.assert_allclose(np.abs(found - base)[~near], t, atol=1e-14)


@pytest.mark.parametrize("apart", [1e-7, 1e-4, 0.1, 30.0, 2_000.0])
def test_the_divergence_of_rows_keeps_its_digits(apart: float) -> None:
    """Against 60 digits; the textbook's sum p log(p / q) has none at 1e-8."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((2, 30))
    x = base + apart * rng.standard_normal((2, 30))
    with mpmath.workdps(60):
        for row, other, found in zip(x, base, divergence(x, base), strict=True):
            p, q = ([mpmath.exp(mpmath.mpf(v)) for v in values.tolist()] for values in (row, other))
            zp, zq = mpmath.fsum(p), mpmath.fsum(q)
            exact = mpmath.fsum(a / zp * (mpmath.log(a / zp) - mpmath.log(b / zq)) for a, b in zip(p, q, strict=True))
            assert float(found[0]) == pytest.approx(float(exact), rel=1e-7)


def test_fusion_takes_each_element_from_one_side() -> None:
    request = asked("arcee_fusion", (50, 60))
    base, (x,) = tensors(request)
    found = merged("arcee_fusion", request, base, [x])
    taken = found == x
    assert (taken | (found == base)).all()
    assert 0 < taken.mean() < 0.5


def test_sce_weighs_by_energy_however_small_the_differences() -> None:
    """Finetuning moves weights by 1e-4 or so; squares of that still tell the models apart."""
    base, d = np.ones(100), np.full(100, 1e-6)
    found = merged("sce", asked("sce", (100,), 2), base, [base + d, base + 3 * d])
    np.testing.assert_allclose(found - base, (1 * 0.1 + 3 * 0.9) * d, rtol=1e-9)


def test_sce_selects_where_models_differ_most_and_nothing_where_they_are_equal() -> None:
    base = np.zeros(6)
    a, b = np.array([1.0, 2, 3, 4, 5, 6]), np.array([1.0, 2, 3, 4.5, 6, 8])
    found = merged("sce", asked("sce", (6,), 2, select_topk=0.67), base, [a, b])  # of the three that vary, two
    assert (found[:4] == 0).all()
    assert (found[4:] > 0).all()


# --------------------------------------------------------------------------------------------- the docs


def test_the_method_of_the_docs_is_a_method() -> None:
    """docs/adding_a_method.md: its code runs, merges as it says, and is short."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adding_a_method.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    method = scope["STRETCHED"]
    request = MergeSpec((300, 700), 3, False, {"strength": 1.5})
    _, inputs = tensors(request)
    found = run_steps(method, request, None, inputs)
    average = np.mean(inputs, axis=0)
    wanted = 1.5 * np.mean([np.linalg.norm(x) for x in inputs])
    np.testing.assert_allclose(found, average * wanted / np.linalg.norm(average), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="strength"):
        check_spec(method, MergeSpec((2,), 3, False, {"strength": -1}))
    assert len(blocks[0][blocks[0].index("def ") :].split("\n\n\n")[0].splitlines()) <= 20


def test_the_docs_name_every_method_and_parameter_with_its_default() -> None:
    """The table of docs/methods.md, and a paragraph for each with its source."""
    text = (DOCS / "methods.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = {name: row[3] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert table.keys() == METHODS.keys()
    for name, method in METHODS.items():
        documented = set(re.findall(r"`(\w+)`", table[name]))
        assert documented == method.shared.keys() | method.each.keys(), name
        for key, default in {**method.shared, **method.each}.items():
            shown = re.search(rf"`{key}` \(([^)]*)\)", table[name])
            assert (shown is None) == (default is REQUIRED), (name, key)
            if shown:
                assert same_default(shown[1], default, name), (name, key)
        assert re.search(rf"^\*\*.*`{name}`.*\*\*:", text, re.MULTILINE), name
        assert method.source in text, name


def same_default(shown: str, default: Any, name: str) -> bool:
    if "; linear: " in shown:
        shown = shown.split("; linear: ")[name.endswith("_linear")]
    words = {"true": True, "false": False, "none": None}
    found = words[shown] if shown in words else float(shown)
    return bool(found == default and isinstance(found, bool) == isinstance(default, bool))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_sums_that_are_0_but_for_rounding_elect_nobody(method: str) -> None:
    """Weights that add up to 0 in decimals, in any order of the models: the base stays."""
    base = np.full((3, 50), 0.02)
    d = np.linspace(1e-4, 3e-4, 150).reshape(3, 50)
    inputs = [base + d, base + d, base - d]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        weights = [(0.1, 0.2, 0.3)[k] for k in order]
        found = run_steps(
            STEPS_METHODS[method], given_of(method, base.shape, weights), base, [inputs[k] for k in order]
        )
        np.testing.assert_allclose(found, base, rtol=1e-15)


def given_of(method: str, shape: tuple[int, ...], weights: Sequence[float]) -> MergeSpec:
    found = STEPS_METHODS[method]
    each = {key: (value,) * len(weights) for key, value in found.each.items()} | {"weight": tuple(weights)}
    return MergeSpec(shape, len(weights), True, {**found.shared}, each)


def test_a_method_that_needs_no_pass_may_give_its_combine_at_once() -> None:
    twice: Any = lambda given: lambda tile: tile.inputs[0] * 2  # noqa: E731
    plain = Method("twice", "here", twice, base="none")
    given = MergeSpec((2, 3), 1, False)
    np.testing.assert_array_equal(run_steps(plain, given, None, [np.ones((2, 3))]), np.full((2, 3), 2.0))


def _one_sum(given: MergeSpec) -> Steps:
    yield Sums(lambda tile: [1.0], 2)
    return lambda tile: tile.inputs[0]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (lambda given: lambda tile: tile.inputs[0][:1], "gave 1 elements for a tile of 6"),
        (lambda given: None, "gave NoneType instead of a function"),
        (_one_sum, "gave 1 sums of a tile, 2 were announced"),
    ],
)
def test_a_method_of_ones_own_that_is_wrong_is_told_what_is(steps: Any, says: str) -> None:
    method = Method("wrong", "here", steps, base="none")
    with pytest.raises(ValueError, match=says):
        run_steps(method, MergeSpec((6,), 1, False), None, [np.ones(6)])


@pytest.mark.parametrize("p", [0.0, 2.0**-60, 0.1, 0.5, 1 / 3, 0.9, 1 - 2.0**-53])
@pytest.mark.parametrize("start", [0, 3, TILE + 1])
def test_random_bits_below_p_are_the_random_numbers_below_p(p: float, start: int) -> None:
    tile = Tile(start, None, [np.zeros(4_001)], KEY)
    numbers = tile.uniform(2)
    exact = [p, float(numbers[17]), float(numbers[18]), float(np.nextafter(numbers[19], 1))]
    for threshold in exact:  # one of the numbers itself, too: it is not below itself
        assert (tile.is_below(2, threshold) == (numbers < threshold)).all()


@given_(st.data())
@settings(max_examples=50, deadline=None)
def test_the_weights_of_the_models_that_agree_are_added_in_their_order(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 11))
    numbers = st.sampled_from([0.1, 0.2, 0.3, -0.3, 1 / 3, 1.0, 0.0, 1e-3, 7.0])
    weights = data.draw(st.lists(numbers, min_size=n, max_size=n))
    agreeing = [np.random.default_rng(i).random(300) < 0.5 for i in range(n)]
    found = _sum_of_agreeing(agreeing, weights)
    for element in range(300):
        total = 0.0
        for agrees, w in zip(agreeing, weights, strict=True):
            total += w if agrees[element] else 0.0
        assert found[element] == (total or 1.0)


@pytest.mark.parametrize("equal", [0.0, 0.02, 0.9])
def test_order_statistics_of_many_tiles_are_those_of_the_sorted_values(equal: float) -> None:
    """Also of values that are mostly one: all of them then fall into one bucket."""
    rng = np.random.default_rng(1)
    values = np.abs(rng.standard_normal(3 * TILE + 100)).astype(np.float32)
    values[rng.random(len(values)) < equal] = np.float32(0.25)
    values[:10] = -0.0
    ranks = sorted({0, 5, 1_000, len(values) // 2, len(values) - 1})
    running = start_pass(
        OrderStatistics(lambda tile: [tile.inputs[0]], [ranks]), MergeSpec(values.shape, 1, has_base=False), 4
    )
    again = True
    while again:
        for number, begin in enumerate(range(0, len(values), TILE)):
            running.add(number, Tile(begin, None, [values[begin : begin + TILE]]))
        again = running.settle()
    assert running.result == [np.sort(np.abs(values))[ranks].tolist()]
