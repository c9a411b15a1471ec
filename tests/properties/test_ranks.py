"""Ranks are only another way to count: of micro-batches, and of windows."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.capture import Measured, as_tensor, read_rows
from noiseopt.capture.row import _device_row, _host_row
from noiseopt.control import Controller, NoiseConfig, Window, sqrt_gain
from noiseopt.estimate import WindowNorms

GROUPS = 2
norm = st.floats(1e-6, 1e6)


@st.composite
def micro_batches(draw):
    """The norms, samples and weight of each, some of them left out, and how they are dealt out."""
    number = draw(st.integers(1, 12))
    ranks = draw(st.integers(1, 4))
    return (
        torch.tensor([[draw(norm) for _ in range(GROUPS)] for _ in range(number)]).double(),
        torch.tensor([draw(st.sampled_from([1.0, 4.0, 7.0])) for _ in range(number)]).double(),
        torch.tensor([draw(st.sampled_from([0.0, 1.0, 2.5])) for _ in range(number)]).double(),
        [draw(st.integers(0, ranks - 1)) for _ in range(number)],
        ranks,
    )


def row(small, samples, weights, losses=()):
    return Measured(small, torch.zeros(GROUPS).double(), samples, weights, None).row(losses)


@given(micro_batches())
def test_rows_add_up_over_ranks_to_the_row_of_one_process(drawn):
    """However micro-batches are dealt out, also none to a rank."""
    small, samples, weights, dealt, ranks = drawn
    (whole,) = read_rows([row(small, samples, weights)], 1)
    parts = []
    for rank in range(ranks):
        mine = torch.tensor([to == rank for to in dealt], dtype=torch.bool)
        parts.append(row(small[mine], samples[mine], weights[mine]))
    (summed,) = read_rows([sum(map(as_tensor, parts))], ranks)
    assert (summed.norms is None) == (whole.norms is None)
    if whole.norms is not None:
        assert summed.norms.count == whole.norms.count
        assert summed.norms.samples == pytest.approx(whole.norms.samples)
        assert summed.norms.small_sq == pytest.approx(whole.norms.small_sq)
        assert summed.norms.small_batch == pytest.approx(whole.norms.small_batch)
        assert summed.norms.big_batch == pytest.approx(whole.norms.big_batch)
    assert summed.micro_batches == max(round(len(small) / ranks), 1)
    assert bool(summed.skipped) == bool((weights == 0).any())


@given(micro_batches())
def test_a_row_of_plain_numbers_is_the_one_made_on_a_device(drawn):
    small, samples, weights, *_ = drawn
    columns = small, torch.ones(GROUPS).double(), samples, weights
    losses = [torch.tensor(0.5), torch.tensor(2.0)]
    found = as_tensor(_host_row(*columns, losses))
    torch.testing.assert_close(found, _device_row(*columns, losses), rtol=1e-14, atol=0)


def test_a_window_that_was_not_applied_used_nothing():
    found = row(torch.ones(2, GROUPS).double(), torch.ones(2).double(), torch.ones(2).double())
    found[-2] = 0.0
    (window,) = read_rows([found], 1)
    assert window == Window(None, 2, skipped=2, applied=False)


def learned(ranks, steps, windows=80):
    """A controller that has seen windows of so many micro-batches on each of so many ranks."""
    config = NoiseConfig(accumulation_steps=steps, samples_per_micro_batch=4.0, adapt_beta2=True)
    count = ranks * steps
    norms = WindowNorms((9.0,), (4.0 + 5.0 / count,), 4.0, 4.0 * count, count, 4.0 * count)
    controller = Controller.create(config, sqrt_gain)
    for _ in range(windows):
        controller = controller.learn(Window(norms, steps, ranks=ranks, loss_sum=1, loss_count=1))
    return controller.decide(1e-3)[0]


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_another_number_of_ranks_keeps_batch_rates_and_estimate(before, after, steps):
    """Exactly, where the same batch can be made of whole windows; otherwise as near as can be."""
    controller = learned(before, steps)
    moved = controller.on_ranks(after)
    assert moved.state.estimator == controller.state.estimator
    kept, now = controller.state.accumulation_steps, moved.state.accumulation_steps
    batch, nearest = controller.batch(kept), moved.batch(now)
    assert now == max(round(kept * before / after), 1)
    assert nearest == pytest.approx(4.0 * after * now)
    if kept * before % after == 0:
        assert nearest == pytest.approx(batch)
        assert moved.rates(now) == controller.rates(kept)
    assert moved.batch(moved.state.reference_steps) == pytest.approx(4.0 * before * steps)
    assert moved.on_ranks(after) == moved


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from([0.5, 1, 2, 4, 16]))
def test_micro_batches_of_another_size_keep_batch_rates_and_estimate(steps, ranks, samples):
    controller = learned(2, steps)
    config = replace(controller.config, samples_per_micro_batch=samples)
    moved = replace(controller, config=config).on_ranks(ranks)
    assert moved.state.estimator == controller.state.estimator
    kept, now = controller.state.accumulation_steps, moved.state.accumulation_steps
    whole = kept * 2 * 4 / (ranks * samples)
    assert now == min(max(round(whole), 1), config.max_accumulation_steps)
    assert moved.batch(now) == pytest.approx(ranks * samples * now)
    if whole == now:
        assert moved.batch(now) == pytest.approx(controller.batch(kept))
        assert moved.rates(now) == controller.rates(kept)
    assert moved.on_ranks(ranks) == moved


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_moving_there_and_back_changes_nothing(before, after):
    """Unless the window had to be rounded."""
    controller = learned(before, 4)
    back = controller.on_ranks(after).on_ranks(before)
    state = back.state
    assert replace(state, gradients_per_step=0) == replace(controller.state, gradients_per_step=0)


def test_a_larger_batch_that_more_ranks_force_is_scaled_for():
    """One micro-batch on each of two ranks becomes one on each of eight: four times the batch."""
    moved = learned(2, 1).on_ranks(8)
    rates = moved.rates(moved.state.accumulation_steps)
    assert moved.state.accumulation_steps == 1
    assert rates.beta2 == pytest.approx(4.0)
    assert 1 < rates.lr <= math.sqrt(4)


def test_a_recorded_change_of_ranks_is_decided_again_alike():
    """Windows carry the number of ranks, so a replay moves where the run did."""
    run = learned(2, 2)
    moved = run.on_ranks(1)
    norms = WindowNorms((9.0,), (4.0,), 4.0, 16.0, 4, 16.0)
    window = Window(norms, 4, ranks=1)
    assert run.learn(window) == moved.learn(window)
    assert moved.learn(window).decide(1e-3)[1].ranks == 1


def test_a_pending_verification_reverts_to_the_same_batch():
    controller = learned(2, 4)
    state = controller.state
    pending = replace(state.verification, revert_to=2)
    moved = controller.at(replace(state, verification=pending)).on_ranks(1)
    assert moved.state.verification.revert_to == 4
    assert controller.on_ranks(1).state.verification.revert_to == 0
