"""The online estimator: windows in, an estimate with honest intervals out.

Numerator tr(Sigma) and denominator |G|^2 are unbiased in every window, averaged apart with the same
weights, and divided last. The half-life grows with the run: a fixed share of the samples seen, and
at least a number of windows, which itself starts small.
"""

import math
from dataclasses import dataclass, field, replace

from noiseopt.estimate.average import Average
from noiseopt.estimate.interval import RatioBounds, noise_fraction, ratio_bounds
from noiseopt.estimate.window import NoiseSample, WindowNorms

MIN_WINDOWS = 3
EARLY_SHARE = 0.2
SETTING = {"setting": True}  # marks what is not state: it is not saved with it


@dataclass(frozen=True, slots=True)
class GroupNoise:
    """The averaged noise of one parameter group; traces and signals sum to the model's.

    Attributes:
        scale: tr(Sigma) / |G|^2 of this group's coordinates; infinite where the signal is not
            positive.
        scale_interval: its two-sided confidence interval (Fieller).
        trace: tr(Sigma) of this group's coordinates.
        signal: |G|^2 of this group's coordinates.
    """

    scale: float
    scale_interval: tuple[float, float]
    trace: float
    signal: float


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """The gradient noise, averaged over the recent past of a run. Batches are in `unit`s.

    Intervals and bounds hold for the average over the estimator's memory. Where the noise changes
    faster than this memory, the value of the moment may lie outside.

    Attributes:
        scale: B_noise = tr(Sigma) / |G|^2; infinite where the signal is not positive.
        scale_interval: its two-sided confidence interval (Fieller).
        scale_lower: its one-sided lower bound; what growth may rely on.
        scale_upper: its one-sided upper bound.
        fraction: f = (tr(Sigma)/B) / (|G|^2 + tr(Sigma)/B), the share of noise in |g|^2.
        fraction_interval: its two-sided confidence interval.
        fraction_lower: its one-sided lower bound.
        fraction_upper: its one-sided upper bound.
        batch: B, the batch at which the fraction is meant.
        trace: tr(Sigma), for one unit.
        signal: |G|^2; may be negative while it is not distinguishable from 0.
        samples_seen: units that have passed when this was estimated.
        count: how many windows, equally weighted, the averages rest on.
        effective_count: how many independent ones they are worth.
        winsorised: how many windows were pulled in as outliers.
        unit: what is counted: "samples", or "micro-batches" if their size was not told.
        groups: the same averages for each parameter group.
    """

    scale: float
    scale_interval: tuple[float, float]
    scale_lower: float
    scale_upper: float
    fraction: float
    fraction_interval: tuple[float, float]
    fraction_lower: float
    fraction_upper: float
    batch: float
    trace: float
    signal: float
    samples_seen: float
    count: float
    effective_count: float
    winsorised: int
    unit: str
    groups: tuple[GroupNoise, ...] = ()


