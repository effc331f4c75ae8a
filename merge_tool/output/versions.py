"""The versions of the code that computes: two versions may compute parts of one merge differently."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

from merge_tool._version import __version__


def versions() -> dict[str, str]:
    """The versions of everything that decides a merge's bytes: this code, and the libraries that compute."""
    libraries = ("numpy", "ml_dtypes")
    ours = f"{__version__} ({_source_sha256()[:16]})"
    return {"slerp-merge": ours, **{name: importlib.metadata.version(name) for name in libraries}}


@cache
def _source_sha256() -> str:
    """A digest of the package's own code: two checkouts may have the same version number."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(package).as_posix()} {len(code)}\n".encode() + code)
    return digest.hexdigest()
