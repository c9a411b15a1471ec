"""A run's folder: what was asked for, the losses as they come, and the sums at the end."""

import csv
import itertools
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from noiseopt.demo.train import Point, Settings
from noiseopt.report import LOSSES

CONFIG, SUMMARY = "config.json", "summary.json"


def make(out: Path, name: str, force: bool) -> Path:
    """Make a folder for a run; of an earlier run's name, name-2, name-3 and so on.

    Args:
        out: the folder of all runs.
        name: the run's name.
        force: take an earlier run's place instead, and delete what it left.

    Raises:
        ValueError: the name is not that of a folder.
        FileExistsError: with `force`, what is there is not a run.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"a run's name is a folder's name without a path, not {name!r}")
    folder = out / name
    if folder.exists() and force:
        if not (folder / CONFIG).is_file():
            raise FileExistsError(f"{folder} is not a run of the demo: it is left as it is")
        shutil.rmtree(folder)
    candidates = (out / f"{name}-{number}" for number in itertools.count(2))
    while folder.exists():
        folder = next(candidates)
    folder.mkdir(parents=True)
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of settings or sums."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_settings(folder: Path, settings: Settings) -> None:
    """Keep what was asked for."""
    write_json(folder / CONFIG, asdict(settings))


class LossTable:
    """The loss table of a run, whole after every row."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LOSSES).open("x", newline="", encoding="ascii")
        self._rows = csv.DictWriter(self._file, [item.name for item in fields(Point)])
        self._rows.writeheader()

    def add(self, point: Point) -> None:
        """Add a row."""
        self._rows.writerow(asdict(point))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
