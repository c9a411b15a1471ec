"""One window as one row of numbers, on the device or on the host, and as a `Window` at a decision.

A row can be summed over ranks: its columns are sums over micro-batches, and the weights w_i are
divided by their own sum only when it is read. Columns: sum of w_i |g_i|^2 for each group,
|mean|^2 for each group, then sum w_i, sum w_i / n_i, sum w_i^2 / n_i, K, N, micro-batches, skipped,
sum of losses, number of losses, seconds, applied, clipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noiseopt.capture.norms import moved
from noiseopt.control import Window
from noiseopt.estimate import WindowNorms

TAIL = 12
WEIGHT, STEPS, SECONDS, APPLIED, CLIPPED = -12, -7, -3, -2, -1
ENDED = APPLIED  # from there on, how the window ended

Row = Tensor | list[float]  # plain numbers on the CPU
Column = Tensor | Sequence[float]
Table = Tensor | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A window's gradients, as far as they are kept: all tensors on one device, or all numbers.

    Attributes:
        small_norms: |g_i|^2, shape (K, groups), those of skipped micro-batches included; nan where
            they are not known.
        big_norms: |sum w_i g_i|^2, the w_i divided by their sum; shape (groups,).
        samples: n_i, shape (K,).
        weights: w_i up to a common factor, shape (K,); 0 for skipped micro-batches.
        scale: what `p.grad` is still to be multiplied by to be the mean; None for 1.
    """

    small_norms: Table
    big_norms: Column
    samples: Column
    weights: Column
    scale: Tensor | float | None

    def __len__(self) -> int:
        """K, the micro-batches of the window, the skipped ones included."""
        return len(self.small_norms)

    @property
    def norm(self) -> Tensor | float:
        """|sum w_i g_i|."""
        return _norm(self.big_norms)

    def row(self, losses: Sequence[Tensor]) -> Row:
        """The window as one row, shape (2 * groups + 12,), as if applied and not clipped.

        Nothing waits for it.

        Args:
            losses: the losses reported in it, each 0-d.
        """
        on_host = not isinstance(self.small_norms, Tensor) or self.small_norms.is_cpu
        make: Any = _host_row if on_host else _device_row
        row: Row = make(self.small_norms, self.big_norms, self.samples, self.weights, losses)
        return row


def _device_row(
    small: Tensor, big: Tensor, samples: Tensor, weights: Tensor, losses: Sequence[Tensor]
) -> Tensor:
    used = weights > 0
    small = torch.where(used[:, None], small, 0.0).mul(weights[:, None]).sum(0)
    ones, counted = torch.ones_like(weights), used.to(weights.dtype)
    sums = [
        weights,
        weights / samples,
        weights.square() / samples,
        counted,
        samples * counted,
        ones,
        ones - counted,
    ]
    loss = sum(like(loss, small) for loss in losses)
    rest = torch.stack([like(value, small) for value in (loss, len(losses), 0.0, 1.0, 0.0)])
    return torch.cat([small, big, torch.stack(sums).sum(1), rest])


def _host_row(
    small: Table, big: Column, samples: Column, weights: Column, losses: Sequence[Tensor]
) -> list[float]:
    """The same where reading waits for nothing: made as plain numbers, it takes less time."""
    each = list(zip(*map(_listed, (weights, samples, small)), strict=True))
    used = [(weight, number, norms) for weight, number, norms in each if weight > 0]
    groups = range(len(big))
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
    return [*map(float, (*small, *_listed(big), *tail, *ended))]


def _listed(column: Any) -> Any:
    return column.tolist() if isinstance(column, Tensor) else column


def _norm(squares: Column) -> Tensor | float:
    return squares.sum().sqrt() if isinstance(squares, Tensor) else math.sqrt(sum(squares))


def as_tensor(row: Row) -> Tensor:
    """A row as a tensor, itself if it is one."""
    if isinstance(row, Tensor):
        return row
    return torch.tensor(row, dtype=torch.float64, device="cpu")


def end_row(row: Row, applied: Tensor | bool, clipped: Tensor | bool) -> None:
    """Write into a row how its window ended. Nothing waits for it."""
    columns: Any = row
    if applied is not True:
        columns[APPLIED] = applied if isinstance(row, Tensor) else float(applied)
    if clipped is not False:
        columns[CLIPPED] = clipped if isinstance(row, Tensor) else float(clipped)


def norm_of_mean(row: Row) -> Tensor | float:
    """|mean|, of all groups together."""
    groups = (len(row) - TAIL) // 2
    return _norm(row[groups : 2 * groups])


def big_columns(row: Tensor) -> Tensor:
    """The part of a row that holds |mean|^2, shape (groups,)."""
    groups = (len(row) - TAIL) // 2
    return row[groups : 2 * groups]


def like(value: Tensor | float, other: Tensor) -> Tensor:
    """A number where another tensor is, and of its type."""
    if isinstance(value, Tensor):
        return moved(value, other.device, other.dtype)
    return other.new_full((), value)


def read_rows(rows: Sequence[Row], ranks: int) -> list[Window]:
    """Bring rows to the host, from a device in one transfer. This waits for it.

    Args:
        rows: summed over the ranks.
        ranks: how many took part.
    """
    on_device = any(isinstance(row, Tensor) for row in rows)
    lists: Any = torch.stack(list(map(as_tensor, rows))).tolist() if on_device else rows
    return [_read(row, ranks) for row in lists]


def read_seconds(rows: Sequence[Row], ranks: int) -> float:
    """The seconds that rows tell together, mean over the ranks. This waits for the device."""
    return float(sum(row[SECONDS] for row in rows)) / ranks


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
