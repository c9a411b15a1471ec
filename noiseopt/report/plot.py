"""A run as one picture: loss, noise, window, learning rate and clipping, all over the samples."""

import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from noiseopt.control import Decision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS, BOUND = "tab:blue", "tab:gray", "tab:red"
NEEDS_EXTRA = "{} is missing: pip install 'noiseopt[demo]'"

Losses = dict[str, list[dict[str, float]]]


def read_losses(path: Path) -> Losses:
    """Read a loss table (columns arm, samples, train_loss, validation_loss) by arm; none is empty.

    A row that was cut short is left out.
    """
    arms: Losses = defaultdict(list)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if None not in row.values():
                    arm = row.pop("arm")
                    arms[arm].append({name: float(value or "nan") for name, value in row.items()})
    return dict(arms)


def plot(path: Path, decisions: Sequence[Decision], losses: Losses, title: str) -> None:
    """Draw a run into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDS_EXTRA.format("matplotlib")) from error
    figure = Figure(figsize=(8, 11), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(5, 1, sharex=True, height_ratios=(1.6, 1.6, 1, 1, 1))
    figure.suptitle(title)
    _loss(axes[0], decisions, losses)
    for axis, draw in zip(axes[1:], (_noise, _window, _rate, _norm), strict=True):
        draw(axis, decisions)
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best", fontsize="small")
    noise = next((decision.noise for decision in decisions if decision.noise), None)
    axes[-1].set_xlabel(f"{noise.unit} seen" if noise else "samples seen")
    figure.savefig(path, dpi=120)


def _samples(decisions: Iterable[Decision]) -> list[float]:
    return [decision.samples_seen for decision in decisions]


def _values(
    decisions: Iterable[Decision], value: Callable[[Decision], float | None]
) -> list[float]:
    """The finite values; nan, which is not drawn, for the others."""
    found = (value(decision) for decision in decisions)
    return [v if v is not None and math.isfinite(v) else math.nan for v in found]


def _loss(axis: "Axes", decisions: Sequence[Decision], losses: Losses) -> None:
    axis.set_ylabel("loss")
    if not losses:
        axis.plot(_samples(decisions), _values(decisions, lambda d: d.loss), color=OURS)
        return
    colors = itertools.chain((THEIRS, OURS), itertools.repeat("tab:orange"))
    for (arm, rows), color in zip(losses.items(), colors, strict=False):
        samples = [row["samples"] for row in rows]
        axis.plot(samples, [row["train_loss"] for row in rows], color=color, alpha=0.35, lw=0.8)
        held_out = [row for row in rows if math.isfinite(row["validation_loss"])]
        x, y = [row["samples"] for row in held_out], [row["validation_loss"] for row in held_out]
        axis.plot(x, y, "o-", color=color, ms=3, label=f"{arm}, held out")
    ends = [row["train_loss"] for rows in losses.values() for row in rows[len(rows) // 20 :]]
    if ends:
        low, high = min(ends), max(ends)
        axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def _noise(axis: "Axes", decisions: Sequence[Decision]) -> None:
    """The scale and its interval; an infinite upper end reaches the top of the picture."""
    axis.set_ylabel("noise scale")
    known = [(d.samples_seen, d.noise, d.batch) for d in decisions if d.noise]
    ends = [
        end
        for _, noise, batch in known
        for end in (noise.scale, *noise.scale_interval, batch)
        if 0 < end < math.inf
    ]
    if not ends:
        axis.text(0.5, 0.5, "unknown", transform=axis.transAxes, ha="center")
        return
    bottom, top = min(ends) / 1.5, max(ends) * 1.5
    samples = [s for s, _, _ in known]
    low = [max(noise.scale_interval[0], bottom) for _, noise, _ in known]
    high = [min(noise.scale_interval[1], top) for _, noise, _ in known]
    scale = [noise.scale if 0 < noise.scale < math.inf else math.nan for _, noise, _ in known]
    axis.fill_between(samples, low, high, color=OURS, alpha=0.2, lw=0, label="interval")
    axis.plot(samples, scale, color=OURS, label="noise scale")
    axis.plot(samples, [batch for _, _, batch in known], color="black", ls="--", label="batch")
    axis.set_ylabel(f"noise scale ({known[0][1].unit})")
    _log(axis)
    axis.set_ylim(bottom, top)


def _window(axis: "Axes", decisions: Sequence[Decision]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_ylabel("window")
    steps = [decision.accumulation_steps for decision in decisions]
    axis.step(_samples(decisions), steps, where="post", color=OURS, label="micro-batches")
    reverted = [decision for decision in decisions if decision.action == "revert"]
    if reverted:
        steps = [decision.accumulation_steps for decision in reverted]
        axis.plot(_samples(reverted), steps, "v", color=BOUND, label="reverted")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _rate(axis: "Axes", decisions: Sequence[Decision]) -> None:
    axis.set_ylabel("learning-rate factor")
    factors = [decision.rates.lr for decision in decisions]
    axis.step(_samples(decisions), factors, where="post", color=OURS)
    axis.set_ylim(bottom=0)


def _norm(axis: "Axes", decisions: Sequence[Decision]) -> None:
    axis.set_ylabel("gradient norm")
    samples, norms = _norms(decisions)
    axis.plot(samples, norms, color=OURS, lw=0.6, label="before clipping")
    limits = _values(decisions, lambda d: d.max_norm)
    axis.step(_samples(decisions), limits, where="post", color=BOUND, label="clipped at")
    if any(norm > 0 for norm in norms):
        _log(axis)


def _norms(decisions: Sequence[Decision]) -> tuple[list[float], list[float]]:
    """The norm of every window's gradient, and the samples seen by then."""
    samples, norms = [], []
    for decision in decisions:
        measured = [window.norms for window in decision.windows if window.norms]
        seen = decision.samples_seen - math.fsum(norm.samples for norm in measured)
        for window in measured:
            seen += window.samples
            samples.append(seen)
            norms.append(math.sqrt(math.fsum(window.big_sq)) if window.finite else math.nan)
    return samples, norms


def _log(axis: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
