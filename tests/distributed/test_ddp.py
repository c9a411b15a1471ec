"""DDP on two real ranks: one estimate, one decision, one model.

A single process that takes all ranks' micro-batches in its window is the oracle: it has the same
samples, the same gradients and the same weights.
"""

import copy
import functools
import gc
import logging
import pickle
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from noiseopt import NoiseAwareAdamW, NoiseConfig, NoiseMonitor
from tests.distributed.ranks import (
    RANKS,
    assert_rarely_measured,
    part,
    result,
    run_on_ranks,
    stopped,
    weights_of,
    windows_of,
)
from tests.optim.helpers import advise, build, draw, joined, loss_of, train

STEPS, LR = 24, 1e-2
WAYS = {
    "plainly": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}


class WithSpare(nn.Module):
    """A model that leaves a layer out of every other forward, and one out of all."""

    def __init__(self):
        super().__init__()
        self.used, self.sometimes, self.never = build(), build(seed=5), nn.Linear(3, 3).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.used(x) + (self.sometimes(x) if self.calls % 2 else 0)


def unused_found(net):
    return DistributedDataParallel(net, find_unused_parameters=True)


def seen(optimizer, net):
    return {
        "windows": windows_of(optimizer),
        "decisions": optimizer.decisions,
        "weights": weights_of(net),
    }


def measured(steps):
    return advise(steps, decision_interval=1, samples_per_micro_batch=4)


def wrapped_run(rank, steps=1, dtype=torch.float64, model=build, **ways):
    net = model() if model is WithSpare else model(dtype)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(steps))
    batches = part(draw(STEPS * RANKS, dtype=dtype), rank)
    train(DistributedDataParallel(net, **ways), optimizer, batches)
    return seen(optimizer, net)


def alone(steps, dtype=torch.float64, model=build):
    net = model(dtype)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(RANKS * steps))
    train(net, optimizer, draw(STEPS * RANKS, dtype=dtype))
    return seen(optimizer, net)


ADAPTIVE = {
    "measure_interval": 1,
    "decision_interval": 5,
    "min_count": 8.0,
    "dwell_updates": 10,
    "samples_per_micro_batch": 4,
    "half_life_windows": 8.0,
    "update_price": 1e6,
}


def adaptive_config(scale):
    return NoiseConfig(
        accumulation_steps=scale,
        min_accumulation_steps=scale,
        max_accumulation_steps=8 * scale,
        **ADAPTIVE,
    )


def adaptive_run(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=adaptive_config(1))
    wrapped, applied = DistributedDataParallel(net), 0
    for batch in part(draw(240 * RANKS), rank):
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
        applied += optimizer.applied
        assert optimizer.num_updates == applied
    return seen(optimizer, net)


def edited_run(rank, scales=(4096.0,), clip=None):
    """Gradients unscaled and clipped between backward and step, as loops do."""
    net = build(torch.float32)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    wrapped, scaler = DistributedDataParallel(net), GradScaler("cpu", init_scale=scales[0])
    for index, batch in enumerate(part(draw(STEPS * RANKS, dtype=torch.float32), rank)):
        scaler.scale(loss_of(wrapped, batch)).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update(scales[(index + 1) % len(scales)])
        optimizer.zero_grad()
    return seen(optimizer, net)


def clipped_alone(clip):
    """What the clipped pipeline measures: each rank's part scaled as the mean of both is."""
    net, found = build(torch.float32), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    both = draw(STEPS * RANKS, dtype=torch.float32)
    for at in range(0, len(both), 2 * RANKS):
        small, means = [], []
        for step in range(2):
            grads = [
                torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
                for batch in both[at + RANKS * step : at + RANKS * (step + 1)]
            ]
            flat = [torch.cat([g.flatten() for g in grad]) for grad in grads]
            mean = sum(flat) / RANKS
            factor = min(1.0, clip / (float(mean.norm()) + 1e-6))
            small += [float((factor * g).double().square().sum()) for g in flat]
            means.append(factor * mean)
        mean = sum(means) / 2
        found.append((sum(small) / 4, float(mean.double().square().sum())))
        for param, grad in zip(
            net.parameters(), mean.split([p.numel() for p in net.parameters()]), strict=True
        ):
            param.grad = grad.view_as(param).clone()
        optimizer.step()
    return found


