"""Laws of train/loop.py: one division per step, resumed equals uninterrupted, two ranks equal one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    StableLmConfig,
)

from tests.train_fixtures import (
    config_values,
    copy_rows,
    make_config,
    make_tokenizer,
    read_metrics,
    run_two_ranks,
    save_model,
    write_config,
    write_jsonl,
)
from train import checkpoint, loop, record, retention
from train.config import build_config
from train.errors import TrainError
from train.loop import finetune
from train.model import LossModel, check_context
from train.step import clip

ADALITE = {"optimizer": "adalite", "lr": 2e-4}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model")
    write_jsonl(folder / "d.jsonl", copy_rows())
    return folder


def values(base: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    return config_values(base / "model", base / "d.jsonl", output, **{"max_steps": 6, **overrides})


def train(base: Path, output: Path, **overrides: Any) -> list[dict[str, Any]]:
    finetune(build_config(values(base, output, **overrides)))
    return read_metrics(output)


def weights(output: Path, folder: str = "final") -> dict[str, torch.Tensor]:
    return load_file(output / folder / "model.safetensors")


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [m["loss"] for m in metrics]


class Killed(BaseException):
    """Ends a run on the spot, as a kill would: nothing below may catch it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process dies at the start of the step after `step`."""
    real = loop.learning_rate

    def dying(at: int, *rest: Any) -> float:
        if at == step:
            raise Killed
        return real(at, *rest)

    monkeypatch.setattr(loop, "learning_rate", dying)


# ---- one division ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"micro_batch": 1}, {"micro_batch": 4}, {"global_batch": None, "global_batch_tokens": 384}]
)
def test_micro_batches_equal_one_batch(base: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Four micro-batches, two, or one; the batch in sequences or tokens: the same losses and weights."""
    expected = train(base, tmp_path / "a", **ADALITE)
    found = train(base, tmp_path / "b", **ADALITE, **change)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert [m["grad_norm"] for m in found] == pytest.approx([m["grad_norm"] for m in expected], rel=1e-4)
    for name, w in weights(tmp_path / "a").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], w, rtol=1e-3, atol=1e-5)


