"""Whatever was skipped, the numbers of the moments become those of the updates that were made."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.control import Rates
from noiseopt.optim.hyper import numbers_after, scaled_betas
from noiseopt.optim.unsure import UnsureUpdates

LEAST_BETA2 = 0.5
EXPONENTS = st.sampled_from([1.0, 2.0, 0.5])
UPDATES = st.lists(
    st.tuples(
        st.sampled_from([True, False, None]),  # skipped, made, and made as the host knows
        st.builds(Rates, beta1=EXPONENTS, beta2=EXPONENTS),
        st.tuples(st.floats(0.5, 0.99), st.floats(0.9, 0.999)),
    ),
    max_size=12,
)


@given(updates=UPDATES, before=st.integers(0, 5), settles_at=st.integers(0, 12))
def test_only_what_was_made_counts(updates, before, settles_at):
    found, expected = numbers_after(before), numbers_after(before)
    other: dict[str, float] = {}  # a group without moments
    unsure = UnsureUpdates(LEAST_BETA2)
    for index, (skipped, rates, betas) in enumerate(updates):
        if index == settles_at:
            unsure.settle([found, other])
        flag = False if skipped is None else torch.tensor(skipped)
        unsure.add(flag, [found, other], [{"betas": betas}, {}], rates)
        scaled_betas(betas, found, rates, LEAST_BETA2)
        if not skipped:
            scaled_betas(betas, expected, rates, LEAST_BETA2)
    unsure.settle([found, other])
    assert found == pytest.approx(expected)
    assert other == {}
    assert len(unsure) == 0