@dataclass(frozen=True, slots=True)
class NoiseEstimator:
    """The estimator's whole state: immutable, plain numbers, one `update` for each window.

    Attributes:
        half_life_fraction: the half-life of the averages, as a share of the samples seen.
        half_life_windows: its least length, in windows that could be measured; while fewer than
            five times as many were, a fifth of them.
        winsorise: the limit, in standard deviations, beyond which a window is pulled in.
        samples_seen: samples in all windows so far, measured or not.
        samples_measured: samples seen when the last window was measured.
        windows: windows that could be measured.
        average: the joint average over all parameters.
        groups: the averages of each parameter group, with the same weights.
    """

    half_life_fraction: float = field(default=0.03, metadata=SETTING)
    half_life_windows: float = field(default=32.0, metadata=SETTING)
    winsorise: float = field(default=5.0, metadata=SETTING)
    samples_seen: float = 0.0
    samples_measured: float = 0.0
    windows: int = 0
    average: Average = field(default_factory=Average)
    groups: tuple[Average, ...] = ()

    def update(self, window: WindowNorms) -> "NoiseEstimator":
        """Count a window's samples, and learn from it if it shows its noise."""
        seen = self.samples_seen + window.samples
        if not window.shows_noise:
            return replace(self, samples_seen=seen)
        parts = window.noise()
        decay = self._decay(seen)
        average = self.average.update(
            math.fsum(part.trace for part in parts),
            math.fsum(part.signal for part in parts),
            decay,
            self.winsorise,
        )
        parts = _pull(parts, average.last_trace, average.last_signal)
        return replace(
            self,
            samples_seen=seen,
            samples_measured=seen,
            windows=self.windows + 1,
            average=average,
            groups=self._update_groups(parts, decay),
        )

    def _decay(self, seen: float) -> float:
        elapsed = (seen - self.samples_measured) / (self.half_life_fraction * seen)
        # The first gradients of a run are many times larger than all that follow. A half-life that
        # starts short lets their weight fall with a power of the windows measured.
        least = min(self.half_life_windows, max(EARLY_SHARE * self.windows, 1.0))
        return float(2 ** -min(elapsed, 1 / least))

    def _update_groups(self, parts: tuple[NoiseSample, ...], decay: float) -> tuple[Average, ...]:
        known = self.with_groups(len(parts) - len(self.groups)).groups
        return tuple(
            group.update(part.trace, part.signal, decay, limit=math.inf)
            for group, part in zip(known, parts, strict=True)
        )

    def with_groups(self, number: int) -> "NoiseEstimator":
        """The same estimator with so many more groups, which had no noise and no signal so far."""
        new = Average(weight=self.average.weight, weight_sq=self.average.weight_sq)
        return replace(self, groups=self.groups + (new,) * number)

    @property
    def settings(self) -> tuple[float, float, float]:
        """What is set, and not learned."""
        return self.half_life_fraction, self.half_life_windows, self.winsorise

    def norm_at(self, batch: float) -> float:
        """The predicted root mean square of |g| at a batch: m(B) = sqrt(|G|^2 + tr(Sigma)/B)."""
        return math.sqrt(max(self.average.signal, 0.0) + max(self.average.trace, 0.0) / batch)

    def estimate(
        self, batch: float, confidence: float = 0.95, unit: str = "samples"
    ) -> NoiseEstimate | None:
        """The estimate at a batch, or None while fewer than three windows could be measured."""
        average = self.average
        if self.windows < MIN_WINDOWS or average.count <= 1:
            return None
        scale, bounds = _ratio(average, confidence)
        low, high = bounds.interval
        return NoiseEstimate(
            scale=scale,
            scale_interval=bounds.interval,
            scale_lower=bounds.lower,
            scale_upper=bounds.upper,
            fraction=noise_fraction(scale, batch),
            fraction_interval=(noise_fraction(low, batch), noise_fraction(high, batch)),
            fraction_lower=noise_fraction(bounds.lower, batch),
            fraction_upper=noise_fraction(bounds.upper, batch),
            batch=batch,
            trace=average.trace,
            signal=average.signal,
            samples_seen=self.samples_seen,
            count=average.count,
            effective_count=average.effective_count,
            winsorised=average.winsorised,
            unit=unit,
            groups=tuple(_group(group, confidence) for group in self.groups),
        )


def _ratio(average: Average, confidence: float) -> tuple[float, RatioBounds]:
    """The noise scale and its bounds."""
    trace, signal = average.trace, average.signal
    bounds = ratio_bounds(trace, signal, *average.covariance_of_means(), confidence)
    return (max(trace, 0.0) / signal if signal > 0 else math.inf), bounds


def _group(average: Average, confidence: float) -> GroupNoise:
    scale, bounds = _ratio(average, confidence)
    return GroupNoise(scale, bounds.interval, average.trace, average.signal)


def _pull(parts: tuple[NoiseSample, ...], trace: float, signal: float) -> tuple[NoiseSample, ...]:
    """Share a winsorised total among its groups by their sizes, so that they still sum to it."""
    traces = _share([part.trace for part in parts], trace)
    signals = _share([part.signal for part in parts], signal)
    return tuple(map(NoiseSample, traces, signals))


def _share(values: list[float], total: float) -> list[float]:
    excess = total - math.fsum(values)
    size = math.fsum(map(abs, values))
    if excess == 0 or size == 0:
        return values
    return [value + excess * abs(value) / size for value in values]
