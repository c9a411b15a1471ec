"""Where clipping begins: a level and a robust spread of the log norm, moved with the batch.

What is tracked is ln(|g| / m(B)) + const with m(B) the norm that the measured noise predicts at the
window's batch, so that a change of the batch neither looks like a spike nor hides one.
"""

import math
from dataclasses import dataclass

HALF_LIFE = 64  # updates
MIN_COUNT = 100  # norms before the spread is trusted
MIN_SPREAD = 0.02
WINSORISE = 4.0
MAX_LOG_NORM = 700.0  # where exp overflows
SD_PER_MEAN_DEVIATION = math.sqrt(math.pi / 2)


@dataclass(frozen=True, slots=True)
class NormLevel:
    """The level and the spread of ln |g|, both averaged over updates.

    Attributes:
        count: norms seen.
        level: average of ln |g|.
        deviation: average of |ln |g| - level|, outliers pulled in to four standard deviations.
    """

    count: int = 0
    level: float = 0.0
    deviation: float = 0.0

    @property
    def spread(self) -> float:
        """The standard deviation of ln |g|, from its mean deviation as if it were normal."""
        return max(SD_PER_MEAN_DEVIATION * self.deviation, MIN_SPREAD)

    def update(self, log_norm: float) -> "NormLevel":
        """Learn from one update's norm, outliers only as far as the winsorising limit."""
        offset = log_norm - self.level
        if self.count >= MIN_COUNT:
            reach = WINSORISE * self.spread
            offset = min(max(offset, -reach), reach)
        rate = max(1 / (self.count + 1), 1 - 2 ** (-1 / HALF_LIFE))
        deviation = 0.0 if self.count == 0 else abs(offset)
        return NormLevel(
            count=self.count + 1,
            level=self.level + rate * offset,
            deviation=self.deviation + rate * (deviation - self.deviation),
        )

    def threshold(self, z: float) -> float:
        """The norm z standard deviations above the level; infinite until enough were seen."""
        if self.count < MIN_COUNT:
            return math.inf
        log_norm = self.level + z * self.spread
        return math.exp(log_norm) if log_norm < MAX_LOG_NORM else math.inf
