"""Our merges against mergekit 0.1.5's, recipe by recipe: how many units in the last place apart, how long, how much
memory.

    python bench/parity.py --mergekit PATH/TO/python [--dtypes bfloat16 float32] [--only ties] [--folder DIR]

Makes four tiny random Llama-shaped models (base and three finetunes), runs a matrix of recipes (methods x dtypes x
gradients x slices) through `merge-tool run` and `mergekit-yaml`, and prints a table: the largest and the mean
difference over all elements in ulps of the output's dtype, the largest in ulps of its tensor's root mean square (an
element near 0 has tiny ulps), the share of elements that differ, seconds and peak resident memory of both. Random
methods cannot agree element by element: for them the table has the share that moved, and tests compare the rest as
distributions. docs/mergekit.md explains each difference above rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, VOCAB, LAYERS, HEADS = 256, 512, 1024, 4, 4
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@dataclass
class Run:
    """One run of one tool: seconds, peak resident bytes, and what it complained of if it failed."""

    seconds: float
    peak: int
    error: str = ""


# ------------------------------------------------------------------------------------------ the models


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for n in range(LAYERS):
        for part in "qkvo":
            yield f"model.layers.{n}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        yield f"model.layers.{n}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"model.layers.{n}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"model.layers.{n}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"model.layers.{n}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{n}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def make_models(folder: Path, dtype: str) -> list[Path]:
    """A base and three finetunes a tenth of its size away."""
    found = []
    for k in range(4):
        path = folder / f"{'base' if k == 0 else f'ft{k}'}"
        found.append(path)
        if path.exists():
            continue
        path.mkdir(parents=True)
        common, own = np.random.default_rng(0), np.random.default_rng(100 + k)
        tensors = {}
        for name, shape in shapes():
            values = 0.02 * common.standard_normal(shape)
            tensors[name] = (values + (0.002 * own.standard_normal(shape) if k else 0.0)).astype(DTYPES[dtype])
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": VOCAB,
            "torch_dtype": dtype,
        }
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return found


# ------------------------------------------------------------------------------------------ the recipes


def recipes(base: Path, fts: list[Path], dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The matrix: a name, and mergekit's YAML as a mapping (JSON is YAML)."""
    gradient = {
        "t": [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ]
    }

    def models(*each: dict[str, Any], of: list[Path]) -> list[dict[str, Any]]:
        return [{"model": str(path), "parameters": dict(p)} for path, p in zip(of, each, strict=False)]

    def recipe(method: str, listed: Any, needs_base: bool = True, **rest: Any) -> dict[str, Any]:
        found = {"merge_method": method, "models": listed, "dtype": dtype, **rest}
        return found | ({"base_model": str(base)} if needs_base else {})

    pair = [{"model": str(base)}, {"model": str(fts[0])}]
    yield "slerp", recipe("slerp", pair, parameters={"t": 0.4})
    yield "slerp, gradients and filters", recipe("slerp", pair, parameters=gradient)
    yield "linear", recipe("linear", models({"weight": 0.3}, {"weight": 0.5}, of=fts), needs_base=False)
    yield (
        "linear, weights not normalised",
        recipe(
            "linear",
            models({"weight": 0.3}, {"weight": 0.5}, of=fts),
            needs_base=False,
            parameters={"normalize": False},
        ),
    )
    yield (
        "linear, gradient of weights",
        recipe("linear", models({"weight": [0, 1]}, {"weight": [1, 0]}, of=fts), needs_base=False),
    )
    weights = models({"weight": 0.4}, {"weight": 0.6}, of=fts)
    yield "nuslerp", recipe("nuslerp", weights, needs_base=False)
    yield "nuslerp of task vectors", recipe("nuslerp", weights)
    for rows in (True, False):
        name = f"nuslerp, nuslerp_flatten false, row_wise {str(rows).lower()}"
        yield (
            name,
            recipe(
                "nuslerp",
                weights,
                needs_base=False,
                parameters={"nuslerp_flatten": False, "nuslerp_row_wise": rows},
            ),
        )
    three = models({"weight": 0.4}, {"weight": 0.3}, {"weight": 0.3}, of=fts)
    yield "multislerp", recipe("multislerp", three, needs_base=False)
    yield "karcher", recipe("karcher", [{"model": str(p)} for p in fts], needs_base=False)
    for name, parameters in (("ram", {"epsilon": 2e-3}), ("ramplus_tl", {"epsilon": 2e-3, "r": 0.3, "alpha": 0.8})):
        yield name, recipe(name, [{"model": str(p)} for p in fts], parameters=parameters)
    yield "model_stock", recipe("model_stock", [{"model": str(p)} for p in fts])
    yield (
        "model_stock, filter_wise",
        recipe("model_stock", [{"model": str(p)} for p in fts], parameters={"filter_wise": True}),
    )
    yield "task_arithmetic", recipe("task_arithmetic", three, parameters={"lambda": 0.9})
    dense = [{"weight": 0.4, "density": 0.5}, {"weight": 0.3, "density": 0.3}, {"weight": 0.3, "density": [0.2, 0.8]}]
    for method in ("ties", *RANDOM):
        yield method, recipe(method, models(*dense, of=fts))
    crumbs = [{**each, "gamma": 0.01} for each in dense]
    yield "breadcrumbs", recipe("breadcrumbs", models(*crumbs, of=fts))
    yield "breadcrumbs_ties", recipe("breadcrumbs_ties", models(*crumbs, of=fts))
    yield "sce", recipe("sce", [{"model": str(p)} for p in fts], parameters={"select_topk": 0.3})
    yield "nearswap", recipe("nearswap", [{"model": str(fts[0])}], parameters={"t": 0.001})
    yield "arcee_fusion", recipe("arcee_fusion", [{"model": str(fts[0])}])
    stack = [
        {"sources": [{"model": str(base), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(fts[0]), "layer_range": [1, 4]}]},
    ]
    yield "passthrough, layers stacked", {"merge_method": "passthrough", "slices": stack, "dtype": dtype}
    sliced = [
        {"sources": [{"model": str(m), "layer_range": [0, 2]} for m in (base, fts[0])]},
        {"sources": [{"model": str(m), "layer_range": [2, 4]} for m in (base, fts[1])]},
    ]
    yield (
        "slerp in two slices, gradient in each",
        {
            "merge_method": "slerp",
            "slices": sliced,
            "base_model": str(base),
            "parameters": {"t": [0.2, 0.8]},
            "dtype": dtype,
        },
    )


