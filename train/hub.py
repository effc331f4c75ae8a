"""The Hub: a model is uploaded, and each error is one line that says what to do.

transformers and datasets download, cache and authenticate by themselves. Their errors are several lines long, wrap one
another and differ between versions, so the kind is recognised by the class names in the chain of causes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from train.errors import TrainError

Kind = Literal["model", "data set"]


def explain(error: BaseException, ref: str, revision: str | None, kind: Kind) -> str | None:
    """Sentences about an error with the Hub id `ref`; None when `ref` is local or the Hub is not the cause."""
    from huggingface_hub import constants

    if Path(ref).exists():
        return None
    chain = _chain(error)
    kinds = {cls.__name__ for e in chain for cls in type(e).__mro__}
    text = "\n".join(str(e) for e in chain)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{ref}"
    login = "`hf auth login` or HF_TOKEN"
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return f"It is gated on the Hub. Ask for access at {page}, then give your token by {login}."
    if "RevisionNotFoundError" in kinds or (revision is not None and "doesn't exist for dataset" in text):
        return f"The Hub has no revision {revision!r} of it. {page}/tree/main lists the revisions."
    if constants.HF_HUB_OFFLINE or kinds & {"OfflineModeIsEnabled"}:
        return "It is not in the Hub cache, and HF_HUB_OFFLINE prevents downloading it. Unset it, or give a folder."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"There is no such folder here, and no such {kind} on the Hub that you may see. Check the spelling; if it "
            f"is private, give your token by {login}."
        )
    if kinds & {"HFValidationError"}:
        return f"There is no such folder here, and it cannot be the id of a {kind} on the Hub. Give org/name."
    if kinds & {"ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError"}:
        return f"{constants.ENDPOINT} cannot be reached, and the Hub cache does not hold it. Check the connection."
    return None


def _chain(error: BaseException) -> list[BaseException]:
    errors: list[BaseException] = []
    while error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__ or error
    return errors


# ---- writing -------------------------------------------------------------------------------------------

_OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]


def open_repository(push_to: str) -> None:
    """Make the repository unless it is there, and ask whether we may write to it. Raises TrainError."""
    with _writing(push_to) as (api, repo):
        if not api.repo_exists(repo):
            api.create_repo(repo, private=True)
        api.auth_check(repo, write=True)


def push_folder(folder: Path, push_to: str) -> str:
    """Upload a folder as one commit, which also deletes other weights; returns the repository's address. A second time
    nothing is done. Raises TrainError."""
    with _writing(push_to) as (api, repo):
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Add the finetuned model", delete_patterns=_OLD_WEIGHTS
        )
        return f"{api.endpoint}/{repo}"


@contextmanager
def _writing(push_to: str) -> Iterator[tuple[Any, str]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api, repo = HfApi(), push_to.removeprefix("hub:")
    login = "Check the name, and give a token that may write by `hf auth login` or HF_TOKEN"
    try:
        yield api, repo
    except LocalTokenNotFoundError as e:
        raise TrainError(f"push_to is {push_to}, and there is no token. {login}.") from e
    except Exception as e:  # several libraries' errors, which differ between versions; each means: not written
        status = getattr(getattr(e, "response", None), "status_code", None)
        refused = (
            f"The Hub does not let you write there (it answers {status}). {login}." if status in (401, 403) else ""
        )
        reason = refused or explain(e, repo, None, "model") or (str(e).strip().splitlines() or [repr(e)])[0]
        raise TrainError(f"push_to is {push_to}: {reason}") from e
