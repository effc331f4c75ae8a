"""Many values of t, one evaluation command: merge, run the command on the models, keep its scores, delete the models.

The scores go into `sweep.jsonl` line by line, so that a sweep that was stopped continues; `--batch` models are on disk
at once. The user knows what a score means; this module knows only whether more or less is better.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from merge_tool.api import merge, plan_recipe
from merge_tool.errors import EvaluationError, OutputError, RecipeError, output_failed, reason, shown
from merge_tool.files import sync_file, write_whole
from merge_tool.models.lora import parts
from merge_tool.output.lock import FolderLock
from merge_tool.output.marks import check_apart_by_mark
from merge_tool.output.older import strangers
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.target import Target, check_target
from merge_tool.recipe.pair import check_ts, pair
from merge_tool.recipe.recipe import label_t

JOURNAL, TABLE, LOG = "sweep.jsonl", "sweep.csv", "evaluation.log"
HIDDEN = ".sweep"  # the lock and unfinished files; exists while a sweep runs
MODELS = "models"  # the merges that are scored now, below the sweep's folder
LESS_IS_BETTER = ("perplexity", "ppl", "loss", "nll", "error", "wer")  # parts of names of scores to minimise by default
_LAST_LINES = 10
_BEAT_SECONDS = 2.0


@dataclass(frozen=True)
class SweepPoint:
    """One merge: its t, the command's scores, and whether no other t is at least as good in every score."""

    t: float
    scores: Mapping[str, float]
    is_pareto: bool = False


@dataclass(frozen=True)
class SweepReport:
    """All points in order of t; `less_is_better` are the scores to be kept small, `folder` holds the files."""

    folder: Path
    points: tuple[SweepPoint, ...]
    less_is_better: frozenset[str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.points[0].scores)

    def as_json(self) -> dict[str, Any]:
        points = [{"t": p.t, "scores": dict(p.scores), "pareto": p.is_pareto} for p in self.points]
        return {"less_is_better": sorted(self.less_is_better), "points": points}

    def as_csv(self) -> str:
        """A row per t: t, the scores, pareto (0 or 1)."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["t", *self.names, "pareto"])
        for point in self.points:
            rows.writerow([label_t(point.t), *(repr(point.scores[n]) for n in self.names), int(point.is_pareto)])
        return text.getvalue()


def sweep(
    base: str | Path,
    ft: str | Path,
    out: str | Path,
    ts: Iterable[float],
    command: Sequence[str],
    *,
    batch: int = 1,
    keep: bool = False,
    minimize: Sequence[str] = (),
    overwrite: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    on_scores: Callable[[SweepPoint], None] | None = None,
    **options: Any,
) -> SweepReport:
    """Merge `base` and `ft` at every t, and score each merge by `command`.

    The command gets the folders of up to `batch` merges as its last arguments (or in the place of an argument `{}`)
    and prints `name value` lines, in the folders' order, or JSON: an object of numbers, or a list of them. No shell is
    involved. Merges are deleted once they are scored, unless `keep`. `minimize` names scores of which less is
    better, besides those with loss, perplexity, ppl, nll, error or wer in their name. `options` are `merge`'s.
    The same call continues a sweep that was stopped, and may add values of t.

    Raises EvaluationError when the command fails or its scores cannot be read; the errors of `merge`.
    """
    extrapolate = bool(options.get("extrapolate"))
    chosen_ts = check_ts(ts, extrapolate)
    if batch < 1:
        raise RecipeError(f"The batch is {batch} models, expected at least 1.")
    if not command:
        raise RecipeError("The evaluation command is empty, expected a program and its arguments.")
    folder = Path(out)
    settings: dict[str, Any] = {"memory_bytes": memory_bytes, "jobs": jobs}
    recipe = pair(base, ft, chosen_ts[:1], **options)
    prepared = plan_recipe(recipe, folder / _name(chosen_ts[0]), read_samples=True, **settings)
    check_target(Target(folder / MODELS), prepared.inputs)  # its content is removed
    base, ft = prepared.refs  # use these paths from here on: the Hub's newest revision may change meanwhile
    facts = _facts(prepared, command)
    del prepared
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = _Journal(folder, facts, overwrite=overwrite)
    except OSError as e:
        raise output_failed(folder, e) from e
    try:
        done = journal.scores
        _put_away(folder, [t for t in journal.begun if t in done], keep=keep)
        rest = [t for t in chosen_ts if t not in done]
        for chosen in (rest[start : start + batch] for start in range(0, len(rest), batch)):
            folders = _merge(base, ft, folder, chosen, journal, {**settings, **options})
            results = _evaluate(command, folders, folder, journal)
            _less_is_better(tuple(results[0]), minimize)
            for t, scores in zip(chosen, results, strict=True):
                journal.add(t, scores)
                if on_scores is not None:
                    on_scores(SweepPoint(t, scores))
            _put_away(folder, chosen, keep=keep)
        report = build_report(folder, {t: done[t] for t in sorted(done)}, minimize)
        _write_whole(folder / TABLE, report.as_csv())
        return report
    except OSError as e:
        raise output_failed(folder, e) from e
    finally:
        journal.close()


def _facts(prepared: Prepared, command: Sequence[str]) -> dict[str, Any]:
    """The facts that must be equal to continue a sweep: the inputs, the merge's options, the command."""
    merged = {key: value for key, value in prepared.plan.facts.items() if key not in ("t", "version")}
    return {**merged, "samples": list(prepared.samples), "command": list(command)}


