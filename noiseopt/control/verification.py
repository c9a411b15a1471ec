"""Did the change hurt? The loss after a change, against the line it followed before.

The line is a least-squares fit of the loss over the log of the samples, with exponentially
forgotten past. After a change the fit stands still and the residuals are averaged; the change hurt
if their mean exceeds the tolerance beyond its uncertainty, that of the extrapolation included.
"""

import math
from dataclasses import dataclass, field, replace

HALF_LIFE = 16  # decisions
MIN_POINTS = 12.0
HEADROOM = 0.25  # of the predicted fall: a loss that flattens by this much is not hurt
SETTLING = 2  # decisions after a change that are not judged
LENGTH = 10  # judged decisions
Z_AT_END = 1.645
Z_BEFORE_END = 4.0


@dataclass(frozen=True, slots=True)
class LossTrend:
    """A weighted straight-line fit: sums of weights, means, and spreads about the means.

    Attributes:
        weight: sum of the weights w of the points (x, y).
        weight_sq: sum of w^2.
        x: weighted mean of x, the log of the samples seen.
        y: weighted mean of y, the loss per sample.
        xx: sum of w (x - mean)^2.
        xy: sum of w times the product of both deviations.
        yy: sum of w (y - mean)^2.
    """

    weight: float = 0.0
    weight_sq: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def update(self, x: float, y: float) -> "LossTrend":
        """Add a point, older ones fading."""
        decay = 2 ** (-1 / HALF_LIFE)
        weight = decay * self.weight + 1
        dx, dy = x - self.x, y - self.y
        mean_x, mean_y = self.x + dx / weight, self.y + dy / weight
        return LossTrend(
            weight=weight,
            weight_sq=decay * decay * self.weight_sq + 1,
            x=mean_x,
            y=mean_y,
            xx=decay * self.xx + dx * (x - mean_x),
            xy=decay * self.xy + dx * (y - mean_y),
            yy=decay * self.yy + dy * (y - mean_y),
        )

    @property
    def points(self) -> float:
        """How many equally weighted points the fit is worth."""
        return self.weight * self.weight / self.weight_sq if self.weight_sq else 0.0

    def predict(self, x: float) -> tuple[float, float, float]:
        """The line at x, the variance of the line there, and the variance of one point about it."""
        slope = self.xy / self.xx if self.xx > 0 else 0.0
        residual = max(self.yy - slope * self.xy, 0.0) / self.weight
        noise = residual * self.points / max(self.points - 2, 1.0)
        leverage = (x - self.x) ** 2 / self.xx * self.weight if self.xx > 0 else 0.0
        return self.y + slope * (x - self.x), noise * (1 + leverage) / self.points, noise


@dataclass(frozen=True, slots=True)
class Judgement:
    """A change that is being verified, as far as it is judged.

    Attributes:
        revert_to: the accumulation steps before the change, to which it goes back if it hurts.
        judged: how many decisions' losses the judgement rests on.
        of: how many it takes at most.
        mean_excess: how far the loss has run above its trend, on average.
        expected: the loss that the trend predicts now.
    """

    revert_to: int
    judged: int
    of: int
    mean_excess: float
    expected: float


@dataclass(frozen=True, slots=True)
class Verification:
    """The loss trend, and the judgement of the last change while it is pending.

    Attributes:
        trend: the fit up to the last change.
        revert_to: the accumulation steps before the change; 0 while nothing is being verified.
        seen: decisions since the change, those without a loss included.
        excess: sum of the judged residuals.
        expected: the loss that the trend predicts now.
    """

    trend: LossTrend = field(default_factory=LossTrend)
    revert_to: int = 0
    seen: int = 0
    excess: float = 0.0
    expected: float = 0.0

    @property
    def pending(self) -> bool:
        """Whether a change is being verified."""
        return self.revert_to > 0

    @property
    def mean_excess(self) -> float:
        """How far the loss has run above its trend, on average."""
        return self.excess / max(self.seen - SETTLING, 1)

    @property
    def judgement(self) -> Judgement | None:
        """The pending judgement; None if there is none."""
        if not self.pending:
            return None
        judged = max(self.seen - SETTLING, 0)
        return Judgement(self.revert_to, judged, LENGTH, self.mean_excess, self.expected)

    def start(self, revert_to: int) -> "Verification":
        """Begin to verify a change, if the trend before it is known well enough to judge by."""
        if self.trend.points < MIN_POINTS:
            return self
        return replace(self, revert_to=revert_to, seen=0, excess=0.0)

    def scaled(self, ratio: float) -> "Verification":
        """The same where windows have so many times the micro-batches on each rank."""
        return replace(self, revert_to=max(round(self.revert_to * ratio), int(self.pending)))

    def finish(self) -> "Verification":
        """End the verification; the trend goes on from the points that come now."""
        return replace(self, revert_to=0, seen=0, excess=0.0)

    def observe(self, samples_seen: float, loss: float | None) -> "Verification":
        """Take one decision's mean loss: into the trend, or into the judgement.

        Args:
            samples_seen: where that loss was measured, on average.
            loss: None if it was not reported, or not finite.
        """
        x = math.log(samples_seen)
        if loss is None:
            return replace(self, seen=self.seen + 1) if self.pending else self
        if not self.pending:
            return replace(self, trend=self.trend.update(x, loss))
        expected = self.trend.predict(x)[0]
        judged = self.seen >= SETTLING
        return replace(
            self,
            seen=self.seen + 1,
            excess=self.excess + (loss - expected if judged else 0.0),
            expected=expected,
        )

    def verdict(self, samples_seen: float, tolerance: float) -> str:
        """One of "hurt", "fine" and "open".

        Args:
            samples_seen: where the trend is extrapolated to.
            tolerance: the admitted excess, relative to the expected loss.
        """
        judged = self.seen - SETTLING
        if not self.pending or judged < 1:
            return "open"
        at_end = judged >= LENGTH
        _, of_line, of_point = self.trend.predict(math.log(samples_seen))
        margin = (Z_AT_END if at_end else Z_BEFORE_END) * math.sqrt(of_line + of_point / judged)
        # Losses are convex in the log of the samples more often than straight.
        convex = HEADROOM * max(self.trend.y - self.expected, 0.0)
        if self.mean_excess - margin > tolerance * abs(self.expected) + convex:
            return "hurt"
        return "fine" if at_end else "open"
