"""The synthetic experiment of the MixCE paper: learn a known bigram model, and measure the distance to it.

    python examples/mixce_bigram/run.py [--seeds 7 42 ...] [--ratios 1.0 0.99 ...] [--out results.json]

The gold model has 20 symbols, the last of them the end of a sequence; each of the other transitions is impossible with
probability 1/2. A small network learns from its samples with this package's loss. Because both are bigram models the
learned distribution can be read off row by row, and compared exactly. (arXiv 2305.16958, section 4.1; what the paper
leaves open is as in its published code.)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.loss import mixce_loss

VOCAB, END, START = 20, 19, 20
TRAIN, DEV, LONGEST = 50_000, 5_000, 500
BATCH, EPOCHS, PATIENCE = 1000, 50, 5
SEEDS = (7, 42, 777, 4222, 99999)
RATIOS = (1.0, 0.99, 0.9, 0.5, 0.1, 0.01, 0.0)


def gold_model(generator: torch.Generator) -> Tensor:
    """Transition matrix [21, 20]: Dirichlet(0.5) rows, each non-end entry zeroed with probability 1/2, renormalised.

    Row START is the first symbol's distribution, which is uniform. Row END is never used, and zero."""
    gamma = torch.distributions.Gamma(0.5, 1.0)
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # Gamma draws from the global one
    rows = gamma.sample((VOCAB + 1, VOCAB)).clamp_min(1e-30)
    rows[:, :END].masked_fill_(torch.rand(VOCAB + 1, END, generator=generator) < 0.5, 0.0)
    rows[START] = 1.0
    rows[END] = 0.0
    return rows / rows.sum(1, keepdim=True).clamp_min(1e-30)


def sample(gold: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` sequences from START to END; END is forced as the 500th symbol."""
    last, alive = torch.full((count,), START), torch.ones(count, dtype=torch.bool)
    columns = [last]
    for length in range(1, LONGEST + 1):
        drawn = torch.full((count,), -100)
        drawn[alive] = torch.multinomial(gold[last[alive]], 1, generator=generator)[:, 0]
        if length == LONGEST:
            drawn[alive] = END
        columns.append(drawn)
        alive = alive & (drawn != END)
        last = torch.where(alive, drawn, last)
        if not alive.any():
            break
    table = torch.stack(columns, 1)
    return [row[row != -100] for row in table]


class Pairs:
    """All transitions of a set of sequences: symbol, next symbol, and the sequence they come from."""

    def __init__(self, sequences: list[Tensor]) -> None:
        self.inputs = torch.cat([s[:-1] for s in sequences])
        self.targets = torch.cat([s[1:] for s in sequences])
        lengths = torch.tensor([len(s) - 1 for s in sequences])
        self._owner = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
        self.count = len(sequences)

    def shuffled_batches(self) -> list[Tensor]:
        """Indices of the transitions, in batches of 1000 sequences drawn without replacement."""
        place = torch.randperm(self.count)
        batch = place[self._owner] // BATCH
        order = torch.argsort(batch)
        return list(order.split(torch.bincount(batch).tolist()))


class Network(nn.Module):
    """Embedding 50 -> linear 50 -> ReLU -> dropout 0.1 -> vocabulary; input is one symbol.

    The first layers see only 21 different inputs, so they run once per symbol, not once per transition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(VOCAB + 1, 50), nn.Linear(50, 50)
        self.out = nn.Linear(50, VOCAB + 1)

    def forward(self, symbols: Tensor) -> Tensor:
        table = torch.relu(self.hidden(self.embed.weight))
        hidden = functional.embedding(symbols, table)
        return self.out(functional.dropout(hidden, 0.1, self.training))


def learn(train: Pairs, dev: Pairs, ratio: float, seed: int) -> tuple[Tensor, int]:
    """The learned transition matrix [21, 21] of the best epoch by its own loss on dev, and that epoch.

    A batch's loss is divided by its sequences, as in the paper's code, not by its tokens: Adam's L2 term is added to
    the gradient, so the scale of the loss decides how strong it is.
    """
    torch.manual_seed(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    best, best_epoch, kept = float("inf"), 0, copy.deepcopy(network.state_dict())
    for epoch in range(1, EPOCHS + 1):
        network.train()
        for batch in train.shuffled_batches():
            loss, _ = mixce_loss(network(train.inputs[batch]), train.targets[batch], ratio)
            optimizer.zero_grad()
            (loss / BATCH).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            loss, _ = mixce_loss(network(dev.inputs), dev.targets, ratio)
        if (loss / dev.count).item() < best:
            best, best_epoch, kept = (loss / dev.count).item(), epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= PATIENCE:
            break
    network.load_state_dict(kept)
    with torch.no_grad():
        return torch.softmax(network(torch.arange(VOCAB + 1)), -1), best_epoch


def distance(gold: Tensor, learned: Tensor) -> tuple[float, float]:
    """Mean over the 20 rows (START and every symbol but END) of the Jensen-Shannon divergence (nats), and mean
    probability where gold has none. START is never a target, so its column is left out."""
    rows = [row for row in range(VOCAB + 1) if row != END]
    gold, learned = gold[rows].double(), learned[rows, :VOCAB].double()
    zeros = learned[gold == 0].mean().item()
    learned = learned / learned.sum(1, keepdim=True)
    middle = (gold + learned) / 2

    def divergence(p: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p / middle).log(), 0.0).sum(1)

    js = (divergence(gold) + divergence(learned)) / 2
    return js.mean().item(), zeros


def run_seed(seed: int, ratios: list[float]) -> list[dict[str, Any]]:
    """A result per ratio; all ratios of a seed share the gold model, the data and the initial weights."""
    torch.set_num_threads(1)  # the matrices are tiny: a second thread only waits
    generator = torch.Generator().manual_seed(seed)
    gold = gold_model(generator)
    train, dev = Pairs(sample(gold, TRAIN, generator)), Pairs(sample(gold, DEV, generator))
    results = []
    for ratio in ratios:
        started = time.perf_counter()
        learned, epoch = learn(train, dev, ratio, seed)
        js, zeros = distance(gold, learned)
        seconds = time.perf_counter() - started
        print(f"seed {seed:6} ratio {ratio:<5} js {js:.3e} zeros {zeros:.3e} epoch {epoch} {seconds:.0f} s")
        results.append({"seed": seed, "ratio": ratio, "js": js, "zeros": zeros, "epoch": epoch})
    return results


def run(seeds: list[int], ratios: list[float], jobs: int) -> list[dict[str, Any]]:
    """All seeds, `jobs` at a time, each in a process of its own."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(run_seed, seeds, [ratios] * len(seeds)))
    return [result for results in found for result in results]


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = [
        "| mixing ratio | JS divergence, x 1e-4 | probability where gold has 0, x 1e-4 | best epoch |",
        "|---|---|---|---|",
    ]
    for ratio in sorted({r["ratio"] for r in results}, reverse=True):
        mine = [r for r in results if r["ratio"] == ratio]
        cells = [_spread([r[key] * 1e4 for r in mine], 3) for key in ("js", "zeros")]
        lines.append(f"| {ratio} | {cells[0]} | {cells[1]} | {_spread([r['epoch'] for r in mine], 0)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    results = run(arguments.seeds, arguments.ratios, arguments.jobs)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
