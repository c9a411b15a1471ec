"""What a fixed batch would have cost for the same progress, by the noise that was measured.

By the model of `noiseopt.control.progress`. It assumes what that model does: the learning rate goes
with the batch as the model wants, the noise scale is a property of the weights whatever batch led
to them, and the Hessian is no more curved in noisy directions than in others.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noiseopt.control import Progress

REACH = 8.0  # how far beyond the run's own batches and noise scales is looked

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run cost, and what fixed batches would have.

    Attributes:
        batches: the fixed batches B, in samples.
        updates: how many updates each would have needed.
        own_updates: updates of the run while its noise was known.
        own_samples: samples in them.
        unknown_updates: updates that are left out, because the noise was unknown.
    """

    batches: Floats
    updates: Floats
    own_updates: float
    own_samples: float
    unknown_updates: float

    @property
    def samples(self) -> Floats:
        """How many samples each fixed batch would have needed."""
        return self.updates * self.batches

    @property
    def own_batch(self) -> float:
        """The run's mean batch while its noise was known, in samples."""
        return self.own_samples / self.own_updates


def cost(
    num_updates: Floats, num_samples: Floats, scales: Floats, points: int = 121
) -> Cost | None:
    """Compare a run with fixed batches, from far below its own numbers to far above.

    Args:
        num_updates: updates in each stretch of the run.
        num_samples: samples in those updates.
        scales: the noise scale by the end of each; nan where it was unknown.
        points: how many fixed batches.

    Returns:
        None if the noise was never known.
    """
    made = num_updates > 0
    known = made & (num_samples > 0) & ~np.isnan(scales)
    if not known.any():
        return None
    u, samples, n = num_updates[known], num_samples[known], scales[known]
    b = samples / u
    ends = np.concatenate([b, n[np.isfinite(n) & (n > b.min() / REACH) & (n < b.max() * REACH)]])
    fixed = np.geomspace(ends.min() / REACH, ends.max() * REACH, points)
    x = 1 / (1 + n / b)
    progress = Progress(float((u * x).sum()), float((samples * (1 - x)).sum()))
    return Cost(
        batches=fixed,
        updates=np.array([progress.updates_at(batch) for batch in fixed.tolist()]),
        own_updates=float(u.sum()),
        own_samples=float(samples.sum()),
        unknown_updates=float(num_updates[made & ~known].sum()),
    )
