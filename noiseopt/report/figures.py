"""The interactive figures of runs, as plain values that plotly.js draws."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from noiseopt.report.fixed_batch import Cost, cost
from noiseopt.report.look import Look, Panel, Trace, inert, looks
from noiseopt.report.panels import (
    group_panel,
    loss_panel,
    noise_panel,
    norm_panel,
    rate_panel,
    unit_of,
)
from noiseopt.report.run import Run

GAP, TOP, BOTTOM = 62, 52, 52  # pixels between the panels, above and below them
LEGEND = 28  # above all panels, where it names runs
GRID = "rgba(128,134,145,0.22)"
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13}
# keeps the place of a panel in which nothing is drawn
EMPTY: Trace = {"type": "scatter", "x": [0], "y": [None], "showlegend": False, "hoverinfo": "skip"}

Figure = dict[str, Any]


def figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """All figures of a page by their names; what a fixed batch costs only if it is known."""
    found = {"timeline": timeline(runs)}
    known = [(look, one) for look in looks(runs) if (one := cost_of(look.run)) is not None]
    if known:
        unit = inert(unit_of(runs))
        found["updates"] = _costs(known, "Updates", unit)
        found["samples"] = _costs(known, unit.capitalize(), unit)
    return found


def cost_of(run: Run) -> Cost | None:
    """What fixed batches would have cost in place of a run; None if its noise was never known."""
    rows = run.decisions
    return cost(rows["updates_since"], rows["samples_since"], rows["scale"])


def timeline(runs: Sequence[Run]) -> Figure:
    """Everything over the samples seen, in panels with one horizontal axis."""
    seen = looks(runs)
    panels = [noise_panel(seen), loss_panel(seen), rate_panel(seen), norm_panel(seen)]
    if any(run.groups.names for run in runs):
        panels.append(group_panel(seen))
    alone = len(runs) == 1
    inner = sum(panel.height for panel in panels) + GAP * (len(panels) - 1)
    margin = {"l": 62, "r": 18, "t": TOP + (0 if alone else LEGEND), "b": BOTTOM}
    layout = _layout(inner + margin["t"] + BOTTOM) | {"margin": margin}
    layout["xaxis"] = _axis(f"{inert(unit_of(runs))} seen", tickformat="~s") | {
        "anchor": f"y{len(panels)}",
        "rangemode": "tozero",
        "showspikes": True,
        "spikemode": "across",
        "spikesnap": "cursor",
        "spikethickness": 1,
        "spikecolor": GRID,
        "spikedash": "solid",
    }
    traces: list[Trace] = []
    above = 0.0
    for number, panel in enumerate(panels, start=1):
        top = 1 - above / inner
        bottom = top - panel.height / inner
        above += panel.height + GAP
        axis = "" if number == 1 else str(number)
        layout[f"yaxis{axis}"] = _axis(log=panel.log) | panel.axis
        layout[f"yaxis{axis}"]["domain"] = [max(bottom, 0.0), top]
        layout["annotations"] += _words(panel, top, bottom, alone)
        shown = [trace for trace in panel.traces if len(trace["x"])] or [EMPTY]
        own = {"yaxis": f"y{axis}"}
        if alone and any(trace["showlegend"] for trace in shown):
            layout[f"legend{axis}"] = _legend(top, "right")
            own["legend"] = f"legend{axis}"
        traces += [trace | own for trace in shown]
    if not alone and any(trace["showlegend"] for trace in traces):
        layout["legend"] = _legend(1 + LEGEND / inner, "left")
    return {"data": traces, "layout": layout}


def _words(panel: Panel, top: float, bottom: float, alone: bool) -> Iterator[dict[str, Any]]:
    """A panel's title, what its lines mean, and what is said where nothing is drawn."""
    place = {"xref": "paper", "yref": "paper", "showarrow": False}
    key = "" if alone else f"  <span style='font-size:12px'>{panel.key}</span>"
    left = {"x": 0, "xanchor": "left", "y": top, "yanchor": "bottom", "yshift": 4}
    yield place | left | {"text": f"<b>{panel.title}</b>{key}"}
    if panel.note:
        middle = {"x": 0.5, "y": (top + bottom) / 2}
        yield place | middle | {"text": panel.note, "name": "note"}


def _costs(known: Sequence[tuple[Look, Cost]], counted: str, unit: str) -> Figure:
    """What fixed batches would have cost in one currency, with each run's own point."""
    traces = [trace for look, one in known for trace in _cost(look, one, counted)]
    layout = _layout(330) | {"margin": {"l": 62, "r": 18, "t": 34, "b": BOTTOM}}
    layout["xaxis"] = _axis(f"fixed batch ({unit})", log=True)
    layout["yaxis"] = _axis(log=True)
    place = {"xref": "paper", "yref": "paper", "showarrow": False}
    left = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "yshift": 4}
    layout["annotations"] = [place | left | {"text": f"<b>{counted} needed</b>"}]
    layout["showlegend"] = False
    return {"data": traces, "layout": layout}


def _cost(look: Look, one: Cost, counted: str) -> Iterator[Trace]:
    in_updates = counted == "Updates"
    needed = one.updates if in_updates else one.samples
    own = one.own_updates if in_updates else one.own_samples
    unit = inert(look.run.unit)
    text = [
        f"a fixed batch of {batch:.3g}<br>{updates:,.0f} updates, {samples:,.0f} {unit}"
        for batch, updates, samples in zip(one.batches, one.updates, one.samples, strict=True)
    ]
    style = {"color": look.color, "width": 2}
    yield look.trace("fixed batch", one.batches, needed, text, line=style)
    marker = {"symbol": "diamond", "size": 11, "color": look.color}
    told = f"this run<br>mean batch {one.own_batch:.3g}<br>{own:,.0f} {counted.lower()}"
    point = np.array([one.own_batch]), np.array([own])
    yield look.trace("this run", *point, [told], mode="markers", marker=marker)


def _layout(height: int) -> Figure:
    return {
        "height": height,
        "autosize": True,
        "font": FONT,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverdistance": 24,
        "hoverlabel": {"align": "left", "font": FONT},
        "annotations": [],
        "modebar": {"orientation": "h", "bgcolor": "rgba(0,0,0,0)"},
    }


def _axis(title: str = "", log: bool = False, tickformat: str = "") -> dict[str, Any]:
    return {
        **({"tickformat": tickformat} if tickformat else {"exponentformat": "SI"}),
        "title": {"text": title, "standoff": 10},
        "gridcolor": GRID,
        "linecolor": GRID,
        "showline": True,
        "zeroline": False,
        "automargin": False,
        "nticks": 4 if log else 8,  # plotly labels 2 and 5 between the powers, or all up to 9
        **({"type": "log"} if log else {}),
    }


def _legend(top: float, side: str) -> dict[str, Any]:
    return {
        "orientation": "h",
        "x": 0 if side == "left" else 1,
        "xanchor": side,
        "y": top,
        "yanchor": "bottom",
        "bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12},
    }
