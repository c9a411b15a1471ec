"""An update's time and a micro-batch's are told apart, or said to be unknown."""

import numpy as np
import pytest

from noiseopt.control.costs import ENOUGH, POINTS, Costs, Timing, speed_up


def timed(lengths, seconds, updates=10):
    """The timing after so many decisions; `seconds` of a window by its length."""
    timing, told = Timing(), None
    for length in (*lengths, 1):
        for _ in range(updates):
            timing = timing.count(length)
        timing = timing.decided(told)
        told = updates * seconds(length)
    return timing


@pytest.mark.parametrize("costs", [(4.0, 1.0), (0.0, 2.0), (3.0, 0.0), (1e-6, 1e-3)])
def test_exact_times_are_recovered(costs):
    a, b = costs
    found = timed([1, 2] * 4, lambda length: a + b * length).costs
    assert found.per_update == pytest.approx(a, abs=1e-12)
    assert found.per_micro_batch == pytest.approx(b, abs=1e-12)
    assert found.low == pytest.approx(b, abs=1e-9)
    assert found.high == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize("lengths", [[4] * 40, [1] * 20 + [2] * (ENOUGH - 1), []])
def test_one_length_tells_nothing(lengths):
    assert timed(lengths, lambda length: 4.0 + length).costs is None


def test_a_time_is_told_of_the_interval_before():
    """The windows that pass while it is on its way have other lengths."""
    timing = Timing()
    for length in (1, 8, 2):
        timing = timing.count(length).decided(None if length == 1 else 4.0 + 1)
        if length == 8:
            assert timing.steps[-1] == 1.0
    assert timing.steps[-2:] == (1.0, 8.0)


def test_stalls_and_evaluations_do_not_move_the_fit():
    """Three of sixteen decisions took ten times as long."""
    rng = np.random.default_rng(0)
    stalled = iter([10.0 if index in (3, 8, 9) else 1.0 for index in range(17)])
    lengths = [1, 2] * 8
    found = timed(lengths, lambda x: (4 + x) * next(stalled) * rng.normal(1, 1e-3)).costs
    assert found.per_update == pytest.approx(4.0, rel=0.1)
    assert found.per_micro_batch == pytest.approx(1.0, rel=0.1)


def test_the_bounds_hold_the_truth_nearly_always():
    rng = np.random.default_rng(1)
    held, widths = 0, []
    for _ in range(200):
        found = timed([1, 2, 4, 1] * 6, lambda x: (4 + x) * rng.normal(1, 0.03)).costs
        held += found.low <= 1.0 <= found.high
        widths.append(found.high - found.low)
    assert held >= 184
    assert 0.02 < np.median(widths) < 0.5


def test_only_the_latest_points_are_kept():
    found = timed([1, 2] * POINTS + [4, 8] * (POINTS // 2 + 1), lambda x: 1.0 + x)
    assert min(found.steps) == 4.0
    passed = iter(range(99))
    changed = timed([1, 2] * POINTS, lambda x: (3 if next(passed) >= POINTS else 1) * x)
    assert changed.costs.per_micro_batch == pytest.approx(3.0)


def test_a_stretch_without_time_adds_no_point():
    timing = Timing().count(1).decided(None).count(1).decided(None)
    assert timing == Timing(last_updates=1, last_micro_batches=1)
    assert not any(Timing().decided(5.0).steps)


def test_what_lies_between_two_lengths_is_no_probe():
    timing = timed([1, 1.3, 2, 4, 3], lambda x: x)
    assert timing.probes(1) == 3
    assert timing.probes(3) == 3


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (Costs(4.0, 1.0, 1.0, 1.0), (4.0, 4.0)),
        (Costs(4.0, 1.0, 0.5, 2.0), (1.0, 10.0)),
        (Costs(4.0, 1.0, 0.5, 9.0), (0.0, 10.0)),
        (Costs(0.0, 1.0, 1.0, 1.0), (0.0, 0.0)),
    ],
    ids=["exact", "bounds", "never-negative", "free-updates"],
)
def test_the_price_of_an_update_lies_between_its_bounds(costs, expected):
    assert costs.price(2) == pytest.approx(expected)


def test_micro_batches_that_cost_nothing_make_updates_dear_and_no_error():
    least, most = Costs(3.0, 0.0, 0.0, 0.0).price(2)
    assert 1e12 < least <= most < np.inf


def test_the_speed_up_is_the_ratio_of_times_for_a_sample():
    costs = Costs(3.0, 2.0, 2.0, 2.0)
    expected = (costs.seconds(2) / 2) / (costs.seconds(8) / 8)
    assert speed_up(1.5, 2, 8) == pytest.approx(expected)
