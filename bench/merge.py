"""Paired benchmark of slerp-merge: against what the disk allows, and against mergekit.

    python bench/merge.py [--layers 2] [--folder DIR] [--rounds 2] [--mergekit PATH/TO/python]

Makes a pair of checkpoints of StableLM 3B's shape (hidden 2560, vocabulary 50304, bfloat16; 32 layers are the real
thing, 356 tensors), sharded differently, then runs interleaved, forwards and backwards (ABBA), each time with the
inputs dropped from the page cache:

    floor        read both inputs once, write the output's bytes, sync: what the disk allows
    64MB         slerp-merge --memory 64MB
    default      slerp-merge
    mergekit     mergekit 0.1.5 (when an environment that has it is named), default and 100 MB shards

and prints wall time, CPU time and peak resident memory, with their ratios. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCAB = 2560, 6912, 50304
CONFIG = {
    "architectures": ["StableLmForCausalLM"],
    "model_type": "stablelm",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCAB,
    "torch_dtype": "bfloat16",
}


@dataclass
class Run:
    """One measured run: seconds of wall clock and of CPU, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


# ------------------------------------------------------------------------------------------ the pair


def tensor_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for n in range(layers):
        for part in "qkvo":
            yield f"model.layers.{n}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        yield f"model.layers.{n}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"model.layers.{n}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"model.layers.{n}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{n}.{norm}.weight", (HIDDEN,)
            yield f"model.layers.{n}.{norm}.bias", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "model.norm.bias", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def make_model(folder: Path, layers: int, *, num_shards: int, seed: int) -> None:
    """A checkpoint of random weights; two seeds give models a few degrees apart."""
    import ml_dtypes
    import numpy as np

    from merge_tool.checkpoint.header import TensorInfo, build_header
    from merge_tool.checkpoint.writer import ShardWriter

    folder.mkdir(parents=True)
    shapes = list(tensor_shapes(layers))
    shared, own = (np.random.default_rng(s).standard_normal(1 << 22, dtype=np.float32) for s in (0, seed))
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        group = (
            shapes[shard::num_shards]
            if seed % 2
            else shapes[len(shapes) * shard // num_shards :][
                : len(shapes) * (shard + 1) // num_shards - len(shapes) * shard // num_shards
            ]
        )
        header, infos = build_header([TensorInfo(n, "BF16", s, 0) for n, s in group], {"format": "pt"})
        writer = ShardWriter(folder / name, header)
        for info in infos:
            weight_map[info.name] = name
            place = sum(info.name.encode()) * 8191
            for start in range(0, info.numel, 1 << 21):
                length = min(1 << 21, info.numel - start)
                at = (place + start) % (1 << 21)
                values = 0.02 * shared[at : at + length] + 0.0005 * own[at : at + length]
                raw = values.astype(ml_dtypes.bfloat16).view(np.uint8)
                writer.write(info.offset + 2 * start, memoryview(raw))
        writer.sync()
        writer.publish()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ------------------------------------------------------------------------------------------ the runs


def copy_floor(base: Path, ft: Path, out: Path) -> None:
    """Read both inputs once, write one output of the base's size, sync."""
    block = bytearray(1 << 20)
    view = memoryview(block)
    out.mkdir(parents=True)
    pairs = [sorted(folder.glob("*.safetensors")) for folder in (base, ft)]
    with (out / "copy").open("wb", buffering=0) as writer:
        readers = [[path.open("rb", buffering=0) for path in paths] for paths in pairs]
        while any(readers):
            for side in (1, 0):
                count = 0
                while readers[side] and not (count := readers[side][0].readinto(view)):
                    readers[side].pop(0).close()
                if side == 0 and count:
                    writer.write(view[:count])
        os.fsync(writer.fileno())


