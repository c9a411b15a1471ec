"""Sharded tensors as each rank holds them, and where the gradients of FSDP2's parameters pass."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


def may_be_empty(tensor: Tensor) -> bool:
    """Whether some rank may hold nothing of it: of ten rows on eight ranks five have two each."""
    if not is_sharded(tensor):
        return False
    sharded: Any = tensor
    ranks: dict[int, int] = defaultdict(lambda: 1)
    for mesh_dim, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            ranks[placement.dim] *= sharded.device_mesh.size(mesh_dim)
    sizes = [(tensor.shape[dim], number) for dim, number in ranks.items()]
    return any((number - 1) * math.ceil(rows / number) >= rows for rows, number in sizes)


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


def laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient spread over the ranks as its parameter is, which that of a DTensor need not be."""
    if not is_sharded(grad) or _placements(grad) == _placements(param):
        return grad
    sharded: Any = grad
    done: Tensor = sharded.redistribute(placements=_placements(param))
    return done


def _placements(tensor: Any) -> Sequence[Any]:
    placements: Sequence[Any] = tensor.placements
    return placements


def unsharded_leaves(params: Sequence[Tensor]) -> Iterator[tuple[nn.Module, list["Slot"]]]:
    """The FSDP2 modules among whose parameters these are, each with the slots of its own.

    Modules that were sharded as one share their slots: each of them comes with all.

    From a module's first forward on, those hold the parameters of which autograd makes the
    gradients: whole ones, on which hooks fire before anything is reduced (on the sharded ones they
    never do).
    """
    if not any(map(is_sharded, params)):
        return
    # torch keeps no public list of the modules that were sharded.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    wanted = set(params)
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            slots = [slot for slot in _own_slots(module) if slot.param in wanted]
            if slots:
                yield module, slots


def spans_whole_mesh(module: nn.Module) -> bool:
    """Whether an FSDP2 module was given one mesh for its data- and model-parallel ranks alike."""
    return any(getattr(group.mesh_info, "is_spmd_mesh", False) for group in _groups_of(module))


@dataclass(frozen=True)
class Slot:
    """One of FSDP2's parameters: `param` is the optimizer's, `held` FSDP2's account of it."""

    param: Tensor
    held: Any

    @property
    def leaf(self) -> Tensor | None:
        """The whole one, in which autograd accumulates; None before the first forward."""
        whole: Tensor | None = getattr(self.held, "_unsharded_param", None)
        return whole

    @property
    def kept(self) -> list[Tensor]:
        """The gradients that FSDP2 has accumulated in it, which are still to be averaged."""
        leaf, kept = self.leaf, self.held.unsharded_accumulated_grad
        return [g for g in (kept, None if leaf is None else leaf.grad) if g is not None]

    @property
    def mark(self) -> list[tuple[int, int]]:
        """What changes as soon as FSDP2 accumulates a gradient in it, or averages it."""
        return [(id(grad), grad._version) for grad in self.kept]

    def drop_gradient(self) -> None:
        """Drop what FSDP2 has accumulated in it and not averaged yet."""
        self.held.unsharded_accumulated_grad = None
        if self.leaf is not None:
            self.leaf.grad = None


def _own_slots(module: nn.Module) -> Iterator[Slot]:
    """A module's parameters, those of sharded modules inside it left out.

    Between forwards, as after one without gradients, its modules may hold whole ones, which are not
    the optimizer's.
    """
    for held in (held for group in _groups_of(module) for held in group.fsdp_params):
        at = held._module_info
        stands = at.module._parameters[at.param_name]
        yield Slot(stands if held.sharded_state.name == "SHARDED" else held.sharded_param, held)


def _groups_of(module: nn.Module) -> list[Any]:
    sharded: Any = module
    state = sharded._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group]
