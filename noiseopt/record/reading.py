"""The reader of a record, also of one whose run goes on or was killed."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from noiseopt.control import Decision, NoiseConfig, Start
from noiseopt.record.lines import from_line
from noiseopt.record.parts import parts

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decisions that follow each other from a start, with no gap.

    Attributes:
        start: what decided.
        decisions: what was decided, in order.
        times: when each was written, in seconds since 1970.
    """

    start: Start
    decisions: tuple[Decision, ...]
    times: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A record, read.

    Attributes:
        stretches: its parts, one for each start, in order; never empty.
        cut: whether the last line was cut short, as when a run is killed while it writes.
    """

    stretches: tuple[Stretch, ...]
    cut: bool = False

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All decisions that were written whole, in order."""
        return tuple(one for stretch in self.stretches for one in stretch.decisions)

    @property
    def times(self) -> tuple[float, ...]:
        """When each decision was written, in seconds since 1970."""
        return tuple(one for stretch in self.stretches for one in stretch.times)

    @property
    def config(self) -> NoiseConfig:
        """The settings that decided last."""
        return self.stretches[-1].start.config

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the parameter groups at the end."""
        return self.stretches[-1].start.groups


def read(path: PathLike) -> Record:
    """Read a record: all its files, oldest first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no record, is of another schema, or is damaged before its last line.
    """
    files = parts(Path(path)) or [Path(path)]
    stretches: list[Stretch] = []
    for file in files:
        lines = file.read_bytes().split(b"\n")
        cut = lines.pop() != b""
        stretches += _stretches(_items(file, lines))
        if not stretches:
            raise ValueError(f"{file} has no start: it is not a record, or its run ended at once")
    return Record(tuple(stretches), cut)


def _items(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[Start | Decision, float]]:
    for number, line in enumerate(lines, start=1):
        try:
            item = from_line(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if number == 1 and not isinstance(item[0], Start):
            raise ValueError(f"{path}, line 1: it is no start, with which a record begins")
        yield item


def _stretches(items: Iterable[tuple[Start | Decision, float]]) -> Iterator[Stretch]:
    start: Start | None = None
    decisions: list[tuple[Decision, float]] = []
    for item, time in items:
        if isinstance(item, Decision):
            decisions.append((item, time))
            continue
        if start is not None:
            yield _stretch(start, decisions)
        start, decisions = item, []
    if start is not None:
        yield _stretch(start, decisions)


def _stretch(start: Start, decisions: list[tuple[Decision, float]]) -> Stretch:
    return Stretch(start, tuple(d for d, _ in decisions), tuple(time for _, time in decisions))
