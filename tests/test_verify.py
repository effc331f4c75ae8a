"""`merge-tool verify`: what is as it was merged is said to be so, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import contents, language_model, save_file, save_model
from merge_tool import MergeToolError, merge
from merge_tool.cli import merge_tool
from merge_tool.verification.inspection import check_health
from merge_tool.verification.verify import verify
from oracle import float64_merge

SMALL = {"max_shard_bytes": 10_000}


def problems(out: Path, *parents: Path, **options: Any) -> list[str]:
    found = verify(out, tuple(parents) if parents else None, **options)  # type: ignore[arg-type]
    return [problem for one in found for problem in one.problems]


def resign(out: Path) -> None:
    """Write SHA256SUMS anew, as whoever changes a file would."""
    lines = []
    for name, content in sorted(contents(out).items()):
        if name != "SHA256SUMS":
            lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (out / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize(
    "options",
    [
        {},
        SMALL,
        {"t": [0.0, 0.3, 1.0]},
        {"method": "linear", "dtype": "float32"},
        {"files_from": "ft", **SMALL},
        {"t": 1.5, "extrapolate": True},
    ],
)
def test_what_was_merged_is_verified(tmp_path: Path, pair: tuple[Path, Path], options: Any) -> None:
    """Alone, by a sample, and in full; after the parents' folders got other names; and nothing is written."""
    merge(*pair, tmp_path / "out", **options)
    moved = [path.rename(tmp_path / f"other-{path.name}") for path in pair]
    before = contents(tmp_path)
    assert problems(tmp_path / "out") == []
    for full in (False, True):
        for one in verify(tmp_path / "out", (moved[0], moved[1]), full=full):
            assert one.problems == ()
            assert one.num_compared == one.num_elements == sum(a.size for a in language_model(0).values())
    assert contents(tmp_path) == before


def test_integers_equal_and_antiparallel_tensors_are_verified(tmp_path: Path) -> None:
    """Everything that is not simply combined: copies, masks of -inf, kept integers, refined sums, 8-bit floats."""
    x, y = language_model(0), language_model(1)
    x["mask"] = y["mask"] = np.full((3, 3), -np.inf, np.float32)
    x["ids"], y["ids"] = np.arange(5), np.arange(5) + 1
    x["flip"], y["flip"] = np.ones(300, np.float32), -np.ones(300, np.float32)
    x["short"], y["short"] = np.ones(300, np.float32), np.full(300, 1e-9, np.float32)
    x["zero"], y["zero"] = np.zeros(7, np.float32), np.ones(7, np.float32)
    x["none"] = y["none"] = np.zeros((0, 4), np.float32)
    x["eight"], y["eight"] = (np.arange(9, dtype=np.float32).astype(ml_dtypes.float8_e5m2) for _ in "xy")
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    merge(base, ft, tmp_path / "out", on_mismatch="base")
    for full in (False, True):
        assert problems(tmp_path / "out", base, ft, full=full) == []


