"""What an update costs in time, and what a micro-batch: seconds = a * updates + b * micro-batches.

One window length tells only a + b K, so it takes windows of different lengths to know a from b. The
fit is Theil's and Sen's, each pair of points weighted by its distance (Jaeckel 1972, Scholz 1978):
the median over pairs, which an evaluation or a stall between two decisions does not move.
"""

import math
import statistics
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

POINTS = 32  # decisions: so fast are the costs followed
ENOUGH = 3  # points on either side
APART = math.sqrt(2)  # between the two sides' lengths
Z = 2.5  # of the bounds
STALL = 0.25  # of a window's time


@dataclass(frozen=True, slots=True)
class Costs:
    """The time of windows.

    Attributes:
        per_update: a, seconds for each update whatever its length.
        per_micro_batch: b, seconds for each micro-batch on each rank.
        low: the lower bound of b.
        high: its upper bound.
    """

    per_update: float
    per_micro_batch: float
    low: float
    high: float

    def seconds(self, steps: float) -> float:
        """The time of a window of so many micro-batches.

        Example:
            >>> Costs(4.0, 1.0, 1.0, 1.0).seconds(8)
            12.0
        """
        return self.per_update + self.per_micro_batch * steps

    def price(self, steps: float) -> tuple[float, float]:
        """What an update costs, in micro-batches: at least, and at most.

        The time of windows of so many is taken as known: what a micro-batch does not take of it, by
        the bounds of its time, is the update's.

        Example:
            >>> Costs(4.0, 1.0, 0.5, 2.0).price(2)
            (1.0, 10.0)
        """
        now = self.seconds(steps)
        least, most = (
            max(now / max(slope, sys.float_info.epsilon * now) - steps, 0.0)
            for slope in (self.high, self.low)
        )
        return least, most


def speed_up(price: float, steps: int, to: int) -> float:
    """Micro-batches a second in windows of another length, over those in windows of `steps`.

    Args:
        price: of an update, in micro-batches.
        steps: the length now.
        to: the other length.

    Example:
        >>> speed_up(4.0, steps=2, to=4)
        1.5
    """
    return (1 + price / steps) / (1 + price / to)


def timed_steps(low: int, steps: int, high: int) -> int | None:
    """Another length that tells an update's time from a micro-batch's; None if none is allowed.

    Args:
        low: the shortest window that is allowed.
        steps: the length now.
        high: the longest window that is allowed.

    Example:
        >>> timed_steps(1, 4, 6), timed_steps(1, 1, 32)
        (6, 2)
    """
    larger = min(2 * steps, high)
    if larger >= APART * steps:
        return larger
    smaller = max(steps // 2, low)
    return smaller if steps >= APART * smaller else None


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of the windows between decisions, as far as it is remembered.

    A decision's time is known when it has been taken, and told to the next.

    Attributes:
        steps: micro-batches for each update between two decisions, the latest last; 0 for none.
        seconds: seconds for each update there; likewise.
        updates: windows since the last decision.
        micro_batches: micro-batches in them on each rank.
        last_updates: windows between the last decision and the one before.
        last_micro_batches: micro-batches in them.
    """

    steps: tuple[float, ...] = (0.0,) * POINTS
    seconds: tuple[float, ...] = (0.0,) * POINTS
    updates: int = 0
    micro_batches: int = 0
    last_updates: int = 0
    last_micro_batches: int = 0

    def count(self, micro_batches: int) -> "Timing":
        """Take in a window of so many micro-batches."""
        return replace(
            self, updates=self.updates + 1, micro_batches=self.micro_batches + micro_batches
        )

    def decided(self, seconds: float | None) -> "Timing":
        """Take in a decision.

        Args:
            seconds: the time between the two decisions before it; None if it was not measured.
        """
        steps, times = self.steps, self.seconds
        if seconds and seconds > 0 and self.last_updates:
            steps = (*steps[1:], self.last_micro_batches / self.last_updates)
            times = (*times[1:], seconds / self.last_updates)
        return Timing(
            steps, times, last_updates=self.updates, last_micro_batches=self.micro_batches
        )

    def probes(self, length: int) -> int:
        """How many points are of clearly other lengths than this."""
        return sum(not 1 / APART < x / length < APART for x in self.steps if x)

    @property
    def costs(self) -> Costs | None:
        """The fit; None while one length alone is known."""
        points = [(x, y) for x, y in zip(self.steps, self.seconds, strict=True) if x]
        lengths = sorted(x for x, _ in points)
        if len(points) < 2 * ENOUGH or lengths[-ENOUGH] < APART * lengths[ENOUGH - 1]:
            return None
        slope = min(max(_slope(points), 0.0), statistics.median(y / x for x, y in points))
        per_update = max(statistics.median(y - slope * x for x, y in points), 0.0)
        fit = Costs(per_update, slope, slope, slope)
        error = Z * _error(fit, points, math.sqrt(lengths[ENOUGH - 1] * lengths[-ENOUGH]))
        return replace(fit, low=max(slope - error, 0.0), high=slope + error)


def _error(fit: Costs, points: list[tuple[float, float]], middle: float) -> float:
    """The deviation of the slope: that of the difference between short and long windows.

    The side of few points decides it; stalls among them count, each by no more than `STALL`.
    """
    variance = 0.0
    sides = [p for p in points if p[0] < middle], [p for p in points if p[0] >= middle]
    for side in sides:
        off = [min(abs(y - fit.seconds(x)), STALL * fit.seconds(x)) for x, y in side]
        deviation = math.sqrt(math.pi / 2) * statistics.fmean(off)
        variance += deviation**2 / (len(side) - 1)
    short, long = (statistics.fmean(x for x, _ in side) for side in sides)
    return math.sqrt(variance) / (long - short)


def _slope(points: list[tuple[float, float]]) -> float:
    """The median of the slopes between points, weighted by their distance along x.

    Some lie apart along x.
    """
    pairs = sorted(
        ((y - v) / (x - u), abs(x - u)) for (x, y), (u, v) in combinations(points, 2) if x != u
    )
    passed = list(accumulate(weight for _, weight in pairs))
    return pairs[bisect_left(passed, passed[-1] / 2)][0]
