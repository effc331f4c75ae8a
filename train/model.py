"""Load a causal language model, make it ready to train, and wrap it so that its forward is the loss.

The loss lives outside the Hugging Face model: `LossModel` takes hidden states and the output matrix and gives a sum and
a count. Nothing here runs code from a checkpoint or asks a question. What a family of models does differently (scaled
logits, position ids it ignores) is found by `check_model`, which compares two tiny forwards, not by a list of names.

NEFTune: Jain et al., arXiv 2310.05914.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from train.adapter import add_adapter
from train.batches import Batch
from train.config import TrainConfig
from train.contrast.ranking import ranking_loss
from train.errors import DELETE_CHECKPOINT, TrainError
from train.hub import explain
from train.loss import fused_log_probs, fused_mixce_loss, mixce_loss

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
    except (OSError, ValueError, ImportError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as e:
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
    if config.lora is not None:
        add_adapter(model, config)
    elif config.freeze_embeddings:
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


def notes(model: Any, config: TrainConfig) -> Iterator[str]:
    """What a user may not expect of this model's training."""
    settings = model.config.get_text_config().to_dict()
    if settings.get("output_router_logits") or settings.get("router_aux_loss_coef"):
        yield (
            "Note: this is a mixture of experts. Its auxiliary loss (router_aux_loss_coef, output_router_logits) is "
            "not part of the loss here: nothing balances its experts."
        )
    dropout = {k: v for k, v in settings.items() if ("dropout" in k or "pdrop" in k) and isinstance(v, float) and v > 0}
    if dropout:
        found = ", ".join(f"{key} {value}" for key, value in dropout.items())
        yield f"Note: dropout is on, as the model's config.json says ({found}). Set it to 0 there to turn it off."
    head = model.get_output_embeddings()
    if config.freeze_embeddings and config.lora is None and getattr(head, "bias", None) is not None:
        yield "Note: freeze_embeddings freezes the bias of the output head, too."


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers, in order: the longest module list of the model."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard_model(model: LossModel, world_size: int, device_type: str) -> None:
    """FSDP2 over all processes: each decoder layer, then the whole. Gradients are summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device_type, (world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in decoder_layers(model.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")


# ---- forward is the loss -------------------------------------------------------------------------------


class LossModel(nn.Module):
    """A causal language model whose forward gives (MixCE sum, labelled tokens) of a batch."""

    def __init__(self, model: Any, *, neftune_alpha: float = 0.0, fused: bool = True, one_row: bool = False) -> None:
        """`one_row`: show the model all rows behind each other as one. With flash attention, transformers finds packed
        examples in a single row only."""
        super().__init__()
        self.model, self._one_row = model, one_row
        self._alpha, self._fused = neftune_alpha, fused
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        accepted = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in accepted

    def forward(self, batch: Batch, mixing_ratio: float) -> tuple[Tensor, Tensor]:
        """Sum over the batch's labelled tokens (float32 or better) and their number; of pairs with the ranking loss."""
        if batch.ranking is not None:
            return ranking_loss(self.log_probs(batch), batch.labels, batch.ranking, mixing_ratio)
        if not self._fused:
            return mixce_loss(self.plain_logits(batch), batch.labels, mixing_ratio)
        hidden = self._hidden(batch)
        head = self.model.get_output_embeddings()
        return fused_mixce_loss(
            hidden, head.weight, batch.labels, mixing_ratio, bias=head.bias, softcap=self._softcap,
            labelled=batch.labelled,
        )  # fmt: skip

    def log_probs(self, batch: Batch) -> Tensor:
        """log q of every label, [rows, tokens], 0 where there is none."""
        if not self._fused:
            nll = functional.cross_entropy(self.plain_logits(batch).float().mT, batch.labels, reduction="none")
            return -nll
        head = self.model.get_output_embeddings()
        return fused_log_probs(self._hidden(batch), head.weight, batch.labels, bias=head.bias, softcap=self._softcap)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the inner model. With restarting positions, no attention mask and no cache, transformers
        keeps packed examples apart; with a cache they see each other."""
        inputs: dict[str, Any] = {"use_cache": False}
        ids, positions, lengths = (self._rows(part) for part in (batch.ids, batch.positions, batch.lengths))
        if self._takes_positions:
            inputs["position_ids"] = positions
        if self.training and self._alpha:
            embeds = self.model.get_input_embeddings()(ids)
            return {**inputs, "inputs_embeds": neftune(embeds, lengths, self._alpha)}
        return {**inputs, "input_ids": ids}

    def _rows(self, values: Tensor) -> Tensor:
        return values.reshape(1, -1) if self._one_row else values

    def _hidden(self, batch: Batch) -> Tensor:
        """[rows, tokens, width]."""
        hidden: Tensor = self.model.base_model(**self._inputs(batch)).last_hidden_state
        return hidden.reshape(*batch.ids.shape, -1)

    def plain_logits(self, batch: Batch) -> Tensor:
        """The model's own, in full [rows, tokens, vocabulary]."""
        logits: Tensor = self.model(**self._inputs(batch)).logits
        return logits.reshape(*batch.ids.shape, -1)

    def generate(self, tokenizer: Any, ids: Tensor, new_tokens: int, stop: Sequence[str] = ()) -> Tensor:
        """Greedy continuations [rows, at most new_tokens] of prompts of one length, ids [rows, tokens]."""
        ids = ids.to(next(self.parameters()).device)
        options: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
        written: Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **options,
        )
        return written[:, ids.shape[1] :]

    def logits(self, batch: Batch) -> Tensor:
        """What the fused path implies, in full [rows, tokens, vocabulary]: for checks on tiny batches."""
        hidden = self._hidden(batch)
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
    """Two short examples in a row, two rows: the same numbers with and without our head, and the second example must
    not see the first. Raises TrainError with all settings that this model needs, or for weights that are not numbers.

    Call it before sharding. It changes no state and draws no random numbers.
    """
    was_training = model.training
    model.eval()
    needed = {}
    with torch.no_grad():
        batch, other = _tiny_batch(device, first=1), _tiny_batch(device, first=9)
        logits = model.plain_logits(batch)
        if not logits.isfinite().all():
            raise TrainError(_not_finite(model.model))
        if config.fused_loss and not _alike(model.logits(batch), logits):
            needed["fused_loss: false"] = (
                "does more between its last hidden state and its logits than a matrix, a bias and a soft cap"
            )
        if config.packing and _leaks(logits, model.plain_logits(other)):
            needed["packing: false"] = "lets packed examples see each other"
    model.train(was_training)
    if needed:
        raise TrainError(f"{type(model.model).__name__} {', and '.join(needed.values())}. Set {' and '.join(needed)}.")