def test_a_step_loss_is_the_mean_over_labelled_tokens(base: Path, tmp_path: Path) -> None:
    """The first recorded loss is the reference loss of that batch, divided once by its labels."""
    from train.batches import Mixture
    from train.data import open_sources
    from train.loss import mixce_loss

    found = train(base, tmp_path / "a", max_steps=1)
    config = build_config(values(base, tmp_path / "a", max_steps=1))
    names = json.loads((tmp_path / "a" / "run.json").read_text())["data"]
    mixture = Mixture(open_sources(config, tmp_path / "a" / "data", names), config, 0, 1)
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    sums = [
        mixce_loss(model(input_ids=b.ids, position_ids=b.positions, use_cache=False).logits, b.labels, 0.5)
        for b in mixture.step_batches(0, 0)
    ]
    assert found[0]["loss"] == pytest.approx((sum(s for s, _ in sums) / sum(n for _, n in sums)).item(), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"packing": False},
        {"activation_checkpointing": True},
        {"fused_loss": False},
        {"attention": "eager"},
        {"fused_backward": True, "micro_batch": 4},
    ],
    ids=lambda c: next(iter(c)),
)
def test_means_that_do_not_change_the_numbers(base: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Checkpointing, the plain loss, eager attention and fused backward give the same losses as without;
    padding gives the same loss as packing on a global batch of the same examples."""
    same = {"sequence_length": 40} if "packing" in change else {}  # one example to a pack
    expected = train(base, tmp_path / "a", **ADALITE, **same)
    found = train(base, tmp_path / "b", **ADALITE, **same, **change)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)


def test_clipping_bounds_the_step(base: Path, tmp_path: Path) -> None:
    """The recorded norm is the one before clipping; what is applied is shorter."""
    free, clipped = train(base, tmp_path / "a"), train(base, tmp_path / "b", max_grad_norm=0.01)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] > 0.01
    gradient = torch.nn.Parameter(torch.zeros(3))
    gradient.grad = torch.tensor([3.0, 0.0, 4.0])
    module = torch.nn.Module()
    module.p = gradient
    assert clip(module, 1.0) == 5.0
    torch.testing.assert_close(gradient.grad, torch.tensor([0.6, 0.0, 0.8]))


def test_frozen_embeddings_do_not_move(base: Path, tmp_path: Path) -> None:
    """Bit for bit the base's, while the layers moved."""
    train(base, tmp_path / "a", freeze_embeddings=True)
    before, after = load_file(base / "model" / "model.safetensors"), weights(tmp_path / "a")
    assert before.keys() == after.keys()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert sorted(still) == ["lm_head.weight", "model.embed_tokens.weight"]


# ---- resume ----------------------------------------------------------------------------------------------

EVERYTHING = {"neftune_alpha": 5.0, "save_every": 2, "eval_every": 3, "keep_last": 10}


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw"},
        {**ADALITE, "dtype": "bfloat16"},
        {**ADALITE, "fused_backward": True, "micro_batch": 4},
        {**ADALITE, "dtype": "bfloat16", "global_batch": None, "global_batch_examples": 10, "micro_batch": 1},
    ],
    ids=["adamw", "adalite-bfloat16-stochastic", "fused-backward", "examples-float32-sums"],
)
def test_resumed_equals_uninterrupted_bitwise(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Weights, losses and evaluations, to the last bit, with NEFTune and stochastic rounding on."""
    train(base, tmp_path / "a", **EVERYTHING, **change)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # after the checkpoint of step 4 and one step more
        with pytest.raises(Killed):
            train(base, tmp_path / "b", **EVERYTHING, **change)
    assert len(read_metrics(tmp_path / "b")) == 5
    train(base, tmp_path / "b", **EVERYTHING, **change)
    for kind in ("train", "eval"):
        runs = [read_metrics(tmp_path / run, kind) for run in "ab"]
        for lines in runs:
            for line in lines:
                line.pop("tokens_per_second", None)
        assert runs[0] == runs[1]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_complete(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again says so and changes nothing; `resume: false` refuses."""
    train(base, tmp_path / "a")
    stamp = (tmp_path / "a" / "final" / "model.safetensors").stat().st_mtime_ns
    train(base, tmp_path / "a")
    assert "complete already" in capsys.readouterr().err
    assert (tmp_path / "a" / "final" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(TrainError, match="holds a run already, and resume is false"):
        train(base, tmp_path / "a", resume=False)


def test_resuming_nothing_is_an_error(base: Path, tmp_path: Path) -> None:
    """`--resume` without a checkpoint says that there is none."""
    with pytest.raises(TrainError, match="holds no checkpoint, and resume is true"):
        train(base, tmp_path / "a", resume=True)


def test_a_resume_with_another_config_lists_what_differs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both changed keys with both values; what only watches may change."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            train(base, tmp_path / "a", save_every=2)
    with pytest.raises(TrainError, match=r"lr: 0.003 -> 0.001\n  mixing_ratio: 0.5 -> 1.0"):
        train(base, tmp_path / "a", save_every=2, lr=1e-3, mixing_ratio=1.0)
    assert len(train(base, tmp_path / "a", save_every=3, keep_last=1, eval_every=2)) == 6


def test_another_model_is_named_before_it_is_loaded(base: Path, tmp_path: Path) -> None:
    """Not as a checkpoint whose tensors have other shapes."""
    train(base, tmp_path / "a", save_every=3)
    save_model(tmp_path / "other", hidden_size=16)
    shutil.rmtree(tmp_path / "a" / "final")
    with pytest.raises(TrainError, match=r"holds a run with other settings:\n  model: "):
        finetune(build_config({**values(base, tmp_path / "a", save_every=3), "model": str(tmp_path / "other")}))


def test_a_changed_source_is_named_by_its_leaf(base: Path, tmp_path: Path) -> None:
    """Not two long lists that look alike: the one value, and where it stands."""
    asked = {"sources": [{"path": "d", "where": [{"value": 200}]}], "data": ["a"]}
    (tmp_path / "run.json").write_text(json.dumps(asked))
    now = {"sources": [{"path": "d", "where": [{"value": 150}]}], "data": ["b"]}
    with pytest.raises(TrainError, match=r"sources\[0\].where\[0\].value: 200 -> 150"):
        record.check_same_run(tmp_path, now)
    with pytest.raises(TrainError, match="rows of a source"):
        record.check_same_run(tmp_path, {**asked, "data": ["b"]})


def test_the_last_and_the_best_checkpoints_are_kept(base: Path, tmp_path: Path) -> None:
    """K last, and the one with the lowest held-out loss however old."""
    train(
        base,
        tmp_path / "a",
        save_every=1,
        eval_every=1,
        keep_last=2,
        max_steps=8,
        lr=0.5,
        schedule="constant",
    )
    evals = {m["step"]: m["nll"]["d.jsonl"] for m in read_metrics(tmp_path / "a", "eval")}
    best = min(range(1, 8), key=lambda s: evals[s])
    found = [checkpoint.read_progress(f).step for f in retention.list_checkpoints(tmp_path / "a")]
    assert found == sorted({best, 7, 8})
    assert best < 7, "the learning rate above is meant to ruin the model"


# ---- trouble ---------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Makes the loss, or only its gradient, NaN in these steps (from 0)."""
    real_step, real_forward = loop.train_step, LossModel.forward
    count = iter(range(1000))
    now = {"step": -1}

    def step(*args: Any) -> Any:
        now["step"] = next(count)
        return real_step(*args)

    def forward(self: Any, batch: Any, ratio: float) -> Any:
        loss, tokens = real_forward(self, batch, ratio)
        if now["step"] in steps and self.training:
            if what == "gradient":
                loss.register_hook(lambda g: g * float("nan"))
            else:
                loss = loss * float("nan")
        return loss, tokens

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(LossModel, "forward", forward)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_is_skipped_and_counted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Two in a row are survived: no weight is NaN, the skips are recorded with their sources."""
    poison(monkeypatch, {1, 2}, what)
    found = train(base, tmp_path / "a", max_steps=6)
    assert [m["step"] for m in found] == [1, 4, 5, 6]
    assert [m["sources"] for m in read_metrics(tmp_path / "a", "skip")] == [["d.jsonl"]] * 2
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "a").values())
    assert "skipped steps: 2" in (tmp_path / "a" / "final" / "README.md").read_text()


def test_three_non_finite_steps_in_a_row_stop_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sources are named; the model before the bad steps is kept, and nothing is published as a result."""
    poison(monkeypatch, {1, 2, 3}, "loss")
    with pytest.raises(TrainError, match=r"3 steps in a row were not finite, the last with sources d.jsonl\."):
        train(base, tmp_path / "a")
    assert not (tmp_path / "a" / "final").exists()
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "a", "checkpoints/step-00000004").values())


