"""The end of a record that is being written: what is new since the last look."""

import os
from pathlib import Path

from noiseopt.control import Decision, Start
from noiseopt.record.lines import from_line


class Tail:
    """Reads on in a record's newest file, as whole lines come in.

    A file that was begun anew, because it was full, or that was taken back, because a run resumed
    before its end, is read from its beginning.

    Args:
        path: the record; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self._read = 0, 0

    def new(self) -> tuple[list[tuple[Start | Decision, float]], bool]:
        """What is new, each with its time, and whether it is all from the beginning.

        Raises:
            ValueError: a line is damaged, or of another schema.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                anew = status.st_ino != self._file or status.st_size < self._read
                self._file, self._read = status.st_ino, 0 if anew else self._read
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return [], False
        whole = content.rfind(b"\n") + 1
        self._read += whole
        return [from_line(line) for line in content[:whole].splitlines()], anew
