"""FSDP2 and hybrid meshes on real ranks, held against one process."""

import functools
import gc
import math
import weakref
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig, NoiseMonitor
from noiseopt.distributed import Ranks
from tests.distributed.ranks import (
    NEEDS_FSDP2,
    RANKS,
    assert_rarely_measured,
    part,
    result,
    run_on_ranks,
    weights_of,
    windows_of,
)
from tests.distributed.test_ddp import (
    LR,
    STEPS,
    adaptive_config,
    alone,
    assert_agreed,
    assert_only_edits_are_told,
    assert_same_windows,
    changed_after_accumulation,
    clipped_alone,
    frozen_in_turn,
    frozen_in_turn_alone,
    halved,
    looked_at,
    measured,
    seen,
)
from tests.distributed.test_own_gradients import (
    GUARDED,
    TOKEN_SIZES,
    TYPES,
    assert_estimated,
    assert_told,
    assert_weighed_by_tokens,
    estimated,
    guarded,
    loop,
    sums_of_tokens,
)
from tests.distributed.test_tensor_parallel import Block, Embedded, split
from tests.optim.helpers import HIDDEN, build, draw, joined, loss_of, train

pytestmark = NEEDS_FSDP2

POLICIES = {
    "plainly": {},
    "unsharded between": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def shard(net, **kwargs):
    """Each layer on its own, and the model around them."""
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, **kwargs)
    return fully_shard(net, **kwargs)


def sharded_run(rank, steps=1, dtype=torch.float64, accumulates=False, **kwargs):
    net = shard(build(dtype), **kwargs)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(steps))
    batches = part(draw(STEPS * RANKS, dtype=dtype), rank)
    loop(optimizer, net, batches, accumulates=accumulates)
    return seen(optimizer, net)


def adaptive_run(rank, accumulates):
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=adaptive_config(1))
    loop(optimizer, net, part(draw(240 * RANKS), rank), accumulates=accumulates)
    return seen(optimizer, net)


def resumed_between_measured_windows(rank):
    """Hooks are down where the resumed run begins; further on they are up again."""
    batches = part(draw(74 * RANKS), rank)

    def trained(batches, state=None):
        net = shard(build())
        optimizer = NoiseAwareAdamW(net.parameters(), lr=0.0, noise=measured(1))
        if state is not None:
            optimizer.load_state_dict(state)
        train(net, optimizer, batches)
        return optimizer

    state = trained(batches[:66]).state_dict()
    return windows_of(trained(batches[66:], state)), windows_of(trained(batches))[66:]


def frozen_after_building(rank, at):
    """A layer that the optimizer has is frozen for some windows."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=0.0, noise=measured(1))
    for index, batch in enumerate(part(draw(10 * RANKS), rank)):
        net[0].requires_grad_(not at <= index < 8)
        train(net, optimizer, [batch])
    return [window.norms.shows_noise for window in windows_of(optimizer)]


def rarely_measured(rank, every):
    """Many windows, not all of which are measured."""
    net = shard(build())
    noise = replace(measured(2), measure_interval=every)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=noise)
    loop(optimizer, net, part(draw(2 * 80 * RANKS), rank), accumulates=True)
    return seen(optimizer, net)


def two_groups(rank):
    """Parameter groups are measured apart; biases are too small for every rank to have a part."""
    net = shard(build())
    matrices = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    optimizer = NoiseAwareAdamW(groups, lr=LR, noise=measured(2))
    loop(optimizer, net, part(draw(STEPS * RANKS), rank), accumulates=False)
    return seen(optimizer, net)


def clipped(rank):
    net = shard(build(torch.float32))
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    for batch in part(draw(STEPS * RANKS, dtype=torch.float32), rank):
        loss_of(net, batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


class Probe(nn.Sequential):
    """Few outputs on a frozen layer: of one, or of five on four ranks, the last rank has none."""

    def __init__(self, outputs=1):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs, bias=False))
        self.double()[0].requires_grad_(False)


class Slopes(nn.Sequential):
    """Every third of its parameters is a single number."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(*(layer for _ in range(4) for layer in (nn.PReLU(), nn.Linear(6, 6))))
        self.double()


def loss_of_probe(model, batch):
    inputs, targets = batch
    return (model(inputs)[:, :3] - targets[:, :1]).square().mean()


def probed(rank, max_norm=torch.inf, model=Probe, ranks=RANKS):
    """A loop that clips, or reads the norm only."""
    net = shard(model()) if model is Probe else fully_shard(model())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    for batch in part(draw(STEPS * ranks), rank, ranks):
        loss_of_probe(net, batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def fixed_auto(**settings):
    return NoiseConfig(
        accumulation_steps=2,
        min_accumulation_steps=2,
        max_accumulation_steps=2,
        decision_interval=1,
        **settings,
    )


def nonfinite(rank, accumulates):
    """Each rank holds a shard of the sum and cannot tell alone: the window is left out on all."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=fixed_auto(adapt_clip=False))
    batches = part(draw(8 * RANKS), rank)
    if rank == 1:
        batches[3] = (batches[3][0] * torch.nan, batches[3][1])
    loop(optimizer, net, batches, accumulates=accumulates)
    return seen(optimizer, net) | {"skipped": optimizer.decision.total_skipped}


def clipping(rank):
    """The optimizer's own clipping, by the norm of the whole mean gradient."""
    net = shard(build())
    config = fixed_auto(max_norm=0.1, adapt_clip=False)
    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=config)
    loop(optimizer, net, part(draw(4 * RANKS), rank), accumulates=False)
    return seen(optimizer, net) | {"clipped": optimizer.decision.total_clipped}


