"""The online estimator: what it counts, how it forgets, and when it speaks."""

import math

import numpy as np
import pytest

from noiseopt.estimate import NoiseEstimator, WindowNorms


def window(trace, signal, samples=16.0, count=2):
    """A window whose noise sample is exactly (trace, signal)."""
    small = samples / count
    return WindowNorms(
        (signal + trace / small,), (signal + trace / samples,), small, samples, count, samples
    )


def fed(windows, **settings):
    estimator = NoiseEstimator(**settings)
    for one in windows:
        estimator = estimator.update(one)
    return estimator


def noisy(number, samples=16.0, seed=0):
    rng = np.random.default_rng(seed)
    return [window(*pair, samples) for pair in rng.normal([64, 4], [8, 1], (number, 2)).tolist()]


def test_the_scale_is_the_ratio_of_the_averages():
    """Not the average of the ratios, which here is 9."""
    estimator = fed([window(10.0, 1.0), window(32.0, 4.0)] * 200)
    assert estimator.estimate(10.0).scale == pytest.approx(42 / 5, rel=0.02)
    estimate = estimator.estimate(10.0)
    assert estimate.scale == estimator.average.trace / estimator.average.signal
    assert estimate.fraction == pytest.approx(estimate.scale / (estimate.scale + 10.0))


def test_fewer_than_three_measured_windows_give_no_estimate():
    assert fed(noisy(2)).estimate(16.0) is None
    assert fed(noisy(3)).estimate(16.0) is not None


def test_windows_without_spread_are_counted_and_not_learned_from():
    lone = WindowNorms((5.0,), (5.0,), 8.0, 8.0, 1, 8.0)
    bad = WindowNorms((math.nan,), (5.0,), 8.0, 16.0, 2, 16.0)
    before = fed(noisy(5))
    after = before.update(lone).update(bad)
    assert after.samples_seen == before.samples_seen + 24
    assert (after.average, after.windows) == (before.average, before.windows)


def test_the_half_life_is_a_share_of_the_samples_seen():
    """A window of 1 % of all samples halves a memory of 2 % by half of a halving."""
    estimator = fed(noisy(1, samples=9900.0), half_life_fraction=0.02, half_life_windows=1.0)
    weight = estimator.update(window(1.0, 1.0, samples=100.0)).average.weight
    assert weight == pytest.approx(1 + 2**-0.5)


def test_the_half_life_is_never_shorter_than_its_windows():
    old = fed(noisy(400), half_life_windows=32.0)
    weight = old.update(window(1.0, 1.0)).average.weight
    assert weight == pytest.approx(1 + 2 ** (-1 / 32) * old.average.weight)


@pytest.mark.parametrize(("windows", "half_life"), [(1, 1), (5, 1), (50, 10), (159, 31.8)])
def test_the_first_windows_are_forgotten_within_a_fifth_of_those_measured(windows, half_life):
    old = fed(noisy(windows), half_life_windows=32.0)
    weight = old.update(window(1.0, 1.0)).average.weight
    assert weight == pytest.approx(1 + 2 ** (-1 / half_life) * old.average.weight)


def test_the_memory_is_counted_in_samples():
    """Old windows weigh the same after 4096 samples, whether these come in 64 windows or in 256."""
    old = fed(noisy(4000, samples=64.0))
    decays = []
    for samples in (64.0, 16.0):
        estimator, log_decay = old, 0.0
        for one in noisy(int(4096 / samples), samples):
            weight = estimator.average.weight
            estimator = estimator.update(one)
            log_decay += math.log2((estimator.average.weight - 1) / weight)
        decays.append(log_decay)
    share = 0.03
    expected = -math.log(1 + 4096 / (4000 * 64)) / share  # the integral of 1 / (share * seen)
    assert decays == pytest.approx([expected, expected], rel=0.01)


def test_unmeasured_windows_age_the_memory():
    """One measured window after 15 unmeasured ones forgets as much as 16 windows' samples."""
    lone = WindowNorms((5.0,), (5.0,), 16.0, 16.0, 1, 16.0)
    old = fed(noisy(4000), half_life_windows=1.0)
    aged = fed_on(old, [lone] * 15 + [window(1.0, 1.0)])
    decay = (aged.average.weight - 1) / old.average.weight
    assert decay == pytest.approx(2 ** -(16 / (0.03 * 4016)), rel=1e-9)


