"""A planned merge -> a repository of the Hub or a folder of a bucket: run, upload shard by shard, publish."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from merge_tool.errors import listed
from merge_tool.models.inputs import Inputs
from merge_tool.output.carrying_out import FLUSH_BYTES, MAY_SHARE, carry_out, read_ahead, say_what_is_done
from merge_tool.output.complete import check_room, final_names
from merge_tool.output.completing import earlier_report, report_of, write_report, write_side_files
from merge_tool.output.hub_folder import HubFolder, remove_work
from merge_tool.output.hub_output import HubOutput
from merge_tool.output.merge_report import MergeReport, Watch
from merge_tool.output.report import alarms, report_lines, summarise
from merge_tool.output.work_folder import WorkFolder
from merge_tool.plan.prepare import Prepared
from merge_tool.plan.system_memory import under_pressure
from merge_tool.run.run import progress_bytes
from merge_tool.run.work import check_exact_tensors


def merge_to_hub(
    prepared: Prepared,
    hub: HubOutput,
    inputs: Inputs,
    watch: Watch,
    report: Path | None,
    started: float,
    *,
    check_resumed: bool,
) -> MergeReport:
    """Run, and upload shard by shard; then publish."""
    watch.warn(hub.warnings)
    if (stored := hub.published(prepared) or hub.in_draft(prepared)) is not None:
        done = earlier_report(prepared, report, started, stored.report)
        done = replace(done, url=hub.url, **hub.publish_stored(stored))
        if os.path.lexists(prepared.target.work):  # of a run that was ended while it published
            with _waiting_room(prepared) as folder:
                remove_work(folder)
        return done
    check_room(prepared, overwrite=False)
    check_exact_tensors(prepared.plan)
    with _waiting_room(prepared, check_resumed=check_resumed) as folder, HubFolder(folder, hub, watch.on_note) as work:
        if folder.may_share:
            watch.warn([MAY_SHARE])
        work.begin(prepared)
        num_resumed = len(work.done_shards)
        say_what_is_done(prepared, work, watch)
        read_ahead(inputs, prepared, work)
        carry_out(prepared, work, watch)
        inputs.end_downloads()
        work.await_uploads()
        findings = work.findings()
        summary = summarise(prepared.plan, findings)
        write_side_files(prepared, work, findings, summary)
        if report is not None:
            write_report(prepared, report, report_lines(prepared.plan, findings, 0, prepared.samples))
        others = work.publish()
    if others:
        watch.warn([f"{prepared.target.name} also holds what was there before: {listed(others, 50)}."])
    watch.warn(alarms(summary))
    return replace(
        report_of(prepared, summary, started),
        moved_bytes=progress_bytes(prepared.plan, work.done_shards),
        num_resumed=num_resumed,
        url=hub.url,
        pull_request=work.number,
        is_published=hub.publishing.publishes,
        uploaded_bytes=work.uploaded_bytes,
    )


def _waiting_room(prepared: Prepared, *, check_resumed: bool = False) -> WorkFolder:
    """The folder where shards wait for their upload."""
    return WorkFolder(
        prepared.target,
        prepared.plan,
        samples=prepared.samples,
        flush_bytes=FLUSH_BYTES if under_pressure(prepared.budget) else None,
        check_resumed=check_resumed,
        inputs=prepared.inputs,
        names=final_names(prepared),
        is_shared=True,
    )
