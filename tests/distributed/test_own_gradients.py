"""Gradients that ranks keep until the window ends, and that the optimizer then averages itself.

The oracle is one process on the joined samples: the mean must be over all of them, however they
are spread over ranks and micro-batches.
"""

import functools
import logging
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from noiseopt import NoiseAwareAdamW, NoiseConfig
from tests.distributed.ranks import RANKS, part, result, run_on_ranks, weights_of
from tests.distributed.test_ddp import (
    LR,
    STEPS,
    WAYS,
    WithSpare,
    adaptive_config,
    alone,
    assert_agreed,
    assert_same_windows,
    measured,
    seen,
    watched,
)
from tests.optim.helpers import advise, build, draw, joined, loss_of, train

WIDE = 64  # enough parameters for traffic to show


def unwrapped(net, **kwargs):
    return net


def loop(optimizer, wrapped, batches, counts=False, loss=loss_of, accumulates=True):
    for batch in batches:
        if counts:
            optimizer.set_samples(len(batch[0]))
        with optimizer.accumulate(wrapped) if accumulates else nullcontext():
            loss(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def run(rank, wrap=DistributedDataParallel, steps=3, dtype=torch.float64, config=None, **ways):
    net = build(dtype)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config or measured(steps))
    batches = part(draw(STEPS * RANKS, dtype=dtype), rank)
    wrapped = wrap(net, **ways)
    loop(optimizer, wrapped, batches, accumulates=config is None)
    return seen(optimizer, net)


def estimated(rank, wrap, dtype, accumulates=True):
    """The estimate at weights that stand still, as good as."""
    net = wrap(build(dtype))
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-9, noise=measured(2))
    loop(optimizer, net, part(draw(STEPS * RANKS, dtype=dtype), rank), accumulates=accumulates)
    return optimizer.noise


def assert_estimated(found, dtype, rel):
    """Both ranks estimate what one process on the same samples does."""
    first, second = found
    assert first == second
    net = build(dtype)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-9, noise=measured(2 * RANKS))
    train(net, optimizer, draw(STEPS * RANKS, dtype=dtype))
    for name in ("scale", "signal", "trace"):
        assert getattr(first, name) == pytest.approx(getattr(optimizer.noise, name), rel=rel)


TYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}


ROWS = ((10, 5000), (10, 2500), (2500, 5000))


def large_table(rank, same_data, clips=False, rows=(10, 5000)):
    """Few of its rows are used at a time, and none of the first ones."""
    messages = []
    handler = watched(messages)
    torch.manual_seed(0)
    table = nn.EmbeddingBag(5000, 600).double()
    torch.manual_seed(rank)
    optimizer = NoiseAwareAdamW(table.parameters(), lr=LR, noise=measured(2))
    generator = torch.Generator().manual_seed(1 if same_data else 1 + rank)
    for _ in range(12):
        with optimizer.accumulate(table):
            used = torch.randint(*rows, (4, 3), generator=generator)
            (table(used).square().mean() * 1e5).backward()
        if clips:
            nn.utils.clip_grad_norm_(table.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("noiseopt").removeHandler(handler)
    return [message for message in messages if "same data" in message]


def guarded(rank, wrap, same_data, same_randomness, accumulates=True, clips=False):
    """What is logged where ranks see the same data, or drop out the same units."""
    messages = []
    handler = watched(messages)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    wrapped = wrap(net)
    if not same_randomness:
        torch.manual_seed(rank)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR / 10, noise=measured(2))
    batches = draw(48) if same_data else part(draw(48 * RANKS), rank)
    for batch in batches:
        with optimizer.accumulate(wrapped) if accumulates else nullcontext():
            loss_of(wrapped, batch).backward()
        if clips:  # each rank its own gradients, all to one norm
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("noiseopt").removeHandler(handler)
    return [message for message in messages if "ranks" in message and "noise advise" not in message]


GUARDED = {
    "same data": {"same_data": True, "same_randomness": True},
    "same dropout": {"same_data": False, "same_randomness": True},
    "different": {"same_data": False, "same_randomness": False},
}


def assert_told(found, name):
    """Rank 0 says each thing once, in the order in which it is seen."""
    first, second = found
    words = {
        "same data": ["see the same data", "draw the same random numbers"],
        "same dropout": ["draw the same random numbers"],
        "different": [],
    }[name]
    assert len(first) == len(words)
    assert all(word in message for word, message in zip(words, first, strict=True))
    assert second == []


