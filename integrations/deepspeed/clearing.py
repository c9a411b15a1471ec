"""`zero_grad` of an engine's optimizer and model, without effect where gradients are to stay."""

from collections.abc import Callable
from typing import Any

from torch import nn


class ClearingGuard:
    """Keeps the optimizer and the model from clearing what an open window's update is to take.

    Args:
        engine: the engine; its own `zero_grad` is its class's affair.
        keeps_gradients: says at each call whether gradients are to stay.
    """

    def __init__(self, engine: Any, keeps_gradients: Callable[[], bool]) -> None:
        self._owners = [engine.optimizer, *_whole_models(engine.module)]
        for owner in self._owners:
            vars(owner)["zero_grad"] = _Guarded(owner, keeps_gradients)

    def remove(self) -> None:
        """Let each clear its gradients again."""
        for owner in self._owners:
            vars(owner).pop("zero_grad", None)


class _Guarded:
    """An owner's `zero_grad`; a copy of the owner, as of its weights' mean, gets its plain own."""

    def __init__(self, owner: Any, keeps_gradients: Callable[[], bool]) -> None:
        self._owner, self._clear, self._keeps = owner, owner.zero_grad, keeps_gradients

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self._keeps():
            self._clear(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, "zero_grad")


def _whole_models(module: nn.Module) -> list[nn.Module]:
    """A module and those in it that hold all of its parameters, as what a wrapper wraps does."""
    every = len(list(module.parameters()))
    return [each for each in module.modules() if len(list(each.parameters())) == every]
