"""Squared norms of lists of gradients: squares in fp32 or better, sums in fp64, on the device."""

import math
from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from noiseopt.capture.sharding import Share, local

# Of a gradient on the CPU |.|^2, where reading it waits for nothing and small tensors that live on
# among large ones cost more; elsewhere |.|, 0-d.
Begun = Tensor | float

# Getters for map(): over many small gradients a loop of Python's takes as long as their norms.
_dtype, _layout, _is_cpu = map(attrgetter, ("dtype", "layout", "is_cpu"))
_EXACT = (torch.float32, torch.float64)
SAMPLED_TENSORS = 8
SAMPLED_ENTRIES = 1024
_PIECE = 2**17
_FEW = 2**16  # whose squares, summed in fp32, are right to 1e-5; if all are alike, to 1e-4


def squared_norms(
    groups: Sequence[Sequence[Tensor]], device: torch.device, share: Share | None = None
) -> Tensor:
    """|g|^2 of each group of gradients.

    The gradients' values enter as they are: of a loss that is a mean over samples, of one that is a
    sum, or of one that was multiplied by a loss scale.

    Args:
        groups: the gradients of each parameter group; dense or sparse, real or complex. Of a
            DTensor this rank's part enters.
        device: where the result is wanted.
        share: how each gradient's part counts where the result is summed over ranks.

    Returns:
        Shape (len(groups),), fp64 (fp32 where the device has no fp64). Nothing waits for it.
    """
    if share is not None:
        return torch.stack([_shared_norm(grads, device, share) for grads in groups])
    held = list(map(_local, groups))
    if device.type == "cpu" and all(all(map(_is_cpu, grads)) for grads in held):
        return torch.tensor([*map(_sum_cpu, held)], dtype=torch.float64, device=device)
    return torch.stack([_squared_norm(grads, device) for grads in held])


def plain_norms(groups: Sequence[Sequence[Tensor]]) -> list[float]:
    """The same as plain numbers, which waits for whatever device the gradients are on."""
    held = list(map(_local, groups))
    if all(all(map(_is_cpu, grads)) for grads in held):
        return [*map(_sum_cpu, held)]
    return [_squared_norm(grads, torch.device("cpu")).item() for grads in held]


def sampled(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A few of them. An odd stride, so that of tensors in pairs it takes both kinds."""
    return tensors[:: -(-len(tensors) // SAMPLED_TENSORS) | 1]


def norm_of_sample(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """|.|^2 of the first entries of a few gradients together, 0-d. Nothing waits for it."""
    parts = [g.reshape(-1)[:SAMPLED_ENTRIES] if g.layout == torch.strided else g for g in grads]
    return squared_norms([parts], device)[0]


def begun_norm(grad: Tensor) -> Begun:
    """What one gradient adds to a norm, in the fewest operations: see `joined_norm`."""
    grad = local(grad)
    if grad.is_cpu:
        return _square_cpu(grad).item()
    return torch._foreach_norm([_plain(grad)], 2, dtype=_wide(grad.dtype))[0]


def joined_norm(begun: Sequence[Begun], device: torch.device) -> Tensor:
    """|g|^2 of all gradients together whose norms were begun, 0-d. Nothing waits for it."""
    on_host = sum(square for square in begun if isinstance(square, float))
    total = torch.full((), on_host, dtype=sum_dtype(device), device=device)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for norm in begun:
        if isinstance(norm, Tensor):
            by_kind[norm.device, norm.dtype].append(norm)
    for (source, _), norms in by_kind.items():
        squares = torch.stack(norms).to(sum_dtype(source)).square()
        total += moved(squares.sum(), device, total.dtype)
    return total


def unknown_norms(number: int, device: torch.device) -> Tensor:
    """What stands for norms that were not read: nan for each group."""
    return torch.full((number,), math.nan, dtype=sum_dtype(device), device=device)


def device_of(groups: Sequence[Sequence[Tensor]]) -> torch.device:
    """Where norms are kept: with the first parameter there is."""
    devices = (local(param).device for params in groups for param in params)
    return next(devices, torch.device("cpu"))


def moved(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor on a device. Nothing waits for it, but for what comes to the CPU.

    There it would be read before it has come: torch copies it to pinned memory meanwhile.
    """
    return value.to(device, dtype, non_blocking=device.type != "cpu")


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _local(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    return grads if {*map(type, grads)} <= {Tensor} else list(map(local, grads))


def _shared_norm(grads: Sequence[Tensor], device: torch.device, share: Share) -> Tensor:
    by_share: dict[float, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_share[share(grad)].append(local(grad))
    parts = [_squared_norm(tensors, device) * part for part, tensors in by_share.items()]
    return torch.stack(parts).sum() if parts else _squared_norm([], device)


def _squared_norm(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_device[grad.device].append(grad)
    total = torch.zeros((), dtype=sum_dtype(device), device=device)
    for source, tensors in by_device.items():
        if source.type == "cpu":
            total += _sum_cpu(tensors)
        else:
            total += moved(_squares_foreach(tensors).sum(), device, total.dtype)
    return total


def _plain(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        grad = grad.coalesce().values()
    if not grad.is_complex():
        return grad
    return torch.view_as_real(grad.conj() if grad.is_conj() else grad)  # of the same norm


def _sum_cpu(grads: Sequence[Tensor]) -> float:
    """|g|^2 of all together, as plain numbers: reading them takes less than stacking them."""
    few = grads
    if not {*map(_dtype, grads), *map(_layout, grads)} <= {torch.float32, torch.strided}:
        few = [g for g in few if g.dtype is torch.float32 and g.layout is torch.strided]
    # One call for all is what counts where each is small; its sums of many squares are inexact.
    few = [grad for grad in few if grad.numel() <= _FEW]
    norms = [norm.item() for norm in torch._foreach_norm(few)] if few else []
    total = sum((norm * norm for norm in norms), 0.0)
    if len(few) == len(grads):
        return total
    among_few = {*map(id, few)}
    return total + sum(_square_cpu(grad).item() for grad in grads if id(grad) not in among_few)


def _square_cpu(grad: Tensor) -> Tensor:
    if grad.dtype not in _EXACT or grad.layout != torch.strided:
        grad = _plain(grad)
    flat = grad if grad.dim() == 1 else grad.reshape(-1)
    if flat.numel() <= _PIECE:
        return _dot(flat)
    # One fp32 sum of millions of squares is off by 1e-4; pieces also stay in the cache.
    return torch.stack([_dot(piece) for piece in torch.split(flat, _PIECE)]).sum(
        dtype=torch.float64
    )


def _dot(flat: Tensor) -> Tensor:
    if flat.dtype not in _EXACT:
        flat = flat.float()
    return torch.dot(flat, flat)


def _squares_foreach(grads: list[Tensor]) -> Tensor:
    tensors = [_plain(grad) for grad in grads]
    wide = [tensor for tensor in tensors if tensor.dtype == torch.float64]
    narrow = [tensor for tensor in tensors if tensor.dtype != torch.float64]
    norms: list[Tensor] = []
    if narrow:
        norms += torch._foreach_norm(narrow, 2, dtype=torch.float32)
    if wide:
        norms += torch._foreach_norm(wide, 2)
    return torch.stack(norms).to(sum_dtype(norms[0].device)).square()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
