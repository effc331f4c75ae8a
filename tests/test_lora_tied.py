"""Adapters of models whose head is their embedding: the result is what the live model computes, in transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from checkpoints import load_file, load_folder, save_file, save_model
from merge_tool import MergeToolError, MismatchError, merge
from oracle import float64_merge

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_attention_heads": 2}
IDS = torch.arange(1, 20)[None]


def llama() -> Any:
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    """Its config.json says nothing of the tie."""
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2))


def neox() -> Any:
    config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=24, num_hidden_layers=2, tie_word_embeddings=True)
    return transformers.GPTNeoXForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], Any], str, str, str]] = {  # its embedding, its head, and another layer
    "llama": (llama, "embed_tokens", "lm_head", "q_proj"),
    "gpt2": (gpt2, "wte", "lm_head", "c_attn"),
    "bloom": (bloom, "word_embeddings", "lm_head", "query_key_value"),
    "neox": (neox, "embed_in", "embed_out", "query_key_value"),
}
TRAINED = {  # what is saved whole, and what has factors
    "embedding saved": ("e", ""),
    "head saved": ("h", ""),
    "both saved": ("eh", ""),
    "embedding by factors": ("", "e"),
    "head by factors": ("", "h"),
    "both by factors": ("", "eh"),
    "embedding saved, head by factors": ("e", "h"),
    "head saved, embedding by factors": ("h", "e"),
}


def adapted(folder: Path, family: str, saved: str, factors: str, **settings: Any) -> tuple[Path, Path, Any]:
    """A tied base, an adapter of it, and the live model's logits."""
    make, embedding, head, layer = FAMILIES[family]
    names = {"e": embedding, "h": head if family != "neox" else _head_of_neox(make)}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make().save_pretrained(folder / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        targets = [layer, *(names[k] for k in factors)]
        whole = [names[k] for k in saved] or None
        asked = peft.LoraConfig(
            **{"task_type": "CAUSAL_LM", "r": 2, "target_modules": targets, "modules_to_save": whole, **settings}
        )
        live = peft.get_peft_model(model, asked)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(folder / "adapter")
        return folder / "base", folder / "adapter", live(IDS).logits.detach()


def _head_of_neox(make: Callable[[], Any]) -> str:
    return "lm_head" if hasattr(make(), "lm_head") else "embed_out"


def logits(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model(IDS).logits.detach()


def same(a: Any, b: Any) -> bool:
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_at_t_1_is_the_live_model(tmp_path: Path, family: str, case: str) -> None:
    """Whatever of the two is trained, the other keeps the matrix that they shared."""
    base, adapter, live = adapted(tmp_path, family, *TRAINED[case])
    told: list[str] = []
    merge(base, adapter, tmp_path / "out", 1, on_warning=told.append)
    assert same(logits(tmp_path / "out"), live)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert sum("the result has a head of its own" in line for line in told) == 1


@pytest.mark.parametrize("case", ["embedding by factors", "head by factors", "both by factors"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_dora_too(tmp_path: Path, family: str, case: str) -> None:
    base, adapter, live = adapted(tmp_path, family, *TRAINED[case], use_dora=True, fan_in_fan_out=family == "gpt2")
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)


def tokens_of(family: str, case: str) -> Any:
    _, embedding, head, _ = FAMILIES[family]
    head = _head_of_neox(neox) if family == "neox" else head
    return {
        "list": [2, 5, 47],
        "embedding": {embedding: [5, 2]},
        "head": {head: [7, 3, 4]},
        "both": {embedding: [5, 2], head: [5, 2]},
        "each its own": {embedding: [5, 2], head: [7, 3, 4]},
    }[case]


TOKENS = {"list": False, "embedding": False, "head": True, "both": False, "each its own": True}


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_tokens_of_tied_models_are_those_of_the_live_model(tmp_path: Path, family: str, case: str) -> None:
    """The head follows the embedding, but where it has rows of its own."""
    base, adapter, live = adapted(tmp_path, family, "", "", trainable_token_indices=tokens_of(family, case))
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)
    head = FAMILIES[family][2] if family != "neox" else _head_of_neox(neox)
    assert any(head in name for name in load_folder(tmp_path / "out")) == TOKENS[case]


@pytest.mark.parametrize("case", TOKENS)
def test_trainable_tokens_reach_a_stored_copy_of_the_head(tmp_path: Path, case: str) -> None:
    base, adapter, live = adapted(tmp_path, "llama", "", "", trainable_token_indices=tokens_of("llama", case))
    tensors = load_folder(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_model(base, tensors, config=json.loads((base / "config.json").read_text()))
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)


@pytest.mark.parametrize("case", ["embedding saved", "head saved", "both saved", "embedding by factors"])
def test_a_kept_tie_keeps_a_stored_copy_of_the_head_equal(tmp_path: Path, case: str) -> None:
    base, adapter, live = adapted(tmp_path, "llama", *TRAINED[case], ensure_weight_tying=True)
    tensors = load_folder(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_model(base, tensors, config=json.loads((base / "config.json").read_text()))
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)
    out = load_folder(tmp_path / "out")
    assert out["lm_head.weight"].tobytes() == out["model.embed_tokens.weight"].tobytes()


@pytest.mark.parametrize("name", ["lm_head.modules_to_save.weight", "lm_head.lora_A.weight"])
def test_tokens_of_the_embedding_beside_a_head_that_is_trained_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    """Of a tied model; peft itself refuses to make such adapters."""
    base, adapter, _ = adapted(tmp_path, "llama", "", "", trainable_token_indices=[2, 5])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
    with pytest.raises(MergeToolError, match="What peft computes for both is not read"):
        merge(base, adapter, tmp_path / "out", 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_of_tokens_alone_is_the_live_model(tmp_path: Path, family: str) -> None:
    """peft's TRAINABLE_TOKENS, which has no factors."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FAMILIES[family][0]().save_pretrained(tmp_path / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        live = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=[9, 4, 6]))
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(tmp_path / "adapter")
        expected = live(IDS).logits.detach()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("case", TRAINED)
def test_a_stored_copy_of_the_head_is_no_copy_any_more(tmp_path: Path, case: str) -> None:
    """A checkpoint that holds the tied matrix twice, as some tools save it."""
    base, adapter, live = adapted(tmp_path, "llama", *TRAINED[case])
    tensors = load_folder(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_model(base, tensors, config=json.loads((base / "config.json").read_text()))
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)


@pytest.mark.parametrize("case", ["embedding saved", "head saved", "both saved", "embedding by factors"])
def test_an_adapter_that_keeps_the_tie_leaves_one_tensor(tmp_path: Path, case: str) -> None:
    base, adapter, live = adapted(tmp_path, "llama", *TRAINED[case], ensure_weight_tying=True)
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)
    assert "lm_head.weight" not in load_folder(tmp_path / "out")


@pytest.mark.parametrize("case", ["embedding saved", "embedding by factors"])
@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_tie_that_peft_does_not_keep_although_it_is_asked_to_is_none(tmp_path: Path, family: str, case: str) -> None:
    """peft knows the embedding by the names of Llama's alone: what it stores shows whether it tied the two."""
    base, adapter, live = adapted(tmp_path, family, *TRAINED[case], ensure_weight_tying=True)
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def neox_untied() -> Any:
    config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=24, num_hidden_layers=2, tie_word_embeddings=False)
    return transformers.GPTNeoXForCausalLM(config)


def gpt2_square() -> Any:
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, n_inner=16
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("case", ["head saved", "head by factors"])
def test_a_head_that_the_checkpoint_has_under_its_older_name_is_found(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 calls GPT-NeoX's embed_out lm_head, and saves it as embed_out."""
    monkeypatch.setitem(FAMILIES, "neox", (neox_untied, *FAMILIES["neox"][1:]))
    base, adapter, live = adapted(tmp_path, "neox", *TRAINED[case])
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)


def test_square_layers_beside_a_head_of_gpt2_are_those_of_the_live_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft writes fan_in_fan_out as the last layer has it, which is the head; the others have it otherwise."""
    monkeypatch.setitem(FAMILIES, "gpt2", (gpt2_square, "wte", "lm_head", "c_attn"))
    settings = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]}
    base, adapter, live = adapted(tmp_path, "gpt2", "", "h", **settings)
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)


@pytest.mark.parametrize("case", TRAINED)
def test_between_the_two_each_end_is_merged_with_its_own(tmp_path: Path, case: str) -> None:
    base, adapter, _ = adapted(tmp_path, "llama", *TRAINED[case])
    merge(base, adapter, tmp_path / "ft", 1)
    merge(base, adapter, tmp_path / "out", 0.4)
    x, y, out = load_folder(base), load_folder(tmp_path / "ft"), load_folder(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        exact = float64_merge(x["model.embed_tokens.weight"], y[name], 0.4)
        assert abs(out[name] - exact).max() < 1e-6, name
    logits(tmp_path / "out")


def test_an_adapter_in_bases_place_unties_the_output(tmp_path: Path) -> None:
    base, adapter, live = adapted(tmp_path, "llama", "e", "")
    merge(f"{base}+{adapter}", base, tmp_path / "out", 0)
    assert same(logits(tmp_path / "out"), live)


def test_a_resized_embedding_without_the_heads_rows_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "llama", "e", "")
    tensors = load_folder(base)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:40]
    save_model(base, tensors, config=json.loads((base / "config.json").read_text()))
    with pytest.raises(MergeToolError, match=r"lm_head\.weight would have 40 rows, model\.embed_tokens\.weight 48"):
        merge(base, adapter, tmp_path / "out", 1)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("module", ["shared", "lm_head"])
@pytest.mark.parametrize(
    ("make", "layer", "why"),
    [(bart, "q_proj", "an encoder and a decoder that share it"), (t5, "q", "scales what goes into its tied head")],
    ids=["bart", "t5"],
)
def test_a_head_that_is_more_than_a_matrix_is_refused(
    tmp_path: Path, make: Callable[[], Any], layer: str, why: str, module: str
) -> None:
    """Untied, it would be read otherwise, or tensors beside it would be missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make().save_pretrained(tmp_path / "base")
        asked = peft.LoraConfig(r=2, target_modules=[layer], modules_to_save=[module])
        peft.get_peft_model(make(), asked).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MismatchError, match=why):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", 1)


WHISPER: dict[str, Any] = {
    "vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 8,
    "max_target_positions": 32, "num_mel_bins": 8, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip


@pytest.mark.parametrize("module", ["embed_tokens", "proj_out"])
def test_a_head_of_another_name_is_written_under_it(tmp_path: Path, module: str) -> None:
    """Whisper's head is proj_out."""
    make = transformers.WhisperForConditionalGeneration
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(transformers.WhisperConfig(**WHISPER)).save_pretrained(tmp_path / "base")
        model = make.from_pretrained(tmp_path / "base")
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module]))
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(tmp_path / "adapter")
        given = {"input_features": torch.randn(1, 8, 16), "decoder_input_ids": IDS}
        expected = live(**given).logits
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", 1)
        merged, info = make.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert same(merged(**given).logits, expected)


