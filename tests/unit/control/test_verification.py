"""Did the change hurt? Against numpy's fit, and over many simulated changes."""

import math

import numpy as np
import pytest

from noiseopt.control.verification import (
    HALF_LIFE,
    LENGTH,
    MIN_POINTS,
    SETTLING,
    LossTrend,
    Verification,
)

TOLERANCE = 0.005
SHAPES = {
    "flat": lambda samples: 3.0,
    "falling": lambda samples: 8 - 0.4 * math.log(samples),
    "convex": lambda samples: 2 + 6 * (samples / 1000) ** -0.3,
}


@pytest.fixture
def points():
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(5, 9, 40))
    return x, 4 - 0.3 * x + 0.05 * rng.standard_normal(40)


def test_the_trend_is_the_weighted_least_squares_line(points):
    x, y = points
    trend = LossTrend()
    for point in zip(x.tolist(), y.tolist(), strict=True):
        trend = trend.update(*point)
    w = 2 ** (-np.arange(39, -1, -1) / HALF_LIFE)
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(w))
    count = w.sum() ** 2 / (w**2).sum()
    assert trend.points == pytest.approx(count)
    for at in (6.0, 9.5):
        line, of_line, of_point = trend.predict(at)
        assert line == pytest.approx(intercept + slope * at, rel=1e-9)
        residual = (w * (y - intercept - slope * x) ** 2).sum() / w.sum()
        assert of_point == pytest.approx(residual * count / (count - 2), rel=1e-9)
        mean = (w * x).sum() / w.sum()
        leverage = 1 / count + (at - mean) ** 2 / (w * (x - mean) ** 2).sum() * w.sum() / count
        assert of_line == pytest.approx(of_point * leverage, rel=1e-9)


def test_one_point_is_a_level_of_unknown_slope():
    assert LossTrend().update(3.0, 2.0).predict(5.0) == (2.0, 0.0, 0.0)


def verdict_after(rng, shape, worse=1.0, history=100, deviation=0.03):
    """What is found after a change that multiplies the loss: the verdict and the decisions."""
    verification, samples = Verification(), 0.0

    def observe(verification, factor):
        loss = factor * shape(samples) + deviation * rng.standard_normal()
        return verification.observe(samples, loss)

    for _ in range(history):
        samples += 80
        verification = observe(verification, 1.0)
    verification = verification.start(revert_to=2)
    for _ in range(SETTLING + LENGTH):
        samples += 160
        verification = observe(verification, worse)
        verdict = verification.verdict(samples, TOLERANCE)
        if verdict != "open":
            break
    return verdict, verification.seen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_harmless_change_is_rarely_reverted(shape):
    """At most 5 % of 300 changes, with noise of about 1 % of the loss."""
    rng = np.random.default_rng(2)
    verdicts = [verdict_after(rng, shape)[0] for _ in range(300)]
    assert verdicts.count("hurt") <= 0.05 * 300
    assert verdicts.count("open") == 0


@pytest.mark.parametrize(("shape", "least"), [("flat", 95), ("falling", 95), ("convex", 50)])
def test_a_loss_three_percent_worse_is_detected(shape, least):
    """Of 100 changes, with noise of 1 % of the loss; where it is convex the headroom costs some."""
    rng = np.random.default_rng(3)
    verdicts = [verdict_after(rng, SHAPES[shape], worse=1.03)[0] for _ in range(100)]
    assert verdicts.count("hurt") >= least


def test_a_disaster_is_detected_before_the_end():
    """Twice the loss is known as soon as a decision is judged."""
    verdict, decisions = verdict_after(np.random.default_rng(4), SHAPES["flat"], worse=2.0)
    assert (verdict, decisions) == ("hurt", SETTLING + 1)


def test_a_better_loss_is_fine():
    rng = np.random.default_rng(5)
    found = {verdict_after(rng, SHAPES["falling"], worse=0.9) for _ in range(20)}
    assert found == {("fine", SETTLING + LENGTH)}


def test_without_enough_history_nothing_is_judged():
    verdict, _ = verdict_after(np.random.default_rng(6), SHAPES["flat"], 10.0, int(MIN_POINTS) - 1)
    assert verdict == "open"


def test_the_first_decisions_after_a_change_are_not_judged():
    """A transient of any size in them leaves the verdict fine."""
    verification = Verification()
    for index in range(30):
        verification = verification.observe(1000.0 + index, 3.0 + 0.01 * (index % 2))
    verification = verification.start(4)
    for index in range(SETTLING + LENGTH):
        loss = 1e3 if index < SETTLING else 3.0
        verification = verification.observe(1030.0 + index, loss)
    assert verification.verdict(1030.0 + index, TOLERANCE) == "fine"


def test_the_trend_stands_still_while_a_change_is_verified():
    verification = Verification()
    for index in range(20):
        verification = verification.observe(100.0 + index, 3.0)
    pending = verification.start(4)
    assert pending.pending
    assert pending.observe(200.0, 9.0).trend == verification.trend
    finished = pending.observe(200.0, 9.0).finish()
    assert not finished.pending
    assert finished.trend == verification.trend


def test_a_young_convex_loss_is_not_taken_for_harm():
    """A power law after 40 decisions of history still falls by a quarter less than its line."""
    rng = np.random.default_rng(7)
    verdicts = [verdict_after(rng, SHAPES["convex"], history=40)[0] for _ in range(200)]
    assert verdicts.count("hurt") <= 0.05 * 200


def test_decisions_without_a_loss_do_not_speak_for_a_change():
    """They let the verification end, and never end it as hurt."""
    verification = Verification()
    for index in range(30):
        verification = verification.observe(1000.0 + index, 3.0 + 0.01 * (index % 2))
    verification = verification.start(4)
    for index in range(SETTLING + LENGTH):
        assert verification.verdict(1030.0 + index, TOLERANCE) == "open"
        verification = verification.observe(1030.0 + index, None)
    assert verification.verdict(1042.0, TOLERANCE) == "fine"
