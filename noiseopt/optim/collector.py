"""From the gradients of many calls of `step()` to one mean and the numbers of its window.

Whether a gradient is this rank's alone, a mean over ranks that DDP has made, a shard of one that
FSDP2 has made, or what the loop itself has accumulated: an optimizer gets from here, when a window
ends, the mean in `p.grad` and what it took to measure it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
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
from noiseopt.optim.put_off import (
    PutOff,
    drop_gradients,
    have_gradient,
    reducing_if,
    refuse_averaged,
    sharded_modules,
)
from noiseopt.optim.reduction import averaging_modules, keeping_own, reduce_window
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
        self._always_own = config.gradients == "local" and ranks.data > 1
        if self._always_own and ranks.sharded:
            raise ValueError(
                "gradients='local' with sharded parameters, whose gradients their mesh averages: "
                "leave it at 'auto'"
            )
        self._is_own = self._always_own
        self._have_averaged: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._checks = LoopChecks(ranks)
        self._inside = 0  # contexts of accumulate() for a micro-batch of this rank's own
        self._unstepped = False  # whether a micro-batch of accumulate() awaits its step()
        self._unstepped_fsdp2 = False  # the same under FSDP2
        self.waits = False  # whether FSDP2 keeps the gradient of the micro-batch that comes
        told = weakref.proxy(adaptation)  # the hooks, which the parameters hold, keep nothing alive
        if config.accumulation == "external":
            self._external = ExternalWindows(ranks, groups, adaptation)
            self._hooks.append(self._external.capture)
        elif ranks.data > 1 and not self._always_own:
            self._local = LocalNorms(
                groups, lambda: told.measures, lambda totals: told.summed_parts(totals)
            )
            self._hooks.append(self._local)
        self._put_off = PutOff(self._of_sums, self._local)
        for hooks in self._hooks:
            weakref.finalize(self, hooks.passes.detach)

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
        if self.waits or self._window.passed_over:
            drop_gradients(groups)
        self._forget_micro_batch()
        self.clear(keep_memory=False)

    def take(self, groups: Groups) -> Ended | None:
        """Take what a call of `step()` brings; the window's end, if it is that.

        Raises:
            RuntimeError: the ranks' gradients differ, or the window mixes kinds of gradients.
        """
        if self._external is not None:
            return self._external.take(groups)
        own, waits, inside = self._is_own, self.waits, self._is_own or self._unstepped_fsdp2
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
        self._go_on_unstepped(groups)
        if self._always_own:
            done = False
            while not done:
                ended, done = self._reduce(groups, flushing=True)
                if ended.steps > 0:
                    yield ended
        elif self._window.passed_over:
            raise RuntimeError(
                f"flush() in a window of which FSDP2 still holds {len(self)} micro-batches: call "
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
            with self._putting_off(model, groups):
                yield
            return
        last = len(self) + 1 >= self._adaptation.steps
        given = None if len(self) else model  # which is looked through, at a window's beginning
        wrappers = averaging_modules(model, self._adaptation.ddp_around(groups, given))
        averages = last if self._external is not None else self._leaves_averaging(wrappers, last)
        if averages:
            yield
            return
        if self._inside == 0:
            self._is_own = self._unstepped = self._external is None
        with self._forgotten_if_it_raises(), self._unread(), keeping_own(wrappers):
            yield

    @contextmanager
    def _putting_off(self, model: nn.Module, groups: Groups) -> Iterator[None]:
        """Have FSDP2 keep the gradients of a window's micro-batches until its last."""
        modules = sharded_modules(model, groups)
        self._put_off.check()
        self._go_on_unstepped(groups)
        last = len(self) + 1 >= self._adaptation.steps
        self.waits = self._external is None and not last
        with self._forgotten_if_it_raises(), reducing_if(last, modules):
            yield
        self._unstepped_fsdp2 = self._external is None
        if last:
            self._put_off.end(groups, self._window.passed_over + 1, self._have_gradient)
        else:
            self._put_off.note(slot for slots in modules.values() for slot in slots)

    def _go_on_unstepped(self, groups: Groups) -> None:
        """Go on where no `step()` has followed the last micro-batch of a window of FSDP2's."""
        if self._put_off.added_up == 1:
            return
        if self._have_gradient(groups):
            self._put_off.go_on(groups)
        else:  # thrown away, as by a GradScaler
            self._adaptation.losses.begin_again()
            self.abandon(groups)

    def _have_gradient(self, groups: Groups) -> bool:
        """Whether `p.grad` holds something on some rank, whose part may be zero on others."""
        there = torch.tensor(float(have_gradient(groups)), device=self._device)
        return self._adaptation.summed_parts(there).item() > 0

    @contextmanager
    def _forgotten_if_it_raises(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._forget_micro_batch()
            raise

    def may_lack_gradients(self, groups: Groups) -> bool:
        """Whether this micro-batch may leave nothing in `p.grad` on this rank."""
        if not self._is_own:
            return self.waits
        return any(map(finds_unused, self._adaptation.ddp_around(groups)))

    def _forget_micro_batch(self) -> None:
        self._is_own, self._unstepped = self._always_own, False
        self.waits = self._unstepped_fsdp2 = False

    def _leaves_averaging(self, wrappers: Sequence[nn.Module], last: bool) -> bool:
        """Whether DDP had better average this micro-batch itself, while its backward runs.

        There is nothing to put off in a window of one, unless it is to be weighted; and DDP records
        a static graph in its first passes, for which it must average.
        """
        static = [wrapper for wrapper in wrappers if getattr(wrapper, "static_graph", False)]
        records = any(wrapper not in self._have_averaged for wrapper in static)
        if self._always_own and records:
            raise ValueError(
                "gradients='local' with DDP's static_graph=True: DDP must average in its first "
                "pass, to record the graph; leave out one of the two"
            )
        if self._always_own or not wrappers or self._window.alone:
            return False
        alone = last and len(self) == 0 and not self._adaptation.samples.are_told
        return records or alone

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

    def is_unstepped(self, groups: Groups) -> bool:
        """Whether the last micro-batch of `accumulate` was thrown away instead of stepped."""
        return self._unstepped and self._inside == 0 and not have_gradient(groups)

    @contextmanager
    def _unread(self) -> Iterator[None]:
        """Leave backwards unread: this rank's own gradients are to be had at `step()`."""
        self._go_inside(1)
        try:
            yield
        finally:
            self._go_inside(-1)

    def _go_inside(self, contexts: int) -> None:
        self._inside += contexts
        if self._local is not None:
            self._local.passes.paused = self._inside > 0

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
        passes, number = len(local), self._window.passed_over + 1
        if passes > number:
            self._checks.see_passes(
                passes,
                number,
                f"where the loop accumulates {passes} by itself, set NoiseConfig("
                f"accumulation='external', accumulation_steps={passes})",
            )
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
            self._have_averaged.update(self._adaptation.ddp_around(groups))
        takes_sums = self._of_sums or self._share is not None
        row = self._adaptation.agree(measured, at_once=takes_sums)
        if not takes_sums:
            return Ended(row, measured.norm, measured.scale, steps)
        row, scale = as_tensor(row), measured.scale
        if self._of_sums:
            scale = self._ranks.data / row[WEIGHT]
            big_columns(row).mul_(scale.square())
        return Ended(row, norm_of_mean(row), scale, steps)

    def _reduce(self, groups: Groups, **how: bool) -> tuple[Ended, bool]:
        row, steps, done = reduce_window(self._window, groups, self._adaptation, **how)
        sync_buffers(self._adaptation.ddp_around(groups), groups)
        return Ended(row, norm_of_mean(row), None, steps), done