def external(rank, monitor, sharding=shard):
    net = sharding(build())
    config = replace(measured(2), accumulation="external")
    if monitor:
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        readings = NoiseMonitor(optimizer, config)
    else:
        optimizer = readings = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    batches = part(draw(STEPS * RANKS), rank)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        net.set_requires_gradient_sync(False)
        (loss_of(net, first) / 2).backward()
        net.set_requires_gradient_sync(True)
        (loss_of(net, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(readings, net)


def summed(rank):
    """Sums of losses of unequal weight, reduced once for each window."""
    net = shard(build())
    config = replace(measured(2), loss_reduction="sum", samples_per_micro_batch=None)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    batches = draw(6, [2, 6, 3, 1, 5, 4] if rank == 0 else [4, 2, 2, 8, 1, 3], seed=rank)

    def loss(model, batch):
        return loss_of(model, batch) * len(batch[0])

    loop(optimizer, net, batches, counts=True, loss=loss)
    return seen(optimizer, net)


def warming_up(rank, accumulates):
    """A schedule that starts at 0: its first micro-batch is none that builds the state."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    for batch in part(draw(8 * RANKS), rank):
        with optimizer.accumulate(net) if accumulates else nullcontext():
            loss_of(net, batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def two_optimizers(rank, is_measured):
    """Their windows need not end together, and FSDP2 can put off for both or for none."""
    net = shard(build())
    matrices = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() == 1]
    outer = NoiseAwareAdamW(matrices, lr=LR, noise=measured(2))
    inner = NoiseAwareAdamW(rest, lr=LR, noise=measured(1))
    outer._adaptation.measures = is_measured
    outer._collector.open_window()
    with outer.accumulate(net), inner.accumulate(net):
        loss_of(net, draw(RANKS)[rank]).backward()
    with pytest.raises(RuntimeError, match="FSDP2 has averaged gradients"):
        outer.step()


def with_root(net):
    """The first layer on its own, the other with the model around it."""
    fully_shard(net[0])
    return fully_shard(net)


def validated(rank):
    """A forward without gradients before each window, which leaves the root's parameters whole."""
    net = with_root(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    batches = part(draw(STEPS * RANKS), rank)
    for index, batch in enumerate(batches):
        if index % 2 == 0:
            with torch.no_grad():
                net(batch[0])
        loop(optimizer, net, [batch])
    return seen(optimizer, net)


def extended_after_validation(rank):
    net = with_root(build())
    first, *rest = net.parameters()
    optimizer = NoiseAwareAdamW([first], lr=LR, noise=measured(1))
    with torch.no_grad():
        net(draw(1)[0][0])
    optimizer.add_param_group({"params": rest})
    loop(optimizer, net, part(draw(8 * RANKS), rank))
    return seen(optimizer, net)


def loaded_inside(rank):
    """What FSDP2 holds of the window is left out with it."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=measured(2))
    state = optimizer.state_dict()
    batches = part(draw(3 * RANKS), rank)
    loop(optimizer, net, batches[:1])
    with pytest.warns(UserWarning, match="the 1 micro-batches of 2 that it has had are left out"):
        optimizer.load_state_dict(state)
    loop(optimizer, net, batches[1:])
    return seen(optimizer, net)


class Encoder(nn.Linear):
    """A layer that is not run by its forward."""

    def encode(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Encoding(nn.Module):
    """The model of `build`, whose first layer is an encoder."""

    def __init__(self, net):
        super().__init__()
        self.first, self.rest = net[0], net[1:]
        self.first.__class__ = Encoder

    def forward(self, x):
        return self.rest(self.first.encode(x))


def by_a_method(net):
    net = Encoding(net)
    fully_shard(net.first)
    register_fsdp_forward_method(net.first, "encode")
    return fully_shard(net)


def grouped_by_a_method(net):
    """Two modules that are sharded as one."""
    net = nn.Sequential(Encoding(net[:1]), net[1], Encoding(net[2:]))
    layers = [net[0].first, net[2].first]
    fully_shard(layers)
    for layer in layers:
        register_fsdp_forward_method(layer, "encode")
    return fully_shard(net)


def internal_by_a_method(rank, sharding):
    net = sharding(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    loop(optimizer, net, part(draw(STEPS * RANKS), rank))
    return seen(optimizer, net)


def root_forgotten(rank):
    """Nobody averages what is not sharded."""
    net = build()
    fully_shard(net[0])
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    before = weights_of(net)
    with pytest.raises(RuntimeError, match=r"gradients differ .* fully_shard\(\) was not given"):
        loop(optimizer, net, part(draw(2 * RANKS), rank), accumulates=False)
    assert torch.equal(before, weights_of(net))


def averaged_by_hand(rank):
    """But somebody may."""
    net = build()
    fully_shard(net[0])
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    for batch in part(draw(STEPS * RANKS), rank):
        loss_of(net, batch).backward()
        for param in net[2].parameters():
            dist.all_reduce(param.grad)
            param.grad /= RANKS
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def flushed_early(rank):
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    batches = part(draw(5 * RANKS), rank)
    loop(optimizer, net, batches[:4])
    with pytest.raises(RuntimeError, match="FSDP2 still holds 1 micro-batches"):
        optimizer.flush()
    optimizer.shorten_window(2)
    loop(optimizer, net, batches[4:])
    assert optimizer.applied
    return seen(optimizer, net)


def experts(rank):
    """Parameters that are averaged over different ranks."""
    net = build()
    fully_shard(net[0], mesh=init_device_mesh("cpu", (RANKS,)))
    groups = [dist.new_group([other]) for other in range(RANKS)]
    fully_shard(net[2], mesh=DeviceMesh.from_group(groups[rank], "cpu"))
    with pytest.raises(ValueError, match="sharded over different meshes"):
        NoiseAwareAdamW(net.parameters(), lr=LR)


def with_another_backward(rank, **kwargs):
    """It averages what FSDP2 keeps of the window, and is thrown away with it."""
    net = shard(build(torch.float32), **kwargs)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    batches = part(draw(6 * RANKS, dtype=torch.float32), rank)
    loop(optimizer, net, batches[:4])
    loss_of(net, batches[4]).backward()
    optimizer.zero_grad()
    with (
        pytest.raises(RuntimeError, match=r"no longer keeps 4 of the 4 gradients"),
        optimizer.accumulate(net),
    ):
        pass


def half_of_a_pair(rank, monitor=None):
    """After each update something else trains through the model, as a GAN's generator does."""
    net = shard(build())
    if monitor:
        config = replace(measured(2), accumulation="external")
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        readings = NoiseMonitor(optimizer, config)
    else:
        optimizer = readings = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    for index, batch in enumerate(part(draw(STEPS * RANKS), rank)):
        (loss_of(net, batch) / (2 if monitor else 1)).backward()
        if index % 2 == 0 and monitor:
            continue
        optimizer.step()
        net(batch[0]).sum().backward()
        optimizer.zero_grad()
    return seen(readings, net)


LENGTHS = (3, 2, 3, 3, 1)  # of windows, some of which end early


def clipped_sums(rank, max_norm):
    """The loop clips what FSDP2 has reduced in a window's last backward."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(3))
    batches = iter(part(draw(sum(LENGTHS) * RANKS), rank))
    for length in LENGTHS:
        for left in reversed(range(length)):
            if left == 0 and length < 3:
                optimizer.shorten_window(length)
            with optimizer.accumulate(net):
                loss_of(net, next(batches)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.applied
    return seen(optimizer, net)


def scaled_and_skipped(rank, max_norm, set_to_none, reduction="mean"):
    """The second window's step is skipped: all of it is thrown away, and it begins again."""
    net = shard(build())
    config = replace(measured(3), loss_reduction=reduction)
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=config)
    scaler = GradScaler("cpu", init_scale=1024.0)
    for index, batch in enumerate(part(draw(12 * RANKS), rank)):
        loss = loss_of(net, batch)
        optimizer.report_loss(loss)
        with optimizer.accumulate(net):
            scaler.scale(loss * (torch.inf if (index, rank) == (4, 1) else 1)).backward()
        if index % 3 == 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return seen(optimizer, net)


def in_two_parts(rank):
    """Each of two losses has a block of its own."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(3))
    for batch in part(draw(STEPS * RANKS), rank):
        for share in (0.25, 0.75):
            with optimizer.accumulate(net):
                (loss_of(net, batch) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def partly_outside(rank, at):
    """What FSDP2 has added up would be a sum where other micro-batches are apart."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    batches = part(draw(4 * RANKS), rank)
    loop(optimizer, net, batches[:2])
    loop(optimizer, net, batches[2:3], accumulates=at == 1)
    with pytest.raises(RuntimeError, match=r"2 of a window of 2 was run .*: run all of them"):
        loop(optimizer, net, batches[3:], accumulates=at == 0)


def loss_by_parts(net, batch, uses_both):
    inputs, targets = batch
    hidden = net[0](inputs) if uses_both else inputs.repeat(1, 2)[:, :HIDDEN]
    return (net[2](hidden) - targets).square().mean()


def in_two_roots(rank, use_both, accumulation="internal"):
    net = build()
    fully_shard(net[0])
    fully_shard(net[2])
    config = replace(measured(2), accumulation=accumulation)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    for batch, uses_both in zip(part(draw(2 * RANKS), rank), use_both, strict=True):
        with optimizer.accumulate(net):
            loss_by_parts(net, batch, uses_both).backward()
        if accumulation == "external" and uses_both:
            continue
        optimizer.step()
        optimizer.zero_grad()
    return seen(optimizer, net)


def left_behind(rank, **how):
    with pytest.raises(RuntimeError, match="still keeps 2 gradients"):
        in_two_roots(rank, (True, False), **how)


RAISES = 4  # the second micro-batch of the second window


def raised_before(rank):
    """The loop catches it, and goes on with the next."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(3))
    for index, batch in enumerate(part(draw(7 * RANKS), rank)):
        with suppress(ValueError):
            with optimizer.accumulate(net):
                if index == RAISES:
                    raise ValueError("a bad sample")
                loss_of(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(net)


def raised_in_windows_of_one(rank):
    """What a block before has left is in `p.grad`, for the loop to zero, as without us."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(1))
    for index, batch in enumerate(part(draw(4 * RANKS), rank)):
        if index == 1:  # a step is left out, as by a GradScaler, or the second block raises
            with optimizer.accumulate(net):
                loss_of(net, batch).backward()
            with suppress(ValueError), optimizer.accumulate(net):
                raise ValueError("a bad sample")
        else:
            with optimizer.accumulate(net):
                loss_of(net, batch).backward()
            optimizer.step()
        optimizer.zero_grad()
    return weights_of(net)


def flushed_after_raising(rank):
    """Its first micro-batch is outside, so that there is something to flush."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(3))
    first, second = part(draw(2 * RANKS), rank)
    train(net, optimizer, [first])
    with suppress(ValueError), optimizer.accumulate(net):
        loss_of(net, second).backward()
        raise ValueError("a bad sample")
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"raised inside optimizer\.accumulate"):
        optimizer.flush()


def thrown_away_before_its_step(rank):
    """As a loop leaves out a micro-batch whose loss is bad; FSDP2 has it in its sum."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(2))
    first, second, third = part(draw(3 * RANKS), rank)
    optimizer.zero_grad()
    loop(optimizer, net, [first, second])
    with optimizer.accumulate(net):
        loss_of(net, third).backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) without step"):
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="FSDP2 still holds 1 micro-batches"):
        optimizer.flush()
    optimizer.step()
    optimizer.zero_grad()


