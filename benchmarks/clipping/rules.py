"""The rivals: rules that clip gradients in place, as published, with the published settings.

Each is given the gradients of an update, which the loop has averaged over its window, and makes
them smaller or leaves them. What is not finite is treated as the formulas would treat it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Grads = list[Tensor]


class Rule(Protocol):
    """A rule that clips."""

    def clip_(self, grads: Grads) -> None:
        """Clip an update's gradients in place."""


def norm_of(grads: Grads) -> float:
    """The norm of all gradients together."""
    return torch.stack(torch._foreach_norm(grads)).double().square().sum().sqrt().item()


def shrink_(grads: Grads, norm: float, max_norm: float) -> None:
    """Multiply by max_norm / norm, unless the norm is below; nan spreads, as in arithmetic."""
    if not norm <= max_norm:
        torch._foreach_mul_(grads, max_norm / norm)


@dataclass
class NoClipping:
    """Leaves gradients as they are."""

    def clip_(self, grads: Grads) -> None:
        """Nothing is done."""


@dataclass
class Fixed:
    """Clips at a fixed norm: Pascanu et al. 2013; 1.0 is customary for language models."""

    max_norm: float = 1.0

    def clip_(self, grads: Grads) -> None:
        shrink_(grads, norm_of(grads), self.max_norm)


@dataclass
class AutoClip:
    """Clips at a percentile of all norms so far, this one included: Seetharaman et al. 2020."""

    percentile: float = 10.0
    _norms: list[float] = field(default_factory=list)

    def clip_(self, grads: Grads) -> None:
        norm = norm_of(grads)
        self._norms.append(norm)
        shrink_(grads, norm, float(np.percentile(self._norms, self.percentile)))


@dataclass
class ZClip:
    """Clips by the z-score of the norm: Kumar et al., arXiv 2504.02507.

    mu and sigma^2 start as the mean and variance of the first 25 norms and are averaged by
    alpha = 0.97. Where z = (|g| - mu) / sigma exceeds 2.5, the norm becomes mu + 2.5^2 sigma / z,
    and it is this norm that they learn from. A fixed ceiling of 1 holds besides, by default.
    """

    max_norm: float = 1.0
    alpha: float = 0.97
    z: float = 2.5
    warm_up: int = 25
    epsilon: float = 1e-6
    _first: list[float] = field(default_factory=list)
    _mean: float = 0.0
    _variance: float = 0.0

    def clip_(self, grads: Grads) -> None:
        norm = norm_of(grads)
        shrink_(grads, norm, min(self._learn(norm), self.max_norm))

    def _learn(self, norm: float) -> float:
        """The norm at which the statistics alone would have it clipped."""
        if len(self._first) < self.warm_up:
            self._first.append(norm)
            self._mean, self._variance = float(np.mean(self._first)), float(np.var(self._first))
            return math.inf
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / (deviation + self.epsilon)
        limit = self._mean + self.z**2 * deviation / z if z > self.z else math.inf
        self._average(norm if limit == math.inf else limit)
        return limit

    def _average(self, norm: float) -> None:
        self._mean = self.alpha * self._mean + (1 - self.alpha) * norm
        spread = (norm - self._mean) ** 2
        self._variance = self.alpha * self._variance + (1 - self.alpha) * spread


@dataclass
class AdaGC:
    """Clips each tensor at 1.05 times its own average norm: Wang et al., arXiv 2502.11034.

    gamma averages the clipped norms by beta = 0.98. In the first 100 updates the whole gradient is
    clipped at 1 and gamma is the least norm that a tensor had.
    """

    max_norm: float = 1.0
    beta: float = 0.98
    relative: float = 1.05
    warm_up: int = 100
    _seen: int = 0
    _gammas: list[float] = field(default_factory=list)

    def clip_(self, grads: Grads) -> None:
        self._gammas = self._gammas or [math.inf] * len(grads)
        self._seen += 1
        if self._seen <= self.warm_up:
            shrink_(grads, norm_of(grads), self.max_norm)
            least = zip(self._gammas, grads, strict=True)
            self._gammas = [min(gamma, norm_of([grad])) for gamma, grad in least]
            return
        norms = [norm.item() for norm in torch._foreach_norm(grads)]
        for index, (grad, norm) in enumerate(zip(grads, norms, strict=True)):
            limit = self.relative * self._gammas[index]
            shrink_([grad], norm, limit)
            clipped = limit if norm > limit else norm
            self._gammas[index] = self.beta * self._gammas[index] + (1 - self.beta) * clipped


RULES: dict[str, Callable[[], Rule]] = {
    "none": NoClipping,
    "fixed 1.0": Fixed,
    "autoclip": AutoClip,
    "zclip": ZClip,
    "zclip, no ceiling": lambda: ZClip(max_norm=math.inf),
    "adagc": AdaGC,
}
