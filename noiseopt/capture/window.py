"""A window of micro-batch gradients that pass one at a time: their norms, and their running sum.

The sum lives in a buffer of its own, in fp32 or wider, so that nothing a training loop does to
`p.grad` between micro-batches can touch what is already summed. A window of one has no buffer.
"""

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
        params = [p for group in groups for p in group if p.grad is not None]
        norms = squared_norms(_grads(groups), self._device)
        finite = self._judge(norms, params, closes)
        self._norms.append(norms)
        self._samples.append(samples)
        self._finite.append(finite)
        if not closes:
            if finite is not False:
                self._add(params)
            return None
        if len(self) == 1:
            return self._measured(norms, None)
        if finite is False:
            self._restore(groups)
        else:
            self._merge(params)
        return self._measured_sum(groups)

    def flush(self, groups: Groups) -> Measured:
        """End the window with what was taken so far, leaving its sum in `p.grad`."""
        self._restore(groups)
        return self._measured_sum(groups)

    def clear(self, keep_memory: bool) -> None:
        """Start the next window."""
        self._norms, self._samples, self._finite = [], [], []
        self._summed.clear()
        if not keep_memory:
            self._sums.clear()

    def _judge(self, norms: Tensor, params: Sequence[Tensor], closes: bool) -> Tensor | bool:
        """Whether the micro-batch is finite: a bool on the CPU, elsewhere known to the device only.

        There what is not finite is zeroed instead, so that it adds nothing to the sum; alone in
        its window it is left to the kernel's `found_inf`.
        """
        if not self._skip_nonfinite:
            return True
        finite = norms.sum().isfinite()
        if self._device.type == "cpu":
            return bool(finite)
        if len(self) > 0 or not closes:
            for param in params:
                _grad(param).masked_fill_(~finite.to(param.device), 0)
        return finite

    def _add(self, params: Sequence[Tensor]) -> None:
        """Add the newest micro-batch's gradients to the sum, by their weight."""
        weight = self._newest_weight
        known: list[Tensor] = []
        for param in params:
            if param in self._summed and _is_dense(param):
                known.append(param)
            else:
                self._add_one(param, weight)
        if known:
            sums = [self._sums[param] for param in known]
            torch._foreach_add_(sums, [_grad(param) for param in known], alpha=weight)

    def _add_one(self, param: Tensor, weight: float) -> None:
        grad = _grad(param)
        if param in self._summed:
            self._sums[param] = self._sums[param] + weight * grad
            return
        buffer = self._sums.get(param)
        if buffer is None or not _is_dense(param):
            buffer = grad.detach().to(_WIDE.get(grad.dtype, grad.dtype), copy=True)
            self._sums[param] = buffer
        else:
            buffer.copy_(grad)
        if weight != 1:
            buffer.mul_(weight)
        self._summed.add(param)

    def _merge(self, params: Sequence[Tensor]) -> None:
        """Leave the sum in `p.grad`, to which the newest micro-batch is added here."""
        weight = self._newest_weight
        if weight != 1:
            torch._foreach_mul_([_grad(param) for param in params], weight)
        direct: list[Tensor] = []
        for param in params:
            if param not in self._summed:
                continue
            if not _is_dense(param):
                param.grad = (self._sums[param] + _grad(param)).to(param.dtype)
            elif _grad(param).dtype == self._sums[param].dtype:
                direct.append(param)
            else:
                _grad(param).copy_(self._sums[param].add_(_grad(param)))
        if direct:
            sums = [self._sums[param] for param in direct]
            torch._foreach_add_([_grad(param) for param in direct], sums)
        self._hand_over(self._summed.difference(params))

    def _restore(self, groups: Groups) -> None:
        """Leave the sum in `p.grad` in place of whatever is there."""
        left = set(self._summed)
        for param in (param for group in groups for param in group):
            if param not in left:
                param.grad = None
            elif param.grad is not None and _is_dense(param):
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
        total = self._weights()[1].sum()
        big = squared_norms(_grads(groups), self._device) / total.square()
        return self._measured(big, 1 / total)

    def _measured(self, big: Tensor, scale: Tensor | None) -> Measured:
        samples, weights = self._weights()
        return Measured(torch.stack(self._norms), big, samples, weights, scale)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """n_i, and n_i / n_1 with 0 for what was left out; made on the device, without a copy."""
        like = self._norms[0]
        samples = torch.stack([like.new_full((), value) for value in self._samples])
        finite = [
            flag if isinstance(flag, Tensor) else like.new_full((), flag, dtype=torch.bool)
            for flag in self._finite
        ]
        return samples, samples / samples[0] * torch.stack(finite)


def _grads(groups: Groups) -> list[list[Tensor]]:
    return [[_grad(p) for p in group if p.grad is not None] for group in groups]


def _grad(param: Tensor) -> Tensor:
    if param.grad is None:
        raise RuntimeError("a parameter's gradient vanished inside step()")
    return param.grad


def _is_dense(param: Tensor) -> bool:
    return _grad(param).layout == torch.strided
