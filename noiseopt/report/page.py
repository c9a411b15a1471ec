"""The page: runs as one HTML file that opens from a disk, without a network.

Its styles, its script, plotly.js and the figures are inside. A content security policy names the
two scripts by their hashes and allows nothing to be loaded: text that a run brought could not act
even if it were not escaped.

assets/plotly-basic.min.js is the file of that name in plotly.js-basic-dist-min 4.1.1 (npm; MIT, see
assets/plotly-LICENSE). The bundle with maps and 3-D, which Python's plotly carries, is four times
as large, and takes three times as long to start.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import noiseopt
from noiseopt.control.decision import ACTIONS
from noiseopt.report.decimate import CURVE_POINTS
from noiseopt.report.figures import cost_of, figures
from noiseopt.report.fixed_batch import Cost
from noiseopt.report.look import color, printable
from noiseopt.report.panels import MAX_CHANGES, MAX_HOLDS, MAX_SPIKES, changes
from noiseopt.report.run import ACTION, Run

SCRIPTS = ("plotly-basic.min.js", "page.js")
HOW_TO = (
    "Hover over a mark on the batch to read that decision and its reason; drag to zoom, "
    "double-click to go back. An interval that is open upwards reaches the top."
)
MODEL = (
    "With <i>B<sub>t</sub></i> the batch, <i>N<sub>t</sub></i> the noise scale and "
    "<i>u<sub>t</sub></i> the updates before each decision, a fixed batch <i>B</i> needs "
    "<i>&Sigma;</i> <i>u<sub>t</sub></i> (1 + <i>N<sub>t</sub></i>/<i>B</i>) / "
    "(1 + <i>N<sub>t</sub></i>/<i>B<sub>t</sub></i>) updates for the same progress, and <i>B</i> "
    "times as many samples (the model of McCandlish et al. 2018, arXiv 1812.06162, section 2). "
    "This is computed, not measured: it assumes that the learning rate goes with the batch as that "
    "model wants, and that the noise scale does not depend on the batch."
)


def write_page(path: Path, runs: Sequence[Run]) -> None:
    """Write the page of some runs, at once: what is there stays whole until it is."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page(runs), encoding="utf-8", errors="replace")
    partial.replace(path)


def page(runs: Sequence[Run]) -> str:
    """The page of some runs, as text."""
    scripts = [_asset(name) for name in SCRIPTS]
    found = figures(runs)
    title = f"Run {runs[0].name}" if len(runs) == 1 else "Runs side by side"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_safe(title)} - noiseopt</title>",
            f"<style>{_asset('page.css')}</style>",
            "</head>",
            "<body><main>",
            f"<h1>{_safe(title)}</h1>",
            *_body(runs, found),
            "</main>",
            f'<script type="application/json" id="figures">{to_json(found)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>",
            "",
        ]
    )


