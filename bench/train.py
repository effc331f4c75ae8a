"""Paired measurements of `train`: prints ratios; never part of the test suite.

    python bench/train.py loss              reference against fused loss: extra memory, time
    python bench/train.py optim             bytes per parameter of a step, with and without fused backward
    python bench/train.py loop --trl PYTHON this loop against TRL's and transformers' trainers

Every arm runs in a process of its own, so that a peak is that arm's; times are interleaved and repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, VOCAB, WIDTH = 2048, 50304, 576


def resident_bytes() -> int:
    """Bytes of resident memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """Highest resident memory while the block runs, sampled each millisecond, above that at its start."""

    def __enter__(self) -> Peak:
        self.base = self.top = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.top = max(self.top, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self.top = max(self.top, resident_bytes())
        self._done.set()
        self._thread.join()
        self.extra = self.top - self.base


def loss_arm(which: str, head: str, repeats: int) -> dict[str, Any]:
    """Peak extra bytes and the median time of forward and backward of one loss."""
    import torch

    from train.loss import fused_mixce_loss, mixce_loss

    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=gen).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=gen) / WIDTH**0.5).requires_grad_(head == "trained")
    labels = torch.randint(VOCAB, (TOKENS,), generator=gen)

    def step() -> None:
        hidden.grad = weight.grad = None
        if which == "fused":
            loss, count = fused_mixce_loss(hidden, weight, labels, 0.5)
        else:
            loss, count = mixce_loss(hidden @ weight.T, labels, 0.5)
        (loss / count).backward()

    small = hidden[:8].detach().requires_grad_()  # first calls load kernels: not the loss's memory
    fused_mixce_loss(small, weight[:64], labels[:8] % 64, 0.5)[0].backward()
    weight.grad = None
    with Peak() as peak:
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"extra_bytes": peak.extra, "seconds": statistics.median(times)}


def in_process(*arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """The last line of this script's own output, run again with `arguments`."""
    done = subprocess.run([python, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench_loss(repeats: int) -> None:
    print(f"loss: {TOKENS} tokens x {VOCAB} vocabulary x {WIDTH} hidden, float32, {repeats} interleaved runs")
    for head in ("frozen", "trained"):
        runs: dict[str, list[dict[str, Any]]] = {"reference": [], "fused": []}
        for _ in range(repeats):
            for which, results in runs.items():
                results.append(in_process("loss-arm", which, head))
        row = {}
        for which, results in runs.items():
            extra = statistics.median(r["extra_bytes"] for r in results)
            seconds = statistics.median(r["seconds"] for r in results)
            row[which] = (extra, seconds)
            print(f"  {head:8} {which:10} {extra / 1e6:8.0f} MB extra {seconds:7.3f} s")
        memory = row["reference"][0] / row["fused"][0]
        print(f"  {head:8} memory 1/{memory:.1f}, time {row['fused'][1] / row['reference'][1]:.2f} x")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "loss": lambda a: bench_loss(a.repeats),
    "loss-arm": lambda a: print(json.dumps(loss_arm(a.rest[0], a.rest[1], 3))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this file's own folder would hide the package `train`
    main()
