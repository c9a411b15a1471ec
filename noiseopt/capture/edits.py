"""Whether hooks of others change a gradient after it was accumulated in `p.grad`.

What was read of it as it came is then not what is averaged or applied. Hooks that stand around
theirs read its norm, and a few entries, before and after; where there are none of theirs, none of
ours stand.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noiseopt.capture.hooks import Hooks, only_read, weakly
from noiseopt.capture.norms import Begun, begun_norm
from noiseopt.capture.sharding import local

_CLOSE = 1e-6  # relative; where hooks only look, both are the very same
_FEW = 64  # entries that are compared too: a change of sign or order leaves the norm

Looked = tuple[Begun, Tensor]


class Edits:
    """The gradients of one backward pass, before and after the hooks of others.

    Attributes:
        hooks: those that stand around theirs.
    """

    def __init__(self) -> None:
        self.hooks = Hooks()
        self._first, self._last = weakly(self._read_before), weakly(self._read_after)
        self._around: dict[Tensor, Sequence[Any]] = {}
        self._before: dict[Tensor, Looked | None] = {}  # None until it was read
        self._pairs: list[tuple[Looked, Looked]] = []
        self._removed = False

    def watch(self, param: Tensor) -> None:
        """Look at what hooks will do to this parameter's gradient in the pass that runs."""
        hooks: Any = param._post_accumulate_grad_hooks
        if not hooks or only_read(hooks, hooks):
            return
        if param not in self._around:
            self.hooks.add(lambda: self._stand_around(param))
        self._put_around(hooks, *(handle.id for handle in self._around[param]))
        self._before[param] = None

    def found(self) -> bool:
        """Whether there was any since the last call. Where hooks of others ran, this waits."""
        pairs, removed = self._pairs, self._removed
        self._before.clear()
        self._pairs, self._removed = [], False
        return removed or not all(_is_same(*pair) for pair in pairs)

    def _stand_around(self, param: Any) -> Sequence[Any]:
        put = param.register_post_accumulate_grad_hook
        self._around[param] = put(self._first), put(self._last)
        return self._around[param]

    def _put_around(self, hooks: Any, first: int, last: int) -> None:
        ids = [own for own in hooks if own not in (first, last)]
        theirs = [index for index, own in enumerate(ids) if not only_read(hooks, [own])]
        start, end = theirs[0], theirs[-1] + 1
        ordered = [*ids[:start], first, *ids[start:end], last, *ids[end:]]
        if list(hooks) != ordered:
            # Autograd goes by when each was put in, whatever `move_to_end` says.
            standing = {**hooks, first: self._first, last: self._last}
            hooks.clear()
            hooks.update((own, standing[own]) for own in ordered)

    def _read_before(self, param: Tensor) -> None:
        if param in self._before and param.grad is not None:
            self._before[param] = _look_at(param.grad)

    def _read_after(self, param: Tensor) -> None:
        before = self._before.pop(param, None)
        if before is None:
            return
        if param.grad is None:
            self._removed = True
        else:
            self._pairs.append((before, _look_at(param.grad)))


def _look_at(grad: Tensor) -> Looked:
    held = local(grad)
    few = held.reshape(-1)[:_FEW].clone() if held.layout == torch.strided else held.new_empty(0)
    return begun_norm(grad), few


def _is_same(before: Looked, after: Looked) -> bool:
    (old, few), (new, same) = before, after
    norms = math.isclose(old, new, rel_tol=_CLOSE) or bool(old != old and new != new)
    return norms and torch.allclose(few, same.to(few.dtype), rtol=_CLOSE, atol=0, equal_nan=True)
