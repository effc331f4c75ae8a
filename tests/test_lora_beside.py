"""Trained weights beside an adapter: applied as in the live model, or refused by name; never ignored."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from checkpoints import contents, load_folder, save_model
from merge_tool import CheckpointError, MergeToolError, merge, open_checkpoint
from merge_tool.models.lora import open_model
from test_lora import normal, save_adapter
from test_lora_tied import IDS, llama, logits, same


def trained(folder: Path, *, tied: bool, **settings: Any) -> tuple[Path, Path, Any]:
    """A base, an adapter of it with tensors that were trained in place beside it, as LLaVA saves them, and the live
    model's logits."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.LlamaConfig(**{**llama().config.to_dict(), "tie_word_embeddings": tied})
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))
        for name, parameter in live.named_parameters():
            if name.endswith(("embed_tokens.weight", "norm.weight")):
                parameter.requires_grad_(True)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(folder / "adapter")
        beside = {n: p.detach() for n, p in live.named_parameters() if p.requires_grad and "lora_" not in n}
        torch.save(beside, folder / "adapter/non_lora_trainables.bin")
        return folder / "base", folder / "adapter", live(IDS).logits.detach()


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["mlp"]}], ids=["", "modules saved"])
@pytest.mark.parametrize("tied", [False, True])
def test_non_lora_trainables_are_applied_as_in_the_live_model(
    tmp_path: Path, tied: bool, settings: dict[str, Any]
) -> None:
    """Whole tensors take the place of BASE's; where the head is the embedding, it follows."""
    base, adapter, live = trained(tmp_path, tied=tied, **settings)
    merge(base, adapter, tmp_path / "out", 1)
    assert same(logits(tmp_path / "out"), live)
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert "adapter/non_lora_trainables.bin" in report["inputs"]["ft"]["files"]
    (adapter / "non_lora_trainables.bin").unlink()
    merge(base, adapter, tmp_path / "without", 1)
    assert not same(logits(tmp_path / "without"), live)


def test_a_file_beside_the_adapter_with_a_tensor_that_has_no_place_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, tied=False)
    torch.save({"base_model.model.model.mm_projector.0.weight": torch.ones(3)}, adapter / "non_lora_trainables.bin")
    with pytest.raises(MergeToolError, match=r"no place there for 1 tensor: base_model\.model\.model\.mm_projector\.0"):
        merge(base, adapter, tmp_path / "out", 1)


def test_a_projector_of_llava_beside_the_adapter_belongs_to_the_model(tmp_path: Path) -> None:
    """Where BASE has its tensors; two files of such tensors leave open which is meant."""
    names = ("model.mm_projector.0.weight", "model.mm_projector.0.bias")
    base = save_model(tmp_path / "base", {"q.weight": normal(6, 5), names[0]: normal(4, 3), names[1]: normal(4)})
    adapter = save_adapter(tmp_path / "lora", {"q.lora_A.weight": normal(4, 5), "q.lora_B.weight": normal(6, 4)})
    projector = {names[0]: torch.from_numpy(normal(4, 3)), names[1]: torch.from_numpy(normal(4))}
    torch.save(projector, adapter / "mm_projector.bin")
    merge(base, adapter, tmp_path / "out", 1)
    found = load_folder(tmp_path / "out")
    for name, tensor in projector.items():
        assert found[name].tobytes() == tensor.numpy().tobytes()
    without = save_model(tmp_path / "text", {"q.weight": normal(6, 5)})
    with pytest.raises(MergeToolError, match=r"no place there for 2 tensors: model\.mm_projector\.0\.bias"):
        merge(without, adapter, tmp_path / "x", 1)
    torch.save(projector, adapter / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match=r"has mm_projector\.bin beside the adapter"):
        merge(base, adapter, tmp_path / "x", 1)


