"""Laws of train/loss.py: the formula, its gradient, and the fused form against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train import loss as loss_module
from train.loss import fused_mixce_loss, mixce_loss

RATIOS = [0.0, 0.3, 0.75, 1.0]


def problem(tokens: int = 23, vocab: int = 37, width: int = 11, dtype: torch.dtype = torch.float32) -> dict:
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab, (tokens,), generator=gen)
    labels[::4] = -100
    return {
        "hidden": torch.randn(tokens, width, generator=gen, dtype=torch.float64).to(dtype),
        "weight": torch.randn(vocab, width, generator=gen, dtype=torch.float64).to(dtype),
        "bias": torch.randn(vocab, generator=gen, dtype=torch.float64).to(dtype),
        "labels": labels,
    }


def oracle(logits: Tensor, labels: Tensor, ratio: float) -> tuple[float, Tensor]:
    """The loss and its gradient token by token in float64, written from the paper, without autograd."""
    total, grad = 0.0, torch.zeros_like(logits, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        p = torch.softmax(logits[row].double(), 0)
        weight = ratio + (1 - ratio) * float(p[label])
        total -= weight * float(torch.log(p[label]))
        grad[row] = weight * p
        grad[row, label] -= weight
    return total, grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_reference_equals_the_papers_formula(ratio: float) -> None:
    """Value and gradient follow -(eta + (1 - eta) q) log q with q held fixed: no gradient through q."""
    case = problem()
    logits = (case["hidden"] @ case["weight"].T).requires_grad_()
    loss, count = mixce_loss(logits, case["labels"], ratio)
    loss.backward()
    expected, grad = oracle(logits.detach(), case["labels"], ratio)
    assert count == int((case["labels"] != -100).sum())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad is not None
    assert relative(logits.grad, grad) < 1e-5


def test_ratio_one_is_cross_entropy() -> None:
    """At mixing ratio 1 both forms equal PyTorch's summed cross-entropy."""
    case = problem()
    logits = case["hidden"] @ case["weight"].T
    expected = functional.cross_entropy(logits, case["labels"], reduction="none").sum()
    torch.testing.assert_close(mixce_loss(logits, case["labels"], 1.0)[0], expected)
    fused, _ = fused_mixce_loss(case["hidden"], case["weight"], case["labels"], 1.0)
    torch.testing.assert_close(fused, expected)


def test_ratio_zero_differs_and_is_self_reinforcement() -> None:
    """At 0 the weight of a token is the model's own probability of it."""
    logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    assert mixce_loss(logits, labels, 0.0)[0].item() == pytest.approx(0.5 * 0.6931472, rel=1e-6)


def test_ignored_labels_change_nothing() -> None:
    """Rows labelled -100 add nothing to the sum or the count, and get a zero gradient."""
    case = problem()
    keep = case["labels"] != -100
    logits = (case["hidden"] @ case["weight"].T).requires_grad_()
    loss, count = mixce_loss(logits, case["labels"], 0.5)
    loss.backward()
    short, short_count = mixce_loss(logits.detach()[keep], case["labels"][keep], 0.5)
    torch.testing.assert_close(loss.detach(), short)
    assert count == short_count
    assert logits.grad is not None
    assert not logits.grad[~keep].any()


def test_nothing_labelled_is_zero_and_never_nan() -> None:
    """(0, 0), finite zero gradients, in both forms: an empty micro-batch is harmless."""
    case = problem()
    labels = torch.full_like(case["labels"], -100)
    for fused in (False, True):
        hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"].clone().requires_grad_()
        if fused:
            loss, count = fused_mixce_loss(hidden, weight, labels, 0.5)
        else:
            loss, count = mixce_loss(hidden @ weight.T, labels, 0.5)
        loss.backward()
        assert (loss.item(), count.item()) == (0.0, 0)
        assert hidden.grad is not None
        assert weight.grad is not None
        assert not hidden.grad.any()
        assert not weight.grad.any()


