"""A run's record as tables, a picture and a page: `noiseopt report RUN [RUN ...]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from noiseopt.record import Record, read
from noiseopt.report.decision_table import write_csv
from noiseopt.report.facts import facts as facts
from noiseopt.report.losses import read_losses as read_losses
from noiseopt.report.page import write_page
from noiseopt.report.phrases import change as change
from noiseopt.report.plot import plot
from noiseopt.report.run import Run
from noiseopt.report.table import show as show
from noiseopt.report.verdict import verdict as verdict

RECORD, LOSSES = "decisions.jsonl", "losses.csv"
PAGE, PICTURE, TABLE = "report.html", "plot.png", "decisions.csv"


def record_of(run: Path) -> Path:
    """The record of a run, which may be given by its folder or be given itself."""
    return run if run.suffix == ".jsonl" else run / RECORD


def read_run(folder: Path) -> Record:
    """Read the record of a run, given by its folder or itself.

    Raises:
        FileNotFoundError: there is none; says how one is made.
        ValueError: it is damaged.
    """
    path = record_of(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no record {path}: give the folder of a run that was recorded, such as those "
            "of `noiseopt demo`, or record your own with noiseopt.record.DecisionLog"
        )
    return read(path)


def report(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Print the facts of some runs, and write all that `write` does; returns the files.

    Args:
        folders: the runs' folders.
        out: where the page goes; a folder, or the page itself.

    Raises:
        FileNotFoundError: there is no record in a folder.
        ValueError: a record or a loss table is damaged.
        ModuleNotFoundError: what draws is missing; says what to install.
    """
    records = {folder: read_run(folder) for folder in folders}
    for folder, record in records.items():
        show(f"Run {folder}", ("", ""), facts(record))
    return write(records, out)


def write(records: Mapping[Path, Record | None], out: Path | None = None) -> list[Path]:
    """Write one page of some runs, and of each its table and its picture; returns the files.

    Args:
        records: the record of each run by its folder; None if nothing was recorded.
        out: where the page goes; a folder, or the page itself. The first run's folder if not
            given. Pictures and tables lie in the folders of their runs.

    Raises:
        ValueError: a loss table is damaged.
        ModuleNotFoundError: matplotlib, which draws pictures, is missing; says what to install.
    """
    names = _names(list(records))
    runs = {
        folder: Run.of(name, record, read_losses(folder / LOSSES))
        for (folder, record), name in zip(records.items(), names, strict=True)
    }
    page = out if out is not None else next(iter(records))
    written = [page / PAGE if page.is_dir() else page]
    write_page(written[0], list(runs.values()))
    for folder, record in records.items():
        if record is not None:
            write_csv(folder / TABLE, record.decisions, record.groups)
            written.append(folder / TABLE)
    for folder, run in runs.items():
        plot(folder / PICTURE, run)
        written.append(folder / PICTURE)
    return written


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; their paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))
