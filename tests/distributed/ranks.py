"""Real ranks over gloo. Starting them costs seconds, so one set of workers runs many cases."""

import os
import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.api import CheckpointException  # no Exception

from noiseopt.control.controller import MEASURED_AT_FIRST
from tests.optim.helpers import draw

RANKS = 2

# pyproject.toml allows torch >= 2.6, of which FSDP2 needs an accelerator: the first forward of a
# sharded model ends there with "'Stream' object has no attribute 'record_event'", ours or not.
NEEDS_FSDP2 = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6's own FSDP2 fails on the CPU"
)


def free_port():
    """One that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_ranks(cases, folder, ranks=RANKS):
    """Run functions of the rank on so many ranks, in turn; what they returned, for each rank.

    A case that raises fails alone, with its traceback, if it raises on every rank alike.
    """
    mp.spawn(_work, args=(ranks, free_port(), str(folder), cases), nprocs=ranks)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


def result(ranks, name):
    """What a case returned on each rank; fails with what it raised there."""
    results = [rank[name] for rank in ranks]
    for rank, value in enumerate(results):
        assert not isinstance(value, Raised), f"on rank {rank}:\n{value.text}"
    return results


class Raised:
    """A case that raised."""

    def __init__(self, text):
        self.text = text


def _work(rank, ranks, port, folder, cases):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case(rank)
        except (Exception, CheckpointException, pytest.fail.Exception):
            results[name] = Raised(traceback.format_exc())
        dist.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    leave()


def leave():
    """End this process at once.

    Gloo's threads can outlive the group, and one that lets go of a tensor while Python ends aborts
    the process (github.com/pytorch/pytorch/issues/190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def part(batches, rank, ranks=RANKS):
    """Every so many-th batch: a rank's own."""
    return batches[rank::ranks]


def stopped(optimizer, losses):
    """After how many updates a loop over losses stops, and what is said; None if it does not."""
    for updates, loss in enumerate(losses):
        loss.backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return updates, str(error)
        optimizer.zero_grad()
    return None


def windows_of(optimizer):
    """The statistics of every window that the kept decisions rest on."""
    return [window for decision in optimizer.decisions for window in decision.windows]


def assert_rarely_measured(found, all_measured, every, rel):
    """After a run's first windows every so manyth is measured; nothing else is different."""
    assert len(found) == len(all_measured) > MEASURED_AT_FIRST + every
    for index, (one, other) in enumerate(zip(found, all_measured, strict=True)):
        due = index < MEASURED_AT_FIRST or index % every == 0
        assert (len(one.norms.small_sq) > 0) == due
        if due:
            assert one.norms.small_sq == pytest.approx(other.norms.small_sq, rel=rel)
        assert one.norms.big_sq == pytest.approx(other.norms.big_sq, rel=rel)
        assert one.norms.samples == other.norms.samples
        assert (one.applied, one.micro_batches) == (other.applied, other.micro_batches)


def weights_of(model):
    """All parameters in one vector, of DTensors the whole."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def draw_for_ranks(steps, ranks=RANKS, **kwargs):
    """So many micro-batches for each rank, in the order in which one process would take them."""
    return draw(steps * ranks, **kwargs)
