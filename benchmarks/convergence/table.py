"""What the results say: each arm against the best constant window and against their frontier."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from benchmarks.convergence import arms
from benchmarks.convergence.cache import CODE, Record
from benchmarks.convergence.workloads import WORKLOADS

UPDATE_COST = 4  # micro-batches that an update costs, in the table's modelled time


@dataclass(frozen=True)
class Row:
    """One arm on one workload. Ratios are to the best constant window.

    Attributes:
        arm: its name.
        seeds: those it was run with.
        updates: their mean.
        loss: the mean validation loss; infinite if a run diverged.
        spread: its deviation over seeds; nan of one seed.
        averaged: the mean loss of the averaged weights.
        update_ratio: updates over those of the best constant.
        excess: the relative loss above the best constant's, a mean over pairs of equal seeds.
        excess_spread: its deviation over these pairs.
        above_frontier: the relative loss over the constants' at as many updates; None outside.
        time_ratio: time over the best constant's, where an update costs four micro-batches.
    """

    arm: str
    seeds: tuple[int, ...]
    updates: float
    loss: float
    spread: float
    averaged: float
    update_ratio: float
    excess: float
    excess_spread: float
    above_frontier: float | None
    time_ratio: float


def loss_of(record: Record, key: str = "val_loss") -> float:
    """A record's loss; infinite if it diverged."""
    return math.inf if record[key] is None else float(record[key])


def by_arm(records: Sequence[Record], workload: str, split: str) -> dict[str, dict[int, Record]]:
    """Each arm's record for each seed; of several settings those of most seeds, then the best."""
    tried: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if (record["workload"], record["split"]) == (workload, split):
            settings = {key: value for key, value in record["config"].items() if key != CODE}
            of_one = tried[record["arm"]][json.dumps(settings, sort_keys=True)]
            of_one[record["seed"]] = record
    found = {arm: min(ways.values(), key=_rank) for arm, ways in tried.items()}
    names = (*arms.MAIN, *arms.ABLATIONS)
    return dict(sorted(found.items(), key=lambda item: _position(item[0], names)))


def _rank(seeds: dict[int, Record]) -> tuple[int, float]:
    return -len(seeds), mean_loss(seeds)


def _position(arm: str, names: Sequence[str]) -> tuple[int, str]:
    base = arms.base(arm)
    return (names.index(base) if base in names else len(names)), arm


def mean_loss(seeds: dict[int, Record], key: str = "val_loss") -> float:
    """The mean over seeds."""
    return fmean(loss_of(record, key) for record in seeds.values())


def mean_updates(seeds: dict[int, Record]) -> float:
    """The mean over seeds."""
    return fmean(record["updates"] for record in seeds.values())


def constants(found: dict[str, dict[int, Record]]) -> list[str]:
    """The constant arms that have as many seeds as any of them."""
    names = [arm for arm in found if arm in arms.CONSTANTS]
    most = max((len(found[arm]) for arm in names), default=0)
    return [arm for arm in names if len(found[arm]) == most]


def frontier(
    found: dict[str, dict[int, Record]], seeds: Collection[int]
) -> list[tuple[float, float]]:
    """Updates and loss of the constants on these seeds, which they all have, by updates."""
    on_seeds = [
        {seed: found[arm][seed] for seed in seeds} for arm in arms.CONSTANTS if arm in found
    ]
    return sorted((mean_updates(records), mean_loss(records)) for records in on_seeds)


def above_frontier(arm: str, found: dict[str, dict[int, Record]]) -> float | None:
    """An arm's relative loss over the constants', on the seeds that all of these have."""
    known = [found[name].keys() for name in arms.CONSTANTS if name in found]
    seeds = set(found[arm]).intersection(*known)
    on_seeds = {seed: record for seed, record in found[arm].items() if seed in seeds}
    expected = frontier_at(frontier(found, seeds), mean_updates(on_seeds)) if seeds else None
    return None if expected is None else mean_loss(on_seeds) / expected - 1


def frontier_at(points: Sequence[tuple[float, float]], updates: float) -> float | None:
    """The constants' loss at so many updates, linear in their logarithm; None outside."""
    for (fewer, high), (more, low) in pairwise(points):
        if fewer <= updates <= more:
            share = math.log(updates / fewer) / math.log(more / fewer)
            return high + share * (low - high)
    return None