def test_a_changed_byte_anywhere_is_found(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """One bit in each file of the output, at places of every kind."""
    merge(*pair, tmp_path / "out", **SMALL)
    chance = random.Random(0)
    for path in sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for place in {0, 7, len(whole) // 2, len(whole) - 1, chance.randrange(len(whole))}:
            damaged = bytearray(whole)
            damaged[min(place, len(whole) - 1)] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            assert problems(tmp_path / "out"), (path.name, place)
        path.write_bytes(whole[:-1])
        assert problems(tmp_path / "out"), (path.name, "cut")
        path.unlink()
        assert problems(tmp_path / "out") or path.name == "SHA256SUMS", (path.name, "gone")
        path.write_bytes(whole)
    assert problems(tmp_path / "out") == []


def test_fifty_problems_are_told_and_the_others_counted(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Sixty files that are gone, and the list of files, which is not as it was written."""
    merge(*pair, tmp_path / "out")
    with (tmp_path / "out/SHA256SUMS").open("a") as sums:
        sums.writelines(f"{'0' * 64}  gone-{k}\n" for k in range(60))
    found = problems(tmp_path / "out")
    assert len(found) == 51
    assert found[-1] == "and 11 more"


def test_weights_changed_and_signed_anew_are_found_against_the_parents(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The digests are right, the values are not: of a model this small every element is in the sample."""
    merge(*pair, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    resign(tmp_path / "out")
    assert problems(tmp_path / "out") == []
    for full in (False, True):
        (found,) = problems(tmp_path / "out", *pair, full=full)
        assert "model.safetensors" in found
        assert "is not the merge of these parents" in found


def edit_report(out: Path, edit: Any) -> None:
    """Change the report as its own writer would have written it."""
    path = out / "merge_report.json"
    lines = path.read_text().split("\n")
    start = lines.index(' "tensors": [') + 1
    head = json.loads("\n".join(lines[: start - 1]).rstrip(",") + "}")
    tensors = [json.loads(line.strip().rstrip(",")) for line in lines[start : lines.index(" ]")]]
    edit(head, tensors)
    body = ",\n".join("  " + json.dumps(tensor) for tensor in tensors)
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "tensors": [\n' + body + "\n ]\n}\n")
    resign(out)


def nested(depth: int) -> list[Any]:
    """A list in a list in a list, and so on."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


LIES: dict[str, Any] = {
    "a sum": lambda h, t: t[3]["sums"].update(xd=(float.fromhex(t[3]["sums"]["xd"]) * (1 + 2**-50)).hex()),
    "an angle": lambda h, t: t[3].update(angle_degrees=t[3]["angle_degrees"] * 1.01),
    "a weight": lambda h, t: t[3].update(weights=[0.5, 0.5]),
    "a norm": lambda h, t: t[3].update(norms=[t[3]["norms"][0], 1.0]),
    "equality": lambda h, t: t[3].update(equal=True, note="equal: copied"),
    "a note": lambda h, t: t[3].update(note="antiparallel: linear"),
    "its own t": lambda h, t: t[3].update(settings={"t": 0.7}),
    "where it is from": lambda h, t: t[3]["sources"].reverse(),
    "passes": lambda h, t: t[3].update(passes=[[(1.0).hex()]]),
    "the t": lambda h, t: h["parameters"].update(t=0.7),
    "the method": lambda h, t: h.update(method="linear"),
    "the pair's method": lambda h, t: h["words"].update(method="linear"),
    "a seed": lambda h, t: h["options"].update(seed=1),
    "a size": lambda h, t: h["shards"].update({"model.safetensors": 7}),
    "a parent": lambda h, t: h["inputs"]["ft"]["files"].clear(),
    "a digest": lambda h, t: h.update(plan_sha256="0" * 64),
    "a type": lambda h, t: h["options"].update(dtype="bfloat16"),
    "a sample": lambda h, t: h.update(samples_sha256=["0" * 64, "0" * 64]),
    "an order": lambda h, t: t.reverse(),
    "a tensor": lambda h, t: t.pop(),
    "a name": lambda h, t: t[0].update(name="evil\x1b[2J"),
    "a shape": lambda h, t: t[0].update(shape=[1]),
    "a name that is no name": lambda h, t: t[0].update(name=[1]),
    "sums that are no sums": lambda h, t: t[0].update(sums=3),
    "passes that are no passes": lambda h, t: t[0].update(passes={"a": 1}),
    "passes in passes": lambda h, t: t[0].update(passes=nested(800)),
    "options that are none": lambda h, t: h.update(options=[]),
    "no options": lambda h, t: h.pop("options"),
    "an option that is none": lambda h, t: h["options"].update({"\x1b": 1}),
    "no t": lambda h, t: h["parameters"].clear(),
    "a t that is none": lambda h, t: h["parameters"].update(t=[0.5]),
    "a method that is none": lambda h, t: h.update(method="\x1b[2J"),
    "a shard elsewhere": lambda h, t: h["shards"].update({"../base/model.safetensors": 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_report_that_lies_is_found_in_full(tmp_path: Path, pair: tuple[Path, Path], lie: str) -> None:
    """Each with a manifest that fits the lie."""
    merge(*pair, tmp_path / "out")
    edit_report(tmp_path / "out", lambda h, t: None)
    assert problems(tmp_path / "out", *pair, full=True) == []
    edit_report(tmp_path / "out", LIES[lie])
    try:
        found = problems(tmp_path / "out", *pair, full=True)
    except MergeToolError as e:
        found = [str(e)]
    assert found
    assert "\x1b" not in "".join(found)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{\n "tensors": [\n 3\n ]\n}\n', "[" * 9999])
def test_a_report_that_is_no_report_is_a_problem(tmp_path: Path, pair: tuple[Path, Path], text: str) -> None:
    merge(*pair, tmp_path / "out")
    (tmp_path / "out/merge_report.json").write_text(text)
    resign(tmp_path / "out")
    assert any("merge_report.json" in found for found in problems(tmp_path / "out", *pair, full=True))


def test_other_parents_are_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    swapped = "BASE and FT are swapped: what the report says of BASE is true of FT. Give --against FT BASE."
    assert problems(tmp_path / "out", pair[1], pair[0]) == [swapped]
    merge(pair[0], save_model(tmp_path / "like-base", language_model(3), shards=2), tmp_path / "alike")
    assert problems(tmp_path / "alike", tmp_path / "like-base", pair[0]) == [swapped]  # by a few values alone
    assert problems(tmp_path / "out", pair[1], pair[1]) == [
        "BASE: its files are not those that the report names (model-00001-of-00003.safetensors, "
        "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors are not in the report; "
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are missing); no element was compared.",
        "BASE: its weights are not those that were merged; no element was compared.",
    ]
    other = save_model(tmp_path / "x/ft", language_model(2), shards=3)
    assert problems(tmp_path / "out", pair[0], other) == [
        "FT: its weights are not those that were merged; no element was compared."
    ]


def test_one_changed_value_of_a_parent_is_found_in_full(tmp_path: Path) -> None:
    """Where the sampled bytes that tell parents apart are not touched."""
    x, y = language_model(0, vocab=3000), language_model(1, vocab=3000)
    base, ft = save_model(tmp_path / "base", x), save_model(tmp_path / "ft", y)
    merge(base, ft, tmp_path / "out")
    y["lm_head.weight"][5, 5] *= 2
    save_model(ft, y)
    assert any("lm_head.weight" in found for found in problems(tmp_path / "out", base, ft, full=True))


def test_files_that_do_not_belong_are_told(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Weights that the manifest does not list are a problem; other files are named."""
    merge(*pair, tmp_path / "out")
    (tmp_path / "out/thesis.txt").write_text("precious")
    (one,) = verify(tmp_path / "out")
    assert (one.problems, one.others) == ((), ("thesis.txt",))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "out/evil.safetensors")
    assert "evil.safetensors: weights or an index that SHA256SUMS does not list." in problems(tmp_path / "out")


def test_a_card_that_lies_is_found_unless_the_parents_were_renamed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The card names its parents, so it can be held against them only while their folders have those names."""
    merge(*pair, tmp_path / "out")
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text().replace("t = 0.5", "t = 0.4"))
    resign(tmp_path / "out")
    assert problems(tmp_path / "out") == []
    assert problems(tmp_path / "out", *pair) == ["README.md: is not the card of a merge of these parents."]


def test_side_files_and_index_are_held_against_the_parents(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", **SMALL)
    (tmp_path / "out/tokenizer.json").write_text("{ }")
    index = tmp_path / "out/model.safetensors.index.json"
    index.write_text(index.read_text().replace("total_size", "total_sizf"))
    resign(tmp_path / "out")
    found = problems(tmp_path / "out", *pair)
    assert [f.split(":")[0] for f in found] == ["tokenizer.json", "model.safetensors.index.json"]


def test_an_index_that_names_another_shard_is_found(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", **SMALL)
    index = tmp_path / "out/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.norm.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    resign(tmp_path / "out")
    assert "does not name exactly the shards' tensors" in problems(tmp_path / "out")[0]


def test_an_index_beside_a_single_file_is_found(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A loader may take it for the model's. Beside a one-file output, whose report is elsewhere, it is another's."""
    merge(*pair, tmp_path / "out")
    index = "model.safetensors.index.json"
    (tmp_path / "out" / index).write_text('{"weight_map": {}}')
    resign(tmp_path / "out")
    assert f"{index}: an index, although one file has all tensors." in problems(tmp_path / "out")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / index).write_text('{"weight_map": {}}')
    merge(*pair, tmp_path / "files/x.safetensors", report_path=tmp_path / "r.json")
    assert problems(tmp_path / "files/x.safetensors", report_path=tmp_path / "r.json") == []


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_hostile_outputs_neither_hang_nor_lead_away(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A pipe in place of each file, and links that lead out of the folder."""
    merge(*pair, tmp_path / "good")
    for name in ("SHA256SUMS", "merge_report.json", "model.safetensors", "config.json"):
        out = shutil.copytree(tmp_path / "good", tmp_path / f"pipe-in-{name}-place")
        (out / name).unlink()
        os.mkfifo(out / name)
        assert any("is not a regular file" in found for found in problems(out, *pair))
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "good" / name)
        assert any("outside the folder" in found for found in problems(out, *pair))
    (tmp_path / "good/SHA256SUMS").write_text(f"{'0' * 64}  ../base/config.json\nnonsense\n")
    assert "SHA256SUMS: is not as it was written: of 2 lines 0 are digests" in problems(tmp_path / "good")[0]


def test_unfinished_work_is_not_verified(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "out/.slerp-merge").mkdir(parents=True)
    with pytest.raises(MergeToolError, match="is not finished: run its command again"):
        verify(tmp_path / "out")
    merge(*pair, tmp_path / "done")
    (tmp_path / "done/.slerp-merge").mkdir()
    assert "unfinished merge" in problems(tmp_path / "done")[0]


def test_a_one_file_output_is_verified_with_its_report(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out, report = tmp_path / "x.safetensors", tmp_path / "r.json"
    merge(*pair, out, report_path=report)
    assert problems(out) == []
    assert [(one.num_files, one.nbytes) for one in verify(out)] == [(1, out.stat().st_size)]
    with pytest.raises(MergeToolError, match="Give the one of its merge: --report"):
        problems(out, *pair)
    for full in (False, True):
        assert problems(out, *pair, report_path=report, full=full) == []
    whole = bytearray(out.read_bytes())
    whole[-1] ^= 1
    out.write_bytes(whole)
    assert problems(out, *pair, report_path=report)


def test_sampled_tiles_of_a_large_tensor_are_the_merges_own(tmp_path: Path) -> None:
    """A tensor of several tiles, some of whose values are huge; and a part that was tampered with."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(600_001).astype(ml_dtypes.bfloat16)
    y = (x.astype(np.float32) + 0.1 * rng.standard_normal(600_001)).astype(ml_dtypes.bfloat16)
    x[400_000], y[400_000] = 3e38, 3e38
    base, ft = (save_model(tmp_path / n, {"a": v}) for n, v in (("base", x), ("ft", y)))
    merge(base, ft, tmp_path / "out")
    for share in (0.01, 0.5, 1.0):
        (one,) = verify(tmp_path / "out", (base, ft), sample=share)
        assert one.problems == ()
        assert 75_000 < one.num_compared <= max(131_072, 600_001 * share + 131_072)
    path = tmp_path / "out/model.safetensors"
    path.write_bytes(path.read_bytes()[:-400_000] + bytes(400_000))
    resign(tmp_path / "out")
    assert "is not the merge of these parents" in problems(tmp_path / "out", base, ft, sample=1.0)[0]


def run(*words: Any) -> Any:
    return CliRunner().invoke(merge_tool, [str(word) for word in words])


def test_the_command(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    merge(*pair, out, [0.3, 0.5])
    result = run("verify", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith(f"{out}/t-0.3: verified: 7 files, ")
    full = run("verify", out, "--against", *pair, "--full")
    assert "elements and all sums merged again, bit for bit the same" in full.stdout
    assert run("verify", out, "--against", *pair, "--sample", "50%").exit_code == 0
    found = json.loads(run("verify", out, "--json").stdout)
    assert [one["problems"] for one in found] == [[], []]
    (out / "t-0.5/config.json").write_text("{}")
    damaged = run("verify", out)
    assert damaged.exit_code == 1
    assert "t-0.5: config.json: its SHA-256 is " in damaged.stdout
    refused = run("verify", out, "--full")
    assert refused.exit_code == 2
    assert "give --against BASE FT, or for an output of `run` --recipe RECIPE." in refused.stderr
    assert run("verify", out, "--sample", "0%").exit_code == 2
    assert "no such file or folder" in run("verify", tmp_path / "none").stderr
    assert "is no output of slerp-merge" in run("verify", pair[0]).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_verifying_is_done_in_bounded_memory_and_without_torch(tmp_path: Path) -> None:
    """A pair of 200 MB, in full, in the least budget."""
    from test_memory import write_model

    shapes = {"a.norm": (512,), "b.embed": (25_000, 4_000)}
    base, ft = (write_model(tmp_path / f"{n}.safetensors", shapes, n) for n in (1, 2))
    merge(base, ft, tmp_path / "out")
    code = (
        "import sys; from merge_tool.verification.verify import verify; "
        "from merge_tool.plan.system_memory import peak_bytes; "
        "(one,) = verify(sys.argv[1], tuple(sys.argv[2:4]), full=True, memory_bytes=64_000_000); "
        "assert one.problems == () and one.num_compared == 100_000_512, one; "
        "assert not {'torch', 'transformers'} & sys.modules.keys(); print(peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out", base, ft], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64_000_000


# ------------------------------------------------------------------- schedules, choices, other names


def odd_pair(tmp_path: Path, **unlike: Any) -> tuple[Path, Path]:
    """Parents that share most tensors. BASE has some that no merge could take; `unlike` replaces FT's (None: lacks)."""
    x, y = language_model(0), language_model(1)
    x["odd.nan"] = y["odd.nan"] = np.full(70_001, np.nan, np.float32)
    x["odd.eight"] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    x["odd.ids"], x["odd.scalar"] = np.arange(10), np.array(-np.inf)
    x["odd.empty"] = np.zeros((0, 3))
    y |= {"odd.eight": np.zeros(3), "odd.ids": np.ones(10), "odd.extra": np.zeros(2)}
    y |= {name.replace("_", "."): value for name, value in unlike.items()}
    y = {name: value for name, value in y.items() if value is not None}
    return save_model(tmp_path / "base", x, shards=2), save_model(tmp_path / "ft", y, shards=3)


def wrapped_pair(tmp_path: Path, tied: str) -> tuple[Path, Path]:
    """Parents of which FT has a prefix on every name, and the side `tied` no output head."""
    x, y = language_model(0), {f"module.{name}": array for name, array in language_model(1).items()}
    if tied == "base":
        del x["lm_head.weight"]
    elif tied == "ft":
        del y["module.lm_head.weight"]
    return save_model(tmp_path / "base", x, shards=2), save_model(tmp_path / "ft", y)


RULES = ["self_attn=0,0.5,1", r"re:layers\.(1|2)\.=0.2", "*norm*=0.9,0.1"]
KEPT: dict[str, Any] = {"only": ["layers", "norm"], "exclude": "odd", "dtype": "float16"}
CHOSEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "a schedule": (lambda path: wrapped_pair(path, ""), {"t_for": RULES}),
    "a schedule beyond": (lambda path: wrapped_pair(path, ""), {"t_for": {"mlp": [-1, 1.5]}, "extrapolate": True}),
    "several t": (lambda path: wrapped_pair(path, ""), {"t": [0.2, 0.7], "t_for": RULES, **SMALL}),
    "only": (lambda path: wrapped_pair(path, ""), {"only": "mlp"}),
    "exclude": (odd_pair, {"exclude": ["odd.", "lm_head"]}),
    "both": (odd_pair, {**KEPT, "t_for": {"mlp": 0.1}, **SMALL}),
    "missing": (
        lambda path: odd_pair(path, odd_eight=None, odd_nan=None, odd_ids=None, odd_scalar=None, odd_empty=None),
        {"on_missing": "base"},
    ),
    "mismatch": (
        lambda path: odd_pair(
            path, odd_extra=None, odd_nan=np.zeros(3), odd_ids=np.ones(9, int), odd_scalar=np.ones(2),
            odd_empty=np.zeros(3),
        ),
        {"on_mismatch": "base"},
    ),
    "a prefix": (lambda path: wrapped_pair(path, ""), {}),
    "a head that BASE ties": (lambda path: wrapped_pair(path, "base"), {}),
    "a head that FT ties": (lambda path: wrapped_pair(path, "ft"), {"t_for": {"lm_head": 0.9}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHOSEN)
def test_what_was_chosen_is_chosen_again(tmp_path: Path, kind: str) -> None:
    """Alone, by a sample and in full: the report has all that makes the same plan, under other folder names too."""
    make, options = CHOSEN[kind]
    pair = make(tmp_path)
    merge(*pair, tmp_path / "out", **options)
    assert problems(tmp_path / "out") == []
    others = tuple(shutil.copytree(path, tmp_path / f"other-{path.name}") for path in pair)
    for base, ft in (pair, others):
        for full in (False, True):
            for one in verify(tmp_path / "out", (base, ft), sample=1.0, full=full):
                assert one.problems == ()
                assert one.num_compared == one.num_elements


def test_a_one_file_output_of_some_tensors_is_verified(tmp_path: Path) -> None:
    pair, out, report = odd_pair(tmp_path), tmp_path / "x.safetensors", tmp_path / "r.json"
    merge(*pair, out, report_path=report, t_for=RULES, **KEPT)
    for full in (False, True):
        assert problems(out, *pair, report_path=report, full=full) == []


@pytest.mark.parametrize("name", ["odd.ids", "odd.nan", "odd.eight", "lm_head.weight"])
def test_a_kept_tensor_is_held_against_the_bases_bytes(tmp_path: Path, name: str) -> None:
    """One bit of it, with the digests made anew; in a NaN it changes nothing but the payload."""
    pair = odd_pair(tmp_path)
    merge(*pair, tmp_path / "out", exclude=["odd.", "lm_head"])
    path = tmp_path / "out/model.safetensors"
    whole = bytearray(path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    whole[8 + length + json.loads(whole[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(whole)
    resign(tmp_path / "out")
    assert problems(tmp_path / "out") == []
    for full in (False, True):
        (found,) = problems(tmp_path / "out", *pair, full=full, sample=1.0)
        assert name in found
        assert "is not the merge of these parents" in found


def told(tensors: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(tensor for tensor in tensors if tensor["name"] == name)


CHOICES_THAT_LIE: dict[str, Any] = {
    "no rules": lambda h, t: h["words"].pop("t_for"),
    "another t of some": lambda h, t: h["words"].update(t_for=["mlp=0.2"]),
    "another order": lambda h, t: h["words"]["t_for"].reverse(),
    "a tensor's t": lambda h, t: told(t, "model.layers.1.mlp.up_proj.weight").update(settings={"t": 0.5}),
    "no choice": lambda h, t: h["options"].pop("exclude"),
    "another choice": lambda h, t: h["options"].update(exclude=["odd."]),
    "a wider choice": lambda h, t: h["options"].update(exclude=["odd.", "lm_head", "mlp"]),
    "a narrower one": lambda h, t: h["options"].update(only=["mlp"]),
    "missing ones": lambda h, t: h["options"].update(on_missing="base"),
    "a kept one that is equal": lambda h, t: told(t, "lm_head.weight").update(equal=True, note="equal: copied"),
    "a kept one that differs": lambda h, t: told(t, "lm_head.weight").update(note="differs: base kept"),
    "a kept one's reason": lambda h, t: told(t, "lm_head.weight").update(note="not in all models: base kept"),
    "a kept one's t": lambda h, t: told(t, "lm_head.weight").update(settings={"t": 0.5}),
    "a kept one's sums": lambda h, t: told(t, "lm_head.weight").update(sums=told(t, "model.norm.weight")["sums"]),
    "a merged one that is kept": lambda h, t: told(t, "model.norm.weight").update(note="differs: base kept"),
    "another name in FT": lambda h, t: told(t, "model.norm.weight")["sources"][1].update(name="norm.weight"),
    "rules that are none": lambda h, t: h["words"].update(t_for=3),
    "numbers as rules": lambda h, t: h["words"].update(t_for=[3]),
    "a rule without a t": lambda h, t: h["words"].update(t_for=["mlp"]),
    "no pattern": lambda h, t: h["options"].update(only=[3]),
    "a pattern that is none": lambda h, t: h["options"].update(exclude=["re:(\x1b[2J"]),
    "lists in a list": lambda h, t: h["options"].update(exclude=[["odd."]]),
    "a word that is none": lambda h, t: h["options"].update(on_missing=["\x1b"]),
}


@pytest.mark.parametrize("lie", CHOICES_THAT_LIE)
def test_choices_that_lie_are_found(tmp_path: Path, lie: str) -> None:
    """By a sample as in full, each with digests that fit the lie."""
    pair = odd_pair(tmp_path)
    merge(*pair, tmp_path / "out", t_for=["mlp=0.1", "layers.1.=0.9"], exclude=["odd.", "lm_head"])
    edit_report(tmp_path / "out", lambda h, t: None)
    assert problems(tmp_path / "out", *pair) == []
    edit_report(tmp_path / "out", CHOICES_THAT_LIE[lie])
    for full in (False, True):
        try:
            found = problems(tmp_path / "out", *pair, full=full)
        except MergeToolError as e:
            found = [str(e)]
        assert found
        assert "\x1b" not in "".join(found)


# --------------------------------------------------------------------------------------------- health


@given(st.lists(st.floats(width=32), min_size=0, max_size=20), st.sampled_from(["f4", "f8", "f2"]))
@settings(max_examples=60, deadline=None)
def test_health_is_what_numpy_says(tmp_path_factory: Any, values: list[float], dtype: str) -> None:
    with np.errstate(over="ignore"):
        array = np.array(values, dtype)
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    save_file({"a": array, "ids": np.arange(3)}, path)
    (found,) = check_health(path)
    wide = array.astype(np.float64)
    good = wide[np.isfinite(wide)]
    assert found.num_nonfinite == len(wide) - len(good)
    assert found.first_nonfinite == (int(np.flatnonzero(~np.isfinite(wide))[0]) if len(good) < len(wide) else None)
    if len(wide):
        assert found.largest == np.abs(good).max(initial=0)
        assert found.norm == pytest.approx(np.linalg.norm(good), rel=1e-12)
        assert found.rms == pytest.approx(np.linalg.norm(good) / np.sqrt(len(wide)), rel=1e-12)


def test_health_of_large_tensors_and_of_a_float64s_ends(tmp_path: Path) -> None:
    values = np.linspace(-1, 2, 300_000)
    save_file({"a": values, "big": np.full(4, 1e300), "tiny": np.full(4, 1e-300)}, tmp_path / "x.safetensors")
    found = {tensor.name: tensor for tensor in check_health(tmp_path / "x.safetensors")}
    assert found["a"].norm == pytest.approx(np.linalg.norm(values), rel=1e-12)
    assert found["big"].norm == pytest.approx(2e300, rel=1e-12)
    assert found["tiny"].norm == pytest.approx(2e-300, rel=1e-12)


def test_inspect_health(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = run("inspect", pair[0], "--health")
    assert result.exit_code == 0
    count = sum(a.size for a in language_model(0).values())
    assert f"all {count:,} floating-point values are finite" in result.stdout
    assert "largest root mean square" in result.stdout
    bad = language_model(0)
    bad["model.norm.bias"][3] = float("nan")
    save_model(tmp_path / "bad", bad)
    result = run("inspect", tmp_path / "bad", "--health")
    assert result.exit_code == 1
    assert "NOT FINITE: model.norm.bias: 1 of 32 values, the first at 3" in result.stdout
    found = json.loads(run("inspect", tmp_path / "bad", "--health", "--json").stdout)
    assert found["num_nonfinite"] == 1


def test_the_reports_weights_give_the_merge(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The oracle's word that what `verify` calls right is right."""
    from checkpoints import load_folder

    merge(*pair, tmp_path / "out", 0.3, dtype="float32")
    merged = load_folder(tmp_path / "out")
    for name, x in language_model(0).items():
        expected = float64_merge(x, language_model(1)[name], 0.3)
        assert np.abs(merged[name] - expected).max() < 1e-7


def test_outputs_mutated_and_signed_anew_are_found_in_full(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Whatever was changed in whatever file, the card apart: never a crash, always a problem."""
    from fuzzing import mutated

    merge(*pair, tmp_path / "out", **SMALL)
    chance, whole = random.Random(5), contents(tmp_path / "out")
    for number in range(60):
        name = chance.choice([n for n in whole if n != "README.md"])
        changed = mutated(whole[name], chance)
        (tmp_path / "out" / name).write_bytes(changed)
        if number % 2 and name != "SHA256SUMS":
            resign(tmp_path / "out")
        if changed != whole[name]:
            try:
                assert problems(tmp_path / "out", *pair, full=True), (name, number)
            except MergeToolError as e:
                assert str(e)  # noqa: PT017 - a refusal is as good
        for other, content in whole.items():
            (tmp_path / "out" / other).write_bytes(content)


def test_a_pattern_that_never_ends_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report's regular expression is a stranger's: nothing hangs for it."""
    monkeypatch.setattr("merge_tool.plan.patterns._MATCH_SECONDS", 2)
    merge(*pair, tmp_path / "out", exclude=["lm_head"])
    edit_report(tmp_path / "out", lambda h, t: h["options"].update(exclude=[r"re:^(\w+\.?)+#$"]))
    with pytest.raises(MergeToolError, match="take longer than 2 s"):
        problems(tmp_path / "out", *pair)
    edit_report(tmp_path / "out", lambda h, t: h["options"].update(exclude=["re:lm_head"]))
    assert all("take longer" not in problem for problem in problems(tmp_path / "out", *pair))
