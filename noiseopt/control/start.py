"""Where a stretch of decisions begins: with the windows that follow, enough to decide it again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noiseopt.control.config import NoiseConfig
from noiseopt.control.controller import Controller
from noiseopt.control.rates import RATE_RULES
from noiseopt.control.state import ControllerState


@dataclass(frozen=True, slots=True)
class Start:
    """What decides from here on.

    Attributes:
        config: the settings.
        rule: the learning-rate rule, a name in `RATE_RULES`.
        groups: the names of the parameter groups.
        state: the controller's state; the next decision's windows were not learned yet.
    """

    config: NoiseConfig
    rule: str
    groups: tuple[str, ...]
    state: ControllerState

    @classmethod
    def of_run(cls, config: NoiseConfig, rule: str, groups: tuple[str, ...] = ("0",)) -> "Start":
        """The start of a run of which nothing is known yet."""
        return cls(config, rule, groups, ControllerState.initial(config, len(groups)))

    def controller(self) -> Controller:
        """The controller that decides from here on."""
        return Controller(self.config, RATE_RULES[self.rule], self.state)


def group_names(param_groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """How an optimizer's parameter groups are called: by their "name", or by their number.

    Example:
        >>> group_names([{"name": "head"}, {}, {"name": "head"}])
        ('head-0', '1', 'head-2')
    """
    names = [str(group.get("name", index)) for index, group in enumerate(param_groups)]
    while len(set(names)) < len(names):
        times = Counter(names)
        names = [f"{n}-{index}" if times[n] > 1 else n for index, n in enumerate(names)]
    return tuple(names)
