"""What a record says, in words: the facts of a run, and a verdict no stronger than its interval."""

import math
from collections.abc import Sequence

from noiseopt.control import Decision, NoiseConfig
from noiseopt.estimate import NoiseEstimate
from noiseopt.record import Record
from noiseopt.report.comparison import compare
from noiseopt.report.phrases import change, count, interval, percent
from noiseopt.report.verdict import verdict

MAX_CHANGES = 12


def facts(record: Record) -> list[tuple[str, str]]:
    """The facts of a run, as pairs of a name and a text; the verdict comes last."""
    before, after = _sums(record)
    changes = _changes(record.decisions) if record.decisions else []
    return [*before, *changes, *after, ("verdict", verdict_of(record))]


def summary(record: Record) -> list[tuple[str, str]]:
    """The same without the changes and the verdict, which are told apart."""
    before, after = _sums(record)
    return [*before, *after]


def verdict_of(record: Record | None) -> str:
    """Say what a run knows of its noise; None is one that was not recorded."""
    if record is None:
        return "undecided: nothing was recorded"
    if not record.decisions:
        return "undecided: the run ended before its first decision"
    return verdict(record.decisions[-1], record.config)


def _level(config: NoiseConfig) -> str:
    return f"{100 * config.confidence:g}%"


def _sums(record: Record) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What is told before the changes, and after them."""
    cut = "its last line is cut short, as when a run is killed; left out"
    after = [("record", cut)] if record.cut else []
    if not record.decisions:
        return [], after
    last, config = record.decisions[-1], record.config
    window = count(last.accumulation_steps)
    if not last.applied:
        after = [("auto", _advice(record)), *after]
    before = [
        ("updates", f"{last.num_updates}"),
        (last.unit, f"{last.samples_seen:.10g}"),
        *noise_facts(last.noise, config),
        ("window", f"{window}, a batch of {last.batch:.4g} {last.unit}"),
        ("learning rate", f"{last.lr:.3g} by the schedule, times {last.rates.lr:.3g}"),
    ]
    return before, [
        ("clipped", f"{last.total_clipped} of {last.num_updates} updates"),
        ("skipped", f"{count(last.total_skipped)} not finite"),
        *after,
    ]


def _advice(record: Record) -> str:
    """What mode "auto" would have made of an advised run."""
    auto = compare(record, {"mode": "auto"})
    updates = f"{auto.updates:.0f} updates instead of {auto.recorded_updates}"
    return (
        f"would have ended with a window of {count(auto.steps[1])} and made about {updates}, as "
        "far as gradients of other windows tell: noiseopt replay RUN --set mode=auto"
    )


def noise_facts(noise: NoiseEstimate | None, config: NoiseConfig) -> list[tuple[str, str]]:
    """What is known of the noise, as pairs of a name and a text."""
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
