"""merge(...) and merge_models(...): a recipe, and the whole flow on one page. What the commands and Python users call.

look -> check -> fetch -> plan -> run -> publish
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_tool.checkpoint.streaming import DOWNLOADS, Streaming
from merge_tool.errors import (
    DataError,
    FetchError,
    MergeToolError,
    OutputError,
    RecipeError,
    input_failed,
    listed,
    output_failed,
    shown,
    sized,
)
from merge_tool.methods.registry import METHODS
from merge_tool.methods.steps import Method
from merge_tool.models.inputs import Inputs
from merge_tool.models.lora import parts
from merge_tool.output.carrying_out import FLUSH_BYTES, MAY_SHARE, carry_out, read_ahead, say_what_is_done
from merge_tool.output.complete import check_apart, check_output, check_room, final_names, is_complete
from merge_tool.output.completing import earlier_report, report_of, write_report, write_side_files
from merge_tool.output.folders import PARTS
from merge_tool.output.merge_report import MergeReport, Watch
from merge_tool.output.older import check_conflicts
from merge_tool.output.publishing import Publishing, check_no_input, hub_of, target_of
from merge_tool.output.report import alarms, report_lines, summarise
from merge_tool.output.work_folder import WorkFolder
from merge_tool.plan.memory import Machine, machine
from merge_tool.plan.prepare import Prepared, prepare
from merge_tool.plan.published import check_ids, check_places
from merge_tool.plan.system_memory import resident_bytes, under_pressure
from merge_tool.plan.target import Target, check_report_path, check_target, existing_folder
from merge_tool.progress import Progress
from merge_tool.recipe.pair import DEFAULT_T, pair
from merge_tool.recipe.recipe import Recipe
from merge_tool.run.run import progress_bytes
from merge_tool.run.work import check_exact_tensors

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from merge_tool.hosts.plan_file import PlanFile
    from merge_tool.output.known import EarlierFindings

DEFAULT_PARTS = 16  # of an executor's merge
_NOT_DURABLE = (
    "The file system of OUT cannot sync folders. The merge is safe from kills; after a power cut, verify it "
    "(merge-tool verify OUT), and merge again if that finds anything."
)


def merge(
    base: str | Path,
    ft: str | Path,
    out: str | Path,
    t: float | Sequence[float] = DEFAULT_T,
    *,
    extrapolate: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check_resumed: bool = False,
    stream: bool | None = None,
    downloads: int = DOWNLOADS,
    spool_bytes: int | None = None,
    private: bool = False,
    publish: bool = True,
    work: str | Path | None = None,
    report_path: str | Path | None = None,
    progress: str = "auto",
    on_warning: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[int, str], None] | None = None,
    executor: Executor | None = None,
    num_parts: int = DEFAULT_PARTS,
    **options: Any,
) -> MergeReport:
    """Merge the checkpoints `base` (t = 0) and `ft` (t = 1) into `out`, tensor by tensor, in bounded memory.

    `out` is a folder, one file if its name ends in .safetensors, or a repository of the Hub (`hub:org/name`), to which
    finished shards are uploaded while the merge goes on; `private`, `publish` and `work` say how
    (`merge_tool.output.publishing.Publishing`). Several `t` make one sub-folder each (`t-0.3`), in
    one pass over the inputs. `options` are those of the command line: the fields of `merge_tool.recipe.options.Options`
    (dtype, only, exclude, on_missing, on_mismatch, files_from, max_shard_bytes) and of
    `merge_tool.recipe.pair.PairOptions` (method, t_for, vocab, pad_vocab_to_multiple_of): with
    `t_for={"self_attn": [0, 0.5, 1], "mlp": 0.2}` some tensors have a t of their own; a list of t runs along the
    layers; the first pattern that matches counts. `memory_bytes` bounds the peak resident memory of the whole process,
    including what it holds before the call (default: see `merge_tool.plan.memory.default_budget`). `check_resumed`
    hashes the shards that an earlier run finished before it keeps them. `stream`, `downloads` and `spool_bytes` say how
    weights of the Hub are read (`merge_tool.checkpoint.streaming.Streaming`). `progress` is "bar", "log" (a line every
    half minute), "none" or "auto": a bar in a notebook and on a terminal, unless `on_start(total)` or
    `on_progress(nbytes, tensor)` is given, which drive a progress bar of the caller's. `on_warning(message)` gets the
    warnings, which otherwise go to the logger `merge_tool`. With an `executor` (of concurrent.futures, Dask, MPI, or
    `merge_tool.hosts.engines.RayExecutor`) its tasks make the weights in `num_parts` parts, each within `memory_bytes`;
    they must all see `out`.

    Raises a MergeToolError for whatever the user can mend; `out` is then as it was, or can be continued with
    the same call.

    >>> report = merge("memphis-cot", "scribe-ft", "memphis-scribe", t=0.4)  # doctest: +SKIP
    """
    with _watched(progress, on_warning, on_start, on_progress) as watch:
        return merge_recipe(
            pair(base, ft, t, extrapolate=extrapolate, **options),
            out,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            check_resumed=check_resumed,
            streaming=Streaming(stream, downloads, spool_bytes),
            publishing=Publishing(private, publish, None if work is None else Path(work)),
            report_path=report_path,
            watch=watch,
            executor=executor,
            num_parts=num_parts,
        )


def merge_models(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    methods: Mapping[str, Method] | None = None,
    values: Sequence[str] | Mapping[str, Any] = (),
    models_dir: str | Path | None = None,
    extrapolate: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check_resumed: bool = False,
    stream: bool | None = None,
    downloads: int = DOWNLOADS,
    spool_bytes: int | None = None,
    private: bool = False,
    publish: bool = True,
    work: str | Path | None = None,
    report_path: str | Path | None = None,
    progress: str = "auto",
    on_warning: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[int, str], None] | None = None,
    executor: Executor | None = None,
    num_parts: int = DEFAULT_PARTS,
    **options: Any,
) -> MergeReport:
    """Merge the models that `recipe` names into `out`, tensor by tensor, in bounded memory.

    `recipe` is a YAML file as mergekit reads it, or the same as a mapping. `methods` are further ones by name, beside
    the built-in ones (docs/adding_a_method.md). `values` stand in place of the recipe's parameters, several of one
    make an output each: `values={"lambda": [0.5, 1.0]}`. In `models_dir` the recipe's models are looked up by name, as
    a published recipe (mergekit_config.yml) names them. `options` are the fields of
    `merge_tool.recipe.options.Options`. The rest is as in `merge`.

    Raises a MergeToolError for whatever the user can mend; `out` is then as it was, or can be continued with the same
    call.

    >>> report = merge_models("ties.yaml", "merged")  # doctest: +SKIP
    """
    from merge_tool.recipe.mergekit import read_recipe  # costs a megabyte, which a pair does not need

    known = {**METHODS, **(methods or {})}
    with _watched(progress, on_warning, on_start, on_progress) as watch:
        return merge_recipe(
            read_recipe(recipe, known, extrapolate=extrapolate, values=values, models_dir=models_dir, **options),
            out,
            methods=known,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            check_resumed=check_resumed,
            streaming=Streaming(stream, downloads, spool_bytes),
            publishing=Publishing(private, publish, None if work is None else Path(work)),
            report_path=report_path,
            watch=watch,
            executor=executor,
            num_parts=num_parts,
        )


def average(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Any = "uniform",
    window: int | Sequence[int] = (),
    last: int | None = None,
    every: int = 1,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check_resumed: bool = False,
    stream: bool | None = None,
    downloads: int = DOWNLOADS,
    spool_bytes: int | None = None,
    private: bool = False,
    publish: bool = True,
    work: str | Path | None = None,
    report_path: str | Path | None = None,
    progress: str = "auto",
    on_warning: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[int, str], None] | None = None,
    **options: Any,
) -> MergeReport:
    """Average the `checkpoints` of one training run, the oldest first, into `out`; each of them is read once, and one
    at a time.

    A checkpoint is a folder, a file, a glob or a model of the Hub. `weights` are "uniform", "linear" (1, 2, 3, ...),
    "ema:DECAY", "sqrt" (as a learning rate that decays by 1 - sqrt: arXiv 2507.17634), a file, or a list of numbers; a
    `window` is the number of the last checkpoints that are averaged. Several of either make one sub-folder each
    (`window-4`, `weights-linear`, `window-4-weights-linear`), in one pass. `last` and `every` choose among the
    checkpoints first. `options` are the fields of `merge_tool.recipe.options.Options`; the rest is as in
    `merge`.

    Raises a MergeToolError for whatever the user can mend; `out` is then as it was, or can be continued with the same
    call.

    >>> report = average(["runs/x/checkpoints/step-*"], "averaged", window=[4, 8])  # doctest: +SKIP
    """
    of_average = {"weights": weights, "window": window, "last": last, "every": every}
    with _watched(progress, on_warning, on_start, on_progress) as watch:
        return merge_recipe(
            averaging([str(one) for one in checkpoints], **of_average, **options),
            out,
            memory_bytes=memory_bytes,
            jobs=jobs,
            overwrite=overwrite,
            check_resumed=check_resumed,
            streaming=Streaming(stream, downloads, spool_bytes),
            publishing=Publishing(private, publish, None if work is None else Path(work)),
            report_path=report_path,
            watch=watch,
        )


def averaging(checkpoints: Sequence[str], **options: Any) -> Recipe:
    """The recipe that averages checkpoints. `options` are the fields of AverageOptions and Options. Raises RecipeError,
    and CheckpointError for a path or a glob that is not there."""
    from merge_tool.models.run_order import in_order  # for averages alone, as YAML
    from merge_tool.recipe.average import AverageOptions, average_recipe

    own = {f.name: options.pop(f.name) for f in fields(AverageOptions) if f.name in options}
    settings = AverageOptions(**own)
    numbered = [kind for kind in settings.weights if kind.numbers]
    is_list = any(kind.is_list for kind in numbered)  # a list beside a list: place by place
    found, warnings = in_order(checkpoints, numbered[0].text if numbered else None, keep=is_list)
    return average_recipe(found, settings, METHODS, warnings=warnings, **options)


@contextmanager
def _watched(
    progress: str,
    on_warning: Callable[[str], None] | None,
    on_start: Callable[[int], None] | None,
    on_progress: Callable[[int, str], None] | None,
) -> Iterator[Watch]:
    """The caller's callbacks, or a bar if there are none."""
    if on_start is not None or on_progress is not None:
        yield Watch(on_warning, on_start, on_progress)
        return
    with Progress(progress) as shown_progress:
        yield Watch(on_warning, shown_progress.start, shown_progress.advance)


