"""Loops that accumulate by themselves and do not bring what was announced: each is told of, once.

The optimizer that accumulates externally and the monitor are held to the same.
"""

import logging

import pytest
import torch

from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.monitor import NoiseMonitor
from noiseopt.schedulers import AccumulationScheduler, NoiseAwareLR
from tests.optim.helpers import GROWING, advise, build, draw, loss_of

KINDS = ["external", "monitor"]
LR = 1e-2


class Spied(torch.optim.SGD):
    """Keeps the rate of its last update."""

    used = 0.0

    def step(self, closure=None):
        self.used = self.param_groups[0]["lr"]
        return super().step(closure)


def measured(kind, model, **settings):
    """An optimizer and what measures it: itself, or a monitor that scales its rate."""
    if kind == "external":
        config = NoiseConfig(accumulation="external", **settings)
        optimizer = NoiseAwareAdamW(model.parameters(), lr=LR, noise=config)
        return optimizer, optimizer
    optimizer = Spied(model.parameters(), lr=LR)
    monitor = NoiseMonitor(optimizer, noise=NoiseConfig(**settings))
    NoiseAwareLR(monitor)
    return optimizer, monitor


def accumulate(model, optimizer, batches, steps, parts=1):
    """Windows of so many micro-batches, whatever is announced, each loss in so many parts."""
    for number, batch in enumerate(batches, start=1):
        for _ in range(parts):
            (loss_of(model, batch) / (steps * parts)).backward()
        if number % steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("kind", KINDS)
def test_several_passes_in_a_micro_batch_are_one_and_not_measured(kind, caplog):
    model = build()
    optimizer, readings = measured(kind, model, accumulation_steps=2, decision_interval=1)
    accumulate(model, optimizer, draw(12), steps=2, parts=2)
    windows = [window for decision in readings.decisions for window in decision.windows]
    assert [window.micro_batches for window in windows] == [2] * 6
    assert [window.norms.small_sq for window in windows] == [()] * 6
    assert all(window.norms.big_sq[0] > 0 for window in windows)
    assert {window.applied for window in windows} == {True}
    (warning,) = warnings_of(caplog)
    assert "4 backward passes in 2 micro-batches" in warning
    assert "accumulation_steps=4" in warning


def test_a_schedule_beside_a_monitor_keeps_its_pace_where_a_loss_comes_in_parts():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    monitor = NoiseMonitor(optimizer, noise=advise(2))
    schedule = NoiseAwareLR(
        monitor, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=24)
    )
    for window in AccumulationScheduler(monitor).windows(draw(12)):
        for batch in window:
            for _ in range(2):
                (loss_of(model, batch) / (2 * len(window))).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert monitor.micro_batches == 12
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_is_longer_than_was_announced_changes_no_rate(kind, caplog):
    """As of a loop of fixed accumulation that was not told to the settings."""
    model = build()
    optimizer, readings = measured(kind, model, decision_interval=5)
    accumulate(model, optimizer, draw(800), steps=4)
    assert {d.rates.lr for d in readings.decisions} == {1.0}
    assert {d.noise for d in readings.decisions} == {None}
    if kind == "monitor":
        assert optimizer.used == LR
    (warning,) = warnings_of(caplog)
    assert "NoiseConfig(accumulation_steps=4)" in warning


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_does_not_follow_is_told_and_its_rates_are_of_its_own_windows(kind, caplog):
    model = build()
    settings = GROWING | {"accumulation_steps": 2, "max_accumulation_steps": 4}
    optimizer, readings = measured(kind, model, **settings)
    accumulate(model, optimizer, draw(200), steps=2)
    assert readings.accumulation_steps > 2
    assert readings.decision.rates.lr > 1.0
    if kind == "monitor":
        assert optimizer.used == LR
    (warning,) = warnings_of(caplog)
    assert "the last of 2 backward passes instead of 4" in warning
    assert "max_accumulation_steps=2" in warning


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_window_now_and_then_is_no_mistake(kind, caplog):
    """Such as the last one of an epoch."""
    model = build()
    optimizer, _ = measured(kind, model, accumulation_steps=2, max_accumulation_steps=2)
    for _ in range(20):
        accumulate(model, optimizer, draw(2), steps=2)
        accumulate(model, optimizer, draw(1), steps=1)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_that_is_not_told_is_noticed(kind, tells, caplog):
    model = build(torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    if kind == "external":
        optimizer, _ = measured(kind, model, mode="advise", accumulation_steps=2)
    else:
        optimizer = torch.optim.AdamW(model.parameters())
        NoiseMonitor(optimizer, noise=advise(2), grad_scaler=scaler if tells else None)
    batches = draw(6, dtype=torch.float32)
    for number, batch in enumerate(batches, start=1):
        scaler.scale(loss_of(model, batch) / 2).backward()
        if number % 2 == 0:
            if tells and kind == "external":
                optimizer.set_loss_scale(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    found = [text for text in warnings_of(caplog) if "GradScaler" in text]
    assert len(found) == (0 if tells else 1)


def test_clipping_is_not_taken_for_a_loss_scale(caplog):
    model = build()
    optimizer, _ = measured("external", model, mode="advise")
    for batch in draw(4):
        (100 * loss_of(model, batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert not [text for text in warnings_of(caplog) if "GradScaler" in text]


def test_the_loss_of_a_micro_batch_that_was_thrown_away_does_not_count():
    model = build()
    config = NoiseConfig(accumulation_steps=2, decision_interval=1)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.0, noise=config)
    losses = []
    for number, batch in enumerate(draw(5)):
        loss = loss_of(model, batch) * (1e6 if number == 1 else 1)
        loss.backward()
        optimizer.report_loss(loss)
        if number != 1:
            losses.append(loss.item())
            optimizer.step()
        optimizer.zero_grad()
    first, second = optimizer.decisions
    assert first.loss == pytest.approx(sum(losses[:2]) / 2)
    assert second.loss == pytest.approx(sum(losses[2:]) / 2)
