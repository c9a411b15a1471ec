"""What the loop tells of its micro-batches: their samples, their weights and their losses."""

import logging
import math

import torch
from torch import Tensor

from noiseopt.control import NoiseConfig

logger = logging.getLogger("noiseopt")


class SampleCounts:
    """Counts that were told, until the micro-batches that they belong to are taken.

    Args:
        config: the settings; they may say how many samples every micro-batch holds.
        counting: whether micro-batches come counted in samples, as in a state that was loaded.

    Attributes:
        counting: whether micro-batches come counted in samples.
    """

    def __init__(self, config: NoiseConfig, counting: bool) -> None:
        self._config = config
        self._told: list[tuple[float, float]] = []
        self._bound: list[float | None] = []  # of backwards that have run, where they are seen
        self._in_turn: list[float] = []  # all that were told for those
        self._taken = self._warned = False
        self.counting = counting

    @property
    def are_told(self) -> bool:
        """Whether the loop says how many samples each micro-batch holds."""
        if self._told or any(samples is not None for samples in self._bound):
            return True
        return self.counting and self._config.samples_per_micro_batch is None

    def tell(self, samples: float, weight: float | None, begun: bool) -> None:
        """Take the count of the next micro-batch, and its weight if that is another.

        Args:
            samples: n_i.
            weight: w_i; the samples if None.
            begun: whether windows were closed before.

        Raises:
            ValueError: a number is not positive and finite.
            RuntimeError: earlier micro-batches were counted without it.
        """
        weight = samples if weight is None else weight
        for name, value in (("samples", samples), ("weight", weight)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: it must be positive and finite")
        if not self.counting and (begun or self._taken):
            raise RuntimeError(
                "set_samples() was first called after micro-batches had been counted as one each: "
                "call it before every micro-batch from the first, or set "
                "NoiseConfig.samples_per_micro_batch"
            )
        self.counting = True
        self._told.append((float(samples), float(weight)))

    def bind(self) -> None:
        """Take the newest count for a backward that has run: earlier ones came to none.

        If the one before it has none yet, it was told late: after its backward.
        """
        samples = self._told[-1][0] if self._told else None
        self._in_turn += [each for each, _ in self._told]
        self._told = []
        if self._bound and self._bound[-1] is None:
            self._bound[-1], samples = samples, None
        self._bound.append(samples)

    def unbind(self) -> None:
        """Forget the counts of backwards that were thrown away, also one that was told late."""
        if self._bound[-1:] == [None]:
            self._told = []
        self._bound, self._in_turn = [], []

    def take(self) -> tuple[float, float, bool]:
        """Samples and weight of the micro-batch that is taken now, and whether they were told."""
        told = self._take_told()
        if told:
            return *told[-1], True
        (samples,) = self._untold(1)
        return samples, samples, False

    def take_oldest(self) -> tuple[float, float]:
        """Samples and weight of a micro-batch that was thrown away, before the newest one told."""
        told = self._take_told()
        if told:
            self._told = told[1:]
            return told[0]
        (samples,) = self._untold(1)
        return samples, samples

    def take_window(self, micro_batches: int) -> list[float]:
        """The samples of so many micro-batches, as far as they were told.

        Raises:
            ValueError: they were told of another number of them.
        """
        counts = self._take_bound() if self._bound else [each for each, _ in self._take_told()]
        if micro_batches == 1:
            counts = counts[-1:]
        if len(counts) not in (0, micro_batches):
            raise ValueError(
                f"set_samples() was called {len(counts)} times for {micro_batches} micro-batches: "
                "call it once for each, or never"
            )
        if counts:
            return counts
        return self._untold(micro_batches)

    def forget(self) -> None:
        """Forget what was told of micro-batches that are not to come."""
        self._told, self._bound, self._in_turn = [], [], []

    def _take_bound(self) -> list[float]:
        self.bind()  # what was told late of the last one, whose own place is dropped
        self._taken = True
        bound, self._bound = self._bound[:-1], []
        told, self._in_turn = self._in_turn, []
        if len(told) == len(bound):
            return told  # maybe some ahead of their turn
        if len(told) > len(bound) and not self._warned:
            self._warned = True
            logger.warning(
                f"set_samples() was called {len(told)} times in a window of {len(bound)} "
                "micro-batches: the newest before each backward counts, earlier ones are taken to "
                "be of micro-batches that raised; call it right before each micro-batch"
            )
        return [samples for samples in bound if samples is not None]

    def _take_told(self) -> list[tuple[float, float]]:
        self._taken = True
        told, self._told = self._told, []
        return told

    def _untold(self, micro_batches: int) -> list[float]:
        if self._config.samples_per_micro_batch is not None:
            return [self._config.samples_per_micro_batch] * micro_batches
        if self.counting or self._config.loss_reduction == "sum":
            earlier = "for earlier micro-batches but not for this one"
            why = earlier if self.counting else "never, and loss_reduction is 'sum'"
            raise RuntimeError(
                f"set_samples() was called {why}: call it before every micro-batch, or set "
                "NoiseConfig.samples_per_micro_batch"
            )
        return [1.0] * micro_batches


class Losses:
    """Mean losses of the open window's micro-batches.

    Attributes:
        are_told: whether there ever was one.
    """

    def __init__(self) -> None:
        self.are_told = False
        self._told: list[Tensor] = []
        self._kept: list[Tensor] = []

    def tell(self, loss: float | Tensor) -> None:
        """Take the loss of a micro-batch. Nothing waits for it.

        It is copied: memory of a captured CUDA graph's holds the next loss soon.

        Raises:
            ValueError: it is not a single number.
        """
        if not isinstance(loss, Tensor):
            self._told.append(torch.tensor(float(loss), device="cpu"))
        elif loss.numel() == 1:
            self._told.append(loss.detach().clone().reshape(()))
        else:
            raise ValueError(f"the loss has shape {tuple(loss.shape)}: report one number")
        self.are_told = True

    def keep(self) -> None:
        """Keep the latest, of the micro-batch that is taken now: others were thrown away."""
        self._kept += self._told[-1:]
        self._told = []

    def forget(self) -> None:
        """Forget those of micro-batches that are not to come."""
        self._told = []

    def begin_again(self) -> None:
        """Forget those that were kept of the open window."""
        self._kept = []

    def take(self) -> list[Tensor]:
        """All of the window, each 0-d; the next one begins with none."""
        losses = self._kept + self._told
        self._kept, self._told = [], []
        return losses
