"""Laws of train/optim.py: the rules against numpy, the schedules' ends, stochastic rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.train_fixtures import make_config
from train.config import TrainConfig
from train.errors import TrainError
from train.optim import RULES, Optimizer, Rule, State, grad_norm, learning_rate, state_bytes, stochastic_round_

Array = NDArray[np.float64]


def numpy_adalite(p: Array, gradients: list[Array], lr: float, decay: float) -> Array:
    """Adalite v1 in float64, written from its description."""
    p, c = p.copy(), np.zeros(len(p) if p.ndim > 1 else 1)
    for t, g in enumerate(gradients, 1):
        if p.ndim > 1:
            flat = g.reshape(len(g), -1)
            g = (flat - flat.mean(1)[:, None]).reshape(g.shape)
        else:
            g = g - g.mean()
        beta = 1 - t**-0.8
        rows = c.reshape(-1, *[1] * (p.ndim - 1))
        u = (1 - beta) * g**2 + beta * rows + 1e-5
        c = u.reshape(len(u), -1).mean(1) if p.ndim > 1 else np.array([u.mean()])
        m = g / np.sqrt(u)
        m = m / max(1.0, math.sqrt((m**2).mean()))
        p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
        if p_norm and g_norm:
            m = m * p_norm / g_norm
            m = m + decay * (p - p / p_norm)
        p = p - lr * m
    return p


def numpy_adamw(p: Array, gradients: list[Array], lr: float, decay: float) -> Array:
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        if p.ndim > 1:
            p = p - lr * decay * p
        p = p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


def optimizer(p: Tensor, **config: object) -> Optimizer:
    return Optimizer({"p": p}, make_config(**config), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 4, 2)])
@pytest.mark.parametrize("name", ["adalite", "adamw"])
def test_fifty_steps_equal_numpy(shape: tuple[int, ...], name: str) -> None:
    """The in-place float32 rule follows an independent float64 version, for vectors and matrices."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=shape), [rng.normal(size=shape) * 0.1 for _ in range(50)]
    p = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    config = {"optimizer": name, "adalite_lambda": 0.01} | ({"weight_decay": 0.01} if name == "adamw" else {})
    steps = optimizer(p, **config)
    for g in gradients:
        p.grad = torch.tensor(g, dtype=torch.float32)
        steps.step(1e-3)
    rule = numpy_adalite if name == "adalite" else numpy_adamw
    np.testing.assert_allclose(p.detach().numpy(), rule(start, gradients, 1e-3, 0.01), rtol=2e-4, atol=2e-5)
    assert np.abs(p.detach().numpy() - start).max() > 1e-3


def test_adalite_leaves_a_zero_gradient_and_zero_weights_finite() -> None:
    """A zero norm on either side is no division by zero."""
    for start in (torch.zeros(3, 4), torch.ones(3, 4)):
        for gradient in (torch.zeros(3, 4), torch.ones(3, 4)):  # a constant row is zero once centred
            p = start.clone().requires_grad_()
            p.grad = gradient.clone()
            optimizer(p, optimizer="adalite").step(0.1)
            assert torch.equal(p.detach(), start)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    """No gradient: no update, no state, no error."""
    p = torch.ones(3, 4, requires_grad=True)
    mine = optimizer(p, optimizer="adalite")
    mine.step(0.1)
    assert torch.equal(p.detach(), torch.ones(3, 4))
    assert list(mine.states()) == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_what_it_declares(name: str) -> None:
    """Names, shapes and bytes; the preflight's figure is the real one."""
    shapes = [(7,), (5, 9), (3, 4, 2)]
    tensors = {str(s): torch.randn(s, requires_grad=True) for s in shapes}
    mine = Optimizer(tensors, make_config(optimizer=name), torch.Generator())
    for p in tensors.values():
        p.grad = torch.randn_like(p)
    mine.step(1e-3)
    declared = {f"{s}|{key}": shape for s in shapes for key, shape in RULES[name].state(s).items()}
    assert {full: tuple(t.shape) for full, t in mine.states()} == declared
    assert sum(t.nbytes for _, t in mine.states()) == state_bytes(name, shapes)


# ---- saved states ----------------------------------------------------------------------------------------


