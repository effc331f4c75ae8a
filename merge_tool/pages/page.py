"""A page: data as JSON, a script that draws them and a style, in one file.

No text of the data becomes markup, because a stranger may have chosen the tensors' names. The policy in the page's head
allows only this script and this style, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from merge_tool.errors import OutputError, output_failed, shown
from merge_tool.files import write_whole


def page_text(title: str, data: Mapping[str, Any]) -> str:
    """The page as HTML. `data["kind"]` says what the script draws: merge, diff or sweep."""
    here = files(__package__)
    style, script = (here.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<noscript>This page is drawn by a script inside it, which your browser has turned off.</noscript>\n"
        f'<main id="page"></main>\n<script type="application/json" id="data">{content}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    """The hash by which a content security policy allows an inline script or style (https://www.w3.org/TR/CSP3/)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def check_page_path(path: Path) -> None:
    """Raise OutputError unless a page can be written there. Called before the work begins."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{shown(path)}: a page's name must end in .html.")
    if path.is_dir():
        raise OutputError(f"{shown(path)}: is a folder. Choose a file's path.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{shown(path)}: its folder is missing. Choose another path.")


def write_page(path: Path, title: str, data: Mapping[str, Any]) -> None:
    """Write the page, whole. Raises OutputError."""
    try:
        write_whole(path, [page_text(title, data).encode()], path.with_name(f".{path.name}.part"))
    except OSError as e:
        raise output_failed(path, e) from e
