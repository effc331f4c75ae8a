"""What two models say differently of themselves: each difference that matters once, by its content, with the option
that takes it; and nothing of what does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import load_folder, save_model
from merge_tool import RecipeError, merge, merge_models
from merge_tool.cli import merge_tool

SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0, "eos_token_id": 2,
}  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "a", "fuse_unk": False, "byte_fallback": False,
        "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
    },
}  # fmt: skip
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def model(folder: Path, seed: int, files: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A small model with a tokenizer; `files` are side files (JSON, text, or None for none) in place of its own."""
    shared, own = (np.random.default_rng(s) for s in (0, seed))
    shapes = {"model.embed_tokens.weight": (3, 4), "model.norm.weight": (4,)}
    tensors = {n: shared.standard_normal(shape) + 0.1 * own.standard_normal(shape) for n, shape in shapes.items()}
    files = {"tokenizer.json": TOKENIZER, **(files or {})}
    texts = {n: f if isinstance(f, str) else json.dumps(f) for n, f in files.items() if f is not None}
    config = {key: value for key, value in {**SETTINGS, **settings}.items() if value != "absent"}
    return save_model(folder, tensors, config=config, side_files=texts)


def warnings_of(base: Path, ft: Path, **options: Any) -> list[str]:
    return list(merge(base, ft, base.parent / "out", overwrite=True, **options).warnings)


# ------------------------------------------------------------------------------------------ tokenizers


def changed(**parts: Any) -> dict[str, Any]:
    return {**TOKENIZER, **parts}


HARMLESS: dict[str, dict[str, Any]] = {
    "indented": {"tokenizer.json": json.dumps(TOKENIZER, indent=2)},
    "padding": {"tokenizer.json": changed(padding={"strategy": "BatchLongest"}, truncation={"max_length": 9})},
    "merges as pairs": {"tokenizer.json": changed(model={**TOKENIZER["model"], "merges": [["a", "b"]]})},
    "defaults left out": {"tokenizer.json": changed(model={"type": "BPE", "unk_token": "a", "ignore_merges": False,
                          "vocab": TOKENIZER["model"]["vocab"], "merges": ["a b"]})},
    "is_local": {"tokenizer_config.json": {"is_local": True, "padding_side": "left", "name_or_path": "/x"}},
    "a map of special tokens": {"special_tokens_map.json": {"pad_token": "a"}},
    "the same end as a list": {"generation_config.json": {"eos_token_id": [2]}},
}  # fmt: skip


@pytest.mark.parametrize("what", HARMLESS)
def test_what_changes_no_token_is_no_warning(tmp_path: Path, what: str) -> None:
    plain = {"tokenizer_config.json": {"model_max_length": 5}, "special_tokens_map.json": {}}
    base = model(tmp_path / "base", 1, plain)
    ft = model(tmp_path / "ft", 2, {**plain, **HARMLESS[what]})
    assert warnings_of(base, ft) == []


HARMFUL: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer": ({"tokenizer.json": changed(normalizer={"type": "Lowercase"})}, "its normalizer differ"),
    "pre-tokenizer": ({"tokenizer.json": changed(pre_tokenizer={"type": "ByteLevel"})}, "its pre_tokenizer differ"),
    "merges": ({"tokenizer.json": changed(model={**TOKENIZER["model"], "merges": []})}, "its merges differ"),
    "end token": ({"tokenizer_config.json": {"eos_token": "b"}}, 'eos_token is "a" in base, "b" in ft'),
    "end token as an object": (
        {"tokenizer_config.json": {"eos_token": {"content": "b"}}}, 'eos_token is "a" in base, "b" in ft'
    ),
    "begin": ({"tokenizer_config.json": {"eos_token": "a", "add_bos_token": True}},
              "add_bos_token is false in base, true in ft"),
    "end of generation": ({"generation_config.json": {"eos_token_id": [1, 2]}},
                          "eos_token_id is 2 in base, 1 or 2 in ft"),
}  # fmt: skip


