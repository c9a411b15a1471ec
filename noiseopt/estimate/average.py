"""The exponential average of two correlated streams, with the uncertainty of its means.

Weights halve over a stretch of samples rather than of steps, so that a change of the batch does not
change what is being averaged. Besides the means it keeps the weighted (co)variances and the lag-one
products, from which follow the effective number of independent observations and the (co)variances
of the means, corrected for autocorrelation.
"""

import math
from dataclasses import dataclass

MIN_COUNT_TO_WINSORISE = 20
MAX_PULLED_IN_ROW = 3
MAX_AUTOCORRELATION = 0.95


@dataclass(frozen=True, slots=True)
class Average:
    """Exponentially weighted moments of the pairs (trace, signal).

    Attributes:
        weight: sum of the weights w.
        weight_sq: sum of w^2.
        trace: weighted mean of the first stream.
        signal: weighted mean of the second stream.
        trace_spread: sum of w (x - mean)^2 of the first stream.
        signal_spread: the same of the second.
        cross_spread: sum of w times the product of both deviations.
        trace_lag: sum of w times the product of successive deviations of the first stream.
        signal_lag: the same of the second.
        last_trace: the newest value of the first stream.
        last_signal: the same of the second.
        winsorised: how many values were pulled in to the limit.
        pulled_in_row: how many of them in a row, up to now.
    """

    weight: float = 0.0
    weight_sq: float = 0.0
    trace: float = 0.0
    signal: float = 0.0
    trace_spread: float = 0.0
    signal_spread: float = 0.0
    cross_spread: float = 0.0
    trace_lag: float = 0.0
    signal_lag: float = 0.0
    last_trace: float = 0.0
    last_signal: float = 0.0
    winsorised: int = 0
    pulled_in_row: int = 0

    def update(self, trace: float, signal: float, decay: float, limit: float) -> "Average":
        """Add one pair.

        Args:
            trace: the new value of the first stream.
            signal: the new value of the second.
            decay: the factor on every earlier weight, in (0, 1].
            limit: values further than this many standard deviations from their mean are pulled in
                to that distance and counted, but not more than three in a row: then they are no
                outliers but a change. Infinite to switch this off.
        """
        pulled = (
            self._winsorise(trace, self.trace, self.trace_spread, limit),
            self._winsorise(signal, self.signal, self.signal_spread, limit),
        )
        outlier = pulled != (trace, signal)
        if self.pulled_in_row < MAX_PULLED_IN_ROW:
            trace, signal = pulled

        weight = decay * self.weight + 1
        from_trace, from_signal = trace - self.trace, signal - self.signal
        mean_trace = self.trace + from_trace / weight
        mean_signal = self.signal + from_signal / weight
        off_trace, off_signal = trace - mean_trace, signal - mean_signal
        first = self.weight == 0
        lag_trace = 0.0 if first else off_trace * (self.last_trace - mean_trace)
        lag_signal = 0.0 if first else off_signal * (self.last_signal - mean_signal)
        return Average(
            weight=weight,
            weight_sq=decay * decay * self.weight_sq + 1,
            trace=mean_trace,
            signal=mean_signal,
            trace_spread=decay * self.trace_spread + from_trace * off_trace,
            signal_spread=decay * self.signal_spread + from_signal * off_signal,
            cross_spread=decay * self.cross_spread + from_trace * off_signal,
            trace_lag=decay * self.trace_lag + lag_trace,
            signal_lag=decay * self.signal_lag + lag_signal,
            last_trace=trace,
            last_signal=signal,
            winsorised=self.winsorised + (outlier and self.pulled_in_row < MAX_PULLED_IN_ROW),
            pulled_in_row=self.pulled_in_row + 1 if outlier else 0,
        )

    def _winsorise(self, value: float, mean: float, spread: float, limit: float) -> float:
        if spread <= 0 or self.count < MIN_COUNT_TO_WINSORISE:
            return value  # without a spread the limit would hold the stream where it is for good
        reach = limit * math.sqrt(spread / self._freedom)
        return min(max(value, mean - reach), mean + reach)

    @property
    def count(self) -> float:
        """How many equally weighted observations would weigh as much: (sum w)^2 / sum w^2."""
        return self.weight * self.weight / self.weight_sq if self.weight_sq else 0.0

    @property
    def effective_count(self) -> float:
        """`count` reduced by the autocorrelation of the signal, the less certain stream."""
        inflation = _inflation(self.signal_lag, self.signal_spread)
        return self.count / inflation

    @property
    def _freedom(self) -> float:
        return self.weight - self.weight_sq / self.weight

    def covariance_of_means(self) -> tuple[float, float, float]:
        """Var(trace), Var(signal) and Cov(trace, signal) of the two means.

        Raises:
            ValueError: fewer than two observations.
        """
        if self.count <= 1:
            raise ValueError("the variance of a mean takes two observations or more")
        scale = 1 / (self._freedom * self.count)
        inflate_trace = _inflation(self.trace_lag, self.trace_spread)
        inflate_signal = _inflation(self.signal_lag, self.signal_spread)
        return (
            self.trace_spread * scale * inflate_trace,
            self.signal_spread * scale * inflate_signal,
            self.cross_spread * scale * math.sqrt(inflate_trace * inflate_signal),
        )


def _inflation(lag: float, spread: float) -> float:
    """(1 + phi) / (1 - phi) for the lag-one autocorrelation phi = lag / spread."""
    phi = lag / spread if spread > 0 else 0.0
    phi = min(max(phi, 0.0), MAX_AUTOCORRELATION)
    return (1 + phi) / (1 - phi)
