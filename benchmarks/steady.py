"""A run as it is after its first windows, all of which are measured and checked at once."""

from dataclasses import replace

from noiseopt.adaptation import Adaptation
from noiseopt.agreement import WINDOWS_AT_ONCE
from noiseopt.control.controller import MEASURED_AT_FIRST


def past_first_windows(adaptation: Adaptation) -> None:
    """Have a new run go on as if those windows were behind it."""
    controller = adaptation._controller
    begun = replace(controller.state, num_windows=MEASURED_AT_FIRST)
    adaptation._controller = controller.at(begun)
    adaptation._agreement._windows = WINDOWS_AT_ONCE
    adaptation._open_window()
