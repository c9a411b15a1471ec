"""What is decided, carried out on an engine: window, clipping threshold, rates and schedule."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from noiseopt.control import Rates
from noiseopt.integrations.deepspeed.section import Settings
from noiseopt.integrations.deepspeed.wrappers import Wrapper
from noiseopt.optim.hyper import overridden, scaled_values


class EngineControl:
    """Carries out decisions between an engine's updates, and lends it the rates inside them.

    Args:
        engine: the engine.
        wrapper: of its optimizer.
        settings: what its config says.

    Attributes:
        max_norm: the norm at which the engine clips; infinite for never.
        loop_ends_windows: whether the loop says where windows end, and not the engine's counter.
    """

    def __init__(self, engine: Any, wrapper: Wrapper, settings: Settings) -> None:
        self._engine, self._wrapper, self._settings = engine, wrapper, settings
        self._first_steps = settings.config.accumulation_steps
        self._led: Callable[[int], None] | None = None
        self._tells_samples = False  # whether the scheduler takes how many it advances by
        self.loop_ends_windows = False
        self.max_norm = settings.config.max_norm
        self.restart()

    def restart(self) -> None:
        """Begin with the optimizer's moments and the scheduler as they are."""
        self._moments = self._wrapper.moments()
        self._since_tick = 0

    # ------------------------------------------------------------------ between updates

    @property
    def makes_windows(self) -> bool:
        """Whether windows are as long as was decided."""
        acts = self._settings.config.mode == "auto"
        return acts and (self._led is not None or not self.loop_ends_windows)

    def lead(self, set_window: Callable[[int], None]) -> None:
        """Have a loop that says where windows end be told of each one's length as it opens."""
        self.loop_ends_windows, self._led = True, set_window

    def set_window(self, steps: int) -> None:
        """Make the window that begins now exactly so many micro-batches long."""
        engine = self._engine
        micro_batch = engine.train_micro_batch_size_per_gpu()
        # The engine's own setter is closed to the user, who would be overruled.
        batch = micro_batch * engine.dp_world_size * steps
        DeepSpeedEngine.set_train_batch_size(engine, batch)
        engine.tput_timer.batch_size = batch
        # The engine takes micro_steps modulo the window: counted from here, none is cut short.
        engine.micro_steps = 0
        if self._led is not None:
            self._led(steps)

    def set_max_norm(self, max_norm: float) -> None:
        """Clip from the next update on at this norm; never, if it is infinite."""
        self.max_norm = max_norm
        self._wrapper.set_max_norm(max_norm)

    @contextmanager
    def clipping_as_configured(self) -> Iterator[None]:
        """Have the engine clip at what its config says, as for a checkpoint that others load."""
        adapted, ceiling = self.max_norm, self._settings.config.max_norm
        if adapted == ceiling:
            yield
            return
        self._wrapper.set_max_norm(ceiling)
        try:
            yield
        finally:
            self._wrapper.set_max_norm(adapted)

    @property
    def stretches_schedule(self) -> bool:
        """Whether longer windows stretch the engine's schedule."""
        return self._settings.schedule == "updates" and self._engine.lr_scheduler is not None

    # ------------------------------------------------------------------ in an update

    @contextmanager
    def lent(self, rates: Rates, steps: int, lr_kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Lend an update the adapted rates; afterwards advance the schedule for its window.

        Args:
            rates: the factors on the user's hyper-parameters.
            steps: micro-batches in the update's window.
            lr_kwargs: what the scheduler's `step` is to be called with.
        """
        groups, wrapper = self._wrapper.param_groups, self._wrapper
        moments = [dict(each) for each in self._moments]
        least, decoupled = self._settings.config.min_beta2, wrapper.decouples_weight_decay
        values = [
            scaled_values(group, each, rates, least, decoupled)
            for group, each in zip(groups, moments, strict=True)
        ]
        with self._unscheduled(), overridden(groups, values):
            yield
        if self._engine.was_step_applied():
            self._moments = moments
            self._advance(steps, lr_kwargs)

    @contextmanager
    def _unscheduled(self) -> Iterator[None]:
        """Keep the scheduler from the engine: inside the update it would write the rates."""
        engine = self._engine
        scheduler, engine.lr_scheduler = engine.lr_scheduler, None
        try:
            yield
        finally:
            engine.lr_scheduler = scheduler

    def _advance(self, steps: int, lr_kwargs: Mapping[str, Any]) -> None:
        ticks, scheduler = 1, self._engine.lr_scheduler
        if self._settings.schedule == "samples" and self.makes_windows and not lr_kwargs:
            ticks, self._since_tick = divmod(self._since_tick + steps, self._first_steps)
        if scheduler is None:
            return
        if not self._tells_samples:
            try:
                with suppress(ValueError):  # of what shows no signature
                    inspect.signature(scheduler.step).bind(**lr_kwargs)
                for _ in range(ticks):
                    scheduler.step(**lr_kwargs)
            except TypeError:
                self._tells_samples = True
        if self._tells_samples:
            # As in DeepSpeed: Megatron's schedulers take how many samples they advance by.
            scheduler.step(self._engine.train_batch_size())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What outlives the process, as plain numbers."""
        moments = [dict(each) for each in self._moments]
        return {"second_moments": moments, "since_tick": self._since_tick}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._moments = [dict(each) for each in state["second_moments"]]
        self._since_tick = int(state["since_tick"])
