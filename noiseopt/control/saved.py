"""A controller's state as checkpoints hold it: plain numbers under fixed keys, with a version."""

import math
from collections.abc import Mapping
from dataclasses import replace

from noiseopt.control.state import ControllerState, Number, from_numbers, to_numbers

STATE_VERSION = 2


def to_saved(state: ControllerState, dropped: int = 0) -> dict[str, Number]:
    """What a checkpoint holds.

    Args:
        state: the controller's state.
        dropped: micro-batches of the open window, which the checkpoint leaves behind.
    """
    numbers = to_numbers(state)
    numbers["total_dropped"] += dropped
    return {"version": STATE_VERSION} | numbers


def from_saved(like: ControllerState, numbers: Mapping[str, Number]) -> ControllerState:
    """The state that a checkpoint holds.

    Args:
        like: a state of the same settings and parameter groups.
        numbers: from `to_saved`.

    Raises:
        ValueError: it is of another version or shape.
    """
    version = numbers.get("version")
    if version != STATE_VERSION:
        raise ValueError(
            f"the saved noise state has version {version}, this is version {STATE_VERSION}: "
            "load the optimizer without its 'noise' entries to start it anew"
        )
    state = from_numbers(like, numbers)
    # Earlier versions saved nan for a norm that was not known, which no rank finds equal.
    return replace(state, grad_norm=0.0) if math.isnan(state.grad_norm) else state