def test_a_tensor_beside_the_adapter_and_in_it_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(6, 5), "norm.weight": normal(5)})
    found = {"q.lora_A.weight": normal(4, 5), "q.lora_B.weight": normal(6, 4), "norm.weight": normal(5)}
    adapter = save_adapter(tmp_path / "lora", found)
    torch.save({"base_model.model.norm.weight": torch.ones(5)}, adapter / "non_lora_trainables.bin")
    with pytest.raises(MergeToolError, match=r"norm\.weight has another value in the adapter already"):
        open_model(f"{base}+{adapter}")


OTHERS = {
    "new_embeddings.safetensors": "embeddings of tokens that were added to the vocabulary",
    "value_head.bin": "a value head, which the language model does not use",
    "value_head.safetensors": "a value head",
    "pytorch_model.bin": r"perhaps a whole model.*If it is the adapter's base, give MODEL\+ADAPTER",
    "pytorch_model-00001-of-00002.bin": "perhaps a whole model",
    "model-00001-of-00002.safetensors": "perhaps a whole model",
    "classifier.pt": "weights that are not the adapter's own",
    "ggml-adapter-model.gguf": "weights that are not the adapter's own",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_beside_an_adapter_are_refused_by_name(tmp_path: Path, name: str) -> None:
    base = save_model(tmp_path / "base", {"q.weight": normal(6, 5)})
    adapter = save_adapter(tmp_path / "lora", {"q.lora_A.weight": normal(4, 5), "q.lora_B.weight": normal(6, 4)})
    merge(base, adapter, tmp_path / "plain")
    (adapter / name).write_bytes(b"weights")
    pattern = rf"lora: has {name} beside the adapter: {OTHERS[name]}.*To go on without it, move it elsewhere"
    for ft in (adapter, f"{base}+{adapter}"):
        with pytest.raises(CheckpointError, match=pattern):
            merge(base, ft, tmp_path / "out")
    with pytest.raises(CheckpointError, match=pattern):
        merge(adapter, adapter, tmp_path / "out")


def test_the_state_of_a_training_is_no_part_of_the_adapter(tmp_path: Path) -> None:
    """As transformers and accelerate leave it in checkpoint-N."""
    base = save_model(tmp_path / "base", {"q.weight": normal(6, 5)})
    adapter = save_adapter(tmp_path / "lora", {"q.lora_A.weight": normal(4, 5), "q.lora_B.weight": normal(6, 4)})
    merge(base, adapter, tmp_path / "plain")
    states = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"]
    states += ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler.bin", "dl_state_dict.bin"]
    for name in states:
        (adapter / name).write_bytes(b"state")
    merge(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "plain").keys()
    for name, array in load_folder(tmp_path / "plain").items():
        assert load_folder(tmp_path / "out")[name].tobytes() == array.tobytes()


def test_factors_are_not_merged_without_the_tensors_beside_them(tmp_path: Path) -> None:
    """Two adapters are merged factor by factor only if factors are all that they are."""
    _, adapter, _ = trained(tmp_path, tied=False)
    shutil.copytree(adapter, tmp_path / "second")
    with pytest.raises(CheckpointError, match=r"adapter: has non_lora_trainables\.bin beside .* Give MODEL\+ADAPTER"):
        merge(adapter, tmp_path / "second", tmp_path / "out")
    assert open_checkpoint(adapter, mergeable=False).tensors


def test_weights_beside_a_model_that_are_no_part_of_it_are_warned_of(tmp_path: Path) -> None:
    tensors = {"q.weight": normal(6, 5)}
    base, ft = save_model(tmp_path / "base", tensors), save_model(tmp_path / "ft", {"q.weight": normal(6, 5)})
    (ft / "value_head.safetensors").write_bytes(b"x")
    save_adapter(ft, {"q.lora_A.weight": normal(4, 5), "q.lora_B.weight": normal(6, 4)})
    warned = merge(base, ft, tmp_path / "out").warnings
    assert any("ft: value_head.safetensors is not merged: its name is that of a value head" in line for line in warned)
    assert any(
        "ft: has both a model and an adapter; adapter_model.safetensors is not applied" in line for line in warned
    )
