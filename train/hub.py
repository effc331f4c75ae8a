"""What went wrong between us and the Hub, in one line a user can act on.

transformers and datasets fetch, cache and authenticate by themselves; their errors are several lines long, wrap one
another, and differ between versions. The kind is told by the names in the chain of causes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["model", "data set"]


def explain(error: BaseException, ref: str, revision: str | None, kind: Kind) -> str | None:
    """The line for an error about the hub id `ref`; None when `ref` is local or the Hub is not the cause."""
    from huggingface_hub import constants

    if Path(ref).exists():
        return None
    chain = _chain(error)
    kinds = {cls.__name__ for e in chain for cls in type(e).__mro__}
    text = "\n".join(str(e) for e in chain)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{ref}"
    login = "`hf auth login` or HF_TOKEN"
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return f"it is gated on the Hub; ask for access at {page}, then give your token by {login}"
    if "RevisionNotFoundError" in kinds or (revision is not None and "doesn't exist for dataset" in text):
        return f"the Hub has no revision {revision!r} of it; {page}/tree/main lists them"
    if constants.HF_HUB_OFFLINE or kinds & {"OfflineModeIsEnabled"}:
        return "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or give a local folder"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"there is no such folder here, and no such {kind} on the Hub that you may see; check the spelling, or, "
            f"if it is private, give your token by {login}"
        )
    if kinds & {"HFValidationError"}:
        return f"there is no such folder here, and it cannot be the id of a {kind} on the Hub (org/name)"
    if kinds & {"ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError"}:
        return f"{constants.ENDPOINT} cannot be reached and the cache does not hold it; check the connection"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__ or error
    return found
