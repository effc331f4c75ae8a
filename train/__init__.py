"""MixCE finetuning of causal language models; the names below are the public ones.

Nothing heavy is imported here: `from train.loss import mixce_loss` costs torch, `import train` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import TrainConfig, load_config
    from train.errors import TrainError
    from train.loop import finetune
    from train.loss import fused_mixce_loss, mixce_loss

__all__ = ["TrainConfig", "TrainError", "finetune", "fused_mixce_loss", "load_config", "mixce_loss"]

_HOME = {
    "TrainConfig": "config",
    "TrainError": "errors",
    "finetune": "loop",
    "fused_mixce_loss": "loss",
    "load_config": "config",
    "mixce_loss": "loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"train.{_HOME[name]}"), name)
