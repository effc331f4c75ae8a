"""Recognise files that are not what their name says (an LFS pointer, a web page, a message) by their first bytes.

The sentences lack the file's name and the full stop.
"""

from __future__ import annotations

START_BYTES = 8  # as many as a safetensors header's length; a file that is still to be fetched may have no more
_PAGE = "is a web page, not the file itself. Fetch it again"
_KNOWN = {
    b"version ": "is a Git LFS pointer, not the file itself. Fetch it: git lfs pull",
    b"GGUF": "is a GGUF file. Merge the original weights, and convert the result",
    b"\x89HDF\r\n": "is an HDF5 file (Keras, TensorFlow). Convert it to safetensors first",
    **dict.fromkeys((b"<!DOCTYP", b"<!doctyp", b"<html", b"<HTML"), _PAGE),
}
_KINDS = {b"{": " (JSON)", b"<": " (XML or HTML)"}
_BLANKS = b"\t\n\r"


def known_start(start: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None if they are not known.

    >>> known_start(b"version https://git-lfs.github.com/spec/v1")
    'is a Git LFS pointer, not the file itself. Fetch it: git lfs pull'
    """
    return next((what for magic, what in _KNOWN.items() if start.startswith(magic)), None)


def lookalike(start: bytes) -> str | None:
    """As `known_start`, and recognises texts, too. For safetensors, ask only if the first 8 bytes are an impossible
    header length: the first 8 bytes of a text are 2**56 or more as a length."""
    start = start[:START_BYTES]
    is_text = bool(start) and all(32 <= byte < 127 or byte in _BLANKS for byte in start)
    if known := known_start(start):
        return known
    kind = _KINDS.get(start.lstrip()[:1], "")
    return f"is a text{kind}, not weights (perhaps a saved error page). Fetch it again" if is_text else None
