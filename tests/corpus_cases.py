"""The cases of the corpus: how inputs are made, a command line and perhaps a recipe. Data only.

A command runs in the folder of its inputs, so all paths are relative. A new case is an entry here, and
`python tests/corpus.py --record`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from checkpoints import BF16
from corpus_inputs import (
    F16,
    F64,
    adapted,
    alike,
    angles,
    extremes,
    fp8,
    fp8_huge,
    fp8_in_groups,
    fp8_layouts,
    huge,
    large_vocabularies,
    llama,
    long_float64,
    mixed,
    models,
    odd_shapes,
    pickled_views,
    pickles,
    renamed,
    save,
    several_dtypes,
    single_files,
    tied,
    tiles,
    translators,
    two_stacks,
    unlike,
    vocabularies,
    with_side_files,
)


@dataclass(frozen=True)
class Case:
    """`make` puts the inputs into the working folder, `recipe` goes into recipe.yaml, then `command` is run.

    `apart`: in a process of its own, for a budget of memory that a process with torch has used up already.
    """

    make: Callable[[], None]
    command: str
    recipe: str = ""
    apart: bool = False


def pair(make: Callable[[], None], options: str = "") -> Case:
    return Case(make, f"slerp-merge base ft out {options}")


def by_recipe(make: Callable[[], None], recipe: str, options: str = "") -> Case:
    return Case(make, f"merge-tool run recipe.yaml out {options}", recipe)


def slerp(t: str, *, base: str = "base", more: str = "") -> str:
    """The recipe of `slerp-merge BASE ft`."""
    lines = ("merge_method: slerp", f"base_model: {base}", f"models: [{{model: {base}}}, {{model: ft}}]")
    return "\n".join([*lines, f"parameters: {{t: {t}}}", more])


def method(
    name: str, shared: str = "", *, each: str = "", weights: str = "0.7 0.5 0.3", base: bool = True,
    fts: str = "one two three", more: str = "",
) -> str:  # fmt: skip
    """The recipe of a method over some finetunes: each with its weight, if any, and the parameters `each`."""
    own = [f"weight: {weight}" for weight in weights.split()] or [""] * 3
    lines = [
        f"  - {{model: {ft}, parameters: {{{', '.join(filter(None, (weight, each)))}}}}}"
        for ft, weight in zip(fts.split(), own, strict=False)
    ]
    start = [f"merge_method: {name}", *(["base_model: base"] if base else []), f"parameters: {{{shared}}}", "models:"]
    return "\n".join([*start, *lines, more])


def mixed_models() -> None:
    for name in ("base", "ft"):
        save(name, mixed(name))


SEVERAL = models("base one two three", llama(large=True))
SEVERAL_BF16 = models("base one two three", llama(large=True), dtype=BF16)

# ------------------------------------------------------------------------------------------- pairs

PAIRS: Mapping[str, Case] = {
    # types of floats, buffers, t
    "defaults": pair(models("base ft")),
    "dtype-f64": pair(models("base ft", llama(large=True), dtype=F64), "--t 0.3"),
    "dtype-f32": pair(models("base ft", llama(large=True)), "--t 0.3"),
    "dtype-f16": pair(models("base ft", llama(large=True), dtype=F16), "--t 0.3"),
    "dtype-bf16": pair(models("base ft", llama(large=True), dtype=BF16), "--t 0.3"),
    "dtype-several": pair(several_dtypes, "--t 0.3"),
    "dtype-several-swapped": Case(several_dtypes, "slerp-merge ft base out --t 0.3 --dtype base"),
    "dtype-to-float32": pair(several_dtypes, "--t 0,0.7,1 --dtype float32"),
    "dtype-to-bfloat16": pair(models("base ft", dtype=F64), "--t 0,0.7,1 --dtype bfloat16"),
    "dtype-to-float16": pair(several_dtypes, "--t 0.7 --dtype float16"),
    "dtype-to-float64": pair(models("base ft", dtype=BF16), "--t 0.7 --dtype float64"),
    "t-several": pair(mixed_models, "--t 0:1:0.25"),
    "t-outside": pair(mixed_models, "--t -0.5,1.5 --extrapolate"),
    "t-outside-linear": pair(mixed_models, "--t -0.5,1.5 --extrapolate --method linear"),
    # values and shapes
    "shapes-odd-mixed": Case(odd_shapes, "slerp-merge base other out --t 0.4 --method linear"),
    "values-extreme": pair(extremes, "--t 0.25,0.75"),
    "values-extreme-linear": pair(extremes, "--t 0.25 --method linear --dtype float64"),
    "angles": pair(angles, "--t 0.3,0.8"),
    "angles-outside": pair(angles, "--t 1.25 --extrapolate"),
    "tiles": pair(tiles, "--t 0.3,0.6"),
    "tiles-float64": pair(long_float64, "--t 0.3,0.6"),
    "two-passes": Case(huge, "slerp-merge base ft out --t 0.3,0.6 --memory 64MB --jobs 1", apart=True),
    # schedules and choices
    "schedule-patterns": pair(
        models("base ft"),
        r"--t-for *.mlp.*=0.2 --t-for re:layers\.(1|2)\.=0.9 --t-for layers.3.=0 --t-for lm_head=1",
    ),
    "schedule-several-t": pair(models("base ft"), "--t 0.2,0.6 --t-for self_attn=0,0.5,0.3,0.7,1 --t-for norm=1,0"),
    "choice-patterns": pair(
        mixed_models, "--t 0.3 --only *self_attn* --only re:mlp|embed --exclude layers.2. --dtype float32"
    ),
    "tied-ft-files-ft": pair(tied(base=False, ft=True), "--t 0.3 --files-from ft"),
    "tied-base-files-ft": pair(tied(base=True, ft=False), "--t 0.3 --files-from ft"),
    "tied-both": pair(tied(base=True, ft=True), "--t 0.3"),
    "renamed-copies": pair(translators, "--t 0.3"),
    "renamed-linear": pair(renamed, "--t 0.3 --method linear --exclude shared"),
    # files
    "files-base": pair(with_side_files, "--t 0.3 --dtype float32"),
    "files-ft": pair(with_side_files, "--t 0.3 --files-from ft"),
    "shards": pair(models("base ft"), "--t 0.3,0.6 --max-shard-size 1500"),
    "shards-some": pair(several_dtypes, "--t 0.3 --max-shard-size 300kB --jobs 3"),
    "one-file": Case(
        single_files, "slerp-merge base.safetensors ft.safetensors out.safetensors --exclude left --report report.json"
    ),
    "one-file-of-folders": Case(models("base ft"), "slerp-merge base ft out.safetensors --t 0.3"),
    # pickles and adapters
    "pickles": pair(pickles, "--t 0.3 --max-shard-size 4kB"),
    "pickles-views": Case(pickled_views, "slerp-merge base.pt ft.ckpt out --t 0.3"),
    "adapter-of-base": Case(adapted, "slerp-merge base+lora ft out --t 0.3"),
    "adapter-alone": Case(adapted, "slerp-merge base lora out --t 0.3,1"),
    "adapter-float64": Case(lambda: adapted(dtype=F64), "slerp-merge base+lora2 ft out --t 0.3"),
    "adapter-both": Case(adapted, "slerp-merge base+lora base+lora2 out --t 0.3"),
    "adapter-settings": Case(adapted, "slerp-merge base lora3 out --t 0.6 --dtype float32"),
    "adapter-stacked": Case(adapted, "slerp-merge base+lora+lora2 ft+lora3 out --t 0.3"),
    "adapter-more-tokens": Case(adapted, "slerp-merge base+more base+more2 out --t 0.3"),
    "adapter-factors": Case(adapted, "slerp-merge more more2 out --t 0.3"),
    "adapter-pickled": Case(lambda: adapted(pickled=True), "slerp-merge base lora out --t 0.3"),
    # 8 bits with scales
    "fp8-in": pair(fp8(), "--t 0.3"),
    "fp8-in-plain-base": Case(fp8(), "slerp-merge plain base out --t 0.3 --method linear"),
    "fp8-in-layouts": pair(fp8_layouts, "--t 0.3 --dtype float32"),
    "fp8-in-groups": pair(fp8_in_groups, "--t 0.3"),
    "fp8-out": pair(fp8(), "--t 0,0.3,1 --dtype base"),
    "fp8-out-same-grid": pair(fp8(ft_block=(16, 8)), "--t 0,0.3,1 --dtype base"),
    "fp8-out-powers": Case(fp8(scales="F8_E8M0"), "slerp-merge base plain out --t 0.3 --dtype base"),
    "fp8-out-e5m2": Case(fp8(scales="BF16", codes="F8_E5M2"), "slerp-merge base plain out --t 0.3 --dtype base"),
    "fp8-out-f16-scales": pair(fp8(scales="F16"), "--t 0.7 --dtype base --exclude layers.1. --max-shard-size 3kB"),
    "fp8-out-groups": pair(fp8_in_groups, "--t 0.6 --dtype base"),
    "fp8-out-layouts": pair(fp8_layouts, "--t 0.3 --dtype base"),
    "fp8-out-five-reads": Case(fp8_huge, "slerp-merge base ft out --t 0.3 --dtype base --memory 64MB", apart=True),
    # vocabularies
    "vocab-base-files-ft": pair(vocabularies(), "--t 0.3 --vocab base --files-from ft"),
    "vocab-union-unigram": pair(vocabularies(kind="Unigram"), "--t 0.3,1 --vocab union"),
    "vocab-union-wordpiece": pair(vocabularies(kind="WordPiece"), "--t 0.3 --vocab union --dtype bfloat16"),
    "vocab-union-wordlevel": pair(vocabularies(kind="WordLevel"), "--t 0.3 --vocab union --method linear"),
}  # fmt: skip

# ----------------------------------------------------------------------------------------- methods

METHODS: Mapping[str, Case] = {
    "linear": by_recipe(SEVERAL_BF16, method("linear", base=False)),
    "linear-as-is": by_recipe(SEVERAL, method("linear", "normalize: false", base=False)),
    "nuslerp": by_recipe(SEVERAL, method("nuslerp", base=False, fts="one two")),
    "nuslerp-base": by_recipe(SEVERAL_BF16, method("nuslerp", fts="one two")),
    "nuslerp-rows": by_recipe(SEVERAL, method("nuslerp", "nuslerp_flatten: false", fts="one two")),
    "nuslerp-columns": by_recipe(
        SEVERAL, method("nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true", base=False, fts="one two")
    ),
    "multislerp": by_recipe(SEVERAL, method("multislerp", base=False)),
    "multislerp-base": by_recipe(SEVERAL_BF16, method("multislerp", "normalize_weights: false, eps: 1e-4")),
    "karcher": by_recipe(SEVERAL, method("karcher", "max_iter: 7, tol: 1e-9", weights="", base=False)),
    "model-stock": by_recipe(SEVERAL, method("model_stock", weights="")),
    "model-stock-rows": by_recipe(SEVERAL, method("model_stock", "filter_wise: true", weights="")),
    "passthrough": by_recipe(SEVERAL, method("passthrough", each="scale: 0.5", weights="", base=False, fts="one")),
    "task-arithmetic": by_recipe(SEVERAL_BF16, method("task_arithmetic", "lambda: 0.8")),
    "task-arithmetic-normalized": by_recipe(SEVERAL, method("task_arithmetic", "normalize: true")),
    "ties": by_recipe(SEVERAL_BF16, method("ties", each="density: 0.4")),
    "ties-rescaled": by_recipe(SEVERAL, method("ties", "rescale: true, normalize: false", each="density: 0.4")),
    "dare-linear": by_recipe(SEVERAL, method("dare_linear", each="density: 0.6"), "--seed 3"),
    "dare-ties": by_recipe(SEVERAL, method("dare_ties", "rescale: false, normalize: true", each="density: 0.6")),
    "breadcrumbs": by_recipe(SEVERAL, method("breadcrumbs", each="density: 0.6, gamma: 0.02")),
    "breadcrumbs-ties": by_recipe(
        SEVERAL, method("breadcrumbs_ties", "rescale: true", each="density: 0.6, gamma: 0.02")
    ),
    "della": by_recipe(SEVERAL, method("della", each="density: 0.6, epsilon: 0.1"), "--seed 7"),
    "della-linear": by_recipe(SEVERAL_BF16, method("della_linear", each="density: 0.6, epsilon: 0.1")),
    "sce": by_recipe(SEVERAL, method("sce", weights="")),
    "sce-topk": by_recipe(SEVERAL, method("sce", "select_topk: 0.4", weights="")),
    "nearswap": by_recipe(SEVERAL, method("nearswap", "t: 0.002", weights="", fts="one")),
    "arcee-fusion": by_recipe(SEVERAL, method("arcee_fusion", weights="", fts="one")),
    "values-extreme": by_recipe(extremes, method("multislerp", base=False, fts="base ft")),
    "angles-nuslerp": by_recipe(angles, method("nuslerp", base=False, fts="base ft")),
    "angles-nuslerp-base": by_recipe(angles, method("nuslerp", fts="ft other")),
    "angles-multislerp": by_recipe(angles, method("multislerp", base=False, fts="base ft")),
    "angles-karcher": by_recipe(angles, method("karcher", weights="", base=False, fts="base ft other")),
    "angles-model-stock": by_recipe(angles, method("model_stock", weights="", fts="ft other")),
    "densities-ties": by_recipe(SEVERAL, method("ties", each="density: [0, 1, 0.4]")),
    "densities-breadcrumbs": by_recipe(SEVERAL, method("breadcrumbs", each="density: [1, 0.5, 0.1], gamma: 0.2")),
    "densities-della": by_recipe(SEVERAL, method("della", each="density: [1, 0, 0.4], epsilon: 0"), "--seed 2"),
    "tiles-nuslerp": by_recipe(long_float64, method("nuslerp", fts="ft other")),
    "tiles-multislerp": by_recipe(long_float64, method("multislerp", base=False, fts="base ft other")),
    "tiles-karcher": by_recipe(long_float64, method("karcher", weights="", base=False, fts="base ft other")),
    "tiles-model-stock": by_recipe(long_float64, method("model_stock", weights="", fts="ft other")),
    "tiles-ties": by_recipe(long_float64, method("ties", "rescale: true", each="density: 0.3", fts="ft other")),
    "tiles-sce": by_recipe(long_float64, method("sce", weights="", fts="ft other")),
    "shapes-odd": by_recipe(odd_shapes, method("della", each="density: 0.6", fts="ft other"), "--seed 1"),
    "two-passes": Case(
        huge,
        "merge-tool run recipe.yaml out --memory 64MB --jobs 1",
        method("ties", "rescale: true", each="density: 0.3", fts="ft other"),
        apart=True,
    ),
}

# ----------------------------------------------------------------------------------------- recipes

STACK = """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 3]}]
  - sources: [{model: one, layer_range: [1, 4], parameters: {scale: [{filter: up_proj, value: [0, 1]}, {value: 1}]}}]
