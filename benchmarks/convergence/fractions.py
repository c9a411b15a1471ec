"""How noisy windows are along Seesaw runs of the tuning seed, in norms that could gate growth.

At a few points of a run, at its weights of the moment, further micro-batches are drawn and their
gradients g_i held against their mean, in norms that weigh coordinate j by v_j^-p, with v Adam's
second moment from the update before: p = 0 is the plain norm of McCandlish et al. (2018), p = 1
that of Pollux, p = 1/2 the one in which Adam descends. Small v are damped, as Adam's epsilon would.
A gate must be neither inert (above its threshold from the start) nor blind (below it to the end).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.convergence.cache import Run
from benchmarks.convergence.train import Rival, trainer_of
from benchmarks.convergence.workloads import WORKLOADS, Batch

POWERS = (0.0, 0.5, 1.0)
POINTS = 10
DRAWN = 16  # micro-batches at each point
OTHER_SEED = 10_000  # added to the run's: of the data that is drawn
DAMPING = 1e-2  # of the root mean square of sqrt(v) in a tensor


@dataclass(frozen=True)
class Fractions:
    """The noise at one point of a run.

    Attributes:
        share: of the run that is over.
        decay: the peak of the schedule over its value.
        window: the micro-batches in a window there.
        fractions: f of one micro-batch, in the norm of each of POWERS.
    """

    share: float
    decay: float
    window: int
    fractions: tuple[float, ...]


def along(run: Run) -> Iterator[Fractions]:
    """Do a rival's run, and look at its noise at POINTS of it."""
    workload = WORKLOADS[run.workload]
    data = workload.load(run.split)
    torch.manual_seed(run.seed)
    model = workload.build()
    trainer = trainer_of(run, model, workload)
    assert isinstance(trainer, Rival)
    drawn = data.batches(run.seed + OTHER_SEED)
    total = workload.micro_batches
    for done, batch in enumerate(data.batches(run.seed), start=1):
        trainer.feed(batch, run.config["lr"] * workload.schedule(done - 1))
        if done % (total // POINTS) == 0 and trainer.updates > 0:
            grads = [gradient(model, next(drawn)) for _ in range(DRAWN)]
            moments = [trainer.optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]
            fractions = tuple(noise_fraction(grads, weights(moments, p)) for p in POWERS)
            yield Fractions(
                done / total, 1 / workload.schedule(done - 1), trainer.window, fractions
            )


def gradient(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Of a micro-batch's mean loss. What the open window has summed up is left alone."""
    return list(torch.autograd.grad(model(*batch), list(model.parameters())))


def weights(moments: list[Tensor], power: float) -> list[Tensor]:
    """(sqrt(v) + damping)^(-2 p) for each coordinate."""
    roots = [moment.sqrt() for moment in moments]
    return [(root + DAMPING * root.square().mean().sqrt()).pow(-2 * power) for root in roots]


def noise_fraction(grads: list[list[Tensor]], by: list[Tensor]) -> float:
    """f = noise / (signal + noise) of one gradient, both unbiased; by chance above 1.

    Args:
        grads: K of them, each a list of the model's tensors.
        by: the weight of each coordinate.
    """
    means = [torch.stack(parts).mean(0) for parts in zip(*grads, strict=True)]
    small = math.fsum(weighted_square(grad, by) for grad in grads) / len(grads)
    noise = (small - weighted_square(means, by)) * len(grads) / (len(grads) - 1)
    return noise / small


def weighted_square(tensors: list[Tensor], by: list[Tensor]) -> float:
    return math.fsum(
        float((weight * tensor.square()).sum(dtype=torch.float64))
        for tensor, weight in zip(tensors, by, strict=True)
    )


def in_window(fraction: float, window: int) -> float:
    """The noise fraction of the mean of so many micro-batches."""
    return fraction / (fraction + window * (1 - fraction)) if fraction < 1 else 1.0


def markdown(workload: str, rows: list[Fractions]) -> str:
    """A table: the fraction in one micro-batch, and in the window that Seesaw has there."""
    lines = [
        f"## {workload}",
        "",
        "| of the run | rate fell to 1/ | window | "
        + " | ".join(f"p = {p:g}" for p in POWERS)
        + " |",
        "| ---: | ---: | ---: | " + " | ".join("---:" for _ in POWERS) + " |",
    ]
    for row in rows:
        cells = [f"{f:.2f} ({in_window(f, row.window):.2f})" for f in row.fractions]
        lines.append(
            f"| {row.share:.0%} | {row.decay:.2f} | {row.window} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)
