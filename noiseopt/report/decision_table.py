"""The decisions of a run as a table, decisions.csv: a row for each, its numbers named as metrics.

What is unknown or not finite is empty.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from noiseopt.control import Decision
from noiseopt.control.metrics import metrics
from noiseopt.record import Stretch

WORDS = ("update", "action", "reason")


def write_csv(path: Path, stretches: Sequence[Stretch]) -> None:
    """Write the decisions of a run, with the names that parameter groups had at the time."""
    columns = dict.fromkeys(name for _, values in _rows(stretches) for name in values)
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow([*WORDS, *columns])
        for decision, values in _rows(stretches):
            words = map(_word, (decision.action, decision.reason))
            numbers = [values.get(column, "") for column in columns]
            table.writerow([decision.num_updates, *words, *numbers])


def _rows(stretches: Iterable[Stretch]) -> Iterator[tuple[Decision, dict[str, float]]]:
    for stretch in stretches:
        for decision in stretch.decisions:
            yield decision, metrics(decision, stretch.start.groups)


def _word(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
