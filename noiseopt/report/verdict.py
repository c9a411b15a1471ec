"""The regime of a run in words, for those who do not read curves: no stronger than its interval.

At a batch B and a noise scale N an update makes 1 / (1 + N/B) of the progress that one with the
exact gradient would, at the best learning rate for each (McCandlish et al., arXiv 1812.06162,
section 2); the noise is the rest. A batch below a quarter of N is called too noisy, one above four
times N wasteful.
"""

import math

from noiseopt.control import Decision, NoiseConfig, paying_batch
from noiseopt.estimate import NoiseEstimate
from noiseopt.report.phrases import percent

NOISY, WASTEFUL = 0.8, 0.2  # noise fractions: N = 4 B and N = B / 4


def verdict(last: Decision, config: NoiseConfig) -> str:
    """Say what a run's last decision knows of the noise, what follows from it, and no more."""
    noise = last.noise
    if noise is None:
        return f"undecided: {last.reason}"
    low, high = noise.fraction_interval
    at = f"at a batch of {noise.batch:.4g} {noise.unit}"
    if noise.count < config.min_count:
        rests = f"{noise.count:.1f} windows"
        return f"undecided {at}: it rests on {rests}, to act takes {config.min_count:g}"
    count = f"{noise.effective_count:.0f} independent windows"
    sure = f"({100 * config.confidence:g}% confidence, {count})"
    if low > NOISY:
        return f"too noisy {at}: {_noisy(noise, last, config)} {sure}{_open_end(noise)}"
    if high < WASTEFUL:
        return f"wasteful {at}: {_wasteful(noise, last, config)} {sure}"
    between = f"noise is between {percent(low)} and {percent(high)} of the squared gradient {sure}"
    return f"{_regime(low, high)} {at}: {between}"


def _regime(low: float, high: float) -> str:
    if low >= WASTEFUL and high <= NOISY:
        return "balanced"
    if low >= WASTEFUL:
        return "balanced or too noisy"
    return "balanced or wasteful" if high <= NOISY else "undecided"


def _noisy(noise: NoiseEstimate, last: Decision, config: NoiseConfig) -> str:
    low = noise.fraction_interval[0]
    text = f"an update makes at most {percent(1 - low)} of the progress of an exact gradient's"
    per_step = noise.batch / _steps(noise, last)
    scale = noise.scale_interval[0]
    price = config.update_price * last.samples_seen / last.reference_updates
    steps = math.floor(paying_batch(price, scale) / per_step)
    if steps <= _steps(noise, last) or not math.isfinite(steps * per_step):
        return text
    batch = steps * per_step
    gain = (1 + scale / noise.batch) / (1 + scale / batch)
    return (
        f"{text}; windows of up to {steps} micro-batches ({batch:.4g} {noise.unit}), with the "
        f"learning rate that goes with them, would make {gain:.3g} times as much or more"
    )


def _wasteful(noise: NoiseEstimate, last: Decision, config: NoiseConfig) -> str:
    high, scale = noise.fraction_interval[1], noise.scale_interval[1]
    kept = (1 + scale / noise.batch) / (1 + 2 * scale / noise.batch)
    text = (
        f"noise is at most {percent(high)} of the squared gradient, and half the batch would make "
        f"{percent(kept)} of the progress or more, with the learning rate that goes with it"
    )
    if _steps(noise, last) <= max(config.min_accumulation_steps, 1):
        return f"{text}; smaller micro-batches would save samples"
    return f"{text}; shorter windows would save samples"


def _steps(noise: NoiseEstimate, last: Decision) -> float:
    """The window, in micro-batches on each rank, at which the estimate is meant."""
    per_step = last.batch / last.accumulation_steps
    return noise.batch / per_step


def _open_end(noise: NoiseEstimate) -> str:
    if math.isfinite(noise.scale_interval[1]):
        return ""
    return "; the signal cannot be told from 0, so the noise scale has no upper bound"
