"""A record decided again, in words: `noiseopt replay RUN [--set NAME=VALUE ...]`."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from noiseopt.control import NoiseConfig
from noiseopt.record import Replayed
from noiseopt.report.comparison import Comparison
from noiseopt.report.phrases import change

COLUMNS = ("update", "recorded", "now", "reason now")
MAX_ROWS = 40
WORDS = {"true": True, "false": False, "none": None}
CAUTION = (
    "What was measured is what was recorded: how other windows would have changed the gradients, "
    "and the losses, is not known."
)


def words(found: Comparison, changes: Mapping[str, Any]) -> list[str]:
    """Say how a run comes out again, by its own settings or with changed ones, line by line."""
    if not found.differ:
        return [f"{found.decisions} decisions, decided again: all come out the same."]
    number = f"{len(found.differ)} of {found.decisions} decisions come out otherwise"
    first = found.differ[0]
    if not changes:
        return [
            f"{number}; the first:",
            f"  recorded: {change(first.recorded)}",
            f"  again:    {change(first.again)}",
            "The rules have changed since, or the record was.",
        ]
    updates = f"about {found.updates:.0f} updates instead of {found.recorded_updates}"
    return [
        f"{number} in windows, rates, clipping or reasons; {len(found.changes)} in the window.",
        f"The window ends at {found.steps[1]} instead of {found.steps[0]}.",
        f"The same micro-batches make {updates}.",
        CAUTION,
    ]


def rows(found: Comparison) -> list[tuple[str, ...]]:
    """The decisions that change the window otherwise: update, recorded, now, and the reason now."""
    lines = [_row(one) for one in found.changes]
    if len(lines) <= MAX_ROWS:
        return lines
    half = MAX_ROWS // 2
    return [*lines[:half], ("...",) * len(COLUMNS), *lines[-half:]]


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Read settings written as NAME=VALUE.

    Raises:
        ValueError: a text is not of this form, there is no such setting, or the value is no such.

    Example:
        >>> parse_changes(["max_accumulation_steps=16", "verify=false", "max_norm=inf"])
        {'max_accumulation_steps': 16, 'verify': False, 'max_norm': inf}
    """
    kinds = {item.name: str(item.type) for item in fields(NoiseConfig)}
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is no setting: write NAME=VALUE")
        if name not in kinds:
            raise ValueError(f"there is no setting {name!r}: it must be one of {', '.join(kinds)}")
        changes[name] = _value(value, kinds[name])
    return changes


def _value(text: str, kind: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for number in (int, float):
        if number.__name__ in kind:
            try:
                return number(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is not of type {number.__name__}") from error
    return text


def _row(one: Replayed) -> tuple[str, ...]:
    recorded, again = (f"{d.action} {d.accumulation_steps}" for d in (one.recorded, one.again))
    return (str(one.again.num_updates), recorded, again, one.again.reason)
