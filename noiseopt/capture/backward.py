"""Windows that the loop accumulates in `p.grad` by itself: every backward's norm, and the sum's.

The norm of what has been accumulated is read at the end of the window's last backward, after the
ranks' gradients were averaged and before the loop can clip or unscale them. No gradient is kept.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from noiseopt.capture.norms import device_of, squared_norms
from noiseopt.capture.passes import BackwardPasses
from noiseopt.capture.row import Measured, like
from noiseopt.capture.sharding import Share, settled

UNSEEN = (
    "no backward pass was seen since the last step(): call loss.backward() on a loss of the "
    "watched parameters first; gradients that come otherwise, as by autograd.grad, are not read"
)


class BackwardCapture:
    """Hooks on parameters that gather the norms of a window's micro-batches.

    Args:
        groups: the parameters of each group. Frozen ones are passed over.
        window_steps: tells how many backward passes the current window is to have.
        share: how this rank's part of a gradient counts in the sum over ranks, if it is a part.
        reads: tells whether the open window is measured.
        summed: sums over the ranks what each knows of its part of a gradient, if it is a part.

    Attributes:
        passes: the hooks. A backward pass is one micro-batch.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        window_steps: Callable[[], int],
        share: Share | None = None,
        reads: Callable[[], bool] = lambda: True,
        summed: Callable[[Tensor], Tensor] = lambda totals: totals,
    ) -> None:
        self._reads = reads
        self._summed = summed
        self._window_steps = window_steps
        self._share = share
        self._device = device_of(groups)
        self._groups = [list(params) for params in groups]
        self._means: dict[int, Tensor] = {}  # |p.grad|^2 after passes that a window may end with
        self._unread = False  # whether the open window's passes do not tell its micro-batches
        self.passes = BackwardPasses(groups, self._read_mean, reads, self._were_skipped)

    def __len__(self) -> int:
        """How many backward passes the open window has had, without those that were skipped."""
        return len(self.passes)

    @property
    def num_skipped(self) -> int:
        """Backward passes before them whose step a GradScaler has skipped."""
        return self.passes.num_skipped

    def taken(self) -> int:
        """How many backward passes the open window has had, before its last.

        Where it seems to have had all of them, they may be of a step that was skipped, which are
        set apart: this waits for the device.
        """
        if len(self) >= self._window_steps() and self._not_finite():
            self.passes.skip(len(self))
            self._means = {}
        return len(self)

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Watch one more group; what has gradients that were not read, from `settle` on."""
        self._groups.append(list(params))
        self.passes.add_group([param for param in params if param.grad is None])
        self._means = {n: torch.cat([mean, mean.new_zeros(1)]) for n, mean in self._means.items()}

    def _read_mean(self) -> None:
        if len(self) < self._window_steps():
            return
        watched = self.passes.watched
        grads = [_grads([p for p in params if p in watched]) for params in self._groups]
        self._means[len(self)] = squared_norms(grads, self._device, self._share)

    def _not_finite(self) -> list[int]:
        """After how many passes each what had accumulated was not finite: this waits for it."""
        if not self._means:
            return []
        totals = self._summed(torch.stack([mean.sum() for mean in self._means.values()]))
        pairs = zip(self._means, totals.isfinite().tolist(), strict=True)
        return [passes for passes, is_finite in pairs if not is_finite]

    def _were_skipped(self) -> bool:
        """Whether gradients that were thrown away had not been finite."""
        lost, self._means = self._not_finite(), {}
        return bool(lost)

    def settle(self, groups: Sequence[Sequence[Tensor]]) -> int:
        """Make out, before the optimizer steps, which passes are the window's micro-batches.

        Where there are more than were announced, those before may be of steps that a GradScaler has
        skipped, as what they had accumulated shows. If there still are, some micro-batch had
        several: then there are as many as announced, and their norms are unknown. So they are, this
        once, where a parameter has a gradient that was not watched, as one that was frozen; it is
        from now on.

        Args:
            groups: the optimizer's parameters.

        Returns:
            How many passes its micro-batches had.
        """
        steps = self._window_steps()
        unseen = self.passes.see_more() or self.passes.is_overtaken or self.passes.is_edited
        if len(self) > steps:
            self._set_apart(steps)
        passes = len(self)
        if passes > steps:
            self.passes.join(steps)
            self._unread = True
        if more := self.passes.watch_more(groups):
            self._groups, self._means = [list(params) for params in groups], {}
        if unseen or more:
            self._unread = True
            if passes == 0:
                self.passes.join(steps)
                passes = steps
        return passes

    def _set_apart(self, steps: int) -> None:
        """Count passes of skipped steps as such. Of a shorter window the mean is not kept."""
        passes, lost = len(self), self._not_finite()
        last = self._means.get(passes)
        # Gradients that are not finite stay so until they are zeroed. Where the last are not, the
        # loop steps all the same, or a kernel skips: when they were zeroed before is not known.
        before = max([n for n in lost if n < passes], default=0)
        if passes in lost:
            before = passes - steps
        if before:
            self.passes.skip(before)
        self._means = {} if last is None or len(self) < steps else {steps: last}

    def shrunk(self, groups: Sequence[Sequence[Tensor]]) -> float:
        """The norm of `p.grad` now over that after the window's last backward; nan if unknown.

        This waits for the device.
        """
        if not self._means:
            return math.nan
        grads = _grads([p for params in groups for p in params])
        now = squared_norms([grads], self._device, self._share).sum().item()
        before = self._last_mean().sum().item()
        return math.sqrt(now / before) if before > 0 else math.nan

    def close(
        self,
        groups: Sequence[Sequence[Tensor]],
        samples: Sequence[float],
        loss_scale: float | Tensor,
    ) -> Measured:
        """End the window at the optimizer's step.

        A backward brings h_i = w_i g_i: the loop has put the weight w_i, and a loss scale, on the
        loss. `p.grad` is the loop's own: nothing is left to be done to it. The mean of a window
        that is shorter than was announced is unknown (nan).

        Args:
            groups: the optimizer's parameters.
            samples: n_i of each micro-batch, skipped ones first; the weights are in proportion.
            loss_scale: the factor on every loss.

        Raises:
            RuntimeError: no backward was seen.
        """
        if len(self) == 0:
            raise RuntimeError(UNSEEN)
        mean = self._last_mean() if self._means else None
        samples = samples[self.num_skipped :]
        parts = torch.stack(self.passes.norms)
        finite = self._finite(parts, mean)
        if self._unread:
            parts = torch.full_like(parts, math.nan)
        self.clear()
        counts = torch.stack([parts.new_full((), value) for value in samples])
        weights = counts / counts.sum()
        scale_sq = like(loss_scale, parts).square()
        small = parts / weights.square()[:, None] / scale_sq
        # A shorter window's sum the loop may have clipped or unscaled: not to be learned from.
        big = parts.new_full((len(groups),), math.nan) if mean is None else mean
        used = weights * finite
        return Measured(small, big / scale_sq, counts, used, None)

    def _last_mean(self) -> Tensor:
        return self._means[max(self._means)]

    def _finite(self, parts: Tensor, mean: Tensor | None) -> Tensor | bool:
        """Which micro-batches were finite, as far as it is known."""
        if self._reads() and not self._unread:
            return parts.sum(1).isfinite()
        return True if mean is None else mean.sum().isfinite()

    def clear(self) -> None:
        """Forget the open window."""
        self.passes.clear()
        self.passes.come_last()
        self._means, self._unread = {}, False

    def detach(self) -> None:
        """Remove the hooks."""
        self.passes.detach()


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients there are."""
    return [settled(grad) for param in params if (grad := param.grad) is not None]
