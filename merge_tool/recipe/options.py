"""The options of a merge besides its models and their parameters: the same for a pair and for a recipe in YAML.

Each option is a field. The command line makes its options from the fields, the report stores them, the card prints them
and `verify` reads them back; a new option is a field here, and the code that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from merge_tool.errors import RecipeError, reason, shown
from merge_tool.recipe.settings import Pattern

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
DTYPE_NAMES: Mapping[str, str] = {  # in torch, config.json and recipes -> in safetensors
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
OUTPUT_DTYPES: Mapping[str, str | None] = {"base": None, **DTYPE_NAMES}
QUANTISE_LATER = (
    "8 bits are written only as BASE has them, by --dtype base. Otherwise write bfloat16 (the default) and quantise it "
    "afterwards, with llm-compressor or the tool that made the inputs."
)
STOP_OR_BASE = ("error", "base")
STOP_BASE_OR_FT = (*STOP_OR_BASE, "ft")
_NOT_WRITTEN = ("fp8", "f8", "float8", "int8", "int4", "nf4", "mxfp")


def option(default: Any, flag: str, text: str, **kind: Any) -> Any:
    """A field that the command line offers as `flag`; `text` is its help. `kind` describes its values: choices,
    metavar, is_size (bytes with a unit; `show_default` is the default as a user would write it), is_many (may be
    repeated), is_whole (a whole number), is_flag (no value)."""
    return field(default=default, metadata={"flag": flag, "help": text, **kind})


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a merge besides its models and their parameters. Raises RecipeError for values out of range.

    `dtype` is a key of OUTPUT_DTYPES. None: every tensor has its dtype in the base, but 8-bit floats become bfloat16;
    "base" writes 8-bit floats as the base has them, with scales if it has scales. A tensor is merged if a pattern of
    `only` matches it (or there is none) and no pattern of `exclude` does; the others are copied from the base.
    `on_mismatch` is about integer tensors that differ and tensors whose shape or type differs, `on_missing` about
    tensors that some model lacks. `files_from` names the model whose configuration and tokenizer files are copied:
    "base", "ft" for the second model of a pair, or a model as the recipe names it. `chat_template` is the name of a
    model, a template's known name, or a template in Jinja. `allow_different_architectures` permits what is nearly
    always a mistake. `untie` gives the output a head of its own if the base's head is its embedding. `ids` name local
    models as the Hub has them. `seed` decides the random bits of methods that have any.
    """

    only: Sequence[str] = option(
        (), "--only",
        "Merge only the tensors whose names match; copy all others from BASE, byte for byte. May be given several "
        "times.",
        metavar="PATTERN", is_many=True,
    )  # fmt: skip
    exclude: Sequence[str] = option(
        (), "--exclude", "Copy the tensors whose names match from BASE, unmerged. May be given several times.",
        metavar="PATTERN", is_many=True,
    )  # fmt: skip
    dtype: str | None = option(
        None, "--dtype",
        "Type of the output's floats. base: BASE's types; its 8-bit floats get new scales.  "
        "[default: BASE's types, but bfloat16 for 8-bit floats]",
        metavar=f"[{'|'.join(OUTPUT_DTYPES)}]",
    )  # fmt: skip
    max_shard_bytes: int = option(
        DEFAULT_MAX_SHARD_BYTES, "--max-shard-size",
        "Largest size of one output file: 500MB, 2GiB or a number of bytes.",
        metavar="SIZE", is_size=True, show_default="5GB",
    )  # fmt: skip
    files_from: str = option(
        "base", "--files-from", "Copy the configuration and tokenizer files of this model.", metavar="MODEL"
    )
    chat_template: str | None = option(
        None, "--chat-template",
        "The output's chat template: that of a model (base, ft, or as the recipe names it), auto (what most models "
        "have), one known by name (chatml, llama3 ...), or a file with Jinja.  [default: as --files-from]",
        metavar="MODEL|NAME|FILE",
    )  # fmt: skip
    on_mismatch: str = option(
        "error", "--on-mismatch",
        "If the models have different shapes, types or integers in a tensor: stop, or keep BASE's tensor.",
        choices=STOP_OR_BASE,
    )  # fmt: skip
    on_missing: str = option(
        "error", "--on-missing",
        "If a model lacks a tensor: stop; write exactly BASE's tensors; or (ft) copy what BASE lacks from the model "
        "that has it.",
        choices=STOP_BASE_OR_FT,
    )  # fmt: skip
    allow_different_architectures: bool = option(
        False, "--allow-different-architectures", "Merge models whose config.json name different architectures.",
        is_flag=True,
    )  # fmt: skip
    untie: bool = option(
        False, "--untie",
        "Give the output a head of its own where BASE's head is its embedding, and say so in config.json.",
        is_flag=True,
    )  # fmt: skip
    ids: Sequence[str] = option(
        (), "--id",
        "What a local model or adapter is called on the Hub, for the links of the model card. NAME is base, ft, "
        "model-1 ..., or its folder's name. May be given several times.",
        metavar="NAME=ORG/NAME", is_many=True,
    )  # fmt: skip
    seed: int = option(0, "--seed", "Random seed of dare and della.", is_whole=True)

    def __post_init__(self) -> None:
        if self.dtype is not None:
            if self.dtype.lower().startswith(_NOT_WRITTEN):
                raise RecipeError(f"dtype is '{shown(self.dtype)}': {QUANTISE_LATER}")
            check_choice("dtype", self.dtype, OUTPUT_DTYPES)
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", read_template(self.chat_template))
        check_choice("on_mismatch", self.on_mismatch, STOP_OR_BASE)
        check_choice("on_missing", self.on_missing, STOP_BASE_OR_FT)
        if self.max_shard_bytes < 1:
            raise RecipeError(f"The largest shard is {self.max_shard_bytes} bytes, expected at least 1.")
        for name in ("only", "exclude", "ids"):
            texts = getattr(self, name)
            object.__setattr__(self, name, (texts,) if isinstance(texts, str) else tuple(texts))
        for text in (*self.only, *self.exclude):
            Pattern(text)
        for text in self.ids:
            if not _ID.fullmatch(text):
                raise RecipeError(f"--id is '{shown(text)}', expected NAME=ORG/NAME, as in base=org/model.")


