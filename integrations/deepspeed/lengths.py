"""Who ends an engine's windows, and after how many micro-batches."""

import math
from collections.abc import Callable
from typing import Any

from noiseopt.adaptation import Adaptation
from noiseopt.capture import STEPS, Row
from noiseopt.integrations.deepspeed.control import EngineControl
from noiseopt.integrations.deepspeed.leaves import LeafNorms
from noiseopt.integrations.deepspeed.loop import LoopWatch


class WindowLengths:
    """Gives an engine its windows one by one, or leaves them to a loop that makes its own.

    Args:
        engine: the engine.
        adaptation: says how long windows are to be.
        control: carries it out.
        leaves: what the open window has had.
        loop: is told where windows begin.

    Attributes:
        loop_divides: whether the loop divides its losses by itself.
    """

    def __init__(
        self,
        engine: Any,
        adaptation: Adaptation,
        control: EngineControl,
        leaves: LeafNorms,
        loop: LoopWatch,
    ) -> None:
        self._engine, self._adaptation, self._control = engine, adaptation, control
        self._leaves, self._loop = leaves, loop
        self._configured = adaptation.config.accumulation_steps
        self._usual = self._configured  # the length, where someone else makes windows
        self._left = False  # whether the loop does
        self._awaits_first = False  # whether its next window shows how long it makes them
        self._shortened = False
        self.loop_divides = False

    def open(self) -> None:
        """Have the engine's next window exactly as long as was decided."""
        adaptation = self._adaptation
        if adaptation.acts and adaptation.max_norm != self._control.max_norm:
            self._control.set_max_norm(adaptation.max_norm)
        if self._control.makes_windows or self._shortened:
            self._control.set_window(adaptation.steps)
            self._tell_of_schedule(adaptation.steps)
            self._tell_of_division(adaptation.steps)
            self._shortened = False
        self._leaves.listen(adaptation.measures)
        self._loop.begin_window()

    def go_on(self) -> None:
        """Open a window after a state was loaded, which may say another length than the engine."""
        self._engine.micro_steps = 0
        self._awaits_first = self._left and self._configured == 1
        is_fixed = self._left and self._configured > 1
        if is_fixed or not (self._control.makes_windows or self._adaptation.steps == self._usual):
            self._adaptation.set_window(self._usual, is_reference=is_fixed)
        self.open()

    def shorten(self, steps: int) -> None:
        """See `EngineNoise.shorten_window`."""
        if self._control.loop_ends_windows:
            raise RuntimeError("the loop says where windows end: have it end this one early")
        taken = len(self._leaves)
        if taken:
            raise RuntimeError(
                f"the open window has had {taken} of {self._adaptation.steps} micro-batches, each "
                "divided by that number: shorten it before the first"
            )
        self._adaptation.shorten(steps, 0)
        self._shortened = True
        self._control.set_window(steps)
        self._loop.begin_window()

    def lead(self, set_window: Callable[[int], None]) -> None:
        """See `EngineNoise.lead`."""
        if self._control.loop_ends_windows and not self._control.makes_windows:
            raise RuntimeError(
                "the loop has ended windows by itself: lead it from the first one on"
            )
        self._control.lead(set_window)
        set_window(self._adaptation.steps)

    def leave_to_loop(self, why: str, begun: bool) -> None:
        """See `EngineNoise.leave_windows_to_loop`.

        Args:
            why: what the loop called.
            begun: whether a window was, since the start or since a state was loaded.
        """
        if self._control.loop_ends_windows:
            return
        steps = self._adaptation.steps
        if steps != self._configured and begun:
            raise RuntimeError(
                f"{why}: the loop says where windows end, after the engine had made them {steps} "
                "micro-batches long: do so from the first one on"
            )
        self._control.loop_ends_windows = self._left = True
        self._awaits_first = self._configured == 1
        if steps != self._configured:
            self._control.set_window(self._configured)
        self._adaptation.keep_window(self._configured, is_reference=self._configured > 1)
        self._loop.tell(
            "the loop's windows",
            f"{why}: the loop says where windows end, so the engine leaves them as they are; "
            "clipping adapts, and the rates in windows of another length only",
        )

    def close(self, row: Row) -> int:
        """Take a window's end; of windows that the loop ends the first shows how long they are.

        If the config does not: it says 1 where the loop calls `engine.step` once for each.

        Returns:
            Its micro-batches, the same on all ranks, however many backwards each has had in it.
        """
        if not self._control.loop_ends_windows:
            return int(self._engine.gradient_accumulation_steps())
        steps = math.ceil(float(row[STEPS]) / self._adaptation.ranks.data)
        if self._awaits_first:
            self._awaits_first, self._usual = False, steps
            self._adaptation.keep_window(steps)
        return steps

    def tell_of_rest(self) -> None:
        """Warn of an open window that is left behind for good."""
        if len(self._leaves) and self._control.makes_windows:
            self._loop.tell(
                "left",
                f"{len(self._leaves)} of {self._adaptation.steps} micro-batches of an open window "
                "are in no update: before the last k of the data, if those are fewer, call "
                "engine.noise_aware.shorten_window(k)",
            )

    def _tell_of_schedule(self, steps: int) -> None:
        if steps != self._configured and self._control.stretches_schedule:
            self._loop.tell(
                "the schedule",
                f"the window is now {steps} micro-batches, and the learning rate's schedule counts "
                'updates: it stretches; say "noise_aware": {"schedule": "samples"} to have it '
                "follow the samples",
            )

    def _tell_of_division(self, steps: int) -> None:
        ratio = steps / self._configured
        if ratio != 1 and self.loop_divides:
            self._loop.tell(
                "the division",
                f"the window is now {steps} micro-batches, and the loop divides its losses itself "
                f"(scale_wrt_gas=False): if by a constant, updates are {ratio:g} times what they "
                "should be; divide by engine.gradient_accumulation_steps(), which changes, or "
                "leave it to the engine",
            )
