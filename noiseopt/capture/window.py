"""A window of micro-batch gradients that pass one at a time: their norms, and their running sum.

The sum lives in a buffer of its own, in fp32 or wider, so that nothing a training loop does to
`p.grad` between micro-batches can touch what is already summed. A window of one has no buffer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from noiseopt.capture.norms import squared_norms, sum_dtype
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


class GradientWindow:
    """The open window of an optimizer that accumulates by itself.

    Args:
        device: where the norms are kept.
        skip_nonfinite: leave micro-batches whose gradient is not finite out of the mean.
        sums: whether `p.grad` comes as a sum of weight w_i, and not as a mean to be weighted so.
        share: how this rank's part of a gradient counts in the sum over ranks, if it is a part.

    Attributes:
        alone: whether it holds gradients of this rank alone.
    """

    def __init__(
        self,
        device: torch.device,
        skip_nonfinite: bool,
        sums: bool = False,
        share: Share | None = None,
    ) -> None:
        self._device = device
        self._skip_nonfinite = skip_nonfinite
        self._of_sums = sums
        self._norms: list[Tensor] = []
        self._samples: list[float] = []
        self._weights: list[float] = []
        self._finite: list[Tensor | bool] = []
        self._sums = GradientSums()
        self._merged = False
        self._share = share
        self.alone = False

    def __len__(self) -> int:
        """How many micro-batches were taken, the skipped ones included."""
        return len(self._samples)

    @property
    def passed_over(self) -> int:
        """How many micro-batches there are whose gradients are still to come."""
        return len(self) - len(self._norms)

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
    ) -> Measured | None:
        """Take the micro-batch gradient that is in `p.grad`.

        Args:
            groups: the parameters of each group.
            samples: n_i.
            weight: w_i, the micro-batch's weight in the mean, on all ranks the same.
            closes: whether it is the window's last.
            local_norms: what this rank brought before `p.grad` became a mean over ranks, for each
                micro-batch that was passed over and for this one, shape (number, groups).

        Returns:
            None while the window stays open. At its end `p.grad` holds the weighted sum, and what
            is left to do is to multiply it by the returned `scale`.
        """
        norms = self._note(groups, samples, weight, closes, local_norms)
        finite = self._finite[-1]
        if not closes:
            if finite is not False:
                self._sums.add(pairs_of(groups), self._newest_factor)
            return None
        if len(self) == 1 and not self._of_sums:
            return self._measured(norms)
        if finite is False:
            return self.flush(groups)
        if is_narrow(groups):
            self._sums.add(pairs_of(groups), self._newest_factor)
            return self.flush(groups)
        self._sums.merge(pairs_of(groups), self._newest_factor)
        return self._measured_sum(groups)

    def pass_over(self, samples: float, weight: float) -> None:
        """Count a micro-batch whose gradient comes with that of the window's last one."""
        self._samples.append(samples)
        self._weights.append(weight)
        self._finite.append(True)

    def flush(self, groups: Groups) -> Measured:
        """End the window with what was taken so far, leaving its sum in `p.grad`."""
        if not is_narrow(groups) or self._of_sums:
            self._sums.restore(groups)
            return self._measured_sum(groups)
        # A narrow type may not hold the sum: made the mean while it is wide, it is rounded once.
        total = self._counts()[1].sum()
        scale_all(list(self._sums.totals.values()), 1 / total)
        self._sums.restore(groups)
        big = self._squared_norms(grads_of(groups)) + 0 / total  # nan where nothing was left
        return self._measured(big)

    def take_alone(self, groups: Groups, samples: float, weight: float, closes: bool) -> None:
        """Take a gradient that is this rank's own, towards a sum over all ranks; see `hand_out`."""
        self.alone = True
        self._note(groups, samples, weight, False, None)
        if self._finite[-1] is False:
            return
        if closes and not is_narrow(groups):
            self._sums.merge(pairs_of(groups), self._newest_factor)
            self._merged = True
        else:
            self._sums.add(pairs_of(groups), self._newest_factor)

    def leave_out(self, groups: Groups, samples: float, weight: float) -> None:
        """Count a gradient of this rank's own that was thrown away."""
        self.alone = True
        self.pass_over(samples, weight)
        self._finite[-1] = False
        self._norms.append(self._squared_norms([[] for _ in groups]))

    def hand_out(self, groups: Groups) -> tuple[Measured, dict[Tensor, Tensor]]:
        """End a window of this rank's own gradients, which may be empty.

        Returns:
            Its norms, those of the mean left out, and for each parameter that had a gradient the
            weighted sum: `p.grad` itself, or a wider buffer where that is of a narrow type.
        """
        measured = self._measured(self._squared_norms([[] for _ in groups]))
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
        self._norms = [torch.cat([norms, norms.new_zeros(1)]) for norms in self._norms]

    def clear(self, keep_memory: bool) -> None:
        """Start the next window."""
        self._norms, self._samples, self._weights, self._finite = [], [], [], []
        self._sums.clear(keep_memory)
        self.alone = self._merged = False

    def _note(
        self,
        groups: Groups,
        samples: float,
        weight: float,
        closes: bool,
        local_norms: Tensor | None,
    ) -> Tensor:
        """Count a micro-batch and keep its norms; return those of `p.grad`."""
        grads = grads_of(groups)
        norms = self._squared_norms(grads)
        finite = self._judge(norms, grads, closes)
        self.pass_over(samples, weight)
        self._finite[-1] = finite
        self._norms += [norms] if local_norms is None else local_norms.unbind()
        return norms

    def _judge(self, norms: Tensor, grads: Groups, closes: bool) -> Tensor | bool:
        """Whether the micro-batch is finite: a bool on the CPU, elsewhere known to the device only.

        There what is not finite is zeroed instead, so that it adds nothing to the sum; alone in
        its window it is left to the kernel's `found_inf`. Where each rank holds but a part, one
        cannot tell for the others: their window is judged as a whole.
        """
        if self._share is not None:
            return True
        if not self._skip_nonfinite:
            return True
        if self._device.type == "cpu":
            return math.isfinite(sum(norms.tolist()))
        finite = norms.sum().isfinite()
        if len(self) > 0 or not closes:
            lost = ~finite
            for grad in (grad for group in grads for grad in group):
                grad.masked_fill_(lost.to(grad.device), 0)
        return finite

    @property
    def _newest_factor(self) -> float:
        """What the newest gradient is multiplied by in the sum."""
        return 1.0 if self._of_sums else self._weights[-1] / self._unit

    @property
    def _unit(self) -> float:
        """What weights are divided by; where they are to be summed over ranks, nothing."""
        return 1.0 if self._of_sums or self.alone else self._weights[0]

    def _squared_norms(self, grads: Groups) -> Tensor:
        return squared_norms(grads, self._device, self._share)

    def _measured_sum(self, groups: Groups) -> Measured:
        return self._measured(self._squared_norms(grads_of(groups)), of_sum=not self._of_sums)

    def _measured(self, big: Tensor, of_sum: bool = False) -> Measured:
        """The window with the squared norm of its mean, or of the sum that is to become that."""
        samples, weights = self._counts()
        scale = None
        if of_sum:
            total = weights.sum()
            big, scale = big / total.square(), 1 / total
        small = torch.stack(self._norms) if self._norms else big.new_zeros(0, len(big))
        if self._of_sums:
            small = small / self._each(self._weights).square()[:, None]
        return Measured(small, big, samples, weights, scale)

    def _counts(self) -> tuple[Tensor, Tensor]:
        """n_i, and w_i with 0 for what was left out; made on the device, without a copy."""
        samples = self._each(self._samples)
        weights = self._each([weight / self._unit for weight in self._weights])
        if all(flag is True for flag in self._finite):
            return samples, weights
        return samples, weights * self._each(self._finite)

    def _each(self, values: Sequence[Tensor | float]) -> Tensor:
        """One value of each micro-batch; shape (K,)."""
        first = values[0] if values else 0.0
        if not isinstance(first, Tensor) and values.count(first) == len(values):
            return self._full(len(values), first)
        return torch.cat([self._full(1, value) for value in values])

    def _full(self, number: int, value: Tensor | float) -> Tensor:
        dtype = sum_dtype(self._device)
        if isinstance(value, Tensor):
            return value.to(dtype).expand(number)
        return torch.full((number,), value, dtype=dtype, device=self._device)
