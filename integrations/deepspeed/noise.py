"""What an engine measures and decides: its windows from the first backward to the update."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from noiseopt.adaptation import Adaptation
from noiseopt.capture import STEPS, Row, end_row
from noiseopt.control import Decision, NoiseConfig, group_names, metrics
from noiseopt.deciding import Number
from noiseopt.distributed import Ranks, digest
from noiseopt.integrations.deepspeed.clearing import ClearingGuard, SetterWatch
from noiseopt.integrations.deepspeed.control import EngineControl
from noiseopt.integrations.deepspeed.leaves import LeafNorms
from noiseopt.integrations.deepspeed.lengths import WindowLengths
from noiseopt.integrations.deepspeed.loop import LoopWatch
from noiseopt.integrations.deepspeed.section import Settings
from noiseopt.integrations.deepspeed.window import EngineWindow
from noiseopt.integrations.deepspeed.wrappers import wrapper_of
from noiseopt.optim.hyper import settings_of
from noiseopt.readings import NoiseReadings
from noiseopt.words import describe

logger = logging.getLogger("noiseopt")


class EngineNoise(NoiseReadings):
    """Measures the gradient noise of a DeepSpeed engine, and carries out what is decided.

    It is `engine.noise_aware`, and has the readings of an optimizer.

    Attributes:
        tells_samples: whether the loop has said how many samples micro-batches hold.

    Args:
        engine: the engine, whose optimizer is there already.
        settings: what its config says.

    Raises:
        ValueError: the engine's optimizer cannot be measured.
    """

    _adaptation: Adaptation

    def __init__(self, engine: Any, settings: Settings) -> None:
        self._engine = engine
        self._wrapper = wrapper_of(engine)
        self._groups = self._wrapper.params()
        group, size = engine.data_parallel_group, engine.dp_world_size
        device, over = torch.device(engine.device), (group,) if size > 1 else ()
        ranks = Ranks(size, 1, self._wrapper.sharded, over, device)
        sgd = isinstance(self._wrapper.basic, torch.optim.SGD)
        rule = settings.rate_rule or ("sgd" if sgd else "adam")
        names = group_names(self._wrapper.basic.param_groups)
        self._adaptation = Adaptation(settings.config, rule, names, ranks)
        self._adaptation.settings = lambda: settings_of(self._wrapper.basic)
        self._leaves = LeafNorms(self._groups, device, self._wrapper.spends_grad)
        self._control = EngineControl(engine, self._wrapper, settings)
        self._loop = LoopWatch(engine, self._wrapper, self._leaves, self._control)
        self._window = EngineWindow(
            engine, self._wrapper, self._leaves, self._loop, self._adaptation
        )
        self._lengths = WindowLengths(
            engine, self._adaptation, self._control, self._leaves, self._loop
        )
        self._parts_of_losses: list[Tensor] = []  # of the open window's, which the loop has divided
        self._ended: tuple[Row, float] | None = None  # a window's row, and the user's rate in it
        self._guard = ClearingGuard(engine, self._loop.keeps_gradients, self._loop.see_clearing)
        params = [param for params in self._groups for param in params]
        self._setters = SetterWatch(engine.optimizer, params, self._loop.see_setter)
        self._started = self.tells_samples = False
        self._warned_of_open_window = False
        if engine.monitor.enabled:
            self.add_observer(self._write_events)
        if not engine.managed_gradient_accumulation():
            self.leave_windows_to_loop("managed_gradient_accumulation=false")

    # ------------------------------------------------------------------ what is offered

    @property
    def config(self) -> NoiseConfig:
        """The settings."""
        return self._adaptation.config

    @property
    def num_updates(self) -> int:
        """Updates applied. On an accelerator this waits for it."""
        return self._adaptation.num_updates

    @property
    def lr_factor(self) -> float:
        """The factor on the scheduler's learning rate in the open window."""
        return self._adaptation.rates(self.accumulation_steps).lr

    @property
    def max_norm(self) -> float:
        """The norm at which the open window's gradient is clipped; infinite for never."""
        return self._control.max_norm

    @property
    def makes_windows(self) -> bool:
        """Whether windows are as long as was decided, and not as someone else says."""
        return self._control.makes_windows

    def set_samples(self, samples: float, weight: float | None = None) -> None:
        """Say how many samples the next micro-batch holds; the engine weighs all alike.

        Raises:
            ValueError: a number is not positive and finite.
        """
        self.tells_samples = True
        super().set_samples(samples, weight)

    @property
    def taken(self) -> int:
        """Micro-batches that the open window has had, without those that were thrown away."""
        return 0 if self._loop.threw_away else len(self._leaves)

    def detach(self) -> None:
        """Stop measuring: remove every hook."""
        self._drop_thrown_away()
        self._lengths.tell_of_rest()
        self._leaves.detach()
        self._guard.remove()
        self._setters.remove()

    def shorten_window(self, steps: int) -> None:
        """Say before its first micro-batch that the open window ends early, at the end of the data.

        Raises:
            RuntimeError: it has begun, or the loop says where windows end.
            ValueError: it would not be shorter.
        """
        self._drop_thrown_away()
        self._lengths.shorten(steps)

    def lets_clear(self) -> bool:
        """Whether the engine's `zero_grad` is to clear gradients, as it will then."""
        keeps = self._loop.keeps_gradients()
        if not keeps:
            self._loop.see_clearing(by_optimizer=False)
        return not keeps

    def saving(self) -> AbstractContextManager[None]:
        """Keep out of a checkpoint what others would take for the user's."""
        return self._control.clipping_as_configured()

    # ------------------------------------------------------------------ one window

    @contextmanager
    def reading(self, loss: Tensor, divided: bool) -> Iterator[None]:
        """Read what the backward of a micro-batch's loss brings.

        Args:
            loss: the loss.
            divided: whether the loop has divided it by the window's length.
        """
        self._drop_thrown_away()
        self._loop.begin_backward()
        with self._leaves.reading(loss, self._adaptation.measures):
            yield
        self._loop.end_backward()
        self._adaptation.samples.bind()
        if divided:
            self._parts_of_losses.append(loss.detach().clone())
            self._lengths.loop_divides = True
        else:
            self._adaptation.losses.tell(loss)

    def _drop_thrown_away(self) -> None:
        """Take a window that begins again to have had nothing."""
        if self._loop.begins_again:
            self._leaves.clear()
            self._parts_of_losses.clear()
            self._adaptation.losses.forget()
            self._adaptation.samples.unbind()
            self._loop.begin_again()

    def lead(self, set_window: Callable[[int], None]) -> None:
        """Have a loop that says where windows end make each as long as was decided.

        Args:
            set_window: called with the length of every window, when it opens.

        Raises:
            RuntimeError: the loop has ended a window by itself before.
        """
        self._lengths.lead(set_window)

    def leave_windows_to_loop(self, why: str) -> None:
        """Keep windows as long as they are: someone else says where they end.

        Raises:
            RuntimeError: their length was changed before.
        """
        self._lengths.leave_to_loop(why, begun=self._started or self.taken > 0)

    def end_reduction(self) -> None:
        """Take it that gradients were reduced outside of backward and step."""
        self._loop.end_reduction()

    def begin_step(self) -> None:
        """See that the loop calls `engine.step`."""
        self._loop.begin_step()

    @contextmanager
    def update(self, lr_kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Measure before the engine's update, lend it the rates, and close the window after it.

        Args:
            lr_kwargs: what the scheduler's `step` is to be called with.

        Raises:
            RuntimeError: ranks disagree, or the engine has lost micro-batches.
        """
        passes = len(self._leaves)
        self._loop.begin_update()
        self._loop.check_passes(passes)
        if not self._started:
            self._start()
        self._tell_divided_losses(passes)
        lends = self._adaptation.acts and self._wrapper.takes_norm
        at_once = (lends and self._wrapper.sharded) or self._control.loop_ends_windows
        row, norm = self._window.agree(passes, at_once)
        if passes == 0 and row[STEPS] == 0:  # nor has any other rank had a backward
            self._leaves.clear()
            self._loop.begin_window()
            yield
            return
        steps = self._lengths.close(row)
        lr, rates = self._user_lr(), self._adaptation.rates(steps)
        lent_norm = self._wrapper.lent_norm(norm) if lends else nullcontext()
        with self._control.lent(rates, steps, lr_kwargs), self._window.withheld(norm), lent_norm:
            yield
        applied = self._engine.was_step_applied()
        end_row(row, applied, applied and self._window.applied_norm(norm) > self.max_norm)
        self._leaves.clear()
        self._ended = row, lr

    def close_window(self) -> None:
        """After a step: decide if it was due, and give the engine its next window.

        Observers come last but for that: one that raises finds everything in place.
        """
        if self._ended is None:
            return
        (row, lr), self._ended = self._ended, None
        try:
            self._adaptation.close_window(row, lambda: lr)
        finally:
            self._lengths.open()

    def _tell_divided_losses(self, passes: int) -> None:
        """Tell those that the loop has divided by its window's length, which shows only now."""
        own = self._control.loop_ends_windows
        parts = passes if own else self._engine.gradient_accumulation_steps()
        for loss in self._parts_of_losses:
            self._adaptation.losses.tell(loss * parts)
        self._parts_of_losses.clear()

    # ------------------------------------------------------------------ ranks and words

    def _start(self) -> None:
        self._started = True
        shapes = [[(_shape(p), p.dtype) for p in params] for params in self._groups]
        facts = {"digest of the parameters' shapes and types": digest(shapes)}
        self._adaptation.compare(facts)
        num_params = sum(map(len, self._groups))
        if self._engine.global_rank == 0:
            logger.info("%s", describe(self._adaptation, num_params))
            logger.info(
                "noise: clipping at most at %s, which is the config's gradient_clipping (1.0 where "
                "it says nothing)",
                self.config.max_norm,
            )

    def _user_lr(self) -> float:
        return max(float(group["lr"]) for group in self._wrapper.param_groups)

    def _write_events(self, decision: Decision) -> None:
        """Send a decision to wandb, TensorBoard and CSV files, as far as the config opens them."""
        samples = self._engine.global_samples
        values = metrics(decision, self._adaptation.groups)
        events = [(name, value, samples) for name, value in values.items()]
        self._engine.monitor.write_events(events)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers. An open window is left behind, and counted."""
        dropped = self.taken
        if dropped and not self._warned_of_open_window:
            self._warned_of_open_window = True
            self._adaptation.ranks.warn(
                f"the checkpoint was saved inside a window, after {dropped} of "
                f"{self._adaptation.steps} micro-batches: a run that resumes from it starts "
                "the window again; save where engine.was_step_applied() is true to lose nothing"
            )
        return {
            "numbers": self._adaptation.to_numbers(dropped),
            "control": self._control.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, and give the engine its window and clipping threshold.

        Raises:
            ValueError: it is of another version or number of groups; nothing is changed here then.
        """
        numbers: dict[str, Number] = state["numbers"]
        self._adaptation.load_numbers(numbers)
        self._control.load_state_dict(state["control"])
        self._start_anew()

    def restart(self) -> None:
        """Begin as on the first day, as after loading a checkpoint that holds no state of ours."""
        self._adaptation.restart()
        self._control.restart()
        self._start_anew()

    def _start_anew(self) -> None:
        self._leaves.clear()
        self._parts_of_losses.clear()
        self._started = False
        # What the checkpoint has brought back of the engine's own may differ from ours.
        acts = self._adaptation.acts
        self._control.set_max_norm(self._adaptation.max_norm if acts else self.config.max_norm)
        self._lengths.go_on()


def _shape(param: Any) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has taken apart."""
    return tuple(getattr(param, "ds_shape", param.shape))