# ------------------------------------------------------------------------------------------ the runs


def measure(command: list[str]) -> Run:
    """Run a command to its end. Its peak is what it says of itself, else what the system says (wait4: at least what
    this process holds)."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    printed, complaint = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    error = complaint.strip().splitlines()[-1] if status != 0 and complaint.strip() else "failed" if status else ""
    peak = json.loads(printed)["peak_bytes"] if not error and printed.startswith("{") else usage.ru_maxrss * 1024
    return Run(time.monotonic() - started, peak, error)


def load(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def ulps(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many numbers of the dtype lie between, element by element."""
    unsigned = {2: np.uint16, 4: np.uint32}[ours.dtype.itemsize]
    top = 1 << (8 * ours.dtype.itemsize - 1)
    a, b = (np.asarray(v).view(unsigned).astype(np.int64) for v in (ours, theirs))
    a, b = (np.where(v >= top, top - v, v) for v in (a, b))
    return np.abs(a - b)


def compare(ours: Path, theirs: Path, base: Path) -> str:
    a, b = load(ours), load(theirs)
    if a.keys() != b.keys():
        return f"other tensors: {len(a.keys() - b.keys())} only ours, {len(b.keys() - a.keys())} only theirs"
    if wrong := [n for n in a if a[n].shape != b[n].shape or a[n].dtype != b[n].dtype]:
        return f"{len(wrong)} tensors of another shape or dtype, {wrong[0]}"
    distance = np.concatenate([ulps(a[n], b[n]).ravel() for n in a])
    share = float((distance > 0).mean())
    scaled = max(of_size(a[n], b[n]) for n in a)
    return f"{distance.max():,} | {distance.mean():.3g} | {scaled:,.2g} | {100 * share:.3g} %"


def of_size(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """The largest difference of a tensor in ulps of its root mean square: what is near 0 counts by its tensor."""
    x, y = ours.astype(np.float64), theirs.astype(np.float64)
    size = float(np.sqrt(np.mean(x * x)))
    step = float(ml_dtypes.finfo(ours.dtype).eps) * 2.0 ** np.floor(np.log2(size)) if size else 1.0
    return float(np.abs(x - y).max()) / step


def kept(folder: Path, base: Path) -> float:
    """The share of elements that differ from the base's."""
    merged, start = load(folder), load(base)
    moved = sum(int((merged[n] != start[n]).sum()) for n in merged)
    return moved / sum(v.size for v in merged.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="the python of an environment that has mergekit 0.1.5")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--only", help="only recipes whose name has this in it")
    parser.add_argument("--folder", type=Path, default=Path("bench-data/parity"))
    args = parser.parse_args()
    tool = str(Path(args.mergekit).with_name("mergekit-yaml"))
    print(
        "| recipe | dtype | largest, ulp | mean, ulp | largest, ulp of RMS | differ | ours: s, MB | mergekit: s, MB |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for dtype in args.dtypes:
        base, *fts = make_models(args.folder.absolute() / dtype, dtype)
        for number, (name, recipe) in enumerate(recipes(base, fts, dtype)):
            if args.only and args.only not in name:
                continue
            work = args.folder.absolute() / f"work-{number}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            (work / "recipe.yaml").write_text(json.dumps(recipe, indent=1))
            outs = work / "ours", work / "theirs"
            ours = measure(
                [sys.executable, "-m", "merge_tool", "run", str(work / "recipe.yaml"), str(outs[0]), "--json"]
            )
            theirs = measure([tool, str(work / "recipe.yaml"), str(outs[1]), "--random-seed", "1"])
            if ours.error or theirs.error:
                result = f"{ours.error or 'ran'} / {theirs.error or 'ran'} | | | "
            elif recipe["merge_method"] in RANDOM:
                shares = " / ".join(f"{100 * kept(out, base):.2f} %" for out in outs)
                result = f"random: moved {shares} | | | "
            else:
                result = compare(*outs, base)
            times = " | ".join(f"{run.seconds:.1f}, {run.peak / 1e6:.0f}" for run in (ours, theirs))
            print(f"| {name} | {dtype} | {result} | {times} |", flush=True)
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
