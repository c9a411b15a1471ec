"""Where the objective is time: the window of the most progress in a second."""

import math
from dataclasses import replace

import numpy as np
import pytest

from noiseopt.control import (
    Controller,
    ControllerState,
    NoiseConfig,
    from_numbers,
    metrics,
    sqrt_gain,
    to_numbers,
)
from noiseopt.control.costs import Costs, Timing
from noiseopt.control.goodput import Pace, gain, pace
from noiseopt.control.proposal import LEAST_GAIN, propose
from tests.unit.control.test_proposal import noise, state

CONFIG = NoiseConfig(objective="time", accumulation_steps=4, max_accumulation_steps=64)
EXACT = Costs(4.0, 1.0, 1.0, 1.0)
NEAR = {"decision_interval": 10, "max_accumulation_steps": 64, "samples_per_micro_batch": 8}


def timing(costs=EXACT, lengths=(1, 2) * 4):
    steps = tuple(map(float, lengths))
    empty = (0.0,) * (32 - len(steps))
    return Timing((*empty, *steps), (*empty, *map(costs.seconds, steps)))


def proposed(given_noise, config=CONFIG, costs=EXACT, **changes):
    given = state(config, timing=timing(costs), **changes)
    return propose(config, given, given_noise, pace(config, given, given_noise))


def exact(scale, steps=4):
    return noise(steps, lower=scale, upper=scale)


def test_the_gain_is_that_of_the_closed_form():
    """From 4 to 8 micro-batches of 8 samples with a noise scale of 100."""
    found = gain(EXACT, exact(100.0), 1.0, 4, 8)
    assert found == pytest.approx((8 / 12) / (4 / 8) * (100 + 32) / (100 + 64))
    assert gain(EXACT, exact(math.inf), 1.0, 4, 8) == pytest.approx((8 / 12) / (4 / 8))


@pytest.mark.parametrize("scale", [30.0, 200.0, 1000.0, 5000.0])
@pytest.mark.parametrize("per_update", [1.0, 4.0, 16.0])
def test_steps_lead_to_the_optimum(scale, per_update):
    """K* = sqrt(a B_noise / (b b_mb)), from below and from above, as far as it is worth it."""

    def goodput(length):
        return length / (per_update + length) / (scale + 8 * length)

    costs = Costs(per_update, 1.0, 1.0, 1.0)
    best = max(math.sqrt(per_update * scale / 8), 1)
    config = replace(CONFIG, max_accumulation_steps=1024)
    for start in (1, 512):
        steps = start
        for _ in range(20):
            steps = proposed(exact(scale, steps), config, costs, accumulation_steps=steps).steps
        assert goodput(steps) > 0.9 * goodput(best)


@pytest.mark.parametrize("unit", [1e-3, 60.0])
def test_the_unit_of_time_does_not_matter(unit):
    scaled = Costs(4.0 * unit, unit, unit, unit)
    for scale in (10.0, 100.0, 1000.0):
        one, other = proposed(exact(scale)), proposed(exact(scale), costs=scaled)
        assert (one.action, one.steps) == (other.action, other.steps)
        assert gain(EXACT, exact(scale), 1.0, 4, 8) == pytest.approx(
            gain(scaled, exact(scale), 1.0, 4, 8)
        )


def test_a_change_takes_more_than_a_little():
    """At the geometric mean of the two windows nothing is gained; a little away is not enough."""
    scale = 4 * 8 * 8 / 4  # where K*^2 = 4 * 8
    assert gain(EXACT, exact(scale), 1.0, 4, 8) == pytest.approx(1.0)
    small = proposed(exact(1.1 * scale))
    assert 1 < gain(EXACT, exact(1.1 * scale), 1.0, 4, 8) < LEAST_GAIN
    assert (small.action, small.steps) == ("hold", 4)
    assert proposed(exact(2 * scale)).action == "grow"


def test_bounds_of_the_noise_and_caution_speak_against_change():
    wide = noise(4, lower=10.0, upper=1e4)
    assert proposed(wide).action == "hold"
    assert proposed(exact(1e4)).action == "grow"
    assert proposed(exact(10.0)).action == "shrink"
    assert proposed(exact(140.0)).action == "grow"
    assert proposed(exact(140.0), caution=0.25).action == "hold"


