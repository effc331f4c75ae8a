"""Laws of the ranking loss: against float64 autograd through the whole matrix, and its denominators."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from train.batches import Batch
from train.contrast.mixture import PairMixture
from train.contrast.options import ContrastConfig, QuestionsConfig, VerifyConfig
from train.contrast.ranking import Ranking, ranking_loss
from train.loss import fused_log_probs
from train.model import LossModel
from train.step import train_step
from train.world import StopSignals, World
from train_fixtures import make_config, make_model

CONTRAST = ContrastConfig(QuestionsConfig("q.jsonl", "{a}", "{b}"), VerifyConfig())


def problem(
    dtype: torch.dtype = torch.float64, rows: int = 6, tokens: int = 9, vocab: int = 37, width: int = 11
) -> Any:
    """Two pairs, one with two rejected responses, and a row that is only learned; responses of different lengths."""
    gen = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (rows, tokens), generator=gen)
    for row in range(rows):
        labels[row, : 2 + row % 3] = -100
        labels[row, tokens - row % 4 :] = -100
    return SimpleNamespace(
        hidden=numbers(rows, tokens, width), weight=numbers(vocab, width), bias=numbers(vocab), labels=labels,
        ranking=Ranking(
            learned=torch.tensor([True, False, False, True, False, True]),
            chosen=torch.tensor([0, 3]),
            rejected=torch.tensor([[1, 2], [4, -1]]),
            scale=torch.tensor([0.7, 1.9]),
        ),
    )  # fmt: skip


def oracle(case: Any, ratio: float, softcap: float | None) -> Tensor:
    """The loss from the formulas, over all logits, row by row."""
    z = case.hidden @ case.weight.T + case.bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z, -1)
    rows = [
        torch.stack([log_p[r, t, y] for t, y in enumerate(case.labels[r].tolist()) if y != -100])
        for r in range(len(case.labels))
    ]
    total = torch.zeros((), dtype=z.dtype)
    for r, log_q in enumerate(rows):
        if case.ranking.learned[r]:
            total = total - ((ratio + (1 - ratio) * log_q.exp().detach()) * log_q).sum()
    p = [log_q.mean().exp() for log_q in rows]
    for c, others, scale in zip(
        *(t.tolist() for t in (case.ranking.chosen, case.ranking.rejected, case.ranking.scale)), strict=True
    ):
        wrong = [p[j] for j in others if j >= 0]
        total = total - scale * torch.log(p[c] / (p[c] + sum(wrong) / len(wrong)))
    return total


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_the_fused_loss_and_its_gradients_are_those_of_the_whole_matrix(
    ratio: float, softcap: float | None, chunk: int | None
) -> None:
    case = problem()
    leaves = [t.requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    expected = oracle(case, ratio, softcap)
    wanted = torch.autograd.grad(expected, leaves)
    log_q = fused_log_probs(case.hidden, case.weight, case.labels, bias=case.bias, softcap=softcap, chunk_tokens=chunk)
    loss, count = ranking_loss(log_q, case.labels, case.ranking, ratio)
    found = torch.autograd.grad(loss, leaves)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)  # scale is float32
    assert count == (case.labels[case.ranking.learned] != -100).sum()
    for got, want in zip(found, wanted, strict=True):
        assert relative(got, want) < 1e-7


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_types_are_near_the_oracle(dtype: torch.dtype, limit: float) -> None:
    case, exact = problem(dtype), problem()
    leaves = [t.requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    wide = [getattr(case, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")]
    exact.hidden, exact.weight, exact.bias = wide
    log_q = fused_log_probs(case.hidden, case.weight, case.labels, bias=case.bias)
    assert log_q.dtype == torch.float32
    found = torch.autograd.grad(ranking_loss(log_q, case.labels, case.ranking, 1.0)[0], leaves)
    wanted = torch.autograd.grad(oracle(exact, 1.0, None), wide)
    assert [g.dtype for g in found] == [dtype] * 3
    for got, want in zip(found, wanted, strict=True):
        assert relative(got, want) < limit


def test_without_labels_everything_is_zero_and_finite() -> None:
    case = problem()
    case.labels.fill_(-100)
    log_q = fused_log_probs(case.hidden.requires_grad_(), case.weight, case.labels)
    loss, count = ranking_loss(
        log_q,
        case.labels,
        Ranking(case.ranking.learned, *(t[:0] for t in vars(case.ranking).values() if t is not case.ranking.learned)),
        1.0,
    )
    loss.backward()
    assert (float(loss.detach()), int(count), float(case.hidden.grad.abs().sum())) == (0.0, 0, 0.0)


def test_one_rejected_response_is_softplus_of_the_difference() -> None:
    log_q = torch.tensor([[-1.0, -3.0], [-0.5, 0.0]])
    labels = torch.tensor([[1, 1], [1, -100]])
    ranking = Ranking(torch.tensor([False, False]), torch.tensor([0]), torch.tensor([[1]]), torch.tensor([2.0]))
    loss, _ = ranking_loss(log_q, labels, ranking, 1.0)
    assert float(loss) == pytest.approx(2 * np.log1p(np.exp(-0.5 - -2.0)))


# ---- over a global step ----------------------------------------------------------------------------------


def write_pairs(folder: Path, roles: list[list[int]], vocab: int = 300) -> Path:
    """Units of random rows: 0 chosen, 1 rejected, 2 beside."""
    gen = np.random.default_rng(0)
    rows = [(unit, role, int(gen.integers(6, 14))) for unit, found in enumerate(roles) for role in found]
    lengths = [length for *_, length in rows]
    np.save(folder / "ids.npy", gen.integers(1, vocab, sum(lengths)).astype(np.int32))
    np.save(folder / "learned.npy", np.concatenate([np.arange(n) >= 3 for n in lengths]))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths]))
    np.save(folder / "units.npy", np.array([row[:2] for row in rows]))
    return folder


def one_step(folder: Path, contrast: ContrastConfig, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step; the optimizer only looks at them."""
    config = make_config(
        max_steps=1, activation_checkpointing=False, freeze_embeddings=False, mixing_ratio=1.0, **settings
    )
    model = LossModel(make_model())
    batches = PairMixture(folder, contrast, (), config, 0, 1).step_batches(0, 0)
    found: dict[str, Tensor] = {}

    class Look:
        def step(self, lr: float) -> None:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    world = World(0, 1, torch.device("cpu"))
    result = train_step(model, batches, Look(), config, world, 1.0, StopSignals())  # type: ignore[arg-type]
    return result.loss, found


