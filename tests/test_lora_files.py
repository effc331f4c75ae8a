"""LoRA files of kohya and diffusers on image models: every weight is W + alpha / rank * up down, where the names of the
two libraries mean it. The pairs of names are those of diffusers' conversion of the authors' checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import BF16, Array, load_file, load_folder, save_file, save_model
from merge_tool import MergeToolError, MismatchError, merge, merge_models
from merge_tool.models.lora import open_model
from oracle import float64_merge

# the authors' module -> diffusers' module, with the weight's shape
UNET: dict[str, tuple[str, tuple[int, ...]]] = {
    "input_blocks.0.0": ("conv_in", (8, 4, 3, 3)),
    "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1", (8, 8, 3, 3)),
    "input_blocks.2.0.out_layers.3": ("down_blocks.0.resnets.1.conv2", (8, 8, 3, 3)),
    "input_blocks.1.1.proj_in": ("down_blocks.0.attentions.0.proj_in", (8, 8, 1, 1)),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (8, 8)),
    "input_blocks.2.1.transformer_blocks.0.attn2.to_out.0": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0", (8, 8)),
    "input_blocks.2.1.transformer_blocks.0.ff.net.0.proj": (
        "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj", (32, 8)),
    "input_blocks.3.0.op": ("down_blocks.0.downsamplers.0.conv", (8, 8, 3, 3)),
    "input_blocks.4.0.skip_connection": ("down_blocks.1.resnets.0.conv_shortcut", (16, 8, 1, 1)),
    "input_blocks.8.1.transformer_blocks.0.attn2.to_k": (
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k", (16, 12)),
    "input_blocks.11.0.emb_layers.1": ("down_blocks.3.resnets.1.time_emb_proj", (16, 32)),
    "middle_block.1.transformer_blocks.0.attn1.to_v": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_v", (16, 16)),
    "middle_block.2.in_layers.2": ("mid_block.resnets.1.conv1", (16, 16, 3, 3)),
    "output_blocks.2.1.conv": ("up_blocks.0.upsamplers.0.conv", (16, 16, 3, 3)),
    "output_blocks.5.2.conv": ("up_blocks.1.upsamplers.0.conv", (16, 16, 3, 3)),
    "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0": (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0", (8, 8)),
    "output_blocks.3.0.in_layers.2": ("up_blocks.1.resnets.0.conv1", (16, 32, 3, 3)),
    "time_embed.2": ("time_embedding.linear_2", (32, 32)),
    "out.2": ("conv_out", (4, 8, 3, 3)),
}  # fmt: skip
ENCODER = {
    f"text_model.encoder.layers.{k}.{name}": shape
    for k in range(2)
    for name, shape in {"self_attn.q_proj": (12, 12), "self_attn.k_proj": (12, 12), "self_attn.v_proj": (12, 12),
                        "self_attn.out_proj": (12, 12), "mlp.fc1": (48, 12), "mlp.fc2": (12, 48)}.items()
}  # fmt: skip
IN_UNET = "model.diffusion_model."
RNG = np.random.default_rng(3)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Array]:
    return {f"{prefix}{module}.weight": normal(*shape) for module, shape in shapes.items()}


def diffusers_unet() -> dict[str, Array]:
    return weights(dict(UNET.values())) | {"down_blocks.0.resnets.0.norm1.weight": normal(8)}


def authors_file() -> dict[str, Array]:
    """A file of Stable Diffusion 1: UNet, text encoder, and what no LoRA changes."""
    unet = weights({name: shape for name, (_, shape) in UNET.items()}, IN_UNET)
    encoder = weights(ENCODER, "cond_stage_model.transformer.")
    return unet | encoder | {"first_stage_model.decoder.conv_in.weight": normal(8, 4, 3, 3)}


def factors(shape: tuple[int, ...], rank: int = 3) -> tuple[Array, Array]:
    down = normal(rank, *shape[1:])
    return down, normal(shape[0], rank, *(1 for _ in shape[2:]))


def product(down: Array, up: Array) -> Array:
    """up down for every place of the kernel, in float64."""
    return np.tensordot(up.reshape(up.shape[:2]).astype(np.float64), down.astype(np.float64), 1)


class Lora:
    """A LoRA file in some spelling, and the changes that it makes, by the module's name without its component."""

    def __init__(self, rank: int = 3) -> None:
        self.tensors: dict[str, Array] = {}
        self.changes: dict[str, Array] = {}
        self.rank = rank

    def kohya(self, component: str, modules: Mapping[str, tuple[int, ...]], alpha: float | None = 2.0) -> Lora:
        for module, shape in modules.items():
            down, up = factors(shape, self.rank)
            stem = f"lora_{component}_{module.replace('.', '_')}"
            self.tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            if alpha is not None:
                self.tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
            self.changes[module] = product(down, up) * (1 if alpha is None else alpha / self.rank)
        return self

    def diffusers(
        self, component: str, modules: Mapping[str, tuple[int, ...]], ends: tuple[str, str], scale: float = 1
    ) -> Lora:
        for module, shape in modules.items():
            down, up = factors(shape, self.rank)
            self.tensors |= {f"{component}{module}{ends[0]}": down, f"{component}{module}{ends[1]}": up}
            self.changes[module] = product(down, up) * scale
        return self

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        save_file(self.tensors, path, metadata)
        return path


