"""Sharded tensors as each rank holds them, and where the gradients of FSDP2's parameters pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Share = Callable[[Tensor], float]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a part."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        part: Tensor = sharded.to_local()
    return part


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each rank gives its part, laid out as another is."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    other: Any = like
    made: Tensor = DTensor.from_local(
        part,
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )
    return made


def share_among(ranks: int) -> Share:
    """How each rank's part of a squared norm counts in the sum over so many ranks.

    What several of them hold alike must count once: plain tensors, replicated placements, and
    meshes that span only some of the ranks.
    """

    def share(tensor: Tensor) -> float:
        if not is_sharded(tensor):
            return 1 / ranks
        sharded: Any = tensor
        mesh, distinct = sharded.device_mesh, 1
        for dim, placement in enumerate(sharded.placements):
            if not placement.is_replicate():
                distinct *= mesh.size(dim)
        return distinct / ranks

    return share


def settled(grad: Tensor) -> Tensor:
    """A gradient whose parts are no longer to be added up, as those of a DTensor may be."""
    if not is_sharded(grad) or not any(p.is_partial() for p in _placements(grad)):
        return grad
    from torch.distributed.tensor import Replicate

    sharded: Any = grad
    done: Tensor = sharded.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in sharded.placements]
    )
    return done


def _placements(tensor: Any) -> Sequence[Any]:
    placements: Sequence[Any] = tensor.placements
    return placements


def unsharded_leaves(params: Sequence[Tensor]) -> Iterator[tuple[nn.Module, list["Slot"]]]:
    """The FSDP2 modules among whose parameters these are, each with the places of its own.

    In a module's forward, those places hold the parameters of which autograd makes the gradients:
    whole ones, on which hooks fire before anything is reduced (on the sharded ones they never do).
    """
    if not any(map(is_sharded, params)):
        return
    # torch keeps no public list of the modules that were sharded.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    wanted = set(params)
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            slots = [slot for slot in _own_slots(module, FSDPModule) if slot[2] in wanted]
            if slots:
                yield module, slots


def spans_whole_mesh(module: nn.Module) -> bool:
    """Whether an FSDP2 module was given one mesh for its data- and model-parallel ranks alike."""
    sharded: Any = module
    state = sharded._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return any(getattr(group.mesh_info, "is_spmd_mesh", False) for group in groups if group)


Slot = tuple[nn.Module, str, Tensor]


def _own_slots(module: nn.Module, nested: type) -> Iterator[Slot]:
    """Where a module's parameters stand, those of sharded modules inside it left out."""
    for name, param in module._parameters.items():
        if param is not None:
            yield module, name, param
    for child in module.children():
        if not isinstance(child, nested):
            yield from _own_slots(child, nested)
