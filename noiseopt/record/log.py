"""The writer of a record: an observer that appends every decision, and never stops training."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from noiseopt.control import Decision, Start
from noiseopt.record.lines import hash_of, to_line
from noiseopt.record.parts import check_first_line, go_back, parts, rotate, superseded

PathLike = str | os.PathLike[str]


class DecisionLog:
    """An observer that appends each decision to a file, whole lines at a time.

    In a distributed run all ranks decide alike: let rank 0 write. The file is made with the first
    decision, and can be read at any time. Where it cannot be written, training goes on: there is
    one warning, and the record goes on with a new start as soon as writing succeeds.

    Args:
        path: the file to make; its folder is made too.
        resume: go on with a record that is there. What it holds beyond the state that was loaded,
            which will be decided anew, is moved into a file of its own, `….superseded.jsonl`.
        max_bytes: the size at which a file is full, and another is begun.
        keep: how many full files are kept.

    Raises:
        FileExistsError: the file exists, and `resume` is not set.
        ValueError: a number is out of range, or the file is no record that can be gone on with.

    Example:
        >>> import tempfile, noiseopt, torch
        >>> path = Path(tempfile.mkdtemp()) / "decisions.jsonl"
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = noiseopt.NoiseAwareAdamW(model.parameters())
        >>> optimizer.add_observer(DecisionLog(path))
        >>> for _ in range(22):
        ...     model(torch.randn(4, 2)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> [decision.num_updates for decision in noiseopt.record.read(path).decisions]
        [10, 20]
    """

    def __init__(
        self, path: PathLike, *, resume: bool = False, max_bytes: int = 2**28, keep: int = 3
    ) -> None:
        self.path = Path(path).absolute()
        if max_bytes < 1 or keep < 0:
            raise ValueError(
                f"max_bytes is {max_bytes} and keep is {keep}: they must be at least 1 and 0"
            )
        if not resume and parts(self.path):
            raise FileExistsError(
                f"{self.path} exists and a record is never overwritten: give another path, or "
                "resume=True to go on with it; in a distributed run let only rank 0 write"
            )
        check_first_line(self.path)
        self._max_bytes, self._keep = max_bytes, keep
        self._now: Callable[[], Start] | None = None
        self._start: Start | None = None  # what the next decision follows, until that is written
        self._is_own = resume  # whether what is there may be gone on with
        self._interrupted = self._is_damaged = False
        self._config_hash = ""
        self._warned = False

    def on_start(self, now: Callable[[], Start]) -> None:
        """Decisions begin, or begin anew: the next one is written behind a start.

        Raises:
            RuntimeError: this is the log of another optimizer.
        """
        if self._now not in (None, now):
            raise RuntimeError(
                f"{self.path} is the record of another optimizer: give each a log and a path"
            )
        self._now, self._start = now, now()

    def __call__(self, decision: Decision) -> None:
        """Append a decision.

        Raises:
            RuntimeError: it does not say what decided, for no optimizer has this as its observer.
        """
        if self._now is None:
            raise RuntimeError("a DecisionLog is given to add_observer(), which tells what decides")
        if self._is_damaged:
            return
        try:
            self._append(decision, self._now)
        except OSError as error:
            self._interrupt(f"at present: {error}")
        except ValueError as error:  # what follows a damaged line could not be read
            self._is_damaged = True
            self._interrupt(f"any more: {error}")

    def _append(self, decision: Decision, now: Callable[[], Start]) -> None:
        if self._start is not None:
            self._begin(self._start)
        elif self._interrupted:  # the windows of this decision are incomplete
            self._begin(now())
            return
        self._write(to_line(decision, self._config_hash), "ab", create=False)
        if self.path.stat().st_size >= self._max_bytes:
            rotate(self.path, self._keep)
            self._write(to_line(now()), "xb")

    def _begin(self, start: Start) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        moved = go_back(self.path, start.state.num_windows) if self._is_own else 0
        if moved and not start.state.num_windows:
            warnings.warn(
                f"a run begins where {self.path} holds another: its {moved} lines are now in "
                f"{superseded(self.path)}",
                RuntimeWarning,
                stacklevel=4,
            )
        self._write(to_line(start), "ab" if self._is_own else "xb")
        self._is_own, self._interrupted = True, False
        self._start, self._config_hash = None, hash_of(start.config)

    def _write(self, line: str, mode: str, create: bool = True) -> None:
        """Write a line at once: a file that stays closed needs no end."""
        data = line.encode("ascii") + b"\n"
        opener = None if create else _open_existing
        with open(self.path, mode, buffering=0, opener=opener) as file:
            written = file.write(data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes could be written")

    def _interrupt(self, why: str) -> None:
        self._start, self._interrupted = None, True
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"training goes on, but its decisions are not recorded in {self.path} {why}",
                RuntimeWarning,
                stacklevel=3,
            )


def _open_existing(path: str, flags: int) -> int:
    """Open a file that must be there: without its start a decision is worth nothing."""
    return os.open(path, flags & ~os.O_CREAT)