def skipped_before_its_backward(rank, at):
    """As a loop leaves out a micro-batch whose loss is bad before FSDP2 has anything of it."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(2))
    for index, batch in enumerate(part(draw(5 * RANKS), rank)):
        with optimizer.accumulate(net):
            loss = loss_of(net, batch)
            if index != at:
                loss.backward()
        if index != at:
            optimizer.step()
        optimizer.zero_grad()
    return optimizer.num_updates, weights_of(net)


def raised_after_skipping(rank):
    """A forward raises where FSDP2 has nothing of it, nor of the micro-batch before."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(2))
    batches = part(draw(3 * RANKS), rank)
    loop(optimizer, net, batches[:1])
    with optimizer.accumulate(net):
        loss_of(net, batches[1])
    with suppress(ValueError), optimizer.accumulate(net):
        raise ValueError("a bad sample")
    loop(optimizer, net, batches[2:])
    assert optimizer.applied


def raised_between_blocks(rank):
    """The second block of a micro-batch raises before its backward; the first one's stays."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(2))
    batches = part(draw(2 * RANKS), rank)
    loop(optimizer, net, batches[:-1])
    with optimizer.accumulate(net):
        loss_of(net, batches[-1]).backward()
    with pytest.raises(ValueError, match="a bad sample"), optimizer.accumulate(net):
        raise ValueError("a bad sample")
    optimizer.zero_grad()
    with (
        pytest.raises(RuntimeError, match=r"raised inside optimizer\.accumulate"),
        optimizer.accumulate(net),
    ):
        pass


class Returning(nn.Module):
    """A model that returns one of its parameters, on which FSDP2 puts a hook in each forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return self.layer(inputs), self.scale


