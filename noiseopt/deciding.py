"""The controller of a run: its state, what it has decided, and who is told of that."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from noiseopt.control import (
    RATE_RULES,
    Controller,
    ControllerState,
    Decision,
    NoiseConfig,
    Rates,
    Start,
    Window,
    from_saved,
    to_numbers,
)
from noiseopt.estimate import NoiseEstimate
from noiseopt.observers import Observer, tell

KEPT_DECISIONS = 256

Number = int | float


class Decides:
    """The part of `Adaptation` that knows neither tensors nor ranks. Not to be used alone.

    Args:
        config: the settings.
        rule: the name of the learning-rate rule.
        groups: the names of the parameter groups that are measured.

    Attributes:
        config: the settings.
        rule: the name of the learning-rate rule.
        groups: the names of the parameter groups that are measured.
        decisions: the recent ones, oldest first.
        observers: who is told of them.
    """

    _controller: Controller

    def __init__(self, config: NoiseConfig, rule: str, groups: Sequence[str]) -> None:
        self.config = config
        self.rule, self.groups = rule, tuple(groups)
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self.observers: list[Observer] = []

    def _new_controller(self) -> Controller:
        return Controller.create(self.config, RATE_RULES[self.rule], self.num_groups)

    def observe(self, observer: Observer) -> None:
        """Have an observer called with each decision."""
        tell([observer], "on_start", self._now)
        self.observers.append(observer)

    def _begin(self) -> None:
        """Let the decisions to come begin from the present state."""
        self._decided_state = self._controller.state
        self._windows: list[Window] = []
        tell(self.observers, "on_start", self._now)

    def _now(self) -> Start:
        return Start(self.config, self.rule, self.groups, self._decided_state)

    @property
    def state(self) -> ControllerState:
        """The controller's state, as far as rows were read."""
        return self._controller.state

    @property
    def noise(self) -> NoiseEstimate | None:
        """The estimate of the latest decision, or of the state that was loaded since."""
        return self.decisions[-1].noise if self.decisions else self._controller.estimate()

    @property
    def num_groups(self) -> int:
        """How many parameter groups are measured."""
        return len(self.groups)

    @property
    def acts(self) -> bool:
        """Whether decisions take effect."""
        return self.config.mode == "auto"

    def rates(self, steps: int) -> Rates:
        """The factors for a window of so many steps: those of the latest decision."""
        return self._controller.rates(steps) if self.acts else Rates()

    def check_numbers(self, numbers: Mapping[str, Number]) -> None:
        """Refuse a state that cannot be loaded, before anything is changed.

        Raises:
            ValueError: it is of another version or shape, or counts micro-batches where the
                settings say how many samples each holds.
        """
        self._state_of(numbers)

    def _state_of(self, numbers: Mapping[str, Number]) -> ControllerState:
        state = from_saved(self._controller.state, numbers)
        if self.config.samples_per_micro_batch is None or state.counts_samples:
            return state
        if state.num_windows > 0:
            raise ValueError(
                "the saved noise state counts micro-batches, and samples_per_micro_batch is "
                f"{self.config.samples_per_micro_batch!r}, which counts samples: leave that out, "
                "or load the optimizer without its 'noise' entries to start measuring anew"
            )
        return replace(state, counts_samples=True)

    def _common_state(self) -> dict[str, Number]:
        """The state as far as ranks share it: what each has dropped is its own affair."""
        numbers = to_numbers(self._controller.state)
        del numbers["total_dropped"]
        return numbers

    def _take_in(self, window: Window) -> None:
        self._controller = self._controller.learn(window)
        self._windows.append(window)

    def _conclude(self, lr: float, seconds: float | None) -> Decision:
        """Decide by the windows that were taken in since the last decision."""
        self._controller, decision = self._controller.decide(lr, tuple(self._windows), seconds)
        self._decided_state, self._windows = self._controller.state, []
        self.decisions.append(decision)
        return decision
