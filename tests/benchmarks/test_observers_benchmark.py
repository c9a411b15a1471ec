"""The benchmark of the observers: every observer is called, and shares are those of the times."""

import pytest

from benchmarks import observers as bench
from noiseopt.demo.gpt import Shape
from noiseopt.demo.train import Settings

TINY = Settings(batch_size=2, shape=Shape(layers=1, width=32, context=16))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return bench.measure(3, tmp_path_factory.mktemp("scratch"), TINY)


@pytest.mark.slow
def test_every_observer_is_called_in_every_observed_block(results):
    shares = [one for one in results if isinstance(one, bench.Share)]
    assert [one.observer for one in shares] == ["record", "wandb", "tensorboard", "all"]
    assert {one.decisions for one in shares} == {3}
    *each, total = shares
    assert total.ms == pytest.approx(sum(one.ms for one in each))
    assert total.share == pytest.approx(sum(one.share for one in each))
    assert total.holds == (total.share <= bench.TARGET)
    assert all(one.ms > 0 for one in each)


@pytest.mark.slow
def test_ratios_have_their_control(results):
    ratios = [one for one in results if isinstance(one, bench.Ratio)]
    assert [(one.part, one.blocks) for one in ratios] == [
        ("ratio, observed", 3),
        ("ratio, control", 3),
    ]
    assert all(low <= middle <= high for one in ratios for low, middle, high in (one.wall, one.cpu))


def test_a_ratio_is_to_the_blocks_without_observers():
    times = {bench.PLAIN: [(1.0, 1.0)] * 4, bench.OBSERVED: [(1.5, 2.0)] * 4}
    times[bench.CONTROL] = times[bench.PLAIN]
    observed, control = bench.ratios(times)
    assert (observed.wall[1], observed.cpu[1]) == (1.5, 2.0)
    assert (control.wall[1], control.block_ms) == (1.0, 1000.0)
