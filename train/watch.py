"""What a user watches: a progress line, metrics.jsonl, TensorBoard when it is installed, the card at the end.

Numbers arrive here as plain floats. metrics.jsonl is the record; the plot and the card are made from it, so they are
complete after any number of resumes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from train.config import SourceConfig, TrainConfig
from train.data import SourceReport, report_table
from train.errors import TrainError
from train.output import publish_text


class Watch:
    """The progress line and the metrics of the first process; in other processes it does nothing."""

    def __init__(self, config: TrainConfig, steps: int, done: int, active: bool) -> None:
        self._active = active
        if not active:
            return
        self._path = Path(config.output) / "metrics.jsonl"
        _forget_after(self._path, done)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        # Without a terminal, a line every half minute.
        self._bar = tqdm(
            total=steps, initial=done, unit="step", desc="train", mininterval=0.5 if sys.stderr.isatty() else 30
        )
        self._reporters = [_reporter(name, config, done) for name in check_report_to(config)]

    def __enter__(self) -> Watch:
        return self

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics: `kind` is train, eval, average, skip or stop."""
        if not self._active:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as e:
            raise TrainError(f"{self._path}: cannot be written ({e.strerror}). Make room, then start again.") from e
        for report, _ in self._reporters:
            report(dict(_scalars(kind, values)), step)

    def advance(self, loss: float, tokens_per_second: float, lr: float) -> None:
        """Move the progress line by one step; it also shows the time left."""
        if self._active:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, lr {lr:.2e}", refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """A line beside the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.close()
            with contextlib.suppress(OSError):  # a full disk was reported when the line was written
                self._file.close()
            for reporter in self._reporters:
                reporter[1]()


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number below a record, with its name for reports: eval/nll/SOURCE."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(f"{name}/{key}", item)
    elif isinstance(value, float):
        yield name, value


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again (and a half-written last line)."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    publish_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # a kill can cut the last line
    return lines


Reporter = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


def check_report_to(config: TrainConfig) -> Sequence[str]:
    """The libraries to report to. Raises TrainError for one that is not installed."""
    if config.report_to is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if missing := [name for name in config.report_to if not importlib.util.find_spec(name)]:
        raise TrainError(f"report_to needs {' and '.join(missing)}, not installed here. pip install {missing[0]}.")
    return config.report_to


