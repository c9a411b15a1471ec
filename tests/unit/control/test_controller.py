"""The controller over whole simulated runs, against what the known noise calls for."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from noiseopt.control import (
    Controller,
    NoiseConfig,
    Rates,
    Window,
    adascale_gain,
    paying_batch,
    sqrt_gain,
)
from noiseopt.control.proposal import Change
from noiseopt.estimate import WindowNorms

SAMPLES = 8  # in a micro-batch
PRICE = 64.0  # of an update, in micro-batches, where growth is to be far


def controller(rule=sqrt_gain, verify=True, **settings):
    config = NoiseConfig(samples_per_micro_batch=SAMPLES, verify=verify, **settings)
    return Controller.create(config, rule)


def rising(seen):
    """A noise scale that grows as the root of the samples seen."""
    return 64 * math.sqrt(max(seen / 2000, 1))


def cosine(total, floor=1e-3):
    def lr(seen):
        share = min(seen / total, 1)
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return lr


def ideal_steps(scale):
    """The largest power of two whose batch stays below the one that pays."""
    return 2 ** max(math.floor(math.log2(paying_batch(PRICE * SAMPLES, scale) / SAMPLES)), 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("settings", "within"), [({"dwell_updates": 50}, 0.15), ({}, 0.3)])
def test_a_million_samples_of_rising_noise_take_few_changes_and_no_reversal(
    run_of, settings, within, seed
):
    """Six doublings, as many as the ideal path takes, and none taken back.

    Averaged over samples, the batch is near the ideal power of two, in doublings (0.07 to 0.11
    measured where changes may lie 50 updates apart, 0.25 at the default of 400), always from below,
    and reaches it in the end.
    """
    settings = {"max_accumulation_steps": 128, "update_price": PRICE, **settings}
    run = run_of(controller(**settings), rising, seed=seed).until(1e6)
    assert run.actions == ["grow"] * 6
    before, total = 0.0, 0.0
    for decision in run.decisions:
        error = math.log2(decision.accumulation_steps / ideal_steps(rising(decision.samples_seen)))
        assert error <= 0
        total += abs(error) * (decision.samples_seen - before)
        before = decision.samples_seen
    assert total / before < within
    assert error == 0


def test_a_noise_that_collapses_shrinks_the_window(run_of):
    """By halves to the one that pays, within four times the samples before the collapse."""
    dear = controller(update_price=4.0)
    run = run_of(dear, lambda seen: 1500 if seen < 5e4 else 4).until(2e5)
    assert run.changes[3][1:] == ("grow", 16)
    assert set(run.actions[4:]) == {"shrink"}
    assert run.controller.state.accumulation_steps in (1, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_cosine_decay_grows_the_window_by_the_schedule(run_of, seed):
    """Never above peak / lr times the stable window, never below half of it once under way."""
    lr = cosine(5e5)
    settings = {"accumulation_steps": 4, "max_accumulation_steps": 64, "grow_by_noise": False}
    run = run_of(controller(**settings), lambda seen: 1e5, lr, seed=seed).until(5e5)
    assert set(run.actions) == {"grow"}
    for decision in run.decisions[1:]:
        allowed = 4 / lr(decision.samples_seen)
        assert decision.accumulation_steps <= max(allowed, 4)
        if decision.noise.count > 20:
            assert decision.accumulation_steps >= min(math.floor(allowed) - 1, 64) / 2
    assert run.controller.state.accumulation_steps == 64


def restarting(length):
    """A cosine to a tenth that begins anew every so many samples, rising at first."""

    def lr(seen):
        share = seen % length / length
        return max(share / 0.05, 1e-2) if share < 0.05 else cosine(1.0)(share) * 0.9 + 0.1

    return lr


def test_where_the_rate_rises_again_windows_give_back_what_followed_its_fall(run_of):
    """Never a tenth above peak / lr times the first window, in the second cycle either.

    Nor does it grow where a cycle's warm-up begins below the last rate of the one before.
    """
    lr = restarting(2.5e5)
    settings = {"accumulation_steps": 4, "max_accumulation_steps": 64, "grow_by_noise": False}
    run = run_of(controller(**settings), lambda seen: 1e5, lr).until(5e5)
    for decision in run.decisions:
        floor = max(lr(decision.samples_seen), 0.1)
        assert decision.accumulation_steps <= max(1.1 * 4 / floor, 4)
    for cycle in (0, 1):
        within = [d for d in run.decisions if d.samples_seen // 2.5e5 == cycle]
        assert max(d.accumulation_steps for d in within) >= 32
    assert any("rose to 1/" in decision.reason for decision in run.decisions)


def test_what_the_noise_let_grow_stays_where_the_rate_rises_again(run_of):
    """At a price of 4 a scale of 160 samples pays for windows of 8 micro-batches of 8."""
    lr = restarting(2.5e5)
    settings = {"update_price": 4, "dwell_updates": 50, "max_accumulation_steps": 64}
    run = run_of(controller(**settings), lambda seen: 160.0, lr).until(3.5e5)
    at_end = [d.accumulation_steps for d in run.decisions if 2.2e5 < d.samples_seen < 2.5e5]
    assert max(at_end) > 8
    assert any("follows it back" in decision.reason for decision in run.decisions)
    assert {d.accumulation_steps for d in run.decisions if d.samples_seen > 2.8e5} == {8}


def test_giving_back_is_not_verified_and_ends_what_was(run_of):
    """The loss leaves its trend as the rate does: that says nothing of the window."""
    settings = {"grow_by_noise": False, "max_accumulation_steps": 64, "accumulation_steps": 2}
    lr = restarting(1e5)

    def loss(seen, steps, rng):
        return 3 + (2.0 if seen > 1e5 else 0.0) + 0.01 * rng.standard_normal()

    run = run_of(controller(**settings), lambda seen: 1e5, lr, loss).until(9.9e4)
    held = run.controller.state.verification
    pending = replace(held, revert_to=2, seen=0, excess=0.0)
    state = replace(run.controller.state, verification=pending)
    run.controller = run.controller.at(state)
    run.until(1.4e5)
    assert run.controller.state.reverts == 0
    back = [d for d in run.decisions if "follows it back" in d.reason]
    assert back
    assert all(decision.verifying is None for decision in back)
    assert run.controller.state.verification.trend.y == pytest.approx(5.0, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ([("grow", 8, True)], 4),
        ([("grow", 8, False)], 8),
        ([("grow", 8, True), ("grow", 16, False)], 16),
        ([("grow", 8, True), ("revert", 4, False)], 4),
        ([("grow", 8, False), ("revert", 4, False)], 4),
        ([("grow", 8, True), ("shrink", 6, True)], 4),
        ([("shrink", 2, False)], 2),
        ([("shrink", 2, False), ("revert", 4, False)], 4),
        ([("grow", 8, True), ("grow", 16, True), ("shrink", 8, False)], 4),
        ([("grow", 8, True), ("grow", 16, True), ("shrink", 8, False), ("revert", 16, False)], 4),
        ([("grow", 8, True), ("grow", 16, True), ("revert", 8, False)], 4),
    ],
)
def test_what_stays_of_a_window_when_the_rate_rises(changes, kept):
    run = controller(accumulation_steps=4)
    for action, steps, by_decay in changes:
        run = run._follow(Change(action, steps, "a test", by_decay), None)
    assert run.state.kept_steps == kept <= run.state.accumulation_steps


def test_decay_without_noise_does_not_grow(run_of):
    settings = {"accumulation_steps": 4, "min_accumulation_steps": 4}
    run = run_of(controller(**settings), lambda seen: 3, cosine(1e5)).until(1e5)
    assert run.changes == []
    assert "growth takes 0.333" in run.decisions[len(run.decisions) // 2].reason


def test_warm_up_holds(run_of):
    run = run_of(controller(), lambda seen: 1e4, lambda seen: min(seen / 5e4, 1.0)).until(6e4)
    assert all(seen > 5e4 for seen, _, _ in run.changes)
    assert run.actions[0] == "grow"
    assert run.decisions[20].phase == "warm-up"


def test_windows_stay_within_their_limits_and_at_most_double(run_of):
    limits = {"accumulation_steps": 3, "min_accumulation_steps": 2, "max_accumulation_steps": 20}
    limits |= {"update_price": 1, "dwell_updates": 50}
    run = run_of(controller(**limits), lambda seen: 1e4 if seen < 4e4 else 1.0).until(1.5e5)
    steps = [3, *(steps for _, _, steps in run.changes)]
    assert (max(steps), min(steps)) == (20, 2)
    for old, new in itertools.pairwise(steps):
        assert new in (min(2 * old, 20), max(old // 2, 3 if old > 3 else 2))
    for (earlier, *_), (later, *_) in itertools.pairwise(run.changes):
        assert later - earlier >= 0.05 * later


def warm_up(seen):
    """Rising for 20 000 samples, then flat: time to learn the trend of the loss."""
    return min(seen / 2e4, 1.0)


def hurt_above(limit, worse=1.03):
    """A falling loss with noise of 1 %, that is worse while the window exceeds the limit."""

    def loss(seen, steps, rng):
        factor = worse if steps > limit else 1.0
        return factor * (8 - 0.4 * math.log(seen)) + 0.04 * rng.standard_normal()

    return loss


def test_what_hurts_is_reverted_and_what_does_not_is_kept(run_of):
    """Windows above four make the loss 3 % worse: each growth to eight is taken back."""
    run = run_of(controller(), lambda seen: 1e5, warm_up, hurt_above(4)).until(1e5)
    steps = [steps for _, _, steps in run.changes]
    assert steps == [2, 4, 8, 4, 8, 4, 8, 4]
    assert run.actions == ["grow", "grow", *["grow", "revert"] * 3]


def test_each_revert_makes_growth_more_cautious_and_blocks_it(run_of):
    run = run_of(controller(), lambda seen: 1e5, warm_up, hurt_above(4))
    while "revert" not in run.actions and run.samples < 1e5:
        run.step()
    state = run.controller.state
    assert (state.reverts, state.caution) == (1, 0.5)
    assert state.blocked_until == pytest.approx(1.05 * run.samples)
    run.until(state.blocked_until - SAMPLES * 4)
    assert run.actions[-1] == "revert"


def test_after_the_last_revert_the_window_is_held_for_good(run_of):
    settings = {"max_reverts": 1, "max_accumulation_steps": 64}
    run = run_of(controller(**settings), lambda seen: 1e5, warm_up, hurt_above(4)).until(1e5)
    assert run.actions == ["grow", "grow", "grow", "revert"]
    assert run.decisions[-1].reason == "1 changes were reverted: no more are made"


def test_without_verification_nothing_is_reverted(run_of):
    run = run_of(controller(verify=False), lambda seen: 1e5, loss=hurt_above(4)).until(5e4)
    assert set(run.actions) == {"grow"}


def test_a_reverted_shrink_does_not_make_growth_more_cautious(run_of):
    """The window that was too small is taken back; the noise scale was not at fault."""
    settings = {"accumulation_steps": 16, "probe_interval": 0, "decision_interval": 2}
    settings["update_price"] = 1

    def loss(seen, steps, rng):
        return (1.05 if steps < 16 else 1.0) * 3 + 0.01 * rng.standard_normal()

    run = run_of(controller(**settings), lambda seen: 8.0, loss=loss)
    while len(run.actions) < 2 and run.samples < 1e5:
        run.step()
    assert run.actions == ["shrink", "revert"]
    assert (run.controller.state.reverts, run.controller.state.caution) == (1, 1.0)


def test_shrinking_has_its_switch(run_of):
    settings = {"accumulation_steps": 16, "probe_interval": 0, "update_price": 1}
    settings["dwell_updates"] = 50
    assert "shrink" in run_of(controller(**settings), lambda seen: 8.0).until(3e4).actions
    settings["shrink"] = False
    assert run_of(controller(**settings), lambda seen: 8.0).until(3e4).changes == []


def test_growth_in_decay_does_not_hold_up_growth_by_the_noise(run_of):
    """In windows of 16, the rate's fall makes many small steps."""

    def lr(seen):
        return max(0.5 + 0.5 * math.cos(math.pi * seen / 6e5), 1e-3)

    def updates(**settings):
        settings |= {"accumulation_steps": 16, "max_accumulation_steps": 512}
        run = run_of(controller(**settings), lambda seen: 100.0 if seen < 2e5 else 2e4, lr=lr)
        return run.until(6e5).controller.state.num_updates

    assert updates() < updates(grow_in_decay=False)


