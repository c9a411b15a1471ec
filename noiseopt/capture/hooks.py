"""Hooks on tensors that come behind those of others.

They stay up where nothing is to be read: to put one up takes ten times as long as to be called.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Put = Callable[[], Sequence[Any]]


# Whose hooks wait for a backward, and return gradients as they came.
TORCHS_OWN = "torch.distributed.fsdp."
_standing: set[int] = set()  # the ids of all hooks of ours


class Hooks:
    """Hooks that are put up again, and taken down, together.

    Behind one another they stay as they are, whoever's they are: they only read.
    """

    def __init__(self) -> None:
        self._puts: list[Put] = []
        self._handles: list[Any] = []
        finalizer = weakref.finalize(self, _forget, self._handles)
        finalizer.atexit = False

    def add(self, put: Put) -> None:
        """Add what registers some hooks and returns their handles."""
        self._puts.append(put)
        self._put_up(put)

    def come_last(self) -> None:
        """Put them up again if others have been added behind them since."""
        if not all(map(stands_last, self._handles)):
            self._take_down()
            for put in self._puts:
                self._put_up(put)

    def remove(self) -> None:
        """Take them down for good."""
        self._puts.clear()
        self._take_down()

    def _put_up(self, put: Put) -> None:
        handles = put()
        _standing.update(handle.id for handle in handles)
        self._handles += handles

    def _take_down(self) -> None:
        _forget(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def stands_last(handle: Any) -> bool:
    """Whether no hook stands behind this one but those that only read."""
    hooks, own = handle.hooks_dict_ref(), handle.id
    if not hooks:
        return False
    if next(reversed(hooks)) == own:
        return True
    ids = list(hooks)  # a collector may take some down meanwhile
    if own not in ids:
        return False
    behind = ids[ids.index(own) + 1 :]
    return all(other in _standing or _is_torchs(hooks.get(other)) for other in behind)


def _is_torchs(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(TORCHS_OWN)


def _forget(handles: Sequence[Any]) -> None:
    _standing.difference_update(handle.id for handle in handles)


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
