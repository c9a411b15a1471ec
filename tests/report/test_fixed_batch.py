"""What a fixed batch would have cost, against the model that it is taken from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.control import Progress
from noiseopt.report.fixed_batch import cost

positive = st.floats(1e-2, 1e6)
stretches = st.lists(
    st.tuples(st.integers(1, 100), positive, st.one_of(st.floats(0, 1e6), st.just(np.inf))),
    min_size=1,
    max_size=20,
).map(lambda rows: tuple(np.array(column, float) for column in zip(*rows, strict=True)))


def after(num_updates, batches, scales):
    made = Progress()
    for u, b, n in zip(num_updates.tolist(), batches.tolist(), scales.tolist(), strict=True):
        made = made.after(u, u * b, n)
    return made


def updates_needed(fixed, num_updates, batches, scales):
    made = after(num_updates, batches, scales)
    return np.array([made.updates_at(batch) for batch in fixed.tolist()])


def progress(num_updates, batch, scale):
    """What updates achieve, in units of what the exact gradient's would (eq. 2.7)."""
    return num_updates / (1 + scale / batch)


@given(stretches, positive)
def test_a_fixed_batch_makes_the_same_progress_in_every_stretch(run, batch):
    for u, b, n in zip(*run, strict=True):
        (needed,) = updates_needed(np.array([batch]), *(np.array([x]) for x in (u, b, n)))
        if np.isinf(n):  # no signal: all gradients are noise, and only samples count
            assert needed * batch == pytest.approx(u * b)
        else:
            assert progress(needed, batch, n) == pytest.approx(progress(u, b, n))


@given(stretches, positive)
def test_stretches_add_up(run, batch):
    fixed = np.array([batch])
    parts = [updates_needed(fixed, *(np.array([x]) for x in row)) for row in zip(*run, strict=True)]
    assert updates_needed(fixed, *run) == pytest.approx(np.sum(parts, axis=0))


@given(stretches)
def test_curves_are_those_of_the_model(run):
    """As they are summed at once, and stretch by stretch."""
    u, b, n = run
    found = cost(u, u * b, n)
    assert found.updates == pytest.approx(updates_needed(found.batches, u, b, n), rel=1e-6)
    made = after(u, b, n)
    assert (made.updates, made.samples) == pytest.approx((u.sum(), (u * b).sum()))
    for batch, updates in zip(found.batches.tolist(), found.updates.tolist(), strict=True):
        assert made.samples_at(batch) == pytest.approx(updates * batch, rel=1e-6)


@given(stretches)
def test_a_run_with_that_batch_costs_itself(run):
    u, _, n = run
    batches = np.full(len(u), 24.0)
    assert updates_needed(np.array([24.0]), u, batches, n) == pytest.approx([u.sum()])


@given(stretches)
def test_larger_batches_need_fewer_updates_and_more_samples(run):
    fixed = np.geomspace(1e-2, 1e6, 50)
    needed = updates_needed(fixed, *run)
    slack = 1e-9
    assert (np.diff(needed) <= slack * needed[:-1]).all()
    assert (np.diff(needed * fixed) >= -slack * (needed * fixed)[:-1]).all()


def test_time_and_samples_trade_as_the_paper_says():
    """Eq. 2.11: (S/S_min - 1)(E/E_min - 1) = 1, for a noise scale that does not change."""
    fixed = np.geomspace(1, 1e4, 9)
    needed = updates_needed(fixed, np.array([1000.0]), np.array([32.0]), np.array([100.0]))
    least_updates = 1000 / (1 + 100 / 32)
    least_samples = least_updates * 100
    product = (needed / least_updates - 1) * (needed * fixed / least_samples - 1)
    assert product == pytest.approx(np.ones(9))


def test_unknown_noise_is_left_out_and_counted():
    u = np.array([10.0, 20.0, 0.0, 40.0])
    found = cost(u, 8 * u, np.array([np.nan, 50.0, 60.0, np.nan]))
    assert (found.own_updates, found.own_samples, found.unknown_updates) == (20, 160, 50)
    assert found.own_batch == 8
    at_own = np.interp(8, found.batches, found.updates)
    assert at_own == pytest.approx(20, rel=1e-2)
    assert found.batches[0] < 8 / 4
    assert found.batches[-1] > 50 * 4
    assert cost(u, 8 * u, np.full(4, np.nan)) is None
    assert cost(np.empty(0), np.empty(0), np.empty(0)) is None


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e300, np.inf])
def test_extreme_noise_is_computed_without_a_warning(scale):
    found = cost(np.array([10.0]), np.array([80.0]), np.array([scale]))
    assert np.isfinite(found.updates).all()
    assert found.batches[0] < 8 < found.batches[-1]
