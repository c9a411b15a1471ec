"""The panels of the page: noise and batch, loss, learning rate, gradient norm, parameter groups."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from noiseopt.control.decision import ACTIONS
from noiseopt.report.decimate import Floats, Indices, evenly, keep
from noiseopt.report.look import (
    CLIPPED,
    COLORS,
    DASHES,
    QUIET,
    SKIPPED,
    Look,
    Panel,
    Trace,
    faint,
    inert,
    short,
)
from noiseopt.report.losses import usual_range
from noiseopt.report.phrases import interval
from noiseopt.report.run import ACTION, Rows, Run

MAX_CHANGES = 500  # of each run
MAX_HOLDS = 600
MAX_SPIKES = 600
MAX_GROUPS = 8
MANY = 150
BEYOND = 10.0  # what is not finite is drawn so far outside of what is seen
SYMBOLS = {"grow": "triangle-up", "shrink": "triangle-down", "revert": "x", "hold": "circle"}
ACTION_COLORS = {"grow": COLORS[2], "shrink": COLORS[4], "revert": CLIPPED, "hold": QUIET}


def noise_panel(looks: Sequence[Look]) -> Panel:
    """The noise scale with its interval, the batch, and the decisions on it."""
    low, high = _finite_range(
        look.run.decisions[name]
        for look in looks
        for name in ("scale", "scale_low", "scale_high", "batch", "decided")
    )
    traces = [trace for look in looks for trace in _noise(look, low, high)]
    known = any(np.isfinite(look.run.decisions["scale_low"]).any() for look in looks)
    return Panel(
        title=f"Noise scale and batch ({inert(unit_of([look.run for look in looks]))})",
        key="line: noise scale; band: its interval; dashed: batch; marks: decisions",
        height=330,
        traces=traces,
        log=True,
        axis={"range": [math.log10(low / 1.5), math.log10(high * 1.5)]},
        note="" if known else "the noise is unknown",
    )


def loss_panel(looks: Sequence[Look]) -> Panel:
    """The losses of the loss table, or else those that were reported."""
    traces = [trace for look in looks for trace in _losses(look)]
    shown = usual_range([trace["y"] for trace in traces if trace["meta"] == "training"])
    return Panel(
        title="Loss",
        key="thin: training; marks: held out; dotted: other arms",
        height=250,
        traces=traces,
        axis={"range": list(shown)} if shown else {},
        note="" if traces else "no loss was reported",
    )


def rate_panel(looks: Sequence[Look]) -> Panel:
    """The factor on the learning rate."""
    traces = []
    for look in looks:
        rows = _drawn(look.run.decisions, "factor")
        name = _advised(look.run, "factor")
        text = [f"{row['samples']:,.10g} seen<br>{name} {row['factor']:.4g}" for row in rows]
        style = {"shape": "hv", "color": look.color, "width": 1.8}
        traces.append(look.trace(name, rows["samples"], rows["factor"], text, line=style))
    return Panel(
        title="Factor on the learning rate",
        key="times the schedule's own",
        height=150,
        traces=traces,
        axis={"rangemode": "tozero"},
    )


def norm_panel(looks: Sequence[Look]) -> Panel:
    """The gradient norm of every window, the threshold it met, and what was clipped or skipped."""
    low, _ = _finite_range(look.run.windows["norm"] for look in looks)
    traces = [trace for look in looks for trace in _norms(look, low)]
    measured = any(np.isfinite(look.run.windows["norm"]).any() for look in looks)
    return Panel(
        title="Gradient norm of each window",
        key="thin: norm; dashed: clipped at; circles: clipped; crosses: not finite",
        height=270,
        traces=traces,
        log=True,
        note="" if measured else "no gradient was measured",
    )


def group_panel(looks: Sequence[Look]) -> Panel:
    """The noise scale of each parameter group."""
    traces = [trace for look in looks for trace in _groups(look)]
    names = max((look.run.groups.names for look in looks), key=len)
    few = f" (the {MAX_GROUPS} of {len(names)} with most noise)" if len(names) > MAX_GROUPS else ""
    return Panel(
        title=f"Noise scale of each parameter group{few}",
        key="; ".join(
            f"{dash}: {inert(short(name))}" for dash, name in zip(DASHES, names, strict=False)
        ),
        height=270,
        traces=traces,
        log=True,
        note="" if traces else "the noise is unknown",
    )


def unit_of(runs: Sequence[Run]) -> str:
    """What the runs count."""
    units = sorted({run.unit for run in runs if len(run.decisions)})
    return " or ".join(units or ["samples"])


def changes(run: Run) -> Indices:
    """The decisions that changed something; if there are too many, some evenly spread over them."""
    changed = np.flatnonzero(run.decisions["action"] != ACTION["hold"])
    return changed[evenly(len(changed), MAX_CHANGES)]


def bounds(row: Any) -> str:
    """Write a decision's noise scale with its interval."""
    if math.isnan(row["scale_low"]):
        return "noise unknown"
    scale = f"{row['scale']:.3g}" if math.isfinite(row["scale"]) else "not finite"
    return f"noise scale {scale} ({interval((row['scale_low'], row['scale_high']))})"


