"""`mixce-train CONFIG.yaml [--key value ...]`: parse, call, exit code. (`python -m train` is the same, but would run a
`train.py` of the current folder.)

Exit code 1: an error that the user can repair (one message, no traceback). 2: a wrong command line.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import yaml

from merge_tool.streams import forgiving
from train.config import TrainConfig, load_config
from train.errors import TrainError, install
from train.help import USAGE, help_text
from train.plain import unknown_key

_PACKAGES = ("torch", "transformers", "datasets", "filelock")


class UsageError(Exception):
    """The command line itself is wrong."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 0, 1 (TrainError) or 2 (usage)."""
    with forgiving():  # a terminal that is closed, full or of another encoding is no reason to end a run
        sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """The exit code of the command with these arguments."""
    if "--help" in arguments or "-h" in arguments:
        try:
            print(help_text(min(shutil.get_terminal_size((100, 24)).columns, 120)), flush=True)
        except BrokenPipeError:  # the reader (`head`) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if "--version" in arguments:
        print(f"mixce-train, version {_version()}")
        return 0
    try:
        path, overrides = parse(arguments)
        _check_installed()
        config = load_config(path, overrides)
        _finetune(config)
    except UsageError as e:
        return _complain(f"{USAGE}\nError: {e}", 2)
    except TrainError as e:
        return _complain(f"Error: {e}", 1)
    except KeyboardInterrupt:
        return _complain("Interrupted. The same command goes on from the last checkpoint, if there is one.", 130)
    return 0


def _version() -> str:
    try:
        return version("slerp-merge")
    except PackageNotFoundError:
        return "unknown: not installed, only on the path"


def _check_installed() -> None:
    """Raise TrainError if a package of the extra [train] is missing: the merger's installation has none of them."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise TrainError(f"Training needs {', '.join(missing)}, not installed here. Install: {install('train')}.")


def _finetune(config: TrainConfig) -> None:
    # torch and transformers take seconds to import: not for --help or a typo.
    import datasets  # type: ignore[import-untyped]
    import huggingface_hub
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars

    from train.loop import finetune

    datasets.disable_progress_bars()  # our own progress bar is enough
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if sys.stderr.isatty() and not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # the line above turned off those of downloads, too
    finetune(config)


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(config path, overrides): `--key value` or `--key=value`, values as YAML; `--resume` may stand alone.

    Raises UsageError.
    """
    known = [item.name for item in fields(TrainConfig)]
    paths: list[str] = []
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            paths.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in known:
            raise UsageError(unknown_key(key, known))
        if not equals:
            alone = key == "resume" and (not rest or rest[0].lower() not in ("true", "false"))
            if not alone and not rest:
                raise UsageError(f"--{key} needs a value.")
            value = "true" if alone else rest.pop(0)
        overrides[key] = _yaml(key, value)
    if len(paths) != 1:
        raise UsageError(f"Found {len(paths)} configs ({' '.join(paths)}), expected one.".replace(" ()", ""))
    return paths[0], overrides


def _yaml(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise UsageError(f"--{key} is {value}, expected a YAML value.") from e


def _complain(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # all processes fail alike; one prints
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
