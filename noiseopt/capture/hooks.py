"""Hooks on tensors that come behind those of others.

They stay up where nothing is to be read: to put one up takes ten times as long as to be called.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Put = Callable[[], Sequence[Any]]


# Whose hooks wait for a backward, or take what has come; they change no gradient for others.
KNOWN = ("torch.distributed.fsdp.", "deepspeed.")
_standing: set[int] = set()  # the ids of all hooks of ours


class Standing:
    """The handles of hooks that stand: holds neither the hooks nor the tensors they hang on.

    Attributes:
        handles: one of each hook.
        ended: whether they were taken down for good.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.ended = False

    def take_down(self) -> None:
        """Take them down."""
        self.forget()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def end(self) -> None:
        """Take them down for good."""
        self.ended = True
        self.take_down()

    def forget(self) -> None:
        """Take them for ours no more."""
        _standing.difference_update(handle.id for handle in self.handles)


class Hooks:
    """Hooks that are put up again, and taken down, together.

    Behind one another they stay as they are, whoever's they are: they only read.

    Attributes:
        standing: those that are up.
    """

    def __init__(self) -> None:
        self._puts: list[Put] = []
        self.standing = Standing()
        _at_end_of(self, self.standing.forget)

    def add(self, put: Put) -> None:
        """Add what registers some hooks and returns their handles."""
        self._puts.append(put)
        self._put_up(put)

    def come_last(self) -> None:
        """Put them up again if others have been added behind them since."""
        if not all(map(stands_last, self.standing.handles)):
            self.standing.take_down()
            for put in self._puts:
                self._put_up(put)

    def remove(self) -> None:
        """Take them down for good."""
        self._puts.clear()
        self.standing.end()

    def end_with(self, owner: object) -> None:
        """Take them down for good when the owner is freed, whom what they hang on may hold."""
        _at_end_of(owner, self.standing.end)

    def _put_up(self, put: Put) -> None:
        handles = put()
        _standing.update(handle.id for handle in handles)
        self.standing.handles += handles


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
    return only_read(hooks, ids[ids.index(own) + 1 :])


def only_read(hooks: Any, ids: Collection[int]) -> bool:
    """Whether these among some hooks are ours, or others known to leave gradients as they came."""
    return _standing.issuperset(ids) or all(
        own in _standing or _is_known(hooks.get(own)) for own in list(ids)
    )


def _is_known(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(KNOWN)


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that calls a method while its object lives.

    Python's collector does not see what hooks after accumulation hold: what leads from there to
    their tensor would never be freed.
    """
    held = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        found = held()
        if found is not None:
            found(param)

    return hook


def _at_end_of(owner: object, done: Callable[[], None]) -> None:
    finalizer = weakref.finalize(owner, done)
    finalizer.atexit = False


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
