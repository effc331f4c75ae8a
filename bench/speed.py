"""How fast a merge is where the disk is not the limit: each figure as a ratio within one run.

    python bench/speed.py [--folder /dev/shm/speed] [--layers 2] [--rounds 1] [--only pair methods ...]
                          [--mergekit PATH/TO/python] [--before CHECKOUT]

Everything lies in a RAM disk and is in memory. Programs run interleaved, forwards and backwards, with two threads
each; medians are printed. `--before` names another checkout of this project (a git worktree, say): its program
runs in the same rounds.

    pair       a pair of bfloat16 models: wall / the time to copy its bytes; user CPU an element
    methods    methods of three models and a base of 0.24 GB each: CPU and wall / mergekit's
    eight      a pair of FP8 models: output in their 8 bits / output in bfloat16
    small      a pair of 20,000 tensors of 1 kB: time a tensor
    plan       a dry run of 20,000 tensors
    start      slerp-merge --help / the bare interpreter
    threads    the pair with one and two threads, and what Amdahl's law then says of four and eight
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
PARTS = ("pair", "methods", "eight", "small", "plan", "start", "threads")
METHODS = {  # mergekit's names and parameters; merge-tool run reads the same file
    "linear": "parameters: {weight: 0.3}",
    "task_arithmetic": "parameters: {weight: 0.3}",
    "ties": "parameters: {weight: 0.3, density: 0.5}",
    "dare_ties": "parameters: {weight: 0.3, density: 0.5}",
    "della": "parameters: {weight: 0.3, density: 0.5, epsilon: 0.2}",
    "breadcrumbs": "parameters: {weight: 0.3, density: 0.8, gamma: 0.05}",
    "sce": "",
    "model_stock": "",
    "karcher": "",
    "multislerp": "parameters: {weight: 0.3}",
}
WITH_BASE = {"task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "sce", "model_stock"}
NUM_SMALL = 20_000


@dataclass(frozen=True)
class Run:
    """Seconds of wall clock, of CPU in the program and in the kernel."""

    wall: float
    user: float
    system: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


Command = tuple[list[str], dict[str, str]]


def run(command: Command) -> Run:
    arguments, env = command
    started = time.monotonic()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - started
    if status:
        raise SystemExit(f"{arguments} failed:\n{printed.decode()[-3000:]}")
    return Run(wall, usage.ru_utime, usage.ru_stime)


def interleaved(commands: dict[str, Command], rounds: int, clean: Callable[[], None]) -> dict[str, Run]:
    """Medians of each command, run forwards and backwards."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name in [*commands, *reversed(commands)]:
            clean()
            results[name].append(run(commands[name]))
    clean()
    return {
        name: Run(*(statistics.median(getattr(one, key) for one in runs) for key in ("wall", "user", "system")))
        for name, runs in results.items()
    }


# ------------------------------------------------------------------------------------------- models


