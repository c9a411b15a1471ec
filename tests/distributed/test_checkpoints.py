"""What a checkpoint of a distributed run holds, and that a run goes on from it as if never stopped.

Bitwise on the same number of ranks; on another, with the same estimate and as near to the same
batch as whole windows allow.
"""

import copy
import functools
import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD
from noiseopt.record import DecisionLog, read, replay
from tests.distributed.ranks import NEEDS_FSDP2, RANKS, part, result, run_on_ranks, weights_of
from tests.distributed.test_ddp import LR, adaptive_config, assert_agreed, seen, watched
from tests.distributed.test_fsdp2 import shard
from tests.optim.helpers import build, draw, fixed, joined, loss_of, train

BEFORE, AFTER = 120, 40
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # rank 0 gets it all
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def start(wrap, scale=1):
    net = wrap(build())
    config = replace(adaptive_config(scale), min_accumulation_steps=1, max_accumulation_steps=16)
    return net, NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)


def to_a_boundary(net, optimizer, batches):
    """Train on at least so many micro-batches, to the end of a window; how many it took."""
    taken = BEFORE
    train(net, optimizer, batches[:taken])
    while not optimizer.applied:
        train(net, optimizer, batches[taken : taken + 1])
        taken += 1
    return taken


class Plain:
    """Each object's own state, as most scripts save it."""

    def save(self, net, optimizer):
        return copy.deepcopy({"model": net.state_dict(), "optimizer": optimizer.state_dict()})

    def load(self, net, optimizer, saved):
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])