def merge_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    methods: Mapping[str, Method] = METHODS,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    check_resumed: bool = False,
    streaming: Streaming | None = None,
    publishing: Publishing | None = None,
    report_path: str | Path | None = None,
    watch: Watch | None = None,
    executor: Executor | None = None,
    num_parts: int = DEFAULT_PARTS,
    plan_file: PlanFile | None = None,
    fill: bool = False,
    earlier: Path | None = None,
) -> MergeReport:
    """Make the merge that a recipe asks for. Raises a MergeToolError.

    With an `executor` its tasks make the weights, in `num_parts` parts; OUT must be a folder that they all see, and
    each keeps `memory_bytes` and `jobs`. With a `plan_file` the finished parts of its workers are taken; what they lack
    is an error, or is made here with `fill`. `earlier` is the merge_report.json of the same merge with other
    parameters: sums that it holds are not made again, and a report of anything else is not used.
    """
    started, watch = time.monotonic(), watch or Watch()
    _check_method(recipe, methods, is_shared=executor is not None)
    target, limits, report = _check_request(recipe, out, memory_bytes, jobs, report_path, publishing)
    if target.repo and (executor is not None or plan_file is not None):
        raise RecipeError(
            f"{target.name}: workers share a folder, and cannot write to the Hub or a bucket. Leave out --executor."
        )

    if executor is not None or plan_file is not None:
        if streaming is not None and streaming.stream:
            raise RecipeError("--stream: workers in other processes read the Hub's cache. Leave out --stream.")
        streaming = Streaming(stream=False)

    # ------------------------------------------------------------------------- look, check, fetch, plan
    with (
        hub_of(target, publishing, recipe, overwrite=overwrite) as hub,
        Inputs(map(str, recipe.models), streaming, variant=recipe.options.variant) as inputs,
    ):
        if executor is not None or plan_file is not None:
            inputs.check_have_paths()
        check_target(target, inputs.paths)  # again: the Hub's models are in other folders now
        if inputs.coming:
            planned = prepare(recipe, inputs, target, limits, methods=methods)
            if why := _why_by_range(planned, inputs, overwrite=overwrite):
                watch.warn([why] if inputs.streaming.stream is None and not inputs.must_stream else [])
                planned = _by_range(planned, inputs)
            check_output(planned, overwrite=overwrite) if hub is None else hub.check(planned)
            del planned
            inputs.stream() if why else inputs.fetch()
        prepared = prepare(recipe, inputs, target, limits, methods=methods, read_samples=True)
        if plan_file is not None:
            plan_file.check(prepared.plan, prepared.samples)
        if hub is not None and (most := hub.find_draft(prepared)) is not None:
            del prepared
            target = replace(target, most_shard_bytes=most)
            prepared = prepare(recipe, inputs, target, limits, methods=methods, read_samples=True)
            hub.find_draft(prepared)
        watch.warn(prepared.warnings)

        # --------------------------------------------------------------------------------- run, publish
        try:
            check_apart(prepared)
            if hub is not None:
                from merge_tool.output.to_hub import merge_to_hub

                return merge_to_hub(prepared, hub, inputs, watch, report, started, check_resumed=check_resumed)
            if not os.path.lexists(target.work):
                if plan_file is not None:
                    from merge_tool.hosts.adopt import check_finished

                    check_finished(prepared, plan_file)
                if plan_file is not None or (not overwrite and is_complete(prepared)):
                    return earlier_report(prepared, report, started)
            check_room(prepared, overwrite=overwrite)
            known = None if earlier is None else _known(earlier, prepared)
            if known is None:
                check_exact_tensors(prepared.plan)
            with WorkFolder(
                target,
                prepared.plan,
                samples=prepared.samples,
                flush_bytes=FLUSH_BYTES if under_pressure(prepared.budget) else None,
                check_resumed=check_resumed,
                inputs=prepared.inputs,
                names=final_names(prepared),
            ) as work:
                if work.may_share:
                    watch.warn([MAY_SHARE])
                if plan_file is not None:
                    from merge_tool.hosts.adopt import has_ended

                    if has_ended(prepared, plan_file, work):
                        return earlier_report(prepared, report, started)
                if _begin(prepared, work, overwrite=overwrite):
                    return earlier_report(prepared, report, started)
                if not work.is_durable:
                    watch.warn([_NOT_DURABLE])
                if plan_file is None and (work.path / PARTS).is_dir():
                    from merge_tool.hosts.adopt import adopt_planned

                    adopt_planned(work, check=check_resumed)
                num_resumed = len(work.done_shards)
                say_what_is_done(prepared, work, watch)
                if executor is not None:
                    plan_file = _run_on(
                        executor,
                        num_parts,
                        prepared,
                        work,
                        watch,
                        overwrite=overwrite,
                        memory_bytes=memory_bytes,
                        jobs=jobs,
                    )
                if plan_file is not None:
                    from merge_tool.hosts.adopt import adopt_parts

                    adopt_parts(work, plan_file, fill=fill, check=check_resumed)
                read_ahead(inputs, prepared, work)
                carry_out(prepared, work, watch, known)
                inputs.end_downloads()
                findings = work.findings()
                summary = summarise(prepared.plan, findings)
                write_side_files(prepared, work, findings, summary)
                if report is not None:
                    write_report(prepared, report, report_lines(prepared.plan, findings, 0, prepared.samples))
                strangers = work.publish(check_bytes=prepared.budget - resident_bytes())
        except OSError as e:  # one of the many reads of OUT that have no message of their own
            raise _named(e, prepared) from e
    if strangers:
        watch.warn([f"{shown(target.path)} also holds what was there before: {listed(strangers, 50)}."])
    watch.warn(alarms(summary))
    moved = progress_bytes(prepared.plan, work.done_shards)
    return replace(report_of(prepared, summary, started), moved_bytes=moved, num_resumed=num_resumed)


