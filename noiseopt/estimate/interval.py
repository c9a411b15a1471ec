"""Confidence bounds for a ratio of two averages, a / b, when b may not be distinguishable from 0.

The two-sided interval is Fieller's: all rho with (a - rho b)^2 <= z^2 Var(a - rho b). Where b is
not significantly positive its upper end is infinite, which is the honest answer. The one-sided
bounds move numerator and denominator against each other; the lower one always exists. A negative
mean counts as 0, below which the truth cannot be: this only widens the set, keeps every bound
monotone in the confidence, and keeps the lower bound from running off where b < 0.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class RatioBounds:
    """Bounds of a non-negative ratio at one confidence level.

    Attributes:
        interval: the two-sided Fieller interval; its upper end may be infinite.
        lower: the one-sided lower bound, for acting on "at least".
        upper: the one-sided upper bound, for acting on "at most"; may be infinite.
    """

    interval: tuple[float, float]
    lower: float
    upper: float


def ratio_bounds(
    a: float, b: float, var_a: float, var_b: float, cov_ab: float, confidence: float = 0.95
) -> RatioBounds:
    """Bound a / b, given the means a and b and the (co)variances of these means.

    Example:
        >>> bounds = ratio_bounds(10.0, 2.0, var_a=0.01, var_b=0.01, cov_ab=0.0)
        >>> [round(x, 2) for x in bounds.interval]
        [4.54, 5.55]
        >>> ratio_bounds(10.0, 0.1, var_a=0.01, var_b=0.01, cov_ab=0.0).interval[1]
        inf
    """
    a, b = max(a, 0.0), max(b, 0.0)
    one_sided = NormalDist().inv_cdf(confidence)
    margin_a, margin_b = one_sided * math.sqrt(var_a), one_sided * math.sqrt(var_b)
    top, bottom = max(a - margin_a, 0.0), b + margin_b
    lower = top / bottom if bottom > 0 else 0.0
    upper = (a + margin_a) / (b - margin_b) if b > margin_b else math.inf
    interval = _fieller(a, b, var_a, var_b, cov_ab, NormalDist().inv_cdf((1 + confidence) / 2))
    return RatioBounds(interval, lower, upper)


def _fieller(
    a: float, b: float, var_a: float, var_b: float, cov_ab: float, z: float
) -> tuple[float, float]:
    """The part of Fieller's set that is not negative, for a and b that are not."""
    quadratic = b * b - z * z * var_b
    half_linear = a * b - z * z * cov_ab
    constant = a * a - z * z * var_a
    discriminant = half_linear * half_linear - quadratic * constant
    if quadratic > 0:
        root = math.sqrt(max(discriminant, 0.0))
        high = max((half_linear + root) / quadratic, 0.0)
        return min(_lower_root(half_linear, constant, root), high), high
    if constant <= 0 or discriminant <= 0:
        return 0.0, math.inf
    return _lower_root(half_linear, constant, math.sqrt(discriminant)), math.inf


def _lower_root(half_linear: float, constant: float, root: float) -> float:
    """The lower root in the form that does not cancel where the quadratic term vanishes."""
    divisor = half_linear + root
    return max(constant / divisor, 0.0) if divisor > 0 else 0.0


def noise_fraction(scale: float, batch: float) -> float:
    """The share of |g|^2 that is noise at a batch: f = r / (1 + r) with r = scale / batch.

    Example:
        >>> noise_fraction(30.0, 10.0)
        0.75
    """
    return 1.0 if math.isinf(scale) else scale / (scale + batch)