def test_free_updates_lead_to_the_shortest_windows():
    free = Costs(0.0, 1.0, 1.0, 1.0)
    assert proposed(exact(1e3), costs=free).action == "hold"
    assert proposed(exact(10.0), costs=free).action == "shrink"
    assert proposed(exact(math.inf), costs=free).action == "hold"


def test_costs_that_are_not_known_hold_and_say_so():
    change = propose(CONFIG, state(CONFIG, timing=Timing()), noise())
    assert change.action == "hold"
    assert "costs unknown" in change.reason
    assert "to be timed" in change.reason
    advise = replace(CONFIG, mode="advise")
    assert "no others are made" in propose(advise, state(advise, timing=Timing()), noise()).reason


def test_the_reason_tells_the_numbers():
    reason = proposed(exact(1e4)).reason
    assert "an update costs 4 s and a micro-batch 1 s" in reason
    assert "windows of 8 have 1.329 times the goodput" in reason


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"previous_lr": 0.9}, "hold"),
        ({"reverts": 3}, "hold"),
        ({"blocked_until": 1.1e5}, "hold"),
        ({"changed_at_samples": 0.96e5}, "hold"),
        ({"changed_at_updates": 951}, "hold"),
        ({"lr": 0.9}, "grow"),
        ({"accumulation_steps": 64}, "hold"),
    ],
    ids=["warm-up", "reverts", "blocked", "dwell-samples", "dwell-updates", "decay", "limit"],
)
def test_what_holds_other_changes_back_holds_these(changes, action):
    steps = changes.get("accumulation_steps", 4)
    assert proposed(exact(1e6, steps), **changes).action == action


def test_the_switches_hold():
    assert proposed(exact(1e4), replace(CONFIG, grow_by_noise=False)).action == "hold"
    assert proposed(exact(1e-3), replace(CONFIG, shrink=False)).action == "hold"
    fixed = replace(CONFIG, min_accumulation_steps=4, max_accumulation_steps=4)
    assert "no other window is allowed" in proposed(exact(1e4), fixed).reason


def noisy(steps, rng):
    """An update costs as much as four micro-batches, with a tenth of noise and rare stalls."""
    return (4 + steps) * rng.normal(1, 0.1) + (50 if rng.random() < 0.01 else 0)


@pytest.mark.parametrize(("scale", "best"), [(1000, math.sqrt(500)), (60, math.sqrt(30))])
def test_a_run_finds_the_neighbourhood_of_the_optimum_and_stays(run_of, scale, best):
    config = NoiseConfig(objective="time", **NEAR)
    run = run_of(Controller.create(config, sqrt_gain), lambda seen: scale, costs=noisy)
    run.until(400_000)
    steps = [d.accumulation_steps for d in run.decisions]
    half = len(steps) // 2
    assert all(best / 2.5 < each < 2.5 * best for each in steps[half:])
    assert len(run.changes) <= 8
    final = run.decisions[-1].pace
    assert final.per_update / final.per_micro_batch == pytest.approx(4.0, rel=0.5)


def test_a_link_that_becomes_dear_is_followed(run_of):
    config = NoiseConfig(objective="time", **NEAR)
    run = run_of(
        Controller.create(config, sqrt_gain),
        lambda seen: 200.0,
        costs=lambda steps, rng: (0.05 if run.samples < 1e5 else 16) + steps * rng.normal(1, 0.02),
    )
    run.until(1e5)
    assert run.controller.state.accumulation_steps == 1
    run.until(5e5)
    assert run.controller.state.accumulation_steps >= 8


