"""Models at an address: a file of safetensors on a server, or a folder or a file on an object store. By its form."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from merge_tool.errors import FetchError, shown

_STORE = re.compile(r"(s3|gs|az)://([A-Za-z0-9][\w.-]*)(?:/(.*))?", re.ASCII | re.DOTALL)


def is_url(ref: str | Path) -> bool:
    """Whether `ref` is the address of a file of safetensors.

    >>> is_url("https://host/a/model.safetensors?x=1"), is_url("https://host/a")
    (True, False)
    """
    text = str(ref)
    return re.match(r"https?://[^/?#]+/", text) is not None and text.partition("?")[0].endswith(".safetensors")


def is_store(ref: str | Path) -> bool:
    """Whether `ref` is an address on an object store, right or wrong.

    >>> is_store("s3://bucket/models/base"), is_store("gs://bucket"), is_store("s3/base")
    (True, True, False)
    """
    return str(ref).startswith(("s3://", "gs://", "az://"))


def is_address(ref: str | Path) -> bool:
    """Whether `ref` is a model elsewhere that has no cache: `is_url` or `is_store`."""
    return is_store(ref) or is_url(ref)


def store_parts(ref: str | Path) -> tuple[str, str, str]:
    """Scheme, bucket and path of an address on an object store; the path without a / at its ends. Raises FetchError
    for any other form, without the address: it may hold a secret.

    >>> store_parts("s3://bucket/models/base/")
    ('s3', 'bucket', 'models/base')
    """
    match = _STORE.fullmatch(str(ref))
    if match is None:
        raise FetchError(
            f"{str(ref)[:5]}...: is no address on an object store, expected s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or "
            "az://CONTAINER/FOLDER. (Keys are given by environment variables.)"
        )
    parts = [part for part in (match[3] or "").split("/") if part]
    if {".", ".."} & {*parts}:
        raise FetchError(f"{shown(ref)}: has . or .. in its path, which is none on an object store.")
    return match[1], match[2], "/".join(parts)


def store_url(ref: str | Path) -> str:
    """An address on an object store as it is written everywhere. Raises FetchError.

    >>> store_url("s3://bucket//models/base/")
    's3://bucket/models/base'
    """
    scheme, bucket, path = store_parts(ref)
    return f"{scheme}://{bucket}/{path}" if path else f"{scheme}://{bucket}"


def store_path(ref: str | Path) -> PurePosixPath:
    """Bucket and path of an address on an object store, as the path that it is called by. Raises FetchError.

    >>> store_path("s3://bucket/models/base")
    PurePosixPath('bucket/models/base')
    """
    _, bucket, path = store_parts(ref)
    return PurePosixPath(bucket, path)
