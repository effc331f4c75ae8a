"""An output against itself and against its parents: `verify`. Reads everything, writes nothing, trusts nothing.

Without the parents: compares every file's SHA-256, and every shard, opened by the safetensors library, with the report.
With the parents: plans anew from their headers, merges elements again by the same code as the merge, and compares them
bit for bit. `full` is a whole merge whose writers compare instead of writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any, TypeVar

from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.reader import open_checkpoint
from merge_tool.checkpoint.source import sha256_of
from merge_tool.errors import CheckpointError, MergeToolError, OutputError, counted, reason, shown
from merge_tool.models.side_files import CARD, REPORT, SUMS, WORK
from merge_tool.output.older import is_output_of_several, read_sums, strangers
from merge_tool.output.report import FORMAT, stream_report, sums_text
from merge_tool.plan.target import is_remote, out_text
from merge_tool.progress import Progress
from merge_tool.recipe.mergekit import make_options
from merge_tool.recipe.options import Options, as_json
from merge_tool.verification.checks import Checks
from merge_tool.verification.remerge import StoredReport, check_parents, plan_again

_MOST_SHOWN = 10  # problems in a text for a screen
_MOST = 50  # at most so many superfluous tensors are named
_HEAD: Mapping[str, type | tuple[type, ...]] = {
    "method": str, "parameters": dict, "words": dict, "inputs": dict, "options": dict, "shards": dict,
    "samples_sha256": list,
}  # fmt: skip


@dataclass(frozen=True)
class Verification:
    """The check of one output: what was checked, and its `problems`, none if it is right.

    `nbytes` were hashed. `num_compared` elements of `num_elements` were merged again, with the sums made again if
    `full`. `others` are files that SHA256SUMS does not list.
    """

    path: Path
    num_files: int
    nbytes: int
    num_tensors: int
    num_compared: int
    num_elements: int
    full: bool
    others: tuple[str, ...]
    problems: tuple[str, ...]

    def __repr__(self) -> str:
        what = f"{shown(self.path)}: {counted(self.num_files, 'file')}, {counted(self.num_tensors, 'tensor')}"
        again = f", {self.num_compared:,} of {self.num_elements:,} elements merged again" if self.num_compared else ""
        found = [f"  {shown(problem, 300)}" for problem in self.problems[:_MOST_SHOWN]]
        more = [f"  and {len(self.problems) - _MOST_SHOWN:,} more"] * (len(self.problems) > _MOST_SHOWN)
        result = f"NOT VERIFIED, {counted(len(self.problems), 'problem')}" if self.problems else "verified"
        return "\n".join([f"{what}{again}: {result}", *found, *more])


def verify(
    out: str | Path,
    against: tuple[str | Path, str | Path] | None = None,
    *,
    sample: float = 0.01,
    full: bool = False,
    report_path: str | Path | None = None,
    recipe: str | Path | None = None,
    models_dir: str | Path | None = None,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    progress: str = "auto",
    **options: Any,
) -> tuple[Verification, ...]:
    """Check the output at `out` (if it holds several `t-...`, each of them) and list the problems.

    `against` are BASE and FT; for an output of a recipe give `recipe` instead, and perhaps its `models_dir`. A `sample`
    of the elements (0 to 1, whole tiles, at least one of every tensor, chosen anew in every run) is merged again with
    the report's pass results and compared bit for bit. With `full` all elements, the passes, and every line of the
    report are compared. A one-file output needs its `report_path`. `options` are fields of
    `merge_tool.recipe.options.Options` that OUT must have been made with; without them its report is taken at its word.
    `progress` is as in `merge`. `out` may be a repository of the Hub, `hub:org/name`, or a folder of an object store,
    `s3://bucket/folder`: it and the parents that are elsewhere are then read by ranges.

    Raises MergeToolError if `out` is no output, or a parent cannot be read.
    """
    _check_sample(sample)
    if is_remote(out):
        from merge_tool.verification.on_hub import verify_on_hub  # most outputs are here

        if full or report_path is not None:
            raise OutputError(
                f"{shown(out_text(out))}: is verified by ranges, a sample of it, with its own report. For --full fetch "
                "it first, from the Hub by: hf download ORG/NAME --local-dir OUT."
            )
        with Progress(progress) as shown_progress:
            return (
                verify_on_hub(
                    out,
                    against,
                    sample=sample,
                    recipe_path=recipe,
                    models_dir=models_dir,
                    memory_bytes=memory_bytes,
                    jobs=jobs,
                    wanted=_wanted(options),
                    checks=Checks(progress=shown_progress),
                ),
            )
    with Progress(progress) as shown_progress:
        check = partial(
            _verify,
            wanted=_wanted(options),
            progress=shown_progress,
            against=against,
            recipe=recipe,
            models_dir=models_dir,
            sample=sample,
            full=full,
            memory_bytes=memory_bytes,
            jobs=jobs,
        )
        return _of_each(Path(out), report_path, check)


R = TypeVar("R")


def _of_each(
    path: Path, report_path: str | Path | None, look: Callable[[Path, str | None, Path | None], R]
) -> tuple[R, ...]:
    """What `look` says of each output at `path`, by its folder, its file's name if it is one file, and its report."""
    try:
        if path.suffix == ".safetensors":
            return (look(path.parent, path.name, None if report_path is None else Path(report_path)),)
        if report_path is not None:
            raise OutputError(f"{shown(path)}: --report is for one-file outputs; a folder has its own.")
        return tuple(look(folder, None, None) for folder in _outputs(path))
    except (OSError, RuntimeError) as e:
        raise OutputError(f"{shown(path)}: cannot be read ({reason(e)}).") from e