def returned_parameter(rank, accumulation):
    net = fully_shard(Returning().double())
    config = replace(measured(1), accumulation=accumulation)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    for inputs, targets in part(draw(4 * RANKS), rank):
        outputs, scale = net(inputs)
        (outputs * scale - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [bool(window.norms.small_sq) for window in windows_of(optimizer)]


def hooked_on_one_rank(rank):
    """Rank 0 puts a hook on what its forward uses, of which the other rank holds nothing."""
    torch.manual_seed(0)
    net = fully_shard(nn.Linear(6, 1, bias=False).double())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))

    def put(module, args):
        if rank == 0:
            module.weight.register_hook(lambda grad: grad)

    net.register_forward_pre_hook(put)
    for inputs, _ in part(draw(5 * RANKS), rank):
        net(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [bool(window.norms.small_sq) for window in windows_of(optimizer)]


def dropped_by_its_model(rank):
    """A model that holds its optimizer is freed with it."""
    net = shard(build())
    net.optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    train(net, net.optimizer, part(draw(2 * RANKS), rank))
    held = weakref.ref(net), weakref.ref(net.optimizer)
    del net
    gc.collect()
    return [each() is None for each in held]


def raised_after(rank, raises, accumulation="internal"):
    """Its gradient cannot be told from the window's; a state that is loaded begins it again."""
    net = shard(build())
    config = replace(measured(3), accumulation=accumulation)
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=config)
    batches = part(draw(9 * RANKS), rank)

    def take(index):
        with optimizer.accumulate(net):
            loss = loss_of(net, batches[index])
            (loss / 3 if accumulation == "external" else loss).backward()
            if index == raises:
                raise ValueError("a bad sample")
        if accumulation == "internal" or index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    for index in range(3):
        take(index)
    state = deepcopy(optimizer.state_dict())
    for index in range(3, raises):
        take(index)
    with pytest.raises(ValueError, match="a bad sample"):
        take(raises)
    if raises == 5:  # whose backward leaves a gradient
        with pytest.raises(RuntimeError, match=r"raised inside optimizer\.accumulate"):
            optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"raised inside optimizer\.accumulate"):
        take(raises)
    optimizer.load_state_dict(state)
    for index in range(6, 9):
        take(index)
    return weights_of(net)


def left_behind_where_few_have_a_part(rank):
    """The last backward brings only what the first rank alone holds."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(6, 1, bias=False), nn.Linear(6, 3)]).double()
    few, many = map(fully_shard, net)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))

    def take(model, batch):
        with optimizer.accumulate(net):
            model(batch[0]).square().mean().backward()

    first, last = part(draw(2 * RANKS), rank)
    take(many, first)
    optimizer.step()
    take(few, last)
    with pytest.raises(RuntimeError, match="still keeps 2 gradients"):
        optimizer.step()


def stepped_without_backward(rank):
    """In the last micro-batch of the second window, when gradients are kept as zeros."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    for batch in part(draw(3 * RANKS), rank):
        with optimizer.accumulate(net):
            loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    with optimizer.accumulate(net):
        pass
    with pytest.raises(RuntimeError, match="still keeps 4 gradients"):
        optimizer.step()


def partly_thrown_away(rank):
    """The last backward leaves out a root, and what it brings is thrown away without it."""
    net = build()
    fully_shard(net[0])
    fully_shard(net[2])
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    first, last = part(draw(2 * RANKS), rank)
    loop(optimizer, net, [first])
    with optimizer.accumulate(net):
        loss_by_parts(net, last, uses_both=False).backward()
    optimizer.zero_grad()
    with (
        pytest.raises(RuntimeError, match="still keeps 4 gradients"),
        optimizer.accumulate(net),
    ):
        pass


