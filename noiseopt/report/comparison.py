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
    last, windows = again[-1], [one.recorded.windows for one in again]
    taken = [sum(one.micro_batches - one.skipped for one in some) for some in windows]
    # A decision rules the windows after it; of those before the first, nothing else was decided.
    ruling = [taken[0] / max(len(windows[0]), 1), *(one.again.accumulation_steps for one in again)]
    return Comparison(
        decisions=len(again),
        differ=[one for one in again if not one.same],
        changes=[one for one in again if _moves(one)],
        recorded_updates=sum(window.applied for some in windows for window in some),
        updates=sum(number / max(steps, 1) for number, steps in zip(taken, ruling, strict=False)),
        steps=(last.recorded.accumulation_steps, last.again.accumulation_steps),
    )


def _moves(one: Replayed) -> bool:
    deeds = {(d.action, d.accumulation_steps) for d in (one.recorded, one.again)}
    return len(deeds) > 1 and {action for action, _ in deeds} != {"hold"}
