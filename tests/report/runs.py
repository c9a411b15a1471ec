"""Runs that were never trained: a real controller decides on windows that are made up."""

import math
import random

import numpy as np

from noiseopt.control import NoiseConfig, Start, Window
from noiseopt.estimate import WindowNorms
from noiseopt.record import to_line
from noiseopt.report import LOSSES, RECORD
from noiseopt.report.run import DECISION, WINDOW, Groups, Run

CONFIG = NoiseConfig(accumulation_steps=2, samples_per_micro_batch=8, max_norm=4.0)
SHARES = (0.2, 0.5, 0.3)
EVERY = 10  # windows to a decision
ESCAPED = "\\u003c"


def decide(count, config=CONFIG, groups=("embedding", "blocks", "head"), seed=0):
    """Return a start, and as many decisions of a run that grows, spikes and meets infinities."""
    draw = random.Random(seed)
    start = Start.of_run(config, "adam", tuple(groups))
    controller, decisions = start.controller(), []
    for decided in range(count):
        windows = []
        for number in range(EVERY):
            windows.append(window(controller.state, decided + number / EVERY, count, groups, draw))
            controller = controller.learn(windows[-1])
        controller, decision = controller.decide(1e-3, tuple(windows))
        decisions.append(decision)
    return start, decisions


def window(state, at, count, groups, draw):
    """One window, at some time of a run: the signal falls, and with it the loss."""
    steps, share = state.accumulation_steps, at / count
    if draw.random() < 0.01:
        return Window(None, steps, skipped=steps, applied=False)
    spike = 9 if draw.random() < 0.02 else 1
    parts = [(2 * math.exp(-2.5 * share) * part, 40 * part) for part in SHARES[: len(groups)]]
    small = tuple(spike * (signal + noise / 8 * draw.gauss(1, 0.1)) for signal, noise in parts)
    big = tuple(
        spike * (signal + noise / 8 / steps) * math.exp(draw.gauss(0, 0.2))
        for signal, noise in parts
    )
    norms = WindowNorms(small, big, 8.0, 8.0 * steps, steps, 8.0 * steps)
    clipped = math.sqrt(sum(big)) > state.max_norm
    loss = 2 + 3 * math.exp(-3 * share)
    return Window(norms, steps, clipped=clipped, loss_sum=loss * steps, loss_count=steps)


def write(folder, start, decisions):
    """Write a run's record; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = map(to_line, (start, *decisions))
    (folder / RECORD).write_text("\n".join(lines) + "\n")
    return folder


def write_losses(folder, arms, rows=40):
    """Write a loss table with these arms."""
    import csv

    with (folder / LOSSES).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["arm", "samples", "train_loss", "validation_loss"])
        for number, arm in enumerate(arms):
            for row in range(rows):
                held_out = 4 - row / rows if row % 10 == 9 else "nan"
                table.writerow([arm, 16 * (row + 1), 4 - row / rows + number / 10, held_out])


def long_run(count, num_changes):
    """Return a run of a great many decisions, as the page is given it."""
    draw = np.random.default_rng(0)
    decisions = np.zeros(count, DECISION)
    at = np.arange(1, count + 1)
    decisions["updates"], decisions["samples"] = at, 64.0 * at
    decisions["updates_since"], decisions["samples_since"] = 1, 64
    scale = 100 * np.exp(at / count) * np.exp(draw.normal(0, 0.2, count))
    decisions["scale"] = scale
    decisions["scale_low"], decisions["scale_high"] = scale / 1.5, scale * 1.5
    decisions["scale_high"][:1000] = np.inf
    decisions["batch"] = decisions["decided"] = 64
    decisions["steps"], decisions["factor"], decisions["applied"] = 8, 1, True
    decisions["loss"] = 2 + np.exp(-at / count) + draw.normal(0, 0.1, count)
    decisions["max_norm"] = 2
    decisions["action"][np.linspace(0, count - 1, num_changes).astype(int)] = 1
    windows = np.zeros(count, WINDOW)
    windows["samples"], windows["norm"] = decisions["samples"], np.exp(draw.normal(0, 0.3, count))
    windows["max_norm"], windows["clipped"] = 2, windows["norm"] > 2
    windows["skipped"][::1000] = True
    groups = Groups(("a", "b"), np.stack([scale, scale / 2], 1), np.ones((count, 2)))
    reasons = [f"the noise leaves room for a batch of {n % 977}" for n in range(count)]
    return Run("long", [], "balanced", "samples", 0.95, decisions, reasons, windows, groups)
