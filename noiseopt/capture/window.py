"""A window of micro-batch gradients that pass one at a time: their norms, and their running sum.

The sum lives in a buffer of its own, in fp32 or wider, so that nothing a training loop does to
`p.grad` between micro-batches can touch what is already summed. A window of one has no buffer.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from noiseopt.capture.norms import squared_norms
from noiseopt.capture.row import Measured

_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
Groups = Sequence[Sequence[Tensor]]
Pairs = Sequence[tuple[Tensor, Tensor]]


class GradientWindow:
    """The open window of an optimizer that accumulates by itself.

    Args:
        device: where the norms are kept.
        skip_nonfinite: leave micro-batches whose gradient is not finite out of the mean.
    """

    def __init__(self, device: torch.device, skip_nonfinite: bool) -> None:
        self._device = device
        self._skip_nonfinite = skip_nonfinite
        self._norms: list[Tensor] = []
        self._samples: list[float] = []
        self._finite: list[Tensor | bool] = []
        self._sums: dict[Tensor, Tensor] = {}
        self._summed: set[Tensor] = set()

    def __len__(self) -> int:
        """How many micro-batches were taken, the skipped ones included."""
        return len(self._norms)

    @property
    def nbytes(self) -> int:
        """The memory that the sum holds."""
        return sum(buffer.nbytes for buffer in self._sums.values())

    def take(self, groups: Groups, samples: float, closes: bool) -> Measured | None:
        """Take the micro-batch gradient that is in `p.grad`.

        Args:
            groups: the parameters of each group.
            samples: n_i, the micro-batch's weight in the mean.
            closes: whether it is the window's last.

        Returns:
            None while the window stays open. At its end `p.grad` holds the weighted sum, and what
            is left to do is to multiply it by the returned `scale`.
        """
        grads = _grads(groups)
        norms = squared_norms(grads, self._device)
        finite = self._judge(norms, grads, closes)
        self._norms.append(norms)
        self._samples.append(samples)
        self._finite.append(finite)
        if not closes:
            if finite is not False:
                self._add(_pairs(groups))
            return None
        if len(self) == 1:
            return Measured(norms[None], norms, *self._weights(), None)
        if finite is False:
            return self.flush(groups)
        if _is_narrow(groups):
            self._add(_pairs(groups))
            return self.flush(groups)
        self._merge(_pairs(groups))
        return self._measured_sum(groups)

    def flush(self, groups: Groups) -> Measured:
        """End the window with what was taken so far, leaving its sum in `p.grad`."""
        if not _is_narrow(groups):
            self._restore(groups)
            return self._measured_sum(groups)
        # A narrow type may not hold the sum: made the mean while it is wide, it is rounded once.
        samples, weights = self._weights()
        total = weights.sum()
        scale_all([self._sums[param] for param in self._summed], 1 / total)
        self._restore(groups)
        big = squared_norms(_grads(groups), self._device) + 0 / total  # nan where nothing was left
        return Measured(torch.stack(self._norms), big, samples, weights, None)

    def add_group(self) -> None:
        """Count one more parameter group as without gradient in the window so far."""
        self._norms = [torch.cat([norms, norms.new_zeros(1)]) for norms in self._norms]

    def clear(self, keep_memory: bool) -> None:
        """Start the next window."""
        self._norms, self._samples, self._finite = [], [], []
        self._summed.clear()
        if not keep_memory:
            self._sums.clear()

    def _judge(self, norms: Tensor, grads: Groups, closes: bool) -> Tensor | bool:
        """Whether the micro-batch is finite: a bool on the CPU, elsewhere known to the device only.

        There what is not finite is zeroed instead, so that it adds nothing to the sum; alone in
        its window it is left to the kernel's `found_inf`.
        """
        if not self._skip_nonfinite:
            return True
        if self._device.type == "cpu":
            return math.isfinite(norms.sum().item())
        finite = norms.sum().isfinite()
        if len(self) > 0 or not closes:
            lost = ~finite
            for grad in (grad for group in grads for grad in group):
                grad.masked_fill_(lost.to(grad.device), 0)
        return finite

    def _add(self, pairs: Pairs) -> None:
        """Add the newest micro-batch's gradients to the sum, by their weight."""
        weight = self._newest_weight
        first: list[tuple[Tensor, Tensor]] = []
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in pairs:
            if param not in self._summed:
                first.append((param, grad))
            elif grad.layout == torch.strided:
                sums.append(self._sums[param])
                grads.append(grad)
            else:
                self._sums[param] = self._sums[param] + weight * grad
        if sums:
            torch._foreach_add_(sums, grads, alpha=weight)
        if first:
            self._start(first, weight)

    def _start(self, pairs: Pairs, weight: float) -> None:
        """Begin the sums of parameters that have none yet in this window."""
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in pairs:
            if param in self._sums and grad.layout == torch.strided:
                sums.append(self._sums[param])
                grads.append(grad)
            else:
                wide = _WIDE.get(grad.dtype, grad.dtype)
                self._sums[param] = grad.detach().to(wide, copy=True)
        if sums:
            torch._foreach_copy_(sums, grads)
        if weight != 1:
            torch._foreach_mul_([self._sums[param] for param, _ in pairs], weight)
        self._summed.update(param for param, _ in pairs)

    def _merge(self, pairs: Pairs) -> None:
        """Leave the sum in `p.grad`, to which the newest micro-batch is added here."""
        weight = self._newest_weight
        if weight != 1:
            torch._foreach_mul_([grad for _, grad in pairs], weight)
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in pairs:
            if param not in self._summed:
                continue
            total = self._sums[param]
            if grad.layout == torch.strided:
                sums.append(total)
                grads.append(grad)
            else:
                param.grad = total + grad
        if grads:
            torch._foreach_add_(grads, sums)
        self._hand_over(self._summed.difference(param for param, _ in pairs))

    def _restore(self, groups: Groups) -> None:
        """Leave the sum in `p.grad` in place of whatever is there."""
        left = set(self._summed)
        for param in (param for group in groups for param in group):
            if param not in left:
                param.grad = None
            elif param.grad is not None and param.grad.layout == torch.strided:
                param.grad.copy_(self._sums[param])
                left.discard(param)
        self._hand_over(left)

    def _hand_over(self, params: Iterable[Tensor]) -> None:
        """Give sums away to parameters that have no gradient to hold them."""
        for param in params:
            param.grad = self._sums.pop(param).to(param.dtype)

    @property
    def _newest_weight(self) -> float:
        return self._samples[-1] / self._samples[0]

    def _measured_sum(self, groups: Groups) -> Measured:
        samples, weights = self._weights()
        total = weights.sum()
        big = squared_norms(_grads(groups), self._device) / total.square()
        return Measured(torch.stack(self._norms), big, samples, weights, 1 / total)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """n_i, and n_i / n_1 with 0 for what was left out; made on the device, without a copy."""
        like, first = self._norms[0], self._samples[0]
        if self._samples.count(first) == len(self):
            samples = like.new_full((len(self),), first)
            weights = torch.ones_like(samples)
        else:
            samples = torch.stack([like.new_full((), value) for value in self._samples])
            weights = samples / samples[0]
        if all(flag is True for flag in self._finite):
            return samples, weights
        finite = [
            flag if isinstance(flag, Tensor) else like.new_full((), flag, dtype=torch.bool)
            for flag in self._finite
        ]
        return samples, weights * torch.stack(finite)


def scale_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place, dense or sparse, on any devices.

    Args:
        tensors: what to scale.
        factor: 0-d. Elsewhere than on the CPU nothing waits for it, unless a tensor is sparse.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layout == torch.strided:
            by_kind[tensor.device, torch.promote_types(tensor.dtype, torch.float32)].append(tensor)
        else:
            tensor.mul_(float(factor))
    for (device, dtype), dense in by_kind.items():
        if device.type == "cpu":
            torch._foreach_mul_(dense, float(factor))
        else:
            torch._foreach_mul_(dense, factor.to(device, dtype, non_blocking=True))


def _is_narrow(groups: Groups) -> bool:
    return any(param.dtype in _WIDE for group in groups for param in group)


def _pairs(groups: Groups) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have a gradient, each with it."""
    return [(p, grad) for group in groups for p in group if (grad := p.grad) is not None]


def _grads(groups: Groups) -> list[list[Tensor]]:
    return [[grad for p in group if (grad := p.grad) is not None] for group in groups]
