"""One window's squared norms, and the unbiased noise sample they give.

A window holds K independent micro-batch gradients g_i, each the mean over n_i samples, and their
weighted mean g = sum w_i g_i with sum w_i = 1. With G the true gradient and Sigma the covariance of
one sample's gradient,

    E[sum w_i |g_i|^2] = |G|^2 + tr(Sigma) * sum w_i / n_i
    E[|g|^2]           = |G|^2 + tr(Sigma) * sum w_i^2 / n_i

so two squared norms and two batch sizes determine both unknowns. For w_i = n_i / N this is the
weighted analysis of variance; for equal n_i it is App. A.1 of McCandlish et al. (arXiv 1812.06162)
with all K small norms in place of one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """One window's unbiased estimates. Both keep their sign: either can be negative by chance.

    Attributes:
        trace: tr(Sigma), the variance of one sample's gradient summed over its coordinates.
        signal: |G|^2, the squared norm of the true gradient.
    """

    trace: float
    signal: float


@dataclass(frozen=True, slots=True)
class WindowNorms:
    """Sufficient statistics of one window, with one squared norm for each parameter group.

    Attributes:
        small_sq: sum of w_i |g_i|^2, for each parameter group; empty where that is not known.
        big_sq: |sum w_i g_i|^2, for each parameter group.
        small_batch: 1 / sum(w_i / n_i), in samples.
        big_batch: 1 / sum(w_i^2 / n_i), in samples.
        count: K, how many independent gradients entered.
        samples: N = sum n_i.
    """

    small_sq: tuple[float, ...]
    big_sq: tuple[float, ...]
    small_batch: float
    big_batch: float
    count: int
    samples: float

    @classmethod
    def from_micro_batches(
        cls,
        squared_norms: Sequence[float],
        mean_squared_norm: float,
        samples: Sequence[float],
        weights: Sequence[float] | None = None,
    ) -> "WindowNorms":
        """Build the statistics of a single parameter group from its K micro-batches.

        Args:
            squared_norms: |g_i|^2 of each micro-batch's mean gradient. If the loss is a sum over
                samples rather than a mean, divide each by n_i^2 first.
            mean_squared_norm: |sum w_i g_i|^2.
            samples: n_i.
            weights: w_i, normalised here; n_i / N if not given.

        Raises:
            ValueError: the lengths differ, or a sample count or weight is not positive.

        Example:
            >>> window = WindowNorms.from_micro_batches([5.0, 5.0], 3.0, samples=[4, 4])
            >>> window.noise()[0]
            NoiseSample(trace=16.0, signal=1.0)
        """
        weights = samples if weights is None else weights
        if not len(squared_norms) == len(samples) == len(weights) > 0:
            raise ValueError(
                f"{len(squared_norms)} norms, {len(samples)} sample counts and {len(weights)} "
                "weights: give one of each per micro-batch"
            )
        if not all(value > 0 for value in (*samples, *weights)):
            raise ValueError(f"samples {samples} and weights {weights} must be positive")
        total = math.fsum(weights)
        w = [weight / total for weight in weights]
        return cls(
            small_sq=(math.fsum(wi * q for wi, q in zip(w, squared_norms, strict=True)),),
            big_sq=(mean_squared_norm,),
            small_batch=1 / math.fsum(wi / n for wi, n in zip(w, samples, strict=True)),
            big_batch=1 / math.fsum(wi * wi / n for wi, n in zip(w, samples, strict=True)),
            count=len(samples),
            samples=math.fsum(samples),
        )

    @property
    def finite(self) -> bool:
        """Whether every norm is a finite number."""
        return all(map(math.isfinite, self.small_sq)) and all(map(math.isfinite, self.big_sq))

    @property
    def shows_noise(self) -> bool:
        """Whether it holds two gradients or more, whose norms are known and finite."""
        return self.count >= 2 and len(self.small_sq) > 0 and self.finite

    def noise(self) -> tuple[NoiseSample, ...]:
        """The unbiased noise sample of each parameter group; their sum is the whole model's.

        Raises:
            ValueError: the window holds fewer than two gradients, or their norms are not known.
        """
        if not self.small_sq:
            raise ValueError("the norms of the window's gradients were not read")
        if self.count < 2:
            raise ValueError(
                f"a window of {self.count} gradient has no spread to measure: it takes two or more"
            )
        inverse_small, inverse_big = 1 / self.small_batch, 1 / self.big_batch
        samples = []
        for small, big in zip(self.small_sq, self.big_sq, strict=True):
            trace = (small - big) / (inverse_small - inverse_big)
            samples.append(NoiseSample(trace, big - trace * inverse_big))
        return tuple(samples)