def test_fused_backward_checks_the_loss_before_and_stops_at_a_late_gradient(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN loss is skipped without touching a weight; a NaN gradient stops, naming the last checkpoint."""
    fused = {"fused_backward": True, "micro_batch": 4, "save_every": 1}
    with monkeypatch.context() as patch:
        poison(patch, {1}, "loss")
        train(base, tmp_path / "a", **fused)
    steps = [weights(tmp_path / "a", f"checkpoints/step-0000000{s}") for s in (5, 6)]
    assert all(torch.isfinite(w).all() for w in steps[0].values())
    assert [m["step"] for m in read_metrics(tmp_path / "a", "skip")] == [2]
    poison(monkeypatch, {3}, "gradient")
    with pytest.raises(TrainError, match=r"Step 4: the gradient of .* Start again to go on from step-00000003"):
        train(base, tmp_path / "b", **fused)


def test_a_batch_without_a_label_is_an_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the sources of the batch."""
    real = loop.Mixture.step_batches

    def unlabelled(self: Any, step: int, rank: int) -> Any:
        batches = real(self, step, rank)
        for batch in batches:
            batch.labels.fill_(-100)
        return batches

    monkeypatch.setattr(loop.Mixture, "step_batches", unlabelled)
    with pytest.raises(TrainError, match=r"Step 1: no token of the batch has a label \(sources d.jsonl\)"):
        train(base, tmp_path / "a")


# ---- what a user sees ------------------------------------------------------------------------------------


def test_the_result_is_an_ordinary_folder_with_its_card(base: Path, tmp_path: Path) -> None:
    """transformers loads it, in shards; the card lists data, settings, curve and versions."""
    prompt = "### User:\nred dog sun\n### Assistant:\n"
    found = train(base, tmp_path / "a", max_shard_bytes=60_000, sample_prompts=[prompt], sample_tokens=4)
    final = tmp_path / "a" / "final"
    assert len(list(final.glob("model-*-of-*.safetensors"))) > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert tokenizer("red dog")["input_ids"] == AutoTokenizer.from_pretrained(base / "model")("red dog")["input_ids"]
    assert {n for n, _ in model.named_parameters()} == set(load_file(base / "model" / "model.safetensors"))
    card = (final / "README.md").read_text()
    for part in (
        "mixing ratio 0.5",
        "d.jsonl",
        "- lr: 0.003",
        "torch",
        "loss.png",
    ):
        assert part in card
    assert (final / "loss.png").stat().st_size > 1000
    assert [m["step"] for m in found] == list(range(1, 7))
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= found[0].keys()
    (sample,) = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] == prompt
    reports = json.loads((tmp_path / "a" / "data.json").read_text())
    assert (reports[0]["examples"], reports[0]["held_out_examples"]) == (56, 8)


