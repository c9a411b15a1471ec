"""The host's clock, read when decisions are taken: only then has an accelerator caught up."""

import time


class Clock:
    """The time between decisions, on its way from every rank through a row to a later decision.

    The first decision only starts it: what goes before holds what happens once, such as compiling.

    Attributes:
        untold: seconds between the last two decisions on this rank, until a row takes them; or 0.
    """

    def __init__(self) -> None:
        self.untold = 0.0
        self._decided_at: float | None = None
        self._heard = 0.0

    def tell(self) -> float:
        """Give the untold seconds away."""
        told, self.untold = self.untold, 0.0
        return told

    def hear(self, seconds: float) -> None:
        """Take the mean over the ranks of what was told."""
        self._heard += seconds

    def decide(self) -> float | None:
        """Mark a decision; returns what was heard of the time between the two before."""
        now = time.perf_counter()
        if self._decided_at is not None:
            self.untold = now - self._decided_at
        self._decided_at = now
        heard, self._heard = self._heard, 0.0
        return heard or None
