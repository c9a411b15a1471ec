"""What a window keeps is the same in plain numbers as in a device's tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.capture.tally import _DeviceTally, _HostTally

CPU = torch.device("cpu")
weight = st.sampled_from([1.0, 4.0, 7.0])
micro_batches = st.lists(st.tuples(weight, weight, st.booleans()), min_size=1, max_size=6)


def gradients(seed, number):
    """Of two groups, the second of one parameter."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((3, 5), (2,))
    return [
        [[torch.randn(size, generator=generator) for size in group] for group in sizes]
        for _ in range(number)
    ]


def filled(tally, drawn, grads):
    tally.weigh_by(drawn[0][1])
    for (samples, weight, finite), each in zip(drawn, grads, strict=True):
        tally.count(samples, weight, finite)
        tally.add_norms([tally.norms_of(each)])
    return tally


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


@given(micro_batches, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_both_measure_the_same(drawn, sums, of_sum, seed):
    *grads, mean = gradients(seed, len(drawn) + 1)
    host = filled(_HostTally(sums, None), drawn, grads)
    device = filled(_DeviceTally(sums, None, CPU), drawn, grads)
    ours = host.measured(host.unless_empty(host.norms_of(mean)), of_sum)
    theirs = device.measured(device.unless_empty(device.norms_of(mean)), of_sum)
    assert len(ours) == len(theirs) == len(drawn)
    for name in ("small_norms", "big_norms", "samples", "weights"):
        found, expected = (torch.tensor(plain(getattr(each, name))) for each in (ours, theirs))
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert (ours.scale is None) == (theirs.scale is None) == (not of_sum)
    if of_sum and any(finite for *_, finite in drawn):
        assert ours.scale == pytest.approx(plain(theirs.scale))


@given(micro_batches, st.integers(0, 2**16))
def test_the_scale_makes_a_mean_of_what_is_in_the_sum(drawn, seed):
    host = filled(_HostTally(False, None), drawn, gradients(seed, len(drawn)))
    total = sum(weight for _, weight, finite in drawn if finite) / drawn[0][1]
    assert host.scale() == (
        pytest.approx(1 / total) if total else pytest.approx(math.nan, nan_ok=True)
    )


@pytest.mark.parametrize("tally", [_HostTally(False, None), _DeviceTally(False, None, CPU)])
def test_nothing_is_applied_of_a_window_in_which_nothing_was_finite(tally):
    filled(tally, [(1.0, 1.0, False)] * 2, gradients(0, 2))
    big = plain(tally.unless_empty(tally.norms_of([[], []])))
    assert all(map(math.isnan, big))
    assert math.isnan(plain(tally.measured(tally.norms_of([[], []]), big_is_of_sum=True).norm))


@pytest.mark.parametrize("tally", [_HostTally(False, None), _DeviceTally(False, None, CPU)])
def test_a_group_that_is_added_has_had_no_gradient(tally):
    filled(tally, [(1.0, 1.0, True)] * 2, gradients(0, 2))
    tally.add_group()
    measured = tally.measured(tally.norms_of([[], [], []]))
    assert [norms[2] for norms in plain(measured.small_norms)] == [0.0, 0.0]
