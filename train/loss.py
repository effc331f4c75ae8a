"""MixCE, the reference and the fused form: tensors in, (sum over tokens, number of tokens) out.

The law of this file: a loss is a sum and a count, never a mean. The caller divides once, by the labelled tokens of the
whole global step. `labels[..., t]` is the token that position `t` should predict (already shifted), or -100 where
nothing is to be learned. All arithmetic after the projection is float32 or better.

The trick of the fused form: the gradient of MixCE is the gradient of cross-entropy times a weight per token, so it is
known as soon as the logits of a chunk are. The forward pass computes it and drops the logits; the backward pass only
multiplies by a scalar.

MixCE: Zhang et al., "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse
Cross-Entropies", ACL 2023, arXiv 2305.16958.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE = -100
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of logits held at once; larger gains no speed


def mixce_loss(logits: Tensor, labels: Tensor, mixing_ratio: float) -> tuple[Tensor, Tensor]:
    """MixCE from logits [..., vocabulary] and labels [...]: the reference, easy to read, large in memory.

    Per token, with q the model's probability of the label and eta the mixing ratio:
    `-(eta + (1 - eta) * stop_gradient(q)) * log q`. One is cross-entropy, zero pure self-reinforcement.

    Returns the sum over labelled tokens (nats; float32, or float64 for float64 logits) and their number.
    With no labelled token the sum is 0 and its gradient is 0. Raises ValueError for a ratio outside [0, 1].
    """
    _check_ratio(mixing_ratio)
    logits, labels = logits.flatten(0, -2), labels.flatten()
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    nll = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)  # -log q, 0 where ignored
    weight = mixing_ratio + (1 - mixing_ratio) * torch.exp(-nll.detach())
    return (weight * nll).sum(), (labels != IGNORE).sum()


def fused_mixce_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    mixing_ratio: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    labelled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mixce_loss` of `hidden @ lm_head_weight.T + bias`, without ever holding tokens x vocabulary.

    hidden [..., width], lm_head_weight [vocabulary, width], labels [...] (-100 is ignored and never
    projected), bias [vocabulary]; `softcap` c replaces logits z by c * tanh(z / c). `chunk_tokens` rows are
    projected at a time (default: about 32 MB of logits on CPU, 256 MB on a GPU). Gradients reach those of
    hidden, weight and bias that require them; a head's gradient is summed in float32 over the chunks. `labelled` are
    the flat places of the labels; found here if not given, which waits for a GPU.

    The backward pass may run once. Raises ValueError for a ratio outside [0, 1].
    """
    _check_ratio(mixing_ratio)
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    rows = (labels != IGNORE).nonzero().squeeze(-1) if labelled is None else labelled
    picked = hidden if len(rows) == len(labels) else hidden.index_select(0, rows)
    chunk = chunk_tokens or _default_chunk(picked, lm_head_weight)
    wants_grad = torch.is_grad_enabled()
    loss: Tensor = _FusedMixCE.apply(  # type: ignore[no-untyped-call]
        picked, lm_head_weight, bias, labels.index_select(0, rows), mixing_ratio, softcap, chunk, wants_grad
    )
    return loss, torch.full((), len(rows), device=labels.device)


