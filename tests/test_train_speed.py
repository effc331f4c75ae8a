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

from tests.train_fixtures import REPO, config_values, copy_rows, environment, make_model, save_model, write_jsonl
from train import step as step_module
from train.batches import Batch
from train.config import build_config
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