def raises_inside(rank, after):
    """One rank's micro-batch raises inside `accumulate`, and its loop goes on with the next."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    net = build()
    config = fixed_local(2)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config, process_group=group)
    wrapped = DistributedDataParallel(net)
    for index, batch in enumerate(part(draw(6 * RANKS), rank)):
        bad = rank == 1 and index == BAD
        try:
            with optimizer.accumulate(wrapped):
                if not (bad and not after):
                    loss_of(wrapped, batch).backward()
                if bad:
                    raise ValueError("a bad sample")
        except ValueError:
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    return seen(optimizer, net)


BAD = 2


def adaptive_run(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=adaptive_config(1))
    loop(optimizer, DistributedDataParallel(net), part(draw(240 * RANKS), rank))
    optimizer.flush()
    return seen(optimizer, net)


SIZES = ([3, 1, 5, 2, 7, 4, 6], [2, 8, 1, 4, 3])


def uneven_batches(rank):
    return draw(len(SIZES[rank]), SIZES[rank], seed=rank)


def uneven(rank, steps=2, reduction="mean"):
    """Unequal samples, and one rank has two micro-batches more."""
    net = build()
    config = replace(fixed_local(steps), loss_reduction=reduction)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)

    def loss(model, batch):
        return loss_of(model, batch) * (len(batch[0]) if reduction == "sum" else 1)

    wrapped = DistributedDataParallel(net)
    loop(optimizer, wrapped, uneven_batches(rank), counts=True, loss=loss)
    flushed = optimizer.flush()
    return seen(optimizer, net) | {"flushed": flushed, "again": optimizer.flush()}


def falling(optimizer):
    """A schedule of which no two steps have the same rate."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def uneven_and_scheduled(rank, number=float):
    """Each rank's schedule goes by its own micro-batches."""
    net = build()
    optimizer = NoiseAwareAdamW(
        net.parameters(),
        lr=number(LR),
        betas=(number(0.9), number(0.999)),
        foreach=False,
        noise=fixed_local(2),
    )
    schedule, wrapped = falling(optimizer), DistributedDataParallel(net)
    for batch in uneven_batches(rank):
        loop(optimizer, wrapped, [batch], counts=True)
        schedule.step()
    optimizer.flush()
    return seen(optimizer, net) | {"rate": optimizer.param_groups[0]["lr"]}


def uneven_epochs(rank):
    """The schedule goes by updates, and so do the next epoch's on all ranks."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=fixed_local(2))
    schedule, wrapped = falling(optimizer), DistributedDataParallel(net)

    def catch_up():
        while schedule.last_epoch < optimizer.num_updates:
            schedule.step()

    for _ in range(2):
        for batch in uneven_batches(rank):
            loop(optimizer, wrapped, [batch], counts=True)
            catch_up()
        optimizer.flush()
        catch_up()
    return seen(optimizer, net)


def no_data(rank):
    """One rank has nothing at all."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=fixed_local(2))
    loop(optimizer, net, draw(4) if rank == 0 else [], accumulates=False)
    optimizer.flush()
    return seen(optimizer, net)


