"""The ranks that train one model: which they are, and what they tell one another.

Every decision rests on numbers that were summed over all of them, in one small all-reduce for each
update, so every rank decides alike. Collectives are called here and nowhere else.
"""

import gc
import logging
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from noiseopt.capture import (
    Share,
    device_of,
    is_sharded,
    share_among,
    spans_whole_mesh,
    unsharded_leaves,
)

BUCKET_BYTES = 25 * 2**20
DIGESTS = 2**16  # so few that sums of their squares show the least difference in fp64

# torch's own, which have no types.
_buckets: Any = _take_tensors
_flatten: Any = _flatten_dense_tensors
_unflatten: Any = _unflatten_dense_tensors

logger = logging.getLogger("noiseopt")


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in a process group; 1 where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that take part in one optimizer's updates.

    Attributes:
        data: how many see different micro-batches.
        model: over how many each of those spreads its model, as by tensor parallelism.
        sharded: whether `p.grad` holds only a part of the gradient.
        groups: the process groups to sum over in turn, to sum over all; None for the default one.
        device: of the parameters.
    """

    data: int = 1
    model: int = 1
    sharded: bool = False
    groups: tuple[dist.ProcessGroup | None, ...] = ()
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[Tensor]],
        process_group: dist.ProcessGroup | None,
    ) -> "Ranks":
        """Those that share the gradients of some parameters.

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
        managed = {slot[2] for _, slots in unsharded_leaves(params) for slot in slots}
        layouts = {_layout(param, param in managed) for param in params if is_sharded(param)}
        if not layouts:
            group = _ddp_group(groups, process_group)
            data = world_size(group)
            return cls(data, groups=(group,) if data > 1 else (), device=device)
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
        return cls(data, model, True, _groups(widest, data * model, process_group), device)

    @property
    def all(self) -> int:
        """How many there are."""
        return self.data * self.model

    @property
    def share(self) -> Share | None:
        """How this rank's part of a gradient counts in a sum over all; None where it is alone."""
        return share_among(self.all) if self.all > 1 else None

    def sum_(self, numbers: Tensor, what: str) -> Tensor:
        """Sum a tensor over all ranks, in place. On an accelerator nothing waits for it.

        Args:
            numbers: contiguous.
            what: what is being summed, for the error.

        Raises:
            RuntimeError: some rank does not take part.
        """
        self.begin_sum_(numbers, what)()
        return numbers

    def begin_sum_(self, numbers: Tensor, what: str) -> Callable[[], None]:
        """Begin what `sum_` does, and return what ends it. The tensor is not to be touched before.

        Over several groups, all but the last sum are ended at once.
        """
        *first, last = self.groups
        with self._named(what):
            for group in first:
                dist.all_reduce(numbers, group=group)
            work = dist.all_reduce(numbers, group=last, async_op=True)

        def end() -> None:
            with self._named(what):
                work.wait()

        return end

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Say in the error who waited for whom, and where."""
        try:
            yield
        except RuntimeError as error:
            uneven = "NoiseConfig(gradients='local') and flush() on every rank"
            raise RuntimeError(
                f"rank {dist.get_rank()} waited in vain for the {self.all - 1} others in {what}: "
                "one of them has stopped, raised, or brought fewer micro-batches (uneven data "
                f"takes {'as many micro-batches on each' if self.sharded else uneven}): {error}"
            ) from error

    def _on_device(self) -> AbstractContextManager[object]:
        """For objects, that NCCL sends from the current device, which the loop may not have set."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def check_reach(self) -> None:
        """See that the process groups can sum what is kept with the parameters.

        Raises:
            RuntimeError: it is on the CPU, and they are for accelerators alone.
        """
        for group in self.groups:
            summing: Any = group or dist.group.WORLD
            kinds = {each.type for each in summing._device_types}
            if self.device.type == "cpu" and "cpu" not in kinds:
                raise RuntimeError(
                    "parameters are on the CPU, as where FSDP2 offloads them, and the process "
                    f"group sums on {', '.join(sorted(kinds))} only: initialise it for both, as by "
                    "init_process_group('cpu:gloo,cuda:nccl')"
                )

    def sum_gradients_(self, grads: Sequence[Tensor], what: str) -> None:
        """Sum gradients over all ranks, in place, in as few collectives as buckets allow.

        Args:
            grads: dense; of the same shapes, in the same order, on every rank.
            what: what is being summed, for the error.
        """
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for grad in map(_real, grads):
            by_device[grad.device].append(grad)
        for bucket in chain(*(_buckets(each, BUCKET_BYTES) for each in by_device.values())):
            flat = self.sum_(_flatten(bucket), what)
            parts = _unflatten(flat, bucket)
            for grad, part in zip(bucket, parts, strict=True):
                if grad.data_ptr() != part.data_ptr():
                    grad.copy_(part)

    def warn(self, text: str) -> None:
        """Log a warning once for all ranks."""
        if all(dist.get_rank(group) == 0 for group in self.groups):
            logger.warning("%s", text)

    def compare(self, facts: Mapping[str, Any], what: str) -> None:
        """See that every rank says the same. This waits for the device.

        Args:
            facts: what is to be equal, by name.
            what: what is being compared, for the error.

        Raises:
            RuntimeError: ranks differ; names what differs, and how.
        """
        told = [dict(facts)]
        for group in self.groups:  # all of them before anyone raises, and leaves others waiting
            gathered: list[list[dict[str, Any]]] = [[]] * dist.get_world_size(group)
            with self._named(what), self._on_device():
                dist.all_gather_object(gathered, told, group=group)
            told = list(chain(*gathered))
        names = sorted({name for each in told for name in each})
        differing = [n for n in names if any(each.get(n) != told[0].get(n) for each in told)]
        if differing:
            lines = [f"{n}: {[each.get(n) for each in told]}" for n in differing[:8]]
            raise RuntimeError(
                f"ranks disagree on {what} (one value for each rank): " + "; ".join(lines)
            )


