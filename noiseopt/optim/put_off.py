"""Windows inside `accumulate` under FSDP2, which keeps gradients until the last backward."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from noiseopt.capture import Slot, unsharded_leaves

Groups = Sequence[Sequence[Tensor]]


@contextmanager
def reducing_if(last: bool, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have FSDP2 modules average what they have accumulated in the window's last backward only."""
    sharded: list[Any] = list(modules)
    for module in sharded:
        module.set_requires_gradient_sync(last, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


def sharded_modules(model: nn.Module, groups: Groups) -> dict[nn.Module, list[Slot]]:
    """The modules of FSDP2 that hold these parameters, each with its own.

    Raises:
        ValueError: there are none.
    """
    modules = dict(unsharded_leaves([param for params in groups for param in params]))
    if not modules:
        raise ValueError(
            f"accumulate() was given a {type(model).__name__} whose sharded gradients are not "
            "averaged by FSDP2, which could put that off: leave accumulate() out"
        )
    return modules


class KeptGradients:
    """The gradients that FSDP2 has kept of a window, to be averaged in its last backward."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []

    def note(self, slots: Iterable[Slot]) -> None:
        """Take in where there are some, after a micro-batch."""
        self._slots = [slot for slot in slots if slot.keeps_gradient]

    def check(self) -> None:
        """See that they are all there, before the next one.

        Raises:
            RuntimeError: some are not: whatever averaged them, they are not in the window's mean.
        """
        lost = sum(not slot.keeps_gradient for slot in self._slots)
        if lost:
            raise RuntimeError(
                f"FSDP2 no longer keeps {lost} of the {len(self._slots)} gradients of the window's "
                "earlier micro-batches, which another backward through the model has averaged with "
                "its own: leave optimizer.accumulate() out"
            )

    def remain(self) -> bool:
        """Whether some have not been averaged yet."""
        return any(slot.keeps_gradient for slot in self._slots)

    def clear(self) -> None:
        """Forget them, whether they are there or not."""
        self._slots = []
