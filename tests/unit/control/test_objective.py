"""Where the objective is time: the window of the most progress in a second."""

import math
from dataclasses import replace
from itertools import product

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
from noiseopt.control.proposal import ABOVE, propose
from tests.unit.control.test_proposal import noise, state

CONFIG = NoiseConfig(objective="time", accumulation_steps=4, max_accumulation_steps=64)
EXACT = Costs(4.0, 1.0, 1.0, 1.0)
NEAR = {"decision_interval": 10, "max_accumulation_steps": 64, "samples_per_micro_batch": 8}


def timing(costs=EXACT, lengths=(1, 2) * 4):
    steps = tuple(map(float, lengths))
    empty = (0.0,) * (32 - len(steps))
    return Timing((*empty, *steps), (*empty, *map(costs.seconds, steps)))


def proposed(given_noise, config=CONFIG, costs=EXACT, **changes):
    return propose(config, state(config, **changes), given_noise, costs)


def exact(scale, steps=4):
    return noise(steps, lower=scale, upper=scale)


@pytest.mark.parametrize("scale", [30.0, 200.0, 1000.0, 5000.0])
@pytest.mark.parametrize("per_update", [1.0, 4.0, 16.0])
def test_steps_lead_to_the_greatest_goodput(scale, per_update):
    """Micro-batches a second times 1 / (1 + B / B_noise), from below and from above.

    As near as windows come that double only up to what pays: 0.879 of the greatest at the least.
    """

    def goodput(length):
        return length / (per_update + length) / (scale + 8 * length)

    costs = Costs(per_update, 1.0, 1.0, 1.0)
    best = max(map(goodput, range(1, 1024)))
    config = replace(CONFIG, max_accumulation_steps=1024)
    for start in (1, 512):
        steps = start
        for _ in range(20):
            steps = proposed(exact(scale, steps), config, costs, accumulation_steps=steps).steps
        assert goodput(steps) > 0.87 * best


@pytest.mark.parametrize("unit", [1e-3, 60.0])
def test_the_unit_of_time_does_not_matter(unit):
    scaled = Costs(4.0 * unit, unit, unit, unit)
    for scale in (10.0, 100.0, 1000.0):
        one, other = proposed(exact(scale)), proposed(exact(scale), costs=scaled)
        assert (one.action, one.steps) == (other.action, other.steps)


@pytest.mark.parametrize(("factor", "action"), [(1.01, "grow"), (0.99, "hold")])
def test_growth_stops_at_the_batch_that_pays(factor, action):
    """Windows of 8 micro-batches of 8 pay where 8^2 = (a / b) B_noise / 8, with a / b = 4."""
    assert proposed(exact(factor * 8 * 8 * 8 / 4)).action == action


@pytest.mark.parametrize(("factor", "action"), [(1.01, "hold"), (0.99, "shrink")])
def test_a_window_far_above_what_pays_shrinks_though_the_noise_is_as_large(factor, action):
    """Windows of 64 with a noise scale of 64 micro-batches: K*^2 = 64 a / b."""
    costs = Costs(factor * 64 / ABOVE**2, 1.0, 1.0, 1.0)
    assert proposed(exact(8 * 64, 64), costs=costs, accumulation_steps=64).action == action


def test_bounds_of_the_noise_and_caution_speak_against_change():
    wide = noise(4, lower=10.0, upper=1e4, scale=100.0)
    assert proposed(wide).action == "hold"
    assert proposed(exact(1e4)).action == "grow"
    assert proposed(exact(0.9)).action == "shrink"
    assert proposed(exact(140.0)).action == "grow"
    assert proposed(exact(140.0), caution=0.25).action == "hold"


def test_bounds_of_the_costs_speak_against_change():
    assert proposed(exact(140.0), costs=Costs(4.0, 1.0, 1.0, 1.5)).action == "hold"
    assert proposed(exact(1e3), costs=Costs(0.01, 1.0, 1.0, 1.0)).action == "shrink"
    assert proposed(exact(1e3), costs=Costs(0.01, 1.0, 0.7, 1.0)).action == "hold"


def test_free_updates_lead_to_the_shortest_windows():
    free = Costs(0.0, 1.0, 1.0, 1.0)
    assert proposed(exact(1e3), costs=free).action == "shrink"
    assert proposed(exact(math.inf), costs=free).action == "shrink"
    assert proposed(exact(1e3, 1), costs=free, accumulation_steps=1).action == "hold"


def test_micro_batches_that_cost_nothing_lead_to_the_longest_windows():
    assert proposed(exact(1.0), costs=Costs(4.0, 0.0, 0.0, 0.0)).action == "grow"


