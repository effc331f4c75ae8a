"""Mutation testing: change one place in the kernel of merge_tool, run the tests that execute it: does one fail?

    python tests/mutants.py --count 200 --seed 1      # `make mutants` installs coverage and runs this

Each mutant runs the tests of its line (executed_lines.py knows them), the fastest first, until one fails, in a copy of
the tree. Not mutmut: it rewrites every function, which the tests of imports, of signatures and of other processes see.
Not cosmic-ray: it runs the same tests for every mutant.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from executed_lines import recorded, run_pytest, tests_of

ROOT = Path(__file__).parents[1]
KERNEL = """
methods/* run/* verification/* models/renaming models/naming models/low_rank models/lora
checkpoint/reader checkpoint/source checkpoint/header checkpoint/fp8 checkpoint/quantised checkpoint/grid
checkpoint/ranges checkpoint/strided checkpoint/writer checkpoint/unpickle
vocabulary/rows vocabulary/row_plan vocabulary/align plan/layout plan/memory plan/fit plan/plan
output/work_folder output/journal output/complete
"""
MOST_SECONDS = 8.0, 8.0, 16.0  # of tests in each run of pytest for a mutant, by the times of the recording

OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip


class Mutant(NamedTuple):
    module: str  # path from the root
    line: int
    lines: tuple[int, int]  # that a test must execute: first, last
    start: int  # bytes of the file
    stop: int
    before: str
    after: str


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Each small fault in one node: the part of it that is replaced, and by what."""

    def edited(**fields: Any) -> str:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return f"({ast.unparse(other)})" if isinstance(node, ast.expr) else ast.unparse(other)

    match node:
        case ast.Compare(ops=[op]):
            yield node, edited(ops=[OTHER[type(op)]()])
        case ast.BoolOp(op=op):
            yield node, edited(op=OTHER[type(op)]())
        case ast.BinOp(left=ast.Constant(value=str())) | ast.BinOp(right=ast.Constant(value=str()) | ast.JoinedStr()):
            pass  # a text or a path
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OTHER:
            yield node, edited(op=OTHER[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool() as value):
            yield node, str(not value)
        case ast.Constant(value=int() | float() as number):
            yield node, f"{number + 1!r}"
    match node:
        case ast.If(test=ast.UnaryOp(op=ast.Not())) | ast.IfExp(test=ast.UnaryOp(op=ast.Not())):
            pass  # it loses its `not`
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
            yield test, f"(not ({ast.unparse(test)}))"
        case ast.With(items=[ast.withitem(context_expr=what, optional_vars=None)]):
            yield what, "__import__('contextlib').nullcontext()"
        case ast.Continue() | ast.Break() | ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but types, decorators, texts and messages."""
    yield tree
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.operand, ast.Constant):
        return  # -1 becomes 1, not -2, which is often the same
    if isinstance(tree, ast.keyword) and tree.arg == "strict":
        return  # of zip: a check of ourselves
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "exc") or isinstance(tree, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes(child)


def mutants_of(path: Path) -> Iterator[Mutant]:
    raw = path.read_bytes()
    starts = [0]
    for text in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    tree = ast.parse(raw)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {n for f in functions for n in range(f.body[0].lineno, (f.end_lineno or 0) + 1)}
    for node in nodes(tree):
        for part, after in changes(node):
            place: Any = part
            start = starts[place.lineno - 1] + place.col_offset
            stop = starts[place.end_lineno - 1] + place.end_col_offset
            module = path.relative_to(ROOT).as_posix()
            lines = (place.lineno, place.end_lineno) if place.lineno in inside else (1, len(starts))
            yield Mutant(module, place.lineno, lines, start, stop, raw[start:stop].decode(), after)


def kernel() -> list[Path]:
    return sorted(p for name in KERNEL.split() for p in (ROOT / "merge_tool").glob(f"{name}.py"))


def batches(found: dict[str, float]) -> list[dict[str, float]]:
    """The fastest tests: of the three files with most of them, as few files are read fast; of six more; the others."""
    files = [file for file, _ in Counter(name.partition("::")[0] for name in found).most_common()]
    runs: list[dict[str, float]] = []
    for most, some in zip(MOST_SECONDS, (files[:3], files[:9], files), strict=True):
        left = {n: s for n, s in found.items() if n.partition("::")[0] in some and not any(n in run for run in runs)}
        runs += [within(most, left)] if left else []
    return runs


def within(most: float, found: dict[str, float]) -> dict[str, float]:
    """As many of them as take so many seconds, or one."""
    ends = list(itertools.accumulate(found.values()))
    return {name: found[name] for name, end in zip(found, ends, strict=True) if end <= max(most, ends[0])}


def survives(mutant: Mutant, tree: Path, chosen: dict[str, float], stamp: int) -> bool:
    """Whether all chosen tests pass with the mutant in place."""
    path, place = tree / mutant.module, tree.parent / "chosen"
    raw = path.read_bytes()
    place.write_text(json.dumps([*chosen]))
    files = sorted({name.partition("::")[0] for name in chosen})
    try:
        path.write_bytes(raw[: mutant.start] + mutant.after.encode() + raw[mutant.stop :])
        os.utime(path, (stamp, stamp))  # a time of its own, or an older .pyc would do
        status = run_pytest(tree, ["-x", *files], 30 + 4 * sum(chosen.values()), MUTANTS_CHOSEN=str(place))
    finally:
        path.write_bytes(raw)
    assert status != pytest.ExitCode.NO_TESTS_COLLECTED, (mutant, files)
    return status == pytest.ExitCode.OK


def main() -> None:
    parser = argparse.ArgumentParser(description="How many small faults in the kernel are caught by a test?")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes that record; mutants run one by one")
    parser.add_argument("--only", default="", help="mutants whose file:line matches this regular expression")
    options = parser.parse_args()
    everything = [m for path in kernel() for m in mutants_of(path) if re.search(options.only, f"{m.module}:{m.line}")]
    sample = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        records = recorded(tree, ROOT / "runs" / "mutants", options.jobs)
        caught = 0
        for number, mutant in enumerate(sorted(sample), 1):
            found = tests_of(mutant.module, *mutant.lines, records)
            runs = batches(found)
            stamps = itertools.count(1_000_000_000 + 10 * number)
            alive = all(survives(mutant, tree, run, stamp) for run, stamp in zip(runs, stamps, strict=False))
            caught += not alive
            where = f"{mutant.module}:{mutant.line}"
            if alive:
                print(f"{where}: survives {sum(map(len, runs))} of the {len(found)} tests that execute it")
                print(f"  - {mutant.before}\n  + {mutant.after}")
            print(f"{number}/{len(sample)}: {caught} caught ({caught / number:.0%}), {where}", flush=True)


if __name__ == "__main__":
    main()
