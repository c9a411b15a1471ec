"""One window as one row of numbers on the device, and back to plain Python at a decision.

Columns: sum of w_i |g_i|^2 for each group, |sum w_i g_i|^2 for each group, then
sum w_i / n_i, sum w_i^2 / n_i, K, N, micro-batches, skipped, applied, clipped, sum of losses,
number of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noiseopt.control import Window
from noiseopt.estimate import WindowNorms

TAIL = 10
APPLIED = -4


@dataclass(frozen=True, slots=True)
class Measured:
    """A window's gradients, as far as they are kept. All tensors are on one device.

    Attributes:
        small_norms: |g_i|^2, shape (K, groups), those of skipped micro-batches included.
        big_norms: |sum w_i g_i|^2, shape (groups,).
        samples: n_i, shape (K,).
        weights: w_i up to a common factor, shape (K,); 0 for skipped micro-batches.
        scale: what `p.grad` is still to be multiplied by to be the mean; None for 1.
    """

    small_norms: Tensor
    big_norms: Tensor
    samples: Tensor
    weights: Tensor
    scale: Tensor | None

    def __len__(self) -> int:
        """K, the micro-batches of the window, the skipped ones included."""
        return self.small_norms.shape[0]

    def row(
        self, applied: Tensor | bool, clipped: Tensor | bool, losses: Sequence[Tensor]
    ) -> Tensor:
        """The window as one row, shape (2 * groups + 10,). Nothing waits for it.

        Args:
            applied: whether the window ended in an update, 0-d.
            clipped: whether its gradient was clipped, 0-d.
            losses: the losses reported in it, each 0-d.
        """
        alone = len(self) == 1 and self.small_norms.device.type == "cpu"
        if alone and applied is True and self.weights.item() > 0:
            return self._row_of_one(applied, clipped, losses)
        used = (self.weights > 0) & applied  # without an update nothing was used
        weights = self.weights / self.weights.sum()
        small = torch.where(used[:, None], self.small_norms, 0.0).mul(weights[:, None]).sum(0)
        ones, counted = torch.ones_like(weights), used.to(weights.dtype)
        sums = [
            weights / self.samples,
            weights.square() / self.samples,
            counted,
            self.samples * counted,
            ones,
            ones - counted,
        ]
        rest: list[Tensor | float] = [
            applied,
            clipped,
            sum(loss.to(small.device, small.dtype, non_blocking=True) for loss in losses),
            len(losses),
        ]
        tail = torch.stack(sums).sum(1), torch.stack([_like(value, small) for value in rest])
        return torch.cat([small, self.big_norms, *tail])

    def _row_of_one(
        self, applied: Tensor | bool, clipped: Tensor | bool, losses: Sequence[Tensor]
    ) -> Tensor:
        """The same where it takes no arithmetic and reading is free: made as plain numbers."""
        samples = self.samples.item()
        ended = (float(applied), float(clipped), sum(map(float, losses)), len(losses))
        tail = (1 / samples, 1 / samples, 1, samples, 1, 0, *ended)
        norms = (*self.small_norms[0].tolist(), *self.big_norms.tolist())
        return torch.tensor([*norms, *tail], dtype=self.small_norms.dtype)


def _like(value: Tensor | float, other: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(other.dtype)
    return other.new_full((), value)


def read_rows(rows: Sequence[Tensor]) -> list[Window]:
    """Bring rows to the host in one transfer. This waits for the device."""
    return [_read(row) for row in torch.stack(list(rows)).tolist()] if rows else []


def _read(row: list[float]) -> Window:
    groups = (len(row) - TAIL) // 2
    small, big, tail = row[:groups], row[groups : 2 * groups], row[2 * groups :]
    inverse_small, inverse_big, count, samples, steps, skipped, applied, clipped = tail[:8]
    norms = None
    if count > 0:
        norms = WindowNorms(
            small_sq=tuple(small),
            big_sq=tuple(big),
            small_batch=1 / inverse_small,
            big_batch=1 / inverse_big,
            count=round(count),
            samples=samples,
        )
    return Window(
        norms=norms,
        micro_batches=round(steps),
        skipped=round(skipped),
        applied=applied > 0,
        clipped=clipped > 0,
        loss_sum=tail[8],
        loss_count=round(tail[9]),
    )
