"""Paired measurements of `train`: prints ratios; never part of the test suite.

    python bench/train.py loss               reference against fused loss: extra memory, time
    python bench/train.py ranking            the ranking loss of pairs, through whole logits and fused: the same
    python bench/train.py optim              bytes per parameter of a step, with and without fused backward
    python bench/train.py loop --trl PYTHON  this loop against TRL's and transformers' trainers; PYTHON has
                                             trl installed; --checkpointing: that case
    python bench/train.py data               memory to tokenise a source and to make its batches, against its size
    python bench/train.py memory             StableLM 3B per setting, computed: docs/training_memory.md

Every arm runs in a process of its own, so that a peak is that arm's; times are interleaved and repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, VOCAB, WIDTH = 2048, 50304, 576


def resident_bytes() -> int:
    """Bytes of resident memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """Highest resident memory while the block runs, sampled each millisecond, above that at its start."""

    def __enter__(self) -> Peak:
        self.base = self.top = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.top = max(self.top, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self.top = max(self.top, resident_bytes())
        self._done.set()
        self._thread.join()
        self.extra = self.top - self.base


def loss_arm(of: str, which: str, head: str, repeats: int) -> dict[str, Any]:
    """Peak extra bytes and the median time of forward and backward of one loss: `of` is loss (MixCE) or ranking."""
    import torch
    from torch.nn.functional import cross_entropy

    from train.contrast.ranking import Ranking, ranking_loss
    from train.loss import fused_log_probs, fused_mixce_loss, mixce_loss

    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=gen).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=gen) / WIDTH**0.5).requires_grad_(head == "trained")
    labels = torch.randint(VOCAB, (TOKENS,), generator=gen)
    rows = torch.arange(8).view(4, 2)  # four pairs
    ranking = Ranking(torch.arange(8) % 2 == 0, rows[:, 0], rows[:, 1:], torch.full((4,), 0.3))

    def step() -> None:
        hidden.grad = weight.grad = None
        if of == "ranking":
            if which == "fused":
                log_q = fused_log_probs(hidden, weight, labels)
            else:
                log_q = -cross_entropy(hidden @ weight.T, labels, reduction="none")
            loss, count = ranking_loss(log_q.view(8, -1), labels.view(8, -1), ranking, 1.0)
        elif which == "fused":
            loss, count = fused_mixce_loss(hidden, weight, labels, 0.5)
        else:
            loss, count = mixce_loss(hidden @ weight.T, labels, 0.5)
        (loss / count).backward()

    small = hidden[:8].detach().requires_grad_()  # first calls load kernels: not the loss's memory
    fused_mixce_loss(small, weight[:64], labels[:8] % 64, 0.5)[0].backward()
    weight.grad = None
    with Peak() as peak:
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"extra_bytes": peak.extra, "seconds": statistics.median(times)}