def skipped_by_all(rank):
    """The second window's last micro-batch but one."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(2))
    for index, batch in enumerate(part(draw(5 * RANKS), rank)):
        with optimizer.accumulate(net):
            if index != 3:
                loss_of(net, batch).backward()
        if index != 3:
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(net)


def thrown_away_and_shortened(rank):
    """A window of three that is thrown away, and one of a single micro-batch."""
    net = shard(build())
    optimizer = NoiseAwareSGD(net.parameters(), lr=0.1, noise=measured(3))
    *thrown, last = part(draw(4 * RANKS), rank)
    for batch in thrown:
        with optimizer.accumulate(net):
            loss_of(net, batch).backward()
        if batch is not thrown[-1]:
            optimizer.step()
        optimizer.zero_grad()
    optimizer.shorten_window(1)
    loop(optimizer, net, [last])
    return weights_of(net)


def unsynchronised(rank):
    """Gradients that FSDP2 was told to keep, without `accumulate`."""
    net = shard(build())
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    net.set_requires_gradient_sync(False)
    loss_of(net, draw(RANKS)[rank]).backward()
    with pytest.raises(RuntimeError, match=r"no gradient .*FSDP2 is to keep inside accumulate"):
        optimizer.step()


def counted_sums(rank):
    """All-reduces of numbers where samples are counted: FSDP2 adds gradients up by itself."""
    net = shard(build())
    config = replace(measured(4), samples_per_micro_batch=None)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=config)
    with patch.object(Ranks, "begin_sum_", autospec=True, side_effect=Ranks.begin_sum_) as sums:
        loop(optimizer, net, part(draw(16 * RANKS), rank), counts=True, accumulates=True)
    return sums.call_count, optimizer.num_updates


def hybrid(rank, replicate, steps=2, accumulates=False):
    shape = (replicate, RANKS // replicate)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return sharded_run(rank, steps=steps, mesh=mesh, accumulates=accumulates)


NARROW = {
    "fp32": {"dtype": torch.float32},
    "bf16": {
        "dtype": torch.float32,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    },
    "bf16 reduced": {"dtype": torch.float32, "mp_policy": MixedPrecisionPolicy(torch.bfloat16)},
    "bf16 held": {"dtype": torch.bfloat16},
}
IN_TURN = {"alternating": ((0, 2), 4), "last": ((None, 0), 2)}  # layers, and steps of a window

CASES = {
    "probe": probed,
    "probe, clipped": functools.partial(probed, max_norm=0.01),
    "slopes": functools.partial(probed, model=Slopes),
    "slopes, clipped": functools.partial(probed, max_norm=0.01, model=Slopes),
    **{
        f"{name} {steps} {accumulates}": functools.partial(
            sharded_run, steps=steps, accumulates=accumulates, **kwargs
        )
        for name, kwargs in POLICIES.items()
        for steps in (1, 3)
        for accumulates in (False, True)
    },
    **{
        f"{name} {accumulates}": functools.partial(
            sharded_run, steps=2, accumulates=accumulates, **kwargs
        )
        for name, kwargs in NARROW.items()
        for accumulates in (False, True)
    },
    **{
        f"estimate {name} {accumulates}": functools.partial(
            estimated, wrap=shard, dtype=dtype, accumulates=accumulates
        )
        for name, (dtype, _) in TYPES.items()
        for accumulates in (False, True)
    },
    **{
        f"{name} {accumulates}": functools.partial(
            guarded, wrap=shard, accumulates=accumulates, **same
        )
        for name, same in GUARDED.items()
        for accumulates in (False, True)
    },
    **{
        f"tokens {accumulates}": functools.partial(
            sums_of_tokens, wrap=shard, accumulates=accumulates
        )
        for accumulates in (False, True)
    },
    "adaptive False": functools.partial(adaptive_run, accumulates=False),
    "adaptive True": functools.partial(adaptive_run, accumulates=True),
    **{f"frozen {at}": functools.partial(frozen_after_building, at=at) for at in (0, 1)},
    **{
        f"{name} {accumulates}": functools.partial(
            frozen_in_turn, layers=layers, steps=steps, wrap=shard, accumulates=accumulates
        )
        for name, (layers, steps) in IN_TURN.items()
        for accumulates in (False, True)
    },
    "resumed between": resumed_between_measured_windows,
    "all measured": functools.partial(rarely_measured, every=1),
    "some measured": functools.partial(rarely_measured, every=4),
    "groups": two_groups,
    "clipped": clipped,
    "clipping": clipping,
    "nonfinite False": functools.partial(nonfinite, accumulates=False),
    "nonfinite True": functools.partial(nonfinite, accumulates=True),
    "external": functools.partial(external, monitor=False),
    "monitor": functools.partial(external, monitor=True),
    "summed": summed,
    "flushed": flushed_early,
    "warming up False": functools.partial(warming_up, accumulates=False),
    "warming up True": functools.partial(warming_up, accumulates=True),
    "two optimizers": functools.partial(two_optimizers, is_measured=True),
    "two, not measured": functools.partial(two_optimizers, is_measured=False),
    "validated": validated,
    "extended": extended_after_validation,
    "loaded": loaded_inside,
    "external, method": functools.partial(external, monitor=False, sharding=by_a_method),
    "monitor, method": functools.partial(external, monitor=True, sharding=by_a_method),
    "method": functools.partial(internal_by_a_method, sharding=by_a_method),
    "grouped, method": functools.partial(internal_by_a_method, sharding=grouped_by_a_method),
    "root forgotten": root_forgotten,
    "by hand": averaged_by_hand,
    "experts": experts,
    "counted": counted_sums,
    "another backward": with_another_backward,
    "another backward, bf16": functools.partial(
        with_another_backward, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    ),
    "half of a pair": half_of_a_pair,
    "half of a pair, monitor": functools.partial(half_of_a_pair, monitor=True),
    **{f"clipped at {c}": functools.partial(clipped_sums, max_norm=c) for c in (0.05, 1.35)},
    **{
        f"skipped {set_to_none}": functools.partial(
            scaled_and_skipped, max_norm=0.05, set_to_none=set_to_none
        )
        for set_to_none in (False, True)
    },
    "skipped sums": functools.partial(
        scaled_and_skipped, max_norm=math.inf, set_to_none=True, reduction="sum"
    ),
    "two parts": in_two_parts,
    **{f"outside {at}": functools.partial(partly_outside, at=at) for at in (0, 1)},
    "two roots": functools.partial(in_two_roots, use_both=(False, True)),
    "left behind": left_behind,
    "left behind, external": functools.partial(left_behind, accumulation="external"),
    "raised before": raised_before,
    "raised between blocks": raised_between_blocks,
    "thrown away before its step": thrown_away_before_its_step,
    "raised after skipping": raised_after_skipping,
    **{
        f"skipped at {at}": functools.partial(skipped_before_its_backward, at=at)
        for at in (2, 3, 4)
    },
    "raises alone": raised_in_windows_of_one,
    "flushed after raising": flushed_after_raising,
    **{
        f"returned, {accumulation}": functools.partial(
            returned_parameter, accumulation=accumulation
        )
        for accumulation in ("internal", "external")
    },
    "hooked on one rank": hooked_on_one_rank,
    **{
        f"{change.__name__} {steps}": functools.partial(
            changed_after_accumulation, change=change, steps=steps, wrap=shard
        )
        for change in (halved, looked_at)
        for steps in (1, 3)
    },
    "dropped": dropped_by_its_model,
    **{
        f"raised in {raises}, {accumulation}": functools.partial(
            raised_after, raises=raises, accumulation=accumulation
        )
        for raises in (3, 4, 5)
        for accumulation in ("internal", "external")
    },
    "left by few": left_behind_where_few_have_a_part,
    "no last backward": stepped_without_backward,
    "thrown away in part": partly_thrown_away,
    "skipped by all": skipped_by_all,
    "shortened": thrown_away_and_shortened,
    "unsynchronised": unsynchronised,
    "hybrid 1": functools.partial(hybrid, replicate=1),
    "hybrid 2": functools.partial(hybrid, replicate=2),
    "hybrid 2, once": functools.partial(hybrid, replicate=2, accumulates=True),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("fsdp2"))


def assert_as_alone(results, steps, rel=1e-10, atol=1e-10):
    first, second = results
    assert_agreed(first, second)
    expected = alone(steps)
    assert all(window.norms.count == RANKS * steps for window in first["windows"])
    assert_same_windows(first["windows"], expected["windows"], rel)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=atol)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_all_ranks_micro_batches_enter_one_estimate(ranks, policy, steps, accumulates):
    assert_as_alone(result(ranks, f"{policy} {steps} {accumulates}"), steps)


@pytest.mark.parametrize("name", ["hybrid 1", "hybrid 2", "hybrid 2, once"])
def test_hybrid_meshes_count_shards_once_and_replicas_once(ranks, name):
    assert_as_alone(result(ranks, name), 2)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", NARROW)
def test_in_the_types_that_models_have(ranks, name, accumulates):
    first, second = result(ranks, f"{name} {accumulates}")
    assert_agreed(first, second)
    expected = alone(2, NARROW[name]["dtype"])
    rel = 1e-5 if name == "fp32" else 1e-2
    assert_same_windows(first["windows"][:1], expected["windows"][:1], rel)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_the_estimate_in_the_types_that_models_have(ranks, name, accumulates):
    assert_estimated(result(ranks, f"estimate {name} {accumulates}"), *TYPES[name])


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", GUARDED)
def test_ranks_that_are_too_much_alike_are_told_so_once(ranks, name, accumulates):
    assert_told(result(ranks, f"{name} {accumulates}"), name)


@pytest.mark.parametrize("accumulates", [False, True])
def test_sums_over_tokens_are_divided_by_the_tokens_of_all(ranks, accumulates):
    assert_weighed_by_tokens(result(ranks, f"tokens {accumulates}"), TOKEN_SIZES)


@pytest.mark.parametrize("accumulates", [False, True])
def test_an_adaptive_run_ends_where_one_process_on_the_same_samples_does(ranks, accumulates):
    first, second = result(ranks, f"adaptive {accumulates}")
    assert_agreed(first, second)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=adaptive_config(RANKS))
    train(net, optimizer, draw(240 * RANKS))
    assert max(d.accumulation_steps for d in first["decisions"]) > 1
    assert [d.batch for d in first["decisions"]] == [d.batch for d in optimizer.decisions]
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)


def test_not_every_window_need_be_measured(ranks):
    first, second = result(ranks, "some measured")
    assert_agreed(first, second)
    everything, _ = result(ranks, "all measured")
    assert_rarely_measured(first["windows"], everything["windows"], 4, 1e-12)
    assert torch.equal(first["weights"], everything["weights"])


def test_groups_are_measured_apart(ranks):
    first, second = result(ranks, "groups")
    assert_agreed(first, second)
    net = build()
    matrices = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    optimizer = NoiseAwareAdamW(groups, lr=LR, noise=measured(2 * RANKS))
    train(net, optimizer, draw(STEPS * RANKS))
    assert_same_windows(first["windows"], seen(optimizer, net)["windows"], 1e-10)


def test_clipping_by_the_loop_is_measured_as_it_is_applied(ranks):
    first, second = result(ranks, "clipped")
    assert_agreed(first, second)
    expected = clipped_alone(0.5)
    found = [(w.norms.small_sq[0], w.norms.big_sq[0]) for w in first["windows"]]
    assert found[:3] == [pytest.approx(pair, rel=1e-5) for pair in expected[:3]]


def clipped_alone_at(max_norm, windows):
    """Windows of one process whose loop clips the mean of all ranks' micro-batches."""
    net, found = build(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for window in windows:
        small = []
        for batch in window:
            grads = torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
            small.append(sum(grad.square().sum() for grad in grads).item())
            for param, grad in zip(net.parameters(), grads, strict=True):
                param.grad = grad / len(window) + (0 if param.grad is None else param.grad)
        norm = nn.utils.clip_grad_norm_(net.parameters(), max_norm).item()
        clipped = math.sqrt(sum(param.grad.square().sum() for param in net.parameters()))
        found.append((norm, sum(small) / len(small) * (clipped / norm) ** 2, clipped**2))
        optimizer.step()
        optimizer.zero_grad()
    return found, weights_of(net)


def assert_clipped_as(results, expected, weights):
    first, second = results
    assert_agreed(first, second)
    found = [(w.norms.small_sq[0], w.norms.big_sq[0]) for w in first["windows"]]
    assert found == [pytest.approx(pair, rel=1e-9) for _, *pair in expected]
    torch.testing.assert_close(first["weights"], weights, rtol=0, atol=1e-12)


def split_into(batches, lengths):
    batches = iter(batches)
    return [[next(batches) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("max_norm", [0.05, 1.35])
def test_the_loop_clips_the_mean_of_what_fsdp2_has_added_up(ranks, max_norm):
    windows = split_into(draw(sum(LENGTHS) * RANKS), [RANKS * length for length in LENGTHS])
    expected, weights = clipped_alone_at(max_norm, windows)
    norms = [norm for norm, *_ in expected]
    sums = [norm * length for norm, length in zip(norms, LENGTHS, strict=True)]
    assert all(norm > max_norm for norm in (norms if max_norm < 1 else sums[:4]))
    assert max_norm < 1 or all(norm < max_norm for norm in norms)
    assert_clipped_as(result(ranks, f"clipped at {max_norm}"), expected, weights)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_window_whose_step_is_skipped_begins_again(ranks, set_to_none):
    windows = split_into(draw(12 * RANKS), [3 * RANKS] * 4)
    del windows[1]
    expected, weights = clipped_alone_at(0.05, windows)
    results = result(ranks, f"skipped {set_to_none}")
    assert_clipped_as(results, expected, weights)
    assert [window.loss_count for window in results[0]["windows"]] == [3 * RANKS] * 3


def test_so_does_one_of_summed_losses(ranks):
    first, second = result(ranks, "skipped sums")
    assert_agreed(first, second)
    windows = split_into(draw(12 * RANKS), [3 * RANKS] * 4)
    del windows[1]
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, windows, lambda net, window: sum(loss_of(net, b) for b in window) / 24)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["raised before", *(name for name in CASES if name.startswith("raised in"))],
)
def test_a_micro_batch_that_raises_is_in_no_update(ranks, name):
    first, second = result(ranks, name)
    assert torch.equal(first, second)
    number, left_out = (7, [RAISES]) if name == "raised before" else (9, [3, 4, 5])
    micro_batches = split_into(draw(number * RANKS), [RANKS] * number)
    used = [each for index, each in enumerate(micro_batches) if index not in left_out]
    windows = [[*chain(*used[:3])], [*chain(*used[3:])]]
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, windows, lambda net, window: sum(loss_of(net, b) for b in window) / 6)
    torch.testing.assert_close(first, weights_of(net), rtol=0, atol=1e-12)


