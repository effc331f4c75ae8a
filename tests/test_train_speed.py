"""What a step does not do: wait for the device, exchange more than it must, compute padding, round its sums."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train_fixtures import (
    REPO,
    config_values,
    copy_rows,
    environment,
    make_config,
    make_model,
    make_tokenizer,
    save_model,
    write_jsonl,
)
from train import step as step_module
from train.batches import Batch, Mixture
from train.config import build_config
from train.data import open_sources, prepare_sources
from train.errors import TrainError
from train.loop import finetune
from train.model import LossModel
from train.optim import Optimizer
from train.session import ready_model
from train.world import StopSignals, World

CPU = torch.device("cpu")


def random_batches(count: int, tokens: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    positions = torch.arange(tokens)[None]
    full = torch.full((1, tokens), tokens)
    ids = [torch.randint(20, 300, (1, tokens), generator=generator) for _ in range(count)]
    return [Batch(i, i.roll(-1, 1), positions, full, ("s",)) for i in ids]


def gradients_of_a_step(monkeypatch: pytest.MonkeyPatch, choice: str, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """What `train_step` has summed when it looks at the gradients' norm, by parameter."""
    config = build_config(
        {**config_values(Path("m"), Path("d.jsonl"), Path("o")), "accumulate_in": choice, "micro_batch": 1,
         "global_batch": len(batches), "lr": 1e-9}
    )  # fmt: skip
    world = World(0, 1, CPU)
    model = ready_model(make_model(dtype=torch.bfloat16), config, world)
    optimizer = Optimizer(dict(model.model.named_parameters()), config, torch.Generator())
    seen: dict[str, torch.Tensor] = {}

    def clip(module: LossModel, most: float | None) -> float:
        seen.update({n: p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None})
        return original(module, most)

    original = step_module.clip
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "clip", clip)
        step_module.train_step(model, batches, optimizer, config, world, 1e-9, StopSignals())
    return seen


def test_the_sum_of_many_micro_batches_is_exact_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 bfloat16 gradients: added in float32 they are their sum; added in bfloat16 they are off by half a percent."""
    batches = random_batches(64)
    model = LossModel(make_model(dtype=torch.bfloat16)).train()
    scale = 1 / sum(batch.labels.numel() for batch in batches)
    exact: dict[str, torch.Tensor] = {}
    for batch in batches:
        (model(batch, 0.5)[0] * scale).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            exact[name] = exact.get(name, 0) + p.grad.double()
            p.grad = None

    def error(found: dict[str, torch.Tensor]) -> float:
        off = sum(float((found[n].double() - exact[n]).square().sum()) for n in exact)
        return (off / sum(float(x.square().sum()) for x in exact.values())) ** 0.5

    wide = gradients_of_a_step(monkeypatch, "float32", batches)
    narrow = gradients_of_a_step(monkeypatch, "bfloat16", batches)
    assert {g.dtype for g in wide.values()} == {torch.float32}
    assert {g.dtype for g in narrow.values()} == {torch.bfloat16}
    assert error(wide) < 1e-5
    assert error(narrow) > 3e-3


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device's result."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(n) for n in self.NAMES):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(model: LossModel, batch: Batch) -> Counter[str]:
    with Waits() as waits:
        loss, _ = model(batch, 0.5)
        loss.backward()
    return waits.found


def test_forward_and_backward_do_not_wait_for_the_device() -> None:
    """The places of the labels are found on the host. What is left is transformers' own look at the positions."""
    model = LossModel(make_model()).train()
    (batch,) = random_batches(1)
    inner = Counter[str]()
    with Waits() as waits:
        model.model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    inner.update(waits.found)
    assert waits_of(model, batch) - inner  # before `to`: our own search
    assert not waits_of(model, batch.to(CPU)) - inner


COUNT = """
import sys, torch, torch.distributed as dist
from collections import Counter
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group
from train.config import build_config
from train.session import ready_model
from train.optim import Optimizer
from train.step import train_step
from train.world import World, StopSignals
from tests.train_fixtures import config_values, make_model
from tests.test_train_speed import random_batches
dist.init_process_group("gloo")
rank = dist.get_rank()
calls = Counter()
exchange = group.foreach_reduce
def counted(*a, **k):
    calls["exchange"] += 1
    return exchange(*a, **k)
group.foreach_reduce = counted
for choice in ("float32", "bfloat16"):
    config = build_config({**config_values("m", "d.jsonl", "o"), "accumulate_in": choice, "micro_batch": 1,
                           "global_batch": 16})
    world = World(rank, 2, torch.device("cpu"))
    model = ready_model(make_model(), config, world)
    optimizer = Optimizer(dict(model.model.named_parameters()), config, torch.Generator())
    calls.clear()
    result = train_step(model, random_batches(8), optimizer, config, world, 1e-3, StopSignals())
    if rank == 0:
        print(choice, calls["exchange"], f"{result.grad_norm:.5f}", flush=True)
dist.barrier()
import os; os._exit(0)
"""


@pytest.mark.slow
def test_gradients_are_exchanged_once_a_step(tmp_path: Path) -> None:
    """8 micro-batches in each of two processes: one exchange for each group of weights, not eight; the same sum."""
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**path), timeout=300)
    assert done.returncode == 0, done.stderr
    once, each = (line.split() for line in done.stdout.splitlines())
    assert (once[0], each[0]) == ("float32", "bfloat16")
    assert int(once[1]) > 0
    assert int(each[1]) == 8 * int(once[1])
    assert float(once[2]) == pytest.approx(float(each[2]), rel=1e-4)