def _noise(look: Look, low: float, high: float) -> Iterator[Trace]:
    rows = look.run.decisions
    known = rows[~np.isnan(rows["scale_low"])]
    if len(known):
        yield from _band(look, known, low, high)
        drawn = _drawn(known, "scale")
        scale = np.where(np.isfinite(drawn["scale"]) & (drawn["scale"] > 0), drawn["scale"], np.nan)
        text = [f"{row['samples']:,.10g} seen<br>{bounds(row)}" for row in drawn]
        style = {"color": look.color, "width": 2}
        entry = {"line": style, "showlegend": True, "legendrank": 1}
        yield look.trace("noise scale", drawn["samples"], scale, text, **entry)
    drawn = _drawn(rows, "batch")
    style = {"color": look.own(QUIET), "width": 1.6, "dash": "dash", "shape": "hv"}
    batch = look.trace("batch", drawn["samples"], drawn["batch"], (), line=style)
    yield batch | {"hoverinfo": "skip"} | ({} if len(known) else {"showlegend": True})
    yield from _marks(look)


def _band(look: Look, known: Rows, low: float, high: float) -> Iterator[Trace]:
    """The interval; ends that are open lie beyond what is seen."""
    for name, fill in (("scale_low", None), ("scale_high", "tonexty")):
        drawn = _drawn(known, name)
        ends = np.clip(drawn[name], low / BEYOND, high * BEYOND)
        style = {"color": look.color, "width": 0}
        shade = {"fill": fill, "fillcolor": faint(look.color, 0.18 if look.alone else 0.12)}
        shown = look.alone and fill is not None
        name = f"{100 * look.run.confidence:g}% interval"
        band = look.trace(name, drawn["samples"], ends, (), line=style, showlegend=shown)
        yield band | {"hoverinfo": "skip"} | (shade if fill else {})


def _marks(look: Look) -> Iterator[Trace]:
    run = look.run
    holds = np.flatnonzero(run.decisions["action"] == ACTION["hold"])
    shown = {"hold": holds[keep(run.decisions["decided"][holds], MAX_HOLDS)]}
    changed = changes(run)
    for action in ("grow", "shrink", "revert"):
        shown[action] = changed[run.decisions["action"][changed] == ACTION[action]]
    for action, where in shown.items():
        if len(where) or action == "hold":
            rows = run.decisions[where]
            text = [_told(run, index) for index in where]
            marker = {
                "symbol": SYMBOLS[action],
                "color": look.own(ACTION_COLORS[action]),
                "size": 5 if action == "hold" else 11,
                "line": {"width": 0 if action == "hold" else 1, "color": "rgba(255,255,255,0.7)"},
            }
            style = {"mode": "markers", "marker": marker, "meta": action}
            yield look.trace(action, rows["samples"], rows["decided"], text, **style)


def _told(run: Run, index: int) -> str:
    """What hovering over a decision shows."""
    row = run.decisions[index]
    action = ACTIONS[row["action"]]
    deed = "hold at" if action == "hold" else f"{action} to"
    advice = "" if row["applied"] else " (advice, not applied)"
    steps = f"{row['steps']} micro-batch{'' if row['steps'] == 1 else 'es'}"
    return (
        f"<b>{deed} {steps}</b>{advice}<br>"
        f"update {row['updates']:,.10g}, {row['samples']:,.10g} {inert(run.unit)} seen<br>"
        f"batch {row['decided']:.4g}, learning rate times {row['factor']:.3g}<br>"
        f"{bounds(row)}<br><i>{inert(run.reasons[index])}</i>"
    )


def _losses(look: Look) -> Iterator[Trace]:
    run = look.run
    if not run.losses:
        rows = run.decisions[np.isfinite(run.decisions["loss"])]
        if len(rows):
            yield _loss(look, "training", rows["samples"], rows["loss"], {"color": look.color})
    for number, (arm, table) in enumerate(run.losses.items()):
        ours = number == len(run.losses) - 1
        shade = look.color if ours else look.own(QUIET)
        dash = {} if look.alone else {"dash": "solid" if ours else "dot"}
        style = {"color": faint(shade, 0.45), "width": 1, **dash}
        yield _loss(look, f"{short(arm)}, training", table.samples, table.training, style)
        known = np.isfinite(table.held_out)
        if known.any():
            style = {"color": shade, "width": 1.8, **dash}
            x, y = table.samples[known], table.held_out[known]
            more = {"mode": "lines+markers", "marker": {"size": 5}, "meta": "held out"}
            yield _loss(look, f"{short(arm)}, held out", x, y, style) | more