"""
STACK_OF_SLERPS = """
merge_method: slerp
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: one, layer_range: [0, 2]}]
    parameters: {t: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.3}]}
  - sources: [{model: one, layer_range: [1, 4]}, {model: two, layer_range: [0, 3]}]
    base_model: two
parameters: {t: 0.6}
dtype: bfloat16
"""
SAME_MODEL_TWICE = """
merge_method: linear
slices:
  - sources:
      - {model: base, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: base, layer_range: [2, 4], parameters: {weight: [3, 0.5]}}
"""
MODULES = """
merge_method: linear
modules:
  visual: {models: [{model: base, parameters: {weight: 1}}, {model: ft, parameters: {weight: [0, 2]}}]}
  model.layers:
    slices:
      - sources: [{model: base, layer_range: [0, 2], parameters: {weight: 1}}]
      - sources: [{model: ft, layer_range: [1, 4], parameters: {weight: 0.5}}]
    parameters: {normalize: {filter: layers.3., value: false}}
"""
FILTERS = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters:
      weight: [{filter: layers.1, value: 0.1}, {filter: mlp, value: [0.2, 0.8]}, {value: 0.6}]
      density: 0.5
  - model: two
    parameters: {density: [{filter: embed, value: 1}, {filter: '*', value: [0.9, 0.2]}]}
parameters: {weight: 0.3, lambda: [{filter: lm_head, value: 0.7}, {value: [1, 0.5]}], normalize: [true, false]}
dtype: float32
out_dtype: bfloat16
"""
TOKENS = """
merge_method: linear
base_model: base
models:
  - {model: base, parameters: {weight: 1}}
  - {model: ft, parameters: {weight: 0.5}}
  - {model: third, parameters: {weight: 0.25}}
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    d: {source: third}
    ab: {source: {kind: model_token, model: ft, token: ad}, force: true}
    a: {source: {kind: model_token, model: third, token_id: 0}}
    c: {source: {kind: zero}, force: true}
    e: {source: {kind: zero}}
    brand new: {source: {kind: model_token, model: base, token: <s>}}
    of nobody: {}
"""
ADAPTERS = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: {model: {path: base}, lora: {path: lora}}, parameters: {weight: 0.6}}
  - {model: ft+lora3, parameters: {weight: 0.2}}
