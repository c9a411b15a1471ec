"""One window as one row of numbers on the device, and back to plain Python at a decision.

A row can be summed over ranks: its columns are sums over micro-batches, and the weights w_i are
divided by their own sum only when it is read. Columns: sum of w_i |g_i|^2 for each group,
|mean|^2 for each group, then sum w_i, sum w_i / n_i, sum w_i^2 / n_i, K, N, micro-batches, skipped,
sum of losses, number of losses, seconds, applied, clipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noiseopt.control import Window
from noiseopt.estimate import WindowNorms

TAIL = 12
WEIGHT, STEPS, SECONDS, APPLIED, CLIPPED = -12, -7, -3, -2, -1
ENDED = APPLIED  # from there on, how the window ended


@dataclass(frozen=True, slots=True)
class Measured:
    """A window's gradients, as far as they are kept. All tensors are on one device.

    Attributes:
        small_norms: |g_i|^2, shape (K, groups), those of skipped micro-batches included; nan where
            they are not known.
        big_norms: |sum w_i g_i|^2, the w_i divided by their sum; shape (groups,).
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

    def row(self, losses: Sequence[Tensor]) -> Tensor:
        """The window as one row, shape (2 * groups + 12,), as if applied and not clipped.

        Nothing waits for it.

        Args:
            losses: the losses reported in it, each 0-d.
        """
        on_cpu = self.small_norms.device.type == "cpu"
        return self._plain_row(losses) if on_cpu else self._device_row(losses)

    def _device_row(self, losses: Sequence[Tensor]) -> Tensor:
        used = self.weights > 0
        small = torch.where(used[:, None], self.small_norms, 0.0).mul(self.weights[:, None]).sum(0)
        ones, counted = torch.ones_like(self.weights), used.to(self.weights.dtype)
        sums = [
            self.weights,
            self.weights / self.samples,
            self.weights.square() / self.samples,
            counted,
            self.samples * counted,
            ones,
            ones - counted,
        ]
        loss = sum(loss.to(small.device, small.dtype, non_blocking=True) for loss in losses)
        rest = torch.stack([_like(value, small) for value in (loss, len(losses), 0.0, 1.0, 0.0)])
        return torch.cat([small, self.big_norms, torch.stack(sums).sum(1), rest])

    def _plain_row(self, losses: Sequence[Tensor]) -> Tensor:
        """The same where reading waits for nothing: made as plain numbers, it takes less time."""
        columns = (self.weights, self.samples, self.small_norms)
        each = list(zip(*(column.tolist() for column in columns), strict=True))
        used = [(weight, number, norms) for weight, number, norms in each if weight > 0]
        groups = range(len(self.big_norms))
        small = [sum(weight * norms[group] for weight, _, norms in used) for group in groups]
        tail = (
            sum(weight for weight, _, _ in each),
            sum(weight / number for weight, number, _ in each),
            sum(weight * weight / number for weight, number, _ in each),
            len(used),
            sum(number for _, number, _ in used),
            len(each),
            len(each) - len(used),
        )
        ended = (sum(map(float, losses)), len(losses), 0, 1, 0)
        numbers = [*small, *self.big_norms.tolist(), *tail, *ended]
        return torch.tensor(numbers, dtype=self.small_norms.dtype, device="cpu")


def end_row(row: Tensor, applied: Tensor | bool, clipped: Tensor | bool) -> None:
    """Write into a row how its window ended. Nothing waits for it."""
    if applied is not True:
        row[APPLIED] = applied
    if clipped is not False:
        row[CLIPPED] = clipped


def big_columns(row: Tensor) -> Tensor:
    """The part of a row that holds |mean|^2, shape (groups,)."""
    groups = (row.shape[-1] - TAIL) // 2
    return row[groups : 2 * groups]


def _like(value: Tensor | float, other: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(other.dtype)
    return other.new_full((), value)


def read_rows(rows: Sequence[Tensor], ranks: int) -> list[Window]:
    """Bring rows to the host in one transfer. This waits for the device.

    Args:
        rows: summed over the ranks.
        ranks: how many took part.
    """
    return [_read(row, ranks) for row in torch.stack(list(rows)).tolist()] if rows else []


def read_seconds(rows: Sequence[Tensor], ranks: int) -> float:
    """The seconds that rows tell together, mean over the ranks. This waits for the device."""
    return torch.stack([row[SECONDS] for row in rows]).sum().item() / ranks if rows else 0.0


def _read(row: list[float], ranks: int) -> Window:
    groups = (len(row) - TAIL) // 2
    small, big, tail = row[:groups], row[groups : 2 * groups], row[2 * groups :]
    weight, inverse_small, inverse_big, count, samples, steps, skipped = tail[:7]
    loss_sum, loss_count, _, applied, clipped = tail[7:]
    micro_batches = max(round(steps / ranks), 1)
    norms = None
    if applied <= 0:
        skipped = steps  # without an update nothing was used
    elif count > 0:
        norms = WindowNorms(
            small_sq=() if any(map(math.isnan, small)) else tuple(v / weight for v in small),
            big_sq=tuple(big),
            small_batch=weight / inverse_small,
            big_batch=weight * weight / inverse_big,
            count=round(count),
            samples=samples,
        )
    return Window(
        norms=norms,
        micro_batches=micro_batches,
        skipped=min(math.ceil(skipped / ranks - 1e-9), micro_batches),
        applied=applied > 0,
        clipped=clipped > 0,
        loss_sum=loss_sum,
        loss_count=round(loss_count),
        ranks=ranks,
    )
