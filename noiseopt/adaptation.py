"""The loop between measuring and acting: windows from the device in, decisions to observers out.

It reads the queued rows at decision points only, and carries the state as plain numbers. Optimizer,
monitor and DeepSpeed's engine share it.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noiseopt.agreement import Agreement, starting_facts
from noiseopt.capture import APPLIED, SECONDS, Measured, Row, read_rows, read_seconds
from noiseopt.clock import Clock
from noiseopt.control import (
    Controller,
    ControllerState,
    NoiseConfig,
    Rates,
    to_saved,
)
from noiseopt.deciding import Decides, Number
from noiseopt.distributed import Ranks
from noiseopt.loop_checks import StandstillCheck
from noiseopt.observers import tell
from noiseopt.told import Losses, SampleCounts

logger = logging.getLogger("noiseopt")


class Adaptation(Decides):
    """Measurements in, decisions out, for one optimizer.

    Args:
        config: the settings.
        rule: the name of the learning-rate rule.
        groups: the names of the parameter groups that are measured.
        ranks: those that take part.

    Attributes:
        ranks: those that take part.
        settings: tells what an update is made with, which ranks must have alike.
        steps: the length of the open window, in micro-batches on each rank.
        measures: whether it is measured where that costs something.
        max_norm: the norm at which its gradient is clipped; infinite for never.
        samples: what the loop has told of its micro-batches' samples.
        losses: what it has told of their losses.
    """

    steps: int
    measures: bool
    max_norm: float
    samples: SampleCounts
    losses: Losses

    def __init__(
        self,
        config: NoiseConfig,
        rule: str,
        groups: Sequence[str],
        ranks: Ranks,
    ) -> None:
        super().__init__(config, rule, groups)
        self.ranks = ranks
        self.settings: Callable[[], dict[str, object]] = dict
        self.restart()

    def restart(self) -> None:
        """Forget everything that was measured and decided."""
        self._go_on(self._new_controller())

    def _go_on(self, controller: Controller) -> None:
        self._controller = controller
        self._rows: list[Row] = []
        self.samples = SampleCounts(self.config, controller.state.counts_samples)
        self.losses = Losses()
        self._clock = Clock() if self.config.objective == "time" else None
        self.decisions.clear()
        self.join(self.ranks)
        self._begin()

    @property
    def num_updates(self) -> int:
        """Updates applied. On an accelerator this waits for it."""
        return self._controller.state.num_updates + sum(int(r[APPLIED] > 0) for r in self._rows)

    # ------------------------------------------------------------------ ranks

    def join(self, ranks: Ranks) -> None:
        """Take part with these ranks from the open window on, which must be empty."""
        before = self._controller.state
        self.ranks, self._agreement = ranks, Agreement(ranks, self._tell_error)
        self._standstill = StandstillCheck(ranks)
        self._controller = self._controller.on_ranks(ranks.data)
        self._open_window()
        self._tell_of_change(before)

    def _tell_of_change(self, before: ControllerState) -> None:
        after = self._controller.state
        changes = []
        if before.num_ranks not in (0, after.num_ranks):
            changes.append(f"on {after.num_ranks} instead of {before.num_ranks} ranks")
        old, new = before.samples_per_micro_batch, after.samples_per_micro_batch
        if old and new and old != new:
            changes.append(f"with micro-batches of {new:g} instead of {old:g} samples")
        if changes:
            logger.info(
                "noise: goes on %s, with windows of %d instead of %d",
                *(" and ".join(changes), self.steps, before.accumulation_steps),
            )

    def start(
        self, groups: Sequence[Sequence[Tensor]], process_group: dist.ProcessGroup | None
    ) -> None:
        """See, before the first window, that every rank starts from the same: a collective.

        Raises:
            RuntimeError: ranks differ, which names what differs and how; or there are others than
                when the hooks were set.
        """
        self._agreement.see_ranks(groups, process_group)
        self.compare(starting_facts(groups, self.ranks))

    def compare(self, facts: Mapping[str, object]) -> None:
        """See that every rank starts from the same settings, state and facts: a collective.

        Raises:
            RuntimeError: ranks differ, which names what differs and how.
        """
        self._learn()
        own = {"settings": repr(self.config), **self._common_state()}
        self._agreement.compare({**facts, **own})

    def ddp_around(
        self, groups: Sequence[Sequence[Tensor]], model: nn.Module | None = None
    ) -> Collection[nn.Module]:
        """The DDP modules that wrap the parameters; see `DDPModules.around`."""
        return self._agreement.ddp_around(groups, model)

    def _tell_error(self, error: Exception) -> None:
        tell(self.observers, "on_error", error)

    # ------------------------------------------------------------------ what the loop tells

    def set_samples(self, samples: float, weight: float | None = None) -> None:
        """Say how many samples the next micro-batch holds, and its weight if that is another."""
        self.samples.tell(samples, weight, begun=self._num_windows > 0)
        if not self._controller.state.counts_samples:
            self._controller = self._controller.counting_samples()

    def summed_parts(self, totals: Tensor) -> Tensor:
        """Numbers of which each rank holds its part, summed over them if it does."""
        return self.ranks.sum_(totals, self.open_window) if self.ranks.sharded else totals

    def next_samples(self, device: torch.device, own: bool) -> tuple[float, float]:
        """The samples of the micro-batch that is taken now, and its weight in the window's mean.

        Where the ranks' gradients are averaged already, a weight that was told is averaged too:
        each rank's own would make their sums differ.

        Args:
            device: where numbers are summed over ranks.
            own: whether the gradient is this rank's own.
        """
        self.losses.keep()
        samples, weight, told = self.samples.take()
        averaged = self.ranks.all > 1 and not own and self.config.loss_reduction == "mean"
        if told and averaged and self.steps > 1:
            total = torch.tensor(weight, dtype=torch.float64, device=device)
            weight = self.ranks.sum_(total, self.open_window).item() / self.ranks.all
        return samples, weight

    def samples_thrown_away(self) -> tuple[float, float]:
        """The same for one of this rank's own that was thrown away before the next came."""
        self.losses.keep()
        return self.samples.take_oldest()

    # ------------------------------------------------------------------ windows and decisions

    def agree(
        self,
        measured: Measured,
        extra: Tensor | None = None,
        at_once: bool = True,
        rates: Rates | None = None,
        lead: float = math.inf,
        plain: list[float] | None = None,
        shows_data: Tensor | None = None,
        left: Tensor | None = None,
    ) -> Row:
        """Make a window's row, summed over the ranks; see `Agreement.sum_`.

        Args:
            measured: its gradients' norms.
            extra: further numbers to sum over the ranks, in place.
            at_once: whether the sums are needed before the window is closed.
            rates: what its update scales by, where ranks may differ in it.
            lead: see `Agreement.set_settings`.
            plain: see `Agreement.sum_`.
            shows_data: see `Agreement.sum_`.
            left: see `Agreement.sum_`.

        Raises:
            RuntimeError: ranks do not go together.
        """
        row = measured.row(self.losses.take())
        if self._clock and self._clock.untold:
            row[SECONDS] = self._clock.tell()
        if self.ranks.all > 1:
            used = {} if rates is None else {"factors of the window's length": astuple(rates)}
            self._agreement.set_settings({**self.settings(), **used}, lead)
            what = self.open_window
            self._agreement.sum_(
                row, self.num_groups, extra, what, at_once, plain, shows_data, left
            )
        return row

    @property
    def followed(self) -> Mapping[str, object]:
        """Other ranks' settings that the window's update is to be made with, if any are."""
        return self._agreement.followed

    def close_window(self, row: Row, lr: Callable[[], float]) -> None:
        """Queue a window; decide if a decision is due.

        Args:
            row: from `agree`, with how the window ended.
            lr: reads the user's learning rate; called only for a decision.
        """
        due = self.is_due
        self._rows.append(row)
        if due:
            self._decide(lr())
        self._open_window()
        if due:
            for observer in self.observers:
                observer(self.decisions[-1])

    @property
    def open_window(self) -> str:
        """The name of the open window, for errors."""
        return f"window {self._num_windows + 1}"

    @property
    def is_due(self) -> bool:
        """Whether the end of the open window brings a decision."""
        return (self._num_windows + 1) % self.config.decision_interval == 0

    @property
    def _num_windows(self) -> int:
        return self._controller.state.num_windows + len(self._rows)

    def _decide(self, lr: float) -> None:
        self._learn(together=True)
        seconds = self._clock.decide() if self._clock else None
        decision = self._conclude(lr, seconds)
        if self.ranks.all > 1:
            self._agreement.set_state(self._common_state())
        noise, steps = decision.noise, decision.accumulation_steps
        if noise is not None and noise.count >= self.config.min_count:
            self._agreement.suspicions.see_noise(noise, decision.batch / steps / decision.ranks)

    def _learn(self, together: bool = False) -> None:
        """Take in every queued row. This waits for the device."""
        rows, self._rows = self._rows, []
        self._agreement.check(together)
        if self._clock:
            self._clock.hear(read_seconds(rows, self.ranks.data))
        for window in read_rows(rows, self.ranks.data):
            self._take_in(window)
            self._standstill.see(window.applied)
            if window.norms is not None and not self.samples.are_told:  # with weights of their own
                self._agreement.suspicions.see_mean(window.norms)

    def shorten(self, steps: int, taken: int) -> None:
        """Let the open window, of which so many were taken, be shorter than was decided."""
        if not max(taken, 1) <= steps <= self.steps:
            raise ValueError(
                f"the open window is of {self.steps}, of which {taken} were taken: it cannot "
                f"become {steps}"
            )
        self.steps = steps

    def set_window(self, steps: int, is_reference: bool = False) -> None:
        """Take windows to be so long, where someone else makes them.

        Args:
            steps: their length.
            is_reference: whether it is what the user's rates are for.
        """
        state = replace(self._controller.state, accumulation_steps=steps, kept_steps=steps)
        if is_reference:
            state = replace(state, reference_steps=float(steps))
        self._controller = replace(self._controller, state=state)
        self._open_window()
        self._begin()

    def keep_window(self, steps: int, is_reference: bool = False) -> None:
        """Decide on windows of that length only, where someone else makes them.

        Args:
            steps: their length.
            is_reference: whether it is what the user's rates are for, as in a run's first window.
        """
        self.config = replace(
            self.config,
            accumulation_steps=steps,
            min_accumulation_steps=steps,
            max_accumulation_steps=steps,
        )
        self._controller = replace(self._controller, config=self.config)
        self.set_window(steps, is_reference or self._num_windows == 0)

    def _open_window(self) -> None:
        """Fix what the next window uses, so that nothing changes inside it."""
        self.steps = self._controller.window_steps(self._num_windows)
        self.measures = self._controller.measures(self._num_windows)
        self.max_norm = self._controller.state.max_norm if self.acts else math.inf

    # ------------------------------------------------------------------ state

    def to_numbers(self, dropped: int = 0) -> dict[str, Number]:
        """The whole state as plain numbers under fixed keys. This waits for the device.

        Args:
            dropped: micro-batches of the open window, which the state leaves behind.
        """
        self._learn()
        return to_saved(self._controller.state, dropped)

    def load_numbers(self, numbers: Mapping[str, Number]) -> None:
        """Go on from a saved state; what was queued since is forgotten."""
        self._go_on(self._controller.at(self._state_of(numbers)))

    def set_groups(self, names: Sequence[str]) -> None:
        """Measure further parameter groups: these are the names of all."""
        self._learn()
        self._controller = self._controller.with_groups(len(names) - self.num_groups)
        self.groups = tuple(names)
        self._begin()