"""

RECIPES: Mapping[str, Case] = {
    # layers, filters, modules
    "stack": by_recipe(models("base one"), STACK),
    "stack-of-slerps": by_recipe(models("base one two"), STACK_OF_SLERPS, "--max-shard-size 4kB"),
    "stack-of-one": by_recipe(models("base"), SAME_MODEL_TWICE),
    "modules": by_recipe(two_stacks, MODULES),
    "filters": by_recipe(models("base one two"), FILTERS),
    # vocabularies and templates
    "tokens": by_recipe(vocabularies(), TOKENS),
    "tokens-third": by_recipe(
        vocabularies(dtype=BF16), method("task_arithmetic", fts="ft third", more="tokenizer_source: third")
    ),
    "tokens-base": by_recipe(vocabularies(), method("ties", fts="ft third", more="tokenizer_source: base")),
    "tokens-union": by_recipe(vocabularies(), method("multislerp", fts="ft third", more="tokenizer_source: union")),
    "tokens-bare": by_recipe(
        vocabularies(), method("linear", base=False, fts="base ft bare", more="tokenizer_source: union")
    ),
    "tokens-alike": by_recipe(alike, method("ties", fts="one two", more="tokenizer_source: union")),
    "template-auto": by_recipe(alike, method("ties", fts="one two", more="chat_template: auto")),
    "template-named": by_recipe(alike, method("ties", fts="one two", more="chat_template: chatml")),
    "template-own": by_recipe(
        alike, method("ties", fts="one two", more="chat_template: '{{ messages[0].content }} ü'")
    ),
    # inputs and outputs
    "recipe-adapters": by_recipe(adapted, ADAPTERS),
    "recipe-choice": by_recipe(
        SEVERAL, method("karcher", weights="", base=False), "--only re:mlp|embed --exclude *.2.*"
    ),
    "recipe-dtype": by_recipe(SEVERAL, method("linear", base=False, more="dtype: torch.float16")),
    "recipe-dtypes": by_recipe(several_dtypes, method("linear", base=False, fts="base ft")),
    "recipe-files": by_recipe(with_side_files, method("task_arithmetic", fts="ft", more="dtype: float32")),
    "recipe-fp8": by_recipe(fp8(), method("linear", base=False, fts="base ft plain")),
    "recipe-missing": by_recipe(unlike, method("dare_ties", fts="ft third"), "--on-missing base --on-mismatch base"),
    "recipe-one-file": Case(
        SEVERAL, "merge-tool run recipe.yaml out.safetensors --report report.json", method("linear", base=False)
    ),
}

# ------------------------------------------------------------------------------------------- twins

LINEAR = """
merge_method: linear
models: [{model: base, parameters: {weight: 0.7}}, {model: ft, parameters: {weight: 0.3}}]
"""
LINEAR_GRADIENT = """
merge_method: linear
models:
  - {model: base, parameters: {weight: [{filter: mlp, value: [0.9, 0.4, 1]}, {value: 0.7}]}}
  - {model: ft, parameters: {weight: [{filter: mlp, value: [0.1, 0.6, 0]}, {value: 0.3}]}}