def made(folder: Path, call: str) -> Path:
    """A model that a function of this file makes, in a process of its own, so that this one stays small."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        code = f"import speed; from pathlib import Path; speed.{call.format(repr(str(folder)))}"
        subprocess.run([sys.executable, "-c", code], check=True, env=environment(BENCH, BENCH.parent))
    return folder


def make_stablelm(folder: str, layers: int, seed: int) -> None:
    from merge import make_model

    make_model(Path(folder), layers, num_shards=2, seed=seed)


def make_llama(folder: str, layers: int, seed: int, hidden: int = 1024, inner: int = 2816, vocab: int = 8192) -> None:
    """A Llama of random weights in bfloat16; two seeds give models a few degrees apart."""
    import ml_dtypes
    import numpy as np

    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = 0.02 * shared.standard_normal(shape, np.float32) + 0.002 * own.standard_normal(shape, np.float32)
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    config = {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": inner, "rms_norm_eps": 1e-5}
    _save(folder, tensors, layers, **config, hidden_size=hidden, vocab_size=vocab)


def make_fp8(folder: str, source: str) -> None:
    """A model's matrices as codes of 8 bits with a scale for each block of 128 x 128, as DeepSeek stores them."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import load_file

    tensors = {}
    for name, values in load_file(Path(source) / "model.safetensors").items():
        if values.ndim != 2 or "proj" not in name:
            tensors[name] = values
            continue
        rows, columns = (size // 128 for size in values.shape)
        blocks = values.astype(np.float32).reshape(rows, 128, columns, 128)
        scales = np.abs(blocks).max(axis=(1, 3)) / 448
        codes = blocks / scales[:, None, :, None]
        tensors[name] = codes.reshape(values.shape).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    config = json.loads((Path(source) / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    _save(folder, tensors, config.pop("num_hidden_layers"), **config, quantization_config=how)


def make_small(folder: str, seed: int) -> None:
    """Very many tensors of 512 elements in bfloat16: a mixture of experts in small."""
    import ml_dtypes
    import numpy as np

    values = np.random.default_rng(seed).standard_normal((NUM_SMALL, 8, 64)).astype(ml_dtypes.bfloat16)
    experts = NUM_SMALL // 4
    tensors = {
        f"model.layers.{n // experts}.mlp.experts.{n % experts}.up_proj.weight": values[n] for n in range(NUM_SMALL)
    }
    _save(folder, tensors, 4)


def _save(folder: str, tensors: Any, layers: int, **config: object) -> None:
    from safetensors.numpy import save_file

    Path(folder).mkdir(parents=True)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (Path(folder) / "config.json").write_text(json.dumps({**kind, "num_hidden_layers": layers, **config}))


# -------------------------------------------------------------------------------------------- parts


class Bench:
    """The parts of the measurement. Each prints its lines."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.folder.absolute()
        self.out = self.folder / "out"
        self.programs = {"now": BENCH.parent, **({"before": args.before.absolute()} if args.before else {})}

    def runs(self, arguments: Callable[[], list[object]], others: dict[str, Command] | None = None) -> dict[str, Run]:
        """One command of every version of the program, and others, in the same rounds."""
        mine = {name: ours(checkout, *arguments()) for name, checkout in self.programs.items()}
        return interleaved({**mine, **(others or {})}, self.args.rounds, self.clean)

    def clean(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def show(self, what: str, runs: dict[str, Run], than: str, *, numel: int = 0) -> None:
        for name, one in runs.items():
            element = f", {one.user / numel * 1e9:.2f} ns of user CPU an element" if numel else ""
            wall, cpu = one.wall / runs[than].wall, one.cpu / runs[than].cpu
            print(
                f"{what:18}{name:10}wall {one.wall:7.2f} s, CPU {one.cpu:7.2f} s; "
                f"/ {than}: wall {wall:.2f}, CPU {cpu:.2f}{element}",
                flush=True,
            )

    def stablelm_pair(self) -> tuple[Path, Path]:
        layers = self.args.layers
        sides = [
            made(self.folder / f"{side}-{layers}", f"make_stablelm({{}}, {layers}, {seed})")
            for seed, side in ((1, "base"), (2, "ft"))
        ]
        return sides[0], sides[1]

    def llama(self, seed: int) -> Path:
        return made(
            self.folder / f"llama-{self.args.llama_layers}-{seed}",
            f"make_llama({{}}, {self.args.llama_layers}, {seed})",
        )

    def small(self) -> tuple[Path, Path]:
        sides = [made(self.folder / f"small-{seed}", f"make_small({{}}, {seed})") for seed in (1, 2)]
        return sides[0], sides[1]

    def pair(self) -> None:
        base, ft = self.stablelm_pair()
        copy = [sys.executable, str(BENCH / "speed.py"), "--copy", str(base), str(ft), str(self.out)]
        runs = self.runs(
            lambda: ["merge", base, ft, self.out, "--t", 0.4, "--jobs", 2], {"copy": (copy, environment())}
        )
        self.show("pair", runs, "copy", numel=weights_bytes(base) // 2)

    def methods(self) -> None:
        base, *models = (self.llama(seed) for seed in range(4))
        for method in self.args.methods or METHODS:
            config = self.folder / f"{method}.yaml"
            lines = [f"merge_method: {method}", "dtype: bfloat16", "models:"]
            lines += [f"  - {{model: {model}, {METHODS[method]}}}".replace(", }", "}") for model in models]
            lines += [f"base_model: {base}"] if method in WITH_BASE else []
            config.write_text("\n".join(lines) + "\n")
            others = {}
            if self.args.mergekit:
                tool = Path(self.args.mergekit).with_name("mergekit-yaml")
                others["mergekit"] = [str(tool), str(config), str(self.out)], {**os.environ, "OMP_NUM_THREADS": "2"}
            runs = self.runs(lambda config=config: ["run", config, self.out, "--jobs", 2], others)  # type: ignore[misc]
            than = "mergekit" if others else "before" if self.args.before else "now"
            self.show(method, runs, than, numel=weights_bytes(base) // 2)

    def eight(self) -> None:
        plain = [self.llama(seed) for seed in (1, 2)]
        eights = [made(Path(f"{one}-fp8"), f"make_fp8({{}}, {str(one)!r})") for one in plain]
        for name, checkout in self.programs.items():
            commands = {
                dtype: ours(checkout, "merge", *eights, self.out, "--t", 0.4, "--jobs", 2, "--dtype", dtype)
                for dtype in ("bfloat16", "base")
            }
            self.show(f"eight, {name}", interleaved(commands, self.args.rounds, self.clean), "bfloat16")

    def small_tensors(self) -> None:
        base, ft = self.small()
        runs = self.runs(lambda: ["merge", base, ft, self.out, "--t", 0.4, "--jobs", 2])
        plans = self.runs(lambda: ["merge", base, ft, self.out, "--t", 0.4, "--dry-run"])
        for name, one in runs.items():
            plan = plans[name].wall
            print(
                f"{'small':18}{name:10}wall {one.wall:7.2f} s, of which the plan {plan:.2f} s; "
                f"the rest / tensor: {(one.wall - plan) / NUM_SMALL * 1e3:.3f} ms",
                flush=True,
            )

    def plan(self) -> None:
        base, ft = self.small()
        self.show("plan", self.runs(lambda: ["merge", base, ft, self.out, "--t", 0.4, "--dry-run"]), "now")

    def start(self) -> None:
        bare = {"python": ([sys.executable, "-c", "pass"], environment())}
        rounds, self.args.rounds = self.args.rounds, 5 * self.args.rounds
        self.show("start", self.runs(lambda: ["--help"], bare), "python")
        self.args.rounds = rounds

    def threads(self) -> None:
        base, ft = self.stablelm_pair()
        commands = {
            f"{jobs} jobs": ours(BENCH.parent, "merge", base, ft, self.out, "--t", 0.4, "--jobs", jobs)
            for jobs in (1, 2)
        }
        start = interleaved({"plan": ours(BENCH.parent, "merge", base, ft, self.out, "--dry-run")}, 1, self.clean)[
            "plan"
        ]
        runs = interleaved(commands, self.args.rounds, self.clean)
        self.show("threads", runs, "1 jobs")
        one, two = (runs[f"{jobs} jobs"].wall - start.wall for jobs in (1, 2))
        serial = max(0.0, min(1.0, 2 * two / one - 1))
        speedups = ", ".join(f"{n} threads {1 / (serial + (1 - serial) / n):.2f}" for n in (2, 4, 8))
        print(
            f"{'threads':18}after a start of {start.wall:.2f} s: serial share {serial:.2f}; "
            f"speed-up by Amdahl's law: {speedups}"
        )


def environment(*paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def ours(checkout: Path, *arguments: object) -> Command:
    return [sys.executable, "-P", "-m", "merge_tool", *map(str, arguments)], environment(checkout)


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy(base: Path, ft: Path, out: Path) -> None:
    """Read the bytes of both models, write one's."""
    block = memoryview(bytearray(1 << 20))
    out.mkdir(parents=True)
    with (out / "copy").open("wb", buffering=0) as writer:
        for side, folder in enumerate((base, ft)):
            for path in folder.glob("*.safetensors"):
                with path.open("rb", buffering=0) as reader:
                    while count := reader.readinto(block):
                        if side == 0:
                            writer.write(block[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/speed"), help="in RAM")
    parser.add_argument("--layers", type=int, default=2, help="of the pair: 2 make 0.83 GB a model")
    parser.add_argument("--llama-layers", type=int, default=8, help="of the models of methods: 8 make 0.24 GB a model")
    parser.add_argument("--rounds", type=int, default=1, help="each forwards and backwards")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="of methods; all by default")
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--mergekit", help="the python of an environment that has mergekit 0.1.5")
    parser.add_argument("--copy", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.copy:
        copy(*args.copy)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for part in args.only:
        getattr(bench, "small_tensors" if part == "small" else part)()


if __name__ == "__main__":
    main()
