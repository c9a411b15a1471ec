"""A window of an engine in numbers: its micro-batches' gradients, and the mean that it applies."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from noiseopt.adaptation import Adaptation
from noiseopt.capture import Measured, Row, squared_norms
from noiseopt.integrations.deepspeed.leaves import LeafNorms
from noiseopt.integrations.deepspeed.loop import LoopWatch
from noiseopt.integrations.deepspeed.wrappers import PlainWrapper


class EngineWindow:
    """Measures the window that an engine is about to end.

    Args:
        engine: the engine.
        wrapper: of its optimizer, which holds the mean gradient.
        leaves: what was read of the micro-batches' own gradients.
        loop: what was seen of the loop.
        adaptation: agrees with other ranks.
    """

    def __init__(
        self,
        engine: Any,
        wrapper: Any,
        leaves: LeafNorms,
        loop: LoopWatch,
        adaptation: Adaptation,
    ) -> None:
        self._engine, self._wrapper = engine, wrapper
        self._leaves, self._loop, self._adaptation = leaves, loop, adaptation
        self._device = torch.device(engine.device)

    def agree(self, passes: int, at_once: bool) -> tuple[Row, Tensor]:
        """Make a window's row.

        Args:
            passes: its backward passes. Without any the row is summed now, to see others'.
            at_once: whether the sums over ranks are needed now: the row's, and that of the norms of
                the parts which ranks hold. The same on all ranks.

        Returns:
            The row, and the norm of the mean, before it is clipped.
        """
        mean = squared_norms(self._wrapper.mean(), self._device) / self._wrapper.loss_scale**2
        total = mean.sum(0, keepdim=True)
        measured = self._measured(passes, mean)
        parts = total if at_once and self._wrapper.sharded else None
        row = self._adaptation.agree(measured, parts, at_once or passes == 0)
        return row, total[0].sqrt()

    def withheld(self, norm: Tensor) -> AbstractContextManager[None]:
        """Withhold a mean that is not finite from an optimizer that would apply it."""
        wrapper, acts = self._wrapper, self._adaptation.acts
        if isinstance(wrapper, PlainWrapper) and acts and not norm < torch.inf:
            return wrapper.withheld()
        return nullcontext()

    def applied_norm(self, norm: Tensor) -> Tensor | float:
        """The norm of all ranks' mean after the update, before it was clipped."""
        if isinstance(self._wrapper, PlainWrapper):
            return norm
        applied: Tensor | float = self._engine.get_global_grad_norm()
        return applied

    def _measured(self, passes: int, mean: Tensor) -> Measured:
        """The window's norms, in terms of the micro-batches' own gradients.

        Args:
            passes: its backward passes, each of a micro-batch.
            mean: of the mean gradient as it is applied, |.|^2 in each group.
        """
        leaves, shows_each = self._leaves, self._loop.shows_each(passes)
        if passes == 0:
            return self._nothing(mean)
        factors = torch.stack(leaves.factors) / self._wrapper.loss_scale
        weights = factors / factors.sum()
        # A loop that ends a window early leaves fewer parts than the engine has divided by.
        share_sq = factors.sum().clamp(max=1.0).square()
        scale_sq = weights.square() * share_sq * self._wrapper.loss_scale**2
        small = torch.stack(leaves.norms) / scale_sq[:, None]
        big = mean / share_sq if shows_each else mean * torch.nan
        told = self._adaptation.samples.take_window(passes)
        samples = torch.stack([weights.new_full((), number) for number in told])
        seen = small.sum(1) if self._adaptation.measures else mean.sum()
        return Measured(small, big, samples, weights * seen.isfinite(), None)

    def _nothing(self, mean: Tensor) -> Measured:
        """What a rank without a backward adds to a window, of which the mean is not measured."""
        self._adaptation.samples.forget()
        none = mean.new_empty(0)
        return Measured(mean.new_empty(0, len(mean)), mean * torch.nan, none, none, None)