def heavy_ball_(p: Tensor, g: Tensor, state: State, step: int, lr: float, config: TrainConfig) -> None:
    """A rule of the tests' own: momentum, scaled by the largest gradient so far."""
    speed, largest = state.get("speed", torch.zeros_like(p)), state.get("largest", torch.zeros(()))
    state["largest"] = torch.maximum(largest, g.abs().max())
    state["speed"] = 0.9 * speed + g / state["largest"]
    p.sub_(lr * state["speed"])


@pytest.fixture
def heavy_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    """`optimizer: adamw` is the rule above."""
    monkeypatch.setitem(RULES, "adamw", Rule(heavy_ball_, lambda shape: {"speed": shape, "largest": ()}))


def load(into: Optimizer, updates: dict[str, int], states: dict[str, Tensor]) -> None:
    into.load(updates, states.keys(), lambda name, like: states[name].clone())


@pytest.mark.usefixtures("heavy_ball")
def test_another_rules_state_is_saved_and_taken_up() -> None:
    """A rule with other names resumes to the bit; no place but the rule itself knows its names."""
    gradients = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = resumed = torch.ones(3, 4)
    for stops in (False, True):
        p = torch.ones(3, 4, requires_grad=True)
        mine = optimizer(p, optimizer="adamw")
        for number, gradient in enumerate(gradients):
            if stops and number == 3:
                fresh = optimizer(p, optimizer="adamw")
                load(fresh, mine.updates(), dict(mine.states()))
                mine = fresh
            p.grad = gradient.clone()
            mine.step(0.1)
        whole, resumed = resumed, p.detach()
    assert torch.equal(whole, resumed)
    assert [name for name, _ in mine.states()] == ["p|largest", "p|speed"]


@pytest.mark.parametrize("declared", [{"speed": (3, 4)}, {"speed": (3, 4), "largest": (), "count": ()}])
def test_a_rule_that_keeps_other_tensors_than_it_declares_is_found(
    monkeypatch: pytest.MonkeyPatch, declared: dict[str, tuple[int, ...]]
) -> None:
    """At its first update, not when a run is resumed."""
    monkeypatch.setitem(RULES, "adamw", Rule(heavy_ball_, lambda shape: declared))
    p = torch.ones(3, 4, requires_grad=True)
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"keeps \['largest', 'speed'\] for p, and declares"):
        optimizer(p, optimizer="adamw").step(0.1)


WRONG_STATES: list[tuple[dict[str, int], dict[str, Tensor], str]] = [
    ({"p": 2}, {"p|m": torch.ones(3, 4)}, r"optimizer state missing: p\|v$"),
    ({"p": 2}, {"p|c": torch.ones(3, 1)}, r"optimizer state missing: p\|m, p\|v; not expected: p\|c$"),
    ({"p": 2}, {}, r"optimizer state missing: p\|m, p\|v$"),
    ({"p": 0}, {"p|m": torch.ones(3, 4), "p|v": torch.ones(3, 4)}, r"not expected: p\|m, p\|v$"),
    ({"p": 2}, {f"p|{key}": torch.ones(3, 4) for key in "mvabcd"}, r"not expected: p\|a, p\|b, p\|c and 1 more$"),
    ({"p": 2}, {"p|m": torch.ones(3, 4), "p|v": torch.ones(4, 3)}, r"v is torch.float32 \[4, 3\], expected .*\[3, 4\]"),
    ({"p": 2}, {"p|m": torch.ones(3, 4).half(), "p|v": torch.ones(3, 4)}, r"torch.float16 .*expected torch.float32"),
    ({"q": 2}, {"p|m": torch.ones(3, 4), "p|v": torch.ones(3, 4)}, "update counts missing: p; not expected: q$"),
]  # fmt: skip


@pytest.mark.parametrize(("updates", "states", "message"), WRONG_STATES, ids=[m[:45] for *_, m in WRONG_STATES])
def test_a_state_that_is_not_the_rules_is_refused(
    updates: dict[str, int], states: dict[str, Tensor], message: str
) -> None:
    """Missing, extra, misshapen: an error that names it; never a resume without its state."""
    mine = optimizer(torch.ones(3, 4, requires_grad=True), optimizer="adamw")
    with pytest.raises(TrainError, match=message):
        load(mine, updates, states)


