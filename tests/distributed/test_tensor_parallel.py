"""Tensor-parallel models on two real ranks, held against one process."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD
from tests.distributed.ranks import RANKS, result, run_on_ranks, weights_of
from tests.distributed.test_ddp import (
    LR,
    STEPS,
    assert_agreed,
    assert_same_windows,
    measured,
    seen,
    watched,
)
from tests.optim.helpers import FEATURES, HIDDEN, OUTPUTS, draw, fixed, joined, loss_of, train

TOKENS = 12


class Block(nn.Module):
    """An MLP with a norm, for tensor parallelism."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUTPUTS)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


class Embedded(Block):
    """The same on tokens; their embedding is to be split by rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, FEATURES).double()

    def forward(self, x):
        return super().forward(self.embed((x[:, 0].abs() * TOKENS).long() % TOKENS))


def split(net, mesh):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if isinstance(net, Embedded):  # every rank has its gradient whole
        plan["embed"] = RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(net, mesh, plan)


def tensor_parallel(rank, steps=2):
    """Both ranks hold parts of one model and see the same data."""
    net = split(Block(), init_device_mesh("cpu", (RANKS,)))
    config = replace(measured(steps), samples_per_micro_batch=4)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    train(net, optimizer, draw(STEPS))
    return seen(optimizer, net)


def tensor_parallel_dropout(rank):
    """Parts of one model must drop out the same units: what is logged of that."""
    messages = []
    handler = watched(messages)
    net = nn.Sequential(nn.Dropout(0.3), split(Block(), init_device_mesh("cpu", (RANKS,))))
    torch.manual_seed(3)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    train(net, optimizer, draw(24))
    logging.getLogger("noiseopt").removeHandler(handler)
    return [message for message in messages if "noise advise" not in message]


def embedded(rank):
    """The loop accumulates by itself: every backward's gradients are read where they pass."""
    net = split(Embedded(), init_device_mesh("cpu", (RANKS,)))
    config = replace(measured(2), accumulation="external")
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    for index, batch in enumerate(draw(STEPS), start=1):
        (loss_of(net, batch) / 2).backward()
        if index % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return seen(optimizer, net)


def flushed(rank):
    net = split(Embedded(), init_device_mesh("cpu", (RANKS,)))
    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=measured(3))
    train(net, optimizer, draw(2))
    assert optimizer.flush()
    return seen(optimizer, net)


def head():
    torch.manual_seed(0)
    return nn.Linear(FEATURES, HIDDEN).double()


def warming_up(net):
    """A schedule that starts at 0; of the first micro-batch only some outputs count."""
    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=fixed(2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    counts = torch.arange(HIDDEN) < HIDDEN // RANKS
    for index, (inputs, _) in enumerate(draw(8)):
        (net(inputs).square() * (counts | (index > 0))).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return weights_of(net)


def warming_up_in_parts(rank):
    """Of those outputs the other rank holds none: all of its gradients are zero then."""
    mesh = init_device_mesh("cpu", (RANKS,))
    plan = ColwiseParallel(output_layouts=Replicate())
    return warming_up(parallelize_module(head(), mesh, plan))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = {
        "alike": tensor_parallel,
        "dropout": tensor_parallel_dropout,
        "embedded": embedded,
        "flushed": flushed,
        "warming up": warming_up_in_parts,
    }
    return run_on_ranks(cases, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize(("name", "model"), [("alike", Block), ("embedded", Embedded)])
def test_tensor_parallel_ranks_hold_one_gradient_together(ranks, name, model):
    """Also one that is spread otherwise than its parameter, as of an embedding split by rows."""
    first, second = result(ranks, name)
    assert_agreed(first, second)
    net = model()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    train(net, optimizer, draw(STEPS))
    assert_same_windows(first["windows"], seen(optimizer, net)["windows"], 1e-9)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)


def test_it_is_applied_when_an_open_window_is_flushed(ranks):
    first, second = result(ranks, "flushed")
    assert_agreed(first, second)
    net = Embedded()
    train(net, torch.optim.SGD(net.parameters(), lr=LR), joined(draw(2), 2))
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-12)


def test_a_rank_whose_parts_have_no_gradient_at_a_rate_of_zero_takes_the_micro_batch(ranks):
    for weights in result(ranks, "warming up"):
        torch.testing.assert_close(weights, warming_up(head()), rtol=0, atol=1e-12)


def test_tensor_parallel_ranks_that_drop_out_the_same_units_are_told_nothing(ranks):
    assert result(ranks, "dropout") == [[], []]
