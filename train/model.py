"""Load a causal language model, make it ready to train, and wrap it so that its forward is the loss.

The loss lives outside the Hugging Face model: `LossModel` takes hidden states and the output matrix and gives a sum and
a count. Nothing here runs code from a checkpoint or asks a question. What a family of models does differently (scaled
logits, position ids it ignores) is found by `check_model`, which compares two tiny forwards, not by a list of names.

NEFTune: Jain et al., arXiv 2310.05914.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from train.batches import Batch
from train.config import TrainConfig
from train.errors import DELETE_CHECKPOINT, TrainError
from train.hub import explain
from train.loss import fused_mixce_loss, mixce_loss

Say = Callable[[str], None]
_AGAIN = "Save or download the model again."

# ---- configuration and loading -------------------------------------------------------------------------


def load_model_config(model: str, revision: str | None, say: Say) -> Any:
    """The model's configuration; an old `stablelm_epoch` one is converted, with a note.

    Raises TrainError when it cannot be read or its architecture needs code of its own.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(model, revision=revision)
        if raw.get("model_type") == "stablelm_epoch":
            say(
                f"Note: {model} has the old stablelm_epoch config. It is read as stablelm, without its code. To merge "
                "the result with it, give slerp-merge --files-from ft: transformers refuses the old config."
            )
            return convert_stablelm_epoch(raw)
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise TrainError(f"{model}: the model config cannot be read. {_reason(e, model, revision)}") from e


_OLD_NAMES = {
    "norm_eps": "layer_norm_eps",
    "rope_pct": "partial_rotary_factor",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}
_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json",
)  # fmt: skip
_DROPPED = ("auto_map", "model_type", "architectures", "rotary_scaling_factor", "transformers_version")


def convert_stablelm_epoch(raw: dict[str, Any]) -> Any:
    """A `stablelm` configuration from the dictionary of an old `stablelm_epoch` one.

    Raises TrainError when a key that shapes the model is missing; it is not guessed.
    """
    from transformers import StableLmConfig

    values = {_OLD_NAMES.get(key, key): value for key, value in raw.items() if key not in _DROPPED}
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    for key in (*needed, "layer_norm_eps", "partial_rotary_factor"):
        if key not in values:
            raise TrainError(
                f"The old stablelm_epoch config lacks {key!r}, so it cannot be converted. Add it to config.json."
            )
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    return StableLmConfig(**values)


def check_context(model_config: Any, config: TrainConfig, say: Say) -> None:
    """Check the sequence length: TrainError beyond learned positions, a note beyond the context of rotary ones."""
    text = model_config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(context, int) or config.sequence_length <= context:
        return
    is_rotary = any(getattr(text, key, None) for key in ("rope_parameters", "rope_scaling", "rope_theta"))
    if not is_rotary:
        raise TrainError(
            f"sequence_length is {config.sequence_length}, but {config.model} has positions for {context} tokens. "
            "Lower it."
        )
    say(f"Note: sequence_length {config.sequence_length} is beyond the context of {config.model}, {context} tokens.")


