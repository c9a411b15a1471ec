"""The loss table of a run, losses.csv: a row for each time that an arm's losses were known."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

COLUMNS = ("samples", "train_loss", "validation_loss")
EARLY_SHARE = 0.05  # of the losses: the first are far above all others

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arm:
    """The losses of one of the arms of a run.

    Attributes:
        samples: seen when they were measured.
        training: the training losses.
        held_out: the losses on what was held out; nan where they were not measured.
    """

    samples: Floats
    training: Floats
    held_out: Floats


Losses = dict[str, Arm]


def read_losses(path: Path) -> Losses:
    """Read a loss table (columns arm, samples, train_loss, validation_loss) by arm; none is empty.

    A row that was cut short is left out.

    Raises:
        ValueError: a column is missing, or a cell is no number.
    """
    if not path.exists():
        return {}
    arms: dict[str, list[tuple[float, ...]]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        missing = {"arm", *COLUMNS} - set(rows.fieldnames or ())
        if rows.fieldnames and missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
        for row in rows:
            if None not in row.values():
                arms.setdefault(row["arm"], []).append(_numbers(row, path, rows.line_num))
    return {arm: Arm(*np.array(values).T) for arm, values in arms.items()}


def usual_range(losses: Sequence[Floats]) -> tuple[float, float] | None:
    """Where losses lie after the first few, with a margin; None if none is known.

    Example:
        >>> usual_range([np.array([9.0] + 19 * [2.0] + 20 * [3.0])])
        (1.9, 3.1)
    """
    later = [part[int(len(part) * EARLY_SHARE) :] for part in losses]
    known = np.concatenate([part[np.isfinite(part)] for part in later]) if later else np.empty(0)
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    margin = 0.1 * (high - low) or 0.1 * abs(low) or 1.0
    return low - margin, high + margin


def _numbers(row: dict[str, str], path: Path, line: int) -> tuple[float, ...]:
    try:
        return tuple(float(row[name] or "nan") for name in COLUMNS)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