MASKED = {"vocab_size": 48, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
MASKED |= {"num_hidden_layers": 2, "max_position_embeddings": 32, "embedding_size": 16, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Albert"])
def test_a_head_that_comes_apart_keeps_its_bias(tmp_path: Path, family: str) -> None:
    """BERT's head has a bias that is a copy of another tensor as long as the head is tied."""
    make = getattr(transformers, f"{family}ForMaskedLM")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = make(getattr(transformers, f"{family}Config")(**MASKED)).eval()
        torch.nn.init.normal_(plain.get_output_embeddings().bias)
        plain.save_pretrained(tmp_path / "base")
        model = make.from_pretrained(tmp_path / "base").eval()
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "decoder"])).eval()
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(tmp_path / "adapter")
        expected = live(IDS).logits
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", 1)
        merged, info = make.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert same(merged.eval()(IDS).logits, expected)


# ----------------------------------------------------------------------------------------- whole models


def untied(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = llama()
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": False})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("t", [1, 0.4])
def test_a_finetune_with_a_head_of_its_own_keeps_it(tmp_path: Path, t: float) -> None:
    """BASE ties its head, FT has untied it: the output at t = 1 is FT."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    base, ft = tmp_path / "base", untied(tmp_path / "ft", 1)
    told: list[str] = []
    merge(base, ft, tmp_path / "out", t, on_warning=told.append)
    x, y, out = load_folder(base), load_folder(ft), load_folder(tmp_path / "out")
    exact = float64_merge(x["model.embed_tokens.weight"], y["lm_head.weight"], t)
    assert abs(out["lm_head.weight"] - exact).max() < 1e-6
    if t == 1:
        assert same(logits(tmp_path / "out"), logits(ft))
    assert any("ft has a head of its own: the output has one, too" in line for line in told)


def test_untie_gives_tied_models_a_head_that_changes_nothing(tmp_path: Path) -> None:
    for name in ("base", "ft"):
        torch.manual_seed(len(name))
        llama().save_pretrained(tmp_path / name)
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "tied", 0.4)
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out", 0.4, untie=True)
    assert same(logits(tmp_path / "out"), logits(tmp_path / "tied"))
    assert "lm_head.weight" in load_folder(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_one_file_says_what_its_config_json_must_say(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "llama", "e", "")
    report = merge(base, adapter, tmp_path / "out.safetensors")
    assert any("set tie_word_embeddings to false" in warning for warning in report.warnings)
