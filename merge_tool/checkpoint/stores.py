"""In processes of their own: folders of object stores, by obstore, and what goes wrong with them.

obstore finds keys, endpoint, region and proxies in the environment (AWS_*, GOOGLE_*, AZURE_*), or asks the machine for
them. How long to be patient is decided here, not by obstore. No message shows a key.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from merge_tool.checkpoint.addresses import store_parts
from merge_tool.errors import FetchError, MergeToolError, install, shown

T = TypeVar("T")
MOST_OBJECTS = 20_000  # in one folder
_STALL_SECONDS = 30
_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # of the environment's variables
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN); `aws configure export-credentials "
    "--format env` prints the keys of a profile; AWS_SKIP_SIGNATURE=true is for public buckets",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (a file of keys), or `gcloud auth application-default login`; "
    "GOOGLE_SKIP_SIGNATURE=true is for public buckets",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; "
    "AZURE_SKIP_SIGNATURE=true is for public containers",
}
_STATUS = re.compile(r"status code: (\d{3})")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_METADATA = ("169.254.169.254", "metadata.google", "fd00:ec2::254")  # where a machine's own role is asked for


def folder_url(url: str) -> tuple[str, str]:
    """The folder of an object, and the object's name in it."""
    folder, _, name = url.rpartition("/")
    return folder, name


def library(url: str) -> Any:
    """The module obstore. Raises FetchError where it is not installed."""
    try:
        import obstore
        import obstore.store
    except ImportError as e:
        raise FetchError(f"{shown(url)}: object stores are read and written by obstore: {install('cloud')}.") from e
    return obstore


@lru_cache(maxsize=64)
def open_store(url: str, stall_seconds: float = _STALL_SECONDS, tries: int = 0) -> Any:
    """A folder as one of obstore's stores: names are relative to it. `stall_seconds` without a byte end a request;
    obstore itself makes so many further `tries` of one, which a part of a large upload needs. Raises FetchError for an
    address that is none, and without obstore."""
    from_url = library(url).store.from_url
    scheme, bucket, path = store_parts(url)
    os.environ.setdefault("AWS_DISABLE_BULK_DELETE", "true")  # many servers have no other way to delete
    # As variables: options given to from_url would hide the variables of the environment, such as AWS_ALLOW_HTTP.
    os.environ.setdefault(f"{_PREFIXES[scheme]}TIMEOUT", "1h")
    os.environ.setdefault(f"{_PREFIXES[scheme]}READ_TIMEOUT", f"{round(1000 * stall_seconds)}ms")
    return from_url(f"{scheme}://{bucket}/{quote(path)}", retry_config={"max_retries": tries})


def sizes_of(url: str) -> dict[str, int]:
    """The size of every object in a folder, by its name there, without the objects that stand for folders. Raises
    FetchError if there are too many for a model."""
    sizes: dict[str, int] = {}
    for several in library(url).list(open_store(url), chunk_size=1000):
        sizes |= {one["path"]: one["size"] for one in several}
        if len(sizes) > MOST_OBJECTS:
            raise FetchError(
                f"{shown(url)}: holds more than {MOST_OBJECTS:,} objects. Give the folder of one model in it."
            )
    folders = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    return {name: size for name, size in sizes.items() if name and (size or name not in folders)}


def patiently(action: Callable[[], T], url: str, waits: Sequence[float], *, is_said: bool = False) -> T:
    """The result of a request that may be made twice; what may pass is tried again after each of the `waits`, in
    seconds."""
    for wait in waits:
        try:
            return action()
        except Exception as e:
            if not is_passing(e):
                raise
            if is_said:
                print(f"{shown(url)}: {first_line(e)}: tried again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    return action()


# ------------------------------------------------------------------------------------------ what went wrong


@contextmanager
def explaining(url: str, error: type[MergeToolError] = FetchError) -> Iterator[None]:
    """Turn every error inside into a FetchError, or another kind."""
    try:
        yield
    except MergeToolError as e:
        if isinstance(e, error):
            raise
        raise error(str(e)) from e
    except Exception as e:  # obstore's errors and the system's; each means: cannot be had
        raise error(explained(e, url)) from e


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error is about; None if there was none."""
    match = _STATUS.search(_said(error))
    return int(match[1]) if match else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server is busy or failed, or the line broke."""
    if type(error).__name__ != "GenericError":
        return False
    status, said = status_of(error), _said(error)
    if any(host in said for host in _METADATA):
        return False
    return status in _PASSING if status is not None else "HTTP error" in said and "builder error" not in said


def first_line(error: BaseException) -> str:
    """What an error says, without the library's debug text, and of addresses without what follows a ?: it may be a
    signature. Of a server's answer its status and code alone: it may hold a key's name."""
    said = _said(error)
    if (status := status_of(error)) is not None:
        code = re.search(r"<Code>(\w{1,60})</Code>", said)
        return f"the server answers {status}" + (f" {code[1]}" if code else "")
    line = next((line for line in said.splitlines() if line.strip()), type(error).__name__)
    return shown(re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", line), 300)


def _said(error: BaseException) -> str:
    return str(error).partition("\n\nDebug source")[0]


def explained(error: BaseException, url: str) -> str:
    """One sentence about the problem and one about the next step."""
    scheme, bucket, _ = store_parts(url)
    kind, status, said, where = type(error).__name__, status_of(error), _said(error), shown(url)
    if any(host in said for host in _METADATA):
        return f"{where}: no keys for {scheme}:// were found. Set {_KEYS[scheme]}."
    if "Account must be specified" in said:
        return f"{where}: which account is meant? Set {_KEYS[scheme]}."
    if "builder error" in said and "http://" in said:
        return f"{where}: its endpoint is http://, unencrypted. If it may be, set {_PREFIXES[scheme]}ALLOW_HTTP=true."
    if status == 404 or kind in ("FileNotFoundError", "NotFoundError"):
        if re.search(r"NoSuchBucket|ContainerNotFound|bucket does not exist", said):
            return f"{where}: there is no bucket {shown(bucket)}. Check the name and the endpoint."
        return f"{where}: is not there ({first_line(error)}). Check the spelling."
    if status in (401, 403) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return (
            f"{where}: the store does not let you do that ({first_line(error)}). Check the name and what your keys "
            f"allow. Keys are given by {_KEYS[scheme]}."
        )
    if status in (301, 307) or "LOCATION" in said:
        return f"{where}: the bucket is in another region. Set {_PREFIXES[scheme]}REGION."
    if status is None and "HTTP error" in said:
        return (
            f"{where}: the store cannot be reached ({first_line(error)}). Check the connection and the endpoint, then "
            "run the same command: it continues."
        )
    return f"{where}: cannot be used ({first_line(error)}). Correct that, then run the same command: it continues."
