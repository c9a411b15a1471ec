"""Where norms cost something to read, only some windows are measured, and nothing else changes."""

import math

import pytest
import torch

from noiseopt import NoiseAwareAdamW, NoiseConfig, NoiseMonitor
from noiseopt.control.controller import MEASURED_AT_FIRST
from tests.optim.helpers import advise, build, draw, fixed, loss_of, params_of, same_bits
from tests.optim.test_external import accumulate, close_to, external, windows_of

NUMBER, STEPS = MEASURED_AT_FIRST + 12, 2


def run(every, mode=advise, batches=None, **settings):
    model = build()
    config = external(mode(STEPS, decision_interval=1, measure_interval=every, **settings))
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    accumulate(model, optimizer, batches or draw(STEPS * NUMBER))
    return model, optimizer


def is_measured(window):
    return len(window.norms.small_sq) > 0


def test_after_a_runs_first_windows_every_so_manyth_is_measured():
    every = 5
    _, optimizer = run(every)
    found = [index for index, w in enumerate(windows_of(optimizer)) if is_measured(w)]
    expected = [i for i in range(NUMBER) if i < MEASURED_AT_FIRST or i % every == 0]
    assert found == expected != list(range(NUMBER))


def test_what_is_measured_and_applied_is_the_same_as_if_all_windows_were():
    some, optimizer = run(4)
    everything, other = run(1)
    assert same_bits(params_of(some), params_of(everything))
    for one, all_read in zip(windows_of(optimizer), windows_of(other), strict=True):
        assert one.norms.big_sq == all_read.norms.big_sq
        assert one.norms.samples == all_read.norms.samples
        assert not is_measured(one) or close_to(one, all_read)
    assert optimizer.noise.samples_seen == other.noise.samples_seen
    assert optimizer.noise.count < other.noise.count


def test_the_clip_level_is_learned_from_every_window():
    some, all_read = (run(every)[1]._adaptation.to_numbers() for every in (4, 1))
    assert some["norms.count"] == all_read["norms.count"] == NUMBER
    # Levels are kept relative to the norm that the measured noise predicts, which differs a bit.
    assert some["norms.level"] == pytest.approx(all_read["norms.level"], abs=0.02)


def test_what_is_not_finite_is_skipped_in_windows_that_are_not_measured():
    batches = draw(STEPS * NUMBER)
    at = MEASURED_AT_FIRST + 1  # the window
    batches[STEPS * at][0][0, 0] = math.nan
    model, optimizer = run(4, fixed, batches)
    lost = windows_of(optimizer)[at]
    assert lost.norms is None
    assert (lost.applied, lost.skipped) == (False, STEPS)
    assert all(torch.isfinite(param).all() for param in model.parameters())
    assert optimizer.num_updates == NUMBER - 1


def test_probes_are_measured():
    model = build()
    config = NoiseConfig(
        accumulation="external", decision_interval=1, measure_interval=5, min_count=1e9
    )
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    accumulate(model, optimizer, draw(2 * NUMBER + 40))
    probes = [w for w in windows_of(optimizer)[MEASURED_AT_FIRST:] if w.micro_batches == 2]
    assert len(probes) >= 2
    assert all(map(is_measured, probes))


def test_a_monitor_measures_the_same_windows():
    model = build()
    torch_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = advise(STEPS, decision_interval=1, measure_interval=4, accumulation="external")
    monitor = NoiseMonitor(torch_optimizer, config)
    batches = draw(STEPS * NUMBER)
    for at in range(0, len(batches), STEPS):
        for batch in batches[at : at + STEPS]:
            (loss_of(model, batch) / STEPS).backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    _, optimizer = run(4)
    for one, other in zip(windows_of(monitor), windows_of(optimizer), strict=True):
        assert close_to(one, other)


def test_a_resumed_run_measures_the_same_windows():
    batches = draw(STEPS * NUMBER)
    _, straight = run(3, batches=batches)
    half = STEPS * (NUMBER - 7)
    model, first = run(3, batches=batches[:half])
    resumed = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=first.config)
    resumed.load_state_dict(first.state_dict())
    accumulate(model, resumed, batches[half:])
    assert windows_of(resumed) == windows_of(straight)[NUMBER - 7 :]


def gan(every, told, monitored):
    """A loop that brings gradients which it throws away, as a GAN's other half has it."""
    model = build()
    config = external(advise(1, decision_interval=1, measure_interval=every))
    if monitored:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        noise = NoiseMonitor(optimizer, config)
    else:
        noise = optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    for batch in draw(NUMBER):
        (3 * loss_of(model, batch)).backward()
        optimizer.zero_grad()
        if told:
            noise.set_samples(4)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return noise


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_gradients_that_are_thrown_away_are_no_micro_batches(told, monitored):
    some, all_read = (gan(every, told, monitored) for every in (4, 1))
    assert [w.micro_batches for w in windows_of(some)] == [1] * NUMBER
    assert [w.norms.big_sq for w in windows_of(some)] == [
        w.norms.big_sq for w in windows_of(all_read)
    ]
    if monitored:
        assert some.micro_batches == NUMBER


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_window_whose_step_a_scaler_skips_is_forgotten(set_to_none):
    """An inf in a window that is not measured: the next one is whole."""
    lost = MEASURED_AT_FIRST + 1
    model = build(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    config = advise(STEPS, decision_interval=1, measure_interval=4)
    monitor = NoiseMonitor(optimizer, config, grad_scaler=scaler)
    batches = draw(STEPS * NUMBER, dtype=torch.float32)
    batches[STEPS * lost][0][0, 0] = math.inf
    for at in range(0, len(batches), STEPS):
        for batch in batches[at : at + STEPS]:
            monitor.set_samples(4)
            scaler.scale(loss_of(model, batch) / STEPS).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none)
    found = windows_of(monitor)
    assert len(found) == NUMBER - 1
    assert [w.micro_batches for w in found] == [STEPS] * len(found)
    assert all(math.isfinite(sum(w.norms.big_sq)) for w in found)
    assert monitor.micro_batches == STEPS * NUMBER


def test_under_a_monitor_what_is_not_finite_is_counted_as_skipped():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    monitor = NoiseMonitor(optimizer, advise(1, decision_interval=1, measure_interval=4))
    at = MEASURED_AT_FIRST + 1
    batches = draw(NUMBER)
    batches[at][0][0, 0] = math.nan
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    # What torch applies makes the weights nan, and all that follows.
    assert [window.skipped for window in windows_of(monitor)] == [
        int(index >= at) for index in range(NUMBER)
    ]
    assert monitor.decision.samples_seen == at
