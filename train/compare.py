"""Is a written answer right? The comparisons that `judge` and `contrast.verify.compare` name, or a function of the
user's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from pathlib import Path

from train.errors import TrainError

Comparison = Callable[[str, str], bool]
_NUMBER = re.compile(r"-?(?:\d+/0*[1-9]\d*|\d[\d,]*(?:\.\d+)?|\.\d+)")
_FIRST_LETTER = re.compile(r"\W*([A-Za-z])(?:[).:\]*]|\W*$)")  # B, (b), B) because ..., **B**
_LETTER = re.compile(r"(?<![\w'])[A-Za-z](?![\w'])")


def exact(written: str, expected: str) -> bool:
    """Alike apart from white space, case and a full stop."""
    a, b = (" ".join(text.split()).rstrip(".").casefold() for text in (written, expected))
    return a == b


def number(written: str, expected: str) -> bool:
    """The last numbers are equal; an expected answer without a number is compared as a text."""
    a, b = (_NUMBER.findall(text) for text in (written, expected))
    values = [Fraction(numbers[-1].replace(",", "")) for numbers in (a, b) if numbers]
    return exact(written, expected) if not b else len(values) == 2 and values[0] == values[1]


def choice(written: str, expected: str) -> bool:
    """The letters chosen are equal; an expected answer without one is compared as a text."""
    a, b = map(_chosen, (written, expected))
    return exact(written, expected) if b is None else a == b


def _chosen(text: str) -> str | None:
    """The letter that a text begins with, as `B` or `(b) because`; else the last single letter: a capital, if there is
    one, and not the word I (or a), if there is another."""
    if (first := _FIRST_LETTER.match(text)) is not None:
        return first[1].upper()
    letters = _LETTER.findall(text)
    capitals = [letter for letter in letters if letter.isupper()] or letters
    words = [letter for letter in capitals if letter not in "Ia"] or capitals
    return words[-1].upper() if words else None


COMPARISONS: dict[str, Comparison] = {"exact": exact, "number": number, "choice": choice}


def is_function(name: str) -> bool:
    """Whether a name is written as MODULE:FUNCTION."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def load_comparison(key: str, name: str) -> Comparison:
    """The comparison that the config's `key` names: a known one, or a MODULE:FUNCTION, which is looked up in the
    current folder, too. Raises TrainError when it cannot be imported."""
    if name in COMPARISONS:
        return COMPARISONS[name]
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # a program on the path does not look in the current folder
        sys.path.insert(0, here)
    try:
        found: Comparison = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise TrainError(
            f"{key} is {name!r}, expected {', '.join(COMPARISONS)} or MODULE:FUNCTION that can be imported here ({e})."
        ) from e
    return found
