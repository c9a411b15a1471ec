"""The state as plain numbers: complete, named, and refused when it does not fit."""

import json
import pickle
from dataclasses import replace

import pytest

from noiseopt.control import (
    Controller,
    ControllerState,
    NoiseConfig,
    from_numbers,
    sqrt_gain,
    to_numbers,
)
from noiseopt.estimate.average import Average


def initial(groups=1, **settings):
    return ControllerState.initial(NoiseConfig(**settings), groups)


def test_the_names_follow_the_nesting():
    state = replace(initial(groups=2), num_updates=7)
    numbers = to_numbers(state)
    assert numbers["num_updates"] == 7
    assert numbers["estimator.average.weight"] == 0.0
    assert numbers["estimator.groups.1.trace"] == 0.0


def test_a_round_trip_restores_values_and_types():
    groups = (Average(trace=1.5, signal=-0.5), Average(trace=3.0, signal=0.25))
    state = initial(groups=2)
    state = replace(state, estimator=replace(state.estimator, groups=groups), num_updates=3)
    numbers = {name: float(value) for name, value in to_numbers(state).items()}
    found = from_numbers(initial(groups=2), numbers)
    assert found == state
    assert list(map(type, to_numbers(found).values())) == list(
        map(type, to_numbers(state).values())
    )


COPIES = {
    "json": lambda x: json.loads(json.dumps(x)),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_the_numbers_survive_json_and_pickle(copy):
    state = replace(initial(), loss_sum=0.1 + 0.2, num_updates=10**15)
    assert from_numbers(initial(), copy(to_numbers(state))) == state


@pytest.mark.parametrize(
    "lost", ["num_updates", "estimator.average.trace", "estimator.groups.1.signal"]
)
def test_a_missing_number_is_refused_by_name(lost):
    numbers = to_numbers(initial(groups=2))
    del numbers[lost]
    with pytest.raises(ValueError, match=f"lacks '{lost}'"):
        from_numbers(initial(groups=2), numbers)


def test_states_from_before_windows_followed_the_rate_back_are_read():
    state = replace(initial(), accumulation_steps=8, kept_steps=8)
    numbers = to_numbers(state)
    del numbers["kept_steps"], numbers["samples_per_micro_batch"]
    assert from_numbers(initial(), numbers) == state


@pytest.mark.parametrize(("ranks", "steps", "kept"), [(1, 8, 4), (2, 4, 2), (16, 1, 1)])
def test_what_stays_of_a_window_moves_to_other_ranks_and_limits_with_it(ranks, steps, kept):
    state = replace(initial(), accumulation_steps=8, kept_steps=4, num_ranks=1)
    moved = Controller(NoiseConfig(), sqrt_gain, state).on_ranks(ranks).state
    assert (moved.accumulation_steps, moved.kept_steps) == (steps, kept)
    limited = state.within(NoiseConfig(max_accumulation_steps=2))
    assert (limited.accumulation_steps, limited.kept_steps) == (2, 2)


@pytest.mark.parametrize(
    ("previous", "now", "peak", "phase"),
    [
        (0.0, 0.1, 0.1, "warm-up"),
        (0.5, 0.6, 1.0, "warm-up"),
        (1.0, 1.0, 1.0, "stable"),
        (1.0, 1.0 - 1e-9, 1.0, "stable"),
        (1.0, 0.9, 1.0, "decay"),
        (0.9, 0.9, 1.0, "decay"),
    ],
)
def test_the_phase_is_read_off_the_learning_rate(previous, now, peak, phase):
    assert replace(initial(), previous_lr=previous, lr=now, peak_lr=peak).phase == phase