def _name(t: float) -> str:
    return f"t-{label_t(t)}"


def _merge(
    base: Path, ft: Path, folder: Path, ts: Sequence[float], journal: _Journal, options: dict[str, Any]
) -> list[Path]:
    """The folders of the merges, made in one pass over the inputs; a merge that an earlier run began is continued."""
    models = folder / MODELS
    if not journal.begin(ts) and models.exists():
        check_apart_by_mark(models, list(map(Path, (*parts(base), *parts(ft)))))
        shutil.rmtree(models)
    folders = [models / _name(t) for t in ts]
    beat = lambda nbytes, tensor: journal.beat()  # noqa: E731
    merge(base, ft, folders[0] if len(ts) == 1 else models, tuple(ts), on_progress=beat, **options)
    return folders


def _put_away(folder: Path, ts: Iterable[float], *, keep: bool) -> None:
    """Move scored models under their names into the sweep's folder if `keep`, else delete them."""
    for model in (folder / MODELS / _name(t) for t in ts):
        if model.is_dir() and keep:
            if (folder / model.name).exists():
                raise OutputError(f"{shown(folder / model.name)}: is in the way of the model to keep. Move it away.")
            model.rename(folder / model.name)
        elif model.is_dir():
            shutil.rmtree(model)
    if (folder / MODELS).is_dir() and not any((folder / MODELS).iterdir()):
        (folder / MODELS).rmdir()


def _write_whole(path: Path, text: str) -> None:
    """Write a file of the sweep's folder in the lock's folder, then move it: a kill leaves the old file, and no other
    file."""
    write_whole(path, [text.encode()], path.parent / HIDDEN / f"{path.name}.part")


# ------------------------------------------------------------------------------------------- evaluation


def _evaluate(
    command: Sequence[str], folders: Sequence[Path], folder: Path, journal: _Journal
) -> list[dict[str, float]]:
    """The command's scores for each folder. Its stderr goes into the log."""
    paths = [str(path) for path in folders]
    has_braces = "{}" in command
    args = [arg for word in command for arg in (paths if word == "{}" else [word])] + ([] if has_braces else paths)
    try:
        with (folder / LOG).open("ab") as log:
            start = log.tell()
            code, output = _run(args, log, journal.beat)
    except OSError as e:
        raise EvaluationError(f"The evaluation command {shown(args[0])} cannot be run ({reason(e)}).") from e
    text = output.decode(errors="replace")
    if code:
        raise EvaluationError(
            f"The evaluation command ended with {_ending(code)}. Its last lines:\n"
            f"{_tail(folder / LOG, start, text)}\nCorrect it, then run the same sweep: it continues with these models."
        )
    try:
        return parse_scores(text, len(folders), journal.names)
    except ValueError as e:
        raise EvaluationError(
            f"The evaluation command's output cannot be read: {e}. It printed:\n{_indented(text)}\n"
            "Expected `name value` lines, or JSON, for each folder in order."
        ) from e


