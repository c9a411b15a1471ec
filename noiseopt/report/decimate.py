"""A long curve in few points, its extremes kept: what is left out could not be seen.

The curve is cut into buckets of equally many points; of each bucket its smallest and its largest
value stay, and of the whole curve its ends. Nothing is averaged and no point is invented.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

CURVE_POINTS = 2000  # twice as many as a wide plot has columns of pixels

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def keep(values: Floats, limit: int = CURVE_POINTS) -> Indices:
    """Choose the points of a curve that are drawn.

    Args:
        values: the curve; nan where it has a gap. A bucket of nothing but gaps stays one.
        limit: at most so many are kept; at least 4.

    Returns:
        Their positions, ascending: the first, the last, the smallest and the largest value of each
        bucket; all of them where there are no more than `limit`.

    Example:
        >>> keep(np.array([0.0, 1.0, 9.0, 1.0, 0.0, 1.0, -9.0, 1.0, 0.0]), limit=6).tolist()
        [0, 2, 5, 6, 8]
    """
    if limit < 4:
        raise ValueError(f"limit is {limit}: the ends and two extremes take 4")
    count = len(values)
    if count <= limit:
        return np.arange(count)
    kept = [0, count - 1]
    for start, stop in pairwise(_edges(count, limit)):
        known = np.flatnonzero(~np.isnan(values[start:stop])) + start
        if known.size:
            kept += [known[values[known].argmin()], known[values[known].argmax()]]
        else:
            kept.append(start)
    return np.unique(np.array(kept, dtype=np.intp))


def evenly(count: int, limit: int) -> Indices:
    """Choose at most `limit` of `count` things, evenly spread, both ends among them.

    Example:
        >>> evenly(3, 5).tolist(), evenly(101, 5).tolist()
        ([0, 1, 2], [0, 25, 50, 75, 100])
    """
    if count <= limit:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, limit).round().astype(np.intp))


def _edges(count: int, limit: int) -> list[int]:
    """Where the buckets begin, and the end: two points for each, and two for the ends."""
    buckets = (limit - 2) // 2
    edges: list[int] = np.linspace(0, count, buckets + 1).astype(int).tolist()
    return edges
