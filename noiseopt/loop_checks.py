"""Warnings of a loop that does not bring what the measurement rests on, each once."""

from noiseopt.distributed import Ranks

SHORT_WINDOWS = 8  # in a row, before a loop is taken not to follow
SHRUNK = 2.0**-10  # a GradScaler starts from 2^16; clipping rarely takes so much


class LoopChecks:
    """What was seen of a loop, and whether it was told.

    Args:
        ranks: those that warn as one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._told: set[str] = set()
        self._short = 0
        self.compares_scales = True  # until one window was looked at

    def see_passes(self, passes: int, micro_batches: int, remedy: str) -> None:
        """Warn of micro-batches that had several backward passes, which tell no norm of theirs."""
        if passes > micro_batches:
            self._warn(
                "passes",
                f"{passes} backward passes in {micro_batches} micro-batches: what each contributes "
                "to their sum is unknown, and such windows are not measured; add the losses of a "
                f"micro-batch up and call backward() once, or, {remedy}",
            )

    def see_window(self, passes: int, micro_batches: int, announced: int) -> None:
        """Warn of windows that the loop makes of another length than was announced.

        Args:
            passes: backward passes in one that has ended.
            micro_batches: what they are taken for.
            announced: the length that it was to have.
        """
        self.see_passes(
            passes,
            micro_batches,
            f"if a window of the loop's has {passes} micro-batches, set "
            f"NoiseConfig(accumulation_steps={passes}) and let it follow accumulation_steps",
        )
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

    def see_scale(self, shrunk: float) -> None:
        """Warn of a loss scale that was not told.

        Args:
            shrunk: the gradient's norm at `step()` over that which the backward left.
        """
        self.compares_scales = False
        if shrunk < SHRUNK:
            self._warn(
                "scale",
                f"the gradient's norm at step() was {shrunk:.3g} of what backward() had left: if a "
                "GradScaler scales the losses, the noise is measured wrongly unless its scale is "
                "told, by set_loss_scale(scaler.get_scale()) in each window, or by "
                "NoiseMonitor(grad_scaler=scaler)",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._ranks.warn(text)
