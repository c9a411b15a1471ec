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
from noiseopt.capture.sharding import Share


class BackwardCapture:
    """Hooks on parameters that gather the norms of a window's micro-batches.

    Args:
        groups: the parameters of each group. Frozen ones are passed over.
        window_steps: tells how many backward passes the current window is to have.
        share: how this rank's part of a gradient counts in the sum over ranks, if it is a part.
        reads: tells whether the open window is measured.

    Attributes:
        passes: the hooks. A backward pass is one micro-batch.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        window_steps: Callable[[], int],
        share: Share | None = None,
        reads: Callable[[], bool] = lambda: True,
    ) -> None:
        self._reads = reads
        self._window_steps = window_steps
        self._share = share
        self._device = device_of(groups)
        self._groups = [list(params) for params in groups]
        self._means: list[Tensor] = []  # |p.grad|^2 after each pass that a window may end with
        self._unread = False  # whether the open window's passes do not tell its micro-batches
        self.passes = BackwardPasses(groups, self._read_mean, reads, self._have_skipped)

    def __len__(self) -> int:
        """How many backward passes the open window has had, without those that were skipped."""
        return len(self.passes)

    @property
    def num_skipped(self) -> int:
        """Backward passes before them whose step a GradScaler has skipped."""
        return self.passes.num_skipped

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Watch one more group."""
        self._groups.append(list(params))
        self.passes.add_group(params)
        self._means = [torch.cat([mean, mean.new_zeros(1)]) for mean in self._means]

    def _read_mean(self) -> None:
        if len(self) < self._window_steps():
            return
        watched = self.passes.watched
        grads = [
            [grad for p in params if p in watched and (grad := p.grad) is not None]
            for params in self._groups
        ]
        self._means.append(squared_norms(grads, self._device, self._share))

    def _have_skipped(self) -> bool:
        """Whether what whole windows had accumulated was not finite. This waits for the device."""
        means, self._means = self._means, []
        return not all(bool(mean.isfinite().all()) for mean in means)

    def settle(self, groups: Sequence[Sequence[Tensor]]) -> int:
        """Make out, before the optimizer steps, which passes are the window's micro-batches.

        Where there are more than were announced, those before may be of steps that a GradScaler has
        skipped, as what they had accumulated shows. If not, some micro-batch had several: then
        there are as many as announced, and their norms are unknown. So they are, this once, where
        a parameter has a gradient that was not watched, as one that was frozen; it is from now on.

        Args:
            groups: the optimizer's parameters.

        Returns:
            How many passes its micro-batches had.
        """
        steps = self._window_steps()
        if self._watches_more(groups):
            self._unread, self._means = True, []
            if len(self) == 0:
                self.passes.join(steps)
        passes = len(self)
        if passes <= steps:
            return passes
        last = self._means[-1:]
        if self._have_skipped():
            self.passes.skip(passes - steps)
            passes = steps
        else:
            self.passes.join(steps)
            self._unread = True
        self._means = last
        return passes

    def shrunk(self, groups: Sequence[Sequence[Tensor]]) -> float:
        """The norm of `p.grad` now over that after the window's last backward; nan if unknown.

        This waits for the device.
        """
        if not self._means:
            return math.nan
        grads = [grad for p in (p for g in groups for p in g) if (grad := p.grad) is not None]
        now = squared_norms([grads], self._device, self._share).sum().item()
        before = self._means[-1].sum().item()
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
            raise RuntimeError(
                "no backward pass was seen since the last step(): call loss.backward() on a loss "
                "of the watched parameters first"
            )
        mean = self._means[-1] if self._means else None
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

    def _finite(self, parts: Tensor, mean: Tensor | None) -> Tensor | bool:
        """Which micro-batches were finite, as far as it is known."""
        if self._reads() and not self._unread:
            return parts.sum(1).isfinite()
        return True if mean is None else mean.sum().isfinite()

    def _watches_more(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Whether some parameter was not watched yet that has a gradient: it is watched now."""
        found = False
        for index, params in enumerate(groups):
            new = [p for p in params if p.grad is not None and p not in self.passes.watched]
            if new:
                found = True
                self._groups[index] = list(params)
                self.passes.watch(new, index)
        return found

    def clear(self) -> None:
        """Forget the open window."""
        self.passes.clear()
        self._means, self._unread = [], False

    def detach(self) -> None:
        """Remove the hooks."""
        self.passes.detach()
