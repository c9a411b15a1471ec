"""The search for a constant window's learning rate and beta2, on the tuning split.

A ladder of rates, sqrt(2) apart, and one of beta2. Four rates a factor of 2 apart come first; then
every neighbour of the best setting so far, until none is better: no best rate is at an edge.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

BETA2 = (0.9, 0.95, 0.99, 0.999)  # at a window of 1; to the power of k at k, at least 0.9
FIRST_BETA2 = 2
COARSE = (-2, 0, 2, 4)  # rungs from the start


@dataclass(frozen=True, order=True)
class Setting:
    """A point of both ladders: the rate is lr * sqrt(2)^rung, beta2 is that of its index."""

    rung: int
    beta2: int = FIRST_BETA2

    def neighbours(self) -> "list[Setting]":
        """One step along either ladder."""
        rates = [Setting(self.rung + step, self.beta2) for step in (1, -1)]
        others = [self.beta2 + step for step in (1, -1)]
        return rates + [Setting(self.rung, beta2) for beta2 in others if 0 <= beta2 < len(BETA2)]

    def values(self, lr: float) -> tuple[float, float]:
        """The rate, to four digits, and beta2."""
        return float(f"{lr * math.sqrt(2) ** self.rung:.4g}"), BETA2[self.beta2]


def best(losses: Mapping[Setting, float]) -> Setting:
    """The setting of the lowest loss; of equal ones the lower rate."""
    return min(losses, key=lambda setting: (losses[setting], setting))


def ranked(losses: Mapping[Setting, float]) -> list[Setting]:
    """The rates from the best to the worst, each with the beta2 that is best for it."""
    rungs = {setting.rung for setting in losses}
    found = [best({s: losses[s] for s in losses if s.rung == rung}) for rung in rungs]
    return sorted(found, key=lambda setting: (losses[setting], setting))


def untried(losses: Mapping[Setting, float], start: int) -> list[Setting]:
    """What to try next, given what is known; nothing if the best is surrounded.

    Args:
        losses: the loss of each setting tried; infinite where it diverged.
        start: the rung about which the coarse grid lies.
    """
    coarse = [Setting(start + step) for step in COARSE]
    missing = [setting for setting in coarse if setting not in losses]
    if missing:
        return missing
    return [setting for setting in best(losses).neighbours() if setting not in losses]
