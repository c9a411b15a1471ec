"""The ranks that train one model: which they are, and what they tell one another.

Every decision rests on numbers that were summed over all of them, in one small all-reduce for each
update, so every rank decides alike. Collectives are called here, but for the layout of a gradient
that is a DTensor, which `capture.sharding` settles.
"""

import logging
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.distributed_c10d import _get_default_store

from noiseopt.capture import (
    Share,
    share_among,
)

TIMED_OUT = ("imed out", "imeout")  # in gloo's errors
PATIENCE = 10.0  # seconds within which the time of all that wait is over
BUCKET_BYTES = 25 * 2**20
TINY_SQUARE = 1e-290  # of smaller ones digits are lost
DIGESTS = 2**16  # so few that sums of their squares show the least difference in fp64

# torch's own, which have no types.
_store: Any = _get_default_store
_buckets: Any = _take_tensors
_flatten: Any = _flatten_dense_tensors
_unflatten: Any = _unflatten_dense_tensors

logger = logging.getLogger("noiseopt")


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
        for group in first:
            with self._named(what, group):
                dist.all_reduce(numbers, group=group)
        with self._named(what, last):
            work = dist.all_reduce(numbers, group=last, async_op=True)

        def end() -> None:
            with self._named(what, last):
                work.wait()

        return end

    @contextmanager
    def _named(self, what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
        """Say in the error who waited for whom, and where."""
        try:
            yield
        except RuntimeError as error:
            late = _absent(what, group) if any(w in str(error) for w in TIMED_OUT) else []
            whom = " and ".join(f"rank {rank}" for rank in late) or "one of the others"
            uneven = "NoiseConfig(gradients='local') and flush() on every rank"
            raise RuntimeError(
                f"rank {dist.get_rank()} waited in vain in {what} for {whom}, which has stopped, "
                "raised, or brought fewer micro-batches (uneven data "
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
        refuse_differing(self.gather(facts, what), what)

    def gather(self, facts: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
        """What every rank says. This waits for the device."""
        told = [dict(facts)]
        for group in self.groups:
            gathered: list[list[dict[str, Any]]] = [[]] * dist.get_world_size(group)
            with self._named(what, group), self._on_device():
                dist.all_gather_object(gathered, told, group=group)
            told = list(chain(*gathered))
        return told


def refuse_differing(told: Sequence[Mapping[str, Any]], what: str) -> None:
    """See that ranks have said the same: on each, so that none leaves others waiting.

    Raises:
        RuntimeError: they differ; names what differs, and how.
    """
    names = sorted({name for each in told for name in each})
    differing = [n for n in names if any(each.get(n) != told[0].get(n) for each in told)]
    if differing:
        lines = [f"{n}: {[each.get(n) for each in told]}" for n in differing[:8]]
        raise RuntimeError(
            f"ranks disagree on {what} (one value for each rank): " + "; ".join(lines)
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


def _absent(what: str, group: dist.ProcessGroup | None) -> list[int]:
    """Which ranks of a group do not tell that they have waited too; none where that is not known.

    They tell it to the store by which the process groups were made, which may be out of reach.
    """
    waiting: Any = group or dist.group.WORLD
    waited: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the store went with its process: nobody is to be named
            store, waited_for = _store(), f"noiseopt: {waiting.group_name} {what}"
            store.append(waited_for, f"{dist.get_rank()} ")
            time.sleep(PATIENCE)
            waited.extend(map(int, store.get(waited_for).split()))

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * PATIENCE)
    members = dist.get_process_group_ranks(waiting)
    return [rank for rank in members if rank not in waited] if waited else []


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def digest(facts: object) -> int:
    """A small number that differs where the text of some facts differs, almost surely."""
    return zlib.crc32(repr(facts).encode()) % DIGESTS


def spread(total: float, total_sq: float, ranks: int) -> float:
    """The relative variance over ranks of a number, from the sums of it and of its square.

    nan where squares are too small to tell.
    """
    square = total * total
    return math.nan if square < TINY_SQUARE else (ranks * total_sq - square) / square
