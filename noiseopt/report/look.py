"""How runs look in plotly: colours, curves, and text that is shown as it is.

Hover texts are written here, never by plotly's templates, which would interpret what a run's own
text holds.
"""

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from noiseopt.report.decimate import Floats
from noiseopt.report.run import Run

COLORS = ("#3b7dd8", "#d9730d", "#2a9d6f", "#c2528b", "#8a63d2", "#0f9bb0", "#a08a1f", "#b5483a")
QUIET, CLIPPED, SKIPPED = "#8b929c", "#d6453d", "#d99a1c"
LEGEND_WIDTH = 40  # characters
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """How a run is told from the others.

    Attributes:
        run: the run.
        number: its place among them.
        alone: whether it is the only one: then colours tell quantities apart, not runs.
    """

    run: Run
    number: int
    alone: bool

    @property
    def color(self) -> str:
        """The run's colour."""
        return color(self.number)

    def own(self, other: str) -> str:
        """A quantity's own colour, if there is no other run."""
        return other if self.alone else self.color

    def trace(self, name: str, x: Floats, y: Floats, text: Iterable[str], **more: Any) -> Trace:
        """A curve: alone it has its own entry in its panel's legend, else it belongs to its run's.

        Args:
            name: the quantity.
            x: the horizontal values.
            y: the vertical values; nan leaves a gap.
            text: what hovering over each point shows; our own words, or made `inert`.
            more: settings of plotly's.
        """
        who = "" if self.alone else f"<b>{inert(self.run.name)}</b><br>"
        return {
            "type": "scatter",
            "mode": "lines",
            "name": inert(name if self.alone else short(self.run.name)),
            "legendgroup": inert(name) if self.alone else f"run {self.number}",
            "showlegend": self.alone,
            "x": x,
            "y": y,
            "hoverinfo": "text",
            "hovertext": [who + line for line in text],
            **more,
        }


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the plots above each other.

    Attributes:
        title: what it shows.
        key: what its lines mean, for a legend that names runs.
        height: in pixels.
        traces: its curves, run by run.
        log: whether its vertical axis is logarithmic.
        axis: more settings of that axis.
        note: what its middle says, where there is nothing to draw.
    """

    title: str
    key: str
    height: int
    traces: Sequence[Trace]
    log: bool = False
    axis: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def looks(runs: Sequence[Run]) -> list[Look]:
    """How each of some runs looks."""
    return [Look(run, number, len(runs) == 1) for number, run in enumerate(runs)]


def color(number: int) -> str:
    """The colour of a run, by its place."""
    return COLORS[number % len(COLORS)]


def faint(shade: str, opacity: float) -> str:
    """A colour that lets others through.

    Example:
        >>> faint("#ff8000", 0.25)
        'rgba(255,128,0,0.25)'
    """
    red, green, blue = (int(shade[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def inert(text: str, width: int = 76) -> str:
    """Make a run's text literal for plotly, and break it into lines.

    Plotly reads some HTML everywhere, and fills templates like %{x} in the names of curves.

    Example:
        >>> inert("a < b & c of %{x}")
        'a &lt; b &amp; c of &#37;{x}'
    """
    lines = textwrap.wrap(printable(text), width)
    return "<br>".join(html.escape(line, quote=False).replace("%", "&#37;") for line in lines)


def short(text: str) -> str:
    """Cut a name to what a legend has a place for.

    Example:
        >>> short("a" * 50)
        'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'
    """
    return text if len(text) <= LEGEND_WIDTH else f"{text[: LEGEND_WIDTH - 3]}..."


def printable(text: str) -> str:
    r"""The text without what is no character: control codes, and bytes of file names in disguise.

    Example:
        >>> printable("a\x00b\udcffc")
        'a?b?c'
    """
    return re.sub("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f\\ud800-\\udfff\\ufffe\\uffff]", "?", text)