@pytest.mark.parametrize("rows", ["equal", "tokens"])
def test_the_denominators_are_those_of_the_whole_step(tmp_path: Path, rows: Any) -> None:
    """CE / labelled tokens + beta * ranking / pairs, however the step is cut into micro-batches."""
    folder = write_pairs(tmp_path, [[0, 1], [0, 1, 1], [0, 1], [2]])
    contrast = ContrastConfig(CONTRAST.questions, CONTRAST.verify, rank_rows=rows, ce_on="right", rank_weight=0.3)
    loss, grads = one_step(folder, contrast, global_batch=4, micro_batch=4)
    for micro_batch in (1, 2):
        other, others = one_step(folder, contrast, global_batch=4, micro_batch=micro_batch)
        assert other == pytest.approx(loss, rel=1e-6)
        assert all(relative(others[name], grad) < 1e-5 for name, grad in grads.items())

    (batch,) = PairMixture(folder, contrast, (), make_config(global_batch=4, micro_batch=4), 0, 1).step_batches(0, 0)
    assert expected_loss(batch, contrast) == pytest.approx(loss, rel=1e-5)


def expected_loss(batch: Batch, contrast: ContrastConfig) -> float:
    """By the formula, from the model's whole logits."""
    log_p = torch.log_softmax(LossModel(make_model()).plain_logits(batch).detach().double(), -1)
    rows = [
        [float(log_p[r, t, y]) for t, y in enumerate(ys) if y != -100] for r, ys in enumerate(batch.labels.tolist())
    ]
    assert batch.ranking is not None
    learned = [row for row, is_learned in zip(rows, batch.ranking.learned, strict=True) if is_learned]
    ce = -sum(map(sum, learned)) / sum(map(len, learned))
    s = [np.mean(row) for row in rows]
    losses, weights = [], []
    for c, others in zip(batch.ranking.chosen.tolist(), batch.ranking.rejected.tolist(), strict=True):
        mean = np.mean([np.exp(s[j]) for j in others if j >= 0])
        losses.append(-np.log(np.exp(s[c]) / (np.exp(s[c]) + mean)))
        weights.append(len(rows[c]) if contrast.rank_rows == "tokens" else 1)
    return float(ce + contrast.rank_weight * np.average(losses, weights=weights))


@pytest.mark.parametrize(("ce_on", "learned"), [("chosen", [0]), ("right", [0, 2]), ("gold", [2])])
def test_ce_on_says_which_rows_are_learned(tmp_path: Path, ce_on: Any, learned: list[int]) -> None:
    roles = [[0, 1, 2], [0, 1, 2]]
    contrast = ContrastConfig(CONTRAST.questions, CONTRAST.verify, ce_on=ce_on)
    (batch,) = PairMixture(
        write_pairs(tmp_path, roles), contrast, (), make_config(global_batch=2, micro_batch=2), 0, 1
    ).step_batches(0, 0)
    assert batch.ranking is not None
    assert batch.ranking.learned.tolist() == [role in learned for role in (0, 1, 2)] * 2
    assert (batch.ranking.chosen.tolist(), batch.ranking.rejected.tolist()) == ([0, 3], [[1], [4]])


def test_processes_share_a_step_and_epochs_use_every_unit_once(tmp_path: Path) -> None:
    """Two processes' batches are the rows of one; an epoch's steps have every unit once, in an order by the seed."""
    folder = write_pairs(tmp_path, [[0, 1]] * 8)
    config = make_config(global_batch=4, micro_batch=1)
    alone = PairMixture(folder, CONTRAST, (), config, 0, 1)
    assert alone.steps == 2
    seen = []
    for step in range(2):
        both = [PairMixture(folder, CONTRAST, (), config, 0, 2).step_batches(step, rank) for rank in (0, 1)]
        mixed = [batch for pair in zip(*both, strict=True) for batch in pair]
        for one, other in zip(alone.step_batches(step, 0), mixed, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.ranking.scale, other.ranking.scale)  # type: ignore[union-attr]
            seen.append(one.ids.tolist())
    assert len({str(ids) for ids in seen}) == 8
    again = PairMixture(folder, CONTRAST, (), make_config(global_batch=4, micro_batch=1, seed=1), 0, 1)
    assert [b.ids.tolist() for b in again.step_batches(0, 0)] != seen[:4]
