"""What lies in the draft of a merge on the Hub or in a bucket beside its shards, until it is published: the plan, and a
receipt for each shard. Texts only; a stranger may have written them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_tool.models.side_files import WORK
from merge_tool.output.versions import versions
from merge_tool.output.work_folder import is_same_merge
from merge_tool.plan.plan import ShardPlan
from merge_tool.run.findings import Findings, from_record, to_record

FOLDER = WORK
PLAN = f"{FOLDER}/plan.json"
_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Receipt:
    """A shard of the draft: its SHA-256, and what was found of its tensors."""

    sha256: str
    findings: Findings


def receipt_name(file_name: str) -> str:
    return f"{FOLDER}/{file_name}.json"


def draft_digest(record: Mapping[str, Any], asked_shard_bytes: int) -> str:
    """16 digits for a merge, the same on every machine: what decides its bytes, with samples of its inputs. Of the size
    of shards what was asked for: a small disk may make it smaller. `record` is the journal's (`plan_record`)."""
    facts = {**record["facts"], "max_shard_bytes": asked_shard_bytes}
    content = {"facts": facts, "samples": record["samples"], "commits": record["commits"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def plan_text(record: Mapping[str, Any]) -> str:
    return json.dumps({"format": _FORMAT, "versions": versions(), "record": record}, sort_keys=True)


def shard_bytes_of(plan: str | None) -> int | None:
    """The size of shards that the plan of a draft has; None if that is no plan."""
    most = _parsed(plan or "").get("record", {}).get("facts", {}).get("max_shard_bytes")
    return most if isinstance(most, int) and most > 0 else None


def differences_of(plan: str, record: Mapping[str, Any]) -> str:
    """Why the shards of a draft cannot be kept, in words; nothing if they can."""
    stored = _parsed(plan)
    if stored.get("format") != _FORMAT:
        return "it was not begun by this version"
    now, then = versions(), stored.get("versions", {})
    if changed := [f"{name} was {then.get(name)}, is {now[name]}" for name in now if now[name] != then.get(name)]:
        return "; ".join(changed)
    try:
        is_same = is_same_merge(stored["record"], record)
    except (KeyError, TypeError, AttributeError):
        return "its plan is damaged"
    return "" if is_same else "local inputs have other times than they had then"


def receipt_text(plan: str, shard: ShardPlan, sha256: str, findings: Findings) -> str:
    records = {str(number): to_record(findings[number]) for number in sorted(findings)}
    head = {"plan_sha256": _sha256(plan), "file": shard.file_name, "size": shard.size, "sha256": sha256}
    return json.dumps({**head, "findings": records})


def read_receipt(text: str, plan: str, shard: ShardPlan) -> Receipt | None:
    """The receipt of a shard; None for anything else, for one of another plan, and for one that lacks a tensor."""
    stored, findings = _parsed(text), Findings()
    expected = {"plan_sha256": _sha256(plan), "file": shard.file_name, "size": shard.size}
    digest = stored.get("sha256")
    if any(stored.get(key) != value for key, value in expected.items()) or not isinstance(digest, str):
        return None
    try:
        records = {int(number): from_record(record) for number, record in stored["findings"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if records.keys() != {job.number for job in shard.jobs} or not _DIGEST.fullmatch(digest):
        return None
    for number in sorted(records):
        findings.add(number, records[number])
    return Receipt(digest, findings)


def _parsed(text: str) -> dict[str, Any]:
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    is_right = isinstance(stored, dict) and isinstance(stored.get("record", {}), dict)
    return stored if is_right and isinstance(stored.get("record", {}).get("facts", {}), dict) else {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