@pytest.mark.parametrize("name", ["adalite", "adamw"])
def test_stepping_in_backward_equals_stepping_after(name: str) -> None:
    """Fused backward: the same weights bit for bit, and no gradient is left."""
    weights = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        mine = Optimizer(dict(net.named_parameters()), make_config(optimizer=name), torch.Generator())
        if in_backward:
            mine.step_in_backward(lambda: 1e-3)
        for _ in range(3):
            net(torch.ones(5, 4)).square().sum().backward()
            if not in_backward:
                mine.step(1e-3)
            assert all((p.grad is None) == in_backward for p in net.parameters())
            net.zero_grad()
        weights.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_non_finite_gradient_in_fused_backward_is_an_error() -> None:
    """It names the parameter and does not touch it."""
    p = torch.ones(2, 2, requires_grad=True)
    optimizer(p, optimizer="adamw").step_in_backward(lambda: 1.0)
    with pytest.raises(TrainError, match="gradient of p is not finite"):
        (p * float("inf")).sum().backward()
    assert torch.equal(p.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_at_their_ends(schedule: str) -> None:
    """Warm-up rises from above zero to the full rate; the end is near zero, or full when constant."""
    config = make_config(lr=1.0, schedule=schedule, warmup=0.2)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert 0 < rates[0] < 0.06
    assert rates[:20] == sorted(rates[:20])
    assert rates[19] < rates[20] == 1.0
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-12)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx({"cosine": 0.5, "linear": 0.5, "constant": 1.0}[schedule])


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_schedules_without_and_with_nothing_but_warmup(warmup: float) -> None:
    """Warm-up 0 starts at the full rate, warm-up 1 never leaves the ramp; one step is enough."""
    config = make_config(lr=1.0, warmup=warmup)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates == sorted(rates, reverse=warmup == 0.0)
    assert 0 < learning_rate(0, 1, config) <= 1.0


def test_stochastic_rounding_is_unbiased_and_lands_on_neighbours() -> None:
    """The mean over many draws is the value; each draw is one of its two bfloat16 neighbours."""
    for value in (1.001, -1.001, 3.14159e-5, 1e-40):
        x = torch.full((200_000,), value)
        rounded = stochastic_round_(x.clone(), torch.Generator().manual_seed(0))
        assert torch.equal(rounded, rounded.bfloat16().float())
        below, above = float(rounded.min()), float(rounded.max())
        assert below <= float(x[0]) <= above
        gap = above - below
        assert abs(float(rounded.double().mean()) - float(x[0])) < 5 * gap / (2 * math.sqrt(len(x)))
        assert len(rounded.unique()) == 2


def test_stochastic_rounding_keeps_exact_and_special_values() -> None:
    """bfloat16 values, zeros, infinities and NaN stay; nothing finite becomes infinite."""
    top = torch.finfo(torch.bfloat16).max
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, top, -top, float("inf"), -float("inf")])
    gen = torch.Generator().manual_seed(0)
    assert torch.equal(stochastic_round_(exact.clone(), gen), exact)
    largest = torch.finfo(torch.float32).max
    huge = torch.tensor([largest, -largest, top * 1.0001, top * 0.999]).repeat(1000)
    assert torch.isfinite(stochastic_round_(huge, gen)).all()
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert torch.isnan(stochastic_round_(nans.repeat(100), gen)).all()


def test_small_steps_on_bfloat16_weights_are_not_lost() -> None:
    """Steps far below half an ulp move the weights on average; with plain rounding nothing moves."""
    moved = []
    for stochastic in (True, False):
        p = torch.ones(4096, 4, dtype=torch.bfloat16, requires_grad=True)
        mine = optimizer(p, optimizer="adamw", stochastic_rounding=stochastic)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            mine.step(1e-4)
        moved.append(1 - float(p.detach().double().mean()))
    assert moved[0] == pytest.approx(20e-4, rel=0.15)
    assert moved[1] == 0.0


def test_grad_norm_is_over_all_gradients() -> None:
    """As if they were one vector; none gives 0."""
    parts = [torch.randn(3, 4), torch.randn(5)]
    whole = torch.cat([p.flatten() for p in parts])
    torch.testing.assert_close(grad_norm(parts), whole.norm())
    assert grad_norm([]) == 0