def zero_at_a_rate_of_0(rank):
    """A first micro-batch that is masked on one rank, in a warm-up that begins at 0."""
    net = build()
    noise = replace(measured(1), gradients="local")
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=noise)
    schedule = LambdaLR(optimizer, lambda call: min(call / 4, 1.0))
    for index, batch in enumerate(part(draw(6 * RANKS), rank)):
        (loss_of(net, batch) * (0.0 if rank == index == 0 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return seen(optimizer, net)


def no_data_at_a_rate_of_0(rank, accumulates):
    """As a warm-up begins: no rank waits for one that has no data, and none loses a micro-batch."""
    group = dist.new_group(timeout=timedelta(seconds=20))
    net = build()
    config = fixed_local(2)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=0.0, noise=config, process_group=group)
    loop(optimizer, net, draw(4) if rank == 0 else [], accumulates=accumulates)
    optimizer.flush()
    return seen(optimizer, net)


def fixed_local(steps):
    return replace(advise(steps, decision_interval=1), gradients="local")


def static_and_local(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=fixed_local(2))
    wrapped = DistributedDataParallel(net, static_graph=True)
    with pytest.raises(ValueError, match="static_graph=True"), optimizer.accumulate(wrapped):
        pass


def spare(rank):
    """Layers that get no gradient on one rank, on some steps, or ever."""
    net = WithSpare()
    net.calls = rank
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    loop(optimizer, net, part(draw(8 * RANKS), rank))
    return seen(optimizer, net) | {"touched": net.never.weight.grad is not None}


def nonfinite(rank):
    net = build()
    config = NoiseConfig(
        accumulation_steps=2,
        min_accumulation_steps=2,
        max_accumulation_steps=2,
        adapt_clip=False,
        decision_interval=1,
    )
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    batches = part(draw(8 * RANKS), rank)
    if rank == 1:
        batches[3] = (batches[3][0] * torch.nan, batches[3][1])
    loop(optimizer, DistributedDataParallel(net), batches)
    return seen(optimizer, net) | {"skipped": optimizer.decision.total_skipped}


def scaled(rank):
    """Each rank's GradScaler unscales its own part, with its own scale."""
    net = build(torch.float32)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    scaler, wrapped = GradScaler("cpu", init_scale=2.0 ** (8 + rank)), DistributedDataParallel(net)
    for index, batch in enumerate(part(draw(STEPS * RANKS, dtype=torch.float32), rank)):
        with optimizer.accumulate(wrapped):
            scaler.scale(loss_of(wrapped, batch)).backward()
        scaler.step(optimizer)
        scaler.update(2.0 ** (4 + index % 3 + rank))
        optimizer.zero_grad()
    return seen(optimizer, net)


def scaler_that_skips(rank, skipped, set_to_none=True, schedules=False):
    """An overflow on one rank, whose GradScaler leaves step() out there and nowhere else."""
    net = build(torch.float32)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    schedule = falling(optimizer) if schedules else None
    scaler, wrapped = GradScaler("cpu", init_scale=2.0), DistributedDataParallel(net)
    for index, batch in enumerate(part(draw(12 * RANKS, dtype=torch.float32), rank)):
        with optimizer.accumulate(wrapped):
            loss = scaler.scale(loss_of(wrapped, batch))
            (loss * torch.inf if rank == 1 and index in skipped else loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0)
        optimizer.zero_grad(set_to_none)
        if schedule is not None:
            schedule.step()
    optimizer.flush()
    return seen(optimizer, net)


SKIP = 2  # of the uneven micro-batches


def skipped_and_counted(rank, before):
    """Samples are told before the forward or after it, and one step is skipped on one rank."""
    net = build(torch.float32)
    config = replace(fixed_local(2), samples_per_micro_batch=None)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    scaler, wrapped = GradScaler("cpu", init_scale=2.0), DistributedDataParallel(net)
    for index, batch in enumerate(draw(len(SIZES[1]), SIZES[rank][:5], torch.float32, seed=rank)):
        if before:
            optimizer.set_samples(len(batch[0]))
        with optimizer.accumulate(wrapped):
            loss = scaler.scale(loss_of(wrapped, batch))
            (loss * torch.inf if rank == 1 and index == SKIP else loss).backward()
        if not before:
            optimizer.set_samples(len(batch[0]))
        scaler.step(optimizer)
        scaler.update(2.0)
        optimizer.zero_grad()
    optimizer.flush()
    return seen(optimizer, net)


def frozen_inside(rank):
    """A GAN freezes its discriminator while the window of that is open."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    wrapped = DistributedDataParallel(net)
    loop(optimizer, wrapped, part(draw(2 * RANKS), rank))
    net.requires_grad_(False)
    optimizer.flush()
    return seen(optimizer, net)


class WithBuffer(nn.Module):
    """A model whose running mean is a part of its output."""

    def __init__(self):
        super().__init__()
        self.net = build()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.net(x - self.mean)


def buffered(rank, steps):
    """The buffers and weights of two models, trained by ours and by a plain loop's windows."""
    batches = part(draw(6 * RANKS), rank)
    ours, plain = (DistributedDataParallel(WithBuffer()) for _ in range(2))
    loop(NoiseAwareAdamW(ours.parameters(), lr=LR, noise=measured(steps)), ours, batches)
    optimizer = torch.optim.AdamW(plain.parameters(), LR)
    for index, batch in enumerate(batches, start=1):
        with nullcontext() if index % steps == 0 else plain.no_sync():
            (loss_of(plain, batch) / steps).backward()
        if index % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    for wrapped in (ours, plain):  # DDP sends its buffers in the forward that follows
        wrapped.eval()
        wrapped(batches[0][0])
    return *(each.module.mean for each in (ours, plain)), weights_of(ours), weights_of(plain)


def wrapped_anew(rank, model=WithBuffer, container=unwrapped, at=4, sizes=(4, 2), **ways):
    """A run whose model is wrapped anew in its midst, and one that is not."""
    batches = part(draw(12 * RANKS, [*sizes] * 12), rank)
    runs, known = [], []
    for again in (True, False):
        net = model()
        optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
        wrapped = container(DistributedDataParallel(net, **ways))
        loop(optimizer, wrapped, batches[:at], counts=True)
        if again:
            known.append(wrapped)
            wrapped = container(DistributedDataParallel(net, **ways))
        loop(optimizer, wrapped, batches[at:], counts=True)
        wrapped.eval()
        wrapped(batches[0][0])  # before it DDP sends its buffers
        runs.append(seen(optimizer, net) | {"buffers": list(net.buffers())})
    return runs


def thawing(batches, steps, wrap, joins):
    """A trunk that is frozen for two windows, or none of the optimizer's, and wrapped then."""
    net = build()
    trunk, head = net[0], net[2]
    net[2] = wrap(head)
    if joins:
        net[0] = wrap(trunk)
    trunk.requires_grad_(joins)
    optimizer = NoiseAwareAdamW((head if joins else net).parameters(), lr=LR, noise=measured(steps))
    loop(optimizer, net, batches[: 2 * steps])
    if joins:
        optimizer.add_param_group({"params": list(trunk.parameters())})
        net.zero_grad()
    else:
        trunk.requires_grad_(True)
        net[0] = wrap(trunk)
    loop(optimizer, net, batches[2 * steps :])
    return seen(optimizer, net)


def thawed(rank, joins):
    return thawing(part(draw(12 * RANKS), rank), 2, DistributedDataParallel, joins)


def other_weights(rank):
    """Nothing makes the weights of models equal that are not wrapped."""
    net = build(seed=rank)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=fixed_local(1))
    loss_of(net, draw(RANKS)[rank]).backward()
    with pytest.raises(RuntimeError, match="squared norm of the parameters"):
        optimizer.step()


