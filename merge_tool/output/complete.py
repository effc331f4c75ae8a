"""The state of OUT before a merge: the same merge already, something else, or empty. Writes nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from merge_tool.errors import OutputError, listed, reason, shown, sized
from merge_tool.models.side_files import CARD, RECIPE, REPORT, SUMS
from merge_tool.output.marks import check_folders
from merge_tool.output.older import check_conflicts, older_labels, read_sums, strangers
from merge_tool.output.report import head_differences, read_head, read_identity, report_head
from merge_tool.plan.overlap import find_look_alike
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.target import Target, existing_folder, held_bytes

_MOST = 5  # differences that a message names
_SPARE_DISK_BYTES = 16_000_000  # the most for journal, index, card and report, and for the file system


def is_complete(prepared: Prepared) -> bool:
    """Whether OUT already holds the same merge. Raises OutputError if it holds anything else.

    A merge in OUT does not count if its inputs changed later, if one of its files is missing, or if its side files
    differ now. A work folder in OUT is ignored.
    """
    target = prepared.target
    try:
        if target.is_file:
            if target.path.exists():
                way = _way_on(prepared, "Give --overwrite to replace it.")
                raise OutputError(f"{shown(target.path)}: exists already. {way}")
            return False
        if not target.path.exists() or not strangers(target.path, (), ()):
            return False
        if not all(
            _is_output(prepared, target.path / label, number) for number, label in enumerate(prepared.plan.labels)
        ):
            parts = _why_another(prepared)
            why = f": {'; '.join(parts[:_MOST])}" + (f" and {len(parts) - _MOST} more" if len(parts) > _MOST else "")
            raise OutputError(
                f"{shown(target.path)}: is not empty, and not the result of this merge{why if parts else ''}. "
                f"{_way_on(prepared, 'Choose another OUT, or --overwrite.')}"
            )
        changed, later = _changed_since(prepared, target.path / prepared.plan.labels[0])
    except OSError as e:
        raise OutputError(f"{shown(target.path)}: cannot be read ({reason(e)}).") from e
    if changed:
        raise OutputError(
            f"{shown(target.path)}: holds this merge, but {listed(changed)} changed since. "
            "Give --overwrite to merge again."
        )
    if later:
        raise OutputError(
            f"{shown(target.path)}: holds this merge, but {listed(later)} changed since, or the clocks differ: sizes "
            "and samples are the same, but the times are later than the merge's. merge-tool verify with the parents "
            "shows whether the weights changed; --overwrite merges again."
        )
    return True


def _way_on(prepared: Prepared, way: str) -> str:
    """`way`, unless OUT seems to hold a file of an input, which must not be replaced."""
    if (alike := find_look_alike(prepared.target.path, prepared.inputs)) is None:
        return way
    return f"It may be an input under another name: it has {shown(alike.name)}. Choose another one."


def _is_output(prepared: Prepared, folder: Path, output: int) -> bool:
    digest, samples = read_identity(folder / REPORT)
    if digest != prepared.plan.digest_of(output) or (prepared.samples and samples != prepared.samples):
        return False
    sizes = {shard.file_name: shard.size for shard in prepared.plan.shards}
    files = read_sums(folder).keys() | sizes.keys() | ({prepared.plan.index_name} if len(sizes) > 1 else set())
    return all((folder / name).is_file() for name in files) and all(
        (folder / name).stat().st_size == size for name, size in sizes.items()
    )


def _why_another(prepared: Prepared) -> list[str]:
    """The differences between OUT's merge and this merge in words, or the files that OUT lacks; empty if OUT holds no
    merge."""
    out, plan = prepared.target.path, prepared.plan
    before = [head for label in older_labels(out) if (head := read_head(out / label / REPORT))]
    if not before:
        return []
    now = [report_head(plan, number, prepared.samples) for number in range(len(plan.labels))]
    if differences := head_differences(before, now):
        return differences
    lost = [f"{label}/{name}".lstrip("/") for label in plan.labels for name in _lost(prepared, out / label)]
    return [f"{listed(lost)} changed or missing"] if lost else []


def _lost(prepared: Prepared, folder: Path) -> list[str]:
    """The files of this merge that an output lacks, or whose sizes differ."""
    sizes = {shard.file_name: shard.size for shard in prepared.plan.shards}
    names = dict.fromkeys((*sizes, *final_names(prepared), *read_sums(folder)))
    return [n for n in names if not (folder / n).is_file() or sizes.get(n) not in (None, (folder / n).stat().st_size)]


def _changed_since(prepared: Prepared, output: Path) -> tuple[list[str], list[str]]:
    """Side files whose content differs from the output's, and input files whose time is later than the report's. Such
    inputs were changed, or written with another clock (a board without a clock, a share)."""
    written = (output / REPORT).stat().st_mtime_ns
    files = {id(file): file for job in prepared.plan.jobs() for source in job.sources for file in source.files}
    later = [file.name for file in files.values() if file.mtime_ns > written]
    return changed_side_files(prepared, read_sums(output)), later


def changed_side_files(prepared: Prepared, sums: Mapping[str, str]) -> list[str]:
    """The files to copy whose content differs from an output's SHA256SUMS."""
    changed = []
    for file in prepared.side_files.copied:
        digest = hashlib.sha256()
        for chunk in prepared.side_files.read(file, prepared.plan.config_dtype):
            digest.update(chunk)
        if sums.get(file.target) != digest.hexdigest():
            changed.append(file.source)
    return changed