def _run(args: Sequence[str], log: IO[bytes], beat: Callable[[], None]) -> tuple[int, bytes]:
    """The exit code and output of a command. While it runs, others see that this sweep works."""
    with subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=_BEAT_SECONDS)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                beat()
            except BaseException:
                process.kill()
                raise


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"


def _tail(log: Path, start: int, text: str) -> str:
    """The last lines that the command wrote on stderr (from byte `start` of the log), or else on stdout."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 65_536))
        errors = file.read().decode(errors="replace")
    return _indented(errors if errors.strip() else text)


def _indented(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return "\n".join(f"    {shown(line)}" for line in lines) or "    (nothing)"


_LINE = re.compile(r"\s*([A-Za-z_][^\s:=]*)\s*[\s:=]\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*%?\s*")


def parse_scores(text: str, count: int, names: tuple[str, ...] | None = None) -> list[dict[str, float]]:
    """The scores of `count` models: JSON, or `name value` lines in the models' order; other lines are ignored.

    Raises ValueError unless every model has the same finite scores (those in `names`, if given).

    >>> parse_scores("loading 3 files\\naccuracy 0.5\\nloss: 2\\naccuracy 0.75\\nloss: 1", 2)
    [{'accuracy': 0.5, 'loss': 2.0}, {'accuracy': 0.75, 'loss': 1.0}]
    """
    rows = _parse_json(text)
    if rows is None:
        rows = _parse_lines(text, count)
    if len(rows) != count:
        raise ValueError(f"scores for {len(rows)} models, expected {count}")
    expected = names or tuple(rows[0])
    if not expected:
        raise ValueError("no score was found")
    for scores in rows:
        if scores.keys() != set(expected):
            raise ValueError(f"the scores are {', '.join(scores)}, expected {', '.join(expected)}")
        if bad := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise ValueError(f"{bad[0]} is {scores[bad[0]]}")
    return [{name: scores[name] for name in expected} for scores in rows]


def _parse_json(text: str) -> list[dict[str, float]] | None:
    """The output, or its last line, as JSON; None if neither is."""
    for part in (text, text.strip().rpartition("\n")[2]):
        try:
            content = json.loads(part)
        except ValueError:
            continue
        rows = content if isinstance(content, list) else [content]
        if rows and all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows):
            return [{str(name): float(value) for name, value in row.items()} for row in rows]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_lines(text: str, count: int) -> list[dict[str, float]]:
    columns: dict[str, list[float]] = {}
    for match in filter(None, map(_LINE.fullmatch, text.splitlines())):
        columns.setdefault(match[1], []).append(float(match[2]))
    if bad := [name for name, values in columns.items() if len(values) != count]:
        raise ValueError(f"{bad[0]} was printed {len(columns[bad[0]])} times for {count} models")
    return [{name: values[k] for name, values in columns.items()} for k in range(count)]


# ---------------------------------------------------------------------------------------------- report


def build_report(folder: Path, scores_of: Mapping[float, Mapping[str, float]], minimize: Iterable[str]) -> SweepReport:
    """The points with their Pareto marks. Raises RecipeError when `minimize` names no score."""
    names = tuple(next(iter(scores_of.values())))
    less = _less_is_better(names, minimize)
    marks = pareto([[-s[n] if n in less else s[n] for n in names] for s in scores_of.values()])
    points = (SweepPoint(t, scores, mark) for (t, scores), mark in zip(scores_of.items(), marks, strict=True))
    return SweepReport(folder, tuple(points), less)


def _less_is_better(names: Sequence[str], minimize: Iterable[str]) -> frozenset[str]:
    if unknown := sorted(set(minimize) - set(names)):
        raise RecipeError(f"--minimize {shown(unknown[0])}: there is no such score; found: {', '.join(names)}.")
    return frozenset(minimize) | {n for n in names if any(part in n.lower() for part in LESS_IS_BETTER)}


def pareto(rows: Sequence[Sequence[float]]) -> list[bool]:
    """For each row of scores, more being better, whether no other row is as good in all and better in one."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)

    return [not any(beats(other, row) for other in rows) for row in rows]


