"""Which ranks take part, and what they say of one another: four real ranks."""

import functools
import math
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig, NoiseMonitor
from noiseopt.distributed import Ranks, spread
from noiseopt.schedulers import NoiseAwareLR
from tests.accelerator import Accelerator, OnDevice
from tests.distributed.ranks import NEEDS_FSDP2, result, run_on_ranks
from tests.optim.helpers import advise, build, draw, loss_of, params_of, same_bits, train

RANKS = 4
SPREAD = (2.0, 3.0)


def refusal(build_optimizer):
    try:
        build_optimizer()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def of(model, **kwargs):
    return functools.partial(NoiseAwareAdamW, model.parameters(), lr=0.1, **kwargs)


def not_a_member(rank):
    group = dist.new_group([0, 1])
    return refusal(of(build(), process_group=group))


def other_than_ddps(rank):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([each]) for each in range(RANKS)]
    wrapped = DistributedDataParallel(build(), process_group=pairs[rank // 2])
    refused = refusal(of(wrapped, process_group=alone[rank]))
    return refused, refusal(of(wrapped, process_group=pairs[rank // 2]))


def wrapped_later(rank):
    """The group is told, and the model wrapped after the optimizer is there."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1, process_group=dist.group.WORLD)
    wrapped = DistributedDataParallel(model)
    return refusal(lambda: train(wrapped, optimizer, draw(2, seed=rank)))


def side_by_side(rank):
    """Two models, each on two ranks: each pair decides alone, the second on other data."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    wrapped = DistributedDataParallel(build(), process_group=pairs[rank // 2])
    optimizer = NoiseAwareAdamW(wrapped.parameters(), lr=0.1, noise=advise(decision_interval=4))
    train(wrapped, optimizer, draw(12, size=4 + 4 * (rank // 2), seed=rank))
    return optimizer.decisions


def differing(rank):
    """Along a mesh of two dimensions, one rank has another number."""
    mesh = init_device_mesh("cpu", (2, 2))
    ranks = Ranks(4, groups=(mesh.get_group(0), mesh.get_group(1)))
    return refusal(lambda: ranks.compare({"same": 1, "number": int(rank == 3)}, "facts"))


def for_accelerators_alone(rank):
    group = dist.new_group(backend="cuda:gloo")
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1, process_group=group)
    return refusal(lambda: train(model, optimizer, draw(1)))


def on_two_devices(rank):
    with Accelerator():
        sums = [OnDevice(torch.full((2,), value)) for value in SPREAD]
        grads = [sums[0], torch.ones(3), sums[1]]
        Ranks(RANKS, groups=(None,)).sum_gradients_(grads, "window 1")
        return [grads[0].tolist(), grads[1].tolist(), grads[2].tolist()]


def split(mesh):
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    return parallelize_module(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mesh, plan)


def unclear_layouts(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    found = {}
    for wrap in (_with_dims, _replicated, _under_ddp):  # torch's caches want the first to be it
        model = wrap(mesh)
        found[wrap.__name__] = model and refusal(of(model))
    return found


def _under_ddp(mesh):
    model = split(mesh["model"])
    DistributedDataParallel(model, device_mesh=mesh["data"])
    return model


def _replicated(mesh):
    try:
        from torch.distributed._composable.replicate_with_fsdp import replicate
    except ImportError:  # torch before 2.9
        return None
    model = split(mesh["model"])
    replicate(model, mesh=mesh["data"])
    return model


def _with_dims(mesh):
    try:
        from torch.distributed.fsdp import DataParallelMeshDims
    except ImportError:  # torch before 2.13
        return None
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = nn.Linear(8, 8)
    for name in ("weight", "bias"):
        whole = getattr(model, name).data
        spread = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
        setattr(model, name, nn.Parameter(spread))
    fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="data"))
    return model


def uneven_windows(rank, monitors):
    """Windows of three that the loop accumulates, but for one of two on one rank."""
    wrapped = DistributedDataParallel(build())
    config = NoiseConfig(accumulation="external", accumulation_steps=3, decision_interval=1000)
    if monitors:
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
        watching = NoiseMonitor(optimizer, replace(config, accumulation="internal"))
        NoiseAwareLR(watching)
    else:
        watching = optimizer = NoiseAwareAdamW(wrapped.parameters(), lr=0.1, noise=config)
    controller = watching._adaptation._controller
    state = replace(controller.state, noise_ratio=4.0, reference_steps=1.0)
    watching._adaptation._controller = controller.at(state)

    def window(number):
        for index, batch in enumerate(draw(number, seed=rank)):
            with wrapped.no_sync() if index < number - 1 else nullcontext():
                (loss_of(wrapped, batch) / number).backward()
        optimizer.step()
        optimizer.zero_grad()

    window(3)
    before = params_of(wrapped)
    refused = refusal(lambda: window(2 if rank == 1 else 3))
    return refused, same_bits(before, params_of(wrapped))


def sharded(rank):
    """Which kernels are preferred over DTensors, were the CPU a GPU."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(build())
    with patch("noiseopt.optim.kernels.FUSED_ON", ("cpu",)):
        made = [ours(model.parameters(), lr=0.1) for ours in (NoiseAwareAdamW, NoiseAwareSGD)]
    return [optimizer.param_groups[0]["fused"] for optimizer in made]


def by_fsdp1(rank, use_orig_params):
    """FSDP2's predecessor, with flat parameters or with views of them."""
    device = torch.device("cpu")
    model = FullyShardedDataParallel(build(), use_orig_params=use_orig_params, device_id=device)
    return refusal(of(model))


def alike():
    """As many layers of one shape as there are ranks, each of which would update one."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(RANKS)))


def by_zero_redundancy(rank, build, **kwargs):
    """Optimizers of the ranks' own parts of the parameters, made for them by torch."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns

    wrapped = DistributedDataParallel(build())
    before = params_of(wrapped)

    def train_once():
        optimizer = ZeroRedundancyOptimizer(
            wrapped.parameters(), optimizer_class=NoiseAwareAdamW, lr=0.1, **kwargs
        )
        wrapped(draw(RANKS)[rank][0]).square().mean().backward()
        optimizer.step()

    return refusal(train_once), same_bits(before, params_of(wrapped))


def late(rank):
    """One rank, which keeps the store, does not come to the sum that ends a window."""
    group = dist.new_group(timeout=timedelta(seconds=4))
    model = build()
    noise = advise(decision_interval=1, gradients="local")
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1, noise=noise, process_group=group)
    train(model, optimizer, draw(1, seed=rank))
    dist.barrier()
    return rank != 0 and refusal(lambda: train(model, optimizer, draw(1, seed=rank)))


CASES = {
    "late": late,
    "FSDP1": functools.partial(by_fsdp1, use_orig_params=False),
    "FSDP1, views": functools.partial(by_fsdp1, use_orig_params=True),
    "ZeRO": functools.partial(by_zero_redundancy, build=build),
    "ZeRO, alike": functools.partial(by_zero_redundancy, build=alike),
    "ZeRO, settings": functools.partial(by_zero_redundancy, build=build, noise="advise"),
    "uneven windows": functools.partial(uneven_windows, monitors=False),
    "monitored": functools.partial(uneven_windows, monitors=True),
    "sharded": sharded,
    "not a member": not_a_member,
    "other than DDP's": other_than_ddps,
    "wrapped later": wrapped_later,
    "side by side": side_by_side,
    "differing": differing,
    "accelerators": for_accelerators_alone,
    "two devices": on_two_devices,
    "unclear": unclear_layouts,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("groups"), ranks=RANKS)


def test_a_rank_outside_of_its_group_is_refused(ranks):
    *inside, first, second = result(ranks, "not a member")
    assert inside == [None, None]
    assert "ValueError: this rank is not in process_group" in first == second


def test_a_group_that_is_not_ddps_is_refused(ranks):
    for rank, (refused, taken) in enumerate(result(ranks, "other than DDP's")):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert f"the ranks [{rank}], but DDP averages gradients over {pair}" in refused
        assert taken is None


def test_a_group_that_is_told_is_taken_before_ddp_is_there(ranks):
    assert result(ranks, "wrapped later") == [None] * RANKS


def test_models_side_by_side_decide_apart(ranks):
    first, same, second, also = result(ranks, "side by side")
    assert first == same != second == also
    assert len(first) == 3
    assert {decision.ranks for decision in (*first, *second)} == {2}


@pytest.mark.parametrize("norm", [0.0, 1e-170, 1e-158, 1e-146, 1e-20, 1.0, 1e20])
def test_equal_numbers_have_no_spread_where_that_can_be_told(norm):
    found = spread(3 * norm, 3 * norm**2, 3)
    assert math.isnan(found) if norm < 1e-145 else abs(found) < 1e-14


def test_every_rank_of_a_mesh_is_told_what_differs(ranks):
    """Also those whose own row agrees, who would wait for the others' columns in vain."""
    for text in result(ranks, "differing"):
        assert "ranks disagree on facts" in text
        assert "number: [" in text
        assert "same" not in text


def test_a_group_that_cannot_sum_on_the_cpu_is_refused(ranks):
    for text in result(ranks, "accelerators"):
        assert "init_process_group('cpu:gloo,cuda:nccl')" in text


def test_gradients_on_two_devices_are_summed(ranks):
    for found in result(ranks, "two devices"):
        assert found == [[4 * SPREAD[0]] * 2, [4.0] * 3, [4 * SPREAD[1]] * 2]


def test_ranks_whose_windows_scale_differently_are_stopped_before_the_update(ranks):
    for refused, unchanged in result(ranks, "uneven windows"):
        assert "factors of the window's length: [" in refused
        assert unchanged


def test_so_are_those_that_a_monitor_scales(ranks):
    """After the update, which is the loop's own."""
    for refused, _ in result(ranks, "monitored"):
        assert "factors of the window's length: [" in refused


@pytest.mark.parametrize("name", ["FSDP1", "FSDP1, views"])
def test_fsdp1_is_refused(ranks, name):
    for refused in result(ranks, name):
        assert "FullyShardedDataParallel (FSDP1)" in refused
        assert "fully_shard" in refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ZeRO", "digest of the parameters' shapes and types: ["),
        ("ZeRO, alike", "squared norm of the parameters: ["),
        ("ZeRO, settings", "ZeroRedundancyOptimizer, which are not supported"),
    ],
)
def test_zero_redundancy_is_refused_before_anything_changes(ranks, name, words):
    for refused, unchanged in result(ranks, name):
        assert words in refused
        assert unchanged


def test_the_rank_that_does_not_come_is_named_by_all_that_wait(ranks):
    _, *waiting = result(ranks, "late")
    for rank, text in enumerate(waiting, start=1):
        assert f"rank {rank} waited in vain in window 2 for rank 0, which" in text


@NEEDS_FSDP2
def test_sgd_keeps_its_own_kernel_over_shards(ranks):
    """torch's fused one has no rule for them."""
    assert result(ranks, "sharded") == [[True, None]] * RANKS


@NEEDS_FSDP2
def test_layouts_that_hide_who_holds_what_are_refused(ranks):
    for found in result(ranks, "unclear"):
        assert "DDP(device_mesh=...) around tensor-parallel" in found["_under_ddp"]
        if torch.__version__ >= "2.9":
            assert "replicate() around tensor-parallel" in found["_replicated"]
        if torch.__version__ >= "2.13":
            assert "fully_shard(dp_mesh_dims=...)" in found["_with_dims"]
