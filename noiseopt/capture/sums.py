"""Running sums of gradients, in fp32 or wider, apart from `p.grad`, which stays the loop's own."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from noiseopt.capture.norms import moved
from noiseopt.capture.sharding import local, whole

_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
Groups = Sequence[Sequence[Tensor]]
Pairs = Sequence[tuple[Tensor, Tensor]]


class GradientSums:
    """A sum for each parameter that has had a gradient in the open window."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._summed: set[Tensor] = set()

    def __len__(self) -> int:
        """How many parameters have one."""
        return len(self._summed)

    @property
    def nbytes(self) -> int:
        """The memory that is held."""
        return sum(buffer.nbytes for buffer in self._sums.values())

    @property
    def totals(self) -> dict[Tensor, Tensor]:
        """The sums themselves."""
        return {param: self._sums[param] for param in self._summed}

    def clear(self, keep_memory: bool) -> None:
        """Start anew."""
        self._summed.clear()
        if not keep_memory:
            self._sums.clear()

    def add(self, pairs: Pairs, weight: float) -> None:
        """Add gradients, each times the weight."""
        first: list[tuple[Tensor, Tensor]] = []
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in pairs:
            if param not in self._summed:
                first.append((param, grad))
            elif _is_dense(grad, self._sums[param]):
                sums.append(self._sums[param])
                grads.append(grad)
            else:
                self._sums[param] = _added(self._sums[param], weight * grad)
        if sums:
            torch._foreach_add_(sums, grads, alpha=weight)
        if first:
            self._start(first, weight)

    def _start(self, pairs: Pairs, weight: float) -> None:
        """Begin the sums of parameters that have none yet in this window."""
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in pairs:
            kept = self._sums.get(param)
            if kept is not None and _is_dense(grad, kept):
                sums.append(kept)
                grads.append(grad)
            else:
                wide = wide_type(grad)
                self._sums[param] = grad.detach().to(wide, copy=True)
        if sums:
            torch._foreach_copy_(sums, grads)
        if weight != 1 and pairs:
            torch._foreach_mul_([self._sums[param] for param, _ in pairs], weight)
        self._summed.update(param for param, _ in pairs)

    def merge(self, pairs: Pairs, weight: float) -> None:
        """Add the last gradients, which are `p.grad`, and leave the sums there."""
        if weight != 1 and pairs:
            torch._foreach_mul_([grad for _, grad in pairs], weight)
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in pairs:
            if param not in self._summed:
                continue
            total = self._sums[param]
            if _is_dense(grad, total):
                sums.append(total)
                grads.append(grad)
            else:
                param.grad = _added(total, grad)
        if grads:
            torch._foreach_add_(grads, sums)
        self._hand_over(self._summed.difference(param for param, _ in pairs))

    def restore(self, groups: Groups) -> None:
        """Leave the sums in `p.grad`, in place of whatever is there."""
        left = set(self._summed)
        for param in (param for group in groups for param in group):
            if param not in left:
                param.grad = None
            elif param.grad is not None and _is_dense(param.grad, self._sums[param]):
                local(param.grad).copy_(self._sums[param])
                left.discard(param)
        self._hand_over(left)

    def _hand_over(self, params: Iterable[Tensor]) -> None:
        """Give sums away to parameters that have no gradient to hold them."""
        for param in params:
            param.grad = whole(self._sums.pop(param).to(param.dtype), param)


def _is_dense(*tensors: Tensor) -> bool:
    return all(tensor.layout == torch.strided for tensor in tensors)


def _added(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two of which one may be sparse, which torch has only if that is the second."""
    return one + other if _is_dense(one) or not _is_dense(other) else other + one


def wide_type(param: Tensor) -> torch.dtype:
    """The type in which a parameter's gradients are summed."""
    return _WIDE.get(param.dtype, param.dtype)


def scale_all(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors in place, dense or sparse, on any devices.

    Args:
        tensors: what to scale.
        factor: a number, or 0-d. Elsewhere than on the CPU nothing waits for it, unless a tensor
            is sparse.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in map(local, tensors):
        if tensor.layout == torch.strided:
            tensor = tensor.conj() if tensor.is_conj() else tensor  # the same memory
            by_kind[tensor.device, torch.promote_types(tensor.dtype, torch.float32)].append(tensor)
        else:
            tensor.mul_(float(factor))
    for (device, dtype), dense in by_kind.items():
        if device.type == "cpu" or not isinstance(factor, Tensor):
            torch._foreach_mul_(dense, float(factor))
        else:
            torch._foreach_mul_(dense, moved(factor, device, dtype))


def is_narrow(groups: Groups) -> bool:
    """Whether some parameter's type is too narrow to hold a sum of its gradients."""
    return any(param.dtype in _WIDE for group in groups for param in group)


def pairs_of(groups: Groups) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have a gradient, each with the part of it that is held here.

    Conjugated ones are written out as they read: kernels that work in place ask for that.
    """
    for param in (param for group in groups for param in group):
        if param.is_complex() and param.grad is not None and param.grad.is_conj():
            param.grad = param.grad.resolve_conj()
    return [(p, local(grad)) for group in groups for p in group if (grad := p.grad) is not None]


def grads_of(groups: Groups) -> list[list[Tensor]]:
    """The gradients there are in each group."""
    return [[grad for p in group if (grad := p.grad) is not None] for group in groups]