def rows(records: Sequence[Record], workload: str, split: str = "reporting") -> list[Row]:
    """Every arm of a workload; nothing before a constant has finished."""
    found = by_arm(records, workload, split)
    names = constants(found)
    if not names:
        return []
    best = min(names, key=lambda arm: mean_loss(found[arm]))
    return [_row(arm, found, found[best]) for arm in found]


def _row(arm: str, found: dict[str, dict[int, Record]], best: dict[int, Record]) -> Row:
    seeds = found[arm]
    updates, loss = mean_updates(seeds), mean_loss(seeds)
    pairs = [loss_of(seeds[seed]) / loss_of(best[seed]) - 1 for seed in seeds if seed in best]
    return Row(
        arm=arm,
        seeds=tuple(sorted(seeds)),
        updates=updates,
        loss=loss,
        spread=_deviation([loss_of(record) for record in seeds.values()]),
        averaged=mean_loss(seeds, "val_loss_averaged"),
        update_ratio=updates / mean_updates(best),
        excess=fmean(pairs) if pairs else math.nan,
        excess_spread=_deviation(pairs),
        above_frontier=above_frontier(arm, found),
        time_ratio=modelled_time(seeds, UPDATE_COST) / modelled_time(best, UPDATE_COST),
    )


def modelled_time(seeds: dict[int, Record], cost: float) -> float:
    """The mean time of a run, in micro-batches, where an update costs so many."""
    return fmean(
        record["samples"] / record["config"]["workload"]["micro_batch"] + cost * record["updates"]
        for record in seeds.values()
    )


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def markdown(records: Sequence[Record], split: str) -> str:
    """The tables of all workloads."""
    known = {record["workload"] for record in records if record["split"] == split}
    parts = [_section(records, name, split) for name in WORKLOADS if name in known]
    return "\n".join(
        [
            f"# Validation loss against updates, {split} split",
            "",
            "At equal samples. Written by `python -m benchmarks.convergence table` from",
            "`convergence.json`; `benchmarks/convergence` says what the arms are. +- is the",
            "deviation over seeds, of a difference that over pairs of equal seeds. The best",
            "constant window is the one of the lowest mean loss; the frontier is the line through",
            "the constants' losses over the logarithm of their updates. Time is modelled, with an",
            f"update that costs {UPDATE_COST} micro-batches.",
            "",
            *parts,
        ]
    )


def _section(records: Sequence[Record], workload: str, split: str) -> str:
    found = rows(records, workload, split)
    if not found:
        return f"## {workload}\n\nNo constant window has finished.\n"
    tuned = _tuned(records, workload) or "nothing; its settings are another workload's"
    lines = [
        f"## {workload}",
        "",
        "| arm | seeds | updates | of best | loss | averaged | over best | over frontier | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_line, found),
        "",
        f"Tuned on the tuning split: {tuned}.",
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    cells = [
        row.arm,
        f"{len(row.seeds)}",
        f"{row.updates:.0f}",
        f"{row.update_ratio:.1%}",
        _with_spread(row.loss, row.spread, ".4f"),
        f"{row.averaged:.4f}",
        _with_spread(row.excess, row.excess_spread, "+.2%", ".2%"),
        "-" if row.above_frontier is None else f"{row.above_frontier:+.2%}",
        f"{row.time_ratio:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _with_spread(value: float, spread: float, form: str, of_spread: str | None = None) -> str:
    if not math.isfinite(value):
        return "diverged"
    shown = format(value, form)
    return shown if math.isnan(spread) else f"{shown} +- {format(spread, of_spread or form)}"


def _tuned(records: Sequence[Record], workload: str) -> str:
    found = by_arm(records, workload, "tuning")
    tried: dict[str, int] = defaultdict(int)
    for record in records:
        if (record["workload"], record["split"]) == (workload, "tuning"):
            tried[record["arm"]] += 1
    settings = []
    for arm in arms.CONSTANTS:
        if arm in found:
            config = next(iter(found[arm].values()))["config"]
            words = f"lr {config['lr']:g}, beta2 {config['beta2']:g} per micro-batch"
            settings.append(f"{arm} {words} ({tried[arm]} tried)")
    return "; ".join(settings)
