"""Ranks whose gradients are not on the CPU: see tests/optim/test_accelerator.py."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.autograd import Variable

from noiseopt import NoiseAwareAdamW
from tests.accelerator import Accelerator, OnDevice, to_device
from tests.distributed.ranks import RANKS, part, result, run_on_ranks, windows_of
from tests.optim.helpers import build, draw, growing, loss_of

MICRO_BATCHES = 120
READ = "tolist"  # what waiting for many numbers at once looks like


def train(rank, step, accelerator=None):
    """Train by `step(model, optimizer, batch)`; of each it tells what waited, and what came."""
    model = build(torch.float32)
    batches = part(draw(RANKS * MICRO_BATCHES, dtype=torch.float32), rank)
    waits = []
    if accelerator is not None:
        model, waits = to_device(model), accelerator.waits
        batches = [tuple(OnDevice(each) for each in batch) for batch in batches]
    config = growing(accumulation_steps=2)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config, fused=True)
    steps = []
    for batch in batches:
        decided, before = len(optimizer.decisions), len(waits)
        closes = len(optimizer._collector) + 1 >= optimizer.accumulation_steps
        step(model, optimizer, batch)
        steps.append((waits[before:], closes, len(optimizer.decisions) > decided))
    held = [getattr(param.detach(), "held", param.detach()) for param in model.parameters()]
    return {
        "weights": torch.cat([param.flatten() for param in held]),
        "windows": windows_of(optimizer),
        "decisions": [(each.accumulation_steps, each.reason) for each in optimizer.decisions],
        "steps": steps,
    }


def keeping(model, optimizer, batch):
    """Each rank keeps its own gradients, and the optimizer averages them."""
    with optimizer.accumulate(model):
        loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def averaging(model, optimizer, batch):
    """Every micro-batch's gradients are averaged at the end of its backward, as DDP has it."""

    def average():
        for param in model.parameters():
            dist.all_reduce(param.grad)
            param.grad /= RANKS

    loss = loss_of(model, batch)
    loss.register_hook(lambda grad: Variable._execution_engine.queue_callback(average))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


LOOPS = {"keeping": keeping, "averaging": averaging}


def on_accelerator(rank, step):
    with Accelerator() as accelerator:
        return train(rank, step, accelerator)


CASES = {
    f"{name}, {where}": functools.partial(run, step=step)
    for name, step in LOOPS.items()
    for where, run in (("there", on_accelerator), ("here", train))
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", LOOPS)
def test_ranks_measure_and_train_as_on_the_cpu(ranks, name):
    here, _ = result(ranks, f"{name}, here")
    there, other = result(ranks, f"{name}, there")
    assert torch.equal(there["weights"], other["weights"])
    torch.testing.assert_close(there["weights"], here["weights"], rtol=1e-5, atol=1e-6)
    assert there["decisions"] == other["decisions"] == here["decisions"]
    assert len({steps for steps, _ in there["decisions"]}) > 1
    measured = [window.norms for window in here["windows"] if window.norms.small_sq]
    assert sum(sum(each.small_sq) > 1.2 * sum(each.big_sq) for each in measured) > len(measured) / 2
    for one, same in zip(there["windows"], here["windows"], strict=True):
        assert one.norms.small_sq == pytest.approx(same.norms.small_sq, rel=1e-4)
        assert one.norms.big_sq == pytest.approx(same.norms.big_sq, rel=1e-4)


def test_only_decisions_wait(ranks):
    for rank in result(ranks, "averaging, there"):
        for waits, _, decided in rank["steps"][1:]:  # in the first, ranks compare what they have
            assert set(waits) == ({READ} if decided else set())


def test_a_window_of_own_gradients_waits_once_for_which_there_are(ranks):
    """Which are to be summed depends on what the ranks have: see README."""
    for rank in result(ranks, "keeping, there"):
        for waits, closes, decided in rank["steps"][1:]:
            assert set(waits) <= {READ}
            assert decided or len(waits) == closes
