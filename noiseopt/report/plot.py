"""A run as one picture: the figures of the page for where a page cannot go, as PNG."""

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from noiseopt.report.decimate import Floats, keep
from noiseopt.report.figures import cost_of
from noiseopt.report.fixed_batch import Cost
from noiseopt.report.look import printable
from noiseopt.report.losses import usual_range
from noiseopt.report.panels import MAX_GROUPS, MAX_SPIKES, changes
from noiseopt.report.run import ACTION, Rows, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "matplotlib is missing: pip install 'noiseopt[demo]'"
OURS, THEIRS, BOUND = "tab:blue", "tab:gray", "tab:red"
ARMS = (THEIRS, OURS, "tab:orange")
MARKS = {"grow": ("^", "tab:green"), "shrink": ("v", "tab:purple"), "revert": ("X", BOUND)}

Draw = Callable[["Axes", Run], None]


def plot(path: Path, run: Run) -> None:
    """Draw a run into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    over_samples: list[tuple[Draw, float]] = [
        (_noise, 1.6),
        (_loss, 1.4),
        (_rate, 0.8),
        (_norm, 1.3),
    ]
    if run.groups.names:
        over_samples.append((_groups, 1.3))
    fixed = cost_of(run)
    ratios = [share for _, share in over_samples] + ([1.3] if fixed else [])
    figure = Figure(figsize=(8, 2 + 1.7 * sum(ratios)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(f"Run {run.name}"))
    grid = figure.add_gridspec(len(ratios), 2, height_ratios=ratios)
    first: Axes | None = None
    for row, (draw, _) in enumerate(over_samples):
        axis = figure.add_subplot(grid[row, :], sharex=first)
        first = first or axis
        draw(axis, run)
        _finish(axis, last=row == len(over_samples) - 1)
    axis.set_xlabel(_plain(f"{run.unit} seen"))
    if fixed:
        _fixed(figure.add_subplot(grid[-1, 0]), fixed, fixed.updates, fixed.own_updates, "updates")
        axis = figure.add_subplot(grid[-1, 1])
        _fixed(axis, fixed, fixed.samples, fixed.own_samples, _plain(run.unit))
    figure.savefig(path, dpi=120)


def _finish(axis: "Axes", last: bool) -> None:
    axis.grid(alpha=0.3)
    axis.tick_params(labelbottom=last)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", fontsize="small")


def _drawn(rows: Rows, name: str) -> tuple[Floats, Floats]:
    """A decimated curve; what is not finite is a gap."""
    rows = rows[keep(rows[name])]
    return rows["samples"], np.where(np.isfinite(rows[name]), rows[name], np.nan)


def _noise(axis: "Axes", run: Run) -> None:
    """The scale, its interval and the batch; an infinite upper end reaches the top."""
    rows = run.decisions
    known = rows[~np.isnan(rows["scale_low"])]
    named = np.concatenate(
        [rows[name] for name in ("scale", "scale_low", "scale_high", "batch", "decided")]
    )
    ends = named[np.isfinite(named) & (named > 0)]
    axis.set_ylabel(_plain(f"noise scale ({run.unit})"))
    if not len(known):
        axis.text(0.5, 0.5, "unknown", transform=axis.transAxes, ha="center")
    if not len(ends):
        return
    bottom, top = ends.min() / 1.5, ends.max() * 1.5
    if len(known):
        kept = np.union1d(keep(known["scale_low"]), keep(known["scale_high"]))
        band = (np.clip(known[name][kept], bottom, top) for name in ("scale_low", "scale_high"))
        axis.fill_between(
            known["samples"][kept], *band, color=OURS, alpha=0.2, lw=0, label="interval"
        )
        axis.plot(*_positive(*_drawn(known, "scale")), color=OURS, label="noise scale")
    batch = _drawn(rows, "batch")
    axis.plot(*batch, color="black", ls="--", lw=1, drawstyle="steps-post", label="batch")
    changed = rows[changes(run)]
    for action, (marker, color) in MARKS.items():
        made = changed[changed["action"] == ACTION[action]]
        if len(made):
            axis.plot(made["samples"], made["decided"], marker, color=color, label=action)
    _log(axis)
    axis.set_ylim(bottom, top)


def _loss(axis: "Axes", run: Run) -> None:
    axis.set_ylabel("loss")
    if not run.losses:
        known = run.decisions[np.isfinite(run.decisions["loss"])]
        axis.plot(*_drawn(known, "loss"), color=OURS)
        return
    for number, (arm, table) in enumerate(run.losses.items()):
        color = ARMS[min(number, len(ARMS) - 1)]
        kept = keep(table.training)
        axis.plot(table.samples[kept], table.training[kept], color=color, alpha=0.35, lw=0.8)
        known = np.isfinite(table.held_out)
        label = _plain(f"{arm}, held out")
        line = table.samples[known], table.held_out[known]
        axis.plot(*line, "o-", color=color, ms=3, label=label)
    usual = usual_range([table.training for table in run.losses.values()])
    if usual:
        axis.set_ylim(*usual)


def _rate(axis: "Axes", run: Run) -> None:
    axis.set_ylabel("rate times")
    axis.plot(*_drawn(run.decisions, "factor"), color=OURS, drawstyle="steps-post")
    axis.set_ylim(bottom=0)


def _norm(axis: "Axes", run: Run) -> None:
    axis.set_ylabel("gradient norm")
    windows = run.windows
    axis.plot(*_drawn(windows, "norm"), color=OURS, lw=0.6, label="before clipping")
    label = "clipped at, advised" if run.advised else "clipped at"
    limits = _drawn(windows, "max_norm")
    axis.plot(*limits, color=BOUND, ls="--", lw=1, drawstyle="steps-pre", label=label)
    spikes = windows[windows["clipped"]]
    spikes = spikes[keep(spikes["norm"], MAX_SPIKES)]
    if len(spikes):
        line = spikes["samples"], spikes["norm"]
        axis.plot(*line, "o", color=BOUND, ms=3, mfc="none", mew=0.6, label="clipped")
    skipped = windows["samples"][windows["skipped"]]
    for number, seen in enumerate(skipped[keep(skipped, MAX_SPIKES)]):
        axis.axvline(seen, color="tab:orange", lw=0.6, label=None if number else "not finite")
    if (windows["norm"] > 0).any():
        _log(axis)


def _groups(axis: "Axes", run: Run) -> None:
    axis.set_ylabel(_plain(f"noise scale ({run.unit})"))
    scales = run.groups.scale
    for number, name in list(enumerate(run.groups.names))[:MAX_GROUPS]:
        kept = keep(scales[:, number])
        line = _positive(run.decisions["samples"][kept], scales[kept, number])
        axis.plot(*line, label=_plain(f"group {name}"))
    if (scales > 0).any():
        _log(axis)


def _fixed(axis: "Axes", one: Cost, needed: Floats, own: float, counted: str) -> None:
    axis.loglog(one.batches, needed, color=OURS)
    axis.plot([one.own_batch], [own], "D", color=OURS, ms=5, label="this run")
    axis.set_xlabel("fixed batch")
    axis.set_title(f"{counted} needed", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _positive(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    return x, np.where(y > 0, y, np.nan)


def _plain(text: str) -> str:
    """A text that is not too long, and in which matplotlib sees no formula."""
    return shorten(printable(text), 60, placeholder=" ...").replace("$", r"\$")


def _log(axis: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
