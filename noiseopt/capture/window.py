"""A window of micro-batch gradients that pass one at a time: their norms, and their running sum.

The sum lives in a buffer of its own, in fp32 or wider, so that nothing a training loop does to
`p.grad` between micro-batches can touch what is already summed. A window of one has no buffer.
"""

from typing import Any

import torch
from torch import Tensor

from noiseopt.capture.norms import moved
from noiseopt.capture.row import Measured
from noiseopt.capture.sharding import Share
from noiseopt.capture.sums import (
    GradientSums,
    Groups,
    grads_of,
    is_narrow,
    pairs_of,
    scale_all,
)
from noiseopt.capture.tally import tally_on


class GradientWindow:
    """The open window of an optimizer that accumulates by itself.

    Args:
        device: where the norms are kept.
        skip_nonfinite: leave micro-batches whose gradient is not finite out of the mean.
        sums: whether `p.grad` comes as a sum of weight w_i, and not as a mean to be weighted so.
        share: how this rank's part of a gradient counts in the sum over ranks, if it is a part.

    Attributes:
        device: where the norms are kept.
        alone: whether it holds gradients of this rank alone.
    """

    def __init__(
        self,
        device: torch.device,
        skip_nonfinite: bool,
        sums: bool = False,
        share: Share | None = None,
    ) -> None:
        # Where each rank holds but a part, one cannot tell for the others what is finite: their
        # window is judged as a whole.
        self._judges = skip_nonfinite and share is None
        self.device, self._of_sums = device, sums
        self._tally = tally_on(device, sums, share)
        self._sums = GradientSums()
        self._merged = False
        self.alone = False

    def __len__(self) -> int:
        """How many micro-batches were taken, the skipped ones included."""
        return len(self._tally)

    @property
    def passed_over(self) -> int:
        """How many micro-batches there are whose gradients are still to come."""
        return self._tally.passed_over

    @property
    def nbytes(self) -> int:
        """The memory that the sum holds."""
        return self._sums.nbytes

    def take(
        self,
        groups: Groups,
        samples: float,
        weight: float,
        closes: bool,
        local_norms: Tensor | None = None,
        is_mean: bool = False,
    ) -> Measured | None:
        """Take the micro-batch gradient that is in `p.grad`.

        Args:
            groups: the parameters of each group.
            samples: n_i.
            weight: w_i, the micro-batch's weight in the mean, on all ranks the same.
            closes: whether it is the window's last.
            local_norms: what this rank brought before `p.grad` became a mean over ranks, for each
                micro-batch that was passed over and for this one, shape (number, groups).
            is_mean: whether `p.grad` is the whole window's mean, each micro-batch weighing the
                same. Where some were passed over it is otherwise their sum with this one.

        Returns:
            None while the window stays open. At its end `p.grad` holds the weighted sum, and what
            is left to do is to multiply it by the returned `scale`.
        """
        norms, finite = self._note(groups, samples, weight, closes, local_norms)
        if not closes:
            if finite is not False:
                self._sums.add(pairs_of(groups), self._newest_factor)
            return None
        if is_mean or (len(self) == 1 and not self._of_sums):
            return self._tally.measured(norms)
        if finite is False:
            return self.flush(groups)
        if is_narrow(groups):
            self._sums.add(pairs_of(groups), self._newest_factor)
            return self.flush(groups)
        self._sums.merge(pairs_of(groups), self._newest_factor)
        return self._measured_sum(groups)

    def pass_over(self, samples: float, weight: float) -> None:
        """Count a micro-batch whose gradient comes with that of the window's last one."""
        self._count(samples, weight)

    def flush(self, groups: Groups) -> Measured:
        """End the window with what was taken so far, leaving its sum, if any, in `p.grad`."""
        if len(self._sums) == 0:
            nothing = self._tally.norms_of([[] for _ in groups])
            return self._tally.measured(self._tally.unless_empty(nothing))
        if not is_narrow(groups) or self._of_sums:
            self._sums.restore(groups)
            return self._measured_sum(groups)
        # A narrow type may not hold the sum: made the mean while it is wide, it is rounded once.
        scale_all(list(self._sums.totals.values()), self._tally.scale())
        self._sums.restore(groups)
        big = self._tally.norms_of(grads_of(groups))
        return self._tally.measured(self._tally.unless_empty(big))

    def take_alone(self, groups: Groups, samples: float, weight: float, closes: bool) -> None:
        """Take a gradient that is this rank's own, towards a sum over all ranks; see `hand_out`."""
        self.alone = True
        _, finite = self._note(groups, samples, weight, False, None)
        if finite is False:
            return
        if closes and not is_narrow(groups):
            self._sums.merge(pairs_of(groups), self._newest_factor)
            self._merged = True
        else:
            self._sums.add(pairs_of(groups), self._newest_factor)

    def leave_out(self, groups: Groups, samples: float, weight: float) -> None:
        """Count a gradient of this rank's own that was thrown away."""
        self.alone = True
        self._count(samples, weight, finite=False)
        self._tally.add_norms([self._tally.norms_of([[] for _ in groups])])

    def hand_out(self, groups: Groups) -> tuple[Measured, dict[Tensor, Tensor]]:
        """End a window of this rank's own gradients, which may be empty.

        Returns:
            Its norms, those of the mean left out, and for each parameter that had a gradient the
            weighted sum: `p.grad` itself, or a wider buffer where that is of a narrow type.
        """
        measured = self._tally.measured(self._tally.norms_of([[] for _ in groups]))
        if is_narrow(groups):
            totals = self._sums.totals
            for param in (param for group in groups for param in group):
                if param not in totals:
                    param.grad = None
            return measured, totals
        if not self._merged:
            self._sums.restore(groups)
        return measured, dict(pairs_of(groups))

    def add_group(self) -> None:
        """Count one more parameter group as without gradient in the window so far."""
        self._tally.add_group()

    def clear(self, keep_memory: bool) -> None:
        """Start the next window."""
        self._tally.clear()
        self._sums.clear(keep_memory)
        self.alone = self._merged = False

    def _note(
        self,
        groups: Groups,
        samples: float,
        weight: float,
        closes: bool,
        local_norms: Tensor | None,
    ) -> tuple[Any, Tensor | bool]:
        """Count a micro-batch and keep its norms; those of `p.grad`, and whether it is finite."""
        grads = grads_of(groups)
        norms = self._tally.norms_of(grads)
        finite = not self._judges or self._judge(norms, grads, closes)
        self._count(samples, weight, finite)
        own = [norms] if local_norms is None else self._tally.read(local_norms)
        self._tally.add_norms(own)
        return norms, finite

    def _count(self, samples: float, weight: float, finite: Tensor | bool = True) -> None:
        if len(self) == 0 and not (self._of_sums or self.alone):
            self._tally.weigh_by(weight)  # not where weights are to be summed over ranks
        self._tally.count(samples, weight, finite)

    def _judge(self, norms: Any, grads: Groups, closes: bool) -> Tensor | bool:
        """Whether the micro-batch is finite: a bool on the CPU, elsewhere known to the device only.

        There what is not finite is zeroed instead, so that it adds nothing to the sum; alone in
        its window it is left to the kernel's `found_inf`.
        """
        finite = self._tally.is_finite(norms)
        if isinstance(finite, Tensor) and (len(self) > 0 or not closes):
            lost = ~finite
            for grad in (grad for group in grads for grad in group):
                values = grad if grad.layout == torch.strided else grad._values()
                values.masked_fill_(moved(lost, grad.device, lost.dtype), 0)
        return finite

    @property
    def _newest_factor(self) -> float:
        """What the newest gradient is multiplied by in the sum."""
        return 1.0 if self._of_sums else self._tally.newest_weight

    def _measured_sum(self, groups: Groups) -> Measured:
        big = self._tally.norms_of(grads_of(groups))
        return self._tally.measured(big, big_is_of_sum=not self._of_sums)
