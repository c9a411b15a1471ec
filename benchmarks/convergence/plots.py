"""The figure of a workload: loss against updates, and against modelled time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence import arms
from benchmarks.convergence.cache import Record
from benchmarks.convergence.table import by_arm, constants, loss_of, mean_loss, modelled_time

COSTS = (0, 1, 4, 16)  # of an update, in micro-batches
MARKERS = "sv^<>DpPX*hd"


def style(arm: str, position: int) -> dict[str, Any]:
    """How an arm is drawn."""
    if arm in arms.CONSTANTS:
        return {"color": "0.4", "marker": "o", "ms": 5}
    if arm == "auto":
        return {"color": "black", "marker": "*", "ms": 13, "zorder": 9}
    marker = MARKERS[position % len(MARKERS)]
    if arms.is_ours(arm):
        return {"color": "0.2", "marker": marker, "ms": 5, "mfc": "none"}
    return {"color": f"C{position % 10}", "marker": marker, "ms": 6}


def draw(records: Sequence[Record], workload: str, split: str, path: Path) -> None:
    """Draw every arm with the means and the spreads over its seeds."""
    from matplotlib.figure import Figure

    found = {arm: seeds for arm, seeds in by_arm(records, workload, split).items() if seeds}
    figure: Any = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    main = left.subplots()
    points = {
        arm: [(record["updates"], loss_of(record)) for record in seeds.values()]
        for arm, seeds in found.items()
    }
    _points(main, points, constants(found))
    main.set(xscale="log", xlabel="updates, at equal samples", ylabel="validation loss")
    main.set_title(f"{workload}, {split} split", loc="left")
    for axis, cost in zip(right.subplots(2, 2, sharey=True).flat, COSTS, strict=True):
        times = {
            arm: [(modelled_time({0: record}, cost), loss_of(record)) for record in seeds.values()]
            for arm, seeds in found.items()
        }
        _points(axis, times, constants(found))
        axis.set_title(f"an update costs {cost} micro-batches", fontsize="small")
        axis.set_xlabel("time, in micro-batches", fontsize="small")
    _limit(main, [mean_loss(seeds) for seeds in found.values()])
    for axis in right.axes:
        axis.set_ylim(main.get_ylim())
    handles, labels = main.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _points(axis: Any, points: dict[str, list[tuple[float, float]]], line: Sequence[str]) -> None:
    """A mark with a bar for each arm, and the frontier through the constants."""
    means = {}
    for position, (arm, values) in enumerate(points.items()):
        finite = [value for value in values if math.isfinite(value[1])]
        if finite:
            x, y = (sum(column) / len(finite) for column in zip(*finite, strict=True))
            means[arm] = (x, y)
            losses = [loss for _, loss in finite]
            bar = [[y - min(losses)], [max(losses) - y]]
            axis.errorbar(x, y, yerr=bar, ls="", lw=1, label=arm, **style(arm, position))
    frontier = sorted(means[arm] for arm in line if arm in means)
    if frontier:
        axis.plot(*zip(*frontier, strict=True), color="0.6", lw=1, zorder=0)
    axis.grid(alpha=0.25)


def _limit(axis: Any, losses: Sequence[float]) -> None:
    """Leave room for what is near the best; what diverged would hide it."""
    known = [loss for loss in losses if math.isfinite(loss)]
    if known:
        low = min(known)
        axis.set_ylim(low - 0.02 * low, min(max(known) * 1.02, 1.35 * low))
