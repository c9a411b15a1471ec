"""Where observers write to: what goes wrong there is warned of once, and never stops training."""

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Sink(Generic[T]):
    """Something to write to, until it fails for the first time.

    Args:
        target: what is written to.
        name: what it is called in the warning.
    """

    def __init__(self, target: T, name: str) -> None:
        self._target: T | None = target
        self._name = name

    def write(self, action: Callable[[T], object]) -> None:
        """Do something with the target; nothing once that has failed."""
        if self._target is None:
            return
        try:
            action(self._target)
        except Exception as error:  # whatever it raises, training goes on
            self._target = None
            warnings.warn(
                f"noiseopt logs nothing more to {self._name}: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
