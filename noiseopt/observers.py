"""Who is told of decisions, and of what else."""

from collections.abc import Iterable
from typing import Protocol

from noiseopt.control import Decision


class Observer(Protocol):
    """What is called with every decision; a function will do.

    Two more methods are called where an observer has them: `on_start(now)`, when it is added and
    whenever the decisions to come begin anew (a state was loaded, the settings or the parameter
    groups changed), with a function that gives the `noiseopt.control.Start` after the latest
    decision; and `on_error(error)` before training stops because ranks disagree.
    """

    def __call__(self, decision: Decision, /) -> object:
        """Take a decision."""


def tell(observers: Iterable[Observer], event: str, fact: object) -> None:
    """Call a method of those observers that have it."""
    for observer in observers:
        method = getattr(observer, event, None)
        if method is not None:
            method(fact)