def test_gradcheck_at_ratio_one() -> None:
    """Finite differences agree in float64 where the loss has no stop-gradient."""
    case = problem(tokens=5, vocab=7, width=4, dtype=torch.float64)
    logits = (case["hidden"] @ case["weight"].T).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mixce_loss(z, case["labels"], 1.0)[0], logits)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_fused_gradients_are_finite_differences_at_ratio_one(softcap: float | None) -> None:
    """Central differences in float64, entry by entry (gradcheck runs backward twice, which is refused)."""
    case = problem(tokens=5, vocab=7, width=4, dtype=torch.float64)
    inputs = [case[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def loss() -> Tensor:
        h, w, b = inputs
        return fused_mixce_loss(h, w, case["labels"], 1.0, bias=b, softcap=softcap, chunk_tokens=2)[0]

    loss().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        flat, grad = tensor.data.view(-1), tensor.grad.view(-1)
        for i in range(len(flat)):
            middle = flat[i].item()
            flat[i] = middle + 1e-6
            above = loss().item()
            flat[i] = middle - 1e-6
            below = loss().item()
            flat[i] = middle
            assert (above - below) / 2e-6 == pytest.approx(grad[i].item(), rel=1e-6, abs=1e-8)


def test_gradcheck_with_q_held_fixed() -> None:
    """At any ratio the gradient is that of fixed weights times the cross-entropies."""
    case = problem(tokens=5, vocab=7, width=4, dtype=torch.float64)
    keep = case["labels"] != -100
    labels = case["labels"][keep]
    logits = (case["hidden"] @ case["weight"].T)[keep].requires_grad_()
    q = torch.softmax(logits.detach(), -1).gather(1, labels[:, None])[:, 0]

    def fixed(z: Tensor) -> Tensor:
        return ((0.3 + 0.7 * q) * functional.cross_entropy(z, labels, reduction="none")).sum()

    assert torch.autograd.gradcheck(fixed, logits)
    expected = torch.autograd.grad(fixed(logits), logits)[0]
    found = torch.autograd.grad(mixce_loss(logits, labels, 0.3)[0], logits)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, None])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_equals_the_float64_reference(
    chunk: int | None, trained_head: bool, ratio: float, softcap: float | None, dtype: torch.dtype
) -> None:
    """Value and every gradient within 1e-5 relative, for any chunking, head, cap and ratio."""
    case = problem(dtype=dtype)
    names = ("hidden", "weight", "bias")
    exact = {k: case[k].to(torch.float64, copy=True).requires_grad_() for k in names}
    z = functional.linear(exact["hidden"], exact["weight"], exact["bias"])
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected, _ = mixce_loss(z, case["labels"], ratio)
    (expected * 0.37).backward()

    mine = {k: case[k].clone().requires_grad_(trained_head or k == "hidden") for k in names}
    loss, count = fused_mixce_loss(
        mine["hidden"], mine["weight"], case["labels"], ratio,
        bias=mine["bias"], softcap=softcap, chunk_tokens=chunk,
    )  # fmt: skip
    (loss * 0.37).backward()
    assert count == int((case["labels"] != -100).sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key in names if trained_head else ("hidden",):
        found, wanted = mine[key].grad, exact[key].grad
        assert found is not None
        assert wanted is not None
        assert found.dtype == dtype
        assert relative(found, wanted) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert trained_head or (mine["weight"].grad is None and mine["bias"].grad is None)


@pytest.mark.parametrize("trained_head", [False, True])
def test_fused_in_bfloat16_is_as_close_as_the_reference(trained_head: bool) -> None:
    """bfloat16 in, bfloat16 gradients out, no further from float64 than twice the plain path plus an ulp."""
    case = problem(tokens=64, vocab=97, width=32)
    exact = {k: case[k].bfloat16().double().requires_grad_() for k in ("hidden", "weight")}
    mixce_loss(exact["hidden"] @ exact["weight"].T, case["labels"], 0.5)[0].backward()
    grads = []
    for fused in (True, False):
        h = case["hidden"].bfloat16().requires_grad_()
        w = case["weight"].bfloat16().requires_grad_(trained_head)
        if fused:
            loss, _ = fused_mixce_loss(h, w, case["labels"], 0.5, chunk_tokens=9)
        else:
            loss, _ = mixce_loss(h @ w.T, case["labels"], 0.5)
        loss.backward()
        assert loss.dtype == torch.float32
        grads.append({"hidden": h.grad, "weight": w.grad})
    for key in ("hidden", "weight") if trained_head else ("hidden",):
        wanted = exact[key].grad
        found, plain = grads[0][key], grads[1][key]
        assert wanted is not None
        assert found is not None
        assert plain is not None
        assert found.dtype == torch.bfloat16
        assert relative(found, wanted) < 2 * relative(plain, wanted) + 2**-8


@pytest.mark.parametrize(("vocab", "expected"), [(1000, 8388), (400_000, 20), (1_000_000, 16)])
def test_a_chunk_of_logits_is_bounded(monkeypatch: pytest.MonkeyPatch, vocab: int, expected: int) -> None:
    """About 32 MB of float32 logits at once on CPU, and never fewer than 16 rows (a matrix product of one is slow)."""
    rows: list[int] = []

    def recorded(logits: Tensor, *_: object) -> tuple[Tensor, None]:
        rows.append(len(logits))
        return logits.sum(), None

    monkeypatch.setattr(loss_module, "_chunk_gradient", recorded)
    labels = torch.ones(expected + 3, dtype=torch.long)
    fused_mixce_loss(torch.ones(len(labels), 1), torch.ones(vocab, 1), labels, 0.5)
    assert rows == [expected, 3]


def test_only_labelled_tokens_are_projected() -> None:
    """A NaN in the hidden state of an ignored position reaches neither the loss nor a gradient."""
    case = problem()
    hidden = case["hidden"].clone()
    hidden[case["labels"] == -100] = float("nan")
    hidden.requires_grad_()
    weight = case["weight"].requires_grad_()
    loss, _ = fused_mixce_loss(hidden, weight, case["labels"], 0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_batched_shapes_are_flattened() -> None:
    """[batch, time, width] with [batch, time] labels gives the flat result."""
    case = problem(tokens=24)
    flat, _ = fused_mixce_loss(case["hidden"], case["weight"], case["labels"], 0.5)
    shaped, count = fused_mixce_loss(case["hidden"].view(2, 12, -1), case["weight"], case["labels"].view(2, 12), 0.5)
    plain, plain_count = mixce_loss(
        (case["hidden"] @ case["weight"].T).view(2, 12, -1), case["labels"].view(2, 12), 0.5
    )
    assert shaped.item() == flat.item()
    assert count == plain_count
    torch.testing.assert_close(plain, flat)


def test_without_grad_no_gradient_is_computed() -> None:
    """Under no_grad the value is the same and nothing is kept."""
    case = problem()
    hidden = case["hidden"].requires_grad_()
    with torch.no_grad():
        loss, _ = fused_mixce_loss(hidden, case["weight"], case["labels"], 0.5)
    kept, _ = fused_mixce_loss(hidden, case["weight"], case["labels"], 0.5)
    assert not loss.requires_grad
    assert loss.item() == kept.item()


def test_extreme_logits_stay_finite() -> None:
    """A label of probability 0 in float32 gives a large finite loss, not infinity."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[500.0], [-500.0]])
    loss, _ = fused_mixce_loss(hidden, weight, torch.tensor([1]), 1.0)
    loss.backward()
    assert loss.item() == 1000.0
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_a_second_backward_is_refused() -> None:
    """The gradients are handed out once; asking again is an error, never a wrong number."""
    case = problem()
    loss, _ = fused_mixce_loss(case["hidden"].requires_grad_(), case["weight"], case["labels"], 0.5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward may run once"):
        loss.backward()


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_ratio_outside_the_unit_interval_is_an_error(ratio: float) -> None:
    """Both forms say what they found and what they expected."""
    case = problem()
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        mixce_loss(case["hidden"] @ case["weight"].T, case["labels"], ratio)
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        fused_mixce_loss(case["hidden"], case["weight"], case["labels"], ratio)
