"""What a user means by an option or a command that there is not: by its meaning first, then by its spelling.

Loaded only when a command line is wrong. The names are mergekit's, and those of other programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import click

from merge_tool.methods.registry import METHODS

_CPU = "Not needed: merges run on the CPU; a GPU would wait for the disk, too."
_PIECES = "Not needed: weights are always read in pieces, and --memory bounds the whole process."
_PARAMETER = "It is a parameter of a method: in a recipe, or merge-tool run RECIPE.yaml OUT --set NAME=VALUE."
_T = "Write --t 0.5, from BASE (0) to FT (1); in a recipe it is --set NAME=VALUE."
_ARGUMENTS = "Models and OUT are given without options: slerp-merge BASE FT OUT, merge-tool run RECIPE.yaml OUT."
_DTYPE = "Write --dtype bfloat16 (or float16, float32, float64, base)."
_ALWAYS = "Not needed: it is always done."
_OPTIONS = {
    "cuda gpu device device-map multi-gpu read-to-gpu gpu-rich mps": _CPU,
    "lazy-unpickle lazy-loader low-cpu-memory low-cpu-mem-usage async-write clone-tensors": _PIECES,
    "merge-method": "Write --method slerp or --method linear; the other methods are named in a recipe: merge-tool run "
    "RECIPE.yaml OUT.",
    "copy-tokenizer": "Not needed: BASE's tokenizer and configuration are always copied. --files-from takes another "
    "model's.",
    "out-shard-size shard-size shard": "Write --max-shard-size 5GB. Sizes are bytes; mergekit's 5B are parameters.",
    "allow-crimes": "Say what is allowed: --allow-different-architectures, --on-missing base, --on-mismatch base.",
    "trust-remote-code": "Not needed: no code of a model is run.",
    "random-seed": "Write --seed.",
    "num-threads threads write-threads workers num-workers n-jobs num-jobs cores cpus": "Write --jobs.",
    "ram mem max-memory memory-limit memory-bytes max-ram": "Write --memory 500MB.",
    "alpha ratio factor interpolation interp amount strength": _T,
    "weight weights density lambda epsilon gamma normalize select-topk int8-mask": _PARAMETER,
    "force replace clobber exist-ok yes y": "Write --overwrite to replace what is in OUT; nothing is ever asked.",
    "resume continue restart": "Not needed: the same command continues a merge that was stopped.",
    "out output output-dir output-path out-path save-path o base base-model ft model models model1 model2": _ARGUMENTS,
    "config recipe yaml mergekit": "A recipe is merged by merge-tool run RECIPE.yaml OUT.",
    "tokenizer-source tokenizer union": "Write --vocab base, ft or union to match rows by token, --files-from for the "
    "tokenizer's files.",
    "fp16 bf16 half float16 bfloat16 precision out-dtype save-dtype torch-dtype": _DTYPE,
    "fp8 int8 load-in-8bit load-in-4bit quantize quantise q4 gguf": "Merge first, then quantise OUT with the tool of "
    "your choice; --dtype base keeps 8 bits that BASE has.",
    "layers layer-range t-attn t-mlp gradient": "Write --t-for PATTERN=T[,T...]; a list runs along the layers.",
    "skip ignore freeze keep-base": "Write --exclude PATTERN.",
    "include filter target-modules": "Write --only PATTERN.",
    "lora adapter peft lora-merge lora-merge-cache lora-merge-dtype": "Write MODEL+ADAPTER in place of MODEL, "
    "or merge-tool fold BASE ADAPTER OUT.",
    "transformers-cache cache-dir hf-cache": "Set the environment variable HF_HUB_CACHE.",
    "token hf-token auth-token use-auth-token": "Set the environment variable HF_TOKEN, or run hf auth login.",
    "write-model-card model-card safe-serialization safetensors checksums": _ALWAYS,
    "verbose v debug log-level loglevel": "Not needed: --dry-run shows the plan, --json everything, --progress log "
    "a line every half minute.",
    "silent no-progress no-bar": "Write --quiet, or --progress none.",
    "push-to-hub push upload hub": "Publish OUT afterwards: merge-tool push OUT hub:ORG/NAME.",
    "base-id ft-id hub-id": "Write --id base=ORG/NAME or --id ft=ORG/NAME.",
    "plan plan-only check simulate": "Write --dry-run.",
    "prompt test generate": "Write --try 'PROMPT'.",
    "tasks benchmark judge lm-eval": "Write merge-tool sweep ... --eval 'lm-eval:TASK,TASK'.",
    "slerp linear": "Write --method {name}.",
}  # fmt: skip
_BY_NAME = {name: advice for names, advice in _OPTIONS.items() for name in names.split()}
_COMMANDS = {
    "slerp linear lerp": "merge", "yaml recipe mergekit mergekit-yaml ties dare-ties": "run",
    "compare distance distances": "diff", "check validate": "verify", "info show ls header headers": "inspect",
    "lora adapter peft apply merge-lora": "fold", "mean soup swa ema avg checkpoints": "average",
    "eval evaluate grid vary": "sweep", "tune evolve optimize optimise optuna hpo": "search",
}  # fmt: skip
_COMMAND_OF = {name: command for names, command in _COMMANDS.items() for name in names.split()}


def explained(error: click.UsageError, ctx: click.Context, words: Sequence[str]) -> click.UsageError:
    """The error with what to write instead, where that is known."""
    if isinstance(error, click.NoSuchOption):
        name = error.option_name
        return click.UsageError(f"No such option '{name}'. {_advice(name, ctx)}", ctx)
    if isinstance(error, click.BadParameter) and error.param is not None and error.param.name == "method":
        method = _value("--method", words)
        if method in METHODS:
            return click.UsageError(
                f"--method is slerp or linear for BASE and FT. {method} merges any number of models by a recipe: "
                "merge-tool run RECIPE.yaml OUT.",
                ctx,
            )
    if type(error) in (click.MissingParameter, click.UsageError) and (hint := _other_command(ctx, words)):
        return click.UsageError(f"{error.format_message()} {hint}", ctx)
    return error


def _other_command(ctx: click.Context, words: Sequence[str]) -> str:
    """The command for the number and kind of the paths, where that is another one."""
    pairs = zip(["", *words], words, strict=False)
    paths = [word for before, word in pairs if not word.startswith("-") and not before.startswith("-")]
    names = [param.name for param in ctx.command.params if isinstance(param, click.Argument)]
    if names == ["base", "ft", "out"] and paths and paths[0].endswith((".yaml", ".yml")):
        return f"A recipe is merged by merge-tool run {paths[0]} OUT."
    if names == ["base", "ft", "out"] and len(paths) > 3:
        return "More than two models are merged by a recipe: merge-tool run RECIPE.yaml OUT."
    if names == ["recipe", "out"] and len(paths) > 2:
        return "Two models are merged by slerp-merge BASE FT OUT."
    return ""


def explained_command(error: click.UsageError, ctx: click.Context, words: Sequence[str]) -> click.UsageError:
    """The error for a command that there is not, with the one that is meant."""
    name = words[0] if words else ""
    if name.startswith("-") or not isinstance(ctx.command, click.Group) or name in ctx.command.commands:
        return error
    known = ctx.command.list_commands(ctx)
    meant = _COMMAND_OF.get(name.lower()) or next(iter(get_close_matches(name.lower(), known, 1)), "")
    hint = f"Did you mean {meant}? " if meant else ""
    return click.UsageError(f"No such command '{name}'. {hint}The commands are: {', '.join(known)}.", ctx)


def _advice(option: str, ctx: click.Context) -> str:
    name = option.lstrip("-").replace("_", "-").lower()
    if name in METHODS and name not in ("slerp", "linear"):
        return "Methods of more than two models are named in a recipe: merge-tool run RECIPE.yaml OUT."
    own = [o for param in ctx.command.params for o in param.opts if o.startswith("--")]
    if f"--{name}" in own:
        return f"Write --{name}."
    if name.startswith("no-") and _BY_NAME.get(name.removeprefix("no-")) == _ALWAYS:
        return "It is always done."
    if name in _BY_NAME:
        return _BY_NAME[name].format(name=name)
    if elsewhere := [command for command, options in _of_others(ctx) if f"--{name}" in options]:
        return f"It is an option of {', '.join(elsewhere)}."
    if close := get_close_matches(f"--{name}", own, 3):
        return f"Did you mean {' or '.join(close)}?"
    close = get_close_matches(name, _BY_NAME, 1, 0.8)
    return _BY_NAME[close[0]].format(name=close[0]) if close else "--help lists the options."


def _of_others(ctx: click.Context) -> Iterator[tuple[str, list[str]]]:
    """Every command of merge-tool with its options."""
    from merge_tool.cli.commands import merge_tool

    for name, command in merge_tool.commands.items():
        yield f"merge-tool {name}", [option for param in command.params for option in param.opts]


def _value(option: str, words: Sequence[str]) -> str:
    """The last value of an option on a command line."""
    for word, following in reversed(list(zip(words, [*words[1:], ""], strict=True))):
        if word == option:
            return following.lower()
        if word.startswith(f"{option}="):
            return word.partition("=")[2].lower()
    return ""
