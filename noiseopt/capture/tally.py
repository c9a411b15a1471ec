"""What a window keeps of each micro-batch: its norms, its samples, its weight.

On the CPU these are plain numbers: an operation on a tensor takes longer than all that is to be
done with them. Elsewhere they stay on the device, so that nothing waits for it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from noiseopt.capture.norms import plain_norms, squared_norms, sum_dtype
from noiseopt.capture.row import Measured
from noiseopt.capture.sharding import Share

Groups = Sequence[Sequence[Tensor]]


class Tally(ABC):
    """The numbers of a window of gradients that pass one at a time.

    Args:
        grads_are_sums: whether gradients come as sums of weight w_i, and not as means to be
            weighted so.
        share: how this rank's part of a gradient counts in the sum over ranks, if it is a part.
    """

    def __init__(self, grads_are_sums: bool, share: Share | None) -> None:
        self._grads_are_sums, self._share = grads_are_sums, share
        self.clear()

    def clear(self) -> None:
        """Start the next window."""
        self._unit = 1.0
        self._norms: list[Any] = []
        self._samples: list[float] = []
        self._weights: list[float] = []
        self._finite: list[Tensor | bool] = []

    def __len__(self) -> int:
        """How many micro-batches were counted, those left out included."""
        return len(self._samples)

    @property
    def passed_over(self) -> int:
        """How many micro-batches there are whose gradients are still to come."""
        return len(self) - len(self._norms)

    @property
    def newest_weight(self) -> float:
        """The newest micro-batch's weight in the sum."""
        return self._weights[-1] / self._unit

    def weigh_by(self, unit: float) -> None:
        """Divide all weights by this, so that sums stay in the range of the gradients."""
        self._unit = unit

    def count(self, samples: float, weight: float, finite: Tensor | bool = True) -> None:
        """Count a micro-batch, whose norms may be still to come.

        Args:
            samples: n_i.
            weight: w_i.
            finite: whether it is in the sum, rather than left out.
        """
        self._samples.append(samples)
        self._weights.append(weight)
        self._finite.append(finite)

    def add_norms(self, norms: Iterable[Any]) -> None:
        """Keep the squared norms of micro-batches that were counted, each as `norms_of` has it."""
        self._norms += norms

    @abstractmethod
    def norms_of(self, grads: Groups) -> Any:
        """|g|^2 of each group."""

    @abstractmethod
    def is_finite(self, norms: Any) -> Tensor | bool:
        """Whether all of them are."""

    @abstractmethod
    def read(self, norms: Tensor) -> Sequence[Any]:
        """Norms of several micro-batches, shape (number, groups), each as `norms_of` has it."""

    @abstractmethod
    def add_group(self) -> None:
        """Count one more parameter group as without gradient so far."""

    @abstractmethod
    def scale(self) -> Any:
        """What makes the mean of the weighted sum; not finite where nothing was summed."""

    @abstractmethod
    def unless_empty(self, big: Any) -> Any:
        """The squared norms of a mean; nan where nothing was summed."""

    @abstractmethod
    def measured(self, big: Any, big_is_of_sum: bool = False) -> Measured:
        """The whole window.

        Args:
            big: the squared norms of its mean, or of the sum that is to become that.
            big_is_of_sum: whether they are the sum's.
        """


class _HostTally(Tally):
    """Plain numbers."""

    def norms_of(self, grads: Groups) -> list[float]:
        if self._share is None:
            return plain_norms(grads)
        norms: list[float] = squared_norms(grads, torch.device("cpu"), self._share).tolist()
        return norms

    def is_finite(self, norms: Sequence[float]) -> bool:
        return math.isfinite(sum(norms))

    def read(self, norms: Tensor) -> list[list[float]]:
        rows: list[list[float]] = norms.tolist()
        return rows

    def add_group(self) -> None:
        self._norms = [[*norms, 0.0] for norms in self._norms]

    def scale(self) -> float:
        total = sum(self._used())
        return 1 / total if total > 0 else math.nan

    def unless_empty(self, big: Sequence[float]) -> Sequence[float]:
        return big if any(self._used()) else [math.nan] * len(big)

    def measured(self, big: Sequence[float], big_is_of_sum: bool = False) -> Measured:
        weights, small, scale = self._used(), self._norms, None
        if big_is_of_sum:
            scale = self.scale()
            big = [norm * scale * scale for norm in big]
        if self._grads_are_sums:
            pairs = zip(small, self._weights, strict=True)
            small = [[norm / weight / weight for norm in norms] for norms, weight in pairs]
        return Measured(small, big, self._samples, weights, scale)

    def _used(self) -> list[float]:
        """w_i, with 0 for what was left out."""
        pairs = zip(self._weights, self._finite, strict=True)
        return [weight / self._unit if finite else 0.0 for weight, finite in pairs]


class _DeviceTally(Tally):
    """Tensors on a device."""

    def __init__(self, grads_are_sums: bool, share: Share | None, device: torch.device) -> None:
        super().__init__(grads_are_sums, share)
        self._device = device

    def norms_of(self, grads: Groups) -> Tensor:
        return squared_norms(grads, self._device, self._share)

    def is_finite(self, norms: Tensor) -> Tensor:
        return norms.sum().isfinite()

    def read(self, norms: Tensor) -> Sequence[Tensor]:
        return norms.unbind()

    def add_group(self) -> None:
        self._norms = [torch.cat([norms, norms.new_zeros(1)]) for norms in self._norms]

    def scale(self) -> Tensor:
        return 1 / self._used().sum()

    def unless_empty(self, big: Tensor) -> Tensor:
        return big + 0 / self._used().sum()

    def measured(self, big: Tensor, big_is_of_sum: bool = False) -> Measured:
        weights, scale = self._used(), None
        if big_is_of_sum:
            total = weights.sum()
            big, scale = big / total.square(), 1 / total
        small = torch.stack(self._norms) if self._norms else big.new_zeros(0, len(big))
        if self._grads_are_sums:
            small = small / self._each(self._weights).square()[:, None]
        return Measured(small, big, self._each(self._samples), weights, scale)

    def _used(self) -> Tensor:
        """w_i, with 0 for what was left out; made on the device, without a copy."""
        weights = self._each([weight / self._unit for weight in self._weights])
        if all(finite is True for finite in self._finite):
            return weights
        return weights * self._each(self._finite)

    def _each(self, values: Sequence[Tensor | float]) -> Tensor:
        """One value of each micro-batch; shape (K,)."""
        first = values[0] if values else 0.0
        if not isinstance(first, Tensor) and values.count(first) == len(values):
            return self._full(len(values), first)
        return torch.cat([self._full(1, value) for value in values])

    def _full(self, number: int, value: Tensor | float) -> Tensor:
        dtype = sum_dtype(self._device)
        if isinstance(value, Tensor):
            return value.to(dtype).expand(number)
        return torch.full((number,), value, dtype=dtype, device=self._device)


def tally_on(device: torch.device, grads_are_sums: bool, share: Share | None) -> Tally:
    """An empty window's, for gradients on a device."""
    if device.type == "cpu":
        return _HostTally(grads_are_sums, share)
    return _DeviceTally(grads_are_sums, share, device)