@dataclass(frozen=True)
class VerifyPlan:
    """What the check of one output would read: its files, and the elements to merge again if it `has_parents`."""

    path: Path
    num_files: int
    nbytes: int
    num_compare: int
    num_elements: int
    has_parents: bool

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def plan_verify(
    out: str | Path,
    against: tuple[str | Path, str | Path] | None = None,
    *,
    sample: float = 0.01,
    full: bool = False,
    report_path: str | Path | None = None,
    recipe: str | Path | None = None,
    models_dir: str | Path | None = None,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    **options: Any,
) -> tuple[VerifyPlan, ...]:
    """What `verify` with these arguments would do, from headers alone. Raises the errors that it begins with."""
    _check_sample(sample)
    _wanted(options)
    if is_remote(out):
        raise OutputError(f"{shown(out)}: a dry run is of an output that is here. Verify at once: it reads ranges.")

    def look(root: Path, file_name: str | None, given_report: Path | None) -> VerifyPlan:
        folder = Folder(root)
        names = [file_name] if file_name is not None else [name for name in read_sums(root) if folder.has(name)]
        elements = 0
        if against or recipe:
            try:
                _check_has_report(file_name, given_report)
                report = open_report(given_report or folder.regular(REPORT))
            except (ValueError, RecursionError) as e:
                raise OutputError(f"{shown(root)}: {REPORT}: {reason(e)}") from e
            path = root if file_name is None else root / file_name
            again = plan_again(path, report, against, recipe, models_dir, memory_bytes, jobs, fetch=False)
            elements = again.plan.num_parameters
        return VerifyPlan(
            path=root if file_name is None else root / file_name,
            num_files=len(names),
            nbytes=sum(_size(folder, name) for name in names),
            num_compare=elements if full else ceil(elements * sample),
            num_elements=elements,
            has_parents=bool(against or recipe),
        )

    return _of_each(Path(out), report_path, look)


def _check_has_report(file_name: str | None, report_path: Path | None) -> None:
    """Raise OutputError for an output that is to be compared with its parents and has no report."""
    if file_name is not None and report_path is None:
        raise OutputError(
            f"{shown(file_name)}: a one-file output carries no report. Give the one of its merge: --report."
        )


def _size(folder: Folder, name: str) -> int:
    """The size of a file in bytes; 0 for what is not there, or no file, which the check itself says."""
    try:
        return folder.size(name)
    except (CheckpointError, OSError):
        return 0


def _check_sample(sample: float) -> None:
    if not 0 < sample <= 1:
        raise OutputError(f"The sample is {sample:g}, expected a share above 0 and at most 1 (or 100%).")


