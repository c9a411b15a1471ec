"""The files of a record: the newest under its own name, older ones numbered, each of whole lines.

`decisions.jsonl` is the newest, `decisions.part1.jsonl` the one before. What a resumed run decides
anew is moved out of them, into `decisions.superseded.jsonl`.
"""

import re
from pathlib import Path

from noiseopt.record.lines import parse


def parts(path: Path) -> list[Path]:
    """The files of a record that are there, oldest first."""
    return [_numbered(path, number) for number in reversed(_numbers(path))]


def check_first_line(path: Path) -> None:
    """See that a file, if there is one, begins as a record does.

    Raises:
        ValueError: it does not; names the file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of a file in it")
    if not path.exists():
        return
    with path.open("rb") as file:
        line = file.readline()
    try:
        if line.endswith(b"\n"):
            parse(line)
    except ValueError as error:
        raise ValueError(f"{path} cannot be gone on with: {error}") from error


def rotate(path: Path, keep: int) -> None:
    """Give every file the next number; at most `keep` numbered ones stay."""
    for number in reversed(_numbers(path)):
        if number >= keep:
            _numbered(path, number).unlink()
        else:
            _numbered(path, number).replace(_numbered(path, number + 1))


def superseded(path: Path) -> Path:
    """Where lines go that are no longer part of a record."""
    return path.with_suffix(f".superseded{path.suffix}")


def go_back(path: Path, num_windows: int) -> int:
    """Move what was recorded after so many windows, and a line that was cut short, out of a record.

    Returns:
        How many lines were moved.

    Raises:
        ValueError: a line is damaged.
    """
    moved = 0
    while files := parts(path):
        newest = files[-1]
        lines = newest.read_bytes().splitlines(keepends=True)
        whole = len(lines)
        while whole and not _stays(lines[whole - 1], num_windows):
            whole -= 1
        _keep(superseded(path), lines[whole:])
        moved += len(lines) - whole
        if whole:
            with newest.open("r+b") as file:
                file.truncate(sum(map(len, lines[:whole])))
            break
        newest.unlink()
    first = next(iter(_numbers(path)), 0)
    for number in _numbers(path):
        _numbered(path, number).replace(_numbered(path, number - first))
    return moved


def _numbers(path: Path) -> list[int]:
    """The numbers of the files that are there, 0 for the newest."""
    pattern = re.compile(rf"{re.escape(path.stem)}(?:\.part(\d+))?{re.escape(path.suffix)}")
    if not path.parent.is_dir():
        return []
    matches = (pattern.fullmatch(file.name) for file in path.parent.iterdir())
    return sorted(int(match[1] or 0) for match in matches if match)


def _numbered(path: Path, number: int) -> Path:
    return path.with_suffix(f".part{number}{path.suffix}") if number else path


def _keep(path: Path, lines: list[bytes]) -> None:
    if lines:
        with path.open("ab") as file:
            file.writelines(line.removesuffix(b"\n") + b"\n" for line in lines)


def _stays(line: bytes, num_windows: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    values = parse(line)
    try:
        if values["kind"] == "start":
            return bool(values["state"]["num_windows"] < num_windows)
        return bool(values["num_windows"] <= num_windows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{line[:40]!r} does not say how many windows there were") from error
