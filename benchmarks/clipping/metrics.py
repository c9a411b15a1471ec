"""What a run's trace says. The package's docstring defines each number."""

import math
from collections.abc import Iterator
from statistics import fmean, median

from benchmarks.clipping.train import Trace

SETTLING = 100  # updates that are not counted among clean ones
TREND = 50  # updates over which the median is taken
SPIKE = 1.5  # a clean run without clipping of the tuning split came to 1.44

Record = dict[str, object]


def excesses(trace: Trace) -> Iterator[float]:
    """The ratio of each loss to its trend, where there is one."""
    starts = [0, *trace.restarts]
    for update, loss in enumerate(trace.losses):
        start = max(start for start in starts if start <= update)
        if update >= start + TREND and math.isfinite(loss):
            yield loss / median(trace.losses[update - TREND : update])


def measured(trace: Trace) -> Record:
    """The numbers of a run; None where there is nothing to count."""
    seen = list(zip(trace.clean, trace.factors, strict=False))
    clean = [factor for good, factor in seen[SETTLING:] if good]
    bad = [factor for good, factor in seen if not good and not math.isnan(factor)]
    ratios = list(excesses(trace))
    return {
        "updates_done": len(trace.losses),
        "clean_updates": len(clean),
        "false_clips": share_below_one(clean),
        "kept": rounded(fmean(clean)) if clean else None,
        "bad_updates": trace.clean.count(False),
        "caught": share_below_one(bad),
        "spikes": sum(ratio > SPIKE for ratio in ratios),
        "worst": rounded(max(ratios)) if ratios else None,
        "nonfinite_update": trace.nonfinite,
    }


def share_below_one(factors: list[float]) -> float | None:
    """The share of factors below 1."""
    return rounded(fmean(factor < 1 for factor in factors)) if factors else None


def rounded(value: float) -> float | None:
    """Five digits; None for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