def test_a_model_is_refused_before_its_text_is_tokenised(tmp_path: Path) -> None:
    """Tokenising may take hours; what the model needs does not depend on it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    save_model(tmp_path / "m")
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, vocab_size=320))
    bloom.save_pretrained(tmp_path / "m")
    data = write_jsonl(tmp_path / "d.jsonl", copy_rows(16))
    config = build_config(config_values(tmp_path / "m", data, tmp_path / "o", attention="eager"))
    with pytest.raises(TrainError, match="packing: false"):
        finetune(config)
    assert not (tmp_path / "o" / "data").exists()


# ---- what is computed ------------------------------------------------------------------------------------


def mixed(folder: Path, config: dict[str, Any], world_size: int = 1, count: int = 300) -> Mixture:
    """A mixture of examples of very different lengths."""
    generator = torch.Generator().manual_seed(2)
    sizes = (torch.rand(count, generator=generator) ** 3 * 60 + 1).int().tolist()
    rows = [{"question": f"q{n}", "answer": "red " * size} for n, size in enumerate(sizes)]
    source = {"path": str(write_jsonl(folder / "d.jsonl", rows)), "templates": [{"prompt": "{question}",
              "response": "{answer}"}]}  # fmt: skip
    settings = make_config(sources=[source], sequence_length=256, **config)
    names = prepare_sources(settings, make_tokenizer(), folder / "data")
    return Mixture(open_sources(settings, folder / "data", names), settings, 0, world_size)


def useful(mixture: Mixture) -> float:
    """The share of a step's tokens that are not padding, over all steps."""
    batches = [batch for step in range(mixture.steps) for batch in mixture.step_batches(step, 0)]
    return sum(int((b.lengths > 0).sum()) for b in batches) / sum(b.ids.numel() for b in batches)


def labels(mixture: Mixture, step: int, ranks: int = 1) -> list[int]:
    """All labels of a step, sorted."""
    batches = [batch for rank in range(ranks) for batch in mixture.step_batches(step, rank)]
    return sorted(int(n) for batch in batches for n in batch.labels[batch.labels != -100])


def test_a_global_batch_of_examples_is_the_recipes_step(tmp_path: Path) -> None:
    """The same examples in each step, packed or not, on any number of processes; packed, in under half the rows."""
    padded = mixed(tmp_path, {"packing": False, "global_batch": 64})
    packed = mixed(tmp_path, {"global_batch_examples": 64})
    assert packed.steps == padded.steps == 300 // 64
    for step in range(packed.steps):
        rows = sum(len(batch.ids) for batch in packed.step_batches(step, 0))
        assert rows < 32
        assert labels(packed, step) == labels(padded, step)
    for ranks in (2, 3, 40):
        shared = mixed(tmp_path, {"global_batch_examples": 64, "micro_batch": 2}, ranks)
        assert labels(shared, 1, ranks) == labels(padded, 1)
        assert len({len(shared.step_batches(1, rank)) for rank in range(ranks)}) == 1
    assert useful(packed) > 0.9


def test_the_gradient_of_a_packed_global_batch_is_that_of_padded_rows(tmp_path: Path) -> None:
    model = LossModel(make_model(max_position_embeddings=256).double())
    found = []
    for config in ({"packing": False, "global_batch": 16}, {"global_batch_examples": 16}):
        model.zero_grad()
        for batch in mixed(tmp_path, config, count=20).step_batches(0, 0):
            model(batch, 0.5)[0].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(padded, packed, rtol=1e-9, atol=1e-11)


def test_padded_rows_are_sorted_by_length_inside_a_global_batch(tmp_path: Path) -> None:
    """Micro-batches of 4: from less than half of useful tokens to nine in ten."""
    mixture = mixed(tmp_path, {"packing": False, "global_batch": 64, "micro_batch": 4})
    as_drawn = 0
    for step in range(mixture.steps):
        sizes = [int(mixture.sources[0].train.lengths[row[0][1]]) for row in
                 (mixture.row(64 * step + i) for i in range(64))]  # fmt: skip
        as_drawn += sum(4 * max(sizes[i : i + 4]) for i in range(0, 64, 4))
    total = sum(int((b.lengths > 0).sum()) for s in range(mixture.steps) for b in mixture.step_batches(s, 0))
    assert total / as_drawn < 0.6
    assert useful(mixture) > 0.88


def test_a_compiled_model_sees_few_widths(tmp_path: Path) -> None:
    """Multiples of 64, at most the sequence length: each width is compiled anew."""
    plain, compiled = (mixed(tmp_path, {"packing": False, "global_batch": 4, "compile": c}) for c in (False, True))

    def widths(mixture: Mixture) -> set[int]:
        return {b.ids.shape[1] for s in range(mixture.steps) for b in mixture.step_batches(s, 0)}

    assert len(widths(plain)) > 20
    assert widths(compiled) <= {64, 128, 192, 256}
    assert all(labels(plain, step) == labels(compiled, step) for step in range(plain.steps))


def test_batches_of_examples_exclude_what_they_cannot_be() -> None:
    with pytest.raises(TrainError, match="global_batch and global_batch_examples are both given"):
        make_config(global_batch=2, global_batch_examples=2)
    with pytest.raises(TrainError, match="fused_backward needs one micro-batch a step"):
        make_config(global_batch_examples=2, fused_backward=True)
