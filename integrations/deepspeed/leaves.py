"""What each call of `engine.backward` brings on this rank, before anything is reduced.

A hook on each parameter sees the full-shape local gradient at every ZeRO stage; a hook on the loss
sees the factor that the engine puts on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from noiseopt.capture.edits import Edits
from noiseopt.capture.hooks import Hooks, taking_hooks, weakly
from noiseopt.capture.norms import Begun, begun_norm, joined_norm, moved, unknown_norms


class LeafNorms:
    """The squared norms of the open window's micro-batches.

    Args:
        groups: the parameters of each group.
        device: where norms are kept.
        spent: whether what a backward leaves in `param.grad` is of no effect any more.

    Attributes:
        norms: |f_i g_i|^2 of each backward, shape (groups,).
        factors: f_i of each backward, 0-d.
        strays: whether gradients came outside of `reading`, as by a direct `loss.backward()`.
        unread: whether a gradient came in parts, whose norms do not add, or past its hook.
        edited: whether a hook of the loop's changed a gradient after it was read.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], device: torch.device, spent: bool = False
    ) -> None:
        self._device = device
        self.spent = spent
        self._num_groups = len(groups)
        self._params = [param for params in groups for param in params]
        self._inside = self._reads = False
        self._listens = True
        self._arrived: dict[Tensor, tuple[int, Begun]] = {}
        self.norms: list[Tensor] = []
        self.factors: list[Tensor] = []
        self.strays = self.unread = self.edited = False
        self._hooks, self._edits = Hooks(), Edits()
        self._unwatched = [(p, index) for index, params in enumerate(groups) for p in params]
        self._watch_unfrozen()

    def __len__(self) -> int:
        """How many backward passes the open window has had."""
        return len(self.norms)

    @contextmanager
    def reading(self, loss: Any, measured: bool = True) -> Iterator[None]:
        """Read what the backward of this loss brings.

        Args:
            loss: the loss.
            measured: whether the norm is wanted; if not, it is nan.
        """
        factors: list[Tensor] = []
        handle = loss.register_hook(lambda grad: factors.append(grad.detach()))
        self._watch_unfrozen()
        if measured:
            self._hooks.come_last()
        self._arrived.clear()
        self._inside, self._reads = True, measured
        try:
            yield
        finally:
            handle.remove()
            self._inside = self._reads = False
            self.edited |= self._edits.found()
        norms = unknown_norms(self._num_groups, self._device)
        if measured:
            norms = torch.stack([self._joined(index) for index in range(self._num_groups)])
        self.norms.append(norms)
        self.factors.append(moved(factors[0].reshape(()), norms.device, norms.dtype))
        self._arrived.clear()

    def held(self) -> int:
        """How many parameters hold a gradient that counts."""
        return 0 if self.spent else sum(param.grad is not None for param in self._params)

    def holds_any(self) -> bool:
        """Whether a window to be measured would begin with gradients that are not zero."""
        if self.spent or not self._listens:
            return False
        grads = [grad for param in self._params if (grad := param.grad) is not None]
        return any(bool(grad.norm() != 0) for grad in grads)

    def marks(self) -> Sequence[tuple[int, ...]]:
        """What changes as soon as a gradient is edited; empty where that makes no difference."""
        if self.spent or not self._listens:
            return ()
        grads = [grad for param in self._params if (grad := param.grad) is not None]
        return [(id(grad), grad._version, _address(grad)) for grad in grads]

    def clear(self) -> None:
        """Start the next window."""
        self.norms, self.factors = [], []
        self.strays = self.unread = self.edited = False

    def listen(self, wanted: bool) -> None:
        """Say whether the open window is measured, so that edits of gradients and strays matter."""
        self._listens = wanted

    def detach(self) -> None:
        """Remove the hooks."""
        self._hooks.remove()
        self._edits.hooks.remove()

    def _watch_unfrozen(self) -> None:
        """Watch what was frozen until now; ZeRO leaves what is frozen at first as it is."""
        for param, group in self._unwatched:
            if param.requires_grad:
                self._hooks.add(partial(self._hook, param, group))
        self._unwatched = [pair for pair in self._unwatched if not pair[0].requires_grad]

    def _hook(self, param: Any, group: int) -> Sequence[Any]:
        with taking_hooks(param):
            reader = param.register_hook(self._reader(param, group))
            return reader, param.register_post_accumulate_grad_hook(weakly(self._confirm))

    def _reader(self, param: Tensor, group: int) -> Callable[[Tensor], None]:
        def read(grad: Tensor) -> None:
            if not self._reads:
                if self._listens and not self._inside:
                    self.strays = True
                return
            # In two parts it comes where a parameter is used inside and outside of a reentrant
            # checkpoint.
            self.unread |= param in self._arrived
            self._arrived[param] = group, begun_norm(grad)
            self._edits.watch(param)

        return read

    def _confirm(self, param: Tensor) -> None:
        """After accumulation: torch 2.6 loses the hook of a custom function in a checkpoint."""
        if self._reads and param not in self._arrived:
            self.unread = True

    def _joined(self, group: int) -> Tensor:
        begun = [norm for index, norm in self._arrived.values() if index == group]
        return joined_norm(begun, self._device)


def _address(grad: Tensor) -> int:
    return grad.data_ptr() if grad.layout == torch.strided else 0  # sparse ones have none
