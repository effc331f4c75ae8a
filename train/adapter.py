"""LoRA by the library peft: adapters inside a model whose own weights are frozen, and their folder.

The adapter is float32, whatever the model is in. A folder has the names and the config that peft writes, so peft,
vLLM and slerp-merge read it. LoRA: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.errors import TrainError, install


def add_adapter(model: Any, config: TrainConfig) -> None:
    """Freeze the model and put an adapter inside, in place; the same numbers in every process.

    Raises TrainError without peft, for targets that are not there, and for the head of a fused loss, which would not
    see its adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise TrainError(f"lora needs peft, not installed here. Install: {install('lora')}.") from e
    lora = config.lora
    assert lora is not None
    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM",
        base_model_name_or_path=config.model,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a property that transformers has renamed
        torch.manual_seed(config.seed)
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as e:
            raise TrainError(f"lora.targets is {', '.join(lora.targets)}: {str(e).splitlines()[0]}") from e
    settings.target_modules = sorted(settings.target_modules or ())  # a set would be written in any order
    for _, parameter in adapter_tensors(model):
        parameter.data = parameter.data.float()
    if config.fused_loss and hasattr(model.get_output_embeddings(), "base_layer"):
        raise TrainError("lora.targets has the output head, which fused_loss reads by itself. Set fused_loss: false.")


def adapter_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The adapter's weights, under the names that peft writes."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield f"base_model.model.{name.replace('.default', '')}", parameter


def fold_adapter(config: TrainConfig, adapter: Path, folder: Path) -> None:
    """Write the model with the adapter added to its weights, in the model's own type. Raises TrainError."""
    from merge_tool import MergeToolError, merge

    base = config.model if config.revision is None else f"{config.model}@{config.revision}"
    try:
        merge(base, adapter, folder, t=1.0)
    except MergeToolError as e:
        raise TrainError(f"{adapter} cannot be added to {base}: {e}") from e