def test_where_each_micro_batch_brings_several_gradients_nothing_is_probed():
    """Two gradients from two ranks in a window of one show its noise already."""
    alone = controller()
    norms = WindowNorms((3.0,), (2.0,), 8.0, 16.0, 2, 16.0)
    together = alone.learn(Window(norms, micro_batches=1))
    assert 2 in {alone.window_steps(index) for index in range(40)}
    assert {together.window_steps(index) for index in range(40)} == {1}


@pytest.mark.parametrize("interval", [2, 16])
def test_every_so_many_updates_a_window_of_one_is_a_probe(interval):
    probing = controller(probe_interval=interval)
    started = 64 * interval
    found = [probing.window_steps(index) for index in range(started, started + 10 * interval)]
    assert found == ([1] * (interval - 1) + [2]) * 10


@pytest.mark.parametrize(("interval", "at_first"), [(2, 2), (7, 2), (16, 4), (32, 8)])
def test_the_first_probes_come_four_times_as_often(interval, at_first):
    probing = controller(probe_interval=interval)
    found = [probing.window_steps(index) for index in range(64 * at_first)]
    assert found == ([1] * (at_first - 1) + [2]) * 64


def test_in_a_long_run_probes_become_rarer():
    """One in 8 up to 4608 windows, one in 100 after 100 times 512."""
    probing = controller(probe_interval=8)
    assert [probing.window_steps(index) for index in range(128, 4608)].count(2) == 4480 / 8
    assert [probing.window_steps(51_200 + index) for index in range(500)].count(2) == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"probe_interval": 0},
        {"mode": "advise"},
        {"max_accumulation_steps": 1},
        {"accumulation_steps": 3},
    ],
)
def test_where_probes_are_impossible_or_needless_there_are_none(settings):
    probing = controller(**settings)
    usual = settings.get("accumulation_steps", 1)
    assert {probing.window_steps(index) for index in range(100)} == {usual}


