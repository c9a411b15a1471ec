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
from noiseopt.capture.row import Measured
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
        self._mean: Tensor | None = None
        self.passes = BackwardPasses(groups, self._read_mean, reads, keep_nonfinite=True)

    def __len__(self) -> int:
        """How many backward passes the open window has had."""
        return len(self.passes)

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Watch one more group."""
        self._groups.append(list(params))
        self.passes.add_group(params)
        if self._mean is not None:
            self._mean = torch.cat([self._mean, self._mean.new_zeros(1)])

    def _read_mean(self) -> None:
        if len(self) < self._window_steps():
            return
        watched = self.passes.watched
        grads = [
            [grad for p in params if p in watched and (grad := p.grad) is not None]
            for params in self._groups
        ]
        self._mean = squared_norms(grads, self._device, self._share)

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
            samples: n_i of each backward, to which the weights are proportional.
            loss_scale: the factor on every loss.

        Raises:
            ValueError: the number of sample counts is not that of backward passes.
            RuntimeError: the optimizer has parameters with a gradient that are not watched, or no
                backward was seen.
        """
        self._check(groups)
        samples = samples[self._forget_skipped() :]
        if len(samples) != len(self):
            raise ValueError(
                f"set_samples() was called {len(samples)} times for {len(self)} backward passes: "
                "call it once for each, or never"
            )
        parts = torch.stack(self.passes.norms)
        # A shorter window's sum the loop may have clipped or unscaled: not to be learned from.
        big = parts.new_full((len(groups),), math.nan) if self._mean is None else self._mean
        self.clear()
        counts = torch.stack([parts.new_full((), value) for value in samples])
        weights = counts / counts.sum()
        scale_sq = torch.as_tensor(loss_scale).to(parts.device, parts.dtype).square()
        small = parts / weights.square()[:, None] / scale_sq
        used = weights * small.sum(1).isfinite() if self._reads() else weights
        return Measured(small, big / scale_sq, counts, used, None)

    def _check(self, groups: Sequence[Sequence[Tensor]]) -> None:
        missing = [
            param
            for params in groups
            for param in params
            if param.grad is not None and param not in self.passes.watched
        ]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of the optimizer's parameters have a gradient but are not "
                "watched: the model or the optimizer was changed after measuring began; attach "
                "the monitor, or build the optimizer, after the change"
            )
        if len(self) == 0:
            raise RuntimeError(
                "no backward pass was seen since the last step(): call loss.backward() on a loss "
                "of the watched parameters first"
            )

    def _forget_skipped(self) -> int:
        """Forget windows whose step a GradScaler skipped; return how many backwards they had."""
        extra = len(self) - self._window_steps()
        norms = self.passes.norms
        if extra <= 0 or bool(torch.stack(norms).isfinite().all()):
            return 0
        del norms[:extra]
        return extra

    def clear(self) -> None:
        """Forget the open window."""
        self.passes.clear()
        self._mean = None

    def detach(self) -> None:
        """Remove the hooks."""
        self.passes.detach()