def test_a_block_that_raises_in_windows_of_one_spoils_nothing(ranks):
    first, second = result(ranks, "raises alone")
    assert torch.equal(first, second)
    micro_batches = split_into(draw(4 * RANKS), [RANKS] * 4)
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    windows = [each for index, each in enumerate(micro_batches) if index != 1]
    train(net, optimizer, windows, lambda net, window: sum(loss_of(net, b) for b in window) / 2)
    torch.testing.assert_close(first, weights_of(net), rtol=0, atol=1e-12)


@pytest.mark.parametrize("accumulation", ["internal", "external"])
def test_hooks_that_fsdp2_puts_on_parameters_are_not_in_the_way(ranks, accumulation):
    assert result(ranks, f"returned, {accumulation}") == [[True] * 4] * 2


def test_hooks_of_one_rank_leave_the_others_collectives_as_they_are(ranks):
    first, second = result(ranks, "hooked on one rank")
    assert first == second
    assert first[0] is False


@pytest.mark.parametrize("steps", [1, 3])
def test_edits_after_accumulation_on_one_rank_leave_windows_unmeasured_on_all(ranks, steps):
    edited, seen_only = (result(ranks, f"{change} {steps}") for change in ("halved", "looked_at"))
    assert_only_edits_are_told(edited, seen_only)


