"""Windows inside `accumulate` under FSDP2, which keeps gradients until the last backward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from noiseopt.capture import LocalNorms, Slot, local, scale_all, unsharded_leaves

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


class PutOff:
    """What FSDP2 puts off in the open window, and the mean that it leaves in `p.grad` at its end.

    Args:
        of_sums: whether losses are sums, whose gradients are divided by what all ranks bring.
        local: what is to be told of factors on `p.grad`.

    Attributes:
        added_up: of how many micro-batches `p.grad` holds the mean, or the sum where losses are; 1
            before the window's end.
    """

    def __init__(self, of_sums: bool, local: LocalNorms | None) -> None:
        self._of_sums, self._local = of_sums, local
        self._kept: list[Slot] = []  # where FSDP2 has gradients that are still to be averaged
        self.added_up = 1

    @property
    def has_mean(self) -> bool:
        """Whether `p.grad` holds the mean of a whole window."""
        return self.added_up > 1 and not self._of_sums

    def check(self) -> None:
        """See that all gradients that were kept are there, before the next micro-batch.

        Raises:
            RuntimeError: some are not: whatever averaged them, they are not in the window's mean.
        """
        lost = sum(not slot.keeps_gradient for slot in self._kept)
        if lost:
            raise RuntimeError(
                f"FSDP2 no longer keeps {lost} of the {len(self._kept)} gradients of the window's "
                "earlier micro-batches, which another backward through the model has averaged with "
                "its own: leave optimizer.accumulate() out"
            )

    def note(self, slots: Iterable[Slot]) -> None:
        """Take in where gradients were kept of a micro-batch."""
        self._kept = [*{slot.param: slot for slot in slots if slot.keeps_gradient}.values()]

    def end(self, groups: Groups, number: int, have_gradient: Callable[[Groups], bool]) -> None:
        """Divide what the window's last backward has summed: the loop may clip it next.

        Args:
            groups: the parameters of each group.
            number: the window's micro-batches.
            have_gradient: tells whether `p.grad` holds something on some rank: a collective.

        Raises:
            RuntimeError: FSDP2 has averaged some of what it had kept, and not the rest.
        """
        left = sum(slot.keeps_gradient for slot in self._kept)
        if left == len(self._kept) > 0 and not have_gradient(groups):
            return  # no backward came
        self.refuse_left_behind()
        self._kept = []
        if number > 1 and self._scale(groups, 1 / number):
            self.added_up = number

    def refuse_left_behind(self) -> None:
        """Refuse to end a window of which FSDP2 still keeps gradients, which the next would take.

        Raises:
            RuntimeError: it does.
        """
        left = sum(slot.keeps_gradient for slot in self._kept)
        if left:
            raise RuntimeError(
                f"FSDP2 still keeps {left} of the {len(self._kept)} gradients of the window's "
                "earlier micro-batches, which its last backward has not averaged: run backward() "
                "in the last micro-batch too; and where that leaves out a module which was sharded "
                "by itself, shard one around them, or leave optimizer.accumulate() out"
            )

    def go_on(self, groups: Groups) -> None:
        """Make the mean a sum again, to which what comes is added."""
        self._scale(groups, float(self.added_up))
        self.added_up = 1

    def clear(self) -> None:
        """Forget the window."""
        self._kept, self.added_up = [], 1

    @torch.no_grad()
    def _scale(self, groups: Groups, factor: float) -> bool:
        """Multiply all gradients, unless they are of sums of losses; whether there was any."""
        grads = [grad for params in groups for p in params if (grad := p.grad) is not None]
        if not self._of_sums:
            scale_all(grads, factor)
            if self._local is not None:
                self._local.scale(factor)
        return bool(grads)


def drop_gradients(groups: Groups) -> None:
    """Drop what FSDP2 has accumulated and not averaged yet."""
    for _, slots in unsharded_leaves([param for params in groups for param in params]):
        for slot in slots:
            slot.drop_gradient()


def refuse_averaged(groups: Groups) -> None:
    """Refuse a micro-batch that FSDP2 has averaged though that was to be put off."""
    if have_gradient(groups):
        raise RuntimeError(
            "FSDP2 has averaged gradients of a micro-batch for which optimizer.accumulate() had "
            "put that off, as where two optimizers accumulate on one model, or where some "
            "parameters are none of FSDP2's: leave accumulate() out"
        )


def have_gradient(groups: Groups) -> bool:
    """Whether `p.grad` holds something. Where it is there, this waits for the device, once."""
    grads = [local(p.grad) for params in groups for p in params if p.grad is not None]
    if any(grad.layout != torch.strided for grad in grads):
        return True
    flags = [grad.any() for grad in grads]
    return bool(flags) and bool(torch.stack([f.to(flags[0].device) for f in flags]).any())