def two_backwards_a_step(rank, synchronised):
    """The loop's own accumulation inside each call of step(), or two losses of one model."""
    messages = []
    handler = watched(messages)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    batches = part(draw(STEPS * RANKS), rank)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        with nullcontext() if synchronised else wrapped.no_sync():
            (loss_of(wrapped, first) / 2).backward()
        (loss_of(wrapped, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("noiseopt").removeHandler(handler)
    found = [message for message in messages if "2 backward passes" in message]
    return seen(optimizer, net) | {"messages": found}


def thrown_away_backwards(rank):
    """A backward whose gradients are dropped, as a GAN's other half has it, is no micro-batch."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    for batch in part(draw(STEPS * RANKS), rank):
        (3 * loss_of(wrapped, batch)).backward()
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def own_hook(rank, make=torch.optim.AdamW, hook=fp16_compress_hook):
    """DDP with a communication hook of the user's."""
    net = build(torch.float32)
    optimizer = make(net.parameters(), lr=LR)
    wrapped = DistributedDataParallel(net)
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    train(wrapped, optimizer, part(draw(STEPS * RANKS, dtype=torch.float32), rank))
    return weights_of(net)


def hooked(params, lr):
    return NoiseAwareAdamW(params, lr=lr, noise=measured(1))


def summing_hook(state, bucket):
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def summed_by_hook(rank):
    """A communication hook that sums over ranks, and losses that are divided beforehand."""
    messages = []
    handler = watched(messages)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    wrapped.register_comm_hook(None, summing_hook)
    batches = part(draw(STEPS * RANKS), rank)
    train(wrapped, optimizer, batches, loss=lambda model, batch: loss_of(model, batch) / RANKS)
    logging.getLogger("noiseopt").removeHandler(handler)
    return [message for message in messages if "summed over ranks" in message]


def uneven_weights(rank):
    """Ranks whose micro-batches hold different numbers of samples stay together."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=advise(2, decision_interval=1))
    wrapped = DistributedDataParallel(net)
    sizes = [2, 6, 6, 2] if rank == 0 else [4, 2, 2, 8]
    for batch in draw(4, sizes, seed=rank):
        optimizer.set_samples(len(batch[0]))
        loss_of(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def sum_batches(rank):
    return draw(6, [2, 6, 3, 1, 5, 4] if rank == 0 else [4, 2, 2, 8, 1, 3], seed=rank)


def summed_losses(rank):
    """loss_reduction='sum': the mean is over all samples, wherever they are."""
    net = build()
    config = advise(2, decision_interval=1, loss_reduction="sum")
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    wrapped = DistributedDataParallel(net)
    for batch in sum_batches(rank):
        optimizer.set_samples(len(batch[0]))
        (loss_of(wrapped, batch) * len(batch[0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def averaged_by_the_loop(rank, accumulation):
    """After the backward: which part the ranks' own gradients had is then not known."""
    net = build()
    config = replace(measured(1), accumulation=accumulation)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    before = weights_of(net)
    loss_of(net, draw(RANKS)[rank]).backward()
    for param in net.parameters():
        dist.all_reduce(param.grad)
        param.grad /= RANKS
    with pytest.raises(RuntimeError, match="gradients") as caught:
        optimizer.step()
    assert torch.equal(before, weights_of(net))
    return str(caught.value)


def head_thrown_away(rank, throws, clear):
    """An optimizer of a head that one rank may not use, after a micro-batch that is thrown away."""
    net = TwoHeads().double()
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    head = NoiseAwareAdamW(net.heads[0].parameters(), lr=LR, noise=measured(1))
    for index, (inputs, targets) in enumerate(part(draw(6 * RANKS), rank)):
        bad, used = index in (1, 3), 0 if rank == 0 or index != 4 else 1
        if bad and not throws:
            continue
        loss = (wrapped(inputs, used) - targets).square().mean() * (100 if bad else 1)
        loss.backward()
        if not bad:
            head.step()
        (head if bad and clear == "optimizer" else net).zero_grad()
    return weights_of(net), [window.norms for window in windows_of(head)]


def unsynchronised_step(rank):
    net = build()
    wrapped = DistributedDataParallel(net)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2)
    before = weights_of(net)
    with wrapped.no_sync():
        loss_of(wrapped, draw(2)[rank]).backward()
    with pytest.raises(RuntimeError, match="gradients differ between ranks") as caught:
        optimizer.step()
    assert torch.equal(before, weights_of(net))
    return str(caught.value)


def unsynchronised_later(rank):
    """After a run's first windows the sum is read one update later, when it costs no waiting."""
    net = build()
    wrapped = DistributedDataParallel(net)
    config = advise(1, decision_interval=1000)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2, noise=config)
    *right, wrong, after = part(draw(44 * RANKS), rank)
    train(wrapped, optimizer, right)
    with wrapped.no_sync():
        train(wrapped, optimizer, [wrong])
    loss_of(wrapped, after).backward()
    with pytest.raises(RuntimeError, match="gradients differ between ranks"):
        optimizer.step()


def removed_gradients(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2)
    loss_of(DistributedDataParallel(net), draw(2)[rank]).backward()
    net[0].bias.grad = None
    with pytest.raises(RuntimeError, match="1 of 4 gradients were removed"):
        optimizer.step()


class TwoHeads(nn.Module):
    """A model of which each batch uses one head."""

    def __init__(self):
        super().__init__()
        self.trunk, self.heads = build(), nn.ModuleList([build(seed=5), build(seed=6)])

    def forward(self, x, head):
        return self.heads[head](torch.cat([self.trunk(x), x[:, :3]], 1))


def head_of(index, rank):
    """In every other micro-batch the ranks use different heads."""
    return rank if index % 2 else 0


def an_optimizer_for_each_head(rank):
    group = dist.new_group(timeout=timedelta(seconds=20))  # where one rank alone would raise
    net = TwoHeads()
    optimizers = [
        NoiseAwareAdamW(each.parameters(), lr=LR, noise=measured(1), process_group=group)
        for each in (net.trunk, *net.heads)
    ]
    wrapped = unused_found(net)
    for index, batch in enumerate(part(draw(STEPS * RANKS), rank)):
        loss_of(functools.partial(wrapped, head=head_of(index, rank)), batch).backward()
        for optimizer in optimizers:
            if any(p.grad is not None for p in optimizer.param_groups[0]["params"]):
                optimizer.step()
            optimizer.zero_grad()
    return [seen(optimizer, net) for optimizer in optimizers]


def rarely_second(index, rank):
    """In three micro-batches of four no rank uses the second head."""
    return int(rank == index % 4 == 1)