def _reporter(name: str, config: TrainConfig, done: int) -> Reporter:
    """How the library `name` takes numbers, and how it is closed. A resumed run reports its steps again."""
    output = Path(config.output).resolve()
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(output / name), purge_step=done + 1)

        def add(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                board.add_scalar(key, value, step)

        return add, board.close
    library: Any = importlib.import_module(name)  # wandb, and trackio, which has its interface
    run = f"{output.name}-{zlib.crc32(str(output).encode()):08x}"  # a resumed run is the same run, another folder's not
    settings = {"dir": str(output), "id": run} if name == "wandb" else {}
    library.init(project="mixce-train", name=run, config=asdict(config), resume="allow", **settings)
    return lambda values, step: library.log(values, step=step), library.finish


# ---- at the end ----------------------------------------------------------------------------------------


def plot_loss(metrics: Sequence[dict[str, Any]], path: Path, title: str = "") -> bool:
    """The training loss and, in a panel of its own, the held-out cross-entropy by step as a PNG: they are two measures,
    and the distance between them says nothing. False when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no pyplot: it would choose a backend

    train = [m for m in metrics if m["kind"] == "train"]
    evals = [m for m in metrics if m["kind"] == "eval"]
    figure = Figure(figsize=(7, 6 if evals else 3.6), layout="constrained")
    panels = figure.subplots(2 if evals else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot([m["step"] for m in train], [m["loss"] for m in train], linewidth=1, color="#0072B2")
    panels[0].set_ylabel("MixCE per token")
    panels[0].set_title("training loss: MixCE, on the training data", fontsize=10)
    for held_out in sorted({source for m in evals for source in m["nll"]}):
        points = [(m["step"], m["nll"][held_out]) for m in evals if held_out in m["nll"]]
        panels[1].plot(*zip(*points, strict=True), marker="o", label=held_out.replace("$", r"\$"))
    if evals:
        panels[1].set_ylabel("cross-entropy (nats per token)")
        panels[1].set_title("held out: cross-entropy, another measure than MixCE", fontsize=10)
        panels[1].legend(fontsize=8)
    for panel in panels:
        panel.ticklabel_format(axis="both", style="plain", useOffset=False)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("optimizer step")
    figure.suptitle("\n".join(textwrap.wrap(title, 70)).replace("$", r"\$"))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True


def run_title(config: TrainConfig) -> str:
    """`scribe-ft, a finetune of org/model`."""
    return f"{Path(config.output).name}, a finetune of {_base_name(config)}"


def _base_name(config: TrainConfig) -> str:
    """The model's id, or its folder's name: paths stay private."""
    return Path(config.model).name if Path(config.model).exists() else config.model


def build_card(
    config: TrainConfig,
    reports: Sequence[SourceReport],
    metrics: Sequence[dict[str, Any]],
    facts: dict[str, Any],
    has_plot: bool,
) -> str:
    """The model card: base, data, settings and results."""
    settings = {
        key: getattr(config, key)
        for key in TrainConfig.__dataclass_fields__
        if key not in ("sources", "output", "resume", "sample_prompts", "model") and getattr(config, key) is not None
    }
    is_local = Path(config.model).exists()
    base = _base_name(config)
    parts = [
        "---\n" + yaml.safe_dump(_metadata(config, is_local), sort_keys=False) + "---\n",
        f"# {Path(config.output).name}\n",
        f"A finetune of `{base}` with the MixCE loss (arXiv 2305.16958) at mixing ratio "
        f"{config.mixing_ratio}, made by `mixce-train`.\n",
        "## Data\n",
        f"```\n{report_table(reports)}\n```\n",
        "\n".join(_source_lines(config)) + "\n",
        "## Result\n",
        _result_lines(metrics, facts),
        "![loss](loss.png)\n" if has_plot else "",
        "## Settings\n",
        "\n".join(f"- {key}: {value}" for key, value in settings.items()) + "\n",
        "## Versions\n",
        "\n".join(f"- {name} {number}" for name, number in versions().items()) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def _metadata(config: TrainConfig, is_local: bool) -> dict[str, Any]:
    """The Hub's metadata; paths of local folders and files stay private."""
    datasets = [source.path for source in config.sources if not Path(source.path).exists()]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["mixce"]}
    if not is_local:
        metadata |= {"base_model": config.model.partition("@")[0], "base_model_relation": "finetune"}
    return metadata | ({"datasets": datasets} if datasets else {})


def _source_lines(config: TrainConfig) -> Iterator[str]:
    """A line per source: its keys that are not the defaults."""
    for source in config.sources:
        path = Path(source.path).name if Path(source.path).exists() else source.path
        settings = {
            key: value
            for key, value in asdict(source).items()
            if key not in ("path", "label") and value != SourceConfig.__dataclass_fields__[key].default
        }
        yield f"- `{path}`: " + json.dumps(settings, ensure_ascii=False, default=str)


def _result_lines(metrics: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    train = [m["loss"] for m in metrics if m["kind"] == "train"]
    evals = [m for m in metrics if m["kind"] == "eval"]
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    if train:
        lines.append(f"- training loss: {train[0]:.4f} at the first step, {train[-1]:.4f} at the last")
    for title, nll in (evals[-1]["nll"] if evals else {}).items():
        perplexity = evals[-1]["perplexity"][title]
        lines.append(f"- held out, {title}: cross-entropy {nll:.4f}, perplexity {perplexity:.3f}")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Versions of what computed the weights."""
    numbers = {"python": sys.version.split()[0]}
    for name in ("slerp-merge", "torch", "transformers", "datasets", "tokenizers"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers
