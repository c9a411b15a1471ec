"""Windows of known noise, drawn as their norms are distributed: no gradient need be made."""

import math

import numpy as np
import pytest
from hypothesis import settings

from noiseopt.control import Window
from noiseopt.estimate import WindowNorms

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def draw_norms(rng, scale, steps, samples=8, signal=1.0, dims=1000):
    """Norms of `steps` gradients of G + N(0, Sigma / samples) with tr(Sigma) = scale |G|^2.

    For isotropic noise the spread within the window and the mean's squared norm are independent
    (Cochran), the one chi-squared and the other noncentral chi-squared.
    """
    batch = steps * samples
    variance = scale * signal / dims
    within = variance / samples * rng.chisquare((steps - 1) * dims) if steps > 1 else 0.0
    along = rng.standard_normal() + math.sqrt(signal * batch / variance)
    big = variance / batch * (rng.chisquare(dims - 1) + along * along)
    return WindowNorms(
        small_sq=(within / steps + big,),
        big_sq=(big,),
        small_batch=float(samples),
        big_batch=float(batch),
        count=steps,
        samples=float(batch),
    )


class Run:
    """Drives a controller through windows of known noise as an optimizer would.

    Args:
        controller: the controller to start with.
        scale: the noise scale by samples seen.
        lr: the user's learning rate by samples seen.
        loss: the mean loss by samples seen and window; none is reported without it.
        seed: of all draws.
        costs: seconds of a window by its length and a generator; no time is told without it.
        norms: further arguments of `draw_norms`.
    """

    def __init__(self, controller, scale, lr=None, loss=None, seed=0, costs=None, **norms):
        self.controller = controller
        self.scale, self.lr, self.loss = scale, lr or (lambda seen: 1.0), loss
        self.rng, self.norms = np.random.default_rng(seed), norms
        self.samples, self.decisions, self.windows = 0.0, [], []
        self.costs, self.seconds, self.told = costs, 0.0, None

    def step(self):
        """One window, and a decision where one is due."""
        state = self.controller.state
        steps = self.controller.window_steps(state.num_windows)
        norms = draw_norms(self.rng, self.scale(self.samples), steps, **self.norms)
        self.samples += norms.samples
        if self.costs:
            self.seconds += self.costs(steps, self.rng)
        losses = {}
        if self.loss:
            mean = self.loss(self.samples, state.accumulation_steps, self.rng)
            losses = {"loss_sum": steps * mean, "loss_count": steps}
        self.windows.append(Window(norms, steps, **losses))
        self.controller = self.controller.learn(self.windows[-1])
        if self.controller.state.num_updates % self.controller.config.decision_interval == 0:
            self.controller, decision = self.controller.decide(
                self.lr(self.samples), seconds=self.told
            )
            self.told, self.seconds = self.seconds or None, 0.0
            self.decisions.append(decision)

    def until(self, samples):
        while self.samples < samples:
            self.step()
        return self

    @property
    def changes(self):
        """What was changed: (samples seen, action, steps)."""
        return [
            (decision.samples_seen, decision.action, decision.accumulation_steps)
            for decision in self.decisions
            if decision.action != "hold"
        ]

    @property
    def actions(self):
        return [action for _, action, _ in self.changes]


@pytest.fixture
def norms_of():
    return draw_norms


@pytest.fixture
def run_of():
    return Run
