"""An output on the Hub or in a bucket, verified by ranges: its digests there, headers, a sample of elements.

The Hub names the SHA-256 of every large file; in a bucket the merge has noted it. So nothing is downloaded whole but
the small files. A sample is merged again from the parents; those that are not here are read by range, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from merge_tool.checkpoint.addresses import is_store, store_url
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import open_local
from merge_tool.checkpoint.source import ByteSource
from merge_tool.checkpoint.streaming import Streaming
from merge_tool.errors import CheckpointError, MergeToolError, OutputError, reason, shown
from merge_tool.models.inputs import Inputs
from merge_tool.models.side_files import CARD, REPORT, SUMS
from merge_tool.output.older import read_sums, strangers
from merge_tool.output.report import sums_text
from merge_tool.plan.memory import machine
from merge_tool.plan.target import Target, out_text, repo_of
from merge_tool.verification.checks import Checks
from merge_tool.verification.remerge import StoredReport, check_parents, plan_with, recipe_again
from merge_tool.verification.verify import Verification, check_digest, check_options, check_tensor, open_report


def verify_on_hub(
    out: str | Path,
    against: tuple[str | Path, str | Path] | None,
    *,
    sample: float,
    recipe_path: str | Path | None,
    models_dir: str | Path | None,
    memory_bytes: int | None,
    jobs: int | None,
    wanted: Mapping[str, Any],
    checks: Checks,
) -> Verification:
    """Check the output in the repository `hub:org/name`, or at `s3://bucket/folder`. The rest is as in `verify`. Raises
    MergeToolError."""
    text = out_text(out)
    where = store_url(text) if is_store(text) else repo_of(out)
    with ExitStack() as held:
        spool = Path(held.enter_context(tempfile.TemporaryDirectory()))
        place = held.enter_context(_by_range([where], spool))
        root = place.refs[0]
        there, folder = place.coming.get(root, {}), Folder(root)
        if not folder.has(REPORT) or not folder.has(SUMS):
            raise OutputError(f"{shown(out)}: holds no {REPORT} and {SUMS}, so it is no output of slerp-merge.")
        others = _check_manifest(checks, folder, there)
        report, counts = None, (0, 0)
        try:
            report = open_report(folder.regular(REPORT))
            counts = _check_weights(checks, root, there, report)
        except (MergeToolError, ValueError, OSError, RecursionError) as e:
            checks.add(f"{REPORT if report is None else 'the weights'}: {reason(e)}")
            report = None
        if report is not None:
            check_options(checks, report.head, wanted)
        if report is not None and (against or recipe_path):
            recipe = recipe_again(report.head, against, recipe_path, models_dir)
            inputs = held.enter_context(_by_range(list(map(str, recipe.models)), spool, recipe.options.variant))
            limits = machine(memory_bytes, jobs)
            prepared = plan_with(recipe, inputs, Target(root), limits, read_samples=True)
            check_parents(checks, folder, report, prepared, sample=sample, full=False, there=there)
    if checks.more:
        checks.problems.append(f"and {checks.more:,} more")
    return Verification(
        path=Path(where if is_store(where) else f"hub:{where}"),
        num_files=checks.num_files,
        nbytes=checks.nbytes,
        num_tensors=counts[0],
        num_compared=checks.num_compared,
        num_elements=counts[1],
        full=False,
        others=tuple(others),
        problems=tuple(checks.problems),
    )


def _by_range(models: list[str], spool: Path, variant: str | None = None) -> Inputs:
    """Models whose missing weights are read by range."""
    inputs = Inputs(models, Streaming(stream=True, spool_bytes=0), variant=variant)
    try:
        inputs.choose_streaming(spool)
        inputs.stream()
    except BaseException:
        inputs.close()
        raise
    return inputs


def _check_manifest(checks: Checks, folder: Folder, there: Mapping[str, ByteSource]) -> list[str]:
    """Compare the digests that SHA256SUMS lists: the Hub's of files that are `there`, those of files that were fetched.
    Returns the other files that were fetched."""
    sums = read_sums(folder.root)
    if sums_text(sums) != folder.regular(SUMS).read_bytes():
        checks.add(f"{SUMS}: is not as it was written: {len(sums):,} of its lines are digests of files.")
    for name, expected in sums.items():
        if name not in there:
            check_digest(checks, folder, name, expected)
            continue
        checks.num_files += 1
        checks.nbytes += there[name].size
        if (digest := getattr(there[name], "digest", "")) != expected:
            checks.add(
                f"{shown(name)}: its SHA-256 there is {shown(digest) or 'unknown'}, {SUMS} says {expected}. The file "
                "was changed."
            )
    for name in (REPORT, CARD):
        if name not in sums:
            checks.add(f"{SUMS}: does not list {name}.")
    for name in there:
        if name not in sums:
            checks.add(f"{shown(name)}: weights that {SUMS} does not list.")
    return strangers(folder.root, (), [*sums, SUMS])


def _check_weights(
    checks: Checks, root: Path, there: Mapping[str, ByteSource], report: StoredReport
) -> tuple[int, int]:
    """Compare the headers and the index with the report. Returns the numbers of its tensors and elements."""
    stored = open_local(root, there, mergeable=False, as_stored=True)
    sizes: Mapping[str, Any] = report.head["shards"]
    held = {name: (info.shape, info.dtype, stored.source(name).where) for name, info in stored.tensors.items()}
    for file in stored.files:
        if (size := sizes.get(file.file_name)) != file.source.size:
            checks.add(f"{shown(file.file_name)}: has {file.source.size:,} bytes, expected {shown(size, 30)}.")
    if lost := sizes.keys() - {file.file_name for file in stored.files}:
        raise CheckpointError(f"{shown(min(lost))}: is in the report, and not in the repository's model.")
    count = elements = 0
    for _, entry in report.tensors():
        count += 1
        elements += check_tensor(checks, entry, held)
    for name, (_, _, where) in list(held.items())[:50]:
        checks.add(f"{shown(name)}: is in {shown(where)}, but not in the report.")
    return count, elements
