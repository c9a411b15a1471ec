"""A live run in the terminal: `noiseopt watch RUN`."""

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from noiseopt.control import Decision, NoiseConfig, Start
from noiseopt.record.parts import parts
from noiseopt.record.tail import Tail
from noiseopt.report.facts import noise_facts
from noiseopt.report.phrases import change
from noiseopt.report.verdict import verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

KEPT, SHOWN_CHANGES, WIDTH = 5000, 6, 48
FACTS_HEIGHT = 23  # lines, of 80 columns, that all else takes
BARS = "▁▂▃▄▅▆▇█"
STALE = 60.0  # seconds without a decision, after which it is said for how long
NEEDS_RICH = "rich is missing: pip install 'noiseopt[demo]'"


class Watch:
    """What is known of a run by now.

    Args:
        path: its record, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail = Tail(path)
        self._config: NoiseConfig | None = None
        self._decisions: deque[tuple[Decision, float]] = deque(maxlen=KEPT)

    def look(self) -> None:
        """Take in what was decided since the last look.

        Raises:
            ValueError: the record is damaged.
        """
        for item, at in self._tail.new():
            if isinstance(item, Start):
                self._config = item.config
                self._go_back(item.state.num_windows)
            else:
                self._decisions.append((item, at))

    def _go_back(self, num_windows: int) -> None:
        """Forget what a resumed run decides anew, or what is told again."""
        while self._decisions and self._decisions[-1][0].num_windows > num_windows:
            self._decisions.pop()

    def view(self, now: float, height: int = 40) -> "RenderableType":
        """The run as a panel for rich.

        Args:
            now: seconds since 1970.
            height: lines of the terminal; in a low one fewer changes are shown.
        """
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        title = Text(f"Run {self.path.parent.resolve().name}")
        if not self._decisions or self._config is None:
            text = Text(f"No decision yet in {self.path}")
            return Panel(text, title=title, title_align="left")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, text_ in self.facts(now):
            table.add_row(Text(name), Text(text_))
        shown = min(max(height - FACTS_HEIGHT, 1), SHOWN_CHANGES)
        changed = [one for one, _ in self._decisions if one.action != "hold"]
        lines = (change(one) for one in changed[-shown:])
        changes = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        heading = Text("Latest changes" if changes else "No change yet", style="bold")
        return Panel(Group(table, Text(), heading, *changes), title=title, title_align="left")

    def facts(self, now: float) -> list[tuple[str, str]]:
        """Names and texts of what is known; there must be a decision."""
        assert self._config is not None
        decisions = [decision for decision, _ in self._decisions]
        last, at = self._decisions[-1]
        rate = f"{last.lr:.3g} by the schedule, times {last.rates.lr:.3g}"
        norm = "skipped" if last.grad_norm is None else f"{last.grad_norm:.4g}"
        return [
            ("updates", f"{last.num_updates}{self._speed()}{_age(now - at)}"),
            (last.unit, f"{last.samples_seen:.10g}"),
            *noise_facts(last.noise, self._config),
            ("", sparkline([d.noise.scale if d.noise else math.nan for d in decisions])),
            ("window", f"{last.accumulation_steps}, a batch of {last.batch:.4g} {last.unit}"),
            ("learning rate", f"{rate} ({last.phase})"),
            ("gradient norm", f"{norm}, {_clipping(last.max_norm)}"),
            ("clipped", f"{last.total_clipped}, and {last.total_skipped} skipped"),
            ("loss", "not reported" if last.loss is None else f"{last.loss:.4f}"),
            ("", sparkline([math.nan if d.loss is None else d.loss for d in decisions])),
            ("now", f"{last.action}: {last.reason}"),
            ("verdict", verdict(last, self._config)),
        ]

    def _speed(self) -> str:
        """Updates in a second over the last decisions."""
        recent = min(len(self._decisions), 20)
        (first, began), (last, ended) = self._decisions[-recent], self._decisions[-1]
        if ended <= began:
            return ""
        return f", {(last.num_updates - first.num_updates) / (ended - began):.3g} a second"


def watch(path: Path, seconds: float = 1.0, once: bool = False) -> None:
    """Show a run until it is interrupted.

    Args:
        path: its record. In a terminal it need not be there yet.
        seconds: the time between two looks.
        once: show what is known by now, and return; so too where the output is no terminal.

    Raises:
        ModuleNotFoundError: rich is missing; says what to install.
        ValueError: the record is damaged.
        FileNotFoundError: there is none, and it is not waited for.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDS_RICH) from error
    run, console = Watch(path), Console(highlight=False)
    run.look()
    if once or not console.is_terminal:
        if not parts(path):
            raise FileNotFoundError(f"there is no record {path}")
        console.print(run.view(time.time()))
        return
    with Live(run.view(time.time(), console.height), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            run.look()
            live.update(run.view(time.time(), console.height), refresh=True)


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of bars, each the mean of its share; a blank where none is finite.

    Example:
        >>> sparkline([1.0, 2.0, math.nan, 8.0])
        '▁▂ █'
    """
    width = min(len(values), WIDTH)
    ends = [len(values) * index // max(width, 1) for index in range(width + 1)]
    means = [_mean(values[low:high]) for low, high in pairwise(ends)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    unit = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((m - low) / unit)] if math.isfinite(m) else " " for m in means)


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _clipping(max_norm: float) -> str:
    return f"clipped above {max_norm:.4g}" if math.isfinite(max_norm) else "not clipped"


def _age(seconds: float) -> str:
    return f"; the latest decision is {seconds:.0f} s old" if seconds > STALE else ""
