"""Adalite v1 and AdamW for weights without a float32 master, and schedules as pure functions of the step.

Each rule is a free function that changes one float32 parameter in place from its gradient and its state; beside it is
the declaration of that state, so a checkpoint is loaded whole or refused. `Optimizer` owns the states and can step one
parameter at a time, which is what fused backward needs. Only whole-tensor operations are used, so a DTensor (FSDP2) is
updated as if it were in one piece: norms and means are over the parameter, not over a rank's shard. bfloat16 weights
are rounded stochastically, or steps below half an ulp would be lost.

Adalite is the version of January 2024 (later releases under the name are another algorithm). Its quirks are kept: eps
accumulates in the second moment, so the relative step shrinks like t^-0.4 even at a constant learning rate, and scaling
the loss changes the step. AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.errors import TrainError

State = dict[str, Tensor]
Shape = tuple[int, ...]

# ---- schedules -----------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear warm-up, then the schedule.

    The warm-up takes `warmup * steps` steps and its first is not zero; the first step after it has the full
    rate; cosine and linear would be 0 at step `steps`, one after the last.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr * SCHEDULES[config.schedule](min(1.0, done))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}

# ---- rules: one parameter, in float32 ------------------------------------------------------------------

ADALITE_EPS, ADALITE_DECAY = 1e-5, 0.8
ADAM_EPS = 1e-8


def adalite_(p: Tensor, g: Tensor, state: State, step: int, lr: float, config: TrainConfig) -> None:
    """One step of Adalite v1 on p; `g` is consumed. State `c`: one value per row (a scalar for vectors).

    `step` counts this parameter's updates from 1. p and g are float32, alike in shape and placement.
    """
    g.sub_(_row_mean(g))
    beta = 1 - step**-ADALITE_DECAY
    u = g.square().mul_(1 - beta).add_(ADALITE_EPS)
    if "c" in state:
        u.add_(state["c"] * beta)
    state["c"] = _row_mean(u)
    m = u.rsqrt_().mul_(g)
    p_norm, g_norm, m_norm = _norm(p), _norm(g), _norm(m)
    m.div_((m_norm / math.sqrt(p.numel())).clamp_min(1.0))
    both = (p_norm > 0) & (g_norm > 0)
    ratio = torch.where(both, p_norm / g_norm, 1.0)
    # Lambda pulls |p| towards 1: p - p / |p| is the gradient of (|p| - 1)^2 / 2.
    pull = torch.where(both, config.adalite_lambda * (1 - 1 / p_norm), 0.0)
    m.mul_(ratio).addcmul_(p, pull)
    p.sub_(m.mul_(lr))


def _row_mean(x: Tensor) -> Tensor:
    """The mean of each row, shaped to be subtracted; of a vector, its one mean.

    Over a sharded vector a mean of the shards' means would be wrong when they are uneven; a sum is not.
    """
    if x.ndim > 1:
        return x.mean(tuple(range(1, x.ndim)), keepdim=True)
    return _whole(x.sum()) / x.numel()


def _norm(x: Tensor) -> Tensor:
    """The 2-norm of the whole tensor, also when it is sharded."""
    return _whole(torch.linalg.vector_norm(x))


def adamw_(p: Tensor, g: Tensor, state: State, step: int, lr: float, config: TrainConfig) -> None:
    """One step of AdamW on p. State `m`, `v`: float32, p's shape. Weight decay spares vectors."""
    beta1, beta2 = config.betas
    if "m" not in state:
        state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
    m, v = state["m"], state["v"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if config.weight_decay and p.ndim > 1:
        p.mul_(1 - lr * config.weight_decay)
    denominator = v.sqrt().mul_(1 / math.sqrt(1 - beta2**step)).add_(ADAM_EPS)
    p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


@dataclass(frozen=True)
class Rule:
    """An update of one parameter, and the float32 tensors that it keeps between updates: their names and shapes."""

    update: Callable[[Tensor, Tensor, State, int, float, TrainConfig], None]
    state: Callable[[Shape], dict[str, Shape]]


RULES: dict[str, Rule] = {
    "adalite": Rule(adalite_, lambda shape: {"c": (shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else ()}),
    "adamw": Rule(adamw_, lambda shape: {"m": shape, "v": shape}),
}


def state_bytes(optimizer: str, shapes: Iterable[Shape]) -> int:
    """Bytes of optimizer state for parameters of these shapes, from the shapes alone."""
    return sum(4 * math.prod(kept) for shape in shapes for kept in RULES[optimizer].state(shape).values())


# ---- the optimizer: owns the states --------------------------------------------------------------------


@dataclass
class _Slot:
    """One parameter's state and how often it was updated."""

    state: State
    updates: int = 0


class Optimizer:
    """Steps named parameters in place, all at once or one by one; one without a gradient is left alone."""

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainConfig, generator: torch.Generator) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._rule, self._config, self._generator = RULES[config.optimizer], config, generator
        self._slots = {name: _Slot({}) for name in self._parameters}

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient; the gradients are kept (the caller clears them)."""
        for name, p in self._parameters.items():
            if p.grad is not None:
                self.step_one(name, p.grad, lr)

    @torch.no_grad()
    def step_one(self, name: str, grad: Tensor, lr: float) -> None:
        """Update one parameter. `grad` may be overwritten."""
        p, slot = self._parameters[name], self._slots[name]
        slot.updates += 1
        is_wide = p.dtype in (torch.float32, torch.float64)
        wide, grad = (p.data, grad) if is_wide else (p.data.float(), grad.float())
        self._rule.update(wide, grad, slot.state, slot.updates, lr, self._config)
        declared = self._rule.state(tuple(p.shape)).keys()
        if slot.state.keys() != declared:  # else a checkpoint could not be loaded
            raise ValueError(f"the rule keeps {sorted(slot.state)} for {name}, and declares {sorted(declared)}")
        if is_wide:
            return
        if self._config.stochastic_rounding and p.dtype == torch.bfloat16:
            wide = stochastic_round_(wide, self._generator)
        p.data.copy_(wide)

    def step_in_backward(self, lr: Callable[[], float]) -> None:
        """From now on each parameter is updated, and its gradient freed, as soon as backward has it.

        A non-finite gradient raises TrainError before it touches its parameter; others may have moved.
        """
        for name, p in self._parameters.items():
            p.register_post_accumulate_grad_hook(self._hook(name, lr))  # type: ignore[no-untyped-call]

    def _hook(self, name: str, lr: Callable[[], float]) -> Callable[[Tensor], None]:
        def update(p: Tensor) -> None:
            assert p.grad is not None
            if not bool(torch.isfinite(_whole(p.grad.sum()))):
                raise TrainError(f"the gradient of {name} is not finite, and fused_backward has changed other weights")
            self.step_one(name, p.grad, lr())
            p.grad = None

        return update

    def states(self) -> Iterable[tuple[str, Tensor]]:
        """Every state tensor as (parameter name + '|' + key, tensor), in a fixed order."""
        for name, slot in self._slots.items():
            for key in sorted(slot.state):
                yield f"{name}|{key}", slot.state[key]

    def updates(self) -> dict[str, int]:
        """How often each parameter was updated."""
        return {name: slot.updates for name, slot in self._slots.items()}

    def load(self, updates: Mapping[str, int], saved: Collection[str], read: Callable[[str, Tensor], Tensor]) -> None:
        """Load saved states. `saved` has their names, as `states` gives them; `read(name, like)` gives one, placed like
        the parameter.

        Raises TrainError unless they are exactly the tensors that the rule declares for the updated parameters.
        """
        _check_names("update counts", updates.keys(), self._parameters.keys())
        declared = {
            f"{name}|{key}": (name, key, shape)
            for name, p in self._parameters.items()
            for key, shape in self._rule.state(tuple(p.shape)).items()
            if updates[name]
        }
        _check_names("optimizer state", saved, declared.keys())
        for full, (name, key, shape) in declared.items():
            tensor = read(full, self._parameters[name])
            if (tuple(tensor.shape), tensor.dtype) != (shape, torch.float32):
                actual = f"{tensor.dtype} {list(tensor.shape)}"
                raise TrainError(f"optimizer state {full} is {actual}, expected torch.float32 {list(shape)}")
            self._slots[name].state[key] = tensor
        for name, slot in self._slots.items():
            slot.updates = updates[name]


def _check_names(what: str, actual: Collection[str], expected: Collection[str]) -> None:
    """Raise TrainError for names that are missing or too many, with the first of each."""
    differences = {"missing": {*expected} - {*actual}, "not expected": {*actual} - {*expected}}
    texts = [
        f"{verb}: {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for verb, names in differences.items()
        if names
    ]
    if texts:
        raise TrainError(f"{what} {'; '.join(texts)}")


def _whole(x: Tensor) -> Tensor:
    """A DTensor's full value; a plain tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ---- stochastic rounding -------------------------------------------------------------------------------


def stochastic_round_(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> nearest bfloat16 above or below, by chance, so that the expectation is x; overwrites x.

    The result is float32 with its low 16 bits zero. Exact values stay; NaN and infinity stay; a finite
    value never becomes infinite. A DTensor's shards are rounded one by one, each rank with its own numbers.
    """
    local: Any = x.to_local() if hasattr(x, "to_local") else x
    for part in local.flatten().split(1 << 24) if local.is_contiguous() else [local]:
        _round_part_(part, generator)
    return x


def _round_part_(x: Tensor, generator: torch.Generator) -> None:
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # Adding below the cut carries with probability (low bits) / 2^16; two's complement keeps the sign.
    largest = x.abs() >= torch.finfo(torch.bfloat16).max  # would carry into infinity; NaN is kept below
    noise.masked_fill_(largest | ~torch.isfinite(x), 0)
    nan = torch.isnan(x)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    x.masked_fill_(nan, float("nan"))


def grad_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all gradients as one float32 scalar; DTensor shards count once each."""
    norms = [_whole(torch.linalg.vector_norm(g, dtype=torch.float32)) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