def _refuse_layouts(params: Sequence[Tensor]) -> None:
    """Refuse parallel models whose parameters do not show which ranks hold what.

    Raises:
        ValueError: names how the model is wrapped, and the remedy.
    """
    how = None
    if any(hasattr(param, "_st_info") for param in params):
        how = "DDP(device_mesh=...) around tensor-parallel parameters"
    for module, slots in unsharded_leaves(params):
        meshes: Any = [param for _, _, param in slots]
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


def ddp_around(groups: Sequence[Sequence[Tensor]]) -> "weakref.WeakSet[nn.Module]":
    """The DDP modules that wrap some of these parameters."""
    own = {param for params in groups for param in params}
    living = gc.get_objects()  # DDP keeps no list of its modules
    kinds = {kind for kind in set(map(type, living)) if DistributedDataParallel in kind.__mro__}
    wrappers = compress(living, map(kinds.__contains__, map(type, living)))  # many: in C
    return weakref.WeakSet(each for each in wrappers if not own.isdisjoint(each.parameters()))


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


def sync_buffers(ddp_modules: Iterable[Any], groups: Sequence[Sequence[Tensor]]) -> None:
    """Send rank 0's buffers to all, as DDP does for each forward after it averaged gradients.

    Args:
        ddp_modules: in any order, which may be another on each rank.
        groups: the parameters of the optimizer, whose order is that of the collectives.
    """
    modules = [module for module in ddp_modules if module.modules_buffers]
    if len(modules) > 1:
        places = {p: index for index, p in enumerate(p for params in groups for p in params)}
        modules.sort(key=lambda m: min(places.get(p, len(places)) for p in m.parameters()))
    for module in modules:
        as_it_was = module.require_forward_param_sync
        module.require_forward_param_sync = True
        if module.will_sync_module_buffers():
            module._sync_buffers()
        module.require_forward_param_sync = as_it_was


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


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def digest(facts: object) -> int:
    """A small number that differs where the text of some facts differs, almost surely."""
    return zlib.crc32(repr(facts).encode()) % DIGESTS


def spread(total: float, total_sq: float, ranks: int) -> float:
    """The relative variance over ranks of a number, from the sums of it and of its square."""
    return (ranks * total_sq - total * total) / (total * total) if total else 0.0
