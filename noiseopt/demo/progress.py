"""The demo's progress on standard error, with the noise and the window as they are now."""

import math
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from noiseopt import NoiseAwareAdamW
from noiseopt.demo.train import Point


class Bars:
    """One bar for each arm; where there is no terminal, a line for each validation."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:16}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, arm: str) -> None:
        """Begin an arm."""
        self._tasks[arm] = self._progress.add_task(arm, total=self._total, state="")

    def show(self, point: Point, steps: int, optimizer: object) -> None:
        """Show where an arm is, after so many micro-batches."""
        state = f"loss {point.train_loss:.3f}"
        if isinstance(optimizer, NoiseAwareAdamW):
            state += f"  noise {_noise(optimizer)}  window {optimizer.accumulation_steps}"
        self._progress.update(self._tasks[point.arm], completed=steps, state=state)
        if self._progress.disable and not math.isnan(point.validation_loss):
            held_out = f"held out {point.validation_loss:.3f}"
            line = f"{point.arm:16} {steps:6d} of {self._total}  {state}  {held_out}"
            self._console.print(line, soft_wrap=True)


def _noise(optimizer: NoiseAwareAdamW) -> str:
    noise = optimizer.noise
    if noise is None:
        return "unknown"
    low, high = noise.scale_interval
    return f"{noise.scale:.0f} [{low:.0f}, {high:.0f}]"