_FIRST, _SECOND = 7, 5  # tokens of the two examples in a tiny row


def _tiny_batch(device: torch.device, *, first: int) -> Batch:
    """Two rows of two examples; `first` is the first example's first id. Shapes never change, only these ids."""
    lengths = (_FIRST, _SECOND)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).to(device)
    sizes = torch.cat([torch.full((n,), n) for n in lengths]).expand(2, -1).to(device)
    rows = [torch.cat([torch.arange(first, first + _FIRST), torch.arange(1, _SECOND + 1) + 20 + row]) for row in (0, 5)]
    ids = torch.stack(rows).to(device)
    return Batch(ids=ids, labels=torch.full_like(ids, -100), positions=positions, lengths=sizes, sources=())


def _leaks(logits: Tensor, after: Tensor) -> bool:
    """Whether the second example's logits moved with the first example's ids. Apart, they are the same bits."""
    second = slice(_FIRST, None)
    moved = (after[:, second].float() - logits[:, second].float()).abs().max()
    return bool(moved > _LEAK * logits.float().abs().max())


_LEAK = 1e-4  # of the largest logit: families that leak moved by 4.7e-3 and more, others by nothing


def _not_finite(model: Any) -> str:
    names = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    what = f"{len(names)} tensors hold infinities or NaN ({', '.join(names[:5])})" if names else "its logits overflow"
    return f"The model does not compute numbers: {what}. Get the weights again, or another dtype (dtype: float32)."


def _alike(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 0.1 if actual.dtype == torch.bfloat16 else 1e-3
    off = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    return bool(off < tolerance)