def in_process(*arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """The last line of this script's own output, run again with `arguments`."""
    done = subprocess.run([python, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench_loss(of: str, repeats: int) -> None:
    print(f"{of}: {TOKENS} tokens x {VOCAB} vocabulary x {WIDTH} hidden, float32, {repeats} interleaved runs")
    for head in ("frozen", "trained"):
        runs: dict[str, list[dict[str, Any]]] = {"reference": [], "fused": []}
        for _ in range(repeats):
            for which, results in runs.items():
                results.append(in_process("loss-arm", of, which, head))
        row = {}
        for which, results in runs.items():
            extra = statistics.median(r["extra_bytes"] for r in results)
            seconds = statistics.median(r["seconds"] for r in results)
            row[which] = (extra, seconds)
            print(f"  {head:8} {which:10} {extra / 1e6:8.0f} MB extra {seconds:7.3f} s")
        memory = row["reference"][0] / row["fused"][0]
        print(f"  {head:8} memory 1/{memory:.1f}, time {row['fused'][1] / row['reference'][1]:.2f} x")


# ---- optimizers --------------------------------------------------------------------------------------


def optim_arm(which: str, fused: bool) -> dict[str, Any]:
    """Peak bytes of a third step above the weights, and bytes of state, per parameter (float32 weights)."""
    import torch

    from train.config import build_config
    from train.optim import Optimizer

    torch.manual_seed(0)
    source = {"path": "x", "templates": [{"prompt": "x", "response": "x"}]}
    config = build_config({"model": "m", "output": "o", "sources": [source], "optimizer": which})
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(64)]
    net = torch.nn.Sequential(*layers)
    optimizer = Optimizer(dict(net.named_parameters()), config, torch.Generator())
    if fused:
        optimizer.step_in_backward(lambda: 1e-6)
    count = sum(p.numel() for p in net.parameters())
    base = resident_bytes()
    x = torch.randn(8, 1024)

    def step() -> None:
        net(x).square().mean().backward()
        if not fused:
            optimizer.step(1e-6)
        for p in net.parameters():
            p.grad = None

    step()
    step()
    with Peak() as peak:
        step()
    state = sum(t.nbytes for _, t in optimizer.states())
    return {"peak": (peak.top - base) / count, "state": state / count}


def bench_optim(repeats: int) -> None:
    print(f"optimizers: 64 layers of 1024 x 1024 in float32 (67M parameters), median of {repeats}")
    print("  optimizer  fused backward  state bytes/parameter  peak bytes/parameter above the weights")
    for which in ("adalite", "adamw"):
        for fused in (False, True):
            runs = [in_process("optim-arm", which, str(int(fused))) for _ in range(repeats)]
            peak = statistics.median(r["peak"] for r in runs)
            print(f"  {which:10} {fused!s:14} {runs[0]['state']:12.3f} {peak:22.2f}")


# ---- loops -------------------------------------------------------------------------------------------

STEPS, ROWS, LENGTH = 24, 4, 256
WARM = 4  # steps not timed


def make_task(folder: Path, words: int) -> None:
    """A StableLM of 5.8M parameters, a tokenizer of whole words, and texts of exactly 256 tokens."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, StableLmConfig, StableLmForCausalLM

    vocabulary = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = StableLmConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=words, max_position_embeddings=LENGTH,
    )  # fmt: skip
    StableLmForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    with open(folder / "texts.jsonl", "w") as file:
        for _ in range(STEPS * ROWS):
            text = " ".join(f"w{draw.randrange(1, words)}" for _ in range(LENGTH))
            file.write(json.dumps({"text": text}) + "\n")


def loop_arm(which: str, folder: Path, checkpointing: bool) -> dict[str, Any]:
    """Tokens per second after the warm-up, peak bytes above imports, and the losses of one trainer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    AutoModelForCausalLM.from_pretrained(folder / "model")  # imports 1,000 modules, 95 MB: not any loop's memory
    arm = {"ours": _ours, "trl": _trl, "trainer": _trainer}[which](folder, checkpointing)
    with Peak() as peak:
        times, losses = arm()
    seconds = times[-1] - times[WARM - 1]
    return {
        "tokens_per_second": (len(times) - WARM) * ROWS * LENGTH / seconds,
        "extra_bytes": peak.extra,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


Arm = Callable[[], tuple[list[float], list[float]]]


def _ours(folder: Path, checkpointing: bool) -> Arm:
    import datasets  # noqa: F401

    from train import loop
    from train.config import build_config

    config = build_config({
        "model": str(folder / "model"), "output": str(folder / f"ours-{time.time_ns()}"),
        "sources": [
            {"path": str(folder / "texts.jsonl"), "format": "text", "templates": [{"text": "{text}"}]}
        ],
        "sequence_length": LENGTH, "packing": False, "micro_batch": ROWS, "global_batch": ROWS,
        "max_steps": STEPS, "optimizer": "adamw", "lr": 1e-4, "schedule": "constant", "warmup": 0,
        "max_grad_norm": 1.0, "mixing_ratio": 1.0, "freeze_embeddings": False, "dtype": "float32",
        "activation_checkpointing": checkpointing,
    })  # fmt: skip
    times: list[float] = []
    real = loop.train_step

    def timed(*arguments: Any) -> Any:
        result = real(*arguments)
        times.append(time.perf_counter())
        return result

    def run() -> tuple[list[float], list[float]]:
        loop.train_step = timed
        loop.finetune(config)
        lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
        return times, [json.loads(line)["loss"] for line in lines]

    return run


def _arguments(folder: Path, checkpointing: bool) -> dict[str, Any]:
    return {
        "output_dir": str(folder / f"other-{time.time_ns()}"), "max_steps": STEPS, "use_cpu": True,
        "per_device_train_batch_size": ROWS, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, "weight_decay": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": False, "disable_tqdm": True,
    }  # fmt: skip


def _watcher() -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.losses: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Watcher()


def _tokens(folder: Path) -> Any:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = datasets.load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train")
    return rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])


def _trl(folder: Path, checkpointing: bool) -> Arm:
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    watcher = _watcher()
    arguments = trl.SFTConfig(**_arguments(folder, checkpointing), max_length=LENGTH, packing=False)

    def run() -> tuple[list[float], list[float]]:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        trl.SFTTrainer(
            model=model, args=arguments, train_dataset=_tokens(folder), callbacks=[watcher],
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        ).train()  # fmt: skip
        return watcher.times, watcher.losses

    return run


def _trainer(folder: Path, checkpointing: bool) -> Arm:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    watcher = _watcher()
    arguments = TrainingArguments(**_arguments(folder, checkpointing))

    def run() -> tuple[list[float], list[float]]:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        collator = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(folder / "model"), mlm=False)
        Trainer(
            model=model, args=arguments, train_dataset=_tokens(folder), data_collator=collator,
            callbacks=[watcher],
        ).train()  # fmt: skip
        return watcher.times, watcher.losses

    return run


