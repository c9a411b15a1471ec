"""A recorded run beside the same run decided again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noiseopt.record import Record, Replayed, replay


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run beside the same run decided again.

    Attributes:
        decisions: how many were decided again.
        differ: those that came out otherwise, evidence and reason included.
        changes: those at which either changes the window, unless both do so alike.
        recorded_updates: updates in what was recorded.
        updates: updates that its micro-batches make in the windows decided now.
        steps: the windows at the end, as recorded and as decided now.
    """

    decisions: int
    differ: Sequence[Replayed]
    changes: Sequence[Replayed]
    recorded_updates: int
    updates: float
    steps: tuple[int, int]


def compare(record: Record, changes: Mapping[str, Any] | None = None) -> Comparison:
    """Decide a run again and count what differs.

    Raises:
        ValueError: a changed setting is out of range, or there are no decisions.
        TypeError: there is no such setting, or its value is of the wrong type.
    """
    again = list(replay(record, changes))
    if not again:
        raise ValueError("the record holds no decision: there is nothing to decide again")
    last, ruling = again[-1], [None, *again]
    return Comparison(
        decisions=len(again),
        differ=[one for one in again if not one.same],
        changes=[one for one in again if _moves(one)],
        recorded_updates=sum(map(_recorded_updates, again)),
        updates=sum(_updates(*pair) for pair in zip(again, ruling, strict=False)),
        steps=(last.recorded.accumulation_steps, last.again.accumulation_steps),
    )


def _recorded_updates(one: Replayed) -> int:
    return sum(window.applied for window in one.recorded.windows)


def _updates(one: Replayed, ruling: Replayed | None) -> float:
    """Updates that the micro-batches up to a decision make in the windows decided before it."""
    if ruling is None or not ruling.again.applied:
        return _recorded_updates(one)
    own, recorded = ruling.again, ruling.recorded
    if recorded.applied and own.accumulation_steps == recorded.accumulation_steps:
        return _recorded_updates(one)
    taken = sum(window.micro_batches - window.skipped for window in one.recorded.windows)
    return taken / own.accumulation_steps


def _moves(one: Replayed) -> bool:
    deeds = {(d.action, d.accumulation_steps) for d in (one.recorded, one.again)}
    return len(deeds) > 1 and {action for action, _ in deeds} != {"hold"}
