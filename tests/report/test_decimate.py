"""What is left of a long curve: real points, in order, with every extreme."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from noiseopt.report.decimate import evenly, keep

curves = arrays(float, st.integers(0, 300), elements=st.floats(allow_nan=True, width=32))
limits = st.integers(4, 60)


def buckets(count, limit):
    """Equally many points to each: two of each bucket are kept, and two ends."""
    edges = np.linspace(0, count, (limit - 2) // 2 + 1).astype(int)
    return list(pairwise(edges))


@given(curves, limits)
def test_points_are_the_curves_own_in_their_order_and_few(values, limit):
    kept = keep(values, limit)
    assert len(kept) <= max(limit, 0)
    assert all(before < after for before, after in pairwise(kept))
    assert all(0 <= index < len(values) for index in kept)


@given(curves, limits)
def test_both_ends_are_kept(values, limit):
    kept = keep(values, limit)
    assert (kept[0], kept[-1]) == (0, len(values) - 1) if len(values) else not len(kept)


@given(curves, limits)
def test_every_bucket_keeps_its_extremes(values, limit):
    kept = values[keep(values, limit)] if len(values) <= limit else None
    if kept is not None:
        assert np.array_equal(kept, values, equal_nan=True)
        return
    indices = keep(values, limit)
    for start, stop in buckets(len(values), limit):
        bucket, drawn = values[start:stop], indices[(indices >= start) & (indices < stop)]
        if np.isnan(bucket).all():
            assert len(drawn)  # a gap stays a gap
        else:
            assert np.nanmin(values[drawn]) == np.nanmin(bucket)
            assert np.nanmax(values[drawn]) == np.nanmax(bucket)


@given(curves.filter(len), st.integers(4, 20), st.integers(20, 40))
def test_more_points_show_the_same_range(values, few, many):
    def ends(limit):
        drawn = values[keep(values, limit)]
        known = drawn[~np.isnan(drawn)]
        return (known.min(), known.max()) if len(known) else None

    assert ends(few) == ends(many) == ends(len(values) + 4)


def test_a_limit_that_leaves_no_bucket_is_refused():
    with pytest.raises(ValueError, match="limit is 3"):
        keep(np.zeros(10), 3)


@given(st.integers(0, 1000), st.integers(2, 50))
def test_evenly_spread_things_have_both_ends_and_like_distances(count, limit):
    chosen = evenly(count, limit)
    assert len(chosen) == min(count, limit)
    if count:
        assert (chosen[0], chosen[-1]) == (0, count - 1)
        steps = np.diff(chosen)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
