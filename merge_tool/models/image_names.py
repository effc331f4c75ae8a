"""The modules of image models, under the names of two families of libraries: diffusers, and the authors' own files (one
file with all components). LoRA files have either's names, kohya's with _ for every dot.

Only the UNet of Stable Diffusion (two layers in each block) and CLIP have two sets of names here. Any other module is
known by its own name only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# Beginnings of names in files that hold several components, and the component: te1 to te3 are text encoders.
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "te1", "cond_stage_model.model.": "te1",
    "conditioner.embedders.0.transformer.": "te1", "conditioner.embedders.1.model.": "te2",
    "text_encoders.clip_l.transformer.": "te1", "text_encoders.clip_g.transformer.": "te2",
    "text_encoders.t5xxl.transformer.": "te3",
}  # fmt: skip
COMPONENTS = ("unet", "te1", "te2", "te3")
_ATTENTION = re.compile(r"(down|up)_blocks_([0-9])_attentions_([0-9])_(.+)")
_RESNET = re.compile(r"(down|up)_blocks_([0-9])_resnets_([0-9])_(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks_([0-9])_(?:down|up)samplers_0_conv")
_FIRST_BLOCK = re.compile(r"down_blocks_0_resnets_([0-9])_")
_MIDDLE = re.compile(r"mid_block_(attentions|resnets)_([01])_(.+)")
_IN_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTSIDE = {"conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding_linear_1": "time_embed_0",
            "time_embedding_linear_2": "time_embed_2", "add_embedding_linear_1": "label_emb_0_0",
            "add_embedding_linear_2": "label_emb_0_2"}  # fmt: skip
_CLIP = re.compile(r"text_model_encoder_layers_([0-9]+)_(self_attn_([qkv])_proj|self_attn_out_proj|mlp_fc1|mlp_fc2)")
_IN_CLIP = {"self_attn_out_proj": "attn_out_proj", "mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj"}


@dataclass(frozen=True, slots=True)
class Place:
    """The weight of a module: a tensor, or one of the three parts that its rows consist of (query, key, value)."""

    tensor: str
    third: int | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """By component, the weights of a model by their modules' names with _ for every dot, in either family's spelling.

    `is_one`: the model is one component, and nothing says which.
    """

    of: Mapping[str, Mapping[str, Place]]
    is_one: bool
    has_pairs: bool  # a UNet with two layers in each block

    def find(self, component: str, module: str) -> Place | None:
        """The weight of a module of a LoRA file."""
        own = self.of.get(component, {})
        clip = _CLIP.fullmatch(module)
        shorter = module.removeprefix("text_model_")  # transformers 5 may leave the outer module out
        for name in (module, shorter, *(_unet_names(module) if self.has_pairs else ())):
            if name in own:
                return own[name]
        return _in_open_clip(own, clip) if clip else None


def find_places(names: Iterable[str]) -> Places:
    """The places of a model's tensors. A name that two modules have is left out."""
    modules = {name.removesuffix(".weight"): name for name in names if name.endswith((".weight", "in_proj_weight"))}
    found: dict[str, dict[str, Place]] = {}
    for module, name in modules.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            found.setdefault(_PREFIXES[prefix], {})[module.removeprefix(prefix).replace(".", "_")] = Place(name)
    if found:
        return Places(found, is_one=False, has_pairs=_has_pairs(found.get("unet", {})))
    counts = Counter(module.replace(".", "_") for module in modules)
    flats = {module.replace(".", "_"): Place(name) for module, name in modules.items()}
    plain = {flat: place for flat, place in flats.items() if counts[flat] == 1}
    has_pairs = _has_pairs(plain)
    for flat, place in list(plain.items()) if has_pairs else ():
        for other in _unet_names(flat):
            plain.setdefault(other, place)
    return Places(dict.fromkeys(COMPONENTS, plain), is_one=True, has_pairs=has_pairs)


def _has_pairs(flats: Iterable[str]) -> bool:
    """Whether the names are those of a UNet with two layers in each block: others are numbered otherwise."""
    layers = {match[1] for flat in flats if (match := _FIRST_BLOCK.match(flat))}
    return layers in ({"0", "1"}, {"1"}) or "input_blocks_3_0_op" in flats


def _in_open_clip(own: Mapping[str, Place], clip: re.Match[str]) -> Place | None:
    stem = f"transformer_resblocks_{clip[1]}_"
    if clip[3] is None:
        return own.get(stem + _IN_CLIP[clip[2]])
    fused = own.get(f"{stem}attn_in_proj_weight")
    return None if fused is None else Place(fused.tensor, "qkv".index(clip[3]))


def _unet_names(module: str) -> Iterator[str]:
    """What the authors' file of a UNet with two layers in each block calls a module of diffusers; several names where
    only the model shows which."""
    if module in _OUTSIDE:
        yield _OUTSIDE[module]
    elif match := _ATTENTION.fullmatch(module):
        yield f"{_block(match)}_1_{match[4]}"
    elif match := _RESNET.fullmatch(module):
        yield f"{_block(match)}_0_{_IN_RESNET.get(match[4], match[4])}"
    elif match := _SAMPLER.fullmatch(module):
        if match[1] == "down":
            yield f"input_blocks_{3 * int(match[2]) + 3}_0_op"
        else:
            yield from (f"output_blocks_{3 * int(match[2]) + 2}_{place}_conv" for place in (1, 2))
    elif match := _MIDDLE.fullmatch(module):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        yield f"middle_block_{number}_{_IN_RESNET.get(match[3], match[3])}"


def _block(match: re.Match[str]) -> str:
    number = 3 * int(match[2]) + int(match[3])
    return f"input_blocks_{number + 1}" if match[1] == "down" else f"output_blocks_{number}"
