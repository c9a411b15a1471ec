"""What no choice of norms, batches or weights may change about a window's noise sample."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.estimate import WindowNorms

norms = st.floats(1e-3, 1e3)
counts = st.integers(1, 64)
micro_batches = st.lists(st.tuples(norms, counts, st.floats(0.1, 10)), min_size=2, max_size=8)


def build(parts, shrink, factor=1.0):
    """A window whose mean's squared norm is the given share of the largest it can be."""
    q, n, w = zip(*parts, strict=True)
    most = (sum(wi * math.sqrt(qi) for qi, wi in zip(q, w, strict=True)) / sum(w)) ** 2
    return WindowNorms.from_micro_batches([factor * x for x in q], factor * shrink * most, n, w)


def scale_of(sample):
    return sample.trace / sample.signal if sample.signal else math.inf


@given(micro_batches, st.floats(0, 1), st.integers(-20, 20))
def test_scaling_all_gradients_scales_both_estimates_and_leaves_the_scale(parts, shrink, power):
    """A loss scale that is a power of two changes nothing, to the last bit."""
    (plain,), (scaled,) = build(parts, shrink).noise(), build(parts, shrink, 4.0**power).noise()
    assert scaled.trace == 4.0**power * plain.trace
    assert scaled.signal == 4.0**power * plain.signal
    assert scale_of(scaled) == scale_of(plain)


@given(micro_batches, st.floats(0, 1), st.randoms(use_true_random=False))
def test_the_order_of_the_micro_batches_does_not_matter(parts, shrink, random):
    shuffled = random.sample(parts, len(parts))
    (one,), (other,) = build(parts, shrink).noise(), build(shuffled, shrink).noise()
    size = max(q for q, _, _ in parts) * max(n for _, n, _ in parts)
    assert other.trace == pytest.approx(one.trace, rel=1e-9, abs=1e-9 * size)
    assert other.signal == pytest.approx(one.signal, rel=1e-9, abs=1e-9 * size)


@given(micro_batches, st.floats(0, 1), st.floats(0, 1))
def test_the_groups_sum_to_the_model(parts, shrink, share):
    """Splitting the coordinates in two leaves the sum of the parts' trace and signal."""
    whole = build(parts, shrink)
    ((small,), (big,)) = whole.small_sq, whole.big_sq
    split = WindowNorms(
        (share * small, (1 - share) * small),
        ((1 - share) * big, share * big),
        whole.small_batch,
        whole.big_batch,
        whole.count,
        whole.samples,
    )
    (total,), both = whole.noise(), split.noise()
    size = (small + big) * whole.big_batch
    assert sum(part.trace for part in both) == pytest.approx(total.trace, abs=1e-6 * size)
    assert sum(part.signal for part in both) == pytest.approx(total.signal, abs=1e-6 * size)


@given(micro_batches, st.floats(0.01, 100))
def test_only_the_proportions_of_the_weights_matter(parts, factor):
    reweighted = [(q, n, factor * w) for q, n, w in parts]
    one, other = build(parts, 0.5), build(reweighted, 0.5)
    assert other.small_batch == pytest.approx(one.small_batch, rel=1e-12)
    assert other.big_batch == pytest.approx(one.big_batch, rel=1e-12)
    assert other.small_sq == pytest.approx(one.small_sq, rel=1e-12)


@given(micro_batches)
def test_the_batches_lie_between_the_smallest_micro_batch_and_the_window(parts):
    window = build(parts, 0.5)
    sizes = [n for _, n, _ in parts]
    assert min(sizes) * (1 - 1e-12) <= window.small_batch < window.big_batch
    assert window.big_batch <= window.samples * (1 + 1e-12) == sum(sizes) * (1 + 1e-12)
