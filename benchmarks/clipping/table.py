"""What the results say: a table for each scenario, and whether ours holds what it promises."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from statistics import fmean, stdev
from typing import Any

from benchmarks.clipping.rules import RULES
from benchmarks.clipping.scenarios import SCENARIOS
from benchmarks.clipping.tasks import TASKS
from benchmarks.clipping.train import GUARDED, OURS

Record = dict[str, Any]
Runs = dict[str, list[Record]]  # by arm, each sorted by seed

BASE = "fixed 1.0"
LIMIT = 0.01  # of false clips on clean data
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by the number of pairs
COLUMNS = ("false clips", "kept", "caught", "spikes", "worst", "non-finite", "loss", "over fixed")
HEAD = """# Clipping, with the batch doubling and halving in mid-run

Written by `python -m benchmarks.clipping` from `clipping.json`; `benchmarks/clipping` says what is
measured. +- is the deviation over seeds, of a difference that over pairs of equal seeds.
"over fixed" is the loss over that of "fixed 1.0", or of "fixed 1.0 + skip" where the former
diverges. The best rival is chosen by the same runs, which favours it.
"""


def runs_of(records: Sequence[Record], task: str, scenario: str) -> Runs:
    """The runs of each arm."""
    found: Runs = {}
    for arm in (*OURS, *RULES, *(name + GUARDED for name in RULES)):
        key = (task, scenario, arm)
        own = [r for r in records if (r["task"], r["scenario"], r["arm"]) == key]
        if own:
            found[arm] = sorted(own, key=lambda record: record["seed"])
    return found


def differences(runs: Runs, arm: str, base: str) -> list[float]:
    """An arm's loss over another's, for each seed in which both have one."""
    losses = {r["seed"]: r["loss"] for r in runs.get(base, ())}
    pairs = [(r["loss"], losses.get(r["seed"])) for r in runs[arm]]
    return [own - other for own, other in pairs if own is not None and other is not None]


def base_of(runs: Runs) -> str:
    """What losses are set against: a fixed norm, guarded where it diverges without."""
    diverged = any(record["loss"] is None for record in runs.get(BASE, ()))
    return BASE + GUARDED if diverged else BASE


def spread(values: Sequence[float], form: str) -> str:
    """A mean and a deviation."""
    if not values:
        return "-"
    deviation = f" +- {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def row(runs: Runs, arm: str) -> str:
    """An arm's line."""
    own, base = runs[arm], base_of(runs)

    def known(key: str) -> list[float]:
        return [record[key] for record in own if record[key] is not None]

    caught = [] if own[0]["scenario"] == "nans" else known("caught")
    cells = (
        *(spread(known("false_clips"), ".2%"), spread(known("kept"), ".2f")),
        *(spread(caught, ".0%"), spread(known("spikes"), ".1f")),
        f"{max(known('worst')):.2f}" if known("worst") else "-",
        f"{len(known('nonfinite_update'))} of {len(own)}",
        spread(known("loss"), ".4f"),
        spread(differences(runs, arm, base), "+.4f") if arm != base else "-",
    )
    return f"| {arm} | {' | '.join(cells)} |"


def tables(records: Sequence[Record]) -> Iterator[str]:
    """A table for each task and scenario that was run."""
    for task, scenario in product(TASKS, SCENARIOS):
        runs = runs_of(records, task, scenario)
        if runs:
            seeds = max(map(len, runs.values()))
            yield f"\n## {task}, {scenario} ({seeds} seeds)\n"
            yield f"| arm | {' | '.join(COLUMNS)} |"
            yield "| --- |" + " ---: |" * len(COLUMNS)
            yield from (row(runs, arm) for arm in runs)


def best_rival(runs: Runs) -> str | None:
    """The rival of the lowest mean loss among those that never diverged."""
    means = {
        arm: fmean(record["loss"] for record in own)
        for arm, own in runs.items()
        if arm not in OURS and all(record["loss"] is not None for record in own)
    }
    return min(means, key=means.__getitem__, default=None)


def verdict(values: Sequence[float]) -> str:
    """Whether differences of the loss are worse than 0, by the 95 % interval of their mean."""
    if not 2 <= len(values) <= max(STUDENT):
        return f"{fmean(values):+.4f}, no interval" if values else "no pair"
    mean = fmean(values)
    half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
    said = "worse" if mean > half else "better" if mean < -half else "not told apart"
    return f"{said} ({mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}])"


def verdicts(records: Sequence[Record]) -> Iterator[str]:
    """Each promise, and what was found."""
    for arm in OURS:
        own = [record for record in records if record["arm"] == arm]
        yield f"\n## {arm}: is it what it promises?\n"
        for task in TASKS:
            clean = [r for r in own if (r["task"], r["scenario"]) == (task, "clean")]
            shares = [r["false_clips"] for r in clean if r["false_clips"] is not None]
            if shares:
                said = "holds" if max(shares) < LIMIT else "missed"
                found = f"{fmean(shares):.2%}, at most {max(shares):.2%} in a run"
                yield f"* false clips on clean data below {LIMIT:.0%}, {task}: {said}, {found}"
        broken = sum(record["nonfinite_update"] is not None for record in own)
        said = "holds" if not broken else "missed"
        yield f"* no NaN reaches the weights: {said}, {broken} of {len(own)} runs"
        for task, scenario in product(TASKS, SCENARIOS):
            runs = runs_of(records, task, scenario)
            best = best_rival(runs) if arm in runs else None
            if best is None:
                continue
            bases = dict.fromkeys((base_of(runs), "none", best))
            told = (f"{base}: {verdict(differences(runs, arm, base))}" for base in bases)
            yield f"* loss, {task}, {scenario}, against {'; '.join(told)}; best rival: {best}"


def markdown(records: Sequence[Record]) -> str:
    """Everything."""
    return "\n".join((HEAD.rstrip(), *tables(records), *verdicts(records))) + "\n"
