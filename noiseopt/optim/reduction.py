"""A gradient summed over ranks by the optimizer itself, once for each window.

While a window is open each rank keeps its own gradients; at its end their weighted sums are added
up, in fp32 or wider, and divided by the sum of all weights. So ranks may bring different numbers of
samples, or of micro-batches, and the mean is still that over all samples.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from noiseopt.adaptation import Adaptation
from noiseopt.capture import (
    STEPS,
    WEIGHT,
    GradientWindow,
    as_tensor,
    big_columns,
    moved,
    sampled,
    scale_all,
    squared_norms,
    sum_dtype,
    wide_type,
)

Groups = Sequence[Sequence[Tensor]]


def reduce_window(
    window: GradientWindow,
    groups: Groups,
    adaptation: Adaptation,
    flushing: bool = False,
    late: bool = False,
) -> tuple[Tensor, int, bool]:
    """End a window of every rank's own gradients, leaving the mean over all in `p.grad`.

    Which of them there are on any rank is read before they are summed: on an accelerator this waits
    for it, once.

    Args:
        window: this rank's part of it.
        groups: the parameters of each group.
        adaptation: agrees with the other ranks.
        flushing: whether this rank has no more micro-batches to come.
        late: whether its loop has gone on since, as after a step that was skipped.

    Returns:
        The window's row, its micro-batches on each rank, and whether no rank has more to come.

    Raises:
        RuntimeError: a gradient is sparse, or a rank does not take part.
    """
    params = [param for group in groups for param in group]
    lead = len(window) if flushing or late else math.inf
    measured, sums = window.hand_out(groups)
    num_sparse = sum(total.layout != torch.strided for total in sums.values())
    flags = [*(param in sums for param in params), flushing, num_sparse]
    told = torch.tensor(flags, dtype=sum_dtype(window.device), device="cpu")
    told, plain = moved(told, window.device, told.dtype), list[float]()
    shows_data = _norm_of_halves([sums[p] for p in params if p in sums], window.device)
    row = as_tensor(adaptation.agree(measured, told, lead=lead, plain=plain, shows_data=shows_data))
    numbers, (*ranks_with, done, sparse) = plain[: len(row)], plain[len(row) :]
    if sparse:
        raise RuntimeError(
            f"{sparse:g} gradients are sparse, which the optimizer does not sum over ranks: leave "
            "out optimizer.accumulate(), or build the embedding with sparse=False"
        )
    if (weight := numbers[WEIGHT]) > 0:
        brought = [param for param, ranks in zip(params, ranks_with, strict=True) if ranks]
        totals = [_sum_of(param, sums, wide_type(param)) for param in brought]
        adaptation.ranks.sum_gradients_(totals, adaptation.open_window)
        scale_all(totals, 1 / weight)
        for param, total in zip(brought, totals, strict=True):
            if param.grad is None:
                param.grad = total.to(param.dtype)
            elif param.grad is not total:
                param.grad.copy_(total)
    grads = [[grad for p in group if (grad := p.grad) is not None] for group in groups]
    big_columns(row).copy_(squared_norms(grads, row.device) + 0 / row[WEIGHT])
    ranks = adaptation.ranks
    return row, math.ceil(numbers[STEPS] / ranks.data), round(done) == ranks.all


def _norm_of_halves(totals: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of every other entry: where each rank's loop clips its own, only whole norms are one.

    1 where they are all zeros, as those of a table of whose rows few were used may be.
    """
    halves = [
        total.reshape(-1)[::2] if total.layout == torch.strided else total
        for total in sampled(totals)
    ]
    norm = squared_norms([halves], device)[0]
    return norm.where(norm != 0, 1.0)


def _sum_of(param: Tensor, sums: Mapping[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return sums[param] if param in sums else torch.zeros_like(param, dtype=dtype)
