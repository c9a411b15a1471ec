"""The rules one by one: each on a state in which only it may speak."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.control import ControllerState, NoiseConfig, paying_batch
from noiseopt.control.proposal import ABOVE, FAR_ABOVE, propose
from noiseopt.control.verification import LossTrend, Verification
from noiseopt.estimate import NoiseEstimate, noise_fraction

CONFIG = NoiseConfig(accumulation_steps=4, max_accumulation_steps=64, update_price=4.0, verify=True)
BY_DECAY = replace(CONFIG, grow_by_noise=False)
SAMPLES_PER_STEP = 8


def noise(steps=4, lower=1e4, upper=math.inf, count=50.0, scale=None):
    """The scale is the lower bound where it is not given."""
    batch = SAMPLES_PER_STEP * steps
    return NoiseEstimate(
        scale=lower if scale is None else scale,
        scale_interval=(lower, upper),
        scale_lower=lower,
        scale_upper=upper,
        fraction=noise_fraction(lower, batch),
        fraction_interval=(noise_fraction(lower, batch), noise_fraction(upper, batch)),
        fraction_lower=noise_fraction(lower, batch),
        fraction_upper=noise_fraction(upper, batch),
        batch=batch,
        trace=lower,
        signal=1.0,
        samples_seen=1e5,
        count=count,
        effective_count=count,
        winsorised=0,
        unit="samples",
    )


def state(config=CONFIG, samples=1e5, **changes):
    """A learning rate that stands where it is, long after any change."""
    initial = ControllerState.initial(config, num_groups=1)
    estimator = replace(initial.estimator, samples_seen=samples)
    lr = changes.get("lr", 1.0)
    flat = {"lr": lr, "previous_lr": lr, "peak_lr": 1.0, "num_updates": 1000}
    flat["kept_steps"] = changes.get("accumulation_steps", config.accumulation_steps)
    return replace(initial, estimator=estimator, **(flat | changes))


def verified(mean_excess, seen=12):
    """A pending judgement, on a trend without noise."""
    trend = LossTrend(weight=20.0, weight_sq=1.0, x=11.0, y=3.0, xx=1.0)
    return Verification(trend, 2, seen, mean_excess * (seen - 2), expected=3.0)


def proposed(config=CONFIG, given_noise=None, **changes):
    change = propose(config, state(config, **changes), given_noise or noise())
    return change.action, change.steps


def test_room_in_the_noise_doubles_the_window():
    assert proposed() == ("grow", 8)


@pytest.mark.parametrize(("lower", "action"), [(127.9, "hold"), (128.1, "grow")])
@pytest.mark.parametrize("lr", [1.0, 0.8])
def test_the_next_batch_stays_below_the_one_that_pays(lower, action, lr):
    """Twice 4 steps of 8 samples pay from sqrt(price 32 B) = 64 on, whatever the rate does."""
    cheap = replace(CONFIG, update_price=1.0, grow_in_decay=False)
    assert proposed(cheap, noise(lower=lower), lr=lr)[0] == action


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("price", [1.0, 4.0])
def test_the_batch_that_pays_grows_with_the_root_of_the_noise(steps, price):
    """Counted from the first window of 4 steps, however long the present one is."""
    config = replace(CONFIG, update_price=price)
    least = (2 * steps * SAMPLES_PER_STEP) ** 2 / (price * 4 * SAMPLES_PER_STEP)
    for factor, action in ((0.999, "hold"), (1.001, "grow")):
        given = noise(steps, lower=factor * least)
        assert proposed(config, given, accumulation_steps=steps)[0] == action


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(0.01, 100))
def test_no_other_batch_makes_more_progress_for_its_cost(price, scale, other):
    """Progress 1 / (1 + scale / B) for price + B samples, McCandlish et al., appendix D."""
    best = paying_batch(price, scale)

    def gain(batch):
        return 1 / (1 + scale / batch) / (price + batch)

    assert gain(best) >= gain(best * other) * (1 - 1e-12)


def test_of_two_ways_to_grow_the_farther_is_taken():
    few, many = noise(lower=31.9), noise(lower=32.1)
    assert proposed(replace(CONFIG, decay_noise_fraction=0.4), few, lr=0.6) == ("grow", 6)
    assert proposed(given_noise=many, lr=0.6) == ("grow", 8)
    assert proposed(given_noise=many, lr=0.9) == ("grow", 8)
    assert proposed(given_noise=few, lr=0.9) == ("hold", 4)
    held = propose(CONFIG, state(lr=0.9), few).reason
    assert "fell to 1/1.11" in held
    assert "a batch of 64 exceeds" in held


@pytest.mark.parametrize(
    ("changes", "given_noise"),
    [
        ({"previous_lr": 0.9}, noise()),
        ({}, noise(count=7.9)),
        ({"reverts": 3}, noise()),
        ({"blocked_until": 1.1e5}, noise()),
        ({"changed_at_samples": 0.96e5}, noise()),
        ({"changed_at_updates": 601}, noise()),
        ({"verification": verified(0.0, seen=5)}, noise()),
    ],
    ids=["warm-up", "uncertain", "reverts", "blocked", "dwell-samples", "dwell-updates", "pending"],
)
def test_what_holds_a_window_back(changes, given_noise):
    assert proposed(given_noise=given_noise, **changes) == ("hold", 4)


def test_an_unknown_noise_holds_and_says_how_it_will_become_known():
    alone = NoiseConfig()
    assert propose(CONFIG, state(), None).reason == "noise unknown: 0 windows measured so far"
    assert "one in 32 is a probe window" in propose(alone, state(alone), None).reason
    blind = replace(alone, probe_interval=0)
    assert "nothing is probed" in propose(blind, state(blind), None).reason
    advise = replace(alone, mode="advise")
    assert "nothing is probed" in propose(advise, state(advise), None).reason


@pytest.mark.parametrize("steps", [33, 63, 64])
def test_growth_stops_at_the_longest_window(steps):
    expected = ("hold", 64) if steps == 64 else ("grow", 64)
    assert proposed(given_noise=noise(steps), accumulation_steps=steps) == expected


def test_growth_can_be_switched_off():
    assert proposed(BY_DECAY) == ("hold", 4)
    neither = replace(BY_DECAY, grow_in_decay=False)
    assert proposed(neither, lr=0.2) == ("hold", 4)


@pytest.mark.parametrize(("factor", "action"), [(0.99, "shrink"), (1.01, "hold")])
def test_a_noise_below_the_batch_halves_the_window(factor, action):
    few = noise(8, lower=0.0, scale=factor * 64 / ABOVE)
    cheap = replace(CONFIG, update_price=1e-6)
    assert proposed(cheap, few, accumulation_steps=8)[0] == action


@pytest.mark.parametrize(("factor", "action"), [(0.99, "shrink"), (1.01, "hold")])
def test_a_batch_that_pays_is_not_halved(factor, action):
    """The noise is a hundredth of the batch, and an update so dear that it pays all the same."""
    scale = 64 / 100
    price = factor * (64 / ABOVE) ** 2 / (32 * scale)
    dear = replace(CONFIG, update_price=price)
    assert proposed(dear, noise(8, 0.0, scale=scale), accumulation_steps=8)[0] == action


def test_the_window_shrinks_to_its_least_and_no_further():
    config = replace(CONFIG, min_accumulation_steps=3)
    none = noise(4, lower=0.0, upper=0.0)
    assert proposed(config, none) == ("shrink", 3)
    assert proposed(config, noise(3, 0.0, 0.0), accumulation_steps=3) == ("hold", 3)
    assert proposed(config, none, changed_at_samples=0.99e5) == ("hold", 4)


@pytest.mark.parametrize(
    ("lr", "steps"),
    [(0.81, 4), (0.8, 5), (0.6, 6), (0.5, 8), (0.25, 8), (1e-9, 8), (1e-320, 8)],
)
def test_in_decay_the_window_grows_as_the_rate_falls_and_at_most_doubles(lr, steps):
    assert proposed(BY_DECAY, lr=lr)[1] == steps


@pytest.mark.parametrize("lr", [0.0, -0.1])
def test_a_learning_rate_that_is_not_positive_lets_nothing_grow_by_decay(lr):
    assert proposed(BY_DECAY, lr=lr) == ("hold", 4)


@pytest.mark.parametrize(("lower", "action"), [(15.9, "hold"), (16.1, "grow")])
def test_growth_in_decay_takes_a_third_of_noise(lower, action):
    """At 32 samples that is a scale of 16."""
    assert proposed(BY_DECAY, noise(lower=lower), lr=0.5)[0] == action


@pytest.mark.parametrize(("lower", "action"), [(31.9, "hold"), (32.1, "grow")])
def test_caution_halves_the_noise_scale_in_decay(lower, action):
    """After a revert the gate is twice as strict, and not shut."""
    assert proposed(BY_DECAY, noise(lower=lower), lr=0.5, caution=0.5)[0] == action


@pytest.mark.parametrize(("lower", "action"), [(63.9, "hold"), (64.1, "grow")])
def test_caution_halves_the_noise_scale_that_pays(lower, action):
    """Half of it and a price of four times 32 make 64."""
    assert proposed(given_noise=noise(lower=lower), caution=0.5)[0] == action


def test_what_hurt_is_reverted_before_anything_else():
    """Also with the noise unknown, in warm-up, and after the last of the reverts."""
    bad = {"verification": verified(0.1), "previous_lr": 0.5, "reverts": 3}
    assert proposed(given_noise=noise(count=1.0), **bad) == ("revert", 2)
    assert propose(CONFIG, state(**bad), None).action == "revert"


@pytest.mark.parametrize(("excess", "action"), [(0.014, "grow"), (0.016, "revert")])
def test_the_tolerance_is_relative_to_the_expected_loss(excess, action):
    """0.5 % of 3 is 0.015."""
    assert proposed(verification=verified(excess))[0] == action


def test_nothing_is_reverted_without_verification():
    off = replace(CONFIG, verify=False)
    assert proposed(off, verification=verified(0.1))[0] == "grow"


@pytest.mark.parametrize(
    ("steps", "updates", "action"),
    [(8, 1, "shrink"), (4, 1, "hold"), (4, 401, "shrink")],
    ids=["grown", "the-users-own", "the-users-own-later"],
)
def test_what_has_grown_shrinks_without_waiting_for_updates(steps, updates, action):
    """As soon as the noise speaks for it: in long windows updates are rare."""
    config = replace(CONFIG, update_price=1e-6)
    changes = {"accumulation_steps": steps, "reference_steps": 4.0, "num_updates": updates}
    assert proposed(config, noise(steps, 0.0, 0.0), **changes)[0] == action


@pytest.mark.parametrize(("lr", "action"), [(1.0, "shrink"), (0.5, "hold")])
def test_a_window_that_follows_the_decay_is_kept_for_longer(lr, action):
    """Of 8 where the rate has fallen to a half; again at its peak, it shrinks at half as much."""
    config = replace(CONFIG, update_price=1e-6, grow_by_noise=False)
    enough = noise(8, lower=0.0, scale=64 / 2)
    changes = {"accumulation_steps": 8, "reference_steps": 4.0, "lr": lr}
    assert proposed(config, enough, **changes)[0] == action


@pytest.mark.parametrize(
    ("lr", "previous", "steps"),
    [(0.5, 0.71, 8), (0.5, 0.72, 5), (0.01, 0.5, 8), (0.01, 0.9, 4), (0.01, 1.0, 4)],
)
def test_where_the_rate_falls_suddenly_growth_goes_by_the_decision_before(lr, previous, steps):
    """It may be the start of a warm-up: 0.5 is 0.7 times 0.714."""
    assert proposed(BY_DECAY, lr=lr, previous_lr=previous)[1] == steps


@pytest.mark.parametrize(("lr", "steps"), [(0.26, 16), (0.27, 16), (0.28, 14)])
def test_a_rate_that_jitters_takes_nothing_back(lr, steps):
    """A tenth more than the decay lets grow: at 4 / 16 times 1.1, 0.275."""
    none = replace(BY_DECAY, max_accumulation_steps=16)
    changes = {"accumulation_steps": 16, "kept_steps": 4, "lr": lr, "previous_lr": lr - 0.01}
    assert proposed(none, noise(16), **changes)[1] == steps


def test_a_window_too_long_for_the_decay_is_kept_where_the_rate_does_not_rise():
    """As after a change of ranks, where windows are rounded."""
    changes = {"accumulation_steps": 16, "kept_steps": 4, "lr": 0.5}
    assert proposed(replace(BY_DECAY, shrink=False), noise(16), **changes) == ("hold", 16)


@pytest.mark.parametrize(("limit", "steps"), [(64, 32), (16, 16)])
def test_a_revert_stays_within_limits_that_have_changed(limit, steps):
    pending = replace(verified(1.0), revert_to=32)
    config = replace(CONFIG, max_accumulation_steps=limit)
    found = propose(config, state(config, verification=pending), noise())
    assert (found.action, found.steps) == ("revert", steps)


@pytest.mark.parametrize(("steps", "smaller"), [(5, 4), (7, 4), (9, 4), (16, 8)])
def test_what_has_grown_does_not_shrink_past_the_users_own_window(steps, smaller):
    changes = {"accumulation_steps": steps, "num_updates": 1}
    assert proposed(CONFIG, noise(steps, 0.0, scale=0.0), **changes) == ("shrink", smaller)


@pytest.mark.parametrize(("upper", "action"), [(0.99, "shrink"), (1.01, "hold")])
def test_the_users_own_window_shrinks_by_the_upper_bound(upper, action):
    config = replace(CONFIG, update_price=1e-6)
    few = noise(4, lower=0.0, scale=0.0, upper=upper * 32 / FAR_ABOVE)
    assert proposed(config, few)[0] == action


@pytest.mark.parametrize(
    ("lr", "kept", "steps"),
    [(1.0, 4, 4), (0.5, 4, 8), (0.6, 4, 6), (0.12, 4, 16), (1.0, 10, 10), (1.0, 16, 16)],
)
def test_a_window_goes_back_as_far_as_the_rate_has_risen(lr, kept, steps):
    """Of 16, whatever the noise and though the rate is rising; not below what stays."""
    changes = {"accumulation_steps": 16, "kept_steps": kept, "lr": lr, "previous_lr": lr / 2}
    none = replace(CONFIG, grow_by_noise=False, max_accumulation_steps=16)
    action = "shrink" if steps < 16 else "hold"
    assert proposed(none, noise(16), **changes) == (action, steps)
    assert propose(none, state(none, **changes), None).steps == steps
    off = replace(none, grow_in_decay=False)
    assert proposed(off, noise(16), **changes) == ("hold", 16)
