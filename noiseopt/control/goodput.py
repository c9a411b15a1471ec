"""Which window makes the most progress in a second: throughput times statistical efficiency.

With a second's costs a for each update and b for each micro-batch, windows of K bring K / (a + b K)
micro-batches a second. Of samples in batches of B, the share that those of the smallest batches
would have sufficed for is proportional to 1 / (B_noise + B) (McCandlish et al., arXiv 1812.06162;
EFFICIENCY in Pollux, Qiao et al., OSDI 2021). Their product is Pollux's goodput; it is greatest
where B^2 = a B_noise b_mb / b, with b_mb the samples of a micro-batch.
"""

import math
from dataclasses import dataclass

from noiseopt.control.config import NoiseConfig
from noiseopt.control.costs import APART, Costs
from noiseopt.control.state import ControllerState
from noiseopt.estimate import NoiseEstimate


@dataclass(frozen=True, slots=True)
class Pace:
    """What time goes into, and what another window would make of it.

    Attributes:
        per_update: seconds for each update, whatever its length.
        per_micro_batch: seconds for each micro-batch on each rank.
        steps: the better neighbour of the present window, or that itself if none may be chosen.
        gain: its goodput over the present window's, by the bounds that speak least for a change;
            None while the noise is unknown.
    """

    per_update: float
    per_micro_batch: float
    steps: int
    gain: float | None


def pace(config: NoiseConfig, state: ControllerState, noise: NoiseEstimate | None) -> Pace | None:
    """What is known of time; None while the costs are not known."""
    costs = state.timing.costs if state.timing else None
    if costs is None:
        return None
    steps, known = state.accumulation_steps, (costs.per_update, costs.per_micro_batch)
    if noise is None:
        return Pace(*known, steps, None)
    gains = {to: gain(costs, noise, state.caution, steps, to) for to in _neighbours(config, state)}
    best = max(gains, key=lambda to: gains[to], default=steps)
    return Pace(*known, best, gains.get(best, 1.0))


def timed_steps(config: NoiseConfig, steps: int) -> int | None:
    """Another length that tells an update's time from a micro-batch's; None if none is allowed.

    Example:
        >>> timed_steps(NoiseConfig(max_accumulation_steps=6), 4), timed_steps(NoiseConfig(), 1)
        (6, 2)
    """
    larger = min(2 * steps, config.max_accumulation_steps)
    if larger >= APART * steps:
        return larger
    smaller = max(steps // 2, config.min_accumulation_steps)
    return smaller if steps >= APART * smaller else None


def gain(costs: Costs, noise: NoiseEstimate, caution: float, steps: int, to: int) -> float:
    """The goodput of windows of another length over that of the present ones; a cautious bound."""
    scale = caution * (noise.scale_lower if to > steps else noise.scale_upper)
    speed_up = costs.speed_up(steps, to)
    if math.isinf(scale):
        return speed_up
    return speed_up * (scale + noise.batch) / (scale + noise.batch * to / steps)


def _neighbours(config: NoiseConfig, state: ControllerState) -> list[int]:
    """The windows that the settings allow next."""
    steps = state.accumulation_steps
    larger = min(2 * steps, config.max_accumulation_steps) if config.grow_by_noise else steps
    smaller = max(steps // 2, config.min_accumulation_steps) if config.shrink else steps
    return [to for to in (smaller, larger) if to != steps]
