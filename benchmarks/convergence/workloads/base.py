"""What a workload is."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

Batch = tuple[Tensor, ...]  # of equal first dimension, the samples; the model returns its mean loss

SPLITS = ("tuning", "reporting")
BETA1 = 0.9  # torch's default


@dataclass(frozen=True)
class Data:
    """One split of a workload.

    Attributes:
        batches: the micro-batches of a run, by its seed: the same seed, the same ones in order.
        held_out: what is validated on, in batches.
    """

    batches: Callable[[int], Iterator[Batch]]
    held_out: list[Batch]


@dataclass(frozen=True)
class Workload:
    """What is trained, and for how long.

    Attributes:
        name: as in the results.
        build: a new model, from torch's global generator. It returns a batch's mean loss.
        load: the data of a split.
        micro_batches: of one run; a multiple of 32, so that no constant window is left open.
        micro_batch: samples in each.
        lr: where the search for the rate of a window of 1 begins.
        weight_decay: of every arm.
        warm_up: the share of each cycle in which the learning rate rises.
        cycles: how often the schedule begins anew, in equal parts of the run.
        beta1: of every arm that does not name another.
        tuned_on: another workload, whose rates and beta2 it takes; None where it has its own.
        settings: everything else that a change of would make another workload.
    """

    name: str
    build: Callable[[], nn.Module]
    load: Callable[[str], Data]
    micro_batches: int
    micro_batch: int
    lr: float
    weight_decay: float = 0.1
    warm_up: float = 0.05
    cycles: int = 1
    beta1: float = BETA1
    tuned_on: str | None = None
    settings: dict[str, object] = field(default_factory=dict)

    def schedule(self, done: int) -> float:
        """The factor on the peak rate after so many micro-batches: warm-up, cosine to a tenth."""
        length = self.micro_batches // self.cycles
        rising = max(1, round(self.warm_up * length))
        done %= length
        if done < rising:
            return (done + 1) / rising
        share = (done - rising) / max(1, length - rising)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(share, 1.0)))

    def described(self) -> dict[str, object]:
        """What results depend on, as plain values."""
        cycles = {"cycles": self.cycles} if self.cycles > 1 else {}  # older records have none
        return {
            **cycles,
            "micro_batches": self.micro_batches,
            "micro_batch": self.micro_batch,
            "weight_decay": self.weight_decay,
            "warm_up": self.warm_up,
            **self.settings,
        }