def test_windows_are_probed_until_costs_are_known_and_rarely_later(run_of):
    config = NoiseConfig(
        objective="time",
        max_accumulation_steps=2,
        grow_by_noise=False,
        samples_per_micro_batch=8,
    )
    run = run_of(Controller.create(config, sqrt_gain), lambda seen: 100.0, costs=noisy)
    run.until(8 * 4000)
    known = [d.pace is not None for d in run.decisions]
    assert not known[0]
    assert known.index(True) <= 12
    assert np.mean(known[known.index(True) :]) > 0.9
    timed = [w.micro_batches == 2 for w in run.windows]
    assert 0.05 < np.mean(timed[len(timed) // 2 :]) < 0.3


@pytest.mark.parametrize(
    ("low", "start", "high", "other"), [(3, 3, 5, 5), (3, 6, 8, 3), (1, 1, 2, 2), (2, 4, 4, 2)]
)
def test_any_length_that_is_far_enough_is_timed(run_of, low, start, high, other):
    config = NoiseConfig(
        objective="time",
        min_accumulation_steps=low,
        accumulation_steps=start,
        max_accumulation_steps=high,
        samples_per_micro_batch=8,
    )
    run = run_of(Controller.create(config, sqrt_gain), lambda seen: 100.0, costs=noisy)
    run.until(8 * start * 200)
    assert other in {w.micro_batches for w in run.windows}
    assert run.decisions[-1].pace is not None


def test_a_range_that_is_too_narrow_to_be_timed_says_so(run_of):
    config = NoiseConfig(
        objective="time",
        min_accumulation_steps=3,
        accumulation_steps=3,
        max_accumulation_steps=4,
        samples_per_micro_batch=8,
    )
    run = run_of(Controller.create(config, sqrt_gain), lambda seen: 100.0, costs=noisy)
    run.until(8 * 3 * 200)
    assert {w.micro_batches for w in run.windows} == {3}
    assert "max_accumulation_steps >= 6" in run.decisions[-1].reason


def test_nothing_is_probed_for_other_objectives_or_without_leave():
    def lengths(**settings):
        controller = Controller.create(NoiseConfig(**settings), sqrt_gain).on_ranks(2)
        return {controller.window_steps(number) for number in range(64)}

    assert lengths() == {1}
    assert lengths(objective="time") == {1, 2}
    assert lengths(objective="time", mode="advise") == {1}
    assert lengths(objective="time", max_accumulation_steps=1) == {1}
    assert lengths(objective="time", accumulation_steps=4, max_accumulation_steps=4) == {4, 2}


def test_in_decay_only_what_the_rate_fell_by_takes_the_rule_of_pure_noise():
    config = NoiseConfig(objective="time", max_lr_factor=4.0)
    given = state(config, lr=0.5, accumulation_steps=8, reference_steps=1.0)
    controller = Controller(config, sqrt_gain, replace(given, noise_ratio=0.0))
    assert controller.rates(8).lr == pytest.approx(math.sqrt(2))
    fallen = controller.at(replace(controller.state, lr=0.01))
    assert fallen.rates(8).lr == pytest.approx(math.sqrt(8))
    flat = controller.at(replace(controller.state, lr=1.0))
    assert flat.rates(8).lr == 1.0


def test_the_state_of_time_is_saved_and_other_states_load():
    config, plain = NoiseConfig(objective="time"), NoiseConfig()
    timed = replace(ControllerState.initial(config, 1), timing=timing())
    untimed = ControllerState.initial(plain, 1)
    fresh = ControllerState.initial(config, 1)
    assert from_numbers(fresh, to_numbers(timed)) == timed
    assert from_numbers(fresh, to_numbers(untimed)) == fresh
    assert from_numbers(untimed, to_numbers(timed)) == untimed
    assert not any(name.startswith("timing") for name in to_numbers(untimed))
    assert untimed.within(config).timing == Timing()
    assert timed.within(plain).timing is None
    assert timed.within(config) == timed


def test_another_number_of_ranks_is_timed_anew():
    config = NoiseConfig(objective="time")
    controller = Controller.create(config, sqrt_gain).on_ranks(2)
    controller = controller.at(replace(controller.state, timing=timing()))
    assert controller.on_ranks(2).state.timing == timing()
    assert controller.on_ranks(4).state.timing == Timing()


def test_the_costs_are_among_the_metrics(run_of):
    config = NoiseConfig(objective="time", **NEAR)
    run = run_of(Controller.create(config, sqrt_gain), lambda seen: 1000.0, costs=noisy)
    run.until(20_000)
    found = metrics(run.decisions[-1])
    assert found["decide/seconds_per_update"] == run.decisions[-1].pace.per_update
    assert found["decide/seconds_per_micro_batch"] == run.decisions[-1].pace.per_micro_batch
    assert found["decide/goodput_gain"] == run.decisions[-1].pace.gain
    unknown = replace(run.decisions[-1], pace=Pace(1.0, 1.0, 1, None))
    assert "decide/goodput_gain" not in metrics(unknown)
    assert not any("seconds" in name for name in metrics(run.decisions[0]))