def _why_by_range(prepared: Prepared, inputs: Inputs, *, overwrite: bool) -> str:
    """Why the missing weights are read by range; an empty text if they are fetched into the cache first."""
    stream, download = inputs.streaming.stream, prepared.download
    if inputs.must_stream:
        if stream is False:
            raise RecipeError("--no-stream: a model at an address (https://..., s3://...) is always read by range.")
        return "It is at an address."
    if stream is not None:
        return "It was asked for." if stream else ""
    try:
        check_room(prepared, overwrite=overwrite)
    except (OutputError, FetchError):
        if _is_taken(prepared, overwrite=overwrite):
            return ""  # which is said instead
        return (
            f"The disk lacks the room for {sized(download.nbytes)} of weights from the Hub: they are read by range, "
            "and not kept. (--no-stream insists on the cache.)"
        )
    return ""


def _is_taken(prepared: Prepared, *, overwrite: bool) -> bool:
    """Whether OUT holds this merge, or something else."""
    if prepared.target.repo:
        return False  # asked by HubOutput
    try:
        return not overwrite and not os.path.lexists(prepared.target.work) and is_complete(prepared)
    except OutputError:
        return True


def _by_range(prepared: Prepared, inputs: Inputs) -> Prepared:
    """The same merge, with the missing weights read by range."""
    waiting = prepared.here_bytes if prepared.target.repo else None
    inputs.choose_streaming(existing_folder(prepared.target.path), waiting)
    return replace(prepared, download=inputs.download)


