"""Make what the larger demo trains on: SmolLM2-135M-Instruct, word problems, prose. make_data.py FOLDER [--seed N]

The problems are reasoning-gym's `gsm_symbolic`: 85 templates with worked answers. Held out are problems of the trained
templates (`skill_*.jsonl`) and all problems of some other templates (`new_skill_*.jsonl`). The prose is
Jane Austen, from Debian's r-cran-janeaustenr where apt-get can be had, else the manual that every CPython carries;
held out by chapters of it. Needs reasoning-gym and rdata.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2_model import convert_smollm2

PROBLEMS, HELD_OUT_TEMPLATES = 3000, 10  # templates for validation, and as many for the test
COUNTS = {"train": 2000, "validation": 40, "test": 40}
PARAGRAPHS = {"train": 1500, "validation": 24, "test": 24}
QUICK = {"train": 30, "validation": 4, "test": 4}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="Few problems: to try things out.")
def main(folder: Path, seed: int, quick: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder.parent / "smollm2/tokenizer.json").exists():
        convert_smollm2(folder.parent / "smollm2")
    problems, prose = split_problems(seed), split_prose(paragraphs(), seed)
    for split in COUNTS:
        most = QUICK[split] if quick else COUNTS[split]
        for kind in ("skill",) if split == "train" else ("skill", "new_skill"):
            write_rows(folder / f"{kind}_{split}.jsonl", problems[f"{kind}_{split}"][:most])
        most = QUICK[split] if quick else PARAGRAPHS[split]
        write_rows(folder / f"prose_{split}.jsonl", [{"text": text} for text in prose[split][:most]])


def split_problems(seed: int) -> dict[str, list[dict[str, str]]]:
    """Problems and worked answers: `skill_train`, `skill_validation`, `skill_test` of the trained templates, and
    `new_skill_validation`, `new_skill_test` of others. No problem is there twice. A template is known by its variables'
    names."""
    import reasoning_gym

    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=PROBLEMS, seed=seed)
    for number in range(PROBLEMS):
        row = dataset[number]
        problem = {"question": row["question"], "answer": row["metadata"]["answer_cot"]}
        found.setdefault(tuple(sorted(row["metadata"]["variables"])), {})[row["question"]] = problem
    return divide({template: list(problems.values()) for template, problems in found.items()}, seed)


def divide(found: Mapping[tuple[str, ...], list[dict[str, str]]], seed: int) -> dict[str, list[dict[str, str]]]:
    """The problems of each template -> the problems of each split."""
    templates = sorted(found)
    random.Random(seed).shuffle(templates)
    test, validation = templates[:HELD_OUT_TEMPLATES], templates[HELD_OUT_TEMPLATES:][:HELD_OUT_TEMPLATES]
    known, new_test, new_validation = (
        _shuffled([row for key in keys for row in found[key]], seed)
        for keys in (templates[2 * HELD_OUT_TEMPLATES :], test, validation)
    )
    first, second = COUNTS["test"], COUNTS["test"] + COUNTS["validation"]
    return {
        "skill_test": known[:first],
        "skill_validation": known[first:second],
        "skill_train": known[second:],
        "new_skill_test": new_test,
        "new_skill_validation": new_validation,
    }


def split_prose(texts: list[str], seed: int) -> dict[str, list[str]]:
    """Every paragraph in one split: runs of 20 neighbours, every tenth run for validation, every tenth for the test."""
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, text in enumerate(dict.fromkeys(texts)):
        found[{0: "validation", 5: "test"}.get(number // 20 % 10, "train")].append(text)
    return {split: _shuffled(part, seed) for split, part in found.items()}


def _shuffled(rows: list[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(rows, len(rows))


def paragraphs() -> list[str]:
    """Paragraphs of 300 to 1,200 characters of Austen's novels, or of the manual."""
    lines = austen_lines()
    if lines is None:
        print("notice: Debian's r-cran-janeaustenr cannot be had; the prose is CPython's manual", file=sys.stderr)
        lines = "\n".join(topics[name] for name in sorted(topics)).split("\n")
    joined = "\n".join(line.strip() for line in lines).split("\n\n")
    return [text for part in joined if 300 <= len(text := part.replace("\n", " ")) <= 1200]


def austen_lines() -> list[str] | None:
    """The lines of six novels; None where apt-get or the package is not to be had."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # apt-get may fetch as another user
        fetched = subprocess.run(
            ["apt-get", "download", "r-cran-janeaustenr"], cwd=name, capture_output=True, check=False
        )
        package = next(Path(name).glob("*.deb"), None)
        if fetched.returncode or package is None:
            return None
        subprocess.run(["dpkg-deb", "-x", package, name], check=True)
        return _read_novels(next(Path(name).rglob("data/Rdata.rdb")))


def _read_novels(database: Path) -> list[str]:
    """R's lazy-load format: an index (.rdx) of offsets and lengths; each block is 4 bytes, then a zlib stream."""
    import warnings

    import rdata

    def convert(raw: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it guesses the file's type, rightly
            return rdata.conversion.convert(rdata.parser.parse_data(raw))

    blocks, lines = database.read_bytes(), []
    variables = convert(database.with_suffix(".rdx").read_bytes())["variables"]
    for _, (offset, length) in sorted((str(novel), map(int, place)) for novel, place in variables.items()):
        lines += [str(line) for line in convert(zlib.decompress(blocks[offset + 4 : offset + length]))]
    return lines


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
