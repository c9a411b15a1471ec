"""What a call runs inside of, where torch offers no other way to know."""

import inspect
import sys
from collections.abc import Callable
from typing import Any


def runs_in(function: Callable[..., Any]) -> bool:
    """Whether this call runs inside a call of a function written in Python."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False


def only_builds_state() -> bool:
    """Whether this call of `step()` is checkpointing's, which has an optimizer build its state.

    torch.distributed.checkpoint calls it with zero gradients and a rate of 0, whenever the state is
    empty: before the first update or, without momentum, at any time. What it brings is no
    micro-batch. Who calls tells so for sure: gradients may be zero, and the first rate 0, as well.
    """
    checkpointing = sys.modules.get("torch.distributed.checkpoint.state_dict")
    return checkpointing is not None and runs_in(checkpointing._init_optim_state)
