"""A run's record as a table and a picture: `noiseopt report RUN`."""

from pathlib import Path

from noiseopt.record import Record, read
from noiseopt.report.facts import change as change
from noiseopt.report.facts import facts as facts
from noiseopt.report.facts import verdict as verdict
from noiseopt.report.plot import plot as plot
from noiseopt.report.plot import read_losses as read_losses
from noiseopt.report.table import show as show

RECORD, LOSSES, PICTURE = "decisions.jsonl", "losses.csv", "plot.png"


def read_run(folder: Path) -> Record:
    """Read the record in a run's folder.

    Raises:
        FileNotFoundError: there is none; says how one is made.
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {RECORD}: give the folder of a run that was recorded, such as those "
            "of `noiseopt demo`, or record your own with noiseopt.record.DecisionLog"
        )
    return read(path)


def draw(folder: Path, record: Record | None) -> Path:
    """Draw the picture of a run from what its folder holds; returns its path."""
    decisions = record.decisions if record else ()
    plot(
        folder / PICTURE,
        decisions,
        read_losses(folder / LOSSES),
        title=f"Run {folder.resolve().name}",
    )
    return folder / PICTURE


def report(folder: Path) -> Path:
    """Print the facts of a run and draw its picture; returns the picture's path."""
    record = read_run(folder)
    show(f"Run {folder}", ("", ""), facts(record))
    return draw(folder, record)
