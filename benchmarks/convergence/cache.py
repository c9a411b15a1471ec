"""Finished runs, each in a file of its own, so that none is ever repeated.

A file is written at once and whole; a run in progress holds a lock that ends with its process. So
any number of processes may share a folder, and killing one loses the run that it was at.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CODE = "code"  # of the settings, what only says which code ran them


@dataclass(frozen=True)
class Run:
    """What a result depends on.

    Attributes:
        workload: its name.
        arm: its name.
        seed: of the weights and of the order of the data.
        split: "tuning" or "reporting".
        config: everything else, as plain values.
    """

    workload: str
    arm: str
    seed: int
    split: str
    config: dict[str, Any] = field(hash=False)

    @property
    def file(self) -> str:
        """Where it is kept: one place for all versions of our code, so that the latest stays."""
        settings = {key: value for key, value in self.config.items() if key != CODE}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        arm = re.sub(r"[^\w.@=+-]", "_", self.arm)
        return f"{self.workload}/{arm}-{self.split}-{self.seed}-{digest}.json"


class Cache:
    """A folder of finished runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[int, Record]] = {}

    def get(self, run: Run) -> Record | None:
        """Its record, if it has finished with the same settings and code."""
        path = self.folder / run.file
        if not path.is_file():
            return None
        record = self._record(path)
        return record if record["config"] == run.config else None

    def put(self, run: Run, result: Record, details: Record) -> None:
        """Keep a finished run: its record, and what else is worth knowing of it."""
        content = {"record": asdict(run) | result} | details
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
        write(self.folder / run.file, text + "\n")

    def records(self) -> list[Record]:
        """Every record, sorted."""
        paths = sorted(self.folder.glob("*/*.json"))
        return sorted(map(self._record, paths), key=order)

    def _record(self, path: Path) -> Record:
        written = path.stat().st_mtime_ns
        if self._read.get(path, (0, {}))[0] != written:
            self._read[path] = written, json.loads(path.read_text())["record"]
        return self._read[path][1]

    @contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Whether this process may do a run now, or another is at it."""
        path = self.folder / (run.file + ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield self.get(run) is None
            finally:
                path.unlink(missing_ok=True)


def order(record: Record) -> tuple[Any, ...]:
    """The order of records."""
    settings = json.dumps(record["config"], sort_keys=True)
    keys = ("workload", "split", "arm", "seed")
    return (*(record[key] for key in keys), settings)


def write(path: Path, text: str) -> None:
    """Write a file at once and whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def write_records(path: Path, records: list[Record]) -> None:
    """Write records, one to a line."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    write(path, f"[\n{lines}\n]\n")
