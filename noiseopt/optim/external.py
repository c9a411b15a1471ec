"""The windows that the loop accumulates in `p.grad` by itself, as an optimizer takes them."""

import weakref
from collections.abc import Sequence

from torch import Tensor

from noiseopt.adaptation import Adaptation
from noiseopt.capture import BackwardCapture, device_of, settled, squared_norms
from noiseopt.distributed import Ranks
from noiseopt.loop_checks import LoopChecks
from noiseopt.optim.ended import Ended

Groups = Sequence[Sequence[Tensor]]


class ExternalWindows:
    """The open window of a loop that calls `step()` once for each.

    Args:
        ranks: those that take part.
        groups: the parameters of each group.
        adaptation: says how long windows are, and agrees with other ranks.

    Attributes:
        capture: the hooks, and what they have read.
        loss_scale: the factor on the losses; None while it was not told.
    """

    def __init__(self, ranks: Ranks, groups: Groups, adaptation: Adaptation) -> None:
        self._adaptation = adaptation
        self._device = device_of(groups)
        self._share = ranks.share if ranks.sharded else None
        self._checks = LoopChecks(ranks)
        told = weakref.proxy(adaptation)  # the hooks, which the parameters hold, keep nothing alive
        self.capture = BackwardCapture(
            groups,
            lambda: told.steps,
            self._share,
            lambda: told.measures,
            lambda totals: told.summed_parts(totals),
        )
        self.loss_scale: float | Tensor | None = None

    def take(self, groups: Groups) -> Ended:
        """End a window; what the loop did to `p.grad` since the backward is applied."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale
        told = self.loss_scale is not None
        self._checks.settle(self.capture, groups, self._adaptation.steps, told)
        steps = len(self.capture)
        samples = self._adaptation.samples.take_window(self.capture.num_skipped + steps)
        measured = self.capture.close(groups, samples, scale)
        grads = [settled(g) for params in groups for p in params if (g := p.grad) is not None]
        applied = squared_norms([grads], self._device, self._share)
        extra = None if self._share is None else applied
        rates = self._adaptation.rates(steps)
        row = self._adaptation.agree(measured, extra, extra is not None, rates)
        return Ended(row, applied[0].sqrt(), None, steps)
