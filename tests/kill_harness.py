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
from string import Formatter
from typing import Any

from checkpoints import CONFIG, contents, language_model, save_model
from test_lora import normal, save_adapter
from test_vocab import tokenizer

COMMAND = [sys.executable, str(Path(__file__).with_name("small_shards.py"))]
# Words in braces are inputs; a kind of merge whose inputs are not there is left out.
VARIANTS = [
    "merge {base} {ft} {out} --t 0.5 --max-shard-size 400kB --jobs 2",
    "merge {base} {ft} {out} --t 0.3,0.6 --max-shard-size 300kB --jobs 3",
    "merge {base} {ft} {out} --t 0.5 --jobs 1",
    "merge {base} {ft} {out} --t 0.2,0.4,0.8 --jobs 4 --overwrite",
    "merge {base} {ft} {out} --t 0.5 --max-shard-size 200kB --jobs 2 --overwrite",
    "run {recipe} {out} --max-shard-size 300kB --seed 3 --only self_attn --only embed --jobs 2",
    "run {recipe} {out} --set lambda=0.5,1 --only self_attn --max-shard-size 400kB --jobs 2 --overwrite",
    "merge {base} {other} {out} --vocab union --pad-vocab-to-multiple-of 64 --max-shard-size 400kB",
    "merge {base} {adapter} {out} --t 1 --max-shard-size 400kB --overwrite",
]
RECIPE = """
merge_method: dare_ties
base_model: {base}
models:
  - {{model: {ft}, parameters: {{weight: 0.5, density: 0.6}}}}
  - {{model: {other}, parameters: {{weight: 0.5, density: 0.3}}}}
tokenizer_source: union
chat_template: chatml
"""
Inputs = dict[str, Path]


SEVERAL = ("t-", "lambda-")  # how the folders of several outputs begin


def outputs(out: Path) -> list[Path]:
    return [out, *sorted(p for p in out.iterdir() if p.name.startswith(SEVERAL))] if out.exists() else []


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


def variants(inputs: Inputs) -> list[str]:
    there = {"out", *inputs}
    return [text for text in VARIANTS if {name for _, name, _, _ in Formatter().parse(text) if name} <= there]


def command_of(variant: str, inputs: Inputs, out: Path) -> list[str]:
    return [*COMMAND, *(word.format(out=out, **inputs) for word in variant.split())]


def old_output(inputs: Inputs, out: Path) -> dict[str, bytes]:
    command = command_of("merge {base} {ft} {out} --t 0.9 --quiet", inputs, out)
    subprocess.run(command, check=True, capture_output=True)
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


def run(moments: int, seed: int, inputs: Inputs, root: Path, *, transformers: bool) -> Counter[str]:
    """Kill `moments` merges; raises AssertionError at the first that loses something."""
    chance, found, kinds = random.Random(seed), Counter[str](), variants(inputs)
    whole: dict[str, dict[str, bytes]] = {}
    taken: dict[str, float] = {}
    for variant in kinds:
        started = time.monotonic()
        subprocess.run(command_of(variant, inputs, root / "whole"), check=True, capture_output=True)
        taken[variant] = time.monotonic() - started
        whole[variant] = contents(root / "whole")
        shutil.rmtree(root / "whole")
    for moment in count():
        if sum(n for where, n in found.items() if where != "finished") >= moments:
            break
        variant, out = kinds[moment % len(kinds)], root / "place/out"
        out.parent.mkdir()
        old = old_output(inputs, out) if "--overwrite" in variant else {}
        publishing = (moment + moment // len(kinds)) % 2 == 1  # of each kind every other one
        command = command_of(variant, inputs, out)
        found[killed(command, out, chance, 0.012 if publishing else taken[variant] / 2, publishing=publishing)] += 1
        check_left(out, whole[variant], old, f"moment {moment}", transformers=transformers)
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 0, (moment, variant, again.stderr)
        assert contents(out) == whole[variant], (moment, variant)
        assert [p.name for p in out.parent.iterdir()] == ["out"], (moment, variant)
        shutil.rmtree(out.parent)
    return found


def check_left(out: Path, whole: dict[str, bytes], old: dict[str, bytes], where: str, *, transformers: bool) -> None:
    assert {p.name for p in out.parent.iterdir()} <= {"out"}, where
    for folder in outputs(out):
        if not looks_finished(folder, transformers=transformers):
            continue
        there = {n: d for n, d in contents(folder).items() if not n.startswith((".slerp-merge/", *SEVERAL))}
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
        command = [*COMMAND, "merge", base, ft, str(out), "--max-shard-size", chance.choice(["100MB", "5GB"])]
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
        inputs = make_inputs(root, transformers=options.transformers)
        found = run(options.moments, options.seed, inputs, root, transformers=options.transformers)
    print(f"{options.moments} kills, all resumed to the same bytes: {dict(found)}")


def make_inputs(root: Path, *, transformers: bool) -> Inputs:
    """Models, an adapter and a recipe; for transformers a pair of models that it made."""
    return _transformers_pair(root) if transformers else _tiny_inputs(root)


def _tiny_inputs(root: Path) -> Inputs:
    sizes: dict[str, Any] = {"layers": 6, "hidden": 96}
    words = [f"w{n}" for n in range(800)]
    found = {}
    for k, (name, tokens) in enumerate((("base", words), ("ft", words), ("other", [*words[:700], "new", "newer"]))):
        side = {"tokenizer.json": tokenizer(tokens), "sub/chat.jinja": "{{ x }}"}
        tensors = language_model(k, vocab=len(tokens), **sizes)
        config = CONFIG | {"vocab_size": len(tokens)}
        found[name] = save_model(root / name, tensors, shards=k + 1, side_files=side, config=config)
    factors = {f"model.layers.{n}.mlp.up_proj.lora_{part}.weight": normal(*shape) for n in range(6)
               for part, shape in (("A", (4, 96)), ("B", (288, 4)))}  # fmt: skip
    found["adapter"] = save_adapter(root / "adapter", factors, r=4, target_modules=["up_proj"])
    found["recipe"] = root / "recipe.yaml"
    found["recipe"].write_text(RECIPE.format(**found))
    return found


def _transformers_pair(root: Path) -> Inputs:
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
    return {name: root / name for name in ("base", "ft")}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
