"""Hooks on tensors that come behind those of others.

They stay up where nothing is to be read: to put one up takes ten times as long as to be called.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, ClassVar

from torch import Tensor

Put = Callable[[], Sequence[Any]]


class Hooks:
    """Hooks that are put up again, and taken down, together.

    Behind one another they stay as they are, whoever's they are: they only read.
    """

    _standing: ClassVar[set[int]] = set()  # the ids of all that there are

    def __init__(self) -> None:
        self._puts: list[Put] = []
        self._handles: list[Any] = []

    def add(self, put: Put) -> None:
        """Add what registers some hooks and returns their handles."""
        self._puts.append(put)
        self._put_up([put])

    def come_last(self) -> None:
        """Put them up again if others have been added behind them since."""
        if not all(map(self._is_last, self._handles)):
            self._take_down()
            self._put_up(self._puts)

    def remove(self) -> None:
        """Take them down for good."""
        self._puts.clear()
        self._take_down()

    def _is_last(self, handle: Any) -> bool:
        hooks, own = handle.hooks_dict_ref() or {}, handle.id
        if next(reversed(hooks), own) == own:
            return True
        return all(hook in self._standing for hook in takewhile(own.__ne__, reversed(hooks)))

    def _put_up(self, puts: Sequence[Put]) -> None:
        handles = [handle for put in puts for handle in put()]
        self._standing.update(handle.id for handle in handles)
        self._handles += handles

    def _take_down(self) -> None:
        for handle in self._handles:
            self._standing.discard(handle.id)
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