def fused_log_probs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log q of each label, [...] like labels, 0 where it is -100; without ever holding tokens x vocabulary.

    Arguments as for `fused_mixce_loss`. Any loss may be made of the result: the backward pass projects each chunk
    again, and multiplies the gradient of its cross-entropy by one weight for each token.
    """
    shape, labels = labels.shape, labels.flatten()
    rows = (labels != IGNORE).nonzero().squeeze(-1)
    hidden = hidden.flatten(0, -2)
    picked = hidden if len(rows) == len(labels) else hidden.index_select(0, rows)
    chunk = chunk_tokens or _default_chunk(picked, lm_head_weight)
    log_q: Tensor = _FusedLogProbs.apply(  # type: ignore[no-untyped-call]
        picked, lm_head_weight, bias, labels.index_select(0, rows), softcap, chunk
    )
    return log_q.new_zeros(len(labels)).index_copy(0, rows, log_q).view(shape)


class _FusedMixCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mixing_ratio: float,
        softcap: float | None,
        chunk_tokens: int,
        wants_grad: bool,
    ) -> Tensor:
        needed = [wants_grad and need for need in ctx.needs_input_grad[:3]]
        grads = _Gradients(needed, hidden, weight, bias)
        loss = torch.zeros((), dtype=grads.wide, device=hidden.device)

        def weigh(log_q: Tensor) -> Tensor:
            return mixing_ratio + (1 - mixing_ratio) * log_q.exp()

        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = functional.linear(hidden[part], weight, bias).to(grads.wide)
            log_q, grad = _chunk_gradient(logits, labels[part], weigh, softcap, any(needed))
            loss -= (weigh(log_q) * log_q).sum()
            del logits
            grads.add(part, grad)
            del grad  # before the next chunk's logits are allocated: one chunk at a time
        ctx.grads = grads.narrowed()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("fused_mixce_loss: backward may run once, and it ran before. Compute the loss again.")
        grads, ctx.grads = ctx.grads, None
        # In place: these tensors are ours alone, and a copy of a head's gradient is 100s of MB.
        return (*(None if g is None else g.mul_(scale) for g in grads), None, None, None, None, None)


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.softcap, ctx.chunk_tokens = softcap, chunk_tokens
        wide = _wide(hidden)
        log_q = torch.empty(len(labels), dtype=wide, device=hidden.device)
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = functional.linear(hidden[part], weight, bias).to(wide)
            log_q[part] = _chunk_gradient(logits, labels[part], torch.ones_like, softcap, False)[0].squeeze(1)
            del logits
        return log_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        grads = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias)
        for start in range(0, len(labels), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = functional.linear(hidden[part], weight, bias).to(grads.wide)
            factor = -upstream[part].unsqueeze(1)  # the gradient of a cross-entropy with this weight for each token
            grad = _chunk_gradient(logits, labels[part], factor, ctx.softcap, True)[1]
            del logits
            grads.add(part, grad)
            del grad
        return (*grads.narrowed(), None, None, None)


class _Gradients:
    """Those of hidden, weight and bias that are needed, chunk by chunk; the head's are summed in `wide`."""

    def __init__(self, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.wide = _wide(hidden)
        self._inputs = hidden, weight, bias
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        self._weight = torch.zeros_like(weight, dtype=self.wide) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=self.wide) if needed[2] and bias is not None else None

    def add(self, part: slice, grad: Tensor | None) -> None:
        """The gradient by the logits of these rows, if there is one."""
        if grad is None:
            return
        hidden, weight, _ = self._inputs
        narrow = grad.to(hidden.dtype)
        if self._hidden is not None:
            torch.mm(narrow, weight, out=self._hidden[part])
        if self._weight is not None:
            _add_product(self._weight, narrow, hidden[part])
        if self._bias is not None:
            self._bias += grad.sum(0)

    def narrowed(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of what they belong to."""
        _, weight, bias = self._inputs
        return (
            self._hidden,
            self._weight if self._weight is None else self._weight.to(weight.dtype),
            self._bias if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunk_gradient(
    logits: Tensor, labels: Tensor, weigh: Callable[[Tensor], Tensor] | Tensor, softcap: float | None, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """log q of the labels [chunk, 1], and the gradient of the weighted cross-entropy by the logits [chunk,
    vocabulary]; `weigh` is the weights [chunk, 1], or gives them from log q. Overwrites `logits`.

    d/dz_j of -w log softmax(z)_y, w held fixed, is w (p_j - [j = y]); a soft cap multiplies by 1 - tanh^2.
    """
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits * logits if wants_grad else None
        logits.mul_(softcap)
    column = labels.unsqueeze(1)
    logits.sub_(logits.amax(1, keepdim=True))
    shifted = logits.gather(1, column)
    exps = logits.exp_()
    total = exps.sum(1, keepdim=True)
    log_q = shifted - total.log()
    if not wants_grad:
        return log_q, None
    weight = weigh if isinstance(weigh, Tensor) else weigh(log_q)
    grad = exps.mul_(weight / total)
    grad.scatter_add_(1, column, -weight)
    return log_q, grad if slope is None else grad.mul_(slope)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad.T @ hidden, in total's dtype (float32 or better, however narrow the factors)."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.T, hidden)
    else:
        total += grad.T @ hidden


def _default_chunk(hidden: Tensor, weight: Tensor) -> int:
    held = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
    return max(16, held // (4 * len(weight)))


def _check_ratio(mixing_ratio: float) -> None:
    if not 0 <= mixing_ratio <= 1:
        raise ValueError(f"mixing_ratio is {mixing_ratio}, expected a number from 0 to 1.")
