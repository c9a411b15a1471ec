"""A window's mean gradient, and where a rival needs it, the spread of the parts that it is made of.

A rival on one process has no ranks whose gradients differ. In their place the window is cut into at
least so many equal parts, each with a backward of its own; the mean is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.convergence.workloads import Batch
from noiseopt.estimate import WindowNorms


@dataclass(frozen=True)
class Spread:
    """The gradients of a window's parts, in numbers. Each part has as many samples.

    Attributes:
        count: R, the number of parts.
        batch: B, the samples of all.
        small_sq: the mean over the parts of |g_j|^2.
        big_sq: |g|^2 of the mean gradient.
        deviation_l1: the sum over coordinates of sigma_i, the deviation of one sample's gradient.
        big_l1: the sum of |g_i|.
    """

    count: int
    batch: int
    small_sq: float
    big_sq: float
    deviation_l1: float
    big_l1: float

    @property
    def trace(self) -> float:
        """tr(Sigma) of one sample, unbiased."""
        return self.batch / (self.count - 1) * (self.small_sq - self.big_sq)

    def norms(self, samples: int) -> WindowNorms:
        """For our estimator; `samples` have passed since the last."""
        part = self.batch / self.count
        small, big = (self.small_sq,), (self.big_sq,)
        return WindowNorms(small, big, part, self.batch, self.count, samples)


class WindowGradient:
    """Sums the gradients of a window of micro-batches in `p.grad`, as their mean.

    Args:
        model: returns the mean loss of a batch.
        steps: micro-batches in the window.
        parts: into how many it is cut at least, where the spread is wanted; 0 where not.
    """

    def __init__(self, model: nn.Module, steps: int, parts: int = 0) -> None:
        self._model, self._steps, self._parts = model, steps, parts
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._count, self._batch = 0, 0
        self._small_sq = 0.0
        self._squares = [torch.zeros_like(p) for p in self._params] if parts else []

    def add(self, batch: Batch) -> Tensor:
        """Take in a micro-batch; returns its mean loss."""
        if not self._parts:
            loss: Tensor = self._model(*batch)
            (loss / self._steps).backward()
            return loss.detach()
        pieces = list(self._pieces(batch))
        losses = [self._add_part(piece, len(pieces)) for piece in pieces]
        return torch.stack(losses).mean()

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        """Cut a micro-batch by the smallest power of two that makes parts enough."""
        samples, number = len(batch[0]), 1
        while self._steps * number < self._parts and samples % (2 * number) == 0:
            number *= 2
        self._batch += samples
        return zip(*(part.chunk(number) for part in batch), strict=True)

    def _add_part(self, part: Batch, number: int) -> Tensor:
        loss: Tensor = self._model(*part)
        grads = torch.autograd.grad(loss, self._params)
        self._count += 1
        self._small_sq += squared_norm(grads)
        torch._foreach_addcmul_(self._squares, grads, grads)
        share = 1 / (self._steps * number)
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad * share if param.grad is None else param.grad.add_(grad, alpha=share)
        return loss.detach()

    def spread(self) -> Spread:
        """What the parts say, when all have been taken in and nothing was clipped yet."""
        means = [p.grad for p in self._params if p.grad is not None]
        count, batch = self._count, self._batch
        deviations = (
            ((square / count - mean.square()) * (batch / (count - 1))).clamp_(min=0).sqrt_().sum()
            for square, mean in zip(self._squares, means, strict=True)
        )
        return Spread(
            count=count,
            batch=batch,
            small_sq=self._small_sq / count,
            big_sq=squared_norm(means),
            deviation_l1=float(torch.stack(list(deviations)).sum()),
            big_l1=float(sum(mean.abs().sum() for mean in means)),
        )


def squared_norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> float:
    """The sum of squares of all elements."""
    return float(torch.stack(torch._foreach_norm(tensors)).square().sum())
