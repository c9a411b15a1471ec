"""Hooks that stand only while they are wanted, since autograd's calling them costs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Put = Callable[[], Sequence[Any]]


class Hooks:
    """Hooks that are put up and taken down together."""

    def __init__(self) -> None:
        self._puts: list[Put] = []
        self._handles: list[Any] = []
        self._standing = True

    def add(self, put: Put) -> None:
        """Add what registers some hooks and returns their handles."""
        self._puts.append(put)
        if self._standing:
            self._handles += put()

    def stand(self, wanted: bool) -> None:
        """Have them up, or not."""
        if wanted == self._standing:
            return
        self._standing = wanted
        if wanted:
            self._handles = [handle for put in self._puts for handle in put()]
        else:
            self._take_down()

    def renew(self) -> None:
        """Put them up again, behind those that others have added since."""
        if self._standing:
            self.stand(False)
            self.stand(True)

    def remove(self) -> None:
        """Take them down for good."""
        self._puts.clear()
        self._take_down()

    def _take_down(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


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