def test_advise_decides_and_changes_nothing(run_of):
    run = run_of(controller(mode="advise", accumulation_steps=2), lambda seen: 1e4).until(5e4)
    assert set(Counter(run.actions)) == {"grow"}
    assert not any(decision.applied for decision in run.decisions)
    assert run.decisions[-1].accumulation_steps == 4  # what it would do
    assert run.controller.state.accumulation_steps == 2
    assert run.controller.state.max_norm == math.inf
    assert {window.micro_batches for window in run.windows} == {2}


def test_with_every_switch_off_nothing_ever_changes(run_of):
    off = dict.fromkeys(("grow_by_noise", "grow_in_decay", "adapt_clip", "verify"), False)
    fixed = controller(**off, probe_interval=0, max_norm=7.5)
    run = run_of(fixed, rising, cosine(5e4)).until(5e4)
    assert run.changes == []
    assert {decision.rates for decision in run.decisions} == {Rates()}
    assert {decision.max_norm for decision in run.decisions} == {7.5}
    assert {window.micro_batches for window in run.windows} == {1}


def at_ratio(noise_ratio, rule=sqrt_gain, **settings):
    start = controller(rule, accumulation_steps=4, max_accumulation_steps=1024, **settings)
    return start.at(replace(start.state, noise_ratio=noise_ratio))


