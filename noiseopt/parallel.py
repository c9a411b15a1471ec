"""How a model is parallel: which ranks share the gradients of its parameters, and what hides it."""

import gc
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from noiseopt.capture import device_of, is_sharded, spans_whole_mesh, unsharded_leaves
from noiseopt.distributed import Ranks


def ranks_of(groups: Sequence[Sequence[Tensor]], process_group: dist.ProcessGroup | None) -> Ranks:
    """The ranks that share the gradients of some parameters.

    Args:
        groups: the optimizer's parameters.
        process_group: the data-parallel ranks, where no mesh says so; if None, those over
            which DDP averages, and without DDP the default group.

    Raises:
        ValueError: parameters are averaged over different ranks, or in a way that is not
            measured rightly; or `process_group` contradicts their mesh or DDP.
    """
    params = [param for params in groups for param in params]
    _refuse_layouts(params)
    if world_size(process_group) < 0:
        raise ValueError(
            "this rank is not in process_group: build the optimizer with the group of the "
            "ranks that share its gradients"
        )
    device = device_of(groups)
    managed = {slot.param for _, slots in unsharded_leaves(params) for slot in slots}
    layouts = {_layout(param, param in managed) for param in params if is_sharded(param)}
    if not layouts:
        group = _ddp_group(groups, process_group)
        data = world_size(group)
        return Ranks(data, groups=(group,) if data > 1 else (), device=device)
    sizes = {layout.data for layout in layouts if layout.data}
    if len({layout.averaged_over for layout in layouts if layout.data}) > 1:
        raise ValueError(
            "the parameters are sharded over different meshes, as experts are, and their "
            "gradients averaged over different ranks, which is not measured yet: use "
            "noise='off', or give each mesh's parameters an optimizer of their own"
        )
    model = max(layout.model for layout in layouts)
    widest = max((layout.mesh for layout in layouts), key=lambda mesh: mesh.size())
    told = world_size(process_group) if process_group is not None else None
    data = max(sizes) if sizes else told or max(world_size(None) // model, 1)
    if told not in (None, data):
        raise ValueError(
            f"process_group has {told} ranks, but the mesh averages gradients over {data}: "
            "leave process_group out"
        )
    return Ranks(data, model, True, _groups(widest, data * model, process_group), device)


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in a process group; 1 where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def _refuse_layouts(params: Sequence[Tensor]) -> None:
    """Refuse parallel models whose parameters do not show which ranks hold what.

    Raises:
        ValueError: names how the model is wrapped, and the remedy.
    """
    how = None
    if any(hasattr(param, "_st_info") for param in params):
        how = "DDP(device_mesh=...) around tensor-parallel parameters"
    for module, slots in unsharded_leaves(params):
        meshes: Any = [slot.param for slot in slots]
        split = any(not placed.is_replicate() for param in meshes for placed in param.placements)
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "ReplicateModule" in kinds and split:
            how = "replicate() around tensor-parallel parameters"
        if spans_whole_mesh(module):
            how = "fully_shard(dp_mesh_dims=...)"
    if how is not None:
        raise ValueError(
            f"{how} is not measured rightly yet: use fully_shard(model, mesh=mesh['data']) over "
            "parallelize_module, or noise='off'"
        )


class DDPModules:
    """The DDP modules that wrap an optimizer's parameters, as loops make them and let them go."""

    def __init__(self) -> None:
        self._groups: Sequence[Sequence[Tensor]] = ()
        self._found: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._number = -1  # how many were found

    def around(
        self, groups: Sequence[Sequence[Tensor]], model: nn.Module | None = None
    ) -> Collection[nn.Module]:
        """Those around these parameters.

        Args:
            groups: the optimizer's parameters.
            model: what is trained, which may have been wrapped anew.
        """
        self._groups = groups
        found = self.living()
        if model is not None:
            self._see(getattr(model, "_orig_mod", model))
        return found

    def living(self) -> Collection[nn.Module]:
        """Those that there are, looked for anew where one of them is gone: the search is long."""
        if self._groups and len(self._found) != self._number:
            self._found = ddp_around(self._groups)
            self._number = len(self._found)
        return self._found

    def _see(self, model: Any) -> None:
        known: Collection[Any] = self._found
        if any(model in (each, each.module) for each in known):
            return
        ddp = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
        new = [each for each in ddp if each not in known]
        self._found.update(each for each in new if _wraps(each, self._groups))
        self._number = len(self._found)


def _wraps(module: nn.Module, groups: Sequence[Sequence[Tensor]]) -> bool:
    own = {param for params in groups for param in params}
    return not own.isdisjoint(module.parameters())


def ddp_around(groups: Sequence[Sequence[Tensor]]) -> "weakref.WeakSet[nn.Module]":
    """The DDP modules that wrap some of these parameters."""
    living = gc.get_objects()  # DDP keeps no list of its modules
    kinds = {kind for kind in set(map(type, living)) if DistributedDataParallel in kind.__mro__}
    wrappers = compress(living, map(kinds.__contains__, map(type, living)))  # many: in C
    return weakref.WeakSet(each for each in wrappers if _wraps(each, groups))


def _ddp_group(
    groups: Sequence[Sequence[Tensor]], told: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The process group over which DDP averages some parameters; None for the default one.

    Without DDP it is what was told.
    """
    if world_size(None) == 1:
        return told
    wrappers: Collection[Any] = ddp_around(groups)
    over = {tuple(_members(each)): each.process_group for each in wrappers}
    if len(over) > 1:
        raise ValueError(
            f"the parameters are wrapped in DDP over different ranks, {sorted(over)}, and their "
            "gradients averaged over those: give each its own optimizer"
        )
    for members, group in over.items():
        if told is not None:
            _compare_members(told, members, wrappers)
            return told
        return None if len(members) == world_size(None) else group
    return told


def _compare_members(
    told: dist.ProcessGroup, members: tuple[int, ...], wrappers: Collection[Any]
) -> None:
    own_hooks = any(wrapper._comm_hooks for wrapper in wrappers)  # which may average over others
    if set(dist.get_process_group_ranks(told)) != set(members) and not own_hooks:
        raise ValueError(
            f"process_group has the ranks {dist.get_process_group_ranks(told)}, but DDP averages "
            f"gradients over {list(members)}: leave process_group out"
        )


def _members(ddp: Any) -> list[int]:
    return dist.get_process_group_ranks(ddp.process_group)


def finds_unused(ddp: Any) -> bool:
    """Whether a rank may leave parameters out that another uses: DDP brings it their mean."""
    return bool(ddp.find_unused_parameters)


def refuse_join(ddp: Any) -> None:
    """Refuse to step inside `ddp.join()`: a rank that is done answers DDP's collectives only.

    Raises:
        RuntimeError: the module is inside such a context.
    """
    if ddp._join_config.enable:
        raise RuntimeError(
            "step() inside model.join(): a rank without data left takes no part in what the "
            "optimizer sums over ranks; set NoiseConfig(gradients='local'), run each micro-batch "
            "inside optimizer.accumulate(model), and call optimizer.flush() on every rank when "
            "its data ends"
        )


@dataclass(frozen=True)
class _Layout:
    """Over which ranks a sharded parameter lies: those with different data, and those without.

    `averaged_over` are those with which this rank averages it; none if that is not the mesh's part.
    """

    averaged_over: tuple[int, ...]
    data: int
    model: int
    mesh: Any


def _layout(param: Any, managed: bool) -> _Layout:
    mesh = param.device_mesh
    if not managed:
        return _Layout((), 0, mesh.size(), mesh)
    # FSDP2 puts its own dimensions first: replicas, if any, then shards.
    split = [dim for dim, placed in enumerate(param.placements) if not placed.is_replicate()]
    last = split[0] if split else mesh.ndim - 1
    here = mesh.get_coordinate()[last + 1 :]
    averaged_over = mesh.mesh[(slice(None),) * (last + 1) + tuple(here)].flatten().tolist()
    data = len(averaged_over)
    return _Layout(tuple(sorted(averaged_over)), data, mesh.size() // data, mesh)


def _groups(
    mesh: Any, ranks: int, process_group: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup | None, ...]:
    if ranks == 1:
        return ()
    if ranks == world_size(None):
        return (None,)
    along = tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
    return along if mesh.size() == ranks else (*along, process_group)
