"""The running average against explicit weights, and its variance against repeated runs."""

import math

import numpy as np
import pytest

from noiseopt.estimate import Average
from noiseopt.estimate.average import MIN_COUNT_TO_WINSORISE


def averaged(pairs, decays, limit=math.inf):
    average = Average()
    for (trace, signal), decay in zip(pairs, decays, strict=True):
        average = average.update(float(trace), float(signal), float(decay), limit)
    return average


def explicit_weights(decays):
    """w_i = product of all later decays."""
    return np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)


@pytest.fixture
def stream():
    rng = np.random.default_rng(3)
    pairs = rng.standard_normal((60, 2)) @ [[3.0, 1.0], [0.0, 0.5]] + [10.0, 2.0]
    return pairs, rng.uniform(0.9, 1.0, 60)


def test_the_moments_are_those_of_explicit_weights(stream):
    pairs, decays = stream
    average, w = averaged(pairs, decays), explicit_weights(decays)
    mean = w @ pairs / w.sum()
    spread = (w[:, None] * (pairs - mean)).T @ (pairs - mean)
    assert (average.trace, average.signal) == pytest.approx(tuple(mean), rel=1e-12)
    assert average.count == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-12)
    assert average.trace_spread == pytest.approx(spread[0, 0], rel=1e-11)
    assert average.signal_spread == pytest.approx(spread[1, 1], rel=1e-11)
    assert average.cross_spread == pytest.approx(spread[0, 1], rel=1e-11)


def test_without_decay_the_variance_of_the_mean_is_the_textbook_one():
    """s^2 / n of numpy, for a stream that alternates and so has no positive autocorrelation."""
    rng = np.random.default_rng(4)
    pairs = np.where(np.arange(50) % 2, 1, -1)[:, None] * rng.uniform(1, 2, (50, 2))
    variances = averaged(pairs, np.ones(50)).covariance_of_means()
    expected = np.cov(pairs.T) / 50
    found = [[variances[0], variances[2]], [variances[2], variances[1]]]
    assert np.array(found) == pytest.approx(expected, rel=1e-10)


def test_the_lag_products_are_those_of_successive_deviations(stream):
    """Each against the mean at its time, as a loop that keeps the whole stream computes them."""
    pairs, decays = stream
    lag = np.zeros(2)
    for index in range(1, len(pairs)):
        seen = pairs[: index + 1]
        w = explicit_weights(decays[: index + 1])
        off = seen - w @ seen / w.sum()
        lag = decays[index] * lag + off[-1] * off[-2]
    average = averaged(pairs, decays)
    assert (average.trace_lag, average.signal_lag) == pytest.approx(tuple(lag), rel=1e-10)


def test_one_value_has_no_variance():
    with pytest.raises(ValueError, match="two observations"):
        Average().update(1.0, 2.0, 1.0, 5.0).covariance_of_means()


def autoregressive(rng, runs, length, phi):
    """Stationary AR(1) streams of unit variance and mean 0."""
    values = np.empty((runs, length))
    values[:, 0] = rng.standard_normal(runs)
    for step in range(1, length):
        shock = math.sqrt(1 - phi * phi) * rng.standard_normal(runs)
        values[:, step] = phi * values[:, step - 1] + shock
    return values


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_autocorrelation_is_corrected_for(phi):
    """The mean stated variance of the mean is within 25 % of the means' variance over 400 runs.

    At phi = 0.5 an uncorrected variance would be a third of it.
    """
    runs, length, decay = 400, 200, 2 ** (-1 / 32)
    streams = autoregressive(np.random.default_rng(5), runs, length, phi)
    averages = [averaged(zip(s, s, strict=True), [decay] * length) for s in streams]
    means = np.array([average.signal for average in averages])
    stated = np.array([average.covariance_of_means()[1] for average in averages])
    assert stated.mean() == pytest.approx(means.var(), rel=0.25)
    covered = np.mean(means**2 < 1.96**2 * stated)
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / runs) - 0.02 < covered
    if phi:
        uncorrected = np.mean([a.signal_spread / a.weight / a.count for a in averages])
        assert uncorrected < 0.5 * means.var()


def test_the_effective_count_follows_the_autocorrelation():
    """(1 - phi) / (1 + phi) of the count at phi = 0.5, on average within 10 %."""
    streams = autoregressive(np.random.default_rng(6), 100, 300, 0.5)
    averages = [averaged(zip(s, s, strict=True), [1.0] * 300) for s in streams]
    shares = [average.effective_count / average.count for average in averages]
    assert np.mean(shares) == pytest.approx(1 / 3, rel=0.1)


def test_an_outlier_moves_the_mean_by_a_bounded_amount():
    """A value 1000 times the mean counts as one at five standard deviations, in both streams."""
    rng = np.random.default_rng(7)
    pairs = rng.normal([100.0, 10.0], [5.0, 1.0], (50, 2))
    before = averaged(pairs, np.ones(50), limit=5.0)
    sd = pairs.std(0, ddof=1)
    after = before.update(1e5, -1e4, 1.0, 5.0)
    assert after.winsorised == before.winsorised + 1
    assert after.trace - before.trace == pytest.approx(5 * sd[0] / 51, rel=1e-9)
    assert after.signal - before.signal == pytest.approx(-5 * sd[1] / 51, rel=1e-9)
    assert before.update(1e5, -1e4, 1.0, math.inf).trace > 1000


def test_few_values_are_not_winsorised():
    rng = np.random.default_rng(8)
    pairs = rng.standard_normal((MIN_COUNT_TO_WINSORISE - 1, 2))
    assert averaged([*pairs, (1e3, 1e3)], np.ones(MIN_COUNT_TO_WINSORISE), 5.0).winsorised == 0


def test_a_constant_stream_can_still_move():
    """Without a spread there is no outlier: gradients may be zero for the first 100 windows."""
    average = averaged([(0.0, 0.0)] * 100 + [(8.0, 2.0)] * 100, [0.98] * 200, limit=5.0)
    assert (average.trace, average.signal) == pytest.approx((8.0, 2.0), rel=0.2)


def test_a_lasting_shift_is_followed_in_spite_of_winsorising():
    """Only its first three values are pulled in: from then on it is a change, not an outlier."""
    rng = np.random.default_rng(9)
    before, after = rng.normal(1, 0.1, (100, 2)), rng.normal(10, 1, (60, 2))
    decays = [2 ** (-1 / 16)] * 160
    limited = averaged([*before, *after], decays, limit=5.0)
    plain = averaged([*before, *after], decays)
    assert limited.winsorised == 3
    assert limited.trace == pytest.approx(plain.trace, rel=0.05)
