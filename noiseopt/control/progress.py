"""What the updates of a run are worth, and what other batches would have needed for as much.

An update with a batch of B makes 1 / (1 + N/B) of the progress of one with the exact gradient, at
the best learning rate for it and with N the noise scale (McCandlish et al., arXiv 1812.06162,
section 2). So u updates with batches of b, while the noise scale is N, are worth
u (1 + N/B) / (1 + N/b) updates with a batch of B. With x = 1 / (1 + N/b) that is
u x + u b (1 - x) / B, also where N is infinite.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run, as far as its noise scale was known.

    Attributes:
        exact: sum of u x: how many exact updates it is worth.
        noisy: sum of u b (1 - x), in samples.
        updates: sum of u.
        samples: sum of u b.
    """

    exact: float = 0.0
    noisy: float = 0.0
    updates: float = 0.0
    samples: float = 0.0

    def after(self, updates: float, samples: float, scale: float) -> "Progress":
        """The progress after further updates.

        Args:
            updates: their number.
            samples: the samples in them.
            scale: the noise scale meanwhile, in samples; infinite where there is no signal.

        Example:
            >>> Progress().after(10, 80, scale=8.0).updates_at(4.0)
            15.0
        """
        if updates <= 0 or samples <= 0:
            return self
        x = 1 / (1 + scale * updates / samples)
        return Progress(
            self.exact + updates * x,
            self.noisy + samples * (1 - x),
            self.updates + updates,
            self.samples + samples,
        )

    def updates_at(self, batch: float) -> float:
        """How many updates with such a batch make as much progress."""
        return self.exact + self.noisy / batch

    def samples_at(self, batch: float) -> float:
        """How many samples they take."""
        return self.exact * batch + self.noisy
