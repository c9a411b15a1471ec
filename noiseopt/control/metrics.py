"""A decision as named plain numbers, the form in which dashboards and logs take it."""

import math
from collections.abc import Iterator, Sequence

from noiseopt.control.decision import Decision
from noiseopt.estimate import NoiseEstimate


def metrics(decision: Decision, groups: Sequence[str] = ()) -> dict[str, float]:
    """Name a decision's numbers; what is unknown or not finite is left out.

    `noise/samples`, the samples seen, is always there: it is the axis of all others. Norms are
    plain, not squared; `…/signal` and `…/trace` are squared norms.

    Args:
        decision: the decision.
        groups: the names of the parameter groups, for `group/NAME/…`; their numbers if not given.
            A single group is the whole model and has no entries of its own.
    """
    values: dict[str, float | None] = {
        "noise/samples": decision.samples_seen,
        "noise/tokens": decision.tokens_seen,
        "decide/num_updates": decision.num_updates,
        "decide/updates_saved": decision.reference_updates - decision.num_updates,
        "decide/accumulation_steps": decision.accumulation_steps,
        "decide/batch": decision.batch,
        "decide/ranks": decision.ranks,
        "decide/lr": decision.lr,
        "decide/lr_factor": decision.rates.lr,
        "decide/beta1_exponent": decision.rates.beta1,
        "decide/beta2_exponent": decision.rates.beta2,
        "decide/weight_decay_factor": decision.rates.weight_decay,
        "decide/verifying": decision.verifying is not None,
        "decide/loss": decision.loss,
        "clip/max_norm": decision.max_norm,
        "clip/grad_norm": decision.grad_norm,
        "clip/coefficient": decision.clip_coefficient,
        "clip/share_clipped": decision.total_clipped / max(decision.num_updates, 1),
        "clip/total_clipped": decision.total_clipped,
        "clip/total_skipped": decision.total_skipped,
    }
    if decision.costs is not None:
        values |= {
            "decide/seconds_per_update": decision.costs.per_update,
            "decide/seconds_per_micro_batch": decision.costs.per_micro_batch,
        }
    if decision.noise is not None:
        values |= _noise(decision.noise)
        values |= dict(_groups(decision.noise, groups))
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }


def _noise(noise: NoiseEstimate) -> dict[str, float | None]:
    return {
        "noise/scale": noise.scale,
        "noise/scale_low": noise.scale_interval[0],
        "noise/scale_high": noise.scale_interval[1],
        "noise/fraction": noise.fraction,
        "noise/fraction_low": noise.fraction_interval[0],
        "noise/fraction_high": noise.fraction_interval[1],
        "noise/signal": noise.signal,
        "noise/trace": noise.trace,
        "noise/effective_count": noise.effective_count,
    }


def _groups(noise: NoiseEstimate, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    if len(noise.groups) < 2:
        return
    numbers = map(str, range(len(noise.groups)))
    named = names if len(names) == len(noise.groups) else numbers
    for name, group in zip(named, noise.groups, strict=True):
        yield f"group/{name}/scale", group.scale
        yield f"group/{name}/scale_low", group.scale_interval[0]
        yield f"group/{name}/scale_high", group.scale_interval[1]
        yield f"group/{name}/signal", group.signal
        yield f"group/{name}/trace", group.trace