def test_a_model_that_holds_its_optimizer_is_freed_with_it(ranks):
    assert result(ranks, "dropped") == [[True, True]] * 2


def test_losses_with_blocks_of_their_own_are_added_up(ranks):
    first, second = result(ranks, "two parts")
    assert_agreed(first, second)
    torch.testing.assert_close(first["weights"], alone(3)["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["half of a pair", "half of a pair, monitor"])
def test_passes_that_are_thrown_away_leave_the_next_window_as_it_is(ranks, name):
    assert_as_alone(result(ranks, name), 2)


def test_the_optimizer_clips_by_the_whole_gradients_norm(ranks):
    first, second = result(ranks, "clipping")
    assert_agreed(first, second)
    net = build()
    config = replace(fixed_auto(max_norm=0.1, adapt_clip=False), max_accumulation_steps=4)
    config = replace(config, accumulation_steps=4, min_accumulation_steps=2)
    optimizer = NoiseAwareSGD(net.parameters(), lr=LR, noise=replace(config, mode="auto"))
    train(net, optimizer, draw(4 * RANKS))
    assert first["clipped"] == 2
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_window_with_something_not_finite_is_left_out_on_all_ranks(ranks, accumulates):
    first, second = result(ranks, f"nonfinite {accumulates}")
    assert_agreed(first, second)
    assert first["skipped"] == 2
    assert [w.applied for w in first["windows"]] == [True, False, True, True]
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    both = draw(8 * RANKS)
    for at in (0, 8, 12):
        parts = zip(*both[at : at + 4], strict=True)
        train(net, optimizer, [tuple(torch.cat(tensors) for tensors in parts)])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["external", "monitor"])
def test_a_loop_that_accumulates_by_itself_is_measured_in_the_backward(ranks, name):
    assert_as_alone(result(ranks, name), 2)


def test_summed_losses_are_divided_by_the_samples_of_all(ranks):
    first, second = result(ranks, "summed")
    assert_agreed(first, second)
    sizes = ([2, 6, 3, 1, 5, 4], [4, 2, 2, 8, 1, 3])
    batches = [draw(6, sizes[rank], seed=rank) for rank in range(RANKS)]
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    for at in range(0, 6, 2):
        window = [batch for rank in batches for batch in rank[at : at + 2]]
        train(net, optimizer, [tuple(torch.cat(parts) for parts in zip(*window, strict=True))])
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_rate_of_0_at_first_loses_nothing(ranks, accumulates):
    first, second = result(ranks, f"warming up {accumulates}")
    assert_agreed(first, second)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    for index, batch in enumerate(joined(draw(8 * RANKS), 2 * RANKS)):
        optimizer.param_groups[0]["lr"] = LR * min((2 * index + 1) / 4, 1.0)
        train(net, optimizer, [batch])
    assert first["windows"][0].norms.count == 2 * RANKS
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "steps"), [("validated", 2), ("extended", 1)])
def test_forwards_without_gradients_change_nothing(ranks, name, steps):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    expected = alone(steps)
    batches = STEPS if name == "validated" else 8
    net = build()
    train(net, torch.optim.AdamW(net.parameters(), lr=LR), joined(draw(batches * RANKS), 2 * steps))
    if name == "validated":
        assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