def bench_loop(python: str, repeats: int, words: int, checkpointing: bool) -> None:
    print(f"loops: {ROWS} x {LENGTH} tokens a step, vocabulary {words}, float32, {repeats} interleaved runs")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": [], "trainer": []}
    with tempfile.TemporaryDirectory() as name:
        in_process("loop-task", name, "--words", str(words), python=python)
        for _ in range(repeats):
            for which, found in runs.items():
                found.append(in_process("loop-arm", which, name, str(int(checkpointing)), python=python))
    _print_loops(checkpointing, runs)


def loop_task(folder: Path, words: int) -> None:
    make_task(folder, words)
    print("{}")


def _print_loops(checkpointing: bool, runs: dict[str, list[dict[str, Any]]]) -> None:
    print(f"  activation checkpointing {checkpointing}")
    middle = {
        which: {key: statistics.median(run[key] for run in found) for key in found[0]} for which, found in runs.items()
    }
    for which, m in middle.items():
        rate, memory = m["tokens_per_second"], m["extra_bytes"] / 1e6
        print(
            f"    {which:8} {rate:7.0f} tokens/s {memory:7.0f} MB above imports, loss {m['first_loss']:.3f}",
            end="",
        )
        print(f" -> {m['last_loss']:.3f}")
    fastest = max(middle["trl"]["tokens_per_second"], middle["trainer"]["tokens_per_second"])
    least = min(middle["trl"]["extra_bytes"], middle["trainer"]["extra_bytes"])
    print(
        f"    ours / faster of the two: {middle['ours']['tokens_per_second'] / fastest:.2f} x the speed, ",
        end="",
    )
    print(f"ours / smaller of the two: {middle['ours']['extra_bytes'] / least:.2f} x the memory")


# ---- memory, computed --------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "AdamW, embeddings trained": (1, {"optimizer": "adamw", "freeze_embeddings": False}),
    "AdamW": (1, {"optimizer": "adamw"}),
    "Adalite, plain loss": (1, {"fused_loss": False}),
    "Adalite, no activation checkpointing": (1, {"activation_checkpointing": False}),
    "Adalite, embeddings trained": (1, {"freeze_embeddings": False}),
    "Adalite": (1, {}),
    "Adalite, 128 sequences a step": (1, {"global_batch": 128}),
    "Adalite, 128 sequences, accumulate_in: bfloat16": (1, {"global_batch": 128, "accumulate_in": "bfloat16"}),
    "Adalite, fused backward": (1, {"fused_backward": True}),
    "AdamW, 8 processes": (8, {"optimizer": "adamw"}),
    "Adalite, 8 processes": (8, {}),
    "Adalite, 8 processes, 4 sequences each": (8, {"micro_batch": 4}),
    "Adalite, 8 processes, no activation checkpointing": (8, {"activation_checkpointing": False}),
}
SPARE = 1.5  # GB for the CUDA context, kernels' workspaces and fragmentation


