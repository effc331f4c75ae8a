"""The registry of methods: names, parameters and defaults as mergekit has them. Nothing else lists methods by name.

The functions live in `geometric` (inner products), `means` (of many models, from a table over pairs), `sparse` (masks
and thresholds over a tensor) and `rowwise` (rows and elements); a new method is a function there and an entry here.
`docs/methods.md` has a paragraph on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_tool.methods import geometric, means, rowwise, sparse
from merge_tool.methods.steps import FLAT, REQUIRED, ROWS, TILE, MergeSpec, Method

_HISTOGRAM_BYTES = 8 << 16  # a histogram of one half of float32 bit patterns; one per array, and one per requested rank

_FRACTIONS = frozenset({"density", "gamma"})

_SUM = {"normalize": False, "lambda": 1.0}  # parameters of all task-vector methods
_DELTA = {"weight": REQUIRED}
_MASKED = frozenset({"density", "gamma", "rescale"})


def _always(spec: MergeSpec) -> bool:
    return True


def _linear_copies(spec: MergeSpec) -> bool:
    return bool(spec["normalize"]) or sum(spec["weight"]) == 1


def _multislerp_copies(spec: MergeSpec) -> bool:
    return spec.has_base or bool(spec["normalize_weights"]) or sum(spec["weight"]) == 1


def _passthrough_copies(spec: MergeSpec) -> bool:
    return spec["scale"][0] is None or spec["scale"][0] == 1


def _rows_unless_flat(spec: MergeSpec) -> str:
    return FLAT if spec["nuslerp_flatten"] or spec["nuslerp_row_wise"] else ROWS


def _columns_bytes(spec: MergeSpec) -> int:
    per_column = 0 if spec["nuslerp_flatten"] or not spec["nuslerp_row_wise"] else 20 * 8
    return per_column * geometric.num_columns(spec)


def _divides_by_sum(shared: Mapping[str, Any]) -> bool:
    return bool(shared["normalize"])


def _table_bytes(spec: MergeSpec) -> int:
    """The sums over every pair of models, of every tile."""
    return 8 * (spec.num_inputs * (spec.num_inputs + 1) // 2) * (spec.numel // TILE + 1)


def _histograms(per_input: int, once: int = 0) -> Any:
    return lambda spec: min(_HISTOGRAM_BYTES, 8 * spec.numel) * (per_input * spec.num_inputs + once)


METHODS: Mapping[str, Method] = {
    "slerp": Method(
        weights=geometric.slerp,
        summary="spherical linear interpolation",
        source="https://doi.org/10.1145/325334.325242",
        shared={"t": REQUIRED},
        fractions=frozenset({"t"}),
        inputs=(2, 2),
        base="first",
        copies_equal=_always,
    ),
    "linear": Method(
        steps=geometric.linear,
        weights=geometric.linear_of_two,
        coefficients=geometric.shares,
        summary="weighted average",
        source="https://arxiv.org/abs/2203.05482",
        shared={"normalize": True},
        each={"weight": REQUIRED},
        base="none",
        copies_equal=_linear_copies,
        divides_weights=lambda shared: bool(shared["normalize"]),
    ),
    "nuslerp": Method(
        steps=geometric.nuslerp,
        summary="spherical interpolation of two models or of their differences from a base, by weight",
        source="https://doi.org/10.1145/325334.325242",
        shared={"nuslerp_flatten": True, "nuslerp_row_wise": False},
        each={"weight": REQUIRED},
        inputs=(2, 2),
        base="optional",
        granularity=_rows_unless_flat,
        divides_weights=lambda shared: True,
        copies_equal=_always,
        state_bytes=_columns_bytes,
    ),
    "multislerp": Method(
        steps=means.multislerp,
        summary="the direction of the averaged unit vectors, at the average norm",
        source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        shared={"normalize_weights": True, "eps": 1e-8},
        each={"weight": REQUIRED},
        base="optional",
        copies_equal=_multislerp_copies,
        divides_weights=lambda shared: bool(shared["normalize_weights"]),
    ),
    "karcher": Method(
        steps=means.karcher,
        summary="the mean on the sphere (Karcher, Frechet), at the average norm",
        source="https://doi.org/10.1002/cpa.3160300502",
        shared={"max_iter": 10, "tol": 1e-5},
        base="none",
        copies_equal=_always,
    ),
    "geometric_median": Method(
        steps=means.geometric_median,
        summary="the point with the least sum of distances to the models",
        source="https://doi.org/10.1073/pnas.97.4.1423",
        shared={"max_iter": 1_000, "tol": 1e-12},
        each={"weight": 1.0},
        inputs=(3, 1_000),
        base="none",
        copies_equal=_always,
        state_bytes=_table_bytes,
    ),
    "warp": Method(
        steps=geometric.warp,
        summary="base plus eta times the spherical mean of the differences from it",
        source="https://arxiv.org/abs/2406.16768",
        shared={"eta": 1.0},
        each={"weight": 1.0},
        copies_equal=_always,
        divides_weights=lambda shared: True,
        state_bytes=_table_bytes,
    ),
    "model_stock": Method(
        steps=geometric.model_stock,
        summary="between base and average, as far as the models' differences from the base agree",
        source="https://arxiv.org/abs/2403.19522",
        shared={"filter_wise": False},
        inputs=(2, 1_000),
        granularity=lambda spec: ROWS if spec["filter_wise"] else FLAT,
        copies_equal=_always,
    ),
    "passthrough": Method(
        steps=geometric.passthrough,
        summary="one model as it is, or scaled",
        source="https://arxiv.org/abs/2312.15166",
        each={"scale": None},
        inputs=(1, 1),
        base="none",
        copies_equal=_passthrough_copies,
    ),
    "task_arithmetic": Method(
        steps=sparse.task_arithmetic,
        summary="base plus the weighted sum of the differences from it",
        source="https://arxiv.org/abs/2212.04089",
        shared=_SUM,
        each=_DELTA,
        copies_equal=_always,
        divides_weights=_divides_by_sum,
    ),
    "ties": Method(
        steps=sparse.ties,
        summary="each model's largest differences from the base, averaged where they agree in sign",
        source="https://arxiv.org/abs/2306.01708",
        shared={**_SUM, "normalize": True, "rescale": False},
        each={**_DELTA, "density": 1.0},
        fractions=_FRACTIONS,
        copies_equal=_always,
        passes_by=_MASKED,
        state_bytes=_histograms(2),
    ),
    "dare_linear": Method(
        steps=sparse.dare_linear,
        summary="differences dropped at random, the rest scaled up, summed",
        source="https://arxiv.org/abs/2311.03099",
        shared={**_SUM, "rescale": True},
        each={**_DELTA, "density": 1.0},
        fractions=_FRACTIONS,
        copies_equal=_always,
        divides_weights=_divides_by_sum,
    ),
    "dare_ties": Method(
        steps=sparse.dare_ties,
        summary="differences dropped at random, the rest scaled up, summed where they agree in sign",
        source="https://arxiv.org/abs/2311.03099",
        shared={**_SUM, "rescale": True},
        each={**_DELTA, "density": 1.0},
        fractions=_FRACTIONS,
        copies_equal=_always,
    ),
    "breadcrumbs": Method(
        steps=sparse.breadcrumbs,
        summary="differences without the smallest and the very largest, summed",
        source="https://arxiv.org/abs/2312.06795",
        shared={**_SUM, "rescale": False},
        each={**_DELTA, "density": 1.0, "gamma": 0.01},
        fractions=_FRACTIONS,
        copies_equal=_always,
        passes_by=_MASKED,
        state_bytes=_histograms(3),
        divides_weights=_divides_by_sum,
    ),
    "breadcrumbs_ties": Method(
        steps=sparse.breadcrumbs_ties,
        summary="differences without the smallest and the very largest, summed where they agree in sign",
        source="https://arxiv.org/abs/2312.06795",
        shared={**_SUM, "rescale": False},
        each={**_DELTA, "density": 1.0, "gamma": 0.01},
        fractions=_FRACTIONS,
        copies_equal=_always,
        passes_by=_MASKED,
        state_bytes=_histograms(3),
    ),
    "della": Method(
        steps=rowwise.della,
        summary="differences dropped at random, the small ones of a row more often, averaged where they agree in sign",
        source="https://arxiv.org/abs/2406.11617",
        shared={**_SUM, "normalize": True, "rescale": True},
        each={**_DELTA, "density": 1.0, "epsilon": 0.15},
        fractions=_FRACTIONS,
        granularity=lambda spec: ROWS,
        copies_equal=_always,
    ),
    "della_linear": Method(
        steps=rowwise.della_linear,
        summary="differences dropped at random, the small ones of a row more often, summed",
        source="https://arxiv.org/abs/2406.11617",
        shared={**_SUM, "rescale": True},
        each={**_DELTA, "density": 1.0, "epsilon": 0.15},
        fractions=_FRACTIONS,
        granularity=lambda spec: ROWS,
        copies_equal=_always,
        divides_weights=_divides_by_sum,
    ),
    "sce": Method(
        steps=sparse.sce,
        summary="where the models vary most, differences weighted by energy and averaged where they agree in sign",
        source="https://arxiv.org/abs/2408.07990",
        shared={"select_topk": 1.0},
        fractions=frozenset({"select_topk"}),
        copies_equal=_always,
        passes_by=frozenset({"select_topk"}),
        state_bytes=_histograms(0, 2),
    ),
    "nearswap": Method(
        steps=rowwise.nearswap,
        summary="the base moved towards the model by at most t",
        source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        shared={"t": REQUIRED},
        inputs=(1, 1),
        copies_equal=_always,
    ),
    "arcee_fusion": Method(
        steps=rowwise.arcee_fusion,
        summary="the model's values where they are unusually important, else the base's",
        source="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
        inputs=(1, 1),
        granularity=lambda spec: ROWS,
        copies_equal=_always,
        state_bytes=_histograms(0, 4),
    ),
    "ram": Method(
        steps=sparse.ram,
        summary="differences averaged over the models that have one at the element",
        source="https://arxiv.org/abs/2601.13572",
        shared={"epsilon": 1e-5},
        copies_equal=_always,
    ),
    "ramplus_tl": Method(
        steps=sparse.ramplus_tl,
        summary="differences averaged over the models that have one, differences of a single model scaled up",
        source="https://arxiv.org/abs/2601.13572",
        shared={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
        copies_equal=_always,
    ),
}
