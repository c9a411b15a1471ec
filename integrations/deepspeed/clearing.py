"""`zero_grad` of an engine's optimizer and model, without effect where gradients are to stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class ClearingGuard:
    """Keeps the optimizer and the model from clearing what an open window's update is to take.

    Args:
        engine: the engine; its own `zero_grad` is its class's affair.
        keeps_gradients: says at each call whether gradients are to stay.
    """

    def __init__(self, engine: Any, keeps_gradients: Callable[[], bool]) -> None:
        owners = [engine.optimizer, *_whole_models(engine.module)]
        self._guards = [_Guarded(owner, keeps_gradients) for owner in owners]
        for guard in self._guards:
            vars(guard.owner)["zero_grad"] = guard

    def remove(self) -> None:
        """Let each clear its gradients again; what another engine has put up since stays."""
        for guard in self._guards:
            if vars(guard.owner).get("zero_grad") is guard:
                del vars(guard.owner)["zero_grad"]
                if guard.own is not None:
                    guard.owner.zero_grad = guard.own


class _Guarded:
    """An owner's `zero_grad`; a copy of the owner, as of its weights' mean, gets its plain own."""

    def __init__(self, owner: Any, keeps_gradients: Callable[[], bool]) -> None:
        there = vars(owner).get("zero_grad")
        self.owner, self._keeps = owner, keeps_gradients
        # Another engine's on the same model gives way: that engine was left behind.
        self.own: Any = there.own if isinstance(there, _Guarded) else there

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self._keeps():
            clear = self.own or partial(type(self.owner).zero_grad, self.owner)
            clear(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, "zero_grad")


def _whole_models(module: nn.Module) -> list[nn.Module]:
    """A module and those in it that hold all of its parameters, as what a wrapper wraps does."""
    every = len(list(module.parameters()))
    return [each for each in module.modules() if len(list(each.parameters())) == every]
