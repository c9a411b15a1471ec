"""What a record says, in words: the facts of a run, and a verdict no stronger than its interval."""

import math
from collections.abc import Sequence

from noiseopt.control import Decision, NoiseConfig
from noiseopt.estimate import NoiseEstimate
from noiseopt.record import Record

MAX_CHANGES = 12


def facts(record: Record) -> list[tuple[str, str]]:
    """The facts of a run, as pairs of a name and a text; the verdict comes last."""
    decisions, config = record.decisions, record.config
    if not decisions:
        return [("verdict", "undecided: the run ended before its first decision")]
    last = decisions[-1]
    noise = last.noise
    unit = last.unit
    found = [
        ("updates", f"{last.num_updates}"),
        (unit, f"{last.samples_seen:.10g}"),
        *_noise(noise, config),
        ("window", f"{_count(last.accumulation_steps)}, a batch of {last.batch:.4g} {unit}"),
        ("learning rate", f"{last.lr:.3g} by the schedule, times {last.rates.lr:.3g}"),
        *_changes(decisions),
        ("clipped", f"{last.total_clipped} of {last.num_updates} updates"),
        ("skipped", f"{_count(last.total_skipped)} not finite"),
    ]
    if record.cut:
        found.append(("record", "its last line is cut short, as when a run is killed; left out"))
    return [*found, ("verdict", verdict(last, config))]


def verdict(last: Decision, config: NoiseConfig) -> str:
    """Say what a run's last decision knows of the noise, and no more."""
    noise = last.noise
    if noise is None:
        return f"undecided: {last.reason}"
    low, high = noise.fraction_interval
    at = f"at a batch of {noise.batch:.4g} {noise.unit}"
    sure = f"({_level(config)} confidence, {noise.effective_count:.0f} independent windows)"
    if noise.count < config.min_count:
        rests = f"{noise.count:.1f} windows"
        return f"undecided {at}: it rests on {rests}, to act takes {config.min_count:g}"
    if low > 0.5:
        text = f"noise dominates {at}: it is at least {percent(low)} of the squared gradient {sure}"
        lost = "; the signal cannot be told from 0, so the noise scale has no upper bound"
        return text if math.isfinite(noise.scale_interval[1]) else text + lost
    if high < 0.5:
        return f"signal dominates {at}: noise is at most {percent(high)} {sure}"
    return (
        f"undecided {at}: noise is between {percent(low)} and {percent(high)} of the squared "
        f"gradient {sure}"
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


def _level(config: NoiseConfig) -> str:
    return f"{100 * config.confidence:g}%"


def _count(micro_batches: int) -> str:
    return f"{micro_batches} micro-batch{'' if micro_batches == 1 else 'es'}"


def _noise(noise: NoiseEstimate | None, config: NoiseConfig) -> list[tuple[str, str]]:
    if noise is None:
        return [("noise scale", "unknown"), ("noise fraction", "unknown")]
    low, high = (percent(end) for end in noise.fraction_interval)
    scale = f"{noise.scale:.3g}" if math.isfinite(noise.scale) else "no finite estimate"
    fraction = f"{percent(noise.fraction)} at a batch of {noise.batch:.4g}"
    bounds = interval(noise.scale_interval)
    return [
        ("noise scale", f"{scale} {noise.unit} ({_level(config)}: {bounds})"),
        ("noise fraction", f"{fraction} ({_level(config)}: {low} to {high})"),
    ]


def _changes(decisions: Sequence[Decision]) -> list[tuple[str, str]]:
    lines = [change(decision) for decision in decisions if decision.action != "hold"]
    if not lines:
        return [("changes", f"none; last reason: {decisions[-1].reason}")]
    if len(lines) > MAX_CHANGES:
        half = MAX_CHANGES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} more ...", *lines[-half:]]
    return [("changes" if index == 0 else "", line) for index, line in enumerate(lines)]


def change(decision: Decision) -> str:
    """Write a decision on one line."""
    deed = "hold at" if decision.action == "hold" else f"{decision.action} to"
    advice = "" if decision.applied else " (advice, not applied)"
    return (
        f"update {decision.num_updates}: {deed} {decision.accumulation_steps}{advice}: "
        f"{decision.reason}"
    )