class OneOnly(Plain):
    """Rank 0 alone takes the state, and the others get it."""

    def save(self, net, optimizer):
        box = [super().save(net, optimizer) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        return box[0]


class Distributed:
    """torch.distributed.checkpoint's view of both, sharded or whole."""

    def __init__(self, options=None, to_load=None):
        self.options, self.to_load = options, to_load

    def save(self, net, optimizer):
        return copy.deepcopy(
            {
                "model": get_model_state_dict(net, options=self.options),
                "optimizer": get_optimizer_state_dict(net, optimizer, options=self.options),
            }
        )

    def load(self, net, optimizer, saved):
        set_model_state_dict(net, saved["model"], options=self.to_load)
        set_optimizer_state_dict(net, optimizer, saved["optimizer"], options=self.to_load)


class OnDisk(Distributed):
    """The same through files that all ranks write."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def save(self, net, optimizer):
        dcp.save(super().save(net, optimizer), checkpoint_id=self.folder)

    def load(self, net, optimizer, saved):
        found = super().save(net, optimizer)
        dcp.load(found, checkpoint_id=self.folder)
        super().load(net, optimizer, found)


def resumed(rank, wrap, way):
    """A run that is saved half-way, beside one that loads it and takes the same micro-batches."""
    batches = part(draw((BEFORE + AFTER + 8) * RANKS), rank)
    net, optimizer = start(wrap)
    taken = to_a_boundary(net, optimizer, batches)
    saved = way.save(net, optimizer)
    kept = len(optimizer.decisions)
    train(net, optimizer, batches[taken : taken + AFTER])
    again, other = start(wrap)
    way.load(again, other, saved)
    train(again, other, batches[taken : taken + AFTER])
    decisions = [replace(d, windows=()) for d in optimizer.decisions[kept:]]
    return (
        {"weights": weights_of(net), "decisions": decisions},
        {
            "weights": weights_of(again),
            "decisions": [replace(d, windows=()) for d in other.decisions],
        },
    )


def saved_whole(rank):
    """The whole state of a sharded run, from which another number of ranks may go on."""
    net, optimizer = start(shard)
    to_a_boundary(net, optimizer, part(draw((BEFORE + 8) * RANKS), rank))
    way = Distributed(FULL)
    return way.save(net, optimizer) | seen(optimizer, net)


def loaded_on_one_rank_only(rank):
    """A script that forgets to load on the others stops before it trains."""
    net, optimizer = start(DistributedDataParallel)
    train(net, optimizer, part(draw(30 * RANKS), rank))
    saved = Plain().save(net, optimizer)
    again, other = start(DistributedDataParallel)
    if rank == 0:
        other.load_state_dict(saved["optimizer"])
    with pytest.raises(RuntimeError, match="ranks disagree on what they start from") as caught:
        train(again, other, part(draw(RANKS), rank))
    return str(caught.value)


def saved_in_windows(rank, wrap, accumulates):
    """After every micro-batch; without momentum, SGD's state is built anew each time."""
    net = wrap(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=fixed(4))
    for batch in part(draw(8 * RANKS), rank):
        with optimizer.accumulate(net) if accumulates else nullcontext():
            loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        get_optimizer_state_dict(net, optimizer)
    return weights_of(net), optimizer.num_updates


class InAFile(Plain):
    """The same through a file that rank 0 writes and all read."""

    def __init__(self, path):
        self.path = path

    def save(self, net, optimizer):
        if dist.get_rank() == 0:
            torch.save(super().save(net, optimizer), self.path)
        dist.barrier()

    def load(self, net, optimizer, saved):
        super().load(net, optimizer, torch.load(self.path, weights_only=False))


def ways(folder):
    """How a run is saved that goes on on more ranks, by name."""
    return {
        "DDP": {"wrap": DistributedDataParallel, "way": InAFile(folder / "state.pt")},
        "FSDP2": {"wrap": shard, "way": OnDisk(str(folder / "grown"))},
    }


def record_of(folder, name):
    return folder / name / "decisions.jsonl"


def begun_alone(rank, wrap, way, path):
    """A run on one rank, in windows of two, which ends as it is saved."""
    net, optimizer = start(wrap, scale=RANKS)
    optimizer.add_observer(DecisionLog(path))
    taken = to_a_boundary(net, optimizer, draw(BEFORE + 16))
    way.save(net, optimizer)
    again, other = start(wrap, scale=RANKS)
    way.load(again, other, None)
    return {"taken": taken, "weights": weights_of(net), "noise": other.noise}


def gone_on(rank, wrap, way, path):
    """What is loaded of it, and how it goes on."""
    net, optimizer = start(wrap, scale=RANKS)
    messages = []
    logging.getLogger("noiseopt").setLevel(logging.INFO)
    handler = watched(messages)
    way.load(net, optimizer, None)
    logging.getLogger("noiseopt").removeHandler(handler)
    logging.getLogger("noiseopt").setLevel(logging.WARNING)
    loaded = {"weights": weights_of(net), "noise": optimizer.noise}
    if rank == 0:
        optimizer.add_observer(DecisionLog(path, resume=True))
    train(net, optimizer, part(draw(AFTER * RANKS, seed=9), rank))
    return seen(optimizer, net) | {"messages": messages, "loaded": loaded}


def cases(folder):
    return {
        **{
            f"{name} on more": functools.partial(gone_on, path=record_of(folder, name), **how)
            for name, how in ways(folder).items()
        },
        "plain": functools.partial(resumed, wrap=DistributedDataParallel, way=Plain()),
        "rank 0": functools.partial(resumed, wrap=DistributedDataParallel, way=OneOnly()),
        "ddp": functools.partial(resumed, wrap=DistributedDataParallel, way=Distributed()),
        "sharded": functools.partial(resumed, wrap=shard, way=Distributed()),
        "whole": functools.partial(resumed, wrap=shard, way=Distributed(FULL, FROM_RANK_0)),
        "disk": functools.partial(resumed, wrap=shard, way=OnDisk(str(folder / "dcp"))),
        "for others": saved_whole,
        "forgotten": loaded_on_one_rank_only,
        **{
            f"in windows of {kind}, {accumulates}": functools.partial(
                saved_in_windows, wrap=wrap, accumulates=accumulates
            )
            for kind, wrap in (("DDP", DistributedDataParallel), ("FSDP2", shard))
            for accumulates in (False, True)
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(folder):
    begun = {
        name: functools.partial(begun_alone, path=record_of(folder, name), **how)
        for name, how in ways(folder).items()
    }
    return run_on_ranks(begun, folder, ranks=1)


@pytest.fixture(scope="module")
def ranks(folder, one):
    return run_on_ranks(cases(folder), folder)


SHARDED = [pytest.param(name, marks=NEEDS_FSDP2) for name in ("sharded", "whole", "disk")]


@pytest.mark.parametrize("name", ["plain", "rank 0", "ddp", *SHARDED])
def test_a_run_goes_on_bitwise(ranks, name):
    (went_on, again), (other_went_on, other_again) = result(ranks, name)
    assert_agreed(went_on, other_went_on)
    assert_agreed(again, other_again)
    assert len(went_on["decisions"]) >= 1
    assert again["decisions"] == went_on["decisions"]
    assert torch.equal(again["weights"], went_on["weights"])


@NEEDS_FSDP2
def test_fewer_ranks_go_on_with_the_same_estimate_and_batch(ranks):
    """From two ranks to none: windows twice as long, the rates' factors as they were."""
    saved = result(ranks, "for others")[0]
    last = saved["decisions"][-1]
    net, optimizer = start(lambda net: net)
    messages = []
    logger, level = logging.getLogger("noiseopt"), logging.getLogger("noiseopt").level
    logger.setLevel(logging.INFO)
    handler = watched(messages)
    net.load_state_dict(saved["model"])
    set_optimizer_state_dict(net, optimizer, saved["optimizer"], options=FULL)
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert any("on 1 instead of 2 ranks" in message for message in messages)
    assert optimizer.accumulation_steps == RANKS * last.accumulation_steps
    assert torch.equal(weights_of(net), saved["weights"])
    interval = optimizer.config.decision_interval
    train(net, optimizer, draw(interval * optimizer.accumulation_steps, seed=9))
    now = optimizer.decision
    assert now.ranks == 1
    assert last.ranks == RANKS
    assert now.samples_seen > last.samples_seen
    assert now.num_updates > last.num_updates
    assert now.noise.count > last.noise.count
    assert now.windows[0].norms.samples == last.batch
    if now.action == "hold":
        assert now.batch == pytest.approx(last.batch)
        assert now.rates.beta2 == pytest.approx(last.rates.beta2)


@pytest.mark.parametrize("name", ["DDP", pytest.param("FSDP2", marks=NEEDS_FSDP2)])
def test_more_ranks_go_on_as_one_would_have(ranks, one, folder, name):
    """From one rank to two: windows half as long, of the same samples, and in one record."""
    (begun,) = result(one, name)
    first, second = result(ranks, f"{name} on more")
    assert_agreed(first, second)
    for each in (first, second):
        assert torch.equal(each["loaded"]["weights"], begun["weights"])
        assert each["loaded"]["noise"] == begun["noise"]
        assert any("goes on on 2 instead of 1 ranks" in message for message in each["messages"])
    net, optimizer = start(lambda net: net, scale=RANKS)
    train(net, optimizer, draw(BEFORE + 16)[: begun["taken"]])
    before = len(optimizer.decisions)
    train(net, optimizer, draw(AFTER * RANKS, seed=9))
    expected = list(optimizer.decisions)[before:]
    assert len(first["decisions"]) > 0
    assert [d.ranks for d in first["decisions"]] == [RANKS] * len(expected)
    assert [d.action for d in first["decisions"]] == [d.action for d in expected]
    assert [d.batch for d in first["decisions"]] == [d.batch for d in expected]
    assert [d.num_updates for d in first["decisions"]] == [d.num_updates for d in expected]
    assert first["decisions"][-1].noise.scale == pytest.approx(expected[-1].noise.scale, rel=1e-9)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)
    record = read(record_of(folder, name))
    assert [stretch.start.state.num_ranks for stretch in record.stretches] == [1, RANKS]
    assert [d.ranks for d in record.decisions] == [1] * before + [RANKS] * len(expected)
    assert all(replayed.same for replayed in replay(record))


def test_a_state_that_only_some_ranks_have_loaded_is_an_error(ranks):
    for message in result(ranks, "forgotten"):
        assert "num_updates: [" in message or "estimator" in message


@pytest.mark.parametrize("kind", ["DDP", pytest.param("FSDP2", marks=NEEDS_FSDP2)])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_state_that_is_taken_inside_a_window_leaves_it_as_it_is(ranks, kind, accumulates):
    net = build()
    train(net, torch.optim.SGD(net.parameters(), lr=LR), joined(draw(8 * RANKS), 4 * RANKS))
    for weights, updates in result(ranks, f"in windows of {kind}, {accumulates}"):
        assert updates == 2
        torch.testing.assert_close(weights, weights_of(net), rtol=0, atol=1e-12)
