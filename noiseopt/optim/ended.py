"""What a window leaves when it has ended."""

from dataclasses import dataclass

from torch import Tensor

from noiseopt.capture import Row


@dataclass(frozen=True, slots=True)
class Ended:
    """A window that has ended. `p.grad` times `scale` is its mean.

    Tensors are 0-d.

    Attributes:
        row: its numbers, summed over the ranks.
        norm: the norm of the mean; nan or inf where nothing of it may be applied.
        scale: a factor; None for 1.
        steps: its micro-batches on each rank.
    """

    row: Row
    norm: Tensor | float
    scale: Tensor | float | None
    steps: int