def fed_on(estimator, windows):
    for one in windows:
        estimator = estimator.update(one)
    return estimator


def test_groups_sum_to_the_model_also_when_a_window_is_winsorised():
    rng = np.random.default_rng(1)
    estimator = NoiseEstimator()
    for index in range(80):
        scale = 1e3 if index == 60 else 1.0
        small = scale * rng.uniform(5, 9, 3)
        big = scale * rng.uniform(2, 5, 3)
        estimator = estimator.update(
            WindowNorms(tuple(small.tolist()), tuple(big.tolist()), 8.0, 16.0, 2, 16.0)
        )
    estimate = estimator.estimate(16.0)
    assert estimate.winsorised == 1
    assert sum(group.trace for group in estimate.groups) == pytest.approx(estimate.trace, rel=1e-9)
    assert sum(group.signal for group in estimate.groups) == pytest.approx(
        estimate.signal, rel=1e-9
    )


def test_a_group_has_the_interval_that_it_would_have_as_a_model():
    rng = np.random.default_rng(3)
    whole = NoiseEstimator(winsorise=math.inf).with_groups(2)
    alone = [NoiseEstimator(winsorise=math.inf)] * 2
    for _ in range(60):
        small, big = rng.uniform(5, 9, 2).tolist(), rng.uniform(2, 5, 2).tolist()
        whole = whole.update(WindowNorms(tuple(small), tuple(big), 8.0, 16.0, 2, 16.0))
        alone = [
            estimator.update(WindowNorms((s,), (b,), 8.0, 16.0, 2, 16.0))
            for estimator, s, b in zip(alone, small, big, strict=True)
        ]
    for group, estimator in zip(whole.estimate(16.0).groups, alone, strict=True):
        estimate = estimator.estimate(16.0)
        assert (group.scale, group.scale_interval) == (estimate.scale, estimate.scale_interval)
        assert (group.trace, group.signal) == (estimate.trace, estimate.signal)


def test_a_group_that_comes_later_counts_as_nothing_until_then():
    estimator = fed([window(64.0, 4.0)] * 20).with_groups(1)
    for _ in range(20):
        small, big = 4.0 + 64.0 / 8, 4.0 + 64.0 / 16
        estimator = estimator.update(WindowNorms((small, small), (big, big), 8.0, 16.0, 2, 16.0))
    estimate = estimator.estimate(16.0)
    assert sum(group.signal for group in estimate.groups) == pytest.approx(estimate.signal)
    assert estimate.groups[1].signal < estimate.groups[0].signal


def test_a_signal_below_zero_gives_an_infinite_scale_and_a_finite_lower_bound():
    rng = np.random.default_rng(2)
    pairs = rng.normal([64.0, -0.1], [4.0, 1.0], (40, 2)).tolist()
    estimate = fed([window(*pair) for pair in pairs]).estimate(16.0)
    assert estimate.signal < 0
    assert (estimate.scale, estimate.fraction, estimate.scale_interval[1]) == (
        math.inf,
        1,
        math.inf,
    )
    assert 0 < estimate.scale_lower < math.inf
    assert estimate.groups[0].scale == math.inf


def test_the_norm_at_a_batch_is_its_expected_root_mean_square():
    estimator = fed([window(64.0, 4.0)] * 5)
    assert estimator.norm_at(16.0) == pytest.approx(math.sqrt(4.0 + 64.0 / 16))
    assert estimator.norm_at(math.inf) == pytest.approx(2.0)


def test_every_bound_contains_the_estimate():
    estimate = fed(noisy(50)).estimate(16.0, confidence=0.9, unit="micro-batches")
    assert estimate.scale_interval[0] < estimate.scale < estimate.scale_interval[1]
    assert estimate.scale_lower < estimate.scale < estimate.scale_upper
    assert estimate.fraction_interval[0] < estimate.fraction < estimate.fraction_interval[1]
    assert estimate.fraction_lower < estimate.fraction < estimate.fraction_upper
    assert (estimate.batch, estimate.unit) == (16.0, "micro-batches")
    assert estimate.samples_seen == 800
