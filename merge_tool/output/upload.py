"""push(OUT, "hub:org/name"): an output that is complete here -> the Hub, published in one step; or a bucket.

pushing.py or store_pushing.py does the work, in a process of its own. Nothing of a model is uploaded before its files
are known to be those that the merge wrote.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from merge_tool.apart import ask
from merge_tool.checkpoint.addresses import is_store
from merge_tool.checkpoint.source import sha256_of
from merge_tool.errors import OutputError, listed, output_failed, shown
from merge_tool.models.side_files import SUMS, WORK
from merge_tool.output.older import is_ours, read_sums
from merge_tool.output.publishing import Publishing, target_of
from merge_tool.plan.target import repo_of


@dataclass(frozen=True, slots=True)
class Push:
    """The result of a push: the repository's address; the pull request's number, if one was needed; the bytes uploaded
    and the files that were there already; whether it is published; and what else the repository has."""

    url: str
    number: int | None
    uploaded_bytes: int
    kept_files: int
    is_published: bool
    others: tuple[str, ...]


def push(out: str | Path, target: str, *, private: bool = False, publish: bool = True, overwrite: bool = False) -> Push:
    """Push the output `out` to the Hub's repository `target`, which is `hub:org/name`, or to a folder of an object
    store (`s3://bucket/folder`), which knows neither `private` nor `publish`.

    All files go to a pull request, which is merged at the end if `publish`; until then the repository shows nothing of
    them. The same call continues what was interrupted, also on another machine. A repository that is not there is made
    (`private`, if asked); one with other weights is refused unless `overwrite`. Raises OutputError.
    """
    place = target_of(target, Publishing(private, publish)) if is_store(target) else None
    folder, repo = Path(out), repo_of(target) if place is None else place.repo
    sums = _sums(folder)
    digest = hashlib.sha256("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()).hexdigest()[:16]
    question = {
        "folder": str(folder.absolute()),
        "repo": repo,
        "sums": sums,
        "digest": digest,
        "is_private": private,
        "publishes": publish,
        "overwrites": overwrite,
    }
    hint = "Its last words are above. Run the same command again: it continues."
    module = f"merge_tool.output.{'pushing' if place is None else 'store_pushing'}"
    answer, _ = ask(module, question, what=repo, error=OutputError, hint=hint)
    return Push(**{**answer, "others": tuple(answer["others"])})


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an output, which its files have. Raises OutputError if it is not whole."""
    if (folder / WORK).exists():
        raise OutputError(f"{shown(folder)}: its merge is not finished. Run the merge's command again, then push.")
    if not is_ours(folder):
        raise OutputError(
            f"{shown(folder)}: is not an output of slerp-merge or merge-tool (it has no {SUMS} and report). "
            "Push it with hf upload."
        )
    sums = read_sums(folder)
    try:
        changed = [name for name, digest in sums.items() if sha256_of(folder / name) != digest]
        sums[SUMS] = sha256_of(folder / SUMS)
    except OSError as e:
        raise output_failed(folder, e) from e
    if changed:
        raise OutputError(
            f"{shown(folder)}: {listed(changed)} changed since the merge ({SUMS} has other digests). Merge again, or "
            "push the folder with hf upload. Nothing was uploaded."
        )
    return sums
