"""A run whose gradients are drawn, not trained: the decisions of a real controller."""

import math
import random
from collections import deque

from noiseopt.control import RATE_RULES, Controller, NoiseConfig, Start, Window
from noiseopt.estimate import WindowNorms

CONFIG = NoiseConfig(
    samples_per_micro_batch=4, dwell_updates=20, min_count=5, probe_interval=16, verify=True
)


class Simulated:
    """Decides on drawn windows, most of whose gradient is noise, and tells its observers.

    The draws depend on the update alone, so that a run goes on from a state as it did before.
    """

    def __init__(self, config=CONFIG, rule="adam", groups=("0",), updates=600):
        self.config, self.rule, self.groups, self.updates = config, rule, groups, updates
        self.controller = Controller.create(config, RATE_RULES[rule], len(groups))
        self.decided_state = self.controller.state
        self.windows, self.observers, self.decisions = [], [], deque(maxlen=10**6)
        self.seconds = None

    def now(self):
        return Start(self.config, self.rule, self.groups, self.decided_state)

    def add_observer(self, observer):
        self.observers.append(observer)
        observer.on_start(self.now)

    def load(self, state):
        """Go on from a state, as after a checkpoint was loaded."""
        self.controller = self.controller.at(state)
        self.decided_state, self.windows = state, []
        self.decisions.clear()
        for observer in self.observers:
            observer.on_start(self.now)

    def run(self, updates=None):
        """So many further windows; returns all decisions since the start, or the load."""
        for _ in range(self.updates if updates is None else updates):
            window = self.draw(self.controller.state.num_windows)
            self.controller = self.controller.learn(window)
            self.windows.append(window)
            if self.controller.state.num_windows % self.config.decision_interval == 0:
                self.decide()
        return tuple(self.decisions)

    def decide(self):
        done = self.controller.state.num_windows / self.updates
        lr = 1e-3 * (1 - min(done, 1)) + 1e-4
        self.controller, decision = self.controller.decide(lr, tuple(self.windows), self.seconds)
        if self.config.objective == "time":
            self.seconds = sum(4.0 + window.micro_batches for window in self.windows)
        self.decided_state, self.windows = self.controller.state, []
        self.decisions.append(decision)
        for observer in self.observers:
            observer(decision)

    def draw(self, index):
        draw = random.Random(index)
        steps = self.controller.window_steps(index)
        batch, parts = 4.0 * steps, len(self.groups)
        trace, signal = 900.0, 1.0
        big = signal + trace / batch * draw.gammavariate(50, 1 / 50)
        small = signal + trace / 4 * draw.gammavariate(50 * steps, 1 / 50 / steps)
        if index % 97 == 96:
            big, small = 50 * big, 50 * small
        loss = 3.0 + 1 / (1 + index) + 0.05 * draw.gauss(0, 1)
        if index == self.updates // 2:
            return Window(None, steps, steps, False, False, loss * steps, steps)
        threshold = self.controller.state.max_norm
        clipped = math.sqrt(big) > threshold and self.config.mode == "auto"
        small_sq, big_sq = (small / parts,) * parts, (big / parts,) * parts
        norms = WindowNorms(small_sq, big_sq, 4.0, batch, steps, batch)
        return Window(norms, steps, clipped=clipped, loss_sum=loss * steps, loss_count=steps)