def check_apart(prepared: Prepared) -> None:
    """Raise OutputError if a folder in OUT belongs to an input, by a link or a mount."""
    names = [file.target for file in prepared.side_files.copied]
    check_folders(prepared.target, prepared.plan.labels, names, prepared.inputs)


def check_output(prepared: Prepared, *, overwrite: bool) -> None:
    """The checks on OUT that can be made before any weight is downloaded. Raises OutputError, FetchError."""
    check_apart(prepared)
    if not overwrite and not os.path.lexists(prepared.target.work) and is_complete(prepared):
        return
    check_room(prepared, overwrite=overwrite)
    if not prepared.target.is_file:
        for label in prepared.plan.labels:
            check_conflicts(prepared.target.path / label, final_names(prepared))


def check_room(prepared: Prepared, *, overwrite: bool) -> None:
    """Raise OutputError unless the disk has room for the outputs, without the shards that a resumed run already has. If
    the Hub's cache is on the same disk, the download is added. FetchError if the download alone does not fit."""
    download = prepared.download
    download.check_room()
    have = held_bytes(prepared.target.work)
    spare = min(
        _SPARE_DISK_BYTES,
        100_000 + prepared.here_bytes // 50 + 4_000 * prepared.plan.num_tensors * len(prepared.plan.labels),
    )
    need = max(0, prepared.here_bytes - have)
    coming = download.disk_bytes if _is_on_the_disk_of(prepared.target, download.cache) else 0
    free = prepared.free_disk_bytes
    if free is not None and need + spare + coming > free:
        what = "the spool of what is read by range" if download.is_streamed else "what is fetched into the Hub's cache"
        besides = f", {what} {sized(coming)}" if coming else ""
        if prepared.target.repo:
            raise OutputError(
                f"{prepared.target.name}: the shards that wait for their upload, at most two at a time, take "
                f"{sized(need)}{besides}, the journal up to {sized(spare)}; the disk of {shown(prepared.target.path)} "
                f"has {sized(free)} free. Free some space, or give a folder on another disk: --work FOLDER."
            )
        beside = " The old output stays until the new one is complete." if overwrite else ""
        raise OutputError(
            f"{shown(prepared.target.path)}: the output takes {sized(need)}{besides}, its report and journal up to "
            f"{sized(spare)}; the disk has {sized(free)} free.{beside} Free some space or choose another disk."
        )


def _is_on_the_disk_of(target: Target, cache: Path | None) -> bool:
    return cache is not None and cache.stat().st_dev == existing_folder(target.path).stat().st_dev


def final_names(prepared: Prepared) -> list[str]:
    """The files that every output will have, relative to it."""
    plan = prepared.plan
    index = [plan.index_name] if len(plan.shards) > 1 else []
    side = [file.target for file in prepared.side_files.copied]
    recipe = [RECIPE] if plan.text else []
    return [*(shard.file_name for shard in plan.shards), *index, *side, *recipe, CARD, REPORT, SUMS]