def test_a_state_loaded_inside_a_window_leaves_its_micro_batches_out(ranks):
    first, second = result(ranks, "loaded")
    assert_agreed(first, second)
    net = build()
    train(net, torch.optim.SGD(net.parameters(), lr=LR), joined(draw(3 * RANKS)[RANKS:], 2 * RANKS))
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["method", "grouped, method", "external, method", "monitor, method"]
)
def test_modules_that_run_by_a_method_are_measured_from_the_second_window_on(ranks, name):
    first, second = result(ranks, name)
    assert_agreed(first, second)
    expected = alone(2)
    unread, *others = first["windows"]
    assert unread.norms.small_sq == ()
    assert unread.norms.big_sq == pytest.approx(expected["windows"][0].norms.big_sq, rel=1e-10)
    assert_same_windows(others, expected["windows"][1:], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


def test_modules_that_are_sharded_each_by_itself_are_one_model(ranks):
    first, second = result(ranks, "two roots")
    assert_agreed(first, second)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2 * RANKS))
    for index, batch in enumerate(draw(2 * RANKS)):
        loss_by_parts(net, batch, index >= RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_windows(first["windows"], seen(optimizer, net)["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "windows"), [("skipped by all", [[0, 1, 2, 3], [4, 5, 8, 9]]), ("shortened", [[6, 7]])]
)
def test_windows_go_on_or_begin_again_where_their_last_micro_batch_had_no_step(
    ranks, name, windows
):
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = draw(5 * RANKS)
    for window in windows:
        (sum(loss_of(net, batches[index]) for index in window) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in result(ranks, name):
        torch.testing.assert_close(found, weights_of(net), rtol=0, atol=1e-12)


def test_parameters_beside_the_sharded_ones_may_be_averaged_by_hand(ranks):
    first, second = result(ranks, "by hand")
    assert_agreed(first, second)
    torch.testing.assert_close(first["weights"], alone(1)["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "flushed",
        "experts",
        "two optimizers",
        "two, not measured",
        "unsynchronised",
        "another backward",
        "another backward, bf16",
        "outside 0",
        "outside 1",
        "root forgotten",
        "left behind",
        "left behind, external",
        "raised between blocks",
        "thrown away before its step",
        "raised after skipping",
        "flushed after raising",
        "left by few",
        "no last backward",
        "thrown away in part",
    ],
)
def test_what_cannot_be_is_an_error_with_the_remedy(ranks, name):
    result(ranks, name)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_micro_batch_without_a_backward_is_in_no_window(ranks, at):
    used = [batch for index in range(5) if index != at for batch in draw(10)[2 * index :][:2]]
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for window in (used[:4], used[4:]):
        sum(loss_of(net, batch) / 4 for batch in window).backward()
        optimizer.step()
        optimizer.zero_grad()
    for num_updates, weights in result(ranks, f"skipped at {at}"):
        assert num_updates == 2
        torch.testing.assert_close(weights, weights_of(net), rtol=0, atol=1e-12)


def test_one_sum_of_numbers_serves_an_update_also_where_samples_are_counted(ranks):
    assert result(ranks, "counted") == [(4, 4), (4, 4)]


# ---------------------------------------------------------------------- one rank

ONE = {
    **{
        f"{steps} {accumulates}": functools.partial(
            sharded_run, steps=steps, accumulates=accumulates
        )
        for steps in (1, 3)
        for accumulates in (False, True)
    },
    "adaptive": functools.partial(adaptive_run, accumulates=True),
    "external": functools.partial(external, monitor=False),
    "monitor": functools.partial(external, monitor=True),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_on_ranks(ONE, tmp_path_factory.mktemp("one"), ranks=1)


@pytest.mark.parametrize("name", ONE)
def test_a_sharded_model_on_one_rank_is_measured_as_a_plain_one(one, name):
    """As when a run goes on on fewer ranks, down to the last."""
    (found,) = result(one, name)
    net = build()
    config = {"adaptive": adaptive_config(1), "1": measured(1), "3": measured(3)}
    noise = config.get(name.partition(" ")[0], measured(2))
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=noise)
    train(net, optimizer, part(draw((240 if name == "adaptive" else STEPS) * RANKS), 0))
    assert_same_windows(found["windows"], seen(optimizer, net)["windows"], 1e-9)
    torch.testing.assert_close(found["weights"], weights_of(net), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------- four ranks


def tensor_parallel_and_sharded(rank, model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    net = split(model(), mesh["model"])
    fully_shard(net, mesh=mesh["data"])
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2))
    train(net, optimizer, part(draw(STEPS * 2), rank // 2))
    return seen(optimizer, net)


def hybrid_of_four(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = shard(build(), mesh=mesh)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(1))
    loop(optimizer, net, part(draw(STEPS * 4), rank, 4), accumulates=False)
    return seen(optimizer, net)


def five_outputs():
    return Probe(5)


FOUR = {
    **{
        model.__name__: functools.partial(tensor_parallel_and_sharded, model=model)
        for model in (Block, Embedded)
    },
    "hybrid": hybrid_of_four,
    "probe": functools.partial(probed, model=five_outputs, ranks=4),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_on_ranks(FOUR, tmp_path_factory.mktemp("four"), ranks=4)


@pytest.mark.parametrize("model", [Block, Embedded])
def test_four_ranks_of_tensor_and_data_parallelism(four, model):
    first, *others = result(four, model.__name__)
    for other in others:
        assert_agreed(first, other)
    net = model()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(4))
    train(net, optimizer, draw(STEPS * 2))
    assert_same_windows(first["windows"], seen(optimizer, net)["windows"], 1e-9)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)


def test_four_ranks_of_which_one_holds_nothing(four):
    first, *others = result(four, "probe")
    for other in others:
        assert_agreed(first, other)
    assert_probed_as_alone(first, five_outputs, 4)


def test_four_ranks_of_a_hybrid_mesh(four):
    first, *others = result(four, "hybrid")
    for other in others:
        assert_agreed(first, other)
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(4))
    train(net, optimizer, draw(STEPS * 4))
    assert_same_windows(first["windows"], seen(optimizer, net)["windows"], 1e-9)
    torch.testing.assert_close(first["weights"], weights_of(net), rtol=0, atol=1e-9)


def test_a_run_resumes_between_windows_that_are_measured(ranks):
    for found, wanted in result(ranks, "resumed between"):
        known = [bool(window.norms.small_sq) for window in found]
        assert known == [index % 4 == 0 for index in range(66, 74)]
        assert_same_windows(found, wanted, 1e-12)


@pytest.mark.parametrize("at", [0, 1])
def test_a_frozen_layer_does_not_end_the_measuring(ranks, at):
    for known in result(ranks, f"frozen {at}"):
        assert known == [True] * 10


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", IN_TURN)
def test_parameters_that_are_frozen_in_turn_are_measured_where_they_are_not(
    ranks, name, accumulates
):
    first, second = result(ranks, f"{name} {accumulates}")
    assert_agreed(first, second)
    expected = frozen_in_turn_alone(*IN_TURN[name])
    assert_same_windows(first["windows"], expected["windows"], 1e-10)
    torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-10)


def assert_probed_as_alone(found, model, ranks):
    net = model()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=LR, noise=measured(2 * ranks))
    train(net, optimizer, draw(STEPS * ranks), loss_of_probe)
    assert_same_windows(found["windows"], seen(optimizer, net)["windows"], 1e-9)


@pytest.mark.parametrize(("name", "model"), [("probe", Probe), ("slopes", Slopes)])
def test_ranks_whose_shards_hold_nothing_follow_what_the_loop_scales(ranks, name, model):
    plain, clipped = result(ranks, name)[0], result(ranks, f"{name}, clipped")[0]
    assert_probed_as_alone(plain, model, RANKS)
    micro = clipped["windows"][0].norms.big_sq[0]
    assert micro < 0.01**2 * (1 + 1e-9)
    assert all(window.norms.shows_noise for window in clipped["windows"])
