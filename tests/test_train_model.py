"""Laws of train/model.py and train/preflight.py: packing, NEFTune, the old config, the probes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StableLmConfig

from tests.train_fixtures import make_config, make_model, make_tokenizer, save_model
from train.batches import Batch
from train.errors import TrainError
from train.loss import mixce_loss
from train.model import (
    LossModel,
    check_model,
    choose_dtype,
    convert_stablelm_epoch,
    freeze_embeddings,
    load_model,
    load_model_config,
    load_tokenizer,
    neftune,
    padding_id,
    prepare_model,
)
from train.preflight import activation_bytes, build_on_meta, preflight

CPU = torch.device("cpu")
LENGTHS = [9, 5, 11, 1, 6]


def silent(_: str) -> None: ...


def packed_and_apart(lengths: list[int]) -> tuple[Batch, list[Batch]]:
    gen = torch.Generator().manual_seed(1)
    apart = []
    for n in lengths:
        ids = torch.randint(1, 320, (1, n), generator=gen)
        labels = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
        apart.append(Batch(ids, labels, torch.arange(n)[None], torch.full((1, n), n), ("s",)))
    joined = [torch.cat([getattr(b, k) for b in apart], 1) for k in ("ids", "labels", "positions", "lengths")]
    return Batch(*joined, ("s",)), apart  # type: ignore[arg-type, call-arg]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_unpacked(attention: str, checkpointing: bool) -> None:
    """Loss and every gradient of a pack are the sums over its examples alone, in training mode."""
    packed, apart = packed_and_apart(LENGTHS)
    found: list[tuple[float, dict[str, Tensor]]] = []
    for batches in ([packed], apart):
        model = make_model(attn_implementation=attention)
        prepare_model(model, make_config(activation_checkpointing=checkpointing, freeze_embeddings=False))
        wrapped = LossModel(model).train()
        total = 0.0
        for batch in batches:
            loss, _ = wrapped(batch, 0.5)
            loss.backward()
            total += loss.item()
        found.append((total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_packing_test_can_fail() -> None:
    """Without restarting positions the examples do see each other: no test of nothing."""
    packed, apart = packed_and_apart(LENGTHS)
    running = Batch(packed.ids, packed.labels, torch.arange(packed.ids.shape[1])[None], packed.lengths, ("s",))
    model = LossModel(make_model()).eval()
    alone = sum(model(b, 0.5)[0].item() for b in apart)
    assert abs(model(running, 0.5)[0].item() / alone - 1) > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_the_wrapper_is_the_loss_of_the_models_logits(fused: bool) -> None:
    """Fused or not, forward equals the reference loss on what the Hugging Face model itself returns."""
    _, (batch, *_) = packed_and_apart(LENGTHS)
    model = make_model()
    expected, count = mixce_loss(model(input_ids=batch.ids).logits, batch.labels, 0.3)
    loss, found = LossModel(model, fused=fused)(batch, 0.3)
    torch.testing.assert_close(loss, expected)
    assert count == found


def test_frozen_embeddings_have_no_gradient() -> None:
    """Input and output embedding, and nothing else."""
    packed, _ = packed_and_apart(LENGTHS)
    model = make_model()
    freeze_embeddings(model)
    LossModel(model)(packed, 0.5)[0].backward()
    still = [n for n, p in model.named_parameters() if p.grad is None]
    assert still == ["model.embed_tokens.weight", "lm_head.weight"]


# ---- NEFTune -------------------------------------------------------------------------------------------


def test_neftune_has_the_papers_size_for_each_examples_own_length() -> None:
    """Uniform(-1, 1) alpha / sqrt(L d), mean zero, L the example's length, not the pack's; padding none."""
    width, alpha = 64, 10.0
    lengths = torch.tensor([[100] * 100 + [400] * 400 + [0] * 50]).repeat(20, 1)
    torch.manual_seed(0)
    noise = neftune(torch.zeros(*lengths.shape, width), lengths, alpha)
    for length in (100, 400):
        mine = noise[lengths == length]
        bound = alpha / math.sqrt(length * width)
        assert float(mine.abs().max()) <= bound
        assert float(mine.abs().max()) > 0.99 * bound
        assert abs(float(mine.mean())) < 5 * bound / math.sqrt(3 * mine.numel())
        assert float(mine.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not noise[lengths == 0].any()


def test_neftune_only_in_training() -> None:
    """Evaluation is exact and repeatable; training draws anew each time."""
    packed, _ = packed_and_apart(LENGTHS)
    noisy, plain = LossModel(make_model(), neftune_alpha=10.0), LossModel(make_model())
    noisy.eval()
    plain.eval()
    assert noisy(packed, 0.5)[0].item() == plain(packed, 0.5)[0].item()
    noisy.train()
    assert noisy(packed, 0.5)[0].item() != noisy(packed, 0.5)[0].item() != plain(packed, 0.5)[0].item()


# ---- the probes ----------------------------------------------------------------------------------------


def test_stablelm_passes_the_checks_and_nothing_moves() -> None:
    """No random number is drawn and no mode is changed."""
    model = LossModel(make_model()).train()
    before = torch.get_rng_state()
    check_model(model, make_config(), CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def tiny(kind: str, **more: Any) -> Any:
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 320, **more}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.mul_(20.0 if "embed" in name else 5.0)
    return model


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("gemma2", {"head_dim": 8, "tie_word_embeddings": True})])
def test_other_families_pass(kind: str, more: dict[str, Any]) -> None:
    """Llama, and Gemma 2 with a soft cap and tied embeddings."""
    check_model(LossModel(tiny(kind, **more)), make_config(), CPU)


def test_a_model_that_scales_its_logits_is_refused_by_the_fused_loss() -> None:
    """Granite divides them: the message says to use the plain loss, which then works."""
    model = tiny("granite", logits_scaling=4.0)
    with pytest.raises(TrainError, match="Set fused_loss: false"):
        check_model(LossModel(model), make_config(), CPU)
    check_model(LossModel(model, fused=False), make_config(fused_loss=False), CPU)


def test_a_model_that_leaks_between_packed_examples_is_refused() -> None:
    """A recurrent model carries its state over the border: the message says to turn packing off."""
    torch.manual_seed(0)
    values = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 8}
    model = LossModel(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **values)))
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(20)
    with pytest.raises(TrainError, match="Set packing: false"):
        check_model(model, make_config(), CPU)
    check_model(model, make_config(packing=False), CPU)


# ---- loading -------------------------------------------------------------------------------------------

OLD = {
    "architectures": ["StableLMEpochForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig"},
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 64, "max_position_embeddings": 128, "model_type": "stablelm_epoch",
    "norm_eps": 1e-05, "num_attention_heads": 4, "num_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 4, "rope_pct": 0.5, "rope_theta": 5000, "rotary_scaling_factor": 1.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 320,
}  # fmt: skip


def test_the_old_stablelm_config_is_converted_with_a_note(tmp_path: Path) -> None:
    """The same model comes out as with a native config, no code is run, and a line says what was done."""
    native = {"partial_rotary_factor": 0.5, "rope_theta": 5000}
    folder = save_model(tmp_path / "m", rope_parameters={"rope_type": "default", **native})
    expected = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(OLD))
    said: list[str] = []
    config = load_model_config(str(folder), None, said.append)
    assert "stablelm_epoch" in said[0]
    model = load_model(str(folder), make_config(model=str(folder)), config, torch.float32)
    ids = torch.arange(1, 60)[None]
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert load_tokenizer(str(folder), None, config).eos_token_id == 0
    assert not hasattr(config, "auto_map")


def test_the_real_layout_has_356_tensors() -> None:
    """The published shapes, on the meta device: names, count and 2,795,443,200 parameters."""
    real = {**OLD, "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32, "num_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "rope_pct": 0.25, "rope_theta": 10000, "vocab_size": 50304}  # fmt: skip
    model = build_on_meta(make_config(), convert_stablelm_epoch(real), torch.bfloat16)
    names = set(model.state_dict())
    layer = [f"self_attn.{x}_proj.weight" for x in "qkvo"] + [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    layer += [f"{n}_layernorm.{k}" for n in ("input", "post_attention") for k in ("weight", "bias")]
    expected = {f"model.layers.{i}.{name}" for i in range(32) for name in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight"}
    assert names == expected
    assert len(names) == 356
    assert sum(p.numel() for p in model.parameters()) == 2_795_443_200


def test_an_incomplete_old_config_is_an_error() -> None:
    """A missing rotary fraction is not guessed."""
    with pytest.raises(TrainError, match="lacks 'partial_rotary_factor'"):
        convert_stablelm_epoch({k: v for k, v in OLD.items() if k != "rope_pct"})


UNFIT = {
    "missing": r"m: 1 missing tensors for its config.json \(model.norm.bias\)\. Save or download",
    "unexpected": r"m: 1 unexpected tensors for its config.json \(model.extra.weight\)\. Save or download",
    "shape": r"m: tensors of other shapes than config.json says \(model.norm.bias \[3\], expected \[32\]\)\. Save",
    "cut": r"m: the model cannot be loaded\. .*\. Save or download",
}


@pytest.mark.parametrize("change", UNFIT)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: str) -> None:
    """A missing, an unexpected or a misshapen tensor is an error that names it, never silently new or dropped."""
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.norm.bias"]
    elif change == "unexpected":
        tensors["model.extra.weight"] = torch.zeros(3)
    elif change == "shape":
        tensors["model.norm.bias"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    config = load_model_config(str(folder), None, silent)
    with pytest.raises(TrainError, match=UNFIT[change]):
        load_model(str(folder), make_config(model=str(folder)), config, torch.float32)


def test_remote_code_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    """A config that points to code of its own is an error; stdin is never read (pytest closes it)."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}})
    )
    (tmp_path / "configuration_mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(TrainError, match="the model config cannot be read"):
        load_model_config(str(tmp_path), None, silent)


def test_a_vocabulary_smaller_than_the_tokenizer_is_an_error(tmp_path: Path) -> None:
    """Both numbers are named."""
    make_tokenizer().save_pretrained(tmp_path)
    small = StableLmConfig(vocab_size=100)
    with pytest.raises(TrainError, match=r"ids up to \d+, but the model's vocabulary is 100"):
        load_tokenizer(str(tmp_path), None, small)


def test_a_tokenizer_without_a_pad_token_pads_with_masked_eos() -> None:
    """It says so; with a pad token it says nothing."""
    said: list[str] = []
    assert padding_id(make_tokenizer(), said.append) == 0
    assert "no pad token. Rows are padded with eos" in said[0]
    assert padding_id(make_tokenizer(pad=True), silent) == 0
    assert len(said) == 1


def test_precision_is_float32_on_cpu_unless_asked() -> None:
    """auto, and both by name."""
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float32", CPU) == torch.float32


# ---- preflight -----------------------------------------------------------------------------------------


def test_preflight_counts_what_is_then_allocated() -> None:
    """Parameters and bytes are those of the real model, without building it."""
    model = make_model()
    config = make_config(optimizer="adamw", sequence_length=64, micro_batch=2, global_batch=4)
    found = preflight(config, model.config, torch.float32, 1)
    freeze_embeddings(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.trained, found.frozen) == (trained, sum(p.numel() for p in model.parameters()) - trained)
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert (found.gradient_bytes, found.optimizer_bytes) == (4 * trained, 8 * trained)
    assert found.tokens_per_step == 256
    assert "41,280" in found.lines()


def test_activations_shrink_with_checkpointing_and_grow_with_the_batch() -> None:
    """The estimate follows what it estimates."""
    config = make_model(num_hidden_layers=8).config
    plain = build_on_meta(make_config(activation_checkpointing=False), config, torch.float32)
    saved = build_on_meta(make_config(activation_checkpointing=True), config, torch.float32)
    few, many = activation_bytes(plain, 1, 64), activation_bytes(plain, 4, 64)
    less = activation_bytes(saved, 4, 64)
    assert few is not None
    assert many is not None
    assert less is not None
    assert 3 * few < many < 4.5 * few
    assert less < many / 3


def test_fused_backward_needs_one_gradient_at_a_time() -> None:
    """The preflight says so."""
    config = make_model().config
    whole = preflight(make_config(), config, torch.float32, 1)
    one = preflight(make_config(fused_backward=True), config, torch.float32, 1)
    assert one.gradient_bytes == 4 * 32 * 64 < whole.gradient_bytes