def _loss(look: Look, name: str, x: Floats, y: Floats, style: dict[str, Any]) -> Trace:
    where = keep(y)
    x, y = x[where], y[where]
    points = zip(x, y, strict=True)
    text = [f"{inert(name)}<br>{seen:,.10g} seen<br>loss {loss:.4g}" for seen, loss in points]
    return look.trace(name, x, y, text, line=style, meta="training")


def _norms(look: Look, low: float) -> Iterator[Trace]:
    windows = look.run.windows
    at = _advised(look.run, "clipped at")
    norms = windows[keep(windows["norm"])]
    style = {"color": faint(look.color, 0.75), "width": 1}
    yield look.trace(
        "norm", norms["samples"], _positive(norms["norm"]), _met(norms, at), line=style
    )
    limits = windows[keep(windows["max_norm"])]
    limit = np.where(np.isfinite(limits["max_norm"]), limits["max_norm"], np.nan)
    if np.isfinite(limit).any():
        style = {"color": look.own(CLIPPED), "width": 1.4, "dash": "dash", "shape": "vh"}
        yield look.trace(at, limits["samples"], limit, _met(limits, at), line=style)
    spikes = windows[windows["clipped"]]
    spikes = spikes[keep(spikes["norm"], MAX_SPIKES)]
    if len(spikes):
        size = 7 if len(spikes) < MANY else 4
        marker = {"symbol": "circle-open", "size": size, "color": look.own(CLIPPED)}
        text = _met(spikes, at)
        yield _dots(look, "clipped", spikes["samples"], _positive(spikes["norm"]), text, marker)
    skipped = windows[windows["skipped"]]
    skipped = skipped[keep(skipped["samples"], MAX_SPIKES)]
    if len(skipped):
        marker = {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": look.own(SKIPPED)}}
        heights = np.where(np.isfinite(skipped["norm"]), skipped["norm"], low)
        text = [f"not finite, skipped<br>{seen:,.10g} seen" for seen in skipped["samples"]]
        yield _dots(look, "skipped", skipped["samples"], _positive(heights), text, marker)


def _dots(
    look: Look, name: str, x: Floats, y: Floats, text: list[str], marker: dict[str, Any]
) -> Trace:
    return look.trace(name, x, y, text, mode="markers", marker=marker, meta=name)


def _met(windows: Rows, at: str) -> list[str]:
    """What hovering over a window shows."""
    return [
        f"{'<b>clipped</b><br>' if row['clipped'] else ''}"
        f"{row['samples']:,.10g} seen<br>norm {row['norm']:.4g}"
        f"{f'<br>{at} {limit:.4g}' if math.isfinite(limit := row['max_norm']) else ''}"
        for row in windows
    ]


def _groups(look: Look) -> Iterator[Trace]:
    run, groups = look.run, look.run.groups
    known = ~np.isnan(groups.trace).all(axis=1)
    if not groups.names or not known.any():
        return
    sizes = np.nansum(np.abs(groups.trace[known]), axis=0)
    total = np.nansum(groups.trace, axis=1)
    for place, group in enumerate(sorted(np.argsort(-sizes)[:MAX_GROUPS].tolist())):
        where = np.flatnonzero(known)
        where = where[keep(groups.scale[where, group])]
        scale = _positive(groups.scale[where, group])
        share = groups.trace[where, group] / np.where(total[where] > 0, total[where], np.nan)
        name = groups.names[group]
        text = [
            f"group {inert(name)}<br>{seen:,.10g} seen<br>noise scale {value:.3g}<br>"
            f"tr(Sigma) {trace:.3g} ({part:.0%} of all), |G|<sup>2</sup> {signal:.3g}"
            for seen, value, trace, part, signal in zip(
                run.decisions["samples"][where],
                scale,
                groups.trace[where, group],
                share,
                groups.signal[where, group],
                strict=True,
            )
        ]
        style = {"color": look.own(COLORS[place]), "width": 1.8}
        style |= {} if look.alone else {"dash": DASHES[place % len(DASHES)]}
        yield look.trace(short(name), run.decisions["samples"][where], scale, text, line=style)


def _advised(run: Run, name: str) -> str:
    return f"{name}, advised" if run.advised else name


def _drawn(rows: Rows, name: str) -> Rows:
    return rows[keep(rows[name])]


def _positive(values: Floats) -> Floats:
    """The values that a logarithmic axis has a place for."""
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _finite_range(values: Iterator[Floats]) -> tuple[float, float]:
    """The smallest and the largest value that is positive and finite; 1 where there is none."""
    known = [part[np.isfinite(part) & (part > 0)] for part in values]
    found = [(part.min(), part.max()) for part in known if len(part)]
    if not found:
        return 1.0, 1.0
    return float(min(low for low, _ in found)), float(max(high for _, high in found))
