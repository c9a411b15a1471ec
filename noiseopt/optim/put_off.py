"""Windows inside `accumulate` under FSDP2, which keeps gradients until the last backward."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from noiseopt.adaptation import Adaptation
from noiseopt.capture import (
    GradientWindow,
    LocalNorms,
    Slot,
    local,
    scale_all,
    unsharded_leaves,
)

Groups = Sequence[Sequence[Tensor]]
Marks = Sequence[Sequence[tuple[int, int]]]


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
        window: the open window.
        local: what is to be told of factors on `p.grad`.
        adaptation: says how long windows are, and sums over the ranks.
        of_sums: whether losses are sums, whose gradients are divided by what all ranks bring.
        external: whether the loop accumulates gradients in `p.grad`, as FSDP2 averages them.

    Attributes:
        waits: whether FSDP2 keeps the gradient of the micro-batch that comes.
        unstepped: whether a micro-batch awaits its `step()`.
    """

    def __init__(
        self,
        window: GradientWindow,
        local: LocalNorms | None,
        adaptation: Adaptation,
        of_sums: bool,
        external: bool,
    ) -> None:
        self._window, self._local, self._adaptation = window, local, adaptation
        self._of_sums, self._external = of_sums, external
        self._kept: list[Slot] = []  # where FSDP2 has gradients that are still to be averaged
        self._averaged = 0  # how many of them it has averaged in the window's last backward
        self._spoiled = False  # whether it has some of a micro-batch that raised
        self._took = False  # whether it has taken some of the last micro-batch
        # Of how many micro-batches `p.grad` holds the mean, or the sum where losses are.
        self._added_up = 1
        self.waits = self.unstepped = False

    @property
    def has_mean(self) -> bool:
        """Whether `p.grad` holds the mean of a whole window."""
        return self._added_up > 1 and not self._of_sums

    @property
    def keeps_unstepped(self) -> bool:
        """Whether FSDP2 keeps gradients of a micro-batch that awaits its `step()`."""
        return self.waits and self.unstepped and self._took

    @property
    def holds(self) -> bool:
        """Whether FSDP2 may hold something of the open window."""
        return self.waits or self._spoiled or bool(self._kept)

    def check(self) -> None:
        """See that all gradients that were kept are there, before the next micro-batch.

        Raises:
            RuntimeError: some are not: whatever averaged them, they are not in the window's mean.
                Or there are others, of a micro-batch that raised.
        """
        self.refuse_spoiled()
        lost = sum(not slot.kept for slot in self._kept)
        if lost:
            raise RuntimeError(
                f"FSDP2 no longer keeps {lost} of the {len(self._kept)} gradients of the window's "
                "earlier micro-batches, which another backward through the model has averaged with "
                "its own: leave optimizer.accumulate() out"
            )

    @contextmanager
    def accumulate(
        self, modules: Mapping[nn.Module, Sequence[Slot]], groups: Groups, taken: int
    ) -> Iterator[None]:
        """Have FSDP2 keep the gradients of a micro-batch, unless it is the window's last.

        Args:
            modules: FSDP2's, from `sharded_modules`.
            groups: the parameters of each group.
            taken: the micro-batches that the window has had.
        """
        last = taken + 1 >= self._adaptation.steps
        self.waits = not (self._external or last)
        slots = [*{slot.param: slot for slots in modules.values() for slot in slots}.values()]
        before = _marks(slots)
        with self._forgotten_if_it_raises(slots, before), _reducing_if(last, modules):
            yield
        self._took = before != _marks(slots) or (self.unstepped and self._took)
        self.unstepped = not self._external
        if last:
            self._end(groups)
        else:
            self._kept = [slot for slot in slots if slot.kept]

    @contextmanager
    def _forgotten_if_it_raises(self, slots: Sequence[Slot], before: Marks) -> Iterator[None]:
        """Have a micro-batch forgotten that raises; what FSDP2 has of it spoils the window.

        It may have it of a block before, where a micro-batch has several; not in windows of one,
        where that is in `p.grad`, for the loop to zero.
        """
        has_some = self.unstepped and self._took and self._adaptation.steps > 1
        try:
            with forgotten_if_it_raises(self.forget):
                yield
        except BaseException:
            self._spoiled |= has_some or before != _marks(slots)
            raise

    def forget(self) -> None:
        """Forget the micro-batch that comes."""
        self.waits = self.unstepped = False

    def _end(self, groups: Groups) -> None:
        """Divide what the window's last backward has summed: the loop may clip it next."""
        kept, self._kept = self._kept, [slot for slot in self._kept if slot.kept]
        self._averaged = len(kept) - len(self._kept)
        self._added_up = self._window.passed_over + 1
        self._scale(groups, 1 / self._added_up)

    def refuse_left_behind(self) -> None:
        """Refuse to end a window of which FSDP2 still keeps gradients, which the next would take.

        Raises:
            RuntimeError: it does.
        """
        if self._kept:
            raise _left_behind(len(self._kept))

    def refuse_thrown_away(self) -> None:
        """Refuse to have a micro-batch thrown away that FSDP2 keeps.

        Raises:
            RuntimeError: it does, together with the window's earlier ones.
        """
        if self.keeps_unstepped:
            raise RuntimeError(
                "zero_grad() without step() after a micro-batch inside optimizer.accumulate(): "
                "FSDP2 keeps its gradient in the window's sum, out of which it cannot be taken; "
                "skip a bad micro-batch before its backward, or leave optimizer.accumulate() out"
            )

    def goes_on(self, groups: Groups) -> bool:
        """Whether the open window goes on, if no `step()` has followed its last micro-batch.

        Not if its gradients were thrown away, as by a GradScaler. Otherwise the mean is a sum
        again, to which what comes is added. This is a collective where a window has ended.

        Raises:
            RuntimeError: FSDP2 has averaged some of what it had kept, and not the rest.
        """
        if self._added_up == 1:
            return True
        here = [float(have_gradient(groups)), float(len(self._kept)), float(self._averaged)]
        told = self._adaptation.summed_parts(torch.tensor(here, device=self._window.device))
        found, kept, averaged = told.tolist()
        if kept and (found or averaged):
            raise _left_behind(round(kept))
        if not (found or kept):
            return False
        self._scale(groups, float(self._added_up))
        self._added_up = 1
        return True

    def clear(self) -> None:
        """Forget the window."""
        self._kept, self._averaged, self._added_up, self._spoiled = [], 0, 1, False

    def refuse_spoiled(self) -> None:
        """Refuse to go on in a window of which a micro-batch raised.

        Raises:
            RuntimeError: FSDP2 has some of it.
        """
        if self._spoiled:
            raise RuntimeError(
                "a micro-batch raised inside optimizer.accumulate() after its backward had begun: "
                "FSDP2 has added what it brought to the window, and cannot take it out again; "
                "call zero_grad() and go on from a checkpoint, or catch inside the block what may "
                "raise after the backward"
            )

    @torch.no_grad()
    def _scale(self, groups: Groups, factor: float) -> None:
        """Multiply all gradients, unless they are of sums of losses."""
        if factor == 1 or self._of_sums:
            return
        grads = (p.grad for params in groups for p in params)
        scale_all([grad for grad in grads if grad is not None], factor)
        if self._local is not None:
            self._local.scale(factor)


def _marks(slots: Sequence[Slot]) -> Marks:
    return [slot.mark for slot in slots]


def _left_behind(number: int) -> RuntimeError:
    return RuntimeError(
        f"FSDP2 still keeps {number} gradients of the window's earlier micro-batches, which its "
        "last backward has not averaged: run backward() in the last micro-batch too; and where "
        "that leaves out a module which was sharded by itself, shard one around them, or leave "
        "optimizer.accumulate() out"
    )


@contextmanager
def _reducing_if(last: bool, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have FSDP2 modules average what they have accumulated in the window's last backward only."""
    sharded: list[Any] = list(modules)
    for module in sharded:
        module.set_requires_gradient_sync(last, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


@contextmanager
def forgotten_if_it_raises(forget: Callable[[], None]) -> Iterator[None]:
    """Have a micro-batch forgotten whose forward or backward raises."""
    try:
        yield
    except BaseException:
        forget()
        raise


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
