"""Bounds of a ratio at their edges; the general case is in the property tests."""

import math

import pytest

from noiseopt.estimate import noise_fraction, ratio_bounds


def test_without_uncertainty_all_bounds_are_the_ratio():
    bounds = ratio_bounds(6.0, 2.0, 0.0, 0.0, 0.0)
    assert bounds.interval == pytest.approx((3.0, 3.0))
    assert (bounds.lower, bounds.upper) == (3.0, 3.0)


def test_a_known_denominator_gives_the_normal_interval():
    bounds = ratio_bounds(10.0, 2.0, var_a=1.0, var_b=0.0, cov_ab=0.0)
    assert bounds.interval == pytest.approx(((10 - 1.959964) / 2, (10 + 1.959964) / 2))
    assert (bounds.lower, bounds.upper) == pytest.approx(((10 - 1.644854) / 2, (10 + 1.644854) / 2))


def test_a_denominator_that_may_be_zero_has_no_upper_bound():
    bounds = ratio_bounds(10.0, 1.0, var_a=0.01, var_b=1.0, cov_ab=0.0)
    assert (bounds.interval[1], bounds.upper) == (math.inf, math.inf)
    assert 0 < bounds.interval[0] < 10


@pytest.mark.parametrize("b", [0.0, -1.0, -10.0])
def test_without_a_positive_denominator_every_upper_bound_is_infinite(b):
    bounds = ratio_bounds(10.0, b, var_a=1.0, var_b=1.0, cov_ab=0.0)
    assert (bounds.interval[1], bounds.upper) == (math.inf, math.inf)
    assert 0 <= bounds.lower < math.inf


def test_a_negative_mean_counts_as_zero():
    """Else the lower bound would grow without limit as b + z sd(b) falls to 0."""
    uncertain = {"var_a": 1.0, "var_b": 0.04, "cov_ab": 0.1}
    assert ratio_bounds(-9.0, 2.0, **uncertain) == ratio_bounds(0.0, 2.0, **uncertain)
    assert ratio_bounds(9.0, -2.0, **uncertain) == ratio_bounds(9.0, 0.0, **uncertain)
    assert ratio_bounds(9.0, -2.0, **uncertain).lower == pytest.approx(
        (9 - 1.645) / 0.329, rel=1e-3
    )


def test_the_lower_end_is_exact_where_the_quadratic_term_all_but_vanishes():
    """b^2 = z^2 Var(b) but for rounding: the end is constant / (2 half_linear)."""
    z = 1.959963984540054
    low, _ = ratio_bounds(1.0, 1.0, 0.0, (1 + 1e-15) / z**2, 0.0).interval
    assert low == pytest.approx(0.5, rel=1e-6)


def test_the_noise_fraction_runs_from_none_to_all():
    fractions = [noise_fraction(scale, 8.0) for scale in (0.0, 2.0, 8.0, 24.0, math.inf)]
    assert fractions == [0.0, 0.2, 0.5, 0.75, 1.0]