def check(found: Mapping[str, Array], before: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
    """`changes` by the tensor's name; every other tensor is as before."""
    assert found.keys() == before.keys()
    for name, array in before.items():
        if name in changes:
            expected = array.astype(np.float64) + changes[name].reshape(array.shape)
            assert np.abs(found[name] - expected).max() < 1e-5, name
        else:
            assert found[name].tobytes() == array.tobytes(), name
    assert changes.keys() <= before.keys()
    assert changes


PEFT, OLD = (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")
DIFFUSERS = dict(UNET.values())
AUTHORS = {name: shape for name, (_, shape) in UNET.items()}


@pytest.mark.parametrize(
    "spelling", ["kohya", "kohya, the authors' names", "kohya, no alpha", "peft", "old", "of the authors, dotted"]
)
def test_a_lora_of_a_unet_is_applied_to_the_folder_of_diffusers(tmp_path: Path, spelling: str) -> None:
    lora = {
        "kohya": lambda: Lora().kohya("unet", DIFFUSERS),
        "kohya, the authors' names": lambda: Lora().kohya("unet", AUTHORS),
        "kohya, no alpha": lambda: Lora().kohya("unet", DIFFUSERS, None),
        "peft": lambda: Lora().diffusers("unet.", DIFFUSERS, PEFT),
        "old": lambda: Lora().diffusers("unet.", DIFFUSERS, OLD),
        "of the authors, dotted": lambda: Lora().diffusers("diffusion_model.", AUTHORS, PEFT),
    }[spelling]()
    before = diffusers_unet()
    unet, file = save_model(tmp_path / "unet", before), lora.save(tmp_path / "style.safetensors")
    renamed = {name: theirs for name, (theirs, _) in UNET.items()}
    changes = {f"{renamed.get(module, module)}.weight": change for module, change in lora.changes.items()}
    merge(unet, file, tmp_path / "out", 1)  # alone, as FT
    check(load_folder(tmp_path / "out"), before, changes)
    merge(unet, f"{unet}+{file}", tmp_path / "half", 0.5)
    half, out = load_folder(tmp_path / "half"), load_folder(tmp_path / "out")
    name = "up_blocks.1.resnets.0.conv1.weight"
    assert np.abs(half[name] - float64_merge(before[name], out[name], 0.5)).max() < 1e-5


@pytest.mark.parametrize("names", [DIFFUSERS, AUTHORS], ids=["diffusers", "authors"])
def test_a_lora_is_applied_to_all_components_of_the_authors_file(tmp_path: Path, names: dict[str, Any]) -> None:
    """One file to one file: UNet and text encoder, in kohya's names."""
    before, lora = authors_file(), Lora().kohya("unet", names).kohya("te", ENCODER, alpha=6.0)
    save_file(before, tmp_path / "sd.safetensors")
    lora.save(tmp_path / "style.safetensors")
    theirs = {of_diffusers: name for name, (of_diffusers, _) in UNET.items()}
    changes = {
        f"cond_stage_model.transformer.{m}.weight" if m in ENCODER else f"{IN_UNET}{theirs.get(m, m)}.weight": change
        for m, change in lora.changes.items()
    }
    merge(tmp_path / "sd.safetensors", tmp_path / "style.safetensors", tmp_path / "out.safetensors", 1)
    check(load_file(tmp_path / "out.safetensors"), before, changes)


def open_clip(layers: int = 2) -> dict[str, Array]:
    """The second text encoder of SDXL, whose attention has one matrix for three."""
    stem = "conditioner.embedders.1.model.transformer.resblocks"
    shapes = {"attn.in_proj_weight": (36, 12), "attn.out_proj.weight": (12, 12), "mlp.c_fc.weight": (48, 12),
              "mlp.c_proj.weight": (12, 48)}  # fmt: skip
    return {f"{stem}.{k}.{name}": normal(*shape) for k in range(layers) for name, shape in shapes.items()}


def test_the_parts_of_a_fused_attention_get_their_own_changes(tmp_path: Path) -> None:
    """lora_te2 of SDXL's one file; a layer whose query alone is changed keeps the rest bit for bit."""
    modules = {m: s for m, s in ENCODER.items() if not m.endswith(("1.self_attn.k_proj", "1.self_attn.v_proj"))}
    lora = Lora().kohya("te1", ENCODER).kohya("unet", AUTHORS)
    first = weights(ENCODER, "conditioner.embedders.0.transformer.")
    before = weights(AUTHORS, IN_UNET) | first | open_clip()
    changes = {f"conditioner.embedders.0.transformer.{m}.weight": lora.changes[m] for m in ENCODER}
    changes |= {f"{IN_UNET}{m}.weight": lora.changes[m] for m in AUTHORS}
    lora.kohya("te2", modules)
    for k in range(2):
        stem, own = f"conditioner.embedders.1.model.transformer.resblocks.{k}", f"text_model.encoder.layers.{k}"
        pairs = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        changes |= {f"{stem}.{a}.weight": lora.changes[f"{own}.{b}"] for a, b in pairs.items()}
        zero = np.zeros((12, 12))
        parts = [lora.changes[f"{own}.self_attn.{p}_proj"] if (k, p) in {(0, "k"), (0, "v")} or p == "q" else zero
                 for p in "qkv"]  # fmt: skip
        changes[f"{stem}.attn.in_proj_weight"] = np.concatenate(parts)
    save_file(before, tmp_path / "xl.safetensors")
    file = lora.save(tmp_path / "style.safetensors")
    merge(tmp_path / "xl.safetensors", file, tmp_path / "out.safetensors", 1)
    found = load_file(tmp_path / "out.safetensors")
    check(found, before, changes)
    name = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    assert found[name][12:].tobytes() == before[name][12:].tobytes()


def test_a_component_gets_its_own_changes_and_a_warning_for_the_others(tmp_path: Path) -> None:
    """The folder of a text encoder: the second one has the names of the first, in other shapes."""
    second = {m: tuple(2 * n for n in shape) for m, shape in ENCODER.items()}
    lora = Lora().kohya("te1", ENCODER)
    first = dict(lora.changes)
    lora.kohya("te2", second).kohya("unet", DIFFUSERS)
    file = lora.save(tmp_path / "style.safetensors")
    for folder, modules, changes in (("text_encoder", ENCODER, first), ("text_encoder_2", second, lora.changes)):
        told: list[str] = []
        before = weights(modules)
        merge(save_model(tmp_path / folder, before), file, tmp_path / f"{folder}-out", 1, on_warning=told.append)
        check(load_folder(tmp_path / f"{folder}-out"), before, {f"{m}.weight": changes[m] for m in modules})
        others = [line for line in told if "belong to another component than" in line]
        assert len(others) == 2
        assert any("19 changes for the UNet or transformer" in line for line in others)


def test_a_folder_of_diffusers_lora_and_its_metadata(tmp_path: Path) -> None:
    """pytorch_lora_weights.safetensors; alpha from the metadata, with a pattern, and magnitudes (DoRA)."""
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.resnets.1.conv1": 9}}
    lora = Lora().diffusers("unet.", DIFFUSERS, PEFT, 2.0)
    lora.changes["mid_block.resnets.1.conv1"] *= 1.5
    module = "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
    lora.tensors[f"unet.{module}.lora_magnitude_vector"] = np.abs(normal(32))
    (tmp_path / "lora").mkdir()
    lora.save(
        tmp_path / "lora/pytorch_lora_weights.safetensors",
        {"format": "pt", "lora_adapter_metadata": json.dumps(settings)},
    )
    before = diffusers_unet()
    direction = before[f"{module}.weight"] + lora.changes[module]
    lengths = np.sqrt((direction**2).sum(axis=1, keepdims=True))
    magnitude = lora.tensors[f"unet.{module}.lora_magnitude_vector"][:, None]
    lora.changes[module] = direction / lengths * magnitude - before[f"{module}.weight"]
    unet = save_model(tmp_path / "unet", before)
    merge(unet, f"{unet}+{tmp_path / 'lora'}", tmp_path / "out", 1)
    check(load_folder(tmp_path / "out"), before, {f"{m}.weight": c for m, c in lora.changes.items()})
    merge(unet, tmp_path / "lora", tmp_path / "alone", 1)
    assert (
        load_folder(tmp_path / "alone")[f"{module}.weight"].tobytes()
        == load_folder(tmp_path / "out")[f"{module}.weight"].tobytes()
    )


def test_attention_processors_of_old_diffusers(tmp_path: Path) -> None:
    modules = {m: s for m, s in DIFFUSERS.items() if ".attn" in m}
    lora = Lora()
    for module, shape in modules.items():
        block, layer = module.removesuffix(".0").rsplit(".", 1)
        lora.diffusers(f"unet.{block}.processor.", {layer: shape}, ("_lora.down.weight", "_lora.up.weight"))
        lora.changes[f"{module}.weight"] = lora.changes.pop(layer)
    before = diffusers_unet()
    unet = save_model(tmp_path / "unet", before)
    merge(unet, lora.save(tmp_path / "old.safetensors"), tmp_path / "out", 1)
    check(load_folder(tmp_path / "out"), before, lora.changes)


def test_an_element_has_the_same_bits_in_whatever_range_it_is_read(tmp_path: Path) -> None:
    before = {name: array.astype(BF16) for name, array in open_clip().items()}
    save_file(before, tmp_path / "xl.safetensors")
    file = Lora().kohya("te2", ENCODER).save(tmp_path / "style.safetensors")
    model = open_model(f"{tmp_path / 'xl.safetensors'}+{file}")
    for name, info in model.tensors.items():
        everything = model.read_new(name, 0, info.numel)
        for cut in (1, 7, 143, 144, min(145, info.numel), info.numel - 5):
            pieces = [model.read_new(name, 0, cut), model.read_new(name, cut, info.numel)]
            assert np.concatenate(pieces).tobytes() == everything.tobytes()
        assert model.stored_dtype(name) == "BF16"


REFUSED = {
    "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lora_mid.weight": "LoCon with a core", "dora_scale": "DoRA of LyCORIS",
    "diff": "differences", "diff_b": "differences", "w_norm": "norms",
}  # fmt: skip


@pytest.mark.parametrize("end", REFUSED)
def test_what_is_no_product_of_two_factors_is_refused_by_name(tmp_path: Path, end: str) -> None:
    lora = Lora().kohya("unet", DIFFUSERS)
    lora.tensors[f"lora_unet_conv_in.{end}"] = normal(8, 3)
    unet = save_model(tmp_path / "unet", diffusers_unet())
    with pytest.raises(MismatchError, match=rf"style.safetensors: has {REFUSED[end]} \(lora_unet_conv_in.{end}"):
        merge(unet, lora.save(tmp_path / "style.safetensors"), tmp_path / "out", 1)


def refusal(base: Path, lora: Lora, out: Path) -> str:
    with pytest.raises(MergeToolError) as caught:
        merge(base, lora.save(out.with_name("style.safetensors")), out, 1)
    assert not out.exists()
    return str(caught.value)


def test_what_has_no_clear_place_is_refused_by_name(tmp_path: Path) -> None:
    unet = save_model(tmp_path / "unet", diffusers_unet())
    out = tmp_path / "out"
    one_more = {**DIFFUSERS, "down_blocks.9.resnets.0.conv1": (8, 8, 3, 3)}
    assert "no place, or another shape, for 1 module of the UNet or transformer: down_blocks_9_resnets_0_conv1" in (
        refusal(unet, Lora().kohya("unet", one_more), out)
    )
    other = {**DIFFUSERS, "time_embedding.linear_2": (32, 16)}
    assert "no place, or another shape, for 1 module" in refusal(unet, Lora().kohya("unet", other), out)
    assert "no place for 12 modules of the first text encoder" in refusal(unet, Lora().kohya("te", ENCODER), out)
    alone = Lora().kohya("unet", {"conv_in": (8, 4, 3, 3)})
    del alone.tensors["lora_unet_conv_in.lora_up.weight"]
    assert "conv_in has no up factor" in refusal(unet, alone, out)
    both = Lora().kohya("unet", DIFFUSERS).kohya("unet", {"input_blocks.0.0": (8, 4, 3, 3)})
    assert "both change conv_in.weight" in refusal(unet, both, out)
    encoder = save_model(tmp_path / "te", weights(ENCODER))
    twins = Lora().kohya("te1", ENCODER).kohya("te2", ENCODER)
    assert "te1, te2 would all fit" in refusal(encoder, twins, out)
    broken = Lora().kohya("unet", DIFFUSERS, alpha=float("nan"))
    assert "alpha: is no finite number" in refusal(unet, broken, out)


def test_a_part_for_a_component_that_the_one_file_has_under_unknown_names_is_refused(tmp_path: Path) -> None:
    """Left out with a warning, the output would be another model."""
    before = weights(AUTHORS, IN_UNET) | {"cond_stage_model.transformer.strange.weight": normal(4, 4)}
    save_file(before, tmp_path / "sd.safetensors")
    lora = Lora().kohya("unet", AUTHORS).kohya("te", ENCODER)
    assert "no place for 12 modules of the first text encoder" in refusal(
        tmp_path / "sd.safetensors", lora, tmp_path / "out.safetensors"
    )


def test_a_unet_with_other_blocks_takes_only_names_of_its_own(tmp_path: Path) -> None:
    """Three layers in a block: the authors' numbers mean other modules there."""
    shapes = {**DIFFUSERS, "down_blocks.0.resnets.2.conv1": (8, 8, 3, 3)}
    unet = save_model(tmp_path / "unet", weights(shapes))
    assert "no place for 19 modules" in refusal(unet, Lora().kohya("unet", AUTHORS), tmp_path / "out")


def test_a_file_of_peft_without_its_settings_is_refused(tmp_path: Path) -> None:
    """Its scale is in adapter_config.json: by names alone it would be applied with another one."""
    modules = {"model.layers.0.self_attn.q_proj": (8, 8)}
    base = save_model(tmp_path / "base", weights(modules))
    for prefix, problem in (
        ("", "has no alpha, and its name no component"),
        ("base_model.model.", "no place for 1 module"),
    ):
        assert problem in refusal(base, Lora().diffusers(prefix, modules, PEFT), tmp_path / "out")
    lora = Lora().diffusers("", modules, PEFT, scale=2.0)
    lora.tensors["model.layers.0.self_attn.q_proj.alpha"] = np.array(6, np.float32)
    merge(base, lora.save(tmp_path / "lora.safetensors"), tmp_path / "out", 1)
    check(load_folder(tmp_path / "out"), load_folder(base), {f"{m}.weight": c for m, c in lora.changes.items()})


def test_two_lora_files_are_merged_factor_by_factor_with_a_warning(tmp_path: Path) -> None:
    """As two folders of peft are."""
    files = [Lora().kohya("unet", DIFFUSERS).save(tmp_path / f"{name}.safetensors") for name in "ab"]
    told: list[str] = []
    merge(*files, tmp_path / "out.safetensors", 0.5, on_warning=told.append)
    assert (
        sum("a.safetensors and b.safetensors are adapters: their factors are merged one by one" in t for t in told) == 1
    )
    unet = save_model(tmp_path / "unet", diffusers_unet())
    with pytest.raises(MergeToolError, match=r"BASE is a LoRA file, but unet is a model. Give MODEL\+FILE"):
        merge(files[0], unet, tmp_path / "x", 0.5)


def test_a_file_that_is_no_lora_is_refused_behind_the_plus(tmp_path: Path) -> None:
    unet = save_model(tmp_path / "unet", diffusers_unet())
    save_file({"x.weight": normal(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(MergeToolError, match=r"x.safetensors: is no LoRA file of an image model: it has x.weight"):
        merge(unet, f"{unet}+{tmp_path / 'x.safetensors'}", tmp_path / "out", 1)


def test_in_a_recipe_and_one_upon_another(tmp_path: Path) -> None:
    before = diffusers_unet()
    unet = save_model(tmp_path / "unet", before)
    a, b = Lora().kohya("unet", DIFFUSERS), Lora().diffusers("unet.", DIFFUSERS, PEFT)
    files = a.save(tmp_path / "a.safetensors"), b.save(tmp_path / "b.safetensors")
    merge_models(
        {"merge_method": "passthrough", "models": [{"model": f"{unet}+{files[0]}+{files[1]}"}]}, tmp_path / "out"
    )
    changes = {f"{m}.weight": a.changes[m] + b.changes[m] for m in DIFFUSERS}
    check(load_folder(tmp_path / "out"), before, changes)