def inner_module(rank):
    """accumulate() is given what DDP wraps, not DDP."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    wrapped = DistributedDataParallel(net)
    for batch in part(draw(STEPS * RANKS), rank):
        with optimizer.accumulate(wrapped.module):
            loss_of(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def step_inside(rank):
    """The whole iteration inside the context; and one that raises there leaves nothing behind."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    wrapped = DistributedDataParallel(net)
    with pytest.raises(ZeroDivisionError), optimizer.accumulate(wrapped):
        1 / 0  # noqa: B018
    for batch in part(draw(STEPS * RANKS), rank):
        with optimizer.accumulate(wrapped):
            loss_of(wrapped, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen(optimizer, net)


def nested(rank):
    """Two modules that are wrapped apart, in contexts of their own."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    first, last = DistributedDataParallel(net[0]), DistributedDataParallel(net[2])
    model = nn.Sequential(first, net[1], last)
    for batch in part(draw(STEPS * RANKS), rank):
        with optimizer.accumulate(first), optimizer.accumulate(last):
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def only_the_backward(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    wrapped = DistributedDataParallel(net)
    loss = loss_of(wrapped, draw(RANKS)[rank])
    with (
        pytest.raises(RuntimeError, match="its forward was run before"),
        optimizer.accumulate(wrapped),
    ):
        loss.backward()


def weighed_ones(rank):
    """Windows of one, of unequal samples: weighted as longer ones are."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=advise(1, decision_interval=1))
    batches = draw(4, [4, 3, 2, 6] if rank == 0 else [12, 1, 5, 2], seed=rank)
    loop(optimizer, DistributedDataParallel(net), batches, counts=True)
    return seen(optimizer, net)


TOKENS = ([5, 0.5, 3, 9], [1, 7, 2, 4])  # of each rank's micro-batches, in two windows of two


def weighed_by_tokens(rank):
    """As many samples in each micro-batch, of other numbers of tokens."""
    net = build()
    config = replace(fixed_local(2), samples_per_micro_batch=None)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    wrapped = DistributedDataParallel(net)
    for batch, tokens in zip(draw(4, seed=rank), TOKENS[rank], strict=True):
        optimizer.set_samples(len(batch[0]), weight=tokens)
        loop(optimizer, wrapped, [batch])
    return seen(optimizer, net)


def sums_of_tokens(rank, wrap, accumulates):
    """Losses that are summed over tokens, of which samples have other numbers."""
    net = wrap(build())
    config = replace(advise(2, decision_interval=1), loss_reduction="sum")
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    for batch, tokens in zip(draw(4, TOKEN_SIZES[rank], seed=rank), TOKENS[rank], strict=True):
        optimizer.set_samples(len(batch[0]), weight=tokens)
        loop(
            optimizer,
            net,
            [batch],
            loss=lambda model, batch, tokens=tokens: tokens * loss_of(model, batch),
            accumulates=accumulates,
        )
    return seen(optimizer, net)


TOKEN_SIZES = ([4, 1, 2, 6], [3, 5, 2, 1])


def assert_weighed_by_tokens(found, sizes):
    """The weights are those of AdamW on the mean over all tokens, wherever they are."""
    first, second = found
    assert_agreed(first, second)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    parts = [
        list(zip(draw(4, sizes[rank], seed=rank), TOKENS[rank], strict=True))
        for rank in range(RANKS)
    ]
    for window in (slice(2), slice(2, 4)):
        pairs = [pair for part in parts for pair in part[window]]
        total = sum(tokens for _, tokens in pairs)
        sum(loss_of(net, batch) * tokens / total for batch, tokens in pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def mixed(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    wrapped = DistributedDataParallel(net)
    first, second = part(draw(2 * RANKS), rank)
    loop(optimizer, wrapped, [first])
    loss_of(wrapped, second).backward()
    with pytest.raises(RuntimeError, match="micro-batch 2 of a window of 3 was run outside"):
        optimizer.step()


def sparse(rank):
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD
    from noiseopt import NoiseAwareSGD

    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=measured(2))
    for _ in range(2):
        with optimizer.accumulate(net):
            net(torch.tensor([rank])).sum().backward()
        if len(optimizer._collector) == 0:
            optimizer.step()
    with pytest.raises(RuntimeError, match="gradients are sparse"):
        optimizer.step()


def bytes_sent():
    """What this process has written so far: to sockets, as long as it writes no files."""
    numbers = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(numbers["wchar"])


def traffic(rank, accumulates):
    """Bytes for each update in windows of 8, of a model that makes rows of numbers negligible."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDE * 4, WIDE * 4) for _ in range(8)))
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(8))
    wrapped = DistributedDataParallel(net)
    batches = [torch.randn(2, WIDE * 4) for _ in range(8 * 3)]

    def loss(model, batch):
        return model(batch).square().mean()

    loop(optimizer, wrapped, batches[:8], loss=loss, accumulates=accumulates)
    dist.barrier()
    before = bytes_sent()
    loop(optimizer, wrapped, batches[8:], loss=loss, accumulates=accumulates)
    dist.barrier()
    return (bytes_sent() - before) / 2


def missing_rank(rank):
    """A rank that never comes to the window's end: the others say for whom they wait, and where."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=fixed_local(1), process_group=group)
    batches = part(draw(2 * RANKS), rank)
    train(net, optimizer, batches[:1])
    if rank == 1:
        return None
    loss_of(net, batches[1]).backward()
    with pytest.raises(RuntimeError, match="rank 0 waited in vain") as caught:
        optimizer.step()
    return str(caught.value)


WRAPS = {"DDP": DistributedDataParallel, "not wrapped": unwrapped}
LOOPS = {
    **{name: {"wrap": wrap, "accumulates": True} for name, wrap in WRAPS.items()},
    "every micro-batch": {"wrap": DistributedDataParallel, "accumulates": False},
}
CONTAINERS = {
    "plainly": {},
    "in a container": {"container": nn.Sequential},
    "in a window": {"container": nn.Sequential, "model": build, "at": 5},
    "static graph": {"model": build, "sizes": (4, 4), "static_graph": True},
}

CASES = {
    **{way: functools.partial(run, **kwargs) for way, kwargs in WAYS.items()},
    "not wrapped": functools.partial(run, wrap=unwrapped),
    "local": functools.partial(run, wrap=unwrapped, config=replace(measured(3), gradients="local")),
    "local, one": functools.partial(
        run, wrap=unwrapped, config=replace(measured(1), gradients="local")
    ),
    "window of one": functools.partial(run, steps=1),
    **{
        f"{name}, {of}": functools.partial(run, wrap=wrap, dtype=dtype)
        for name, (dtype, _) in TYPES.items()
        for of, wrap in WRAPS.items()
    },
    **{
        f"estimate, {name}, {of}": functools.partial(estimated, dtype=dtype, **how)
        for name, (dtype, _) in TYPES.items()
        for of, how in LOOPS.items()
    },
    **{
        f"{name}, {of}, {clips}": functools.partial(guarded, wrap=wrap, clips=clips, **same)
        for name, same in GUARDED.items()
        for of, wrap in WRAPS.items()
        for clips in (False, True)
    },
    **{
        f"table {same}, {clips}, {rows}": functools.partial(
            large_table, same_data=same, clips=clips, rows=rows
        )
        for same in (False, True)
        for clips in (False, True)
        for rows in ROWS
    },
    "raises before": functools.partial(raises_inside, after=False),
    "raises after": functools.partial(raises_inside, after=True),
    **{f"sums, {name}": functools.partial(sums_of_tokens, **how) for name, how in LOOPS.items()},
    "adaptive": adaptive_run,
    "uneven": uneven,
    "uneven sums": functools.partial(uneven, reduction="sum"),
    "uneven and scheduled": uneven_and_scheduled,
    "uneven tensors": functools.partial(uneven_and_scheduled, number=torch.tensor),
    "uneven epochs": uneven_epochs,
    "uneven ones": functools.partial(uneven, steps=1),
    "no data": no_data,
    "static and local": static_and_local,
    "spare": spare,
    "nonfinite": nonfinite,
    "scaled": scaled,
    "mixed": mixed,
    "skip one": functools.partial(scaler_that_skips, skipped=(2,)),
    "skip last": functools.partial(scaler_that_skips, skipped=(3, 7)),
    "skip two": functools.partial(scaler_that_skips, skipped=(2, 3)),
    "skip end": functools.partial(scaler_that_skips, skipped=(11,)),
    "skip last, scheduled": functools.partial(scaler_that_skips, skipped=(3, 7), schedules=True),
    "skip to zeros": functools.partial(scaler_that_skips, skipped=(2,), set_to_none=False),
    **{
        f"counted before {before}": functools.partial(skipped_and_counted, before=before)
        for before in (False, True)
    },
    **{
        f"rate of 0 {accumulates}": functools.partial(
            no_data_at_a_rate_of_0, accumulates=accumulates
        )
        for accumulates in (False, True)
    },
    "zero at 0": zero_at_a_rate_of_0,
    **{f"buffers {steps}": functools.partial(buffered, steps=steps) for steps in (1, 2, 3)},
    **{f"anew {name}": functools.partial(wrapped_anew, **how) for name, how in CONTAINERS.items()},
    "thawed": functools.partial(thawed, joins=False),
    "joined": functools.partial(thawed, joins=True),
    "frozen inside": frozen_inside,
    "other weights": other_weights,
    "inner module": inner_module,
    "step inside": step_inside,
    "nested": nested,
    "only the backward": only_the_backward,
    "weighed ones": weighed_ones,
    "weighed by tokens": weighed_by_tokens,
    "sparse": sparse,
    "traffic": functools.partial(traffic, accumulates=True),
    "traffic before": functools.partial(traffic, accumulates=False),
    "missing": missing_rank,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("own"))


@pytest.mark.parametrize("way", [*WAYS, "not wrapped", "local"])
def test_one_reduction_gives_the_windows_and_weights_of_one_process(ranks, way):
    first, second = result(ranks, way)
    assert_agreed(first, second)
    expected = alone(3)
    assert all(window.norms.count == RANKS * 3 for window in first["windows"])
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["window of one", "local, one"])
def test_windows_of_one(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    expected = alone(1)
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", TYPES)
def test_in_the_types_that_models_have(ranks, name, wrap):
    first, second = result(ranks, f"{name}, {wrap}")
    assert_agreed(first, second)
    dtype, rel = TYPES[name]
    assert_same_windows(first["windows"], alone(3, dtype)["windows"], rel)


@pytest.mark.parametrize("of", LOOPS)
@pytest.mark.parametrize("name", TYPES)
def test_the_estimate_in_the_types_that_models_have(ranks, name, of):
    assert_estimated(result(ranks, f"estimate, {name}, {of}"), *TYPES[name])


def test_an_adaptive_run_ends_where_one_process_on_the_same_samples_does(ranks):
    first, second = result(ranks, "adaptive")
    assert_agreed(first, second)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=adaptive_config(RANKS))
    train(net, optimizer, draw(240 * RANKS))
    optimizer.flush()
    assert [d.batch for d in first["decisions"]] == [d.batch for d in optimizer.decisions]
    assert max(d.accumulation_steps for d in first["decisions"]) > 1
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "counts"),
    [
        ("uneven", 2, [4, 4, 3, 1]),
        ("uneven sums", 2, [4, 4, 3, 1]),
        ("uneven ones", 1, [2, 2, 2, 2, 2, 1, 1]),
    ],
)
def test_uneven_data_loses_no_sample_and_hangs_no_rank(ranks, name, steps, counts):
    """The windows by hand: so many micro-batches of each rank while it has them."""
    first, second = result(ranks, name)
    assert_agreed(first, second)
    batches = [uneven_batches(rank) for rank in range(RANKS)]
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    for at in range(0, len(SIZES[0]), steps):
        window = [batch for rank in batches for batch in rank[at : at + steps]]
        train(net, optimizer, [tuple(torch.cat(parts) for parts in zip(*window, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)
    assert [w.norms.count for w in first["windows"]] == counts
    assert sum(w.norms.samples for w in first["windows"]) == sum(map(sum, SIZES))
    assert [w.norms.big_batch for w in first["windows"]] == pytest.approx(
        [w.norms.samples for w in first["windows"]]
    )
    assert first["flushed"] is (steps > 1)
    assert second["flushed"] is True
    assert not first["again"]
    assert not second["again"]


def train_unevenly(net, optimizer, rates):
    """The windows of two by hand, each at its rate."""
    batches = [uneven_batches(rank) for rank in range(RANKS)]
    for at, rate in zip(range(0, len(SIZES[0]), 2), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        window = [batch for rank in batches for batch in rank[at : at + 2]]
        train(net, optimizer, [tuple(torch.cat(parts) for parts in zip(*window, strict=True))])


def test_a_rank_without_data_goes_by_the_rates_of_those_that_have_some(ranks):
    first, second = result(ranks, "uneven and scheduled")
    assert_agreed(first, second)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    train_unevenly(net, optimizer, [LR / (1 + micro_batch) for micro_batch in (1, 3, 5, 7)])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)
    assert [d.lr for d in first["decisions"]] == [d.lr for d in second["decisions"]]
    assert first["rate"] == pytest.approx(LR / 8)  # each schedule's own again
    assert second["rate"] == pytest.approx(LR / 6)


def test_schedules_by_updates_go_on_alike_after_uneven_data(ranks):
    first, second = result(ranks, "uneven epochs")
    assert_agreed(first, second)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    train_unevenly(net, optimizer, [LR / (1 + update) for update in range(4)])
    train_unevenly(net, optimizer, [LR / (1 + update) for update in range(4, 8)])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_a_rank_without_data_takes_part(ranks):
    first, second = result(ranks, "no data")
    assert_agreed(first, second)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=advise(2))
    train(net, optimizer, draw(4))
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_a_parameter_without_gradient_on_one_rank_is_averaged_with_zero(ranks):
    first, second = result(ranks, "spare")
    assert_agreed(first, second)
    assert not first["touched"]
    net = WithSpare()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    batches = [part(draw(8 * RANKS), rank) for rank in range(RANKS)]
    for at in range(0, 8, 2):
        for rank in range(RANKS):
            for step in range(2):
                net.calls = at + step + rank
                (loss_of(net, batches[rank][at + step]) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_what_is_not_finite_on_one_rank_is_left_out_and_nothing_else(ranks):
    first, second = result(ranks, "nonfinite")
    assert_agreed(first, second)
    assert first["skipped"] == 1
    assert [w.norms.count for w in first["windows"]] == [4, 3, 4, 4]
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    both = draw(8 * RANKS)
    for at in range(0, len(both), 4):
        used = [both[i] for i in range(at, at + 4) if i != 3 * RANKS + 1]
        train(net, optimizer, [tuple(torch.cat(parts) for parts in zip(*used, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_loss_scales_that_differ_between_ranks_and_steps(ranks):
    first, second = result(ranks, "scaled")
    assert_agreed(first, second)
    expected = alone(2, torch.float32)
    assert_same_windows(first["windows"][:3], expected["windows"][:3], 1e-5)


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("skip one", (2,)),
        ("skip last", (3, 7)),
        ("skip last, scheduled", (3, 7)),
        ("skip two", (2, 3)),
        ("skip end", (11,)),
        ("skip to zeros", (2,)),
    ],
)
def test_a_grad_scaler_that_skips_on_one_rank_leaves_out_that_alone(ranks, name, skipped):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    net = build(torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    both = draw(12 * RANKS, dtype=torch.float32)
    for at in range(0, 12, 2):
        if "scheduled" in name:
            optimizer.param_groups[0]["lr"] = LR / (2 + at)
        left = [
            both[step * RANKS + rank]
            for step in (at, at + 1)
            for rank in range(RANKS)
            if not (rank == 1 and step in skipped)
        ]
        train(net, optimizer, [tuple(torch.cat(parts) for parts in zip(*left, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-5)


def test_ranks_that_follow_settings_in_tensors_stay_alike(ranks):
    first, second = result(ranks, "uneven tensors")
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("before", [False, True])
def test_the_samples_of_the_next_micro_batch_outlive_one_that_was_skipped(ranks, before):
    first, second = result(ranks, f"counted before {before}")
    assert_agreed(first, second)
    net = build(torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    parts = [draw(5, SIZES[rank][:5], torch.float32, seed=rank) for rank in range(RANKS)]
    for at in range(0, 5, 2):
        window = [
            batch
            for rank in range(RANKS)
            for index, batch in enumerate(parts[rank][at : at + 2], start=at)
            if not (rank == 1 and index == SKIP)
        ]
        train(net, optimizer, [tuple(torch.cat(tensors) for tensors in zip(*window, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-5)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_rate_of_0_at_first_keeps_no_rank_waiting_for_one_without_data(ranks, accumulates):
    first, second = result(ranks, f"rate of 0 {accumulates}")
    assert_agreed(first, second)
    assert [window.norms.count for window in first["windows"]] == [2, 2]
    assert torch.equal(first["weights"], weights_of(build()))


def test_a_gradient_of_zero_on_one_rank_at_a_rate_of_0_is_a_micro_batch(ranks):
    first, second = result(ranks, "zero at 0")
    assert_agreed(first, second)
    assert len(first["windows"]) == 6
    assert first["weights"].isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_buffers_are_those_of_a_loop_that_averages_in_each_windows_last_backward(ranks, steps):
    first, second = result(ranks, f"buffers {steps}")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    ours, plain, weights, plain_weights = first
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, plain_weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_the_same_data_show_where_few_entries_have_a_gradient(ranks, same, clips, rows):
    found = result(ranks, f"table {same}, {clips}, {rows}")
    assert [len(messages) for messages in found] == [int(same), 0]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_model_that_is_wrapped_anew_goes_on_as_it_was(ranks, name):
    (first, never), (second, _) = result(ranks, f"anew {name}")
    assert_agreed(first, second)
    torch.testing.assert_close(first["buffers"], second["buffers"], rtol=0, atol=0)
    assert_same_windows(first["windows"], never["windows"], 1e-10)
    torch.testing.assert_close(first["buffers"], never["buffers"], rtol=0, atol=1e-12)
    torch.testing.assert_close(first["weights"], never["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["thawed", "joined"])
def test_a_part_of_a_model_may_be_wrapped_or_trained_later(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    expected = thawing(draw(12 * RANKS), 2 * RANKS, unwrapped, name == "joined")
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


def test_parameters_that_are_frozen_inside_a_window_get_its_mean(ranks):
    first, second = result(ranks, "frozen inside")
    assert_agreed(first, second)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    train(net, optimizer, joined(draw(2 * RANKS), 2 * RANKS))
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["inner module", "step inside", "nested"])
def test_other_ways_to_accumulate(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    assert_same_windows(first["windows"], alone(3)["windows"], 1e-10)


def test_windows_of_one_are_weighted_by_samples_too(ranks):
    first, second = result(ranks, "weighed ones")
    assert_agreed(first, second)
    parts = [draw(4, [4, 3, 2, 6], seed=0), draw(4, [12, 1, 5, 2], seed=1)]
    whole = [
        tuple(torch.cat(t) for t in zip(*pair, strict=True)) for pair in zip(*parts, strict=True)
    ]
    net = build()
    train(net, torch.optim.AdamW(net.parameters(), lr=LR), whole)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_tokens_weigh_the_mean_over_ranks_and_micro_batches(ranks):
    assert_weighed_by_tokens(result(ranks, "weighed by tokens"), (4, 4))


@pytest.mark.parametrize("name", LOOPS)
def test_sums_over_tokens_are_divided_by_the_tokens_of_all(ranks, name):
    found = result(ranks, f"sums, {name}")
    assert_weighed_by_tokens(found, TOKEN_SIZES)
    assert [window.norms.samples for window in found[0]["windows"]] == [13, 11]


@pytest.mark.parametrize("name", ["raises before", "raises after"])
def test_a_micro_batch_that_raises_on_one_rank_is_left_out_there_alone(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    assert [w.norms.count for w in first["windows"]] == [4, 4, 3]
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    one, other = (part(draw(6 * RANKS), rank) for rank in range(RANKS))
    del other[BAD]
    for at in range(0, 6, 2):
        window = [*one[at : at + 2], *other[at : at + 2]]
        train(net, optimizer, [tuple(torch.cat(parts) for parts in zip(*window, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", GUARDED)
def test_ranks_that_are_too_much_alike_are_told_so_once(ranks, wrap, name, clips):
    """Also where the loop has clipped each rank's own gradients to one norm."""
    assert_told(result(ranks, f"{name}, {wrap}, {clips}"), name)


@pytest.mark.parametrize(
    "name", ["mixed", "sparse", "static and local", "other weights", "only the backward"]
)
def test_what_cannot_be_averaged_is_an_error(ranks, name):
    result(ranks, name)


def test_a_window_of_8_sends_an_eighth_of_the_bytes(ranks):
    """Counted by the operating system, for each rank; the rows of numbers are the small rest."""
    once, each_time = (result(ranks, name) for name in ("traffic", "traffic before"))
    for one, other in zip(once, each_time, strict=True):
        assert 0 < one <= other / 8 * 1.002


def test_a_rank_that_does_not_come_is_named_with_the_window(ranks):
    message, _ = result(ranks, "missing")
    assert "in window 2 for rank 1, which" in message
    assert "flush()" in message