# --------------------------------------------------------------------------------------------- journal


class _Journal:
    """`sweep.jsonl`: the sweep's facts, then a line per t begun or scored. One process at a time holds it."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
        self._path = folder / JOURNAL
        self.scores: dict[float, dict[str, float]] = {}
        self.begun: list[float] = []
        hidden = folder / HIDDEN
        hidden.mkdir(exist_ok=True)
        self._hidden, self._lock = hidden, FolderLock(hidden)
        try:
            lines = [] if overwrite else list(_read_lines(self._path))
            if lines:
                _check_same(self._path, lines[0], facts)
            elif not overwrite and (others := strangers(folder, [HIDDEN], ())):
                raise OutputError(
                    f"{shown(folder)}: is not empty ({shown(others[0])}) and holds no sweep. Choose another folder."
                )
            # Write the file anew, without a line that was cut short.
            _write_whole(self._path, "".join(json.dumps(line) + "\n" for line in (lines or [dict(facts)])))
            for line in lines[1:]:
                self.begun = line.get("begun", self.begun)
                if "scores" in line:
                    self.scores[line["t"]] = line["scores"]
            if len({frozenset(scores) for scores in self.scores.values()}) > 1:
                raise OutputError(
                    f"{shown(self._path)}: its points have different scores. Choose another folder, or --overwrite to "
                    "start anew."
                )
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...] | None:
        return next((tuple(scores) for scores in self.scores.values()), None)

    def begin(self, ts: Sequence[float]) -> bool:
        """Note that these t are being merged. True if an earlier run began the same t, so that its merge can
        continue."""
        was_begun, self.begun = self.begun == list(ts), list(ts)
        self._append({"begun": self.begun})
        return was_begun

    def add(self, t: float, scores: dict[str, float]) -> None:
        self.scores[t] = scores
        self._append({"t": t, "scores": scores})

    def beat(self) -> None:
        """Show other machines that this sweep works."""
        self._lock.owner.beat()

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            sync_file(file.fileno())

    def close(self) -> None:
        self._lock.remove_with(self._hidden)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; the last may have been cut short by a kill. Raises OutputError for one that is damaged."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(text.splitlines(keepends=True)):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_whole(record):
            raise OutputError(
                f"{shown(path)}: line {number + 1} is damaged. Choose another folder, or --overwrite to start anew."
            )
        yield record


def _is_whole(line: Any) -> bool:
    """Whether a line is a sweep's facts, or a t begun or scored."""
    if not isinstance(line, dict):
        return False
    begun, scores = line.get("begun", []), line.get("scores", {"": 0})
    numbers = [*begun, *scores.values()] if isinstance(begun, list) and isinstance(scores, dict) else [None]
    return all(map(_is_number, numbers)) and len(scores) > 0 and ("scores" not in line or _is_number(line.get("t")))


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OutputError that names the differences from the sweep in the folder."""
    now = json.loads(json.dumps(now))
    if different := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
        key = different[0]
        raise OutputError(
            f"{shown(path)}: is of another sweep: {', '.join(different)} differ "
            f"({key}: {shown(before.get(key, 'nothing'), 80)} there, {shown(now.get(key, 'nothing'), 80)} now). "
            "Choose another folder, or --overwrite to start anew."
        )
