"""The end of a record that is being written: what is new since the last look."""

import os
from pathlib import Path
from typing import BinaryIO

from noiseopt.control import Decision, Start
from noiseopt.record.lines import from_line
from noiseopt.record.parts import parts

FAR = 2**22  # bytes before the end of a file at which a first look begins
MARK = 256  # bytes before the place that was read up to, by which it is known again


class Tail:
    """Reads on in a record's newest file, as whole lines come in.

    A file that was begun anew, because it was full, or that was taken back, because a run resumed
    before its end, is read from its beginning, or from so far before its end that a look is cheap.

    Args:
        path: the record; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._read, self._mark = 0, 0, b""

    def new(self) -> list[tuple[Start | Decision, float]]:
        """What is new, each with its time; a start comes first where the file is read anew.

        Raises:
            ValueError: a line is damaged, or of another schema; names the file.
        """
        try:
            files = parts(self.path)
            known = [index for index, file in enumerate(files) if file.stat().st_ino == self._file]
            unread = files[known[0] if known else -1 :]
            lines = [line for file in unread for line in self._lines(file)]
            return [from_line(line) for line in lines]
        except FileNotFoundError:  # it is being given another name just now
            return []
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _lines(self, path: Path) -> list[bytes]:
        with path.open("rb") as file:
            first = b"" if self._goes_on(file) else self._begin(file)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read = file.tell() - len(content) + len(whole)
            self._mark = (self._mark + whole)[-MARK:]
        return (first + whole).splitlines()

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether it is the file of the last look, as it was; then go to where that look ended."""
        file.seek(self._read - len(self._mark))
        same_file = os.fstat(file.fileno()).st_ino == self._file
        return same_file and file.read(len(self._mark)) == self._mark and self._read > 0

    def _begin(self, file: BinaryIO) -> bytes:
        """Go to where reading begins; returns the first line, if that lies before."""
        status = os.fstat(file.fileno())
        self._file, self._mark = status.st_ino, b""
        file.seek(0)
        if status.st_size <= FAR:
            return b""
        first = file.readline()
        file.seek(max(status.st_size - FAR, file.tell()) - 1)
        file.readline()  # the rest of a line
        return first