def measure(command: list[str], env: dict[str, str] | None = None) -> Run:
    """Run a command to its end. Its peak is its own (wait4), so this process is kept small."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stderr is not None
    printed, complaint = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status != 0:
        raise SystemExit(f"{command} failed:\n{printed.decode()[-2000:]}\n{complaint.decode()[-2000:]}")
    peak = usage.ru_maxrss * 1024
    if printed.lstrip().startswith(b"{"):
        peak = json.loads(printed)["peak_bytes"]
    return Run(wall, usage.ru_utime + usage.ru_stime, peak)


def commands(base: Path, ft: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "merge_tool", "merge", str(base), str(ft), str(out), "--json"]
    found = {
        "floor": [sys.executable, __file__, "--copy", str(base), str(ft), str(out)],
        "64MB": [*ours, "--memory", "64MB"],
        "default": ours,
    }
    if mergekit:
        config = out.parent / "mergekit.yml"
        config.write_text(
            f"models:\n  - model: {base}\n  - model: {ft}\nmerge_method: slerp\nbase_model: {base}\n"
            "dtype: bfloat16\nparameters:\n  t: 0.5\n"
        )
        tool = str(Path(mergekit).with_name("mergekit-yaml"))
        found["mergekit"] = [tool, str(config), str(out)]
        found["mergekit 100MB"] = [tool, str(config), str(out), "--out-shard-size", "100M", "--lazy-unpickle"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of 32; 2 make about 0.85 GB a model")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--rounds", type=int, default=2, help="each forwards and backwards")
    parser.add_argument("--mergekit", help="the python of an environment that has mergekit 0.1.5")
    parser.add_argument("--copy", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.copy:
        copy_floor(*args.copy)
        return
    folder = args.folder.absolute() / f"layers-{args.layers}"
    base, ft, out = folder / "base", folder / "ft", folder / "out"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        code = (
            "import sys; from pathlib import Path; sys.path.insert(0, {!r}); import merge as m; "
            "m.make_model(Path({!r}), {}, num_shards={}, seed={})"
        )
        for path, shards, seed in ((base, 2, 1), (ft, 3, 2)):
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    code.format(str(Path(__file__).parent), str(path), args.layers, shards, seed),
                ],
                check=True,
            )
        (folder / "made").touch()
    todo = commands(base, ft, out, args.mergekit)
    results: dict[str, list[Run]] = {name: [] for name in todo}
    for _ in range(args.rounds):
        for name in [*todo, *reversed(todo)]:
            shutil.rmtree(out, ignore_errors=True)
            for side in (base, ft):
                drop_from_cache(side)
            os.sync()
            results[name].append(measure(todo[name]))
    shutil.rmtree(out, ignore_errors=True)
    print_table(results, sum(p.stat().st_size for side in (base, ft) for p in side.glob("*.safetensors")))


def print_table(results: dict[str, list[Run]], input_bytes: int) -> None:
    """Medians, and ratios to the floor and to mergekit's better setting."""
    medians = {
        name: Run(*(statistics.median(getattr(run, key) for run in runs) for key in ("wall", "cpu", "peak")))
        for name, runs in results.items()
    }
    rivals = [run for name, run in medians.items() if name.startswith("mergekit")]
    print(f"inputs {input_bytes / 1e9:.2f} GB, {len(results['floor'])} runs each, medians")
    print(
        f"{'':16}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'wall/floor':>12}"
        + (f"{'wall/mk':>9}{'CPU/mk':>8}" if rivals else "")
    )
    for name, run in medians.items():
        line = f"{name:16}{run.wall:8.2f}{run.cpu:8.2f}{run.peak / 1e6:9.1f}{run.wall / medians['floor'].wall:12.2f}"
        if rivals:
            line += f"{run.wall / min(r.wall for r in rivals):9.2f}{run.cpu / min(r.cpu for r in rivals):8.2f}"
        print(line)
    for name, runs in results.items():
        print(f"  {name}: wall " + " ".join(f"{run.wall:.2f}" for run in runs))


if __name__ == "__main__":
    main()
