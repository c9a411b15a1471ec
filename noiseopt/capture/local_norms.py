"""This rank's own gradients, where `p.grad` holds the mean over ranks when the optimizer steps.

A loop may unscale or clip `p.grad` between backward and step. What it multiplies the mean by, it
would have multiplied each rank's part by: a sample of entries, read at the end of the backward and
again at the step, shows the factor.
"""

import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from noiseopt.capture.norms import device_of, norm_of_sample, sampled, unknown_norms
from noiseopt.capture.passes import BackwardPasses
from noiseopt.capture.sharding import local, may_be_empty


class LocalNorms:
    """The norms of the gradients of which `p.grad` is the mean over ranks.

    Args:
        groups: the parameters of each group. Frozen ones are passed over.
        reads: tells whether the open window is measured.
        summed: sums over the ranks what each knows of its part of a gradient, if it is a part.

    Attributes:
        passes: the hooks.
        left: |.|^2 of a sample of `p.grad` after the backward before the last `take`, 0-d; None
            where it was not read.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        reads: Callable[[], bool] = lambda: True,
        summed: Callable[[Tensor], Tensor] = lambda totals: totals,
    ) -> None:
        self._reads = reads
        self._summed = summed
        self._device = device_of(groups)
        self._with_grad: list[Tensor] = []
        self._held: list[tuple[Tensor, weakref.ref[Tensor]]] = []  # a few, each with its gradient
        self._before: Tensor | None = None
        self.left: Tensor | None = None
        self.passes = BackwardPasses(groups, self._sample, reads)

    def __len__(self) -> int:
        """How many backward passes were read."""
        return len(self.passes)

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Read one more group."""
        self.passes.add_group(params)

    def take(
        self, groups: Sequence[Sequence[Tensor]], number: int, may_be_unused: bool = False
    ) -> Tensor:
        """|g|^2 of each backward pass since the last call, as a part of the mean in `p.grad`.

        Where there were more passes than micro-batches, some gradient is their sum, whose norm
        theirs do not tell: then it is nan. So it is where a gradient passed unread, as one of FSDP2
        that no forward has shown, and in windows that are not measured.

        Args:
            groups: the parameters of each group.
            number: how many micro-batches there were.
            may_be_unused: whether `p.grad` may be the other ranks' alone, so that no pass here was
                one of zeros.

        Returns:
            Shape (number, groups).

        Raises:
            RuntimeError: no backward pass was seen, or gradients were removed since.
        """
        self.left = self._before
        if self.passes.see_more() or not self._reads():
            self.clear()
            return unknown_norms(len(groups), self._device).expand(number, -1)
        if len(self) == 0 and may_be_unused:
            self.passes.norms.append(unknown_norms(len(groups), self._device).zero_())
        if len(self) == 0:
            raise RuntimeError(
                "no backward pass was seen since the last step(): the ranks' own gradients are "
                "read as loss.backward() brings them; if p.grad is made otherwise, use "
                "noise='off', or NoiseConfig(gradients='local') to have the optimizer average it"
            )
        self._check()
        norms = torch.stack(self.passes.norms)
        if self._before is not None:
            sums = torch.stack([self._sum_of_squares(), self._before])
            if self._may_hold_nothing():
                sums = self._summed(sums)
            # nan where the sample is all zeros: then nothing shows a factor.
            norms = norms * (sums[0] / sums[1])
        more = self.passes.watch_more(groups)
        # Where other ranks' backwards may have brought it, one here may be of what was before.
        replaced = may_be_unused and any(grad() is not p.grad for p, grad in self._held)
        known = len(self) == number and not more and not replaced
        self.clear()
        return norms if known else norms.new_full((number, norms.shape[1]), math.nan)

    def _check(self) -> None:
        removed = sum(param.grad is None for param in self._with_grad)
        if removed:
            raise RuntimeError(
                f"{removed} of {len(self._with_grad)} gradients were removed between backward and "
                "step(), so that what the ranks measured is not what would be applied: freeze "
                "parameters by requires_grad_(False) instead"
            )

    def _may_hold_nothing(self) -> bool:
        """Whether some rank's sample may be empty, as where few outputs are trained."""
        return all(map(may_be_empty, sampled(self._with_grad)))

    def scale(self, factor: float) -> None:
        """Take in that `p.grad` was multiplied by a factor which is none of the loop's."""
        if self._before is not None:
            self._before = self._before * factor**2

    def open_window(self) -> None:
        """Read the backward passes to come, or let them pass."""
        self.passes.listen(self._reads())

    def clear(self) -> None:
        """Forget what was read."""
        self.passes.clear()
        self._with_grad, self._held, self._before = [], [], None

    def _sample(self) -> None:
        self._with_grad = [param for param in self.passes.watched if param.grad is not None]
        few = sampled(self._with_grad)
        self._held = [(p, weakref.ref(grad)) for p in few if (grad := p.grad) is not None]
        self._before = self._sum_of_squares() if self._with_grad else None

    def _sum_of_squares(self) -> Tensor:
        few = sampled(self._with_grad)
        grads = [local(grad) for param in few if (grad := param.grad) is not None]
        return norm_of_sample(grads, self._device)
