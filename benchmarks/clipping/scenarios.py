"""What is done to the data: how long windows are, and what is injected where.

Positions are given for the plan of the full benchmark, and move with the length of another.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from noiseopt import NoiseConfig
from noiseopt.control import RATE_RULES, Controller

Batch = tuple[Tensor, ...]

DECISION_INTERVAL = 10  # updates, as in NoiseConfig: where ours can change its window
FACTORS = (10.0, 100.0, 1000.0)  # of an outlier's loss, in turn
WRONG_SHARE = 0.5  # of the labels, in a stretch of label noise
FULL_LENGTH = 1120  # updates of the full plan


@dataclass(frozen=True)
class Plan:
    """The windows of every arm.

    Attributes:
        phases: micro-batches in a window, and for how many updates.

    Raises:
        ValueError: a phase ends where ours cannot change its window.
    """

    phases: tuple[tuple[int, int], ...] = ((1, 320), (2, 180), (4, 120), (2, 180), (1, 320))

    def __post_init__(self) -> None:
        for _, updates in self.phases:
            if updates % DECISION_INTERVAL:
                raise ValueError(f"{updates} updates are no multiple of {DECISION_INTERVAL}")

    @property
    def updates(self) -> int:
        """Updates of a run."""
        return sum(updates for _, updates in self.phases)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a run."""
        return sum(self.windows())

    def steps(self, update: int) -> int:
        """The window decided on for an update; after the last one, still that one's.

        >>> [Plan(((1, 10), (2, 10))).steps(update) for update in (0, 9, 10, 99)]
        [1, 1, 2, 2]
        """
        for steps, updates in self.phases:
            if update < updates:
                return steps
            update -= updates
        return self.phases[-1][0]

    def windows(self) -> Iterator[int]:
        """The length of every window, our probes of two among those of one included."""
        ours = Controller.create(NoiseConfig(), RATE_RULES["adam"])
        for update in range(self.updates):
            steps = self.steps(update)
            yield ours.window_steps(update) if steps == 1 else steps


@dataclass(frozen=True)
class Injection:
    """What is wrong with a micro-batch.

    Attributes:
        factor: on its loss.
        wrong_labels: the share of its labels that is drawn at random.
        nan_inputs: whether its inputs are nan.
    """

    factor: float = 1.0
    wrong_labels: float = 0.0
    nan_inputs: bool = False

    def apply(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The micro-batch with its inputs and labels spoiled; the factor is the loop's to apply."""
        inputs, labels = batch
        wrong = torch.rand(labels.shape, generator=generator) < self.wrong_labels
        random = torch.randint(10, labels.shape, generator=generator)
        if self.nan_inputs:
            inputs = torch.full_like(inputs, math.nan)
        return inputs, torch.where(wrong, random, labels)


@dataclass(frozen=True)
class Scenario:
    """Where something is injected, in updates of the full plan.

    Attributes:
        injections: what is injected, in turn.
        first: the first update concerned.
        last: the end of the updates concerned.
        every: updates from one injection to the next.
        whole_window: whether all micro-batches of a window are spoiled, or only its last.
        switch: the update from which on the data is of another domain; None for never.
    """

    injections: tuple[Injection, ...] = ()
    first: int = 0
    last: int = FULL_LENGTH
    every: int = 1
    whole_window: bool = False
    switch: int | None = None

    def injection(self, update: int, plan: Plan) -> Injection | None:
        """What is injected in an update; None in a clean one."""
        first, last, every = (
            max(1, round(at * plan.updates / FULL_LENGTH))
            for at in (self.first, self.last, self.every)
        )
        number, remainder = divmod(update - first, every)
        if not self.injections or not first <= update < last or remainder:
            return None
        return self.injections[number % len(self.injections)]

    def switched(self, update: int, plan: Plan) -> bool:
        """Whether an update's data is of the other domain."""
        return self.switch is not None and update >= self.switch * plan.updates / FULL_LENGTH


OUTLIERS = tuple(Injection(factor=factor, wrong_labels=1.0) for factor in FACTORS)
NONFINITE = (Injection(nan_inputs=True), Injection(factor=math.inf))

SCENARIOS = {
    "clean": Scenario(),
    "outliers": Scenario(OUTLIERS, first=150, every=50),
    "early outliers": Scenario(OUTLIERS, first=30, last=100, every=30),
    "nans": Scenario(NONFINITE, first=30, every=50),
    "label noise": Scenario(
        (Injection(wrong_labels=WRONG_SHARE),), first=440, last=600, whole_window=True
    ),
    "domain switch": Scenario(switch=560),
}
