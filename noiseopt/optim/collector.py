"""From the gradients of many calls of `step()` to one mean and the numbers of its window.

Whether a gradient is this rank's alone, a mean over ranks that DDP has made, a shard of one that
FSDP2 has made, or what the loop itself has accumulated: an optimizer gets from here, when a window
ends, the mean in `p.grad` and what it took to measure it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from noiseopt.adaptation import Adaptation
from noiseopt.capture import (
    WEIGHT,
    BackwardCapture,
    GradientWindow,
    LocalNorms,
    Measured,
    as_tensor,
    big_columns,
    device_of,
    laid_out,
    norm_of_mean,
)
from noiseopt.control import NoiseConfig
from noiseopt.distributed import Ranks, sync_buffers
from noiseopt.loop_checks import LoopChecks
from noiseopt.optim.ended import Ended
from noiseopt.optim.external import ExternalWindows
from noiseopt.optim.own import OwnGradients
from noiseopt.optim.put_off import PutOff, drop_gradients, refuse_averaged, sharded_modules
from noiseopt.optim.reduction import reduce_window
from noiseopt.parallel import finds_unused

Groups = Sequence[Sequence[Tensor]]


class GradientCollector:
    """The open window of one optimizer.

    Args:
        config: the settings.
        ranks: those that take part.
        groups: the parameters of each group.
        adaptation: says how long windows are, and agrees with other ranks.
    """

    def __init__(
        self, config: NoiseConfig, ranks: Ranks, groups: Groups, adaptation: Adaptation
    ) -> None:
        self._adaptation, self._ranks = adaptation, ranks
        self._device = device_of(groups)
        self._of_sums = config.loss_reduction == "sum"
        self._share = ranks.share if ranks.sharded else None
        skip = config.skip_nonfinite and adaptation.acts
        self._window = GradientWindow(self._device, skip, self._of_sums, self._share)
        self._external: ExternalWindows | None = None
        self._hooks: list[BackwardCapture | LocalNorms] = []
        self._local: LocalNorms | None = None
        always_own = config.gradients == "local" and ranks.data > 1
        if always_own and ranks.sharded:
            raise ValueError(
                "gradients='local' with sharded parameters, whose gradients their mesh averages: "
                "leave it at 'auto'"
            )
        self._checks = LoopChecks(ranks)
        told = weakref.proxy(adaptation)  # the hooks, which the parameters hold, keep nothing alive
        external = config.accumulation == "external"
        if external:
            self._external = ExternalWindows(ranks, groups, adaptation)
            self._hooks.append(self._external.capture)
        elif ranks.data > 1 and not always_own:
            self._local = LocalNorms(
                groups, lambda: told.measures, lambda totals: told.summed_parts(totals)
            )
            self._hooks.append(self._local)
        parts = self._window, self._local, adaptation
        self._own = OwnGradients(*parts, always_own, external)
        self._put_off = PutOff(*parts, self._of_sums, external)
        for hooks in self._hooks:
            hooks.passes.end_with(self)

    def __len__(self) -> int:
        """Micro-batches in the open window, as far as they are known."""
        return len(self._window if self._external is None else self._external.capture)

    def taken(self) -> int:
        """Micro-batches in the open window, before its last. In external mode this may wait."""
        return len(self) if self._external is None else self._external.capture.taken()

    def set_loss_scale(self, scale: float | Tensor) -> None:
        """Take the factor on the losses of a window that the loop accumulates."""
        if self._external is not None:
            self._external.loss_scale = scale

    @property
    def nbytes(self) -> int:
        """The memory that the window's sum holds."""
        return self._window.nbytes

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Collect one more group's gradients."""
        self._window.add_group()
        for hooks in self._hooks:
            hooks.add_group(params)

    def open_window(self) -> None:
        """Read the next window's backward passes, if it is measured."""
        if self._local is not None:
            self._local.open_window()

    def clear(self, keep_memory: bool) -> None:
        """Forget what the open window holds."""
        self._window.clear(keep_memory)
        self._put_off.clear()
        for hooks in self._hooks:
            hooks.clear()

    def abandon(self, groups: Groups) -> None:
        """Forget the open window, with what FSDP2 holds of it."""
        if self._put_off.holds:
            drop_gradients(groups)
        self._forget_micro_batch()
        self.clear(keep_memory=False)

    def take(self, groups: Groups) -> Ended | None:
        """Take what a call of `step()` brings; the window's end, if it is that.

        Raises:
            RuntimeError: the ranks' gradients differ, or the window mixes kinds of gradients.
        """
        self._put_off.refuse_spoiled()
        if self._external is not None:
            self._put_off.refuse_left_behind()
            return self._external.take(groups)
        own, waits = self._own.next_is_own, self._put_off.waits
        inside = own or self._put_off.unstepped
        self._forget_micro_batch()
        self._check_kind(inside)
        added_up = waits or self._window.passed_over > 0  # by FSDP2, each weighing the same
        samples, weight = self._adaptation.next_samples(self._device, own or added_up)
        weight = 1.0 if added_up and not self._of_sums else weight
        if waits:
            refuse_averaged(groups)
            self._window.pass_over(samples, weight)
            return None
        self._put_off.refuse_left_behind()
        closes = len(self) + 1 >= self._adaptation.steps
        if own:
            self._window.take_alone(groups, samples, weight, closes)
            return self._reduce(groups)[0] if closes else None
        self._settle(groups)
        norms = None if self._local is None else self._read_own(self._local, groups)
        measured = self._window.take(groups, samples, weight, closes, norms, self._put_off.has_mean)
        return None if measured is None else self._end(measured, groups)

    def flush(self, groups: Groups) -> Iterator[Ended]:
        """End the open window; where gradients always are the ranks' own, all of theirs too.

        Raises:
            RuntimeError: the window's gradients are still in FSDP2's hands.
        """
        self._put_off.refuse_spoiled()
        self.go_on_unstepped(groups)
        if self._own.always:
            done = False
            while not done:
                ended, done = self._reduce(groups, flushing=True)
                if ended.steps > 0:
                    yield ended
        elif self._window.passed_over or self._put_off.keeps_unstepped:
            held = len(self) + self._put_off.keeps_unstepped
            raise RuntimeError(
                f"flush() in a window of which FSDP2 still holds {held} micro-batches: call "
                "shorten_window() before the last one's forward, so that it is reduced with it"
            )
        elif self._window.alone:
            yield self._reduce(groups, flushing=True)[0]
        elif len(self._window) > 0:
            self._settle(groups)
            yield self._end(self._window.flush(groups), groups)

    @contextmanager
    def accumulate(self, model: nn.Module, groups: Groups) -> Iterator[None]:
        """See `NoiseAware.accumulate`."""
        if self._ranks.data == 1:
            yield
            return
        if self._ranks.sharded:
            modules = sharded_modules(model, groups)
            self._put_off.check()
            self.go_on_unstepped(groups)
            with self._put_off.accumulate(modules, groups, len(self)):
                yield
        else:
            with self._own.accumulate(model, groups, len(self)):
                yield

    def go_on_unstepped(self, groups: Groups) -> None:
        """Go on where no `step()` has followed the last micro-batch of a window of FSDP2's."""
        if not self._put_off.goes_on(groups):
            self._adaptation.losses.begin_again()
            self.abandon(groups)

    def may_lack_gradients(self, groups: Groups) -> bool:
        """Whether this micro-batch may leave nothing in `p.grad` on this rank."""
        return self._put_off.waits or self._own.may_be_none(groups)

    def _forget_micro_batch(self) -> None:
        self._own.forget()
        self._put_off.forget()

    def take_unstepped(self, groups: Groups) -> Ended | None:
        """Count a micro-batch of `accumulate` that no `step()` followed, as left out.

        So a GradScaler that skips the step on one rank leaves the ranks' windows in step.

        Returns:
            The window's end, if it was that: then it is to be applied.
        """
        closes = len(self) + 1 >= self._adaptation.steps
        samples, weight = self._adaptation.samples_thrown_away()
        self._forget_micro_batch()
        self._window.leave_out(groups, samples, weight)
        return self._reduce(groups, late=True)[0] if closes else None

    def see_clearing(self) -> None:
        """See that the loop clears gradients: those of backwards without a step are thrown away.

        Raises:
            RuntimeError: they are in the window's sum all the same, in FSDP2's hands.
        """
        self._put_off.refuse_thrown_away()
        if self._local is not None and not self._ranks.sharded:
            self._local.clear()

    def is_unstepped(self, groups: Groups) -> bool:
        """Whether the last micro-batch of `accumulate` was thrown away instead of stepped."""
        return self._own.is_unstepped(groups)

    def _check_kind(self, inside: bool) -> None:
        earlier = self._window.alone or self._window.passed_over > 0
        if len(self) > 0 and inside != earlier:
            where = "inside" if inside else "outside"
            raise RuntimeError(
                f"micro-batch {len(self) + 1} of a window of {self._adaptation.steps} was run "
                f"{where} optimizer.accumulate(model) and the ones before it were not: run all of "
                "them alike"
            )

    def _read_own(self, local: LocalNorms, groups: Groups) -> Tensor:
        self._checks.see_hooks(local.passes)
        passes, number = len(local), self._window.passed_over + 1
        if passes > number:
            remedy = (
                "if one was thrown away by model.zero_grad(), skip it before its backward instead, "
                "since FSDP2 keeps it in the window's sum"
                if number > 1
                else f"where the loop accumulates {passes} by itself, set NoiseConfig("
                f"accumulation='external', accumulation_steps={passes})"
            )
            self._checks.see_passes(passes, number, remedy)
        ddp = self._adaptation.ddp_around(groups)
        return local.take(groups, number, any(map(finds_unused, ddp)))

    def _settle(self, groups: Groups) -> None:
        if self._ranks.model > 1:
            for param in (param for group in groups for param in group):
                if param.grad is not None:
                    param.grad = laid_out(param.grad, param)

    def _end(self, measured: Measured, groups: Groups) -> Ended:
        """End a window whose mean over ranks `p.grad` holds, or this rank's shard of it."""
        steps = len(self._window)
        if self._local is not None:
            self._own.note_averaged(self._adaptation.ddp_around(groups))
        takes_sums = self._of_sums or self._share is not None
        row = self._adaptation.agree(measured, at_once=takes_sums, left=self._left_alike(groups))
        if not takes_sums:
            return Ended(row, measured.norm, measured.scale, steps)
        row, scale = as_tensor(row), measured.scale
        if self._of_sums:
            scale = self._ranks.data / row[WEIGHT]
            big_columns(row).mul_(scale.square())
        return Ended(row, norm_of_mean(row), scale, steps)

    def _left_alike(self, groups: Groups) -> Tensor | None:
        """What the backward has left in `p.grad`, where it must have left the same on all ranks."""
        unused = any(map(finds_unused, self._adaptation.ddp_around(groups)))
        return None if self._local is None or self._ranks.sharded or unused else self._local.left

    def _reduce(self, groups: Groups, **how: bool) -> tuple[Ended, bool]:
        row, steps, done = reduce_window(self._window, groups, self._adaptation, **how)
        sync_buffers(self._adaptation.ddp_around(groups), groups)
        return Ended(row, norm_of_mean(row), None, steps), done
