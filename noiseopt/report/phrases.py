"""Numbers and decisions in words."""

import math

from noiseopt.control import Decision


def change(decision: Decision) -> str:
    """Write a decision on one line."""
    deed = "hold at" if decision.action == "hold" else f"{decision.action} to"
    advice = "" if decision.applied else " (advice, not applied)"
    return (
        f"update {decision.num_updates}: {deed} {decision.accumulation_steps}{advice}: "
        f"{decision.reason}"
    )


def interval(bounds: tuple[float, float]) -> str:
    """Write an interval; an infinite end is said to be open.

    Example:
        >>> interval((12.345, 20.0)), interval((12.345, math.inf))
        ('12.3 to 20', '12.3 or more, no upper bound')
    """
    low, high = bounds
    end = f"to {high:.3g}" if math.isfinite(high) else "or more, no upper bound"
    return f"{low:.3g} {end}"


def percent(share: float) -> str:
    """Write a share in percent, never rounded to certainty.

    Example:
        >>> percent(0.625), percent(0.99999), percent(1.0)
        ('62.5%', '99.9%', '100%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(100 * share, 0.1), 99.9):.1f}%"


def count(micro_batches: int) -> str:
    """Write a number of micro-batches."""
    return f"{micro_batches} micro-batch{'' if micro_batches == 1 else 'es'}"
