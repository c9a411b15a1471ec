"""What a window leaves when it has ended."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ended:
    """A window that has ended. `p.grad` times `scale` is its mean.

    Attributes:
        row: its numbers, summed over the ranks.
        norm: the norm of the mean, 0-d; nan or inf where nothing of it may be applied.
        scale: 0-d; None for 1.
        steps: its micro-batches on each rank.
    """

    row: Tensor
    norm: Tensor
    scale: Tensor | None
    steps: int