_ID = re.compile(r"[^=\n]+=[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def read_template(choice: str) -> str:
    """The text of a chat template that is a file; any other choice as it is. Raises RecipeError for a file that cannot
    be read, or that holds no template."""
    if "{" in choice or not (choice.endswith((".jinja", ".jinja2", ".j2")) or Path(choice).is_file()):
        return choice
    try:
        text = Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise RecipeError(f"--chat-template {shown(choice)}: cannot be read ({reason(e)}).") from e
    if "{" not in text:
        raise RecipeError(f"--chat-template {shown(choice)}: holds no template in Jinja: nothing in braces is in it.")
    return text


def as_json(options: Any, *, all_of_them: bool = False) -> dict[str, Any]:
    """The options that are not the default (or all), from a dataclass of such fields, as a report stores them."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    plain = {k: [str(item) for item in v] if isinstance(v, tuple) else v for k, v in values.items()}
    return {f.name: plain[f.name] for f in fields(options) if all_of_them or values[f.name] != f.default}


def as_words(options: Any) -> list[str]:
    """The options that are not the default as words of a command line."""
    words: list[str] = []
    stored = as_json(options)
    for f in fields(options):
        values = stored.get(f.name, [])
        for value in values if isinstance(values, list) else [values]:
            value = "FILE" if f.name in ("chat_template", "names_from") and "{" in value else value
            words += [f.metadata["flag"]] if f.metadata.get("is_flag") else [f.metadata["flag"], str(value)]
    return words


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise RecipeError unless `value` is one of `choices`."""
    if value not in choices:
        raise RecipeError(f"{what} is '{shown(value)}', expected one of: {', '.join(choices)}.")
