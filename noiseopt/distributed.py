"""One small all-reduce that makes every rank hold the same numbers, and so decide alike."""

import torch
import torch.distributed as dist
from torch import Tensor

from noiseopt.capture import TAIL

TOLERANCE = 1e-6


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks that share the gradients; 1 where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def agree(row: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Reduce a window's row over the ranks.

    The gradients that entered it are means over the ranks already (as under DDP), so their norms
    are equal on all of them, and their sample counts add up.

    Args:
        row: from `Measured.row`.
        group: the data-parallel group; the default group if None.

    Returns:
        The row of the whole group, with the relative spread of the mean's norm over the ranks
        appended; see `check`.
    """
    ranks = world_size(group)
    groups = (row.numel() - TAIL) // 2
    big = row[groups : 2 * groups].sum()
    joined = torch.cat([row, big.reshape(1), big.square().reshape(1)])
    dist.all_reduce(joined, group=group)
    total, total_sq = joined[-2], joined[-1]
    spread = (ranks * total_sq - total.square()) / total.square().clamp_min(1e-300)
    reduced = joined[:-2] / ranks
    tail = 2 * groups
    reduced[tail : tail + 2] /= ranks
    reduced[tail + 3] *= ranks
    return torch.cat([reduced, spread.reshape(1)])


def check(spread: float) -> None:
    """Refuse to go on with gradients that were not synchronised.

    Raises:
        RuntimeError: the mean gradient's norm differed between ranks.
    """
    if spread > TOLERANCE:
        raise RuntimeError(
            "gradients differ between ranks at step() (relative spread of the squared norm "
            f"{spread:.2g}): the backward ran without synchronisation, for instance under "
            "no_sync() or on a model that is not wrapped; synchronise the gradients, or pass a "
            "process_group of the ranks that share them"
        )
