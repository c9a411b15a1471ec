"""The controller is a pure function of what it was fed, wherever it is saved and resumed."""

import json
import pickle
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.control import Controller, NoiseConfig, Window, from_numbers, sqrt_gain, to_numbers
from noiseopt.estimate import WindowNorms

GROUPS = 2
CONFIG = NoiseConfig(
    accumulation_steps=2,
    samples_per_micro_batch=4,
    decision_interval=2,
    min_count=3,
    dwell_updates=2,
)
COPIES = {
    "json": lambda numbers: json.loads(json.dumps(numbers)),
    "pickle": lambda numbers: pickle.loads(pickle.dumps(numbers)),
}

squared = st.floats(1e-3, 1e3)


@st.composite
def windows(draw):
    """One window of two groups; now and then alone, skipped, not finite or without a loss."""
    count, samples = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8]))
    small = tuple(draw(squared) for _ in range(GROUPS))
    big = tuple(norm * draw(st.floats(0.1, 1)) for norm in small)
    norms = WindowNorms(small, big, samples, samples * count, count, samples * count)
    kind = draw(st.sampled_from(["good"] * 6 + ["skipped", "infinite", "silent"]))
    if kind == "skipped":
        return Window(None, count, skipped=count, applied=False)
    if kind == "infinite":
        norms = WindowNorms((float("inf"),) * 2, big, samples, samples * count, count, count)
    losses = {} if kind == "silent" else {"loss_sum": count * draw(squared), "loss_count": count}
    return Window(norms, count, clipped=draw(st.booleans()), **losses)


# A run: windows to learn from, and learning rates to decide at.
events = st.lists(
    st.one_of(windows(), windows(), windows(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=30
)


def fresh():
    return Controller.create(CONFIG, sqrt_gain, num_groups=GROUPS)


def follow(controller, run):
    """The controller at the end of the run, and its decisions."""
    decisions = []
    for event in run:
        if isinstance(event, Window):
            controller = controller.learn(event)
        else:
            controller, decision = controller.decide(event)
            decisions.append(decision)
    return controller, decisions


def resumed(controller, copy):
    return fresh().at(from_numbers(fresh().state, copy(to_numbers(controller.state))))


@given(events)
def test_the_same_windows_and_rates_give_the_same_decisions(run):
    assert follow(fresh(), run) == follow(fresh(), run)


@given(events, st.data())
def test_a_run_saved_anywhere_goes_on_as_if_it_had_not_been(run, where):
    cut = where.draw(st.integers(0, len(run)))
    copy = COPIES[where.draw(st.sampled_from(list(COPIES)))]
    whole, decisions = follow(fresh(), run)
    first, before = follow(fresh(), run[:cut])
    second, after = follow(resumed(first, copy), run[cut:])
    assert before + after == decisions
    assert second.state == whole.state


@given(events)
def test_the_saved_state_is_plain_numbers_under_fixed_names(run):
    numbers = to_numbers(follow(fresh(), run)[0].state)
    assert list(numbers) == list(to_numbers(fresh().state))
    assert {type(number) for number in numbers.values()} <= {int, float, bool}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_long_run_resumed_after_every_window_decides_the_same(copy):
    """400 windows with growth, decay and a loss, in which something is changed."""

    def event(index):
        spread = 1 + 0.1 * ((index * 7) % 5)
        norms = WindowNorms((5.0, 4.0 * spread), (2.7, 2.2 * spread), 4.0, 8.0, 2, 8.0)
        return Window(norms, 2, loss_sum=6.0 + 0.01 * (index % 3), loss_count=2)

    run = [
        step
        for index in range(400)
        for step in ([event(index)] if index % 4 else [event(index), 1.0 if index < 200 else 0.5])
    ]
    whole, decisions = follow(fresh(), run)
    assert {decision.action for decision in decisions} > {"hold"}

    def one(state, step):
        controller, found = state
        controller, new = follow(resumed(controller, copy), [step])
        return controller, found + new

    controller, found = reduce(one, run, (fresh(), []))
    assert found == decisions
    assert controller.state == whole.state