def memory_table() -> str:
    """Markdown: GB per GPU for StableLM 3B at 4096 tokens in bfloat16, by the preflight's own arithmetic."""
    import torch
    from transformers import StableLmConfig

    from train.config import build_config
    from train.preflight import preflight

    source = {"path": "x", "templates": [{"prompt": "x", "response": "x"}]}
    lines = [
        "| setting | weights | gradients | optimizer | activations | loss | gathered | update | sum | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (processes, change) in SETTINGS.items():
        config = build_config({"model": "m", "output": "o", "sources": [source], **change})
        p = preflight(config, StableLmConfig(), torch.bfloat16, processes)
        parts = [
            p.weight_bytes, p.gradient_bytes, p.optimizer_bytes, p.activation_bytes or 0, p.loss_bytes,
            p.gathered_bytes, p.update_bytes,
        ]  # fmt: skip
        total = sum(parts) / 1e9
        cells = [f"{part / 1e9:.2f}" for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} | **{total:.1f}** | {_fits(total, processes)} |")
    return "\n".join(lines)


def _fits(total: float, processes: int) -> str:
    if processes > 1:
        return f"{processes} x 80 GB" if total + SPARE <= 80 else "no"
    return next((f"{size} GB" for size in (24, 80) if total + SPARE <= size), "neither")


# ---- sources larger than memory ------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Resident bytes that no file backs (Linux): pages of a mapped file are the system's to take back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def data_arm(rows: int) -> dict[str, Any]:
    """Tokenise `rows` rows of 400 tokens, plan an epoch, make 200 steps' batches: the highest memory above imports."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from train.batches import Mixture
    from train.config import build_config
    from train.data import open_sources, prepare_sources

    datasets.disable_progress_bars()
    words = {f"w{number}": number for number in range(1000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        with open(folder / "d.jsonl", "w") as file:
            for row in range(rows):
                file.write(json.dumps({"text": " ".join(f"w{(row * 7 + k * k) % 999 + 1}" for k in range(400))}) + "\n")
        source = {"path": str(folder / "d.jsonl"), "format": "text", "templates": [{"text": "{text}"}]}
        config = build_config({"model": "m", "output": "o", "sources": [source], "global_batch": 4})
        base, top = anonymous_bytes(), 0
        done = threading.Event()

        def watch() -> None:
            nonlocal top
            while not done.wait(0.005):
                top = max(top, anonymous_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        names = prepare_sources(config, tokenizer, folder / "data")
        tokenised = top
        top = 0
        mixture = Mixture(open_sources(config, folder / "data", names), config, 0, 1)
        for step in range(min(200, mixture.steps)):
            mixture.step_batches(step, 0)
        done.set()
        thread.join()
    return {"tokens": 400 * rows, "tokenise": (tokenised - base) / 1e6, "batches": (top - base) / 1e6}


def bench_data() -> None:
    """One source and one ten times as large."""
    small, large = (in_process("data-arm", str(rows)) for rows in (10_000, 100_000))
    for arm in (small, large):
        print(f"{arm['tokens']:>12,} tokens: {arm['tokenise']:.0f} MB to tokenise, {arm['batches']:.0f} MB for batches")
    ratios = (large[part] / small[part] for part in ("tokenise", "batches"))
    print("ten times the tokens: " + " and ".join(f"{ratio:.2f} x" for ratio in ratios) + " the memory")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "loss": lambda a: bench_loss("loss", a.repeats),
    "ranking": lambda a: bench_loss("ranking", a.repeats),
    "loss-arm": lambda a: print(json.dumps(loss_arm(*a.rest, 3))),
    "optim": lambda a: bench_optim(a.repeats),
    "optim-arm": lambda a: print(json.dumps(optim_arm(a.rest[0], a.rest[1] == "1"))),
    "data": lambda a: bench_data(),
    "data-arm": lambda a: print(json.dumps(data_arm(int(a.rest[0])))),
    "loop": lambda a: bench_loop(a.trl, a.repeats, a.words, a.checkpointing),
    "loop-task": lambda a: loop_task(Path(a.rest[0]), a.words),
    "loop-arm": lambda a: print(json.dumps(loop_arm(a.rest[0], Path(a.rest[1]), a.rest[2] == "1"))),
    "memory": lambda a: print(memory_table()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl", default=sys.executable, help="python of an environment with trl")
    parser.add_argument("--checkpointing", action="store_true", help="loop: checkpoint activations")
    parser.add_argument("--words", type=int, default=8192, help="vocabulary of the loops' model")
    arguments = parser.parse_args()
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this file's own folder would hide the package `train`
    main()