def to_json(value: Any) -> str:
    r"""Write figures as JSON that can stand inside of a script element.

    Arrays are written as plotly.js reads them, in base64. No character is left that HTML knows.

    Example:
        >>> to_json({"x": np.zeros(1), "name": "</script>"})
        '{"x":{"dtype":"f8","bdata":"AAAAAAAAAAA="},"name":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, default=_array, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _array(values: Any) -> dict[str, str]:
    data = np.ascontiguousarray(values, dtype="<f8").tobytes()
    return {"dtype": "f8", "bdata": base64.b64encode(data).decode("ascii")}


def _body(runs: Sequence[Run], found: Iterable[str]) -> list[str]:
    return [
        *(_verdict(run, number, len(runs) > 1) for number, run in enumerate(runs)),
        _facts(runs),
        "<noscript><p>The curves need JavaScript.</p></noscript>",
        '<figure><div id="timeline"></div>',
        f"<figcaption>{_reading(runs)}</figcaption></figure>",
        *(_fixed_batch(runs) if "updates" in found else []),
        *_changes(runs),
        f"<footer>Written by noiseopt {_safe(noiseopt.__version__)}. Curves by plotly.js.</footer>",
    ]


def _verdict(run: Run, number: int, several: bool) -> str:
    who = f"<b>{_safe(run.name)}</b>" if several else ""
    return f'<p class="verdict" style="--run: {color(number)}">{who}{_safe(run.verdict)}</p>'


def _facts(runs: Sequence[Run]) -> str:
    """The facts: a row for each, a column for each run."""
    columns = [dict(run.facts) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = "".join(
        f'<th scope="col"><span class="run" style="--run: {color(number)}">{_safe(run.name)}</span>'
        for number, run in enumerate(runs)
    )
    rows = [
        f'<tr><th scope="row">{_safe(name)}</th>'
        + "".join(f"<td>{_safe(column.get(name, '-'))}</td>" for column in columns)
        + "</tr>"
        for name in names
    ]
    header = f"<thead><tr><td></td>{head}</tr></thead>" if len(runs) > 1 else ""
    return f'<div class="scroll"><table>{header}<tbody>{"".join(rows)}</tbody></table></div>'


def _reading(runs: Sequence[Run]) -> str:
    """How the curves are to be read, and what is left out of them."""
    text = [HOW_TO]
    if any(run.advised for run in runs):
        text.append("What is advised was decided and not applied.")
    rows = max((max(len(run.decisions), len(run.windows)) for run in runs), default=0)
    if rows > CURVE_POINTS:
        text.append(
            f"Every curve is drawn through {CURVE_POINTS} points at most: its ends, and the "
            "smallest and the largest value of each stretch. Of decisions that held "
            f"{MAX_HOLDS} at most are marked, and of clipped or skipped windows {MAX_SPIKES} each."
        )
    many = [run for run in runs if _num_changes(run) > MAX_CHANGES]
    if many:
        text.append(f"Of changes {MAX_CHANGES} are marked for each run: {_of(many)}.")
    return _safe(" ".join(text))


def _fixed_batch(runs: Sequence[Run]) -> list[str]:
    return [
        "<h2>What a fixed batch would have cost, by the measured noise</h2>",
        f"<p>{MODEL}</p>",
        *(f"<p>{_costs(run, cost_of(run), len(runs) > 1)}</p>" for run in runs),
        '<div class="pair"><div id="updates"></div><div id="samples"></div></div>',
    ]


def _costs(run: Run, one: Cost | None, several: bool) -> str:
    who = f"{_safe(run.name)}: " if several else ""
    if one is None:
        return f"{who}the noise was never known."
    left = (
        f" Left out are {one.unknown_updates:,.0f} updates, whose noise was unknown."
        if one.unknown_updates
        else ""
    )
    return (
        f"{who}{one.own_updates:,.0f} updates on {one.own_samples:,.10g} {_safe(run.unit)}, a mean "
        f"batch of {one.own_batch:.4g} (diamond).{left}"
    )


def _changes(runs: Sequence[Run]) -> list[str]:
    """The table of what was changed, and why."""
    heads = ("update", "seen", "action", "micro-batches", "batch", "rate times", "reason")
    columns = (["run"] if len(runs) > 1 else []) + list(heads)
    rows = [row for number, run in enumerate(runs) for row in _change_rows(run, number, len(runs))]
    if not rows:
        return ["<h2>Changes</h2>", "<p>None: every decision was to hold.</p>"]
    many = [run for run in runs if _num_changes(run) > MAX_CHANGES]
    cap = f"{MAX_CHANGES} of the changes of each run, evenly spread: {_of(many)}." if many else ""
    head = "".join(f"<th{_number(name)}>{name}</th>" for name in columns)
    return [
        "<h2>Changes</h2>",
        f'<p class="note">{_safe(cap)}</p>' if cap else "",
        f'<div class="scroll"><table class="changes"><thead><tr>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    ]


def _change_rows(run: Run, number: int, count: int) -> Iterable[str]:
    who = f'<td><span class="run" style="--run: {color(number)}">{_safe(run.name)}</span></td>'
    for index in changes(run):
        row = run.decisions[index]
        advice = "" if row["applied"] else " (advised)"
        numbers = (f"{row['updates']:,.10g}", f"{row['samples']:,.10g}")
        result = (f"{row['steps']}", f"{row['decided']:.4g}", f"{row['factor']:.3g}")
        yield (
            f"<tr>{who if count > 1 else ''}"
            + "".join(f'<td class="number">{text}</td>' for text in numbers)
            + f"<td>{ACTIONS[row['action']]}{advice}</td>"
            + "".join(f'<td class="number">{text}</td>' for text in result)
            + f"<td>{_safe(run.reasons[index])}</td></tr>"
        )


def _number(column: str) -> str:
    return "" if column in ("run", "action", "reason") else ' class="number"'


def _num_changes(run: Run) -> int:
    return int((run.decisions["action"] != ACTION["hold"]).sum())


def _of(runs: Iterable[Run]) -> str:
    return ", ".join(f"{run.name} made {_num_changes(run):,}" for run in runs)


def _asset(name: str) -> str:
    path = resources.files("noiseopt.report") / "assets" / name
    return path.read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """Allow these scripts and the page's own styles, and nothing from elsewhere."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; form-action 'none'; base-uri 'none'"
    )


def _safe(text: str) -> str:
    return html.escape(printable(text))
