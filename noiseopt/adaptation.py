"""The loop between measuring and acting: windows from the device in, decisions to observers out.

It owns the controller, reads the queued rows at decision points only, and carries the state as
plain numbers. Optimizer and monitor share it.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from noiseopt.capture import APPLIED, TAIL, Measured, read_rows
from noiseopt.control import (
    RATE_RULES,
    Controller,
    Decision,
    NoiseConfig,
    Rates,
    Window,
    from_numbers,
    to_numbers,
    unknown,
)
from noiseopt.distributed import agree, check, world_size

STATE_VERSION = 1
KEPT_DECISIONS = 256

Number = int | float
Observer = Callable[[Decision], object]
logger = logging.getLogger("noiseopt")


class Adaptation:
    """Measurements in, decisions out, for one optimizer.

    Args:
        config: the settings.
        rule: the name of the learning-rate rule.
        num_groups: how many parameter groups are measured.
        process_group: the ranks that share the gradients; the default group if None.

    Attributes:
        num_groups: how many parameter groups are measured.
        steps: the length of the open window, in micro-batches on each rank.
        max_norm: the norm at which its gradient is clipped; infinite for never.
    """

    steps: int
    max_norm: float

    def __init__(
        self,
        config: NoiseConfig,
        rule: str,
        num_groups: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config
        self.process_group = process_group
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self.observers: list[Observer] = []
        self._rule, self.num_groups = RATE_RULES[rule], num_groups
        self.restart()

    def restart(self) -> None:
        """Forget everything that was measured and decided."""
        self._go_on(Controller.create(self.config, self._rule, self.num_groups))

    def _go_on(self, controller: Controller) -> None:
        self._controller = controller
        self._rows: list[Tensor] = []
        self._windows: list[Window] = []
        self._samples: list[float] = []
        self._losses: list[Tensor] = []
        self._started = False
        self.decisions.clear()
        self._open_window()

    @property
    def acts(self) -> bool:
        """Whether decisions take effect."""
        return self.config.mode == "auto"

    @property
    def num_updates(self) -> int:
        """Updates applied. On an accelerator this waits for it."""
        at = 2 * self.num_groups + TAIL + APPLIED
        return self._controller.state.num_updates + sum(int(row[at] > 0) for row in self._rows)

    def rates(self, steps: int) -> Rates:
        """The factors for a window of so many steps: those of the latest decision."""
        return self._controller.rates(steps) if self.acts else Rates()

    # ------------------------------------------------------------------ what the loop tells

    def set_samples(self, samples: float) -> None:
        """Say how many samples the next micro-batch holds."""
        if not 0 < samples < math.inf:
            raise ValueError(f"samples is {samples!r}: it must be positive and finite")
        if not self._controller.state.counts_samples:
            if self._num_windows or self._started:
                raise RuntimeError(
                    "set_samples() was first called after micro-batches had been counted as one "
                    "each: call it before every micro-batch from the first, or set "
                    "NoiseConfig.samples_per_micro_batch"
                )
            self._controller = self._controller.counting_samples()
        self._samples.append(float(samples))

    def report_loss(self, loss: float | Tensor) -> None:
        """Give the mean loss of the micro-batch; a tensor is not read before the next decision."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"the loss has shape {tuple(loss.shape)}: report one number")
            self._losses.append(loss.detach().reshape(()))
        else:
            self._losses.append(torch.tensor(float(loss)))

    def next_samples(self) -> float:
        """The samples of the micro-batch that is taken now."""
        self._started = True
        return self.window_samples(1)[0]

    def window_samples(self, micro_batches: int) -> list[float]:
        """The samples of a whole window's micro-batches, as far as they were told."""
        self._started = True
        told, self._samples = self._samples, []
        if told:
            return told if micro_batches > 1 or len(told) == 1 else told[-1:]
        if self.config.samples_per_micro_batch is None and self._controller.state.counts_samples:
            raise RuntimeError(
                "set_samples() was called for earlier micro-batches but not for this one: call it "
                "before every micro-batch, or set NoiseConfig.samples_per_micro_batch"
            )
        return [self.config.samples_per_micro_batch or 1.0] * micro_batches

    # ------------------------------------------------------------------ windows and decisions

    def close_window(
        self,
        measured: Measured,
        applied: Tensor | bool,
        clipped: Tensor | bool,
        lr: Callable[[], float],
    ) -> None:
        """Queue a window; decide if a decision is due.

        Args:
            measured: its gradients' norms.
            applied: whether it ended in an update, 0-d.
            clipped: whether its gradient was clipped, 0-d.
            lr: reads the user's learning rate; called only for a decision.
        """
        row = measured.row(applied, clipped, self._losses)
        self._losses = []
        if world_size(self.process_group) > 1:
            row = agree(row, self.process_group)
        self._rows.append(row)
        due = self._num_windows % self.config.decision_interval == 0
        if due:
            self._decide(lr())
        self._open_window()
        if due:
            for observer in self.observers:
                observer(self.decisions[-1])

    @property
    def _num_windows(self) -> int:
        return self._controller.state.num_windows + len(self._rows)

    def _decide(self, lr: float) -> None:
        self._learn()
        self._controller, decision = self._controller.decide(lr, tuple(self._windows))
        self._windows = []
        self.decisions.append(decision)

    def _learn(self) -> None:
        """Take in every queued row. This waits for the device."""
        rows, self._rows = self._rows, []
        if rows and world_size(self.process_group) > 1:
            check(torch.stack(rows)[:, -1].nan_to_num(nan=0.0).max().item())
            rows = [row[:-1] for row in rows]
        for window in read_rows(rows):
            self._controller = self._controller.learn(window)
            self._windows.append(window)

    def shorten(self, steps: int) -> None:
        """Let the open window be shorter than decided, as at the end of the data."""
        if not 1 <= steps <= self.steps:
            raise ValueError(f"the open window is of {self.steps}: it cannot become {steps}")
        self.steps = steps

    def _open_window(self) -> None:
        """Fix what the next window uses, so that nothing changes inside it."""
        self.steps = self._controller.window_steps(self._num_windows)
        self.max_norm = self._controller.state.max_norm if self.acts else math.inf

    # ------------------------------------------------------------------ state and words

    def to_numbers(self, dropped: int = 0) -> dict[str, Number]:
        """The whole state as plain numbers under fixed keys. This waits for the device.

        Args:
            dropped: micro-batches of the open window, which the state leaves behind.
        """
        self._learn()
        numbers = to_numbers(self._controller.state)
        numbers["total_dropped"] += dropped
        return {"version": STATE_VERSION} | numbers

    def check_numbers(self, numbers: Mapping[str, Number]) -> None:
        """Refuse a state that cannot be loaded, before anything is changed.

        Raises:
            ValueError: it is of another version or shape.
        """
        version = numbers.get("version")
        if version != STATE_VERSION:
            raise ValueError(
                f"the saved noise state has version {version}, this is version {STATE_VERSION}: "
                "load the optimizer without its 'noise' entries to start it anew"
            )
        from_numbers(self._controller.state, numbers)

    def load_numbers(self, numbers: Mapping[str, Number]) -> None:
        """Go on from a saved state; what was queued since is forgotten."""
        self.check_numbers(numbers)
        state = from_numbers(self._controller.state, numbers)
        low, high = self.config.min_accumulation_steps, self.config.max_accumulation_steps
        steps = min(max(state.accumulation_steps, low), high)
        self._go_on(self._controller.at(replace(state, accumulation_steps=steps)))

    def add_group(self) -> None:
        """Measure one more parameter group."""
        self._learn()
        self.num_groups += 1
        self._controller = self._controller.with_groups(1)

    def describe(self, num_params: int, num_groups: int) -> str:
        """One line on what is measured and what is not known yet."""
        config, ranks = self.config, world_size(self.process_group)
        line = (
            f"noise {config.mode}: {num_params} parameters in {num_groups} groups, {ranks} "
            f"{'rank' if ranks == 1 else 'ranks'}, window of {self.steps}"
            f" ({config.accumulation} accumulation, at most {config.max_accumulation_steps})"
        )
        if self.decisions and self.decisions[-1].noise is not None:
            noise = self.decisions[-1].noise
            low, high = noise.scale_interval
            return f"{line}, noise scale {noise.scale:.4g} [{low:.4g}, {high:.4g}] {noise.unit}"
        return f"{line}; {unknown(config, self._controller.state)}"

    @property
    def can_measure(self) -> bool:
        """Whether windows as they are, or probes, will show the noise."""
        probes = self.acts and self.config.probe_interval > 0
        return self.steps > 1 or (probes and self.config.max_accumulation_steps > 1)