"""
LINEAR_OUTSIDE = LINEAR.replace("0.7", "-0.5").replace("0.3", "1.5")
GRADIENT = "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.4}]"


def twins(make: Callable[[], None], options: str, recipe: str, same: str = "") -> tuple[Case, Case]:
    """A merge by the command with `options`, and by `recipe`; both with the options `same`."""
    return pair(make, f"{options} {same}"), by_recipe(make, recipe, same)


# One merge, asked for in two ways: NAME-pair by the command, NAME-yaml by a recipe. Both have the same bytes.
TWINS: Mapping[str, tuple[Case, Case]] = {
    "linear": twins(mixed_models, "--method linear --t 0.3", LINEAR),
    "linear-bf16": twins(models("base ft", llama(large=True), dtype=BF16), "--method linear --t 0.3", LINEAR),
    "linear-odd-shapes": twins(odd_shapes, "--method linear --t 0.3", LINEAR),
    "linear-extreme": twins(extremes, "--method linear --t 0.3", LINEAR),
    "linear-gradient": twins(mixed_models, "--method linear --t 0.3 --t-for mlp=0.1,0.6,0", LINEAR_GRADIENT),
    "linear-outside": twins(mixed_models, "--method linear --t 1.5 --extrapolate", LINEAR_OUTSIDE),
    "slerp": twins(mixed_models, "--t 0.3", slerp("0.3")),
    "several": (
        pair(mixed_models, "--t 0,0.3,0.6"),
        by_recipe(mixed_models, slerp("0.5"), "--set t=0,0.3,0.6"),
    ),
    "slerp-angles": twins(angles, "--t 0.3", slerp("0.3")),
    "slerp-odd-shapes": twins(odd_shapes, "--t 0.6", slerp("0.6")),
    "gradient": twins(
        mixed_models, "--t 0.4 --t-for self_attn=0,0.5,0.3,0.7,1 --t-for mlp=1,0", slerp(GRADIENT)
    ),
    "choice": twins(
        mixed_models, "--t 0.3 --dtype float16", slerp("0.3", more="dtype: float16"),
        "--only self_attn --only embed --exclude layers.1.",
    ),
    "missing": twins(unlike, "--t 0.3", slerp("0.3"), "--on-missing base --on-mismatch base"),
    "tied-head": twins(tied(base=False, ft=True), "--t 0.6", slerp("0.6")),
    "tied-embedding": twins(tied(base=True, ft=False), "--t 0.6", slerp("0.6")),
    "prefixes": twins(renamed, "--t 0.6", slerp("0.6")),
    "adapter": (
        Case(adapted, "slerp-merge base+lora ft out --t 0.6"),
        by_recipe(adapted, slerp("0.6", base="base+lora")),
    ),
    "pickle": twins(lambda: pickles(0), "--t 0.6", slerp("0.6")),
    "fp8": twins(fp8(), "--t 0.6", slerp("0.6")),
    "fp8-out": twins(fp8(ft_block=(16, 8)), "--t 0.3", slerp("0.3"), "--dtype base"),
    "fp8-out-linear": twins(fp8(), "--method linear --t 0.3", LINEAR, "--dtype base --exclude layers.1."),
    "side-files": twins(with_side_files, "--t 0.6", slerp("0.6")),
    "side-files-ft": twins(with_side_files, "--t 0.6", slerp("0.6"), "--files-from ft"),
    "many-shards": twins(models("base ft"), "--t 0.6", slerp("0.6"), "--max-shard-size 2kB"),
    "vocab-base": twins(vocabularies(), "--t 0.3 --vocab base", slerp("0.3", more="tokenizer_source: base")),
    "vocab-ft": twins(vocabularies(), "--t 0.3 --vocab ft", slerp("0.3", more="tokenizer_source: ft")),
    "vocab-union": twins(vocabularies(), "--t 0.3 --vocab union", slerp("0.3", more="tokenizer_source: union")),
    "vocab-padded": twins(
        vocabularies(), "--t 0.3 --vocab union --pad-vocab-to-multiple-of 32",
        slerp("0.3", more="tokenizer: {source: union, pad_to_multiple_of: 32}"),
    ),
    "vocab-tied": twins(
        vocabularies(head=False, dtype=BF16), "--t 0.3 --vocab union", slerp("0.3", more="tokenizer_source: union")
    ),
    "vocab-large": twins(large_vocabularies, "--t 0.3 --vocab union", slerp("0.3", more="tokenizer_source: union")),
}  # fmt: skip

CASES: Mapping[str, Case] = {
    **PAIRS,
    **{f"method-{name}": case for name, case in METHODS.items()},
    **RECIPES,
    **{f"{name}-{way}": case for name, both in TWINS.items() for way, case in zip(("pair", "yaml"), both, strict=True)},
}