def plan_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    methods: Mapping[str, Method] = METHODS,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    read_samples: bool = False,
    overwrite: bool = False,
    streaming: Streaming | None = None,
    publishing: Publishing | None = None,
) -> Prepared:
    """Plan the merge that a recipe asks for, from headers alone (with `read_samples` also from a few bytes of weights).
    Fetches no weights and writes nothing. Raises a MergeToolError."""
    _check_method(recipe, methods)
    target, limits, _ = _check_request(recipe, out, memory_bytes, jobs, None, publishing)
    with Inputs(map(str, recipe.models), streaming, variant=recipe.options.variant) as inputs:
        check_target(target, inputs.paths)
        if read_samples and inputs.coming:
            prepare(recipe, inputs, target, limits, methods=methods).download.check_room()
            inputs.fetch()
        prepared = prepare(recipe, inputs, target, limits, methods=methods, read_samples=read_samples)
        is_by_range = inputs.coming and _why_by_range(prepared, inputs, overwrite=overwrite)
        return _by_range(prepared, inputs) if is_by_range else prepared


def plan_parts(
    recipe: Recipe,
    out: str | Path,
    num_parts: int,
    *,
    methods: Mapping[str, Method] = METHODS,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> PlanFile:
    """Plan a merge for `num_parts` workers, and begin its work folder in OUT, which they must all see. Reads headers,
    and a few bytes of local weights. Raises a MergeToolError."""
    from merge_tool.hosts.plan_file import make_plan_file
    from merge_tool.hosts.worker import share_plan

    watch = watch or Watch()
    _check_method(recipe, methods, is_shared=True)
    target, limits, _ = _check_request(recipe, out, None, None, None)
    if target.repo:
        raise RecipeError(f"{target.name}: many hosts need a folder that all of them see. Then: merge-tool push.")
    if target.is_file:
        raise RecipeError(f"{shown(out)}: is one file. Many hosts need a folder: give OUT without .safetensors.")
    with Inputs(map(str, recipe.models), variant=recipe.options.variant) as inputs:
        inputs.check_have_paths()
        check_target(target, inputs.paths)
        prepared = prepare(recipe, inputs, target, limits, methods=methods, read_samples=not inputs.coming)
        check_output(prepared, overwrite=overwrite)
    plan_file = make_plan_file(prepared, num_parts, overwrite=overwrite)
    watch.warn(prepared.warnings)
    with WorkFolder(
        target,
        prepared.plan,
        samples=prepared.samples,
        inputs=prepared.inputs,
        names=final_names(prepared),
        is_shared=True,
    ) as work:
        if _begin(prepared, work, overwrite=overwrite):
            raise OutputError(f"{shown(target.path)}: holds this merge already. Give --overwrite to merge again.")
        share_plan(plan_file, work.path, work.plan.labels)
    return plan_file


def finish_parts(
    plan_file: PlanFile,
    *,
    fill: bool = False,
    check: bool = False,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    watch: Watch | None = None,
) -> MergeReport:
    """Take the finished parts of a plan's workers, and complete and publish the merge: the same bytes as on one
    machine. With `fill` make what is missing; with `check` hash every shard again. Raises a MergeToolError."""
    plan_file.check_versions()
    out, here = Path(plan_file.out), Path.cwd()
    return merge_recipe(
        plan_file.recipe_again(),
        out.relative_to(here) if out.is_relative_to(here) and out != here else out,  # as a user would name it
        memory_bytes=memory_bytes,
        jobs=jobs,
        overwrite=plan_file.overwrite,
        check_resumed=check,
        watch=watch,
        plan_file=plan_file,
        fill=fill,
    )


def check_plan(prepared: Prepared, *, overwrite: bool = False) -> bool:
    """Whether OUT already holds this merge. Raises OutputError if OUT cannot take the output. For a dry run."""
    check_apart(prepared)
    with hub_of(prepared.target, None, prepared.plan.recipe, overwrite=overwrite) as hub:
        if hub is not None:
            return hub.check(prepared)
    if not overwrite and is_complete(prepared):
        return True
    check_room(prepared, overwrite=overwrite)
    return False


# ------------------------------------------------------------------------------------------- the steps


def _check_method(recipe: Recipe, methods: Mapping[str, Method], *, is_shared: bool = False) -> None:
    """Raise RecipeError for a method under a built-in one's name: a resumed merge, the report and `verify` go by the
    name. And for a method of the caller's if workers `share` the merge, which know the built-in ones."""
    name, builtin = recipe.method, METHODS.get(recipe.method)
    if methods.get(name) is builtin is not None:
        return
    if name not in methods:
        raise RecipeError(f"merge_method '{shown(name)}' is not known here. Give the recipe's own methods, too.")
    if builtin is not None:
        raise RecipeError(f"methods: '{shown(name)}' is a built-in method. Give yours a name of its own.")
    if is_shared:
        raise RecipeError(
            f"merge_method '{shown(name)}' is one of your own, which workers in other processes do not know. Merge "
            "without an executor."
        )


def _check_request(
    recipe: Recipe,
    out: str | Path,
    memory_bytes: int | None,
    jobs: int | None,
    report_path: str | Path | None,
    publishing: Publishing | None = None,
) -> tuple[Target, Machine, Path | None]:
    """The checks that need no model."""
    target, report = target_of(out, publishing), None if report_path is None else Path(report_path)
    if target.repo and len(recipe.outputs) > 1:
        raise RecipeError(
            f"{target.name}: is one repository, but there are {len(recipe.outputs)} outputs. Give one value, or a "
            "folder as OUT, then push each (merge-tool push)."
        )
    if target.is_file and len(recipe.outputs) > 1:
        raise RecipeError(f"{shown(out)}: is one file, but {len(recipe.outputs)} outputs need a folder.")
    paths = [part for ref in recipe.models for part in parts(str(ref))]
    inputs = [Path(part) for part in paths]
    check_no_input(target, paths)
    check_places(recipe)
    check_ids(recipe)
    check_target(target, inputs)
    if report is not None:
        check_report_path(report, len(recipe.outputs), target, inputs)
    return target, machine(memory_bytes, jobs), report


def _begin(prepared: Prepared, work: WorkFolder, *, overwrite: bool) -> bool:
    """Begin the work, under its lock. True if another run has finished the same merge meanwhile.

    Raises OutputError if OUT holds something else, and leaves OUT as it was.
    """
    resumed = work.begin(overwrite=overwrite)
    try:
        if not resumed and not overwrite and is_complete(prepared):
            work.discard()
            return True
        if not prepared.target.is_file:
            for label in prepared.plan.labels:
                check_conflicts(prepared.target.path / label, final_names(prepared))
    except OutputError:
        if not resumed:
            work.discard()
        raise
    return False


def _known(earlier: Path, prepared: Prepared) -> EarlierFindings | None:
    from merge_tool.output.known import EarlierFindings

    try:
        return EarlierFindings(earlier, prepared)
    except ValueError:
        return None


def _run_on(
    executor: Executor,
    num_parts: int,
    prepared: Prepared,
    work: WorkFolder,
    watch: Watch,
    *,
    overwrite: bool,
    memory_bytes: int | None,
    jobs: int | None,
) -> PlanFile:
    """Have the tasks of an executor make the parts that are not finished; returns their plan."""
    from merge_tool.hosts.engines import make_on
    from merge_tool.hosts.plan_file import make_plan_file
    from merge_tool.hosts.worker import share_plan

    plan_file = make_plan_file(prepared, num_parts, overwrite=overwrite)
    pieces = plan_file.pieces
    parts, path = share_plan(plan_file, work.path, work.plan.labels)
    missing = [number for number in parts.missing(range(len(pieces))) if pieces[number].shard not in work.done_shards]
    if watch.on_start is not None:
        watch.on_start(sum(pieces[number].read_bytes for number in missing))

    def on_piece(number: int) -> None:
        work.beat()
        if watch.on_progress is not None:
            watch.on_progress(pieces[number].read_bytes, plan_file.shards[pieces[number].shard][0])

    try:
        make_on(executor, path, parts, missing, on_piece=on_piece, memory_bytes=memory_bytes, jobs=jobs)
    except DataError:
        work.discard()
        raise
    return plan_file


def _named(e: OSError, prepared: Prepared) -> MergeToolError:
    """The error that names the file which the system refused: one of an input, or of OUT."""
    path = Path(e.filename) if isinstance(e.filename, str) else prepared.target.path
    source = next((source for source in prepared.inputs if path.is_relative_to(source)), None)
    return output_failed(path, e) if source is None else input_failed(path, e)
