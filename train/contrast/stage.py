"""The stage, cycle by cycle: sample, verify and pair, train, average, evaluate.

The phases of cycle N leave `samples`, `pairs`, `train` (an ordinary run), `model` and `eval` in `output/cycle-N`. A
folder has its name only when it is complete, so the same command goes on from any kill.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from merge_tool.models.side_files import CARD, RECIPE, REPORT, SUMS
from train.batches import Mixture
from train.config import TrainConfig
from train.contrast.average import average
from train.contrast.generate import Voice, blocks
from train.contrast.mixture import PairMixture
from train.contrast.options import ContrastConfig
from train.contrast.pairs import make_units, warnings, write_units
from train.contrast.questions import read_questions, write_lines, write_questions
from train.contrast.samples import read_responses, sample_responses
from train.contrast.verify import comparison, verify
from train.data import open_sources, prepare_sources
from train.evaluate import source_nll
from train.loop import run_training, speaker
from train.model import (
    LossModel,
    check_context,
    choose_dtype,
    load_model,
    load_model_config,
    load_tokenizer,
    padding_id,
)
from train.output import TRASH, first_writes, hold_output, publish_folder, publish_text
from train.record import check_resume, check_same_run
from train.world import World

COUNTS = "report.json"


class Stage:
    """A stage under way, in an output that is held. All processes do the same."""

    def __init__(self, config: TrainConfig, contrast: ContrastConfig, world: World) -> None:
        self.config, self.contrast, self.world = config, contrast, world
        self.output, self.say = Path(config.output), speaker(world)
        model_config = load_model_config(config.model, config.revision, self.say)
        check_context(model_config, config, self.say)
        self.tokenizer = load_tokenizer(config.model, config.revision, model_config)
        self.pad_id = padding_id(self.tokenizer, self.say)
        self.dtype = choose_dtype(config.dtype, world.device)

    def run(self) -> None:
        """All cycles, then `output/final`; goes on from where it stood."""
        self._check_same()
        if self._is_done("final"):
            self.say(f"{self.output / 'final'}: this stage is complete already.")
            return
        self._publish("questions", lambda at: write_questions(at, self.config, self.contrast, self.tokenizer))
        start = self.config
        self.evaluate("cycle-0", start)
        for cycle in range(1, self.contrast.cycles + 1):
            name = f"cycle-{cycle}"
            if not self._is_done(f"{name}/model"):
                self.sample(name, cycle, start)
                self._publish(f"{name}/pairs", partial(self.pair, self.output / name / "samples"))
                self.train(name, start)
                if not self._is_done(f"{name}/train/final"):
                    return  # stopped by a signal, after saving
                self.average(name, start)
            self._forget_training(self.output / name / "train")
            start = replace(self.config, model=str(self.output / name / "model"), revision=None)
            self.evaluate(name, start)
        self._publish("final", partial(self.write_final, Path(start.model)))
        self.say("\n".join([*self._table(), f"Done: {self.output / 'final'}"]))

    def _check_same(self) -> None:
        """The same stage as before, if there was one; and everything that can be refused at once."""
        path, record = self.output / "run.json", asdict(self.config)
        is_begun = self._is_done("run.json")
        check_resume(self.config, is_begun)
        self.world.first(lambda: check_same_run(self.output, record))
        self.world.first(lambda: bool(comparison(self.contrast.verify.compare)))
        first_writes(self.world, self.output, lambda: publish_text(path, json.dumps(record, indent=1)))
        if self.config.mixing_ratio != 1 and not is_begun:
            ratio = self.config.mixing_ratio
            self.say(
                f"Note: the cross-entropy is MixCE at mixing_ratio {ratio}; the published stage had mixing_ratio 1."
            )

    # ---- phases ------------------------------------------------------------------------------------------

    def sample(self, name: str, cycle: int, start: TrainConfig) -> None:
        """`samples`: responses to every question."""
        if not self._is_done(f"{name}/samples"):
            questions, load = read_questions(self.output / "questions", "train"), partial(self._voice, start)
            folder, seed, contrast = self.output / name / "samples", self.config.seed, self.contrast
            sample_responses(folder, questions, seed, cycle, _reference(start), load, contrast, self.world)

    def pair(self, samples: Path, folder: Path) -> None:
        """`pairs`: verdicts become units; what became of the responses is counted."""
        responses = read_responses(samples)
        asked = [(q, responses[q.number]) for q in read_questions(self.output / "questions", "train")]
        verdicts = iter(verify(self.contrast.verify, [(q, r) for q, found in asked for r in found]))
        units, counts = make_units(((q, found, [next(verdicts) for _ in found]) for q, found in asked), self.contrast)
        form, longest = self.contrast.questions.format, self.config.sequence_length
        kept = write_units(folder, units, form, self.tokenizer, longest)
        counts.update(units=len(kept), units_too_long=len(units) - len(kept))
        self.say(f"{samples.parent.name}: " + ", ".join(f"{n:,} {key.replace('_', ' ')}" for key, n in counts.items()))
        for text in warnings(counts, self.contrast):
            self.say(text)
        write_lines(folder / "pairs.jsonl", kept)
        (folder / COUNTS).write_text(json.dumps(counts, indent=1), encoding="utf-8")

    def train(self, name: str, start: TrainConfig) -> None:
        """`train`: an ordinary run on the pairs."""
        output = self.output / name / "train"
        units = self.config.sequences_per_step(self.world.size)
        config = replace(start, output=str(output), resume=None, global_batch=units, global_batch_tokens=None)
        if self.contrast.ce_on != "sources":
            longest = int(np.diff(np.load(self.output / name / "pairs/offsets.npy")).max())
            config = replace(config, packing=False, sources=(), sequence_length=longest)
        with hold_output(output, self.world):
            mixture = partial(PairMixture, self.output / name / "pairs", self.contrast)
            run_training(config, self.world, self.output / "data", mixture)

    def average(self, name: str, start: TrainConfig) -> None:
        """`model`: the SLERP of the weights before and after."""
        new, out, dtype = self.output / name / "train/final", self.output / name / "model", str(self.dtype)[6:]
        merge = partial(average, _reference(start), new, out, self.contrast.merge_t, dtype, self.config.max_shard_bytes)
        self.world.first(lambda: [self.say(text) for text in merge()])

    def evaluate(self, name: str, start: TrainConfig) -> None:
        """`eval`: greedy accuracy on the held-out questions, cross-entropy and perplexity of the sources."""
        questions = read_questions(self.output / "questions", "held_out")
        has_sources = any(source.is_evaluated for source in self.config.sources)
        if self._is_done(f"{name}/eval") or not (questions or has_sources):
            return
        voice, report = self._voice(start), dict[str, Any]()
        if questions:
            todo = blocks(questions, self.tokenizer, self.contrast.sample_batch)[self.world.rank :: self.world.size]
            mine = [(q, r) for block in todo for q, (r,) in zip(block, voice.respond(block, [])[0], strict=True)]
            answered = [pair for pairs in self.world.gather(mine) for pair in pairs]
            right = self.world.first(lambda: sum(verify(self.contrast.verify, answered)))
            report["accuracy"] = right / len(questions)
        if has_sources:
            data = self.output / "data"
            names = self.world.first(lambda: prepare_sources(self.config, self.tokenizer, data))
            sources = open_sources(self.config, data, names)
            mixture = Mixture(sources, replace(self.config, max_steps=1), self.pad_id, self.world.size)
            model = LossModel(voice.model, fused=self.config.fused_loss).eval()
            held = [source for source in sources if len(source.held_out)]
            report["nll"] = {s.title: source_nll(model, mixture, s, self.world) for s in held}
            report["perplexity"] = {title: math.exp(min(nll, 700)) for title, nll in report["nll"].items()}
        self.say(f"{name}: {json.dumps(report)}")
        self._publish(f"{name}/eval", lambda folder: (folder / COUNTS).write_text(json.dumps(report, indent=1)))

    def write_final(self, model: Path, folder: Path) -> None:
        """The last cycle's model, without the merge's own files, and a card."""
        for file in model.iterdir():
            if file.is_file() and file.name not in (CARD, RECIPE, REPORT, SUMS):
                shutil.copy2(file, folder / file.name)
        base = Path(self.config.model).name if Path(self.config.model).exists() else self.config.model
        settings = {**asdict(self.config), **asdict(self.contrast), "questions": self.contrast.questions.prompt}
        hidden = ("model", "output", "sources", "contrast", "resume", "sample_prompts")
        lines = [f"- {key}: {value}" for key, value in settings.items() if key not in hidden and value is not None]
        head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
        said = f"`{base}`, trained by `mixce-train` in {self.contrast.cycles} cycles on its own verified answers.\n"
        card = [head, f"# {self.output.name}\n", said, *self._table(), "", *lines]
        (folder / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")

    # ---- models and folders ------------------------------------------------------------------------------

    def _voice(self, start: TrainConfig) -> Voice:
        model_config = load_model_config(start.model, start.revision, lambda _: None)
        model = load_model(start.model, start, model_config, self.dtype).to(self.world.device).eval()
        return Voice(model, self.tokenizer, self.pad_id, self.contrast)

    def _is_done(self, name: str) -> bool:
        return self.world.first((self.output / name).exists)

    def _publish(self, name: str, write: Callable[[Path], object]) -> None:
        """Let the first process `write` a folder, whole or not at all; nothing when it is there."""
        if not self._is_done(name):

            def in_first(folder: Path) -> None:
                self.world.first(lambda: first_writes(World(0, 1, self.world.device), folder, lambda: write(folder)))

            publish_folder(self.output / name, in_first, self.world)

    def _forget_training(self, run: Path) -> None:
        """A cycle that has its model keeps no checkpoint of its training, and no second model."""

        def forget() -> None:
            for folder in (run / "checkpoints", run / "final"):
                if folder.exists():
                    shutil.rmtree(folder.rename(run / (TRASH + folder.name)))

        first_writes(self.world, run, forget)

    def _table(self) -> Iterator[str]:
        """Markdown, a line for each cycle."""
        yield "| after cycle | samples right | pairs | held-out questions right | perplexity |"
        yield "|---|---:|---:|---:|---|"
        for cycle in range(self.contrast.cycles + 1):
            pairs, score = (self.output / f"cycle-{cycle}" / part / COUNTS for part in ("pairs", "eval"))
            counts, found = (json.loads(path.read_text()) if path.exists() else {} for path in (pairs, score))
            right = f"{counts['right'] / counts['samples']:.1%}" if counts else ""
            accuracy = f"{found['accuracy']:.1%}" if "accuracy" in found else ""
            perplexity = ", ".join(f"{title} {value:.2f}" for title, value in found.get("perplexity", {}).items())
            yield f"| {cycle} | {right} | {counts.get('pairs', '')} | {accuracy} | {perplexity} |"


def _reference(config: TrainConfig) -> str:
    """The model as merge_tool names it."""
    return f"{config.model}@{config.revision}" if config.revision else config.model