@pytest.mark.parametrize("noise_ratio", [0.0, 3.0, math.inf])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32])
def test_the_rates_follow_the_rule_and_keep_their_timescales(noise_ratio, steps):
    """lr times weight decay grows as the batch; beta2's exponent is the batch's growth.

    That of beta1 is the learning rate's factor.
    """
    scaled = at_ratio(noise_ratio, adapt_beta2=True, adapt_weight_decay=True)
    rates, kappa = scaled.rates(steps), steps / 4
    assert rates.lr == pytest.approx(min(max(sqrt_gain(kappa, noise_ratio), 0.5), 2))
    assert rates.lr * rates.weight_decay == pytest.approx(kappa)
    assert rates.beta1 == rates.lr
    assert rates.beta2 == kappa


def test_the_learning_rate_factor_is_capped_both_ways():
    capped = at_ratio(math.inf, adascale_gain, max_lr_factor=3.0)
    assert capped.rates(4 * 8).lr == 3.0
    assert capped.rates(1).lr == pytest.approx(1 / 3)


@pytest.mark.parametrize(("rule", "most"), [(sqrt_gain, 2.0), (adascale_gain, 4.0)])
def test_the_learning_rate_follows_a_batch_four_times_as_large_unless_told(rule, most):
    noisy = at_ratio(math.inf, rule, adapt_beta2=True)
    followed, further = (noisy.rates(4 * growth) for growth in (4, 64))
    assert followed.lr == further.lr == further.beta1 == most
    assert further.beta2 == 64
    assert noisy.rates(1).lr == 1 / most


