"""A run's record as tables, a picture and a page: `noiseopt report RUN [RUN ...]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from noiseopt.record import Record, read
from noiseopt.record.parts import parts
from noiseopt.report.decision_table import write_csv
from noiseopt.report.facts import facts as facts
from noiseopt.report.losses import read_losses as read_losses
from noiseopt.report.page import write_page
from noiseopt.report.phrases import change as change
from noiseopt.report.plot import plot
from noiseopt.report.run import Run
from noiseopt.report.table import show as show
from noiseopt.report.verdict import verdict as verdict

RECORD, LOSSES, SUFFIX = "decisions.jsonl", "losses.csv", ".jsonl"
PAGE, PICTURE, TABLE = "report.html", "plot.png", "decisions.csv"


def record_of(run: Path) -> Path:
    """The record of a run, which may be given by its folder or be given itself."""
    return run if run.suffix == SUFFIX else run / RECORD


def read_run(run: Path) -> Record:
    """Read the record of a run, given by its folder or itself.

    Raises:
        FileNotFoundError: there is none; says how one is made.
        ValueError: it is damaged.
    """
    path = record_of(run)
    if not parts(path):
        raise FileNotFoundError(
            f"there is no record {path}: give the folder of a run that was recorded, such as those "
            "of `noiseopt demo`, or record your own with noiseopt.record.DecisionLog"
        )
    return read(path)


def report(runs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Print the facts of some runs, and write all that `write` does; returns the files.

    Args:
        runs: the runs' folders, or their records.
        out: where the page goes; a folder, or the page itself.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: a record or a loss table is damaged, or the page would replace a record.
        ModuleNotFoundError: what draws is missing; says what to install.
    """
    page = _page_of(out, runs)
    records = {run: read_run(run) for run in runs}
    for run, record in records.items():
        show(f"Run {run}", ("", ""), facts(record))
    return write(records, page)


def write(records: Mapping[Path, Record | None], page: Path | None = None) -> list[Path]:
    """Write one page of some runs, and of each its table and its picture; returns the files.

    Args:
        records: the record of each run, by its folder or its path; None if nothing was recorded.
        page: the page; beside the first run's record if not given. Pictures and tables lie beside
            the records of their runs.

    Raises:
        ValueError: a loss table is damaged.
        ModuleNotFoundError: matplotlib, which draws pictures, is missing; says what to install.
    """
    names = _names(list(records))
    runs = {
        path: Run.of(name, record, read_losses(_beside(path, LOSSES)))
        for (path, record), name in zip(records.items(), names, strict=True)
    }
    written = [_beside(next(iter(records)), PAGE) if page is None else page]
    write_page(written[0], list(runs.values()))
    for path, record in records.items():
        if record is not None:
            written.append(_beside(path, TABLE))
            write_csv(written[-1], record.stretches)
    for path, run in runs.items():
        written.append(_beside(path, PICTURE))
        plot(written[-1], run)
    return written


def _page_of(out: Path | None, runs: Sequence[Path]) -> Path | None:
    """Where the page goes; what is no name of a page is the name of a folder."""
    if out is None:
        return None
    if out.suffix == SUFFIX or out.resolve() in [record_of(run).resolve() for run in runs]:
        raise ValueError(f"{out} is a record's name: give the page another")
    page = out if out.suffix else out / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    return page


def _beside(run: Path, name: str) -> Path:
    """A file of a run: beside its record, and named after that if it is not the usual one."""
    record = record_of(run)
    return record.with_name(name if record.name == RECORD else f"{record.stem}.{name}")


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of their folders, and of records that are not the usual; paths where two agree."""
    records = [record_of(run).resolve() for run in runs]
    names = [path.parent.name if path.name == RECORD else path.stem for path in records]
    return names if len(set(names)) == len(names) else list(map(str, runs))
