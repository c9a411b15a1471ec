"""Two real ranks over gloo: one estimate, one decision, one model.

All cases run in one pair of workers, since starting them costs seconds. What every rank measures
under DDP is the synchronised gradient, so a single process that sees both ranks' samples in each
micro-batch is the oracle.
"""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noiseopt import NoiseAwareAdamW, NoiseConfig, NoiseMonitor

RANKS, BATCH, STEPS = 2, 4, 240
CONFIG = NoiseConfig(
    decision_interval=5,
    probe_interval=2,
    min_count=8,
    dwell_updates=10,
    samples_per_micro_batch=BATCH,
    half_life_windows=8,
)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, RANKS * BATCH, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(STEPS, RANKS * BATCH, 3, generator=generator, dtype=torch.float64)
    return x, 0.3 * x[..., :3] + y


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def train(net: nn.Module, optimizer: NoiseAwareAdamW, part: slice) -> int:
    applied = 0
    for x, y in zip(*data(), strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[part]), y[part]).backward()
        optimizer.step()
        applied += optimizer.applied
        assert optimizer.num_updates == applied
    return applied


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def adaptive_run(rank: int) -> dict:
    net = model()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2, noise=CONFIG)
    part = slice(rank * BATCH, (rank + 1) * BATCH)
    applied = train(DistributedDataParallel(net), optimizer, part)
    return {"decisions": optimizer.decisions, "weights": weights(net), "applied": applied}


def unsynchronised_step(rank: int) -> str:
    net = model()
    wrapped = DistributedDataParallel(net)
    config = replace(CONFIG, decision_interval=1)
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2, noise=config)
    x, y = data()
    part = slice(rank * BATCH, (rank + 1) * BATCH)
    with wrapped.no_sync():
        nn.functional.mse_loss(wrapped(x[0][part]), y[0][part]).backward()
    with pytest.raises(RuntimeError, match="gradients differ between ranks") as caught:
        optimizer.step()
    return str(caught.value)


def accumulate_is_refused(rank: int) -> str:
    net = model()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-2)
    with (
        pytest.raises(ValueError, match="on 2 ranks") as caught,
        optimizer.accumulate(DistributedDataParallel(net)),
    ):
        pass
    return str(caught.value)


def external_measuring_is_refused(rank: int) -> str:
    net = model()
    with pytest.raises(ValueError, match="on 2 ranks") as caught:
        NoiseMonitor(torch.optim.AdamW(net.parameters()))
    with pytest.raises(ValueError, match="on 2 ranks"):
        NoiseAwareAdamW(net.parameters(), noise=NoiseConfig(accumulation="external"))
    return str(caught.value)


CASES = (
    adaptive_run,
    unsynchronised_step,
    accumulate_is_refused,
    external_measuring_is_refused,
)


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results = {case.__name__: case(rank) for case in CASES}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_every_rank_decides_alike_and_holds_the_same_weights(ranks):
    """Decision records and weights are bitwise equal on both ranks."""
    first, second = (rank["adaptive_run"] for rank in ranks)
    assert first["decisions"] == second["decisions"]
    assert torch.equal(first["weights"], second["weights"])


def test_two_ranks_are_one_process_with_both_ranks_samples(ranks):
    """The same windows, decisions and weights as a single process on the joined micro-batches."""
    net = model()
    config = replace(CONFIG, samples_per_micro_batch=RANKS * BATCH)
    alone = NoiseAwareAdamW(net.parameters(), lr=1e-2, noise=config)
    train(net, alone, slice(None))
    together = ranks[0]["adaptive_run"]
    assert any(decision.action == "grow" for decision in alone.decisions)
    assert [d.accumulation_steps for d in together["decisions"]] == [
        d.accumulation_steps for d in alone.decisions
    ]
    assert together["decisions"][-1].samples_seen == alone.decisions[-1].samples_seen
    assert together["decisions"][-1].noise.scale == pytest.approx(alone.noise.scale, rel=1e-9)
    torch.testing.assert_close(together["weights"], weights(net), rtol=0, atol=1e-9)


def test_updates_are_counted_at_every_step_between_decisions_too(ranks):
    """The workers compare `num_updates` with what was applied; the last decision is as far."""
    for rank in ranks:
        run = rank["adaptive_run"]
        assert 0 <= run["applied"] - run["decisions"][-1].num_updates < CONFIG.decision_interval


def test_a_step_on_unsynchronised_gradients_is_an_error_on_every_rank(ranks):
    """It names the cause and the remedy."""
    for rank in ranks:
        assert "no_sync()" in rank["unsynchronised_step"]
        assert "process_group" in rank["unsynchronised_step"]


def test_skipping_synchronisation_is_refused_where_it_would_be_wrong(ranks):
    """accumulate() on several ranks says so instead of training on local gradients."""
    assert all("not supported yet" in rank["accumulate_is_refused"] for rank in ranks)


def test_measuring_in_the_backward_is_refused_where_ranks_share_gradients(ranks):
    """There the gradients are not synchronised yet; the remedy is named."""
    assert all("accumulation='internal'" in r["external_measuring_is_refused"] for r in ranks)