def test_a_window_follows_the_decay_where_that_makes_samples_quicker():
    """From 4 to 8: (1 + p / 4) / (1 + p / 8), which must be 1.05."""
    config = replace(CONFIG, grow_by_noise=False)
    price = 4 * 0.05 / (1 - 1.05 / 2)
    for factor, action in ((1.01, "grow"), (0.99, "hold")):
        costs = Costs(factor * price, 1.0, 1.0, 1.0)
        assert proposed(exact(1e4), config, costs, lr=0.4).action == action


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"lr": 0.5}, "hold"),
        ({"lr": 0.51}, "shrink"),
        ({"lr": 0.5, "reference_steps": 8.0}, "shrink"),
        ({}, "shrink"),
    ],
    ids=["followed", "beyond", "the-users-own", "flat"],
)
def test_what_the_decay_let_grow_is_kept(changes, action):
    dear_enough = Costs(0.5, 1.0, 1.0, 1.0)
    changes = {"accumulation_steps": 8, "reference_steps": 4.0, **changes}
    assert proposed(exact(64.0, 8), costs=dear_enough, **changes).action == action


@pytest.mark.parametrize("objective", ["time", "updates"])
@pytest.mark.parametrize("reference", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("lr", [1.0, 0.9, 0.5, 0.25, 0.05])
def test_what_grows_is_not_taken_back(objective, reference, lr):
    """At one noise and one price the rules come to rest, wherever they begin."""
    for price, scale, start in product((0.05, 0.25, 1.0, 4.0), np.geomspace(1, 1e4, 13), (1, 64)):
        config = replace(CONFIG, objective=objective, update_price=price)
        costs, steps, actions = Costs(price * reference, 1.0, 1.0, 1.0), start, []
        for _ in range(16):
            given = {"accumulation_steps": steps, "reference_steps": reference, "lr": lr}
            change = proposed(exact(scale, steps), config, costs, **given)
            actions.append(change.action)
            steps = change.steps
        assert actions[-1] == "hold"


def test_caution_takes_from_the_noise_that_a_window_is_kept_for():
    assert proposed(exact(6.0)).action == "hold"
    assert proposed(exact(6.0), caution=0.5).action == "shrink"


def test_where_the_decay_may_let_nothing_grow_it_keeps_nothing():
    free, grown = Costs(0.0, 1.0, 1.0, 1.0), {"accumulation_steps": 8, "lr": 0.5}
    assert proposed(exact(64.0, 8), costs=free, **grown).action == "hold"
    alone = replace(CONFIG, grow_in_decay=False)
    assert proposed(exact(64.0, 8), alone, free, **grown).action == "shrink"


def test_costs_that_are_not_known_hold_and_say_so():
    change = propose(CONFIG, state(CONFIG), noise())
    assert change.action == "hold"
    assert "costs unknown" in change.reason
    assert "to be timed" in change.reason
    advise = replace(CONFIG, mode="advise")
    assert "no others are made" in propose(advise, state(advise), noise()).reason


def test_the_reason_tells_the_price():
    grown, held = proposed(exact(1e4)), proposed(exact(100.0))
    assert "where an update costs at least 4 micro-batches" in grown.reason
    assert "where an update costs at least 4 micro-batches" in held.reason


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"previous_lr": 0.9}, "hold"),
        ({"reverts": 3}, "hold"),
        ({"blocked_until": 1.1e5}, "hold"),
        ({"changed_at_samples": 0.96e5}, "hold"),
        ({"changed_at_updates": 601}, "hold"),
        ({"changed_at_updates": 600}, "grow"),
        ({"lr": 0.9}, "grow"),
        ({"accumulation_steps": 64}, "hold"),
    ],
    ids=[
        "warm-up",
        "reverts",
        "blocked",
        "dwell-samples",
        "dwell-updates",
        "dwelt",
        "decay",
        "limit",
    ],
)
def test_what_holds_other_changes_back_holds_these(changes, action):
    steps = changes.get("accumulation_steps", 4)
    assert proposed(exact(1e6, steps), **changes).action == action


def test_the_switches_hold():
    assert proposed(exact(1e4), replace(CONFIG, grow_by_noise=False)).action == "hold"
    assert proposed(exact(1e-3), replace(CONFIG, shrink=False)).action == "hold"
    fixed = replace(CONFIG, min_accumulation_steps=4, max_accumulation_steps=4)
    assert "at its limit of 4" in proposed(exact(1e4), fixed).reason


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
    final = run.decisions[-1].costs
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
    known = [d.costs is not None for d in run.decisions]
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
    assert run.decisions[-1].costs is not None


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
    assert found["decide/seconds_per_update"] == run.decisions[-1].costs.per_update
    assert found["decide/seconds_per_micro_batch"] == run.decisions[-1].costs.per_micro_batch
    assert not any("seconds" in name for name in metrics(run.decisions[0]))