def load_tokenizer(model: str, revision: str | None, model_config: Any) -> Any:
    """The model's tokenizer. Raises TrainError when there is none, or its ids exceed the vocabulary."""
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZERS):
        raise TrainError(f"{model}: has no tokenizer. Copy tokenizer.json and tokenizer_config.json of its base there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, revision=revision, config=model_config, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as e:
        raise TrainError(f"{model}: the tokenizer cannot be loaded. {_reason(e, model, revision)}") from e
    highest = max(tokenizer.get_vocab().values(), default=-1)
    vocabulary = model_config.get_text_config().vocab_size
    if highest < 0:
        raise TrainError(f"{model}: has no tokenizer. Add tokenizer.json to the folder.")
    if highest >= vocabulary:
        raise TrainError(
            f"{model}: the tokenizer has ids up to {highest}, but the model's vocabulary is {vocabulary}. Resize the "
            "embeddings, or use the tokenizer that the model was trained with."
        )
    return tokenizer


def padding_id(tokenizer: Any, say: Say) -> int:
    """The id that fills short rows. Without a pad token it is eos: the labels of padding are masked."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    eos = tokenizer.eos_token_id
    filler = f"eos {tokenizer.eos_token!r} (id {eos})" if eos is not None else "id 0"
    say(f"Note: the tokenizer has no pad token. Rows are padded with {filler}, never learned and never attended to.")
    return int(eos or 0)


def choose_dtype(choice: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float32 elsewhere (bfloat16 was about 2 times slower on CPU)."""
    if choice != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[choice]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_model(source: str, config: TrainConfig, model_config: Any, dtype: torch.dtype) -> Any:
    """The weights of `source` (a folder or hub id) in `dtype`, on the CPU; no tensor is new or dropped.

    Raises TrainError when a tensor is missing, unexpected or of another shape.
    """
    from transformers import AutoModelForCausalLM

    is_checkpoint = source != config.model
    revision = None if is_checkpoint else config.revision
    next_step = DELETE_CHECKPOINT if is_checkpoint else _AGAIN
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            config=model_config,
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below, all of them, in one error
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as e:
        raise TrainError(f"{source}: the model cannot be loaded. {_reason(e, source, revision, next_step)}") from e
    model, info = loaded
    # Old checkpoints store the rotary table, which is computed.
    unexpected = sorted(k for k in info["unexpected_keys"] if not k.endswith("rotary_emb.inv_freq"))
    for kind, names in (("missing", sorted(info["missing_keys"])), ("unexpected", unexpected)):
        if names:
            some = ", ".join(names[:5])
            raise TrainError(f"{source}: {len(names)} {kind} tensors for its config.json ({some}). {next_step}")
    if info["mismatched_keys"]:
        raise TrainError(f"{source}: tensors of other shapes than config.json says ({_shapes(info)}). {next_step}")
    return model


def _shapes(info: dict[str, Any]) -> str:
    return ", ".join(f"{name} {list(here)}, expected {list(there)}" for name, here, there in info["mismatched_keys"])


def _reason(error: Exception, model: str, revision: str | None, next_step: str = _AGAIN) -> str:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return explain(error, model, revision, "model") or f"{first_line}. {next_step}"


# ---- making it ready -----------------------------------------------------------------------------------


def prepare_model(model: Any, config: TrainConfig, *, may_compile: bool = True) -> None:
    """Freeze the embeddings, set activation checkpointing, compile: as the config says, in place."""
    if config.freeze_embeddings:
        freeze_embeddings(model)
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise TrainError(
                f"{type(model).__name__} cannot checkpoint activations. Set activation_checkpointing: false."
            )
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if config.compile and may_compile:
        for layer in decoder_layers(model):
            layer.compile()


def freeze_embeddings(model: Any) -> None:
    """No gradient for the input and the output embedding (which may be one tied matrix)."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters():
            parameter.requires_grad_(False)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers, in order: the longest module list of the model."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard_model(model: LossModel, world_size: int, device_type: str) -> None:
    """FSDP2 over all processes: each decoder layer, then the whole. Gradients are summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_type, (world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in decoder_layers(model.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


# ---- forward is the loss -------------------------------------------------------------------------------


class LossModel(nn.Module):
    """A causal language model whose forward gives (MixCE sum, labelled tokens) of a batch."""

    def __init__(self, model: Any, *, neftune_alpha: float = 0.0, fused: bool = True) -> None:
        super().__init__()
        self.model = model
        self._alpha, self._fused = neftune_alpha, fused
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        accepted = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in accepted

    def forward(self, batch: Batch, mixing_ratio: float) -> tuple[Tensor, Tensor]:
        """Sum over the batch's labelled tokens (float32 or better) and their number."""
        inputs = self._inputs(batch)
        if not self._fused:
            return mixce_loss(self.model(**inputs).logits, batch.labels, mixing_ratio)
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.model.get_output_embeddings()
        return fused_mixce_loss(hidden, head.weight, batch.labels, mixing_ratio, bias=head.bias, softcap=self._softcap)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the inner model. With restarting positions, no attention mask and no cache, transformers
        keeps packed examples apart; with a cache they see each other."""
        inputs: dict[str, Any] = {"use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = batch.positions
        if self.training and self._alpha:
            embeds = self.model.get_input_embeddings()(batch.ids)
            return {**inputs, "inputs_embeds": neftune(embeds, batch.lengths, self._alpha)}
        return {**inputs, "input_ids": batch.ids}

    def logits(self, batch: Batch) -> Tensor:
        """What the fused path implies, in full [rows, tokens, vocabulary]: for checks on tiny batches."""
        hidden = self.model.base_model(**self._inputs(batch)).last_hidden_state
        head = self.model.get_output_embeddings()
        z = functional.linear(hidden, head.weight, head.bias)
        return z if self._softcap is None else self._softcap * torch.tanh(z / self._softcap)


def neftune(embeds: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """embeds [rows, tokens, width] plus Uniform(-1, 1) * alpha / sqrt(L * width), L the length of the
    token's own example from `lengths` [rows, tokens]; padding (length 0) gets none."""
    scale = alpha / (lengths.clamp_min(1) * embeds.shape[-1]).sqrt() * (lengths > 0)
    noise = torch.empty_like(embeds).uniform_(-1, 1)
    return embeds + noise * scale.unsqueeze(-1).to(embeds.dtype)


def check_model(model: LossModel, config: TrainConfig, device: torch.device) -> None:
    """Two short examples, packed and apart, with and without our head: the same numbers, or TrainError.

    Call it before sharding. It changes no state and draws no random numbers.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        first, second = _tiny_batch([7], device), _tiny_batch([5], device)
        apart = torch.cat([model.model(**model._inputs(b)).logits[0] for b in (first, second)])
        if config.fused_loss:
            mine = torch.cat([model.logits(b)[0] for b in (first, second)])
            if not _alike(mine, apart):
                raise TrainError(
                    f"{type(model.model).__name__} does more between its last hidden state and its logits "
                    "than a matrix, a bias and a soft cap. Set fused_loss: false."
                )
        if config.packing:
            packed = model.model(**model._inputs(_tiny_batch([7, 5], device))).logits[0]
            if not _alike(packed, apart):
                raise TrainError(
                    f"{type(model.model).__name__} lets packed examples see each other. Set packing: false."
                )
    model.train(was_training)


def _tiny_batch(lengths: list[int], device: torch.device) -> Batch:
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    sizes = torch.cat([torch.full((n,), n) for n in lengths])[None].to(device)
    ids = torch.cat([torch.arange(1, n + 1) + n for n in lengths])[None].to(device)
    return Batch(ids=ids, labels=torch.full_like(ids, -100), positions=positions, lengths=sizes, sources=())


def _alike(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 0.1 if actual.dtype == torch.bfloat16 else 1e-3
    off = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    return bool(off < tolerance)
