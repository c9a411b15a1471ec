"""Hooks on tensors that come behind those of others.

They stay up where nothing is to be read: to put one up takes ten times as long as to be called.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Put = Callable[[], Sequence[Any]]


class Hooks:
    """Hooks that are put up again, and taken down, together."""

    def __init__(self) -> None:
        self._puts: list[Put] = []
        self._handles: list[Any] = []

    def add(self, put: Put) -> None:
        """Add what registers some hooks and returns their handles."""
        self._puts.append(put)
        self._handles += put()

    def come_last(self) -> None:
        """Put them up again if others have been added behind them since."""
        if not all(map(_is_last, self._handles)):
            self._take_down()
            self._handles = [handle for put in self._puts for handle in put()]

    def remove(self) -> None:
        """Take them down for good."""
        self._puts.clear()
        self._take_down()

    def _take_down(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _is_last(handle: Any) -> bool:
    hooks = handle.hooks_dict_ref()
    return hooks is not None and next(reversed(hooks), None) == handle.id


@contextmanager
def taking_hooks(leaf: Tensor) -> Iterator[None]:
    """Have a leaf take hooks even while it is frozen, which autograd refuses. There they stay."""
    frozen = not leaf.requires_grad
    if frozen:
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        if frozen:
            leaf.requires_grad_(False)
