"""What was measured and decided, as optimizers and monitors offer it."""

from torch import Tensor

from noiseopt.adaptation import Adaptation
from noiseopt.control import Decision, metrics
from noiseopt.estimate import NoiseEstimate
from noiseopt.observers import Observer


class NoiseReadings:
    """The readings of an adaptation, and what a training loop may tell it."""

    _adaptation: Adaptation | None = None

    @property
    def noise(self) -> NoiseEstimate | None:
        """The estimate of the latest decision; None while it is unknown, or in mode "off".

        After a state was loaded it is what that says, until the next decision.
        """
        return self._adaptation.noise if self._adaptation else None

    @property
    def decision(self) -> Decision | None:
        """The latest decision; None before the first, or in mode "off"."""
        return self.decisions[-1] if self.decisions else None

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The recent decisions, oldest first."""
        return tuple(self._adaptation.decisions) if self._adaptation else ()

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in the open window, on each rank."""
        return self._adaptation.steps if self._adaptation else 1

    def metrics(self) -> dict[str, float]:
        """The latest decision as finite floats: "noise/…", "decide/…", "clip/…", "group/…"."""
        if self._adaptation is None or self.decision is None:
            return {}
        return metrics(self.decision, self._adaptation.groups)

    def add_observer(self, observer: Observer) -> None:
        """Have a callable called with each `Decision`, on every rank. Copies do not inherit it.

        See `noiseopt.observers.Observer` for what else an observer may be told.
        """
        if self._adaptation:
            self._adaptation.observe(observer)

    def set_samples(self, samples: float, weight: float | None = None) -> None:
        """Say how many samples the next micro-batch holds.

        That is its weight in the window's mean, too, unless another is given, such as its number of
        tokens. Where the loop accumulates by itself, call it once for each micro-batch; the loop's
        mean is then taken to be weighted by samples.

        Args:
            samples: n_i.
            weight: w_i; the samples if None.

        Raises:
            ValueError: a number is not positive and finite.
            RuntimeError: earlier micro-batches were counted without it.
        """
        if self._adaptation:
            self._adaptation.set_samples(samples, weight)

    def report_loss(self, loss: float | Tensor) -> None:
        """Give the mean loss of the micro-batch: for the record, and to verify changes by.

        Call it once for each micro-batch, before `step()`. A tensor stays where it is until the
        next decision; nothing waits for it.

        Raises:
            ValueError: the loss is not a single number.
        """
        if self._adaptation:
            self._adaptation.losses.tell(loss)