@pytest.mark.parametrize("what", HARMFUL)
def test_what_changes_a_text_or_its_end_is_one_warning(tmp_path: Path, what: str) -> None:
    plain: dict[str, Any] = {"tokenizer_config.json": {"eos_token": "a", "add_bos_token": False}}
    files, expected = HARMFUL[what]
    base, ft = model(tmp_path / "base", 1, plain), model(tmp_path / "ft", 2, {**plain, **files})
    (told,) = warnings_of(base, ft)
    assert expected in told
    assert 'files_from="ft" takes ft\'s files' in told
    merge(base, ft, tmp_path / "of-ft", files_from="ft")
    for name in files:
        assert (tmp_path / "of-ft" / name).read_bytes() == (ft / name).read_bytes()


def test_a_base_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    base, ft = model(tmp_path / "base", 1, {"tokenizer.json": None}), model(tmp_path / "ft", 2)
    assert warnings_of(base, ft) == [
        'base has no tokenizer, and so the output has none. files_from="ft" takes ft\'s files.'
    ]
    assert warnings_of(ft, base) == []


def test_what_transformers_writes_when_it_saves_again_is_no_difference(tmp_path: Path) -> None:
    """The usual rotary base, and a post-processor that adds nothing: mixce-train's own output had two alarms. Where the
    class has another base, or the value is another, it is one."""
    sequence = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    template = {"type": "TemplateProcessing", "single": sequence[:1], "pair": sequence, "special_tokens": {}}
    saved = {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    ft = model(tmp_path / "ft", 2, {"tokenizer.json": changed(post_processor=template)}, model_type="llama", **saved)
    base = model(tmp_path / "base", 1, model_type="llama", rope_theta="absent")
    assert warnings_of(base, ft) == warnings_of(ft, base) == []
    other = model(tmp_path / "other", 3, model_type="llama", rope_theta=500_000.0)
    assert "rope_theta differs" in warnings_of(base, other)[0]
    both = (
        model(tmp_path / "a", 1, model_type="gpt_oss", rope_theta="absent"),
        model(tmp_path / "b", 2, model_type="gpt_oss"),
    )
    assert "rope_theta differs" in warnings_of(*both)[0]
    marked = {**template, "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, *sequence[:1]]}
    third = model(tmp_path / "c", 3, {"tokenizer.json": changed(post_processor=marked)}, model_type="llama")
    assert "its post_processor" in warnings_of(base, third)[0]


def test_a_base_that_is_one_file_is_named(tmp_path: Path) -> None:
    """It has neither configuration nor tokenizer, so the output has none; ids of tokens are not the point."""
    base, ft = model(tmp_path / "base", 1) / "model.safetensors", model(tmp_path / "ft", 2)
    assert list(merge(base, ft, tmp_path / "out").warnings) == [
        "model.safetensors is a file without a folder, and so the output has no configuration and no tokenizer. "
        'files_from="ft" takes ft\'s files.'
    ]
    assert list(merge(base, base.with_name("model.safetensors"), tmp_path / "alone").warnings) == [
        "The models are the same in every tensor: the output equals them."
    ]


# ------------------------------------------------------------------------------------------ templates

WITH_TEMPLATE: dict[str, dict[str, Any]] = {
    "jinja": {"chat_template.jinja": CHAT},
    "tokenizer_config": {"tokenizer_config.json": {"chat_template": CHAT}},
    "several": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": CHAT}]}},
    "old": {"chat_template.json": {"chat_template": CHAT}},
}


def template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text() if file.exists() else None


@pytest.mark.parametrize("t", [0.5, 1])
@pytest.mark.parametrize("where", WITH_TEMPLATE)
def test_a_template_that_is_lost_is_one_warning_with_its_options(tmp_path: Path, where: str, t: float) -> None:
    """The commonest merge there is: a base model with its chat finetune. At t = 1, too."""
    base = model(tmp_path / "base", 1, {"tokenizer_config.json": {}})
    ft = model(tmp_path / "ft", 2, {"tokenizer_config.json": {}, **WITH_TEMPLATE[where]})
    assert warnings_of(base, ft, t=t) == [
        'The chat template of ft is not in the output: base has none, and so the output has none. chat_template="ft" '
        'takes it; files_from="ft" takes all of ft\'s files.'
    ]
    assert merge(base, ft, tmp_path / "taken", t, chat_template="ft").warnings == ()
    assert template(tmp_path / "taken") == CHAT
    assert merge(base, ft, tmp_path / "all", t, files_from="ft").warnings == ()
    assert warnings_of(ft, base) == []  # BASE's is in the output


def test_of_two_templates_the_output_has_one_and_says_so(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 1, {"tokenizer_config.json": {"chat_template": "{{ x }}"}})
    ft = model(tmp_path / "ft", 2, {"tokenizer_config.json": {"chat_template": CHAT}})
    (told,) = warnings_of(base, ft)
    assert told.startswith('The chat template of ft is another: the output has base\'s. chat_template="ft" takes it')
    assert warnings_of(base, model(tmp_path / "same", 2, {"chat_template.jinja": "{{ x }}\n"})) == []
    merge(base, ft, tmp_path / "kept", chat_template="base", files_from="ft")
    assert template(tmp_path / "kept") == "{{ x }}"
    stored = json.loads((tmp_path / "kept/tokenizer_config.json").read_text())
    assert stored["chat_template"] == "{{ x }}"


def test_a_union_of_vocabularies_says_which_template_it_has(tmp_path: Path) -> None:
    more = changed(model={**TOKENIZER["model"], "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []})
    base, ft = (
        model(tmp_path / "base", 1),
        model(tmp_path / "ft", 2, {"tokenizer.json": more, "chat_template.jinja": CHAT}),
    )
    report = merge(base, ft, tmp_path / "union", vocab="union")
    assert any('chat_template="ft" takes it' in warning for warning in report.warnings)
    report = merge(base, ft, tmp_path / "chat", vocab="union", chat_template="ft")
    assert not any("chat" in warning for warning in report.warnings)
    assert template(tmp_path / "chat") == CHAT


def test_a_template_by_name_or_from_a_file(tmp_path: Path) -> None:
    base, ft = model(tmp_path / "base", 1), model(tmp_path / "ft", 2)
    file = tmp_path / "own.jinja"
    file.write_text(CHAT)
    for number, (choice, expected) in enumerate((("chatml", "<|im_start|>"), (str(file), CHAT), (CHAT, CHAT))):
        out = tmp_path / f"out{number}"
        merge(base, ft, out, chat_template=choice)
        assert expected in (template(out) or "")
        if choice == str(file):
            file.unlink()  # what it held is in the report
        found = CliRunner().invoke(merge_tool, ["verify", str(out), "--against", str(base), str(ft)])
        assert found.exit_code == 0, found.output
        assert ("--chat-template chatml" if number == 0 else "--chat-template FILE") in (out / "README.md").read_text()
        assert merge(base, ft, out, chat_template=choice if number != 1 else CHAT).already_complete
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (base, ft)]}
    merge_models(recipe, tmp_path / "yaml", chat_template="chatml")
    assert "<|im_start|>" in (template(tmp_path / "yaml") or "")


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ("ft", 'chat_template="ft": ft has no chat template'),
        ("chat", "chat_template is 'chat', expected a model (base, ft, "),
        ("nothing.jinja", 'chat_template="nothing.jinja": cannot be read'),
        ("EMPTY", "holds no template in Jinja"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, choice: str, problem: str) -> None:
    base, ft = model(tmp_path / "base", 1), model(tmp_path / "ft", 2)
    (tmp_path / "empty.jinja").write_text("nothing\n")
    with pytest.raises(RecipeError) as caught:
        merge(base, ft, tmp_path / "out", chat_template=choice.replace("EMPTY", str(tmp_path / "empty.jinja")))
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- settings

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "scaled positions": ({"rope_scaling": None}, {"rope_scaling": LLAMA3}, "rope_scaling"),
    "scaled, one silent": ({}, {"rope_scaling": LLAMA3}, "rope_scaling"),
    "another factor": ({"rope_scaling": LLAMA3}, {"rope_scaling": {**LLAMA3, "factor": 32.0}}, "rope_scaling"),
    "in a newer form": ({}, {"rope_parameters": {**LLAMA3, "rope_theta": 10_000.0}}, "rope_scaling"),
    "another base, in a newer form": ({}, {"rope_theta": "absent", "rope_parameters": {"rope_type": "default",
                                      "rope_theta": 5e5}}, "rope_theta"),
    "one kind of layers": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e5}, "sliding_attention": {"rope_theta": 1e4}}},
        "rope_theta",
    ),
    "the other kind, in an older form": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e5}}},
        {"rope_theta": 1e4, "rope_local_base_freq": 1e4},
        "rope_local_base_freq",
    ),
    "what only the layers with a window scale": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4},
                             "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}},
        "rope_scaling",
    ),
    "sections": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
                 {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 0]}},
                 "rope_scaling"),
    "base, by its oldest name": ({"rope_theta": "absent", "rotary_emb_base": 10_000}, {"rope_theta": 5e5},
                                 "rope_theta"),
    "activation": ({}, {"hidden_act": "gelu"}, "hidden_act"),
    "epsilon": ({}, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    "cap": ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}, "final_logit_softcapping"),
    "head_dim": ({"head_dim": 2}, {"head_dim": 4}, "head_dim"),
    "window": ({"sliding_window": None}, {"sliding_window": 8}, "sliding_window"),
    "experts": ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}, "num_experts_per_tok"),
    "multiplier": ({"residual_multiplier": 1.0}, {"residual_multiplier": 0.2}, "residual_multiplier"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNLIKE)
