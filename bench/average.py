"""Paired benchmark of merge-tool average: three windows of a run's checkpoints, against torch and mergekit.

    python bench/average.py [--checkpoints 16] [--megabytes 700] [--folder DIR] [--rounds 2] [--mergekit PATH/TO/python]

Makes checkpoints of one layout in bfloat16, then averages the last quarter, half and all of them, interleaved,
forwards and backwards (ABBA), each time with the inputs dropped from the page cache:

    average      merge-tool average --window A,B,C: one reading for all three
    one window   merge-tool average --window C: what two more windows cost
    torch        load_file and add in float32, a program for each window, as it is usually written
    torch once   the same with three sums and one reading
    mergekit     mergekit 0.1.5's linear, a run for each window (when an environment that has it is named)

and prints wall time, CPU time and peak resident memory, and their ratios to `average`. Only ratios of one run mean
anything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from merge import Run, drop_from_cache, measure

COLUMNS = 2_048  # of every matrix, and its rows
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": COLUMNS,
    "intermediate_size": COLUMNS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": COLUMNS,
    "torch_dtype": "bfloat16",
}
TORCH = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(2)
run, out, *windows = sys.argv[1:]
windows = [int(window) for window in windows]
paths = sorted(Path(run).glob("step-*"))[-max(windows):]
sums = [{} for _ in windows]
for number, path in enumerate(paths):
    for name, value in load_file(path / "model.safetensors").items():
        for window, total in zip(windows, sums):
            if number < len(paths) - window:
                continue
            if name in total:
                total[name] += value
            else:
                total[name] = value.float()
for window, total in zip(windows, sums):
    Path(out, str(window)).mkdir(parents=True, exist_ok=True)
    mean = {name: (value / window).bfloat16() for name, value in total.items()}
    save_file(mean, Path(out, str(window), "model.safetensors"))
"""


def make_run(folder: Path, count: int, nbytes: int) -> None:
    """Checkpoints a little apart from each other, of about so many bytes each."""
    import ml_dtypes
    import numpy as np

    from merge_tool.checkpoint.header import TensorInfo, build_header
    from merge_tool.checkpoint.writer import ShardWriter

    layers = max(1, nbytes // (14 * COLUMNS * COLUMNS))
    matrices = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (COLUMNS, COLUMNS) for name in ("model.embed_tokens", "lm_head")
    }
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{name}.weight": (COLUMNS, COLUMNS) for name in matrices}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{n}.{name}.weight": (COLUMNS,) for name in norms}
    shapes["model.norm.weight"] = (COLUMNS,)
    infos = [TensorInfo(name, "BF16", shape, 0) for name, shape in shapes.items()]
    shared = np.random.default_rng(0).standard_normal(COLUMNS * COLUMNS, dtype=np.float32)
    for number in range(count):
        path = folder / f"step-{number:05d}"
        path.mkdir(parents=True)
        own = np.random.default_rng(number + 1).standard_normal(COLUMNS * COLUMNS, dtype=np.float32)
        raw = (0.02 * shared + 0.0005 * own).astype(ml_dtypes.bfloat16).view(np.uint8)
        header, placed = build_header(infos, {"format": "pt"})
        writer = ShardWriter(path / "model.safetensors", header)
        for info in placed:
            writer.write(info.offset, memoryview(raw)[: info.nbytes])
        writer.sync()
        writer.publish()
        (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def commands(run: Path, out: Path, windows: list[int], mergekit: str | None) -> dict[str, list[list[str]]]:
    """By name: the programs that together make all windows (of `one window`, the largest)."""
    ours = [sys.executable, "-m", "merge_tool.cli", "average", str(run / "step-*"), str(out), "--json"]
    torch = [sys.executable, "-c", TORCH, str(run), str(out)]
    found = {
        "average": [[*ours, "--window", ",".join(map(str, windows))]],
        "one window": [[*ours, "--window", str(windows[-1])]],
        "torch": [[*torch, str(window)] for window in windows],
        "torch once": [[*torch, *map(str, windows)]],
    }
    if mergekit:
        found["mergekit"] = []
        for window in windows:
            config = out.parent / f"mergekit-{window}.yml"
            models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in sorted(run.iterdir())[-window:]]
            config.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
            tool = str(Path(mergekit).with_name("mergekit-yaml"))
            found["mergekit"].append([tool, str(config), str(out / str(window)), "--lazy-unpickle"])
    return found


def measure_all(programs: list[list[str]], run: Path, out: Path) -> Run:
    """The programs one after another: their times together, the largest peak."""
    shutil.rmtree(out, ignore_errors=True)
    for path in run.iterdir():
        drop_from_cache(path)
    runs = [measure(program) for program in programs]
    return Run(sum(r.wall for r in runs), sum(r.cpu for r in runs), max(r.peak for r in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=700, help="of one checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--rounds", type=int, default=2, help="each forwards and backwards")
    parser.add_argument("--mergekit", help="the python of an environment that has mergekit 0.1.5")
    args = parser.parse_args()
    folder = args.folder.absolute() / f"average-{args.checkpoints}-{args.megabytes}"
    run, out, windows = folder / "run", folder / "out", [args.checkpoints // 4, args.checkpoints // 2, args.checkpoints]
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_run(run, args.checkpoints, args.megabytes * 10**6)
        (folder / "made").touch()
    todo = commands(run, out, windows, args.mergekit)
    results: dict[str, list[Run]] = {name: [] for name in todo}
    for _ in range(args.rounds):
        for name in [*todo, *reversed(todo)]:
            results[name].append(measure_all(todo[name], run, out))
    shutil.rmtree(out, ignore_errors=True)
    print_table(results, windows, sum(path.stat().st_size for path in run.glob("*/*.safetensors")))


def print_table(results: dict[str, list[Run]], windows: list[int], input_bytes: int) -> None:
    medians = {
        name: Run(*(statistics.median(getattr(run, key) for run in runs) for key in ("wall", "cpu", "peak")))
        for name, runs in results.items()
    }
    ours = medians["average"]
    counts = f"{windows[-1]} checkpoints, windows {', '.join(map(str, windows))}"
    print(f"{counts}: {input_bytes / 1e9:.2f} GB, {len(results['average'])} runs each, medians")
    print(f"{'':12}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'wall':>7}{'CPU':>7}{'peak':>7}  (times `average`)")
    for name, run in medians.items():
        ratios = f"{run.wall / ours.wall:7.2f}{run.cpu / ours.cpu:7.2f}{run.peak / ours.peak:7.2f}"
        print(f"{name:12}{run.wall:8.2f}{run.cpu:8.2f}{run.peak / 1e6:9.1f}{ratios}")
    for name, runs in results.items():
        print(f"  {name}: wall " + " ".join(f"{run.wall:.2f}" for run in runs))


if __name__ == "__main__":
    main()
