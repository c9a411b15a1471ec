"""Ranks of unequal speed hold the same time and take the same decisions."""

import functools
from unittest.mock import patch

import pytest
from torch.nn.parallel import DistributedDataParallel

import noiseopt.clock
from noiseopt import NoiseAwareAdamW
from tests.distributed.ranks import part, result, run_on_ranks
from tests.optim.helpers import build, draw, loss_of
from tests.optim.test_time import TIMED, FakeClock, advancing

COSTS = ((4.0, 1.0), (8.0, 2.0))  # of an update and a micro-batch on each rank


def timed(rank, accumulates):
    clock, net = FakeClock(), build()
    model = DistributedDataParallel(net)
    passes = advancing(clock, *COSTS[rank])
    with patch.object(noiseopt.clock, "time", clock):
        optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-3, noise=TIMED)
        for batch in part(draw(800), rank):
            if accumulates:
                with optimizer.accumulate(model):
                    loss_of(model, batch).backward()
            else:
                loss_of(model, batch).backward()
            optimizer.step()
            passes(optimizer.applied)
            optimizer.zero_grad()
    return list(optimizer.decisions)


CASES = {
    "everywhere": functools.partial(timed, accumulates=False),
    "once": functools.partial(timed, accumulates=True),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("time"))


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_decide_by_the_mean_of_their_times(ranks, case):
    first, second = result(ranks, case)
    assert first == second
    assert "grow" in {decision.action for decision in first}
    assert first[-1].costs.per_update == pytest.approx(6.0)
    assert first[-1].costs.per_micro_batch == pytest.approx(1.5)