def test_a_setting_that_changes_what_weights_mean_is_one_warning(tmp_path: Path, what: str) -> None:
    here, there, key = UNLIKE[what]
    base, ft = model(tmp_path / "base", 1, **here), model(tmp_path / "ft", 2, **there)
    (told,) = warnings_of(base, ft)
    assert told.startswith(f"{key} differs: ")
    (told,) = warnings_of(ft, base)
    assert told.startswith(f"{key} differs: ")


ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "newer form": ({}, {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "newer form, scaled": (
        {"rope_scaling": LLAMA3},
        {"rope_theta": "absent", "rope_parameters": {**LLAMA3, "rope_theta": 10_000.0}},
    ),
    "older spelling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "a base for each kind of layers": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": "absent", "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }},
    ),
    "sections": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
                 {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}}),
    "older names": ({"rope_theta": "absent", "rotary_emb_base": 10_000, "rotary_pct": 0.25},
                    {"rope_parameters": {"rope_theta": 10_000, "partial_rotary_factor": 0.25}}),
    "long positions": ({"rope_scaling": {"type": "su", "long_factor": [1.0, 2.0]}},
                       {"rope_scaling": {"type": "longrope", "long_factor": [1.0, 2.0]}}),
    "a default that one writes": ({}, {"head_dim": 2, "attention_bias": False, "use_cache": True}),
    "what no weight means": ({"max_position_embeddings": 8}, {"max_position_embeddings": 16, "_name_or_path": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("what", ALIKE)
def test_the_same_setting_in_another_form_is_no_warning(tmp_path: Path, what: str) -> None:
    here, there = ALIKE[what]
    assert warnings_of(model(tmp_path / "base", 1, **here), model(tmp_path / "ft", 2, **there)) == []


def test_a_language_model_inside_another_is_compared_with_itself(tmp_path: Path) -> None:
    """One line, on the classes: the settings are the same, one floor further down."""
    inner = {key: value for key, value in SETTINGS.items() if key != "architectures"}
    outer = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": inner,
             "vision_config": {"model_type": "clip", "hidden_size": 99, "num_attention_heads": 3}}  # fmt: skip
    base = model(tmp_path / "base", 1)
    ft = model(tmp_path / "ft", 2, **dict.fromkeys(SETTINGS, "absent"))
    (ft / "config.json").write_text(json.dumps({**outer}))
    told = warnings_of(base, ft)
    assert [line.split(":")[0] for line in told] == ["architectures differs"]


def test_recipes_say_the_same(tmp_path: Path) -> None:
    base, ft = model(tmp_path / "base", 1), model(tmp_path / "ft", 2, {"chat_template.jinja": CHAT}, hidden_act="gelu")
    recipe = {"merge_method": "slerp", "base_model": str(base), "models": [{"model": str(base)}, {"model": str(ft)}],
              "parameters": {"t": 0.5}}  # fmt: skip
    told = merge_models(recipe, tmp_path / "out").warnings
    assert [line.split(":")[0] for line in told] == [
        "hidden_act differs",
        "The chat template of ft is not in the output",
    ]
    assert f'chat_template="{ft}"' in told[1]
    assert load_folder(tmp_path / "out")


def test_with_fts_tokenizer_the_output_has_fts_template(tmp_path: Path) -> None:
    more = changed(model={**TOKENIZER["model"], "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []})
    base = model(tmp_path / "base", 1, {"chat_template.jinja": "{{ x }}"})
    ft = model(tmp_path / "ft", 2, {"tokenizer.json": more, "chat_template.jinja": CHAT})
    told = warnings_of(base, ft, vocab="ft")
    assert template(tmp_path / "out") == CHAT
    assert any(
        'The chat template of base is another: the output has ft\'s. chat_template="base"' in line for line in told
    )


@pytest.mark.parametrize("pieces", ["tokenizer.model", "vocab.json", None])
def test_added_tokens_stand_where_converters_look(tmp_path: Path, pieces: str | None) -> None:
    """Beside a file of pieces: in added_tokens.json and added_tokens_decoder, with what was there."""
    added = {"id": 3, "content": "<x>", "special": True, "normalized": False}
    files: dict[str, Any] = {} if pieces is None else {pieces: "{}"}
    files["tokenizer_config.json"] = {"added_tokens_decoder": {"0": {"content": "a"}}, "model_max_length": 9}
    files["added_tokens.json"] = {"a": 0}
    base, ft = (
        model(tmp_path / "base", 1, files),
        model(tmp_path / "ft", 2, {"tokenizer.json": changed(added_tokens=[added])}),
    )
    tensors = load_folder(ft)
    tensors["model.embed_tokens.weight"] = np.vstack([tensors["model.embed_tokens.weight"], np.ones((1, 4))])
    save_model(ft, tensors, config=SETTINGS, side_files={"tokenizer.json": json.dumps(changed(added_tokens=[added]))})
    merge(base, ft, tmp_path / "out", vocab="union")
    ids, config = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("added_tokens.json", "tokenizer_config.json")
    )
    assert ids == ({"a": 0, "<x>": 3} if pieces else {"a": 0})
    decoder = config["added_tokens_decoder"]
    assert decoder.get("3", {}).get("content") == ("<x>" if pieces else None)
    assert decoder["0"] == {"content": "a"}
    assert config["model_max_length"] == 9
    found = CliRunner().invoke(merge_tool, ["verify", str(tmp_path / "out"), "--against", str(base), str(ft)])
    assert found.exit_code == 0, found.output


def test_a_template_whose_tokens_the_output_lacks_is_a_warning(tmp_path: Path) -> None:
    """FT's template alone, without FT's tokens: they would be split into pieces."""
    chatml = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    base, ft = model(tmp_path / "base", 1), model(tmp_path / "ft", 2, {"chat_template.jinja": chatml})
    (told,) = warnings_of(base, ft, chat_template="ft")
    assert told == (
        "chat_template: the template writes <|im_start|>, <|im_end|>, which are no tokens of the output's tokenizer."
    )
    added = [{"id": 3 + n, "content": token, "special": True} for n, token in enumerate(("<|im_start|>", "<|im_end|>"))]
    knows = model(tmp_path / "knows", 1, {"tokenizer.json": changed(added_tokens=added)})
    told_of = merge(knows, ft, tmp_path / "b", chat_template="ft", exclude="embed_tokens").warnings
    assert not any("no tokens of the output" in warning for warning in told_of)
