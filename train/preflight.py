"""What a run will need, computed before anything is allocated.

The model is built on torch's meta device, where tensors have shapes and no storage. Its forward runs there once, with
hooks that count what autograd would keep. The figures are estimates: allocators and kernels add memory of their own,
and attention is counted as a kernel that does not keep its scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from train.config import TrainConfig
from train.errors import TrainError
from train.model import decoder_layers, prepare_model
from train.optim import state_bytes


@dataclass(frozen=True)
class Preflight:
    """Counts of parameters, and bytes for one process."""

    trained: int
    frozen: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None  # of one micro-batch; None when the model cannot be run without storage
    loss_bytes: int
    gathered_bytes: int  # several processes: the largest piece that is whole while it is used
    update_bytes: int  # the optimizer's temporaries for the largest parameter
    tokens_per_step: int
    num_checkpoints: int  # kept at a time, besides the one being written
    checkpoint_bytes: int  # of one, on disk

    def lines(self) -> str:
        """For people, in GB of 10^9 bytes."""
        parts = {
            "weights": self.weight_bytes,
            "gradients": self.gradient_bytes,
            "optimizer state": self.optimizer_bytes,
            "activations": self.activation_bytes,
            "loss": self.loss_bytes,
            "gathered": self.gathered_bytes,
            "update": self.update_bytes,
        }
        shown = [f"  {name:16} {_gb(value)}" for name, value in parts.items() if value != 0]
        total = sum(value or 0 for value in parts.values())
        return "\n".join(
            [
                f"parameters: {self.trained + self.frozen:,} ({self.trained:,} trained, {self.frozen:,} frozen)",
                "estimated memory per process:",
                *shown,
                f"  {'sum':16} {_gb(total)}",
                f"{self.tokens_per_step:,} tokens per step at most",
                f"disk for checkpoints: up to {_gb((self.num_checkpoints + 1) * self.checkpoint_bytes).strip()}, "
                f"{self.num_checkpoints} of {_gb(self.checkpoint_bytes).strip()} and one being written",
            ]
        )


def _gb(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e9:9.3f} GB"


def preflight(config: TrainConfig, model_config: Any, dtype: torch.dtype, world_size: int) -> Preflight:
    """The estimate for one process of `world_size`; reads no weight and allocates nothing."""
    model = build_on_meta(config, model_config, dtype)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    size = dtype.itemsize
    optimizer_bytes = state_bytes(config.optimizer, (tuple(p.shape) for p in trained))
    return Preflight(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        weight_bytes=sum(p.nbytes for p in parameters) // world_size,
        gradient_bytes=gradient_bytes(config, trained, world_size),
        optimizer_bytes=optimizer_bytes // world_size,
        activation_bytes=activation_bytes(model, config.rows_at_once, config.sequence_length),
        loss_bytes=_loss_bytes(config, model, size),
        gathered_bytes=_gathered_bytes(model) if world_size > 1 else 0,
        update_bytes=_update_bytes(trained, size) // world_size,
        tokens_per_step=config.sequences_per_step(world_size)
        * config.rows_at_once
        // config.micro_batch
        * config.sequence_length,
        num_checkpoints=max(config.keep_last, config.averaged.of if config.averaged else 1) + 1,  # and the best
        checkpoint_bytes=sum(p.nbytes for p in (trained if config.lora else parameters)) + optimizer_bytes,
    )


def build_on_meta(config: TrainConfig, model_config: Any, dtype: torch.dtype) -> Any:
    """The model with shapes and no storage, frozen and checkpointed as the config says."""
    from transformers import AutoModelForCausalLM

    attention = "sdpa" if config.attention == "flash_attention_2" else config.attention  # alike in what they keep
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                model_config, dtype=dtype, attn_implementation=attention
            )
    except ValueError as e:
        if "scaled_dot_product_attention" in str(e):
            raise TrainError(f"{config.model} has no attention {config.attention}. Set attention: eager.") from e
        raise TrainError(f"{config.model}: transformers knows no causal language model of this kind. {e}") from e
    prepare_model(model, config, may_compile=False)
    return model.train()


def gradient_bytes(config: TrainConfig, trained: list[Any], world_size: int) -> int:
    """All gradients of one process, or with fused backward the largest one; a float32 sum of several is whole."""
    if config.fused_backward:
        return max((int(p.nbytes) for p in trained), default=0) // world_size
    if config.accumulate_in == "float32" and config.accumulates(world_size):
        return sum(4 * int(p.numel()) for p in trained)
    return sum(int(p.nbytes) for p in trained) // world_size


def activation_bytes(model: Any, rows: int, tokens: int) -> int | None:
    """Bytes that autograd keeps between forward and backward of `rows` x `tokens`, the head apart.

    With activation checkpointing: what is kept, and one layer's own while it is computed again.
    """
    try:
        kept = _saved_bytes(model, rows, tokens)
        if not model.is_activation_checkpointing:
            return kept
        model.activation_checkpointing_disable()
        layers = max(1, len(decoder_layers(model)))
        return kept + _saved_bytes(model, rows, tokens) // layers
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None


def _saved_bytes(model: Any, rows: int, tokens: int) -> int:
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}
    # On this device attention keeps its scores; the kernels used in training, eager ones apart, do not.
    text = model.config.get_text_config()
    scores = 0 if text._attn_implementation == "eager" else rows * text.num_attention_heads * tokens * tokens

    def pack(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in weights and (x.shape[-2:] != (tokens, tokens) or x.numel() != scores):
            kept[key] = x
        return x

    dtype = next(model.parameters()).dtype
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device="meta")
    with saved_tensors_hooks(pack, lambda x: x):
        out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    del out
    return sum(int(x.untyped_storage().nbytes()) for x in kept.values())


def _loss_bytes(config: TrainConfig, model: Any, size: int) -> int:
    """The fused loss holds a chunk of logits, the hidden gradient and a trained head's; the plain one all."""
    head: Tensor = model.get_output_embeddings().weight
    tokens = config.rows_at_once * config.sequence_length
    if not config.fused_loss:
        return 3 * 4 * tokens * len(head)
    trained_head = 4 * head.numel() if head.requires_grad else 0
    return (256 << 20) + tokens * head.shape[1] * size + trained_head


def _update_bytes(trained: list[Any], size: int) -> int:
    """Float32 temporaries of one update: two, and of 16-bit weights also the weight and the gradient."""
    largest = max((int(p.numel()) for p in trained), default=0)
    return largest * (8 if size == 4 else 16)


def _gathered_bytes(model: Any) -> int:
    """FSDP2 gathers one layer while the next is fetched, and the embeddings for the whole step."""
    layers = decoder_layers(model)
    per_layer = max((sum(p.nbytes for p in layer.parameters()) for layer in layers), default=0)
    inside = sum(p.nbytes for layer in layers for p in layer.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - inside
    return int(outside + 2 * per_layer)
