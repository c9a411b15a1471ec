"""The rivals: how each chooses windows and rates, from its published formulas. No torch.

A window is counted in micro-batches, and one micro-batch is the user's own batch, for which the
rate was tuned. All follow the same schedule in samples and clip at 1, as is customary.

`keep_half_life` keeps the half-life of Adam's second moment in samples, beta2^window, as the
constant windows do; no rival was published so. Both ways are run on the tuning seed, and the better
is reported.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.convergence.gradients import Spread

MAX_WINDOW = 32  # NoiseConfig's own limit
MIN_BETA2 = 0.9  # likewise


@dataclass(frozen=True)
class Moment:
    """Where a run stands as a window opens.

    Attributes:
        share: of its samples that it has seen.
        decay: the peak of the schedule over its value now; 1 before it falls.
    """

    share: float
    decay: float


@dataclass
class Rule:
    """A constant window with its own tuned rate: the parent of all others.

    Attributes:
        steps: the first window.
        keep_half_life: see the module.
        parts: how many parts of a window the rule must see the gradients of.
        measured: the share of the run between two windows that are cut into parts.
    """

    steps: int = 1
    keep_half_life: bool = False

    parts: ClassVar[int] = 4
    measured: ClassVar[float] = 1 / 244

    def window(self, moment: Moment) -> int:
        """Micro-batches in the window that opens now."""
        return self.steps

    def lr_factor(self, window: int) -> float:
        """The factor on the scheduled rate for such a window."""
        return 1.0

    def beta2(self, beta2: float, window: int) -> float:
        """Adam's beta2 for such a window."""
        return max(beta2**window, min(MIN_BETA2, beta2)) if self.keep_half_life else beta2

    def learn(self, spread: Spread, share: float) -> None:
        """Take in the spread of a window's gradients, after such a share of the run."""


@dataclass
class SquareRoot(Rule):
    """A rule that scales the rate with the root of the batch."""

    def lr_factor(self, window: int) -> float:
        return math.sqrt(window)


@dataclass
class Ramp(SquareRoot):
    """A hand ramp: the window doubles at each quarter of the run, 1, 2, 4, 8 (as OLMo's, sqrt)."""

    every: float = 0.25

    def window(self, moment: Moment) -> int:
        return int(2 ** int(moment.share / self.every + 1e-9))


@dataclass
class LateSwitch(SquareRoot):
    """Small for most of the run, large at the end: Wang et al., arXiv 2602.14208, at 75 %."""

    at: float = 0.75
    factor: int = 8

    def window(self, moment: Moment) -> int:
        return self.factor if moment.share >= self.at else 1


@dataclass
class Seesaw(SquareRoot):
    """Where the schedule divides the rate by alpha, divide by its root and multiply the batch.

    Meterez et al., ICLR 2026, alpha = 1.1. Windows are whole micro-batches, rounded down; the
    remainder stays with the rate.
    """

    alpha: float = 1.1

    def window(self, moment: Moment) -> int:
        points = math.floor(math.log(moment.decay) / math.log(self.alpha) + 1e-9)
        return max(1, min(MAX_WINDOW, math.floor(self.alpha**points + 1e-9)))


@dataclass
class AdaScale(Rule):
    """AdaScale (Johnson et al. 2020) at a fixed scale S, its gain's root for Adam (AdaptDL).

    gain = (var + sqr) / (var / S + sqr), with the variance of the base batch's gradient and the
    squared norm of its mean, floored in every step, and averaged by theta = max(1 - S/1000, 0), a
    plain mean at first. The schedule stays in samples: in the gain's own time a run at equal
    samples would end before its rate has fallen.
    """

    steps: int = 4

    def __post_init__(self) -> None:
        self._var = self._sqr = 0.0
        self._count = 0

    parts: ClassVar[int] = 2
    measured: ClassVar[float] = 0.0

    def lr_factor(self, window: int) -> float:
        if not self._count:
            return 1.0
        return math.sqrt(adascale_gain(self._var, self._sqr, window))

    def learn(self, spread: Spread, share: float) -> None:
        var, sqr = adascale_moments(spread, self.steps)
        self._count += 1
        theta = min(1 - 1 / self._count, max(1 - self.steps / 1000, 0.0))
        self._var += (1 - theta) * (var - self._var)
        self._sqr += (1 - theta) * (sqr - self._sqr)