def test_each_rate_has_its_switch():
    assert at_ratio(3.0, adapt_lr=False).rates(8) == Rates()
    assert at_ratio(3.0, adapt_beta1=False).rates(8).beta1 == 1.0
    assert at_ratio(3.0, adapt_beta2=True).rates(8).beta2 == 2.0
    scaled = at_ratio(3.0, adapt_lr=False, adapt_weight_decay=True)
    assert scaled.rates(8).weight_decay == 2.0


def test_the_noise_ratio_is_the_lower_bound_over_the_reference_batch(run_of):
    run = run_of(controller(accumulation_steps=2), lambda seen: 1e3).until(5e4)
    state, noise = run.controller.state, run.decisions[-1].noise
    assert state.accumulation_steps > 2
    assert state.noise_ratio == pytest.approx(noise.scale_lower / (2 * SAMPLES))


def test_a_growing_batch_is_neither_clipped_nor_let_loose(run_of):
    """From 16 to 256 samples the threshold stays where it was relative to the expected norm.

    Below 1 % of clean gradients exceed it at any time.
    """
    run = run_of(controller(accumulation_steps=2), lambda seen: 1e4, dims=100)
    while run.controller.state.max_norm == math.inf:
        run.step()
    clipped, relative = 0, []
    while len(run.windows) < 3000:
        threshold = run.controller.state.max_norm
        run.step()
        norms = run.windows[-1].norms
        clipped += math.sqrt(norms.big_sq[0]) > threshold
        relative.append(threshold / math.sqrt(1 + 1e4 / norms.big_batch))
    assert run.controller.state.accumulation_steps == 32
    assert clipped < 0.01 * len(relative)
    assert max(relative) / min(relative) < 1.25  # the norm itself fell fourfold


def test_the_user_ceiling_holds_from_the_first_update():
    start = controller(max_norm=2.0)
    assert start.state.max_norm == 2.0
    assert start.decide(1.0)[1].max_norm == 2.0


def test_a_gradient_that_is_not_finite_is_counted_and_not_learned_from(run_of):
    """Also where the caller does not skip it: neither the noise nor the level takes it in."""
    run = run_of(controller(accumulation_steps=2), lambda seen: 100.0).until(5000)
    before = run.controller
    for bad in (math.inf, math.nan):
        norms = WindowNorms((bad,), (bad,), 8.0, 16.0, 2, 16.0)
        after = before.learn(Window(norms, 2))
        assert after.state.norms == before.state.norms
        assert after.state.estimator.average == before.state.estimator.average
        assert after.state.estimator.samples_seen == before.state.estimator.samples_seen + 16


def test_a_skipped_window_moves_the_counts_only(run_of):
    run = run_of(controller(accumulation_steps=2), lambda seen: 100.0).until(5000)
    before, after = run.controller.state, None
    after = run.controller.learn(Window(None, 2, skipped=2, applied=False)).state
    assert after.total_skipped == 2
    assert (after.num_updates, after.num_windows) == (before.num_updates, before.num_windows + 1)
    assert (after.estimator, after.norms) == (before.estimator, before.norms)
    assert after.micro_batches == before.micro_batches


def test_the_batch_is_counted_by_the_mean_micro_batch_seen():
    """Three windows of two micro-batches with 5, 7 and 9 samples each."""
    found = controller(accumulation_steps=2)
    assert found.batch(3) == 24
    for samples in (5, 7, 9):
        norms = WindowNorms.from_micro_batches([3.0, 4.0], 2.0, [samples] * 2)
        found = found.learn(Window(norms, 2))
    assert found.batch(3) == pytest.approx(21)


def test_the_decided_loss_is_the_mean_of_the_finite_ones_reported():
    norms = WindowNorms.from_micro_batches([3.0, 4.0], 2.0, [8, 8])
    found = controller(accumulation_steps=2)
    for total in (4.0, math.nan, 8.0):
        found = found.learn(Window(norms, 2, loss_sum=total, loss_count=2))
    found, decision = found.decide(1.0)
    assert decision.loss == 3.0
    assert found.decide(1.0)[1].loss is None
