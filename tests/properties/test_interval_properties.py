"""Fieller's interval against a search over its definition, and the order among all bounds."""

import math
from statistics import NormalDist

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.estimate import noise_fraction, ratio_bounds

means = st.floats(-50, 50).filter(lambda x: x == 0 or abs(x) > 1e-3)
deviations = st.floats(1e-3, 20)
correlations = st.floats(-0.99, 0.99)
levels = st.floats(0.51, 0.999)
inputs = st.tuples(means, means, deviations, deviations, correlations, levels)
GRID = np.concatenate([[0.0], np.logspace(-9, 9, 20_001)])


def bounds_of(a, b, sd_a, sd_b, correlation, confidence):
    return ratio_bounds(a, b, sd_a**2, sd_b**2, correlation * sd_a * sd_b, confidence)


def gap(rho, a, b, sd_a, sd_b, correlation, confidence):
    """(a - rho b)^2 - z^2 Var(a - rho b); not positive in Fieller's set."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    variance = sd_a**2 - 2 * rho * correlation * sd_a * sd_b + (rho * sd_b) ** 2
    return (a - rho * b) ** 2 - z * z * variance


@given(inputs)
def test_no_member_of_the_set_is_outside_the_interval(given_values):
    """Whatever the signs: the interval covers every rho >= 0 in the set, the open end included."""
    low, high = bounds_of(*given_values).interval
    members = GRID[gap(GRID, *given_values) <= 0]
    assert low >= 0
    assert not (members < low * (1 - 1e-7)).any()
    assert not (members > high * (1 + 1e-7)).any()


@given(inputs.filter(lambda values: values[0] >= 0 and values[1] > 0))
def test_where_neither_mean_is_negative_the_interval_is_no_larger_than_the_set(given_values):
    """Each end is 0, infinite with members beyond any limit, or where membership changes."""
    low, high = bounds_of(*given_values).interval
    a, b, sd_a, sd_b, correlation, confidence = given_values
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for end in (low, high):
        if 0 < end < 1e9:
            variance = sd_a**2 - 2 * end * correlation * sd_a * sd_b + (end * sd_b) ** 2
            edge = z * z * variance
            assert abs(gap(end, *given_values)) <= 1e-6 * (edge + (abs(a) + end * abs(b)) ** 2)
    if math.isinf(high):
        assert b * b <= z * z * sd_b**2  # not significantly positive


@given(inputs, levels)
def test_more_confidence_widens_every_bound(given_values, other):
    *values, one = given_values
    less, more = sorted((one, other))
    narrow, wide = bounds_of(*values, less), bounds_of(*values, more)
    assert wide.lower <= narrow.lower
    assert wide.upper >= narrow.upper
    assert wide.interval[0] <= narrow.interval[0] * (1 + 1e-7)
    assert wide.interval[1] >= narrow.interval[1] * (1 - 1e-7)


@given(inputs)
def test_no_lower_bound_exceeds_its_upper_bound(given_values):
    bounds = bounds_of(*given_values)
    assert 0 <= bounds.lower <= bounds.upper
    assert 0 <= bounds.interval[0] <= bounds.interval[1]
    assert bounds.lower < math.inf


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.floats(1e-6, 1e9))
def test_the_noise_fraction_rises_with_the_scale_and_falls_with_the_batch(one, other, batch):
    less, more = sorted((one, other))
    assert 0 <= noise_fraction(less, batch) <= noise_fraction(more, batch) <= 1
    assert noise_fraction(less, 2 * batch) <= noise_fraction(less, batch)
    assert noise_fraction(math.inf, batch) == 1