def test_evaluation_is_plain_cross_entropy_per_source(base: Path, tmp_path: Path) -> None:
    """Whatever the mixing ratio; it equals transformers' own loss on the held-out examples."""
    from train.data import open_sources

    train(base, tmp_path / "a", mixing_ratio=0.0, max_steps=2)
    (line,) = read_metrics(tmp_path / "a", "eval")
    config = build_config(values(base, tmp_path / "a"))
    names = json.loads((tmp_path / "a" / "run.json").read_text())["data"]
    (source,) = open_sources(config, tmp_path / "a" / "data", names)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "final")
    total = count = 0.0
    for i in range(len(source.held_out)):
        span = slice(int(source.held_out.offsets[i]), int(source.held_out.offsets[i + 1]))
        ids = torch.tensor(source.held_out.ids[span]).long()[None]
        learned = torch.tensor(source.held_out.learned[span])[None]
        labels = torch.where(learned, ids, -100)
        n = int((labels[:, 1:] != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss.item() * n, count + n
    assert line["nll"]["d.jsonl"] == pytest.approx(total / count, rel=1e-4)


# ---- two ranks ------------------------------------------------------------------------------------------

TWO_RANKS: dict[str, dict[str, Any]] = {
    "adamw-clipped": {"max_grad_norm": 0.5, "micro_batch": 1, "max_shard_bytes": 60_000},
    "adalite-frozen-checkpointed": {**ADALITE, "freeze_embeddings": True, "activation_checkpointing": True},
    "fused-backward": {**ADALITE, "fused_backward": True},
    "padded-uneven-evaluation": {**ADALITE, "packing": False, "eval_batches": 3},
    "examples-of-uneven-rows": {"global_batch": None, "global_batch_examples": 11, "micro_batch": 1},
    "exchanged-each-micro-batch": {"micro_batch": 1, "accumulate_in": "bfloat16"},
}


@pytest.fixture(scope="module")
def two_ranks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All configs, run by the same two gloo processes (one start instead of four)."""
    folder = tmp_path_factory.mktemp("two")
    configs = [
        write_config(folder / f"{name}.yaml", values(base, folder / name, save_every=3, **change))
        for name, change in TWO_RANKS.items()
    ]
    done = run_two_ranks(*configs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one(base: Path, tmp_path: Path, two_ranks: Path, name: str) -> None:
    """FSDP2 on gloo gives one process's losses, norms, evaluation and weights, in float tolerance."""
    change = dict(TWO_RANKS[name])
    if change.get("fused_backward"):
        change["micro_batch"] = 4
    alone, shared = train(base, tmp_path / "a", **change), read_metrics(two_ranks / name)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    if alone[0]["grad_norm"] is not None:
        assert [m["grad_norm"] for m in shared] == pytest.approx([m["grad_norm"] for m in alone], rel=1e-4)
    evals = [read_metrics(out, "eval")[-1]["nll"]["d.jsonl"] for out in (tmp_path / "a", two_ranks / name)]
    assert evals[0] == pytest.approx(evals[1], rel=1e-5)
    a, b = (
        AutoModelForCausalLM.from_pretrained(out / "final").state_dict() for out in (tmp_path / "a", two_ranks / name)
    )
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5)


def test_one_process_resumes_what_two_saved(
    base: Path, tmp_path: Path, two_ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint does not depend on the number of processes: the losses go on as they would have; a note says that
    the random numbers do not."""
    name = "adamw-clipped"
    shutil.copytree(two_ranks / name, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "final")
    found = train(base, tmp_path / "a", save_every=3, **TWO_RANKS[name])
    assert losses(found) == pytest.approx(losses(read_metrics(two_ranks / name)), rel=1e-5)
    assert "Note: the number or kind of processes changed." in capsys.readouterr().err


def test_a_tiny_stablelm_learns(base: Path, tmp_path: Path) -> None:
    """With NEFTune and Adalite as in the recipe, the loss falls by half."""
    found = train(base, tmp_path / "a", max_steps=60, neftune_alpha=1.0, lr=2e-4, optimizer="adalite")
    assert found[-1]["loss"] < found[0]["loss"] / 2


def test_a_model_without_sdpa_trains_with_eager_attention(base: Path, tmp_path: Path) -> None:
    """Gemma 2 (soft-capped logits and attention) says what to set, and then trains through the fused loss."""
    model = tmp_path / "gemma"
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, final_logit_softcapping=5.0,
        attn_logit_softcapping=20.0, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    with pytest.raises(TrainError, match="Set attention: eager"):
        finetune(build_config({**values(base, tmp_path / "a"), "model": str(model)}))
    found = []
    for number, fused_loss in enumerate((True, False)):
        asked = values(base, tmp_path / str(number), attention="eager", fused_loss=fused_loss)
        finetune(build_config({**asked, "model": str(model)}))
        found.append(losses(read_metrics(tmp_path / str(number))))
    fused, plain = found
    assert fused[-1] < fused[0]
    assert fused == pytest.approx(plain, rel=1e-4)


def test_an_evaluation_that_beats_all_before_it_is_saved(base: Path, tmp_path: Path) -> None:
    """Without `save_every` the best evaluated model is kept all the same."""
    train(base, tmp_path / "a", eval_every=2)
    evals = {m["step"]: m["nll"]["d.jsonl"] for m in read_metrics(tmp_path / "a", "eval")}
    saved = [checkpoint.read_progress(f).step for f in retention.list_checkpoints(tmp_path / "a")]
    assert min((2, 4), key=lambda step: evals[step]) in saved


def test_more_tokens_than_positions_are_refused() -> None:
    """Learned positions end; rotary ones go on, with a note."""
    said: list[str] = []
    with pytest.raises(TrainError, match="has positions for 64 tokens"):
        check_context(GPT2Config(n_positions=64), make_config(sequence_length=200), said.append)
    check_context(StableLmConfig(max_position_embeddings=128), make_config(sequence_length=200), said.append)
    assert "beyond the context" in said[0]
    check_context(StableLmConfig(max_position_embeddings=128), make_config(sequence_length=100), said.append)
    assert len(said) == 1
