"""What is trained: a perceptron on handwritten digits, and a small GPT on source text.

Both take their data from the convergence benchmark. The rates are the best found without
clipping, on clean data of the tuning split and seed 101: of 4e-3, 8e-3 and 16e-3 for the digits,
and of 2e-3, 4e-3 and 8e-3 for the GPT.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clipping.scenarios import Batch
from benchmarks.convergence.workloads import digits, gpt
from benchmarks.convergence.workloads.base import Data
from noiseopt.demo.gpt import GPT, Shape

WIDTH = 96
SHAPE = Shape(layers=1, width=32, heads=2, context=32)
MICRO_BATCHES = 1920  # of the digits' data, which the GPT's equal


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        build: a new model, from torch's global generator. It returns a batch's mean loss.
        batches: of a split and a seed, the micro-batches of a run.
        held_out: of a split, clean samples to validate on; the first batch is what is watched
            after every update.
        other: the same micro-batch in another domain.
        lr: the peak rate.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[str, int], Iterator[Batch]]
    held_out: Callable[[str], list[Batch]]
    other: Callable[[Batch], Batch]
    lr: float


class Perceptron(nn.Module):
    """Two hidden layers between 64 pixels and 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, WIDTH), nn.GELU()),
            *(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10)),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy in nats."""
        return F.cross_entropy(self.layers(images), labels)


def negatives(batch: Batch) -> Batch:
    """White digits become black, and their patches change places."""
    images, labels = batch
    return 1 - images.flip(1), labels


def watched_first(held_out: list[Batch], number: int) -> list[Batch]:
    """The same samples, so many of them in the first batch."""
    first, *others = held_out
    parts = [tuple(part[:number] for part in first), tuple(part[number:] for part in first)]
    return [*parts, *others]


@cache
def text(split: str) -> Data:
    return gpt.load(split, MICRO_BATCHES, batch_size=8, context=SHAPE.context)


@cache
def digits_held_out(split: str) -> list[Batch]:
    return watched_first(digits.load(split).held_out, 128)


@cache
def gpt_held_out(split: str) -> list[Batch]:
    return watched_first(text(split).held_out, 16)


def same(batch: Batch) -> Batch:
    return batch


TASKS = {
    "digits": Task(
        build=Perceptron,
        batches=lambda split, seed: digits.load(split).batches(seed),
        held_out=digits_held_out,
        other=negatives,
        lr=8e-3,
    ),
    "gpt": Task(
        build=lambda: GPT(SHAPE),
        batches=lambda split, seed: text(split).batches(seed),
        held_out=gpt_held_out,
        other=same,
        lr=8e-3,
    ),
}