def a_head_alone(rank, heads, steps=2):
    """Its optimizer takes what each rank brings, which may be nothing."""
    group = dist.new_group(timeout=timedelta(seconds=20))
    net = TwoHeads()
    optimizer = NoiseAwareAdamW(
        net.heads[1].parameters(), lr=LR, noise=measured(steps), process_group=group
    )
    net.trunk.requires_grad_(False)
    wrapped = unused_found(net)
    for index, batch in enumerate(part(draw(STEPS * RANKS), rank)):
        with optimizer.accumulate(wrapped):
            loss_of(functools.partial(wrapped, head=heads(index, rank)), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def a_head_of_no_rank(rank):
    with pytest.raises(RuntimeError, match="found no gradient on any of 4 parameters"):
        a_head_alone(rank, head_of, steps=1)


HEADS = {heads.__name__: heads for heads in (head_of, rarely_second)}


def two_heads_alone():
    """The means and norms of both ranks' parts by hand, stepped by torch."""
    net, found = TwoHeads(), [[], [], []]
    parts = [list(each.parameters()) for each in (net.trunk, *net.heads)]
    optimizers = [torch.optim.AdamW(params, lr=LR) for params in parts]
    for index, pair in enumerate(zip(*[iter(draw(STEPS * RANKS))] * RANKS, strict=True)):
        for at, params in enumerate(parts):
            own = [
                flat_grad(net, params, functools.partial(net, head=head_of(index, rank)), batch)
                for rank, batch in enumerate(pair)
            ]
            mean = sum(own) / RANKS
            if not mean.any():
                continue
            found[at].append((sum(g.square().sum() for g in own) / RANKS, mean.square().sum()))
            for param, grad in zip(params, mean.split([p.numel() for p in params]), strict=True):
                param.grad = grad.view_as(param)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found, weights_of(net)


def flat_grad(net, params, model, batch):
    grads = torch.autograd.grad(loss_of(model, batch), params, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def gradients_without_a_backward_of_any_rank(rank):
    """Where DDP allows a rank to have none of its own."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2)
    wrapped = unused_found(net)
    for param in wrapped.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="no rank has seen a backward pass"):
        optimizer.step()


def gradients_without_a_backward(rank):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="no backward pass was seen"):
        optimizer.step()


def external(rank, monitor):
    """The loop accumulates two micro-batches under no_sync, as Accelerate and others do."""
    net = build()
    config = replace(measured(2), accumulation="external")
    if monitor:
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        readings = NoiseMonitor(optimizer, config)
    else:
        optimizer = readings = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    wrapped = DistributedDataParallel(net)
    batches = part(draw(STEPS * RANKS), rank)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        with wrapped.no_sync():
            (loss_of(wrapped, first) / 2).backward()
        (loss_of(wrapped, second) / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
    return seen(readings, net)


def nonfinite_on_one_rank(rank, step):
    """One rank's data spoils one micro-batch: it is left out on both."""
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
        batches[step] = (batches[step][0] * torch.inf, batches[step][1])
    train(DistributedDataParallel(net), optimizer, batches)
    return seen(optimizer, net) | {"skipped": optimizer.decision.total_skipped}


def watched(messages):
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("noiseopt").addHandler(handler)
    return handler


def warnings_of(rank, same_data, same_randomness, dropout=0.5, steps=STEPS, rests=0, since=0):
    """What is logged where ranks see the same data, or drop out the same units.

    Every `rests`-th micro-batch drops out nothing, nor do the first ones.
    """
    messages = []
    handler = watched(messages)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(dropout), nn.Linear(64, 3)).double()
    if not same_randomness:
        torch.manual_seed(rank)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR / 10, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    batches = draw(steps) if same_data else part(draw(steps * RANKS), rank)
    for index, batch in enumerate(batches, start=1):
        net[1].train(index > since and (not rests or index % rests > 0))
        train(wrapped, optimizer, [batch])
    logging.getLogger("noiseopt").removeHandler(handler)
    return [message for message in messages if "ranks" in message and "noise advise" not in message]


def epochs(rank, updates):
    """Ranks seeded alike, whose data loaders draw a number at the start of each epoch."""
    messages = []
    handler = watched(messages)
    torch.manual_seed(0)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    for index, batch in enumerate(part(draw(64 * RANKS), rank)):
        if index % updates == 0:
            iter(DataLoader([0]))
        train(wrapped, optimizer, [batch])
    logging.getLogger("noiseopt").removeHandler(handler)
    return [message for message in messages if "random" in message]


def hooked_on_one_rank(rank):
    """Its loop puts hooks on parameters for each backward."""
    messages = []
    handler = watched(messages)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    for batch in part(draw(6 * RANKS), rank):
        hooks = [p.register_hook(lambda grad: grad / 10) for p in net.parameters() if rank == 1]
        loss_of(wrapped, batch).backward()
        for hook in hooks:
            hook.remove()
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("noiseopt").removeHandler(handler)
    texts = [message for message in messages if "were added before a backward" in message]
    return texts, [bool(window.norms.small_sq) for window in windows_of(optimizer)]


def changed_after_accumulation(rank, change, steps=1, wrap=DistributedDataParallel):
    """One rank's hooks after accumulation, put up after the first of four windows."""
    messages = []
    handler = watched(messages)
    net = build()
    wrapped = wrap(net)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(steps))
    for index, batch in enumerate(part(draw(4 * steps * RANKS), rank)):
        if index == steps and rank == 1:
            for param in net.parameters():
                param.register_post_accumulate_grad_hook(change)
        with optimizer.accumulate(wrapped) if steps > 1 else nullcontext():
            loss_of(wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("noiseopt").removeHandler(handler)
    texts = [message for message in messages if "change p.grad" in message]
    return texts, [window.norms.small_sq for window in windows_of(optimizer)]


def halved(param):
    param.grad.mul_(0.5)


def looked_at(param):
    param.grad.sum()


def starts_that_differ(rank):
    net = build()
    config = measured(1 + rank)
    optimizer = NoiseAwareAdamW(net.parameters(), noise=config)
    observer = ErrorsSeen()
    optimizer.add_observer(observer)
    loss_of(DistributedDataParallel(net), draw(2)[rank]).backward()
    with pytest.raises(RuntimeError, match="ranks disagree on what they start from") as caught:
        optimizer.step()
    assert observer.errors == [caught.value]
    return str(caught.value)


class ErrorsSeen:
    """An observer that keeps why training stopped."""

    def __init__(self):
        self.errors = []

    def __call__(self, decision):
        pass

    def on_error(self, error):
        self.errors.append(error)


def rates_that_differ(rank):
    """A schedule that runs on one rank only: decisions would part."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR * (1 + rank), noise=measured(1))
    observer = ErrorsSeen()
    optimizer.add_observer(observer)
    wrapped = DistributedDataParallel(net)
    before = weights_of(net)
    loss_of(wrapped, draw(RANKS)[rank]).backward()
    with pytest.raises(RuntimeError, match="ranks disagree on") as caught:
        optimizer.step()
    assert torch.equal(before, weights_of(net))
    assert caught.value in observer.errors
    return str(caught.value)


LATE = 33  # a window whose sums are not waited for


def parts_later(rank, part_with):
    """One rank alone changes something in mid-run; where and how that is told."""
    net = build()
    optimizer = NoiseAwareAdamW(
        net.parameters(),
        lr=LR,
        betas=[torch.tensor(0.9), torch.tensor(0.999)],
        foreach=False,  # which takes no such betas
        noise=NoiseConfig(mode="advise"),
    )
    wrapped = DistributedDataParallel(net)

    def losses():
        for index, batch in enumerate(part(draw(2 * LATE * RANKS), rank), start=1):
            if rank == 1:
                part_with(optimizer, index)
            yield loss_of(wrapped, batch)

    return stopped(optimizer, losses())


def rate_for_an_update(optimizer, index):
    optimizer.param_groups[0]["lr"] = LR * 2 if index == LATE else LR


def beta_in_place(optimizer, index):
    """By less than a tensor is printed with."""
    if index == LATE:
        optimizer.param_groups[0]["betas"][0].mul_(1 + 1e-6)


def state_of_decisions(optimizer, index):
    if index == LATE:
        control = optimizer._adaptation._controller
        parted = replace(control.state, noise_ratio=control.state.noise_ratio + 1.0)
        optimizer._adaptation._controller = control.at(parted)


def inside_join(rank, again):
    """torch's own way with uneven data: a rank without data answers DDP's collectives only."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    if again:
        train(wrapped, optimizer, draw(1))
        wrapped = DistributedDataParallel(net)
    with pytest.raises(RuntimeError, match=r"step\(\) inside model.join\(\)"), wrapped.join():
        train(wrapped, optimizer, draw(2))


def thawed(rank):
    """Parameters that are unfrozen later are trained, and measured from the next window on."""
    net = build()
    net[0].requires_grad_(False)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    batches = part(draw(8 * RANKS), rank)
    train(wrapped, optimizer, batches[:4])
    net[0].requires_grad_(True)
    train(DistributedDataParallel(net), optimizer, batches[4:])
    return seen(optimizer, net)


class LowRank(nn.Module):
    """Pairs of matrices of which one is zero at first, as LoRA's are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pairs = nn.ModuleList(
            nn.ParameterList([torch.randn(6, 2), torch.zeros(2, 6)]) for _ in range(6)
        )

    def forward(self, x):
        for down, up in self.pairs:
            x = x + x @ down @ up
        return x[:, :3]


def rarely_measured(rank, every):
    """Many windows, not all of which are measured."""
    net = build()
    noise = replace(measured(1), measure_interval=every)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=noise)
    train(DistributedDataParallel(net), optimizer, part(draw(80 * RANKS), rank))
    return seen(optimizer, net)


def frozen_for_a_while(rank, every):
    """In windows of which only some are measured."""
    net = build()
    noise = replace(measured(1), measure_interval=every)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=noise)
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    for index, batch in enumerate(part(draw(80 * RANKS), rank)):
        net[0].requires_grad_(not 66 <= index < 74)
        train(wrapped, optimizer, [batch])
    return seen(optimizer, net)


def frozen_in_turn(rank, layers, steps, wrap=unused_found, accumulates=False):
    """In each micro-batch one of the layers is frozen, or none."""
    net = build()
    model = wrap(net)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(steps))
    for index, batch in enumerate(part(draw(STEPS * RANKS), rank)):
        freeze(net, layers[index % len(layers)])
        with optimizer.accumulate(model) if accumulates else nullcontext():
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def freeze(net, layer):
    for at in (0, 2):
        net[at].requires_grad_(at != layer)


def frozen_in_turn_alone(layers, steps):
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(RANKS * steps))
    for index, batch in enumerate(draw(STEPS * RANKS)):
        freeze(net, layers[index // RANKS % len(layers)])
        train(net, optimizer, [batch])
    return seen(optimizer, net)


def raising_observer(rank):
    """An observer that raises at every decision, in a loop that goes on."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    optimizer.add_observer(lambda decision: 1 / 0)
    wrapped = DistributedDataParallel(net)
    for batch in part(draw(80 * RANKS), rank):
        loss_of(wrapped, batch).backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def low_rank(rank):
    net = LowRank()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    wrapped, scaler = DistributedDataParallel(net), GradScaler("cpu", init_scale=65536.0)
    for batch in part(draw(4 * RANKS, dtype=torch.float32), rank):
        scaler.scale(loss_of(wrapped, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return seen(optimizer, net)


def copied_in_a_group(rank):
    """A copy keeps the process group, which a pickle cannot."""
    groups = [dist.new_group([other]) for other in range(RANKS)]
    net = build(seed=rank)
    kwargs = {"noise": measured(1), "process_group": groups[rank]}
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, **kwargs)
    train(net, optimizer, draw(4, seed=rank))
    twin = copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match="pickled without its process_group"):
        pickle.loads(pickle.dumps(optimizer))
    return twin._adaptation.ranks.all


def an_optimizer_that_is_gone(rank):
    """Its hooks go with it."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    wrapped = DistributedDataParallel(net)
    train(wrapped, optimizer, part(draw(2 * RANKS), rank))
    del optimizer
    gc.collect()
    return sum(len(p._backward_hooks or ()) for p in net.parameters())


def a_group_of_one(rank, told):
    """Independent trainings side by side: each rank has a group of its own, or its DDP has."""
    own = [dist.new_group([other]) for other in range(RANKS)][rank]
    net = build(seed=rank)
    wrapped = net if told else DistributedDataParallel(net, process_group=own)
    group = own if told else None
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2), process_group=group)
    train(wrapped, optimizer, draw(8, seed=rank))
    return seen(optimizer, net)


def wrapped_in_its_group_too_late(rank):
    own = [dist.new_group([other]) for other in range(RANKS)][rank]
    net = build(seed=rank)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    wrapped = DistributedDataParallel(net, process_group=own)
    with pytest.raises(RuntimeError, match="wrap the model in DDP before, or pass"):
        train(wrapped, optimizer, draw(1))


def wrapped_in_two_groups(rank):
    own = [dist.new_group([other]) for other in range(RANKS)][rank]
    net = build()
    wrapped = [DistributedDataParallel(net[0]), DistributedDataParallel(net[2], process_group=own)]
    with pytest.raises(ValueError, match="wrapped in DDP over different ranks") as caught:
        NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    del wrapped
    return str(caught.value)


EPOCHS = (2, 4, 7, 8, 15)

CASES = {
    **{f"{way} {steps}": functools.partial(wrapped_run, steps=steps, **kwargs)
       for way, kwargs in WAYS.items() for steps in (1, 3)},
    "fp32": functools.partial(wrapped_run, steps=2, dtype=torch.float32),
    "bf16": functools.partial(wrapped_run, steps=2, dtype=torch.bfloat16),
    "spare": functools.partial(wrapped_run, steps=2, model=WithSpare, find_unused_parameters=True),
    "adaptive": adaptive_run,
    "scaled": edited_run,
    "rescaled": functools.partial(edited_run, scales=(4096.0, 512.0, 2.0)),
    "clipped": functools.partial(edited_run, clip=0.5),
    "two backwards": functools.partial(two_backwards_a_step, synchronised=False),
    "two losses": functools.partial(two_backwards_a_step, synchronised=True),
    "thrown away": thrown_away_backwards,
    "own hook": functools.partial(own_hook, make=hooked),
    "own hook, plain": own_hook,
    "no hook, plain": functools.partial(own_hook, hook=None),
    "summing hook": summed_by_hook,
    "uneven": uneven_weights,
    "sums": summed_losses,
    "unsynchronised": unsynchronised_step,
    **{f"head, {throws}, {clear}": functools.partial(head_thrown_away, throws=throws, clear=clear)
       for throws in (True, False) for clear in ("optimizer", "model")},
    **{f"by the loop, {how}": functools.partial(averaged_by_the_loop, accumulation=how)
       for how in ("internal", "external")},
    "unsynchronised later": unsynchronised_later,
    "removed": removed_gradients,
    "no backward": gradients_without_a_backward,
    "no backward at all": gradients_without_a_backward_of_any_rank,
    "two heads": an_optimizer_for_each_head,
    **{name: functools.partial(a_head_alone, heads=heads) for name, heads in HEADS.items()},
    "head of no rank": a_head_of_no_rank,
    "external": functools.partial(external, monitor=False),
    "monitor": functools.partial(external, monitor=True),
    "bad first": functools.partial(nonfinite_on_one_rank, step=2),
    "bad last": functools.partial(nonfinite_on_one_rank, step=3),
    "same data": functools.partial(warnings_of, same_data=True, same_randomness=True),
    "same dropout": functools.partial(warnings_of, same_data=False, same_randomness=True),
    "different": functools.partial(warnings_of, same_data=False, same_randomness=False),
    "same dropout at times": functools.partial(
        warnings_of, same_data=False, same_randomness=True, steps=40, rests=5
    ),
    "same dropout later": functools.partial(
        warnings_of, same_data=False, same_randomness=True, steps=50, since=21
    ),
    **{f"epochs of {n}": functools.partial(epochs, updates=n) for n in EPOCHS},
    "hooked on one rank": hooked_on_one_rank,
    "halved": functools.partial(changed_after_accumulation, change=halved),
    "looked at": functools.partial(changed_after_accumulation, change=looked_at),
    "like data": functools.partial(
        warnings_of, same_data=True, same_randomness=False, dropout=0.01, steps=60
    ),
    "starts": starts_that_differ,
    "rates": rates_that_differ,
    "rate in mid-run": functools.partial(parts_later, part_with=rate_for_an_update),
    "beta in mid-run": functools.partial(parts_later, part_with=beta_in_place),
    "state in mid-run": functools.partial(parts_later, part_with=state_of_decisions),
    "join": functools.partial(inside_join, again=False),
    "join, wrapped anew": functools.partial(inside_join, again=True),
    "gone": an_optimizer_that_is_gone,
    "thawed": thawed,
    "low rank": low_rank,
    "all measured": functools.partial(rarely_measured, every=1),
    "raising observer": raising_observer,
    "some measured": functools.partial(rarely_measured, every=4),
    "frozen, all measured": functools.partial(frozen_for_a_while, every=1),
    "frozen, some measured": functools.partial(frozen_for_a_while, every=4),
    **{f"frozen in turn {steps}": functools.partial(frozen_in_turn, layers=(0, 2), steps=steps)
       for steps in (1, 4)},
    "copied": copied_in_a_group,
    "alone": functools.partial(a_group_of_one, told=True),
    "alone by DDP": functools.partial(a_group_of_one, told=False),
    "late in a group": wrapped_in_its_group_too_late,
    "in two groups": wrapped_in_two_groups,
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("ddp"))


def assert_same_windows(found, expected, rel):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.norms.count == other.norms.count
        assert one.norms.samples == other.norms.samples
        assert one.norms.small_sq == pytest.approx(other.norms.small_sq, rel=rel)
        assert one.norms.big_sq == pytest.approx(other.norms.big_sq, rel=rel)
        assert one.norms.small_batch == pytest.approx(other.norms.small_batch, rel=1e-12)
        assert one.norms.big_batch == pytest.approx(other.norms.big_batch, rel=1e-12)


def assert_agreed(first, second):
    """Both ranks hold bitwise the same decisions and weights."""
    assert first["decisions"] == second["decisions"]
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_micro_batches_enter_one_estimate(ranks, way, steps):
    first, second = result(ranks, f"{way} {steps}")
    assert_agreed(first, second)
    expected = alone(steps)
    assert all(window.norms.count == RANKS * steps for window in first["windows"])
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", ["", "frozen, "])
def test_not_every_window_need_be_measured(ranks, how):
    first, second = result(ranks, f"{how}some measured")
    assert_agreed(first, second)
    everything, _ = result(ranks, f"{how}all measured")
    assert_rarely_measured(first["windows"], everything["windows"], 4, 1e-12)
    assert torch.equal(first["weights"], everything["weights"])


def test_an_observer_that_raises_leaves_the_windows_as_they_are(ranks):
    first, second = result(ranks, "raising observer")
    assert_agreed(first, second)
    some, _ = result(ranks, "some measured")
    assert first["windows"] == some["windows"]
    assert torch.equal(first["weights"], some["weights"])


@pytest.mark.parametrize(("name", "rel"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_in_the_types_that_models_have(ranks, name, rel):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    expected = alone(2, dtype)
    known = None if name == "fp32" else 1  # bf16 weights round apart from the first update on
    assert_same_windows(first["windows"][:known], expected["windows"][:known], rel)


def test_layers_that_get_no_gradient_on_some_steps(ranks):
    first, second = result(ranks, "spare")
    assert_agreed(first, second)


def test_an_adaptive_run_ends_where_one_process_on_the_same_samples_does(ranks):
    first, second = result(ranks, "adaptive")
    assert_agreed(first, second)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=adaptive_config(RANKS))
    train(net, optimizer, draw(240 * RANKS))
    actions = [decision.action for decision in optimizer.decisions]
    assert "grow" in actions
    assert [d.action for d in first["decisions"]] == actions
    assert [d.batch for d in first["decisions"]] == [d.batch for d in optimizer.decisions]
    assert first["decisions"][-1].noise.scale == pytest.approx(optimizer.noise.scale, rel=1e-9)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["scaled", "rescaled"])
def test_a_loss_scale_that_the_loop_takes_back_does_not_show(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    expected = alone(2, torch.float32)
    assert_same_windows(first["windows"][:3], expected["windows"][:3], 1e-5)
    assert_same_windows(first["windows"], expected["windows"], 1e-3)


def test_clipping_by_the_loop_is_measured_as_it_is_applied(ranks):
    first, second = result(ranks, "clipped")
    assert_agreed(first, second)
    expected = clipped_alone(0.5)
    found = [(w.norms.small_sq[0], w.norms.big_sq[0]) for w in first["windows"]]
    assert found[:3] == [pytest.approx(pair, rel=1e-5) for pair in expected[:3]]
    assert found == [pytest.approx(pair, rel=1e-3) for pair in expected]


@pytest.mark.parametrize("name", ["two backwards", "two losses"])
def test_a_step_of_several_backwards_is_applied_but_not_measured(ranks, name):
    """A sum's norm is not known from its parts': said once, and nothing false is learned."""
    first, second = result(ranks, name)
    assert [len(run.pop("messages")) for run in (first, second)] == [1, 0]
    assert first["decisions"][-1].noise is None
    assert first["decisions"][-1].samples_seen == second["decisions"][-1].samples_seen > 0
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], alone(2)["weights"], rtol=0, atol=1e-10)


def test_gradients_that_were_thrown_away_are_not_measured(ranks):
    first, second = result(ranks, "thrown away")
    assert_agreed(first, second)
    assert_same_windows(first["windows"], alone(1)["windows"], 1e-10)


def test_a_communication_hook_of_the_user_stays(ranks):
    """Its rounding is in every bit of the weights, as in torch's own optimizer's."""
    ours, plain, without = (
        result(ranks, name) for name in ("own hook", "own hook, plain", "no hook, plain")
    )
    for rank in range(RANKS):
        assert torch.equal(ours[rank], plain[rank])
        assert not torch.equal(ours[rank], without[rank])


def test_gradients_that_are_summed_and_not_averaged_are_told_once(ranks):
    first, second = result(ranks, "summing hook")
    assert len(first) == 1
    assert second == []


def test_unequal_samples_do_not_part_the_ranks(ranks):
    """The first window by hand: DDP's means over ranks, weighted by both ranks' samples."""
    first, second = result(ranks, "uneven")
    assert_agreed(first, second)
    net = build()
    grads = {}
    for rank, sizes in enumerate(([2, 6], [4, 2])):
        for step, batch in enumerate(
            draw(4, [*sizes, 6, 2] if rank == 0 else [4, 2, 2, 8], seed=rank)[:2]
        ):
            grad = torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
            grads[rank, step] = torch.cat([g.flatten() for g in grad])
    total = [(2 + 4) / 14, (6 + 2) / 14]
    weights = {(rank, step): total[step] / 2 for rank, step in grads}
    samples = {(0, 0): 2, (0, 1): 6, (1, 0): 4, (1, 1): 2}
    norms = first["windows"][0].norms
    mean = sum(weights[key] * grads[key] for key in grads)
    assert norms.big_sq[0] == pytest.approx(float(mean.square().sum()), rel=1e-10)
    small = sum(weights[key] * float(grads[key].square().sum()) for key in grads)
    assert norms.small_sq[0] == pytest.approx(small, rel=1e-10)
    assert norms.samples == 14
    assert 1 / norms.small_batch == pytest.approx(sum(weights[k] / samples[k] for k in grads))
    assert 1 / norms.big_batch == pytest.approx(sum(weights[k] ** 2 / samples[k] for k in grads))


def test_summed_losses_are_divided_by_the_samples_of_all(ranks):
    """The weights after each window are those of AdamW on the joined batch."""
    first, second = result(ranks, "sums")
    assert_agreed(first, second)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    parts = [sum_batches(rank) for rank in range(RANKS)]
    whole = []
    for at in range(0, 6, 2):
        batches = [batch for rank in parts for batch in rank[at : at + 2]]
        whole.append(tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
    train(net, optimizer, whole)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)
    window = first["windows"][0].norms
    assert window.samples == 14
    assert window.big_batch == pytest.approx(14)
    assert window.small_batch == pytest.approx(14 / 4)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_what_was_thrown_away_is_in_no_norm_of_a_rank_that_uses_nothing(ranks, clear):
    """Where the model clears it, that window is not measured."""
    thrown, kept = (result(ranks, f"head, {throws}, {clear}") for throws in (True, False))
    for (weights, norms), (wanted, right) in zip(thrown, kept, strict=True):
        assert torch.equal(weights, wanted)
        assert all(each.small_sq for each in right)
        if clear == "model":
            assert norms[2].small_sq == ()
            norms[2] = right[2]
        assert norms == right


@pytest.mark.parametrize("accumulation", ["internal", "external"])
def test_gradients_that_the_loop_averages_itself_are_refused(ranks, accumulation):
    for message in result(ranks, f"by the loop, {accumulation}"):
        assert (
            "the loop averages gradients in between" in message
            or "averages gradients by itself" in message
        )


def test_a_step_on_unsynchronised_gradients_is_an_error_on_every_rank(ranks):
    """It names the cause and the remedy, and nothing was changed."""
    for message in result(ranks, "unsynchronised"):
        assert "no_sync()" in message
        assert "accumulate(model)" in message
        assert "process_group" in message


@pytest.mark.parametrize(
    "name",
    [
        "removed",
        "no backward",
        "no backward at all",
        "join",
        "join, wrapped anew",
        "unsynchronised later",
    ],
)
def test_gradients_that_cannot_be_measured_are_an_error(ranks, name):
    result(ranks, name)


def test_an_optimizer_whose_parameters_one_rank_does_not_use_goes_on(ranks):
    """That rank's own gradient is zero."""
    first, second = result(ranks, "two heads")
    norms, weights = two_heads_alone()
    for one, other, expected in zip(first, second, norms, strict=True):
        assert_agreed(one, other)
        found = [(w.norms.small_sq[0], w.norms.big_sq[0]) for w in one["windows"]]
        assert found == [pytest.approx(tuple(map(float, pair)), rel=1e-9) for pair in expected]
        torch.testing.assert_close(one["weights"], weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_inside_accumulate_ranks_may_use_none_of_an_optimizers_parameters(ranks, name):
    """Then the mean is over zeros too, and where none does there is no update, as in torch."""
    first, second = result(ranks, name)
    assert_agreed(first, second)
    net = TwoHeads()
    optimizer = torch.optim.AdamW(net.heads[1].parameters(), lr=LR)
    for index, batch in enumerate(draw(STEPS * RANKS)):
        step, rank = divmod(index, RANKS)
        if HEADS[name](step, rank) == 1:
            (loss_of(functools.partial(net, head=1), batch) / 4).backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)
    assert all(window.norms.count == 4 for window in first["windows"])


def test_a_step_of_which_no_rank_has_a_gradient_is_an_error_on_all(ranks):
    result(ranks, "head of no rank")


@pytest.mark.parametrize("name", ["external", "monitor"])
def test_a_loop_that_accumulates_by_itself_is_measured_in_the_backward(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    expected = alone(2)
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "step"), [("bad first", 2), ("bad last", 3)])
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(ranks, name, step):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    assert first["skipped"] == 1
    assert [w.norms.count for w in first["windows"]] == [4, 2, 4, 4]
    assert torch.isfinite(first["weights"]).all()
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    both = draw(8 * RANKS)
    for at in range(0, 8, 2):
        used = [b for s in (at, at + 1) if s != step for b in both[RANKS * s : RANKS * (s + 1)]]
        train(net, optimizer, [tuple(torch.cat(t) for t in zip(*used, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_ranks_that_see_the_same_data_are_told_so_once(ranks):
    first, second = result(ranks, "same data")
    assert sum("same data" in message for message in first) == 1
    assert second == []


def test_ranks_that_drop_out_the_same_units_are_told_so_once(ranks):
    first, second = result(ranks, "same dropout")
    assert ["same random numbers" in message for message in first] == [True]
    assert "torch.manual_seed(seed + rank)" in first[0]
    assert second == []


@pytest.mark.parametrize("when", ["at times", "later"])
def test_ranks_that_drop_out_the_same_units_at_times_are_told_so_once(ranks, when):
    first, _ = result(ranks, f"same dropout {when}")
    assert ["same random numbers" in message for message in first] == [True]


@pytest.mark.parametrize("updates", EPOCHS)
def test_what_a_data_loader_draws_is_no_dropout(ranks, updates):
    assert result(ranks, f"epochs of {updates}") == [[], []]


def test_hooks_that_are_added_for_each_backward_are_told_on_their_rank(ranks):
    first, second = result(ranks, "hooked on one rank")
    assert first == ([], [False] * 6)
    assert (len(second[0]), second[1]) == (1, [False] * 6)


def assert_only_edits_are_told(edited, looked_at):
    """Of `changed_after_accumulation`: norms are measured until it is edited, or all along."""
    (nothing, norms), (told, others) = edited
    assert (nothing, len(told)) == ([], 1)
    assert norms == others
    assert [len(each) for each in norms] == [1, 0, 0, 0]
    (nothing, norms), (told, others) = looked_at
    assert nothing == told == []
    assert norms == others
    assert [len(each) for each in norms] == [1] * 4


def test_edits_after_accumulation_on_one_rank_leave_windows_unmeasured_on_all(ranks):
    assert_only_edits_are_told(result(ranks, "halved"), result(ranks, "looked at"))


def test_ranks_that_see_the_same_data_through_their_own_dropout_are_told_so_once(ranks):
    first, second = result(ranks, "like data")
    assert ["nearly the same data" in message for message in first] == [True]
    assert second == []


def test_ranks_that_do_not_are_told_nothing(ranks):
    assert result(ranks, "different") == [[], []]


def test_ranks_that_start_from_different_settings_stop(ranks):
    for message in result(ranks, "starts"):
        assert "settings: [" in message
        assert "accumulation_steps=2" in message


def test_ranks_whose_decisions_would_part_stop_and_say_what_differs(ranks):
    for message in result(ranks, "rates"):
        assert "lr of group 0: [0.01, 0.02]" in message


def test_ranks_that_part_in_mid_run_stop_an_update_later_and_say_what_differs(ranks):
    for updates, message in result(ranks, "rate in mid-run"):
        assert updates == LATE
        assert "lr of group 0: [0.01, 0.02]" in message
    for updates, message in result(ranks, "beta in mid-run"):
        assert updates == LATE
        assert "betas of group 0: [(0.8999999" in message
        assert "0.9000008" in message
    for updates, message in result(ranks, "state in mid-run"):
        assert updates >= LATE
        assert "noise_ratio: [" in message


def test_parameters_that_are_unfrozen_later(ranks):
    first, second = result(ranks, "thawed")
    assert torch.equal(first["weights"], second["weights"])
    known = [w.norms.shows_noise for w in first["windows"]]
    assert known == [True] * 4 + [False] + [True] * 3
    net = build()
    net[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    whole = joined(draw(8 * RANKS), RANKS)
    train(net, optimizer, whole[:4])
    net[0].requires_grad_(True)
    train(net, optimizer, whole[4:])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4])
def test_parameters_that_are_frozen_in_turn_are_measured_where_they_are_not(ranks, steps):
    first, second = result(ranks, f"frozen in turn {steps}")
    assert_agreed(first, second)
    expected = frozen_in_turn_alone((0, 2), steps)
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


def test_a_loss_scale_does_not_show_where_half_of_the_gradients_are_zero(ranks):
    first, second = result(ranks, "low rank")
    assert_agreed(first, second)
    net = LowRank()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(4))
    train(net, optimizer, draw(4 * RANKS, dtype=torch.float32))
    assert_same_windows(first["windows"][:1], seen(optimizer, net)["windows"][:1], 1e-5)


def test_a_copy_keeps_its_process_group(ranks):
    assert result(ranks, "copied") == [1, 1]


def test_an_optimizer_that_is_gone_leaves_no_hooks(ranks):
    assert result(ranks, "gone") == [0, 0]


@pytest.mark.parametrize("name", ["late in a group", "in two groups"])
def test_ddp_over_other_ranks_than_the_optimizers_is_an_error_with_the_remedy(ranks, name):
    result(ranks, name)


@pytest.mark.parametrize("name", ["alone", "alone by DDP"])
def test_a_rank_can_train_alone(ranks, name):
    for rank, run in enumerate(result(ranks, name)):
        net = build(seed=rank)
        optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
        train(net, optimizer, draw(8, seed=rank))
        assert run["decisions"] == optimizer.decisions
        assert torch.equal(run["weights"], weights_of(net))
