"""What a call runs inside of, where torch offers no other way to know."""

import inspect
from collections.abc import Callable
from typing import Any


def runs_in(function: Callable[..., Any]) -> bool:
    """Whether this call runs inside a call of a function written in Python.

    A compiler may have put other code in its place, which keeps its name and file.
    """
    code = function.__code__
    frame = inspect.currentframe()
    while frame is not None:
        if (frame.f_code.co_name, frame.f_code.co_filename) == (code.co_name, code.co_filename):
            return True
        frame = frame.f_back
    return False
