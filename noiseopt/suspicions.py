"""What ranks that agree may still do wrong: the same data, the same dropout, sums for means.

Each is told once, with the remedy: `Ranks.warn` does so on one rank.
"""

from noiseopt.distributed import Ranks
from noiseopt.estimate import NoiseEstimate, WindowNorms

SUSPECT = 0.02  # noise over a micro-batch's squared gradient
SUMMED = 1.5  # the mean's squared norm over the mean of the squared norms, which is 1 at most
WINDOWS_TO_BE_SURE = 3


class Suspicions:
    """Watches what windows show, and warns.

    Args:
        ranks: those that take part.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._with_same_data = 0
        self._with_same_randomness = 0
        self._with_like_data = False
        self._longer_than_a_mean = 0

    def see_data(self, same: bool) -> None:
        """Warn, once, where the ranks' gradients were the same in some windows in a row."""
        self._with_same_data = _in_a_row(self._with_same_data, same)
        if self._with_same_data == WINDOWS_TO_BE_SURE:
            self._ranks.warn(
                f"the gradients of all {self._ranks.data} ranks are the same before they are "
                "averaged: the ranks see the same data, and measure no noise; give each rank its "
                "own part, for instance by a DistributedSampler"
            )

    def see_noise(self, noise: NoiseEstimate, micro_batch: float) -> None:
        """Warn, once, where noise is so small a part of a micro-batch's gradient as to be suspect.

        Ranks that see the same data, each with its own dropout, measure that alone.

        Args:
            noise: as it is known.
            micro_batch: the samples of one on one rank.
        """
        part = noise.scale_upper / (noise.scale_upper + micro_batch)
        told = self._with_like_data or self._with_same_data >= WINDOWS_TO_BE_SURE
        if self._ranks.data > 1 and part < SUSPECT and not told:
            self._with_like_data = True
            self._ranks.warn(
                f"noise is at most {part:.2g} of a micro-batch's squared gradient: the ranks see "
                "nearly the same data, which each should have a part of, for instance by a "
                f"DistributedSampler; or micro-batches of {micro_batch:.4g} {noise.unit} are far "
                f"larger than the noise asks for, which is {noise.scale_upper:.3g} at most"
            )

    def see_mean(self, norms: WindowNorms) -> None:
        """Warn, once, where gradients are longer than the mean over ranks of what these brought.

        The squared norm is convex, so that of a mean is at most the mean of the squared norms.

        Args:
            norms: of a window of equal micro-batches.
        """
        if self._ranks.data == 1 or not norms.small_sq:
            return
        mean, own = sum(norms.big_sq), sum(norms.small_sq)
        self._longer_than_a_mean = _in_a_row(self._longer_than_a_mean, mean > SUMMED * own)
        if self._longer_than_a_mean == WINDOWS_TO_BE_SURE:
            self._ranks.warn(
                f"the gradients at step() are longer (squared norm {mean:.3g}) than a mean of what "
                f"the ranks' backwards brought can be ({own:.3g}): where they are summed over "
                "ranks and not averaged, as by a communication hook or FSDP2's "
                "set_gradient_divide_factor(1.0), the noise is measured wrongly; have them "
                f"averaged, and multiply the loss by the {self._ranks.data} ranks"
            )

    def see_randomness(self, same: bool) -> None:
        """Warn, once, where the ranks drew the same random numbers in some windows in a row."""
        self._with_same_randomness = _in_a_row(self._with_same_randomness, same)
        if self._with_same_randomness == WINDOWS_TO_BE_SURE:
            self._ranks.warn(
                f"all {self._ranks.all} ranks draw the same random numbers: dropout masks and "
                "augmentations are the same on each, and pass for signal; after the model is "
                "built, seed each rank that sees other data differently, as by "
                "torch.manual_seed(seed + rank)"
            )


def _in_a_row(windows: int, same: bool) -> int:
    """How many windows in a row had it, which goes on to count from where that was told."""
    return windows + 1 if same or windows >= WINDOWS_TO_BE_SURE else 0
