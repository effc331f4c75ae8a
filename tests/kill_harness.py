"""kill -9 at random moments of a merge, then the same command again: `python tests/kill_harness.py --moments 200`.

Half of the moments lie in the publishing, which is short. After each kill nothing in OUT may look like a finished
model while it is not one (with --transformers that library is asked), and nothing lies beside OUT; after the second
run the bytes are those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

from checkpoints import contents, language_model, save_model

COMMAND = [sys.executable, "-m", "merge_tool", "merge"]
VARIANTS: list[list[str]] = [
    ["--t", "0.5", "--max-shard-size", "400kB", "--jobs", "2"],
    ["--t", "0.3,0.6", "--max-shard-size", "300kB", "--jobs", "3"],
    ["--t", "0.5", "--jobs", "1"],
    ["--t", "0.2,0.4,0.8", "--jobs", "4", "--overwrite"],
    ["--t", "0.5", "--max-shard-size", "200kB", "--jobs", "2", "--overwrite"],
]


def outputs(out: Path) -> list[Path]:
    return [out, *sorted(p for p in out.glob("t-*") if p.is_dir())] if out.exists() else []


def looks_finished(folder: Path, *, transformers: bool) -> bool:
    """Whether a loader finds a model there: by its one file or its index, all of whose shards open."""
    from safetensors import SafetensorError, safe_open

    if transformers:
        from transformers import AutoModelForCausalLM

        with contextlib.suppress(Exception):
            AutoModelForCausalLM.from_pretrained(folder)
            return True
        return False
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = [single.name] if single.exists() else []
    if not names and index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    try:
        for name in names:
            with safe_open(str(folder / name), framework="numpy") as opened:
                opened.keys()
    except (OSError, SafetensorError):
        return False
    return bool(names)


def old_output(out: Path, pair: list[str]) -> dict[str, bytes]:
    subprocess.run([*COMMAND, *pair, str(out), "--t", "0.9", "--quiet"], check=True, capture_output=True)
    return contents(out)


def killed(command: list[str], out: Path, chance: random.Random, seconds: float, *, publishing: bool) -> str:
    """Start the command, kill it at a random moment; says where that was."""
    journal = out / ".slerp-merge/journal.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = b'"record": "publish"' if publishing else b""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if wanted in journal.read_bytes():
                break
    time.sleep(chance.random() * seconds)
    process.kill()
    code = process.wait()
    if code == 0:
        return "finished"
    with contextlib.suppress(OSError):
        return "publishing" if b'"record": "publish"' in journal.read_bytes() else "merging"
    return "before or after the journal"


def run(moments: int, seed: int, pair: tuple[Path, Path], root: Path, *, transformers: bool) -> Counter[str]:
    """Kill `moments` merges; raises AssertionError at the first that loses something."""
    chance, found = random.Random(seed), Counter[str]()
    words = [str(path) for path in pair]
    whole: dict[int, dict[str, bytes]] = {}
    taken: dict[int, float] = {}
    for number, variant in enumerate(VARIANTS):
        started = time.monotonic()
        subprocess.run([*COMMAND, *words, str(root / "whole"), *variant], check=True, capture_output=True)
        taken[number] = time.monotonic() - started
        whole[number] = contents(root / "whole")
        shutil.rmtree(root / "whole")
    for moment in count():
        if sum(n for where, n in found.items() if where != "finished") >= moments:
            break
        number = moment % len(VARIANTS)
        variant, out = VARIANTS[number], root / "place/out"
        out.parent.mkdir()
        old = old_output(out, words) if "--overwrite" in variant else {}
        publishing = moment % 2 == 1
        command = [*COMMAND, *words, str(out), *variant]
        found[killed(command, out, chance, 0.012 if publishing else taken[number] / 2, publishing=publishing)] += 1
        check_left(out, whole[number], old, f"moment {moment}", transformers=transformers)
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 0, (moment, variant, again.stderr)
        assert contents(out) == whole[number], (moment, variant)
        assert [p.name for p in out.parent.iterdir()] == ["out"], (moment, variant)
        shutil.rmtree(out.parent)
    return found


def check_left(out: Path, whole: dict[str, bytes], old: dict[str, bytes], where: str, *, transformers: bool) -> None:
    assert {p.name for p in out.parent.iterdir()} <= {"out"}, where
    for folder in outputs(out):
        if not looks_finished(folder, transformers=transformers):
            continue
        there = {n: d for n, d in contents(folder).items() if not n.startswith((".slerp-merge/", "t-"))}
        label = "" if folder == out else f"{folder.name}/"
        expected = {n.removeprefix(label): d for n, d in whole.items() if n.startswith(label)}
        weights = {n for n in there if n.endswith((".safetensors", ".index.json"))}
        new = all(there.get(n) == d for n, d in expected.items()) and expected
        is_old = bool(old) and all(there[n] == old.get(n) for n in weights)
        assert new or is_old, f"{where}: {folder} looks finished and is neither the old model nor the new one"


def signal_times(number: int, seed: int, root: Path) -> list[float]:
    """Seconds from SIGINT or SIGTERM, at random moments of a merge of 2 x 400 MB, to the end of the process."""
    from test_memory import write_model

    chance, taken = random.Random(seed), []
    shapes = {f"layers.{n}.weight": (5000, 4000) for n in range(10)}
    base, ft = (str(write_model(root / f"{n}.safetensors", shapes, n)) for n in (1, 2))
    while len(taken) < number:
        out = root / "signalled"
        command = [*COMMAND, base, ft, str(out), "--max-shard-size", chance.choice(["100MB", "5GB"])]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (out / ".slerp-merge/journal.jsonl").exists():
            time.sleep(0.001)
        time.sleep(chance.random() * 2)
        which, code = chance.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
        begun = time.monotonic()
        process.send_signal(which)
        said = process.communicate()[1]
        if process.returncode != 0:
            taken.append(time.monotonic() - begun)
            assert process.returncode == code, said
            assert "Run the same command to continue." in said
        shutil.rmtree(out)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--signals", type=int, default=0, help="measure how fast so many signals end a merge instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transformers", action="store_true", help="ask transformers whether OUT is a model")
    options: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.signals:
            taken = sorted(signal_times(options.signals, options.seed, root))
            print(f"{len(taken)} signals: median {taken[len(taken) // 2]:.2f} s, longest {taken[-1]:.2f} s")
            return
        found = run(
            options.moments,
            options.seed,
            make_pair(root, options.transformers),
            root,
            transformers=options.transformers,
        )
    print(f"{options.moments} kills, all resumed to the same bytes: {dict(found)}")


def make_pair(root: Path, transformers: bool) -> tuple[Path, Path]:
    if not transformers:
        side = {"tokenizer.json": "{}", "sub/chat.jinja": "{{ x }}"}
        sizes: dict[str, Any] = {"layers": 6, "hidden": 96, "vocab": 800}
        return (
            save_model(root / "base", language_model(0, **sizes), shards=2, side_files=side),
            save_model(root / "ft", language_model(1, **sizes), shards=3, side_files=side),
        )
    import torch
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=800,
    )
    for seed, name in enumerate(("base", "ft")):
        torch.manual_seed(seed)
        StableLmForCausalLM(config).save_pretrained(root / name)
    return root / "base", root / "ft"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
