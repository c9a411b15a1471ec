"""`zero_grad` of an engine's optimizer and model, without effect where gradients are to stay.

And what else of DeepSpeed's a loop may call that changes gradients before their update.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

# What `deepspeed.utils.safe_set_full_grad` and its like call, on a parameter or at stage 3 on the
# optimizer. They write past torch's count of changes.
_SETTERS = ("set_full_hp_grad",)
_SETTERS_OF_STAGE3 = (
    "set_fp32_grad_for_param",
    "set_local_grad_for_param",
    "update_fp32_grad_for_param_vectorized",
)


class ClearingGuard:
    """Keeps the optimizer and the model from clearing what an open window's update is to take.

    Args:
        engine: the engine; its own `zero_grad` is its class's affair.
        keeps_gradients: says at each call whether gradients are to stay.
        clears: called before gradients are cleared, with whether the optimizer does.
    """

    def __init__(
        self,
        engine: Any,
        keeps_gradients: Callable[[], bool],
        clears: Callable[[bool], None],
    ) -> None:
        optimizer, models = engine.optimizer, _whole_models(engine.module)
        of_model = partial(clears, False)
        self._guards = [_Guarded(optimizer, keeps_gradients, partial(clears, True))]
        self._guards += [_Guarded(model, keeps_gradients, of_model) for model in models]
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

    def __init__(
        self,
        owner: Any,
        keeps_gradients: Callable[[], bool],
        clears: Callable[[], None],
    ) -> None:
        there = vars(owner).get("zero_grad")
        self.owner, self._keeps, self._clears = owner, keeps_gradients, clears
        # Another engine's on the same model gives way: that engine was left behind.
        self.own: Any = there.own if isinstance(there, _Guarded) else there

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self._keeps():
            self._clears()
            clear = self.own or partial(type(self.owner).zero_grad, self.owner)
            clear(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, "zero_grad")


class SetterWatch:
    """Sees gradients that the loop sets by DeepSpeed's own functions.

    Args:
        optimizer: the engine's.
        params: its parameters.
        sets: called before each.
    """

    def __init__(self, optimizer: Any, params: Iterable[Tensor], sets: Callable[[], None]) -> None:
        places = [(optimizer, name) for name in _SETTERS_OF_STAGE3]
        places += [(param, name) for param in params for name in _SETTERS]
        self._watched = [
            (owner, name, vars(owner).get(name), _telling(getattr(owner, name), sets))
            for owner, name in places
            if hasattr(owner, name)
        ]
        for owner, name, _, telling in self._watched:
            setattr(owner, name, telling)

    def remove(self) -> None:
        """Leave everything as it was; what another engine has put up since stays."""
        for owner, name, own, telling in self._watched:
            if vars(owner).get(name) is telling:
                delattr(owner, name)
                if own is not None:
                    setattr(owner, name, own)


def _telling(setter: Callable[..., Any], sets: Callable[[], None]) -> Callable[..., Any]:
    def telling(*args: Any, **kwargs: Any) -> Any:
        sets()
        return setter(*args, **kwargs)

    return telling


def _whole_models(module: nn.Module) -> list[nn.Module]:
    """A module and those in it that hold all of its parameters, as what a wrapper wraps does."""
    every = len(list(module.parameters()))
    return [each for each in module.modules() if len(list(each.parameters())) == every]
