"""The decisions of a run as a table, decisions.csv: a row for each, its numbers named as metrics.

What is unknown or not finite is empty.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from noiseopt.control import Decision
from noiseopt.control.metrics import metrics

WORDS = ("update", "action", "reason")


def write_csv(path: Path, decisions: Sequence[Decision], groups: Sequence[str] = ()) -> None:
    """Write the decisions of a run.

    Args:
        path: the file.
        decisions: what was decided.
        groups: the names of the parameter groups.
    """
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        columns = _columns(decisions, groups)
        table.writerow([*WORDS, *columns])
        for decision in decisions:
            values = metrics(decision, groups)
            row = [values.get(column, "") for column in columns]
            table.writerow(
                [decision.num_updates, *map(_word, (decision.action, decision.reason)), *row]
            )


def _columns(decisions: Iterable[Decision], groups: Sequence[str]) -> list[str]:
    """The names of all numbers that any decision has, in their order."""
    found: dict[str, None] = {}
    for decision in decisions:
        found |= dict.fromkeys(metrics(decision, groups))
    return list(found)


def _word(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