def _wanted(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the output must have been made with, as a report has them. Raises RecipeError."""
    made = as_json(make_options(**options), all_of_them=True)
    return {name: made[name] for name in options}


def check_options(checks: Checks, head: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    stored = {**as_json(Options(), all_of_them=True), **head["options"]}
    flags = {f.name: f.metadata["flag"] for f in fields(Options)}
    for name, value in wanted.items():
        if stored.get(name) != value:
            was = "not given" if stored.get(name) is None else shown(stored[name])
            checks.add(f"{flags[name]} was {was}, expected {shown(value)}: OUT is another merge.")


def _outputs(path: Path) -> list[Path]:
    if not path.is_dir():
        raise OutputError(f"{shown(path)}: {'is not a folder' if path.exists() else 'no such file or folder'}.")
    if (path / REPORT).exists() or (path / SUMS).exists():
        return [path]
    outputs = sorted(p for p in path.iterdir() if is_output_of_several(p))
    if not outputs:
        unfinished = f" The merge in {WORK} is not finished: run its command again." if (path / WORK).exists() else ""
        raise OutputError(f"{shown(path)}: holds no {REPORT}, so it is no output of slerp-merge.{unfinished}")
    return outputs


def _verify(
    root: Path,
    file_name: str | None,
    report_path: Path | None,
    *,
    against: tuple[str | Path, str | Path] | None,
    recipe: str | Path | None,
    models_dir: str | Path | None,
    sample: float,
    full: bool,
    memory_bytes: int | None,
    jobs: int | None,
    wanted: Mapping[str, Any],
    progress: Progress,
) -> Verification:
    checks, folder, report = Checks(progress=progress), Folder(root), None
    others: list[str] = []
    if file_name is None:
        others = _check_manifest(checks, folder)
    elif (root / file_name).is_file():
        checks.num_files, checks.nbytes = 1, (root / file_name).stat().st_size
    try:
        if file_name is None or report_path is not None:
            report = open_report(report_path or folder.regular(REPORT))
        weights = _check_weights(checks, folder, file_name, report)
    except (MergeToolError, ValueError, OSError, RecursionError) as e:
        checks.add(f"{REPORT if report is None else 'the weights'}: {reason(e)}")
        report, weights = None, (0, 0)
    if report is not None:
        check_options(checks, report.head, wanted)
    if against or recipe:
        _check_has_report(file_name, report_path)
    if (against or recipe) and report is not None:
        out = root if file_name is None else root / file_name
        prepared = plan_again(out, report, against, recipe, models_dir, memory_bytes, jobs)
        check_parents(checks, folder, report, prepared, sample=sample, full=full)
    if checks.more:
        checks.problems.append(f"and {checks.more:,} more")
    path = root if file_name is None else root / file_name
    return Verification(
        path=path,
        num_files=checks.num_files,
        nbytes=checks.nbytes,
        num_tensors=weights[0],
        num_compared=checks.num_compared,
        num_elements=weights[1],
        full=full,
        others=tuple(others),
        problems=tuple(checks.problems),
    )


# --------------------------------------------------------------------------------------- the manifest


def _check_manifest(checks: Checks, folder: Folder) -> list[str]:
    """Hash the files that SHA256SUMS lists. Returns the other files; weights among them are problems."""
    if folder.has(WORK):
        checks.add(f"{WORK}: an unfinished merge lies in the folder; run its command again.")
    try:
        path = folder.regular(SUMS)
        text = path.read_bytes()
    except (CheckpointError, OSError) as e:
        checks.add(f"{SUMS}: {reason(e)}")
        return []
    sums = read_sums(folder.root)
    if sums_text(sums) != text:
        checks.add(
            f"{SUMS}: is not as it was written: of {len(text.splitlines()):,} lines {len(sums):,} are digests of files "
            "of this folder."
        )
    checks.progress.start(sum(_size(folder, name) for name in sums))
    for name, expected in sums.items():
        check_digest(checks, folder, name, expected)
    for name in (REPORT, CARD):
        if name not in sums:
            checks.add(f"{SUMS}: does not list {name}.")
    others = [name for name in strangers(folder.root, (), [*sums, SUMS]) if name != WORK]
    for name in others:
        if name.endswith((".safetensors", ".safetensors.index.json", ".bin")):
            checks.add(f"{shown(name)}: weights or an index that {SUMS} does not list.")
    return others


def check_digest(checks: Checks, folder: Folder, name: str, expected: str) -> None:
    try:
        path = folder.regular(name)
        digest = sha256_of(path, lambda nbytes: checks.progress.advance(nbytes, name))
        checks.nbytes += path.stat().st_size
    except (CheckpointError, OSError) as e:
        checks.add(f"{shown(name)}: {reason(e)}")
        return
    checks.num_files += 1
    if digest != expected:
        checks.add(f"{shown(name)}: its SHA-256 is {digest}, {SUMS} says {expected}. The file was changed.")


# ------------------------------------------------------------------------ weights against the report


def open_report(path: Path) -> StoredReport:
    with path.open(encoding="utf-8", newline="") as lines:
        head = next(stream_report(lines))[1]
    if head.get("format") != FORMAT:
        raise ValueError(f"its format is {shown(head.get('format'), 20)}, this version reads {FORMAT}")
    if wrong := [key for key, kind in _HEAD.items() if not isinstance(head.get(key), kind)]:
        raise ValueError(f"it lacks {', '.join(wrong)}")
    return StoredReport(path, head)


def _check_weights(
    checks: Checks, folder: Folder, file_name: str | None, report: StoredReport | None
) -> tuple[int, int]:
    """Compare names, shapes, dtypes, index and sizes with the report. Returns the numbers of its tensors and
    elements."""
    sizes: Mapping[str, Any] = {file_name or "": None} if report is None else report.head["shards"]
    held: dict[str, tuple[tuple[int, ...], str, str]] = {}
    for name, size in sizes.items():
        path = folder.regular(name)
        if size is not None and path.stat().st_size != size:
            checks.add(f"{shown(name)}: has {path.stat().st_size:,} bytes, expected {shown(size, 30)}.")
        open_checkpoint(path, mergeable=False)  # our own parser: every byte belongs to one tensor
        for tensor, shape, dtype in _library_view(path):
            if tensor in held:
                checks.add(f"{shown(tensor)}: is in {shown(held[tensor][2])} and in {shown(name)}.")
            held[tensor] = shape, dtype, name
    if report is None:
        return len(held), 0
    if len(sizes) > 1:
        _check_index(checks, folder, {tensor: name for tensor, (_, _, name) in held.items()})
    elif report.path.parent.resolve() == folder.root:
        for name in _indices(folder):
            checks.add(f"{shown(name)}: an index, although one file has all tensors.")
    count = elements = 0
    for _, entry in report.tensors():
        count += 1
        elements += check_tensor(checks, entry, held)
    for name in list(held)[:_MOST]:
        checks.add(f"{shown(name)}: is in {shown(held[name][2])}, but not in the report.")
    return count, elements


def _library_view(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and dtypes as the safetensors library reads them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                view = opened.get_slice(name)
                yield name, tuple(view.get_shape()), view.get_dtype()
    except SafetensorError as e:
        raise CheckpointError(f"{shown(path.name)}: the safetensors library refuses it ({reason(e)}).") from e


def check_tensor(checks: Checks, tensor: Mapping[str, Any], held: dict[str, Any]) -> int:
    name, shape, dtype = (tensor.get(key) for key in ("name", "shape", "dtype"))
    there = held.pop(name, None) if isinstance(name, str) else None
    if there is None:
        checks.add(f"{shown(name)}: is in the report, but in no shard (or twice in the report).")
        return 0
    if [list(there[0]), there[1]] != [shape, dtype]:
        checks.add(f"{shown(name)}: is {there[1]} {list(there[0])}, expected {shown(dtype, 20)} {shown(shape)}.")
    return prod(there[0])


def _indices(folder: Folder) -> list[str]:
    return [p.name for p in sorted(folder.root.iterdir()) if p.name.endswith(".safetensors.index.json")]


def _check_index(checks: Checks, folder: Folder, weight_map: Mapping[str, str]) -> None:
    names = _indices(folder)
    if len(names) != 1:
        checks.add(f"{len(names)} indices found, expected one.")
    elif folder.load_json(names[0]).get("weight_map") != weight_map:
        checks.add(f"{shown(names[0])}: does not name exactly the shards' tensors.")


__all__ = ["Verification", "verify"]
