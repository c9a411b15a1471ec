"""Warnings of a loop that does not bring what measuring and training rest on."""

import logging
from collections.abc import Sequence

from torch import Tensor

from noiseopt.capture import BackwardCapture, BackwardPasses
from noiseopt.distributed import Ranks

logger = logging.getLogger("noiseopt")

SHORT_WINDOWS = 8  # in a row, before a loop is taken not to follow
STANDSTILL = 20  # windows in a row without an update; a GradScaler finds its scale in fewer
OVERTAKEN = 3  # windows; hooks that are added once, and stay, come after ours in one
SHRUNK = 2.0**-10  # a GradScaler starts from 2^16; clipping rarely takes so much


class LoopChecks:
    """What was seen of a loop, and whether it was told; each is told once.

    Args:
        ranks: those that warn as one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._told: set[str] = set()
        self._short = self._overtaken = 0
        self._compares_scales = True  # until one window was looked at

    def settle(
        self,
        capture: BackwardCapture,
        groups: Sequence[Sequence[Tensor]],
        announced: int,
        scale_is_told: bool,
    ) -> None:
        """Settle a window that the loop has accumulated by itself, and look at what it was.

        Args:
            capture: what was read of it.
            groups: the optimizer's parameters.
            announced: how many micro-batches it was to have.
            scale_is_told: whether the factor on its losses is known.
        """
        passes = capture.settle(groups)
        self.see_hooks(capture.passes)
        if passes == 0:
            return
        if passes > len(capture):
            self.see_passes(
                passes,
                len(capture),
                f"if a window of the loop's has {passes} micro-batches, set "
                f"NoiseConfig(accumulation_steps={passes}) and let it follow accumulation_steps",
            )
        self._see_length(passes, announced)
        if self._compares_scales and not scale_is_told:
            self._compares_scales = False
            self._see_scale(capture.shrunk(groups))

    def see_passes(self, passes: int, micro_batches: int, remedy: str) -> None:
        """Warn of micro-batches that had several backward passes, which tell no norm of theirs."""
        self._warn(
            "passes",
            f"{passes} backward passes in {micro_batches} micro-batches: what each contributes "
            "to their sum is unknown, and such windows are not measured; add the losses of a "
            f"micro-batch up and call backward() once, or, {remedy}",
        )

    def see_hooks(self, passes: BackwardPasses) -> None:
        """Warn of hooks of the loop's that may have changed what was read in this window."""
        if passes.is_edited:
            self._warn_alone(
                "edits",
                "hooks of register_post_accumulate_grad_hook change p.grad: what a micro-batch "
                "brings is then unknown, and such windows are not measured; change gradients in "
                "hooks of register_hook, as they come",
            )
        self._overtaken += passes.is_overtaken
        if self._overtaken == OVERTAKEN:
            self._warn_alone(
                "hooks",
                f"in {OVERTAKEN} windows hooks on parameters were added before a backward, after "
                "those that read gradients: they may change what was read, and such windows are "
                "not measured; add them once, and leave them there",
            )

    def _see_length(self, passes: int, announced: int) -> None:
        """Warn of windows that stay shorter than they were to be; of 1 each, nothing shows that."""
        if passes < announced:
            self._short += 1
        elif announced > 1:
            self._short = 0
        if self._short == SHORT_WINDOWS:
            self._warn(
                "short",
                f"{SHORT_WINDOWS} windows in a row were shorter than accumulation_steps said, the "
                f"last of {passes} backward passes instead of {announced}: such windows are not "
                "measured; let the loop accumulate as many micro-batches as accumulation_steps "
                f"says, or keep it from growing by NoiseConfig(max_accumulation_steps={passes})",
            )

    def _see_scale(self, shrunk: float) -> None:
        """Warn where the gradient at `step()` is so small a part of what the backward left."""
        if shrunk < SHRUNK:
            self._warn(
                "scale",
                f"the gradient's norm at step() was {shrunk:.3g} of what backward() had left: if a "
                "GradScaler scales the losses, the noise is measured wrongly unless its scale is "
                "told, by set_loss_scale(scaler.get_scale()) in each window, or by "
                "NoiseMonitor(grad_scaler=scaler)",
            )

    def _warn(self, kind: str, text: str) -> None:
        if self._is_news(kind):
            self._ranks.warn(text)

    def _warn_alone(self, kind: str, text: str) -> None:
        """Warn of what may be so on this rank only."""
        if self._is_news(kind):
            logger.warning(text)

    def _is_news(self, kind: str) -> bool:
        is_news = kind not in self._told
        self._told.add(kind)
        return is_news


class StandstillCheck:
    """Warns of a run that has stopped to learn, once each time.

    Args:
        ranks: those that warn as one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._windows = 0  # without an update, the latest in a row

    def see(self, applied: bool) -> None:
        """Take in whether a window ended in an update."""
        self._windows = 0 if applied else self._windows + 1
        if self._windows == STANDSTILL:
            self._ranks.warn(
                f"the last {STANDSTILL} windows ended without an update, since no gradient in them "
                "was finite: the weights stand still; look for inf or nan in the data, the loss "
                "and the weights, and lower the learning rate or the loss scale"
            )
