"""A run as arrays: one row for each decision, one for each window, in the order they were made.

This is what the page and the picture are drawn from. Whatever is unknown is nan, a threshold or a
bound that is open is infinite, and all norms are plain, not squared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from noiseopt.control import Decision, Window
from noiseopt.control.decision import ACTIONS
from noiseopt.record import Record, Stretch
from noiseopt.report.facts import summary, verdict_of
from noiseopt.report.losses import Losses

DECISION = np.dtype(
    [
        ("samples", "f8"),  # seen by then
        ("updates", "f8"),  # applied by then
        ("samples_since", "f8"),  # since the decision before
        ("updates_since", "f8"),
        ("scale", "f8"),
        ("scale_low", "f8"),
        ("scale_high", "f8"),
        ("batch", "f8"),  # in samples, of the windows that follow
        ("decided", "f8"),  # the same as it was decided, or advised
        ("steps", "i4"),  # that batch in micro-batches
        ("factor", "f8"),  # on the learning rate
        ("max_norm", "f8"),  # the clipping threshold from here on
        ("loss", "f8"),
        ("action", "i1"),  # a position in ACTIONS
        ("applied", "?"),
    ]
)
WINDOW = np.dtype(
    [
        ("samples", "f8"),  # seen by its end
        ("norm", "f8"),  # of its gradient before clipping; nan if that was not finite
        ("max_norm", "f8"),  # the threshold that the decision before it had set
        ("clipped", "?"),
        ("skipped", "?"),  # whether something in it was not finite
    ]
)
ACTION = {action: number for number, action in enumerate(ACTIONS)}

Rows = npt.NDArray[np.void]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Groups:
    """The noise of each parameter group; a row for each decision, a column for each group.

    Attributes:
        names: the groups' names.
        trace: tr(Sigma) of each group's coordinates.
        signal: |G|^2 of each group's coordinates.
    """

    names: tuple[str, ...] = ()
    trace: Floats = field(default_factory=lambda: np.empty((0, 0)))
    signal: Floats = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def scale(self) -> Floats:
        """The groups' noise scales; nan where the signal is not positive."""
        positive = self.signal > 0
        return np.where(
            positive, np.maximum(self.trace, 0) / np.where(positive, self.signal, 1), np.nan
        )


@dataclass(frozen=True, slots=True)
class Run:
    """All that is shown of a run.

    Attributes:
        name: its folder's name.
        facts: pairs of a name and a text, the changes left out.
        verdict: what can be said of its noise, in words.
        unit: what is counted: "samples" or "micro-batches".
        confidence: the level of its intervals.
        decisions: an array of `DECISION`.
        reasons: why each decision was taken.
        windows: an array of `WINDOW`.
        groups: the noise of its parameter groups, if there are several.
        losses: its loss table, by arm.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    verdict: str
    unit: str = "samples"
    confidence: float = 0.95
    decisions: Rows = field(default_factory=lambda: np.empty(0, DECISION))
    reasons: Sequence[str] = ()
    windows: Rows = field(default_factory=lambda: np.empty(0, WINDOW))
    groups: Groups = field(default_factory=Groups)
    losses: Losses = field(default_factory=dict)

    @property
    def advised(self) -> bool:
        """Whether its decisions were only advice."""
        return bool(len(self.decisions)) and not self.decisions["applied"].any()

    @classmethod
    def of(cls, name: str, record: Record | None, losses: Losses) -> "Run":
        """Take what is shown of a run out of its record; None if nothing was recorded."""
        if record is None:
            return cls(name, [], verdict_of(None), losses=losses)
        decisions, stretches = record.decisions, record.stretches
        return cls(
            name=name,
            facts=summary(record),
            verdict=verdict_of(record),
            unit=decisions[-1].unit if decisions else "samples",
            confidence=record.config.confidence,
            decisions=_rows(chain.from_iterable(map(_decision_rows, stretches)), DECISION),
            reasons=[decision.reason for decision in decisions],
            windows=_rows(chain.from_iterable(map(_window_rows, stretches)), WINDOW),
            groups=_groups(decisions, record.groups),
            losses=losses,
        )


def _rows(rows: Iterator[tuple[float, ...]], kind: np.dtype[np.void]) -> Rows:
    return np.fromiter(rows, dtype=kind)


def _decision_rows(stretch: Stretch) -> Iterator[tuple[float, ...]]:
    samples, updates = stretch.start.state.estimator.samples_seen, stretch.start.state.num_updates
    for one in stretch.decisions:
        noise = one.noise
        bounds = noise.scale_interval if noise else (math.nan, math.nan)
        yield (
            one.samples_seen,
            one.num_updates,
            one.samples_seen - samples,
            one.num_updates - updates,
            noise.scale if noise else math.nan,
            *bounds,
            one.batch if one.applied else noise.batch if noise else math.nan,
            one.batch,
            one.accumulation_steps,
            one.rates.lr,
            one.max_norm,
            math.nan if one.loss is None else one.loss,
            ACTION.get(one.action, 0),
            one.applied,
        )
        samples, updates = one.samples_seen, one.num_updates


def _window_rows(stretch: Stretch) -> Iterator[tuple[float, ...]]:
    seen = stretch.start.state.estimator.samples_seen
    max_norm = stretch.start.state.max_norm
    for decision in stretch.decisions:
        for window in decision.windows:
            seen += window.norms.samples if window.norms else 0.0
            norm = _norm(window)
            skipped = window.skipped > 0 or not math.isfinite(norm)
            yield seen, norm, max_norm, window.clipped, skipped
        max_norm = decision.max_norm


def _norm(window: Window) -> float:
    norms = window.norms
    if norms is None:
        return math.nan
    norm = math.sqrt(max(sum(norms.big_sq), 0.0)) if norms.finite else math.nan
    return norm if math.isfinite(norm) else math.nan


def _groups(decisions: Sequence[Decision], names: Sequence[str]) -> Groups:
    count = max((len(one.noise.groups) for one in decisions if one.noise), default=0)
    if count < 2:
        return Groups()
    trace, signal = np.full((2, len(decisions), count), np.nan)
    for row, decision in enumerate(decisions):
        for column, group in enumerate(decision.noise.groups if decision.noise else ()):
            trace[row, column], signal[row, column] = group.trace, group.signal
    named = tuple(names) if len(names) == count else tuple(map(str, range(count)))
    return Groups(named, trace, signal)
