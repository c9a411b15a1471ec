"""The norm's level and spread on lognormal norms, whose parameters are known."""

import math

import numpy as np
import pytest

from noiseopt.control.clipping import MIN_COUNT, MIN_SPREAD, NormLevel


def learned(log_norms):
    level = NormLevel()
    for log_norm in log_norms:
        level = level.update(float(log_norm))
    return level


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_the_spread_is_the_standard_deviation_of_the_log_norm(sigma):
    """On average over 3000 updates within 5 %; the level within five standard errors."""
    rng = np.random.default_rng(1)
    level, spreads, levels = learned(rng.normal(2.0, sigma, 500)), [], []
    for log_norm in rng.normal(2.0, sigma, 3000).tolist():
        level = level.update(log_norm)
        spreads.append(level.spread)
        levels.append(level.level)
    assert np.mean(spreads) == pytest.approx(sigma, rel=0.05)
    assert np.mean(levels) == pytest.approx(2.0, abs=5 * sigma / math.sqrt(3000))


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_clean_norms_are_rarely_clipped(sigma):
    """Below 1 % at z = 3 (0.2 % measured over 20 000 updates; 0.13 % with a known spread)."""
    rng = np.random.default_rng(2)
    level, clipped = NormLevel(), 0
    for log_norm in rng.normal(-3.0, sigma, 20_000).tolist():
        clipped += math.exp(log_norm) > level.threshold(3.0)
        level = level.update(log_norm)
    assert 0 < clipped < 0.01 * 20_000


@pytest.mark.parametrize("factor", [1e3, 1e30, 1e-30])
def test_an_outlier_moves_the_threshold_by_a_bounded_amount(factor):
    """However large, it counts as four standard deviations: less than 20 % at z = 3."""
    rng = np.random.default_rng(3)
    before = learned(rng.normal(0.0, 0.3, 1000))
    after = before.update(math.log(factor))
    assert after == before.update(math.copysign(4 * before.spread, math.log(factor)) + before.level)
    assert abs(math.log(after.threshold(3.0) / before.threshold(3.0))) < math.log(1.2)


def test_nothing_is_clipped_before_enough_norms_were_seen():
    log_norms = np.random.default_rng(4).normal(0.0, 0.3, MIN_COUNT)
    assert learned(log_norms[:-1]).threshold(3.0) == math.inf
    assert learned(log_norms).threshold(3.0) < 5


def test_constant_norms_keep_the_least_spread():
    assert learned([1.5] * 200).threshold(3.0) == pytest.approx(math.exp(1.5 + 3 * MIN_SPREAD))


def test_a_threshold_beyond_floating_point_is_infinite():
    """A user switches clipping off by a large clip_z."""
    level = learned([1.5] * 200)
    assert level.threshold(1e9) == level.threshold(math.inf) == math.inf


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_a_lasting_shift_of_the_norm_is_followed(shift):
    """Within 300 updates after ten standard deviations."""
    rng = np.random.default_rng(5)
    log_norms = np.concatenate([rng.normal(0, 0.3, 500), rng.normal(shift, 0.3, 300)])
    assert learned(log_norms).level == pytest.approx(shift, abs=0.3)
