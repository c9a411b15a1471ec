"""Loops that accumulate by themselves, on two real ranks that shard parameters or hold copies."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR

from noiseopt import NoiseAwareSGD, NoiseMonitor
from noiseopt.schedulers import NoiseAwareLR
from tests.distributed.ranks import NEEDS_FSDP2, part, result, run_on_ranks, stopped, windows_of
from tests.optim.helpers import build, draw, fixed, loss_of

pytestmark = pytest.mark.distributed

WINDOWS, BAD = 6, 2  # and which of them is not finite in the first rank's shards alone


def overflow_in_one_shard(rank, tells):
    """The GradScaler skips on both ranks; told of samples or not, both must count alike."""
    from torch.distributed.fsdp import fully_shard

    model = build(torch.float32)
    fully_shard(model[2])
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    config = fixed(2, decision_interval=100, adapt_lr=False)
    monitor = NoiseMonitor(optimizer, config, grad_scaler=scaler)
    schedule = NoiseAwareLR(monitor, ExponentialLR(optimizer, 0.9))
    rates = []
    for index, batch in enumerate(part(draw(4 * WINDOWS, dtype=torch.float32), rank)):
        if tells:
            monitor.set_samples(4)
        hook = model[0].register_forward_hook(_overflow) if index == 2 * BAD else None
        scaler.scale(loss_of(model, batch) / 2).backward()
        if hook is not None:
            hook.remove()
        if index % 2:
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
    return monitor.micro_batches, monitor.num_updates, rates


def _overflow(module, inputs, outputs):
    """Of the outputs' gradients only the first, whose weights the first rank's shard holds."""
    outputs.register_hook(lambda grad: torch.cat([grad[:, :1] * torch.inf, grad[:, 1:]], 1))


def saved_in_windows(rank):
    """Checkpointing steps once to build a state, each time for SGD, which has none."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = NoiseMonitor(optimizer, fixed(2, decision_interval=1))
    for index, batch in enumerate(part(draw(4 * WINDOWS), rank)):
        model.set_requires_gradient_sync(index % 2 == 1)
        (loss_of(model, batch) / 2).backward()
        get_optimizer_state_dict(model, optimizer)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [window.norms.count for window in windows_of(monitor)]


class Sequential(nn.Module):
    """A layer norm between two matrices, over sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.down(self.norm(self.up(inputs)))


def sequence_parallel(rank, kind):
    """The layer norm's gradients are parts to be added up: each rank's of its half of the rows."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = Sequential().double()
    plan = {
        "up": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "down": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    norm = [*model.norm.parameters()]
    matrices = [*model.up.parameters(), *model.down.parameters()]
    groups, config = [{"params": norm}, {"params": matrices}], {"decision_interval": 1}
    if kind == "monitor":
        optimizer = torch.optim.SGD(groups, lr=0.0)
        readings = NoiseMonitor(optimizer, fixed(2, **config))
    else:
        settings = fixed(2, accumulation="external", **config)
        readings = optimizer = NoiseAwareSGD(groups, lr=0.0, noise=settings)
    for batch in draw(2):
        (loss_of(model, batch) / 2).backward()
    optimizer.step()
    (window,) = windows_of(readings)
    return window.norms.small_sq, window.norms.big_sq


def other_rate_on_one_rank(rank):
    model = DistributedDataParallel(build())
    groups = [{"params": [param]} for param in model.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    NoiseMonitor(optimizer, fixed(1, decision_interval=100))

    def losses():
        for index, batch in enumerate(part(draw(20), rank)):
            if index == 2 and rank == 1:
                optimizer.param_groups[1]["lr"] = 0.05
            yield loss_of(model, batch)

    return stopped(optimizer, losses())


CASES = {
    "overflow": functools.partial(overflow_in_one_shard, tells=False),
    "overflow, told": functools.partial(overflow_in_one_shard, tells=True),
    "saved": saved_in_windows,
    "external": functools.partial(sequence_parallel, kind="external"),
    "monitor": functools.partial(sequence_parallel, kind="monitor"),
    "other rate": other_rate_on_one_rank,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("monitored"))


@NEEDS_FSDP2
@pytest.mark.parametrize("name", ["overflow", "overflow, told"])
def test_an_overflow_in_one_ranks_shards_is_a_skipped_step_on_all(ranks, name):
    one, other = result(ranks, name)
    assert one == other
    micro_batches, updates, rates = one
    assert (micro_batches, updates) == (2 * WINDOWS, WINDOWS - 1)
    consumed = [2, 4, 4, 8, 10, 12]  # the schedule hears of the skipped window with the next one
    assert rates == pytest.approx([0.1 * 0.9**n for n in consumed])


@NEEDS_FSDP2
def test_a_state_that_is_taken_inside_a_window_leaves_it_as_it_is(ranks):
    assert result(ranks, "saved") == [[4.0] * WINDOWS] * 2


@pytest.mark.parametrize("kind", ["external", "monitor"])
def test_partial_gradients_are_measured_as_their_sum(ranks, kind):
    model = Sequential().double()
    norm = [*model.norm.parameters()]
    groups = norm, [*model.up.parameters(), *model.down.parameters()]
    small, mean = [0.0, 0.0], [0.0, 0.0]
    for batch in draw(2):
        for index, params in enumerate(groups):
            grads = torch.autograd.grad(loss_of(model, batch), params)
            grad = torch.cat([g.flatten() for g in grads])
            small[index] += grad.square().sum().item() / 2
            mean[index] = mean[index] + grad / 2
    for small_sq, big_sq in result(ranks, kind):
        assert small_sq == pytest.approx(small, rel=1e-9)
        assert big_sq == pytest.approx([m.square().sum().item() for m in mean], rel=1e-9)


def test_a_monitored_optimizer_has_the_same_rates_on_all_ranks(ranks):
    for updates, error in result(ranks, "other rate"):
        assert updates == 2
        assert "ranks disagree on" in error
        assert "lr of group 1: [0.1, 0.05]" in error