def adascale_moments(spread: Spread, scale: int) -> tuple[float, float]:
    """The variance of the base batch's gradient, and |G|^2, both floored as in the paper."""
    base = spread.batch / scale
    return max(spread.trace / base, 1e-6), max(spread.big_sq - spread.trace / spread.batch, 0.0)


def adascale_gain(var: float, sqr: float, scale: float) -> float:
    """The gain of one step at `scale` times the base batch, from 1 to `scale`."""
    return (var + sqr) / (var / scale + sqr)


@dataclass
class Growing(SquareRoot):
    """A rule that asks for a batch when it has measured, and never shrinks.

    Published every 100 steps of some 24,400 (160M parameters, 3.2B tokens): as often here.
    """

    warm_up: float = 0.15
    theta: float = 0.0

    parts: ClassVar[int] = 8

    def window(self, moment: Moment) -> int:
        return self.steps

    def grow(self, batch: float, spread: Spread) -> None:
        """Follow the batch that is asked for, in whole micro-batches."""
        micro_batch = spread.batch / self.steps
        if math.isfinite(batch):
            wanted = min(max(math.floor(batch / micro_batch), 1), MAX_WINDOW)
            self.steps = max(self.steps, wanted)


@dataclass
class NormTest(Growing):
    """The norm test: where tr(Sigma)/B > theta^2 |g|^2, grow to ceil(tr(Sigma)/(theta^2 |g|^2)).

    Byrd et al. 2012; among ranks Lau et al., arXiv 2412.21124, who take theta from 0.1 to 0.3 for
    language models. Measured as often as the noise-scale rules.
    """

    warm_up: float = 0.05
    theta: float = 0.3
    scale_lr: bool = False

    def lr_factor(self, window: int) -> float:
        return math.sqrt(window) if self.scale_lr else 1.0

    def learn(self, spread: Spread, share: float) -> None:
        if share >= self.warm_up and norm_test_fails(spread, self.theta):
            self.grow(ratio_batch(spread.trace, spread.big_sq, self.theta), spread)


def norm_test_fails(spread: Spread, theta: float) -> bool:
    """Whether the noise of the mean exceeds theta times its norm."""
    return spread.trace / spread.batch > theta**2 * spread.big_sq


def ratio_batch(noise: float, signal: float, theta: float) -> float:
    """ceil(noise / (theta^2 signal)); infinite without a signal."""
    return math.ceil(noise / (theta**2 * signal)) if signal > 0 else math.inf


@dataclass
class NoiseScaleL2(Growing):
    """The Euclidean noise scale, theta = 0.3: Naganuma et al., arXiv 2602.03001, Algorithm 1.

    Noise and signal, the plug-in of the mean gradient, are each averaged by 0.9 without debiasing;
    after 15 % of the run the batch becomes ceil(noise / (theta^2 signal)) and never shrinks.
    """

    theta: float = 0.3

    def __post_init__(self) -> None:
        self._noise = self._signal = 0.0

    def squares(self, spread: Spread) -> tuple[float, float]:
        """The squared norms of one sample's deviation and of the mean gradient."""
        return max(spread.trace, 0.0), spread.big_sq

    def learn(self, spread: Spread, share: float) -> None:
        noise, signal = self.squares(spread)
        self._noise = 0.9 * self._noise + 0.1 * noise
        self._signal = 0.9 * self._signal + 0.1 * signal
        if share >= self.warm_up:
            self.grow(ratio_batch(self._noise, self._signal, self.theta), spread)


@dataclass
class NoiseScaleL1(NoiseScaleL2):
    """The same in the dual norm of sign descent, theta = 0.6, which they take for AdamW."""

    theta: float = 0.6

    def squares(self, spread: Spread) -> tuple[float, float]:
        return spread.deviation_l1**2, spread.big_l1**2


RULES: dict[str, type[Rule]] = {
    "constant": Rule,
    "ramp": Ramp,
    "seesaw": Seesaw,
    "late-switch": LateSwitch,
    "adascale": AdaScale,
    "norm-test": NormTest,
    "gns-l2": NoiseScaleL2,
    "gns-l1": NoiseScaleL1,
}
