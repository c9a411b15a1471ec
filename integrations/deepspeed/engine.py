"""DeepSpeed's engine, noise-aware where its config says so."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch.optim import Optimizer

from noiseopt.integrations.deepspeed.noise import EngineNoise
from noiseopt.integrations.deepspeed.section import (
    SECTION,
    read_section,
    refuse_optimizer,
    translate_optimizer,
)

logger = logging.getLogger("noiseopt")


class NoiseAwareEngine(DeepSpeedEngine):  # type: ignore[misc]
    """A `DeepSpeedEngine`; one without the section in its config is left as it is.

    Attributes:
        noise_aware: what it measures and decides; None without the section, or an optimizer.
    """

    noise_aware: EngineNoise | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs["config_class"]
        settings = read_section(config)
        if settings is not None:
            kwargs["optimizer"] = _checked(kwargs.get("optimizer"), config)
            _refuse_parallel_model(kwargs.get("mpu"))
        translate_optimizer(config)
        super().__init__(*args, **kwargs)
        if settings is not None and self.basic_optimizer is None:
            _tell_of_no_optimizer(self.global_rank)
        elif settings is not None:
            self._refuse_what_was_built()
            self.noise_aware = EngineNoise(self, settings)

    def _refuse_what_was_built(self) -> None:
        """Refuse what only shows when the engine is there."""
        if self.has_moe_layers:
            raise ValueError(
                f'experts with "{SECTION}" are not measured rightly yet: leave out one of the two'
            )
        if self.sequence_parallel_size > 1:
            raise ValueError(
                f"sequences are spread over {self.sequence_parallel_size} ranks, which with "
                f'"{SECTION}" is not measured rightly yet: leave out one of the two'
            )

    def backward(self, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        """Run a micro-batch's backward, and read its gradient's norm."""
        if self.noise_aware is None:
            return super().backward(loss, retain_graph, scale_wrt_gas)
        with self.noise_aware.reading(loss, divided=not scale_wrt_gas):
            return super().backward(loss, retain_graph, scale_wrt_gas)

    def step(self, lr_kwargs: Any = None) -> None:
        """Take a micro-batch; at the window's end update, and open the next window."""
        if self.noise_aware is not None:
            self.noise_aware.begin_step()
        super().step(lr_kwargs)
        if self.noise_aware is not None:
            self.noise_aware.close_window()

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.noise_aware is None:
            super()._take_model_step(lr_kwargs)
            return
        with self.noise_aware.update(lr_kwargs or {}):
            super()._take_model_step(lr_kwargs)

    def zero_grad(self) -> None:
        """Clear gradients, but not those of an open window, which its update is to take."""
        if self.noise_aware is None or self.noise_aware.lets_clear():
            super().zero_grad()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the next micro-batch ends a window, as Accelerate does before each."""
        self._leave_windows("set_gradient_accumulation_boundary()")
        super().set_gradient_accumulation_boundary(is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate without reduction, as DeepSpeed has it."""
        self._leave_windows("no_sync()")
        with super().no_sync():
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Accumulate several backwards to one step, as DeepSpeed has it."""
        self._leave_windows("coalesce_grad_reduction()")
        with super().coalesce_grad_reduction():
            yield
        if self.noise_aware is not None:
            self.noise_aware.end_reduction()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Set the batch, as in DeepSpeed, unless it is decided by the noise."""
        if self.noise_aware is not None and self.noise_aware.makes_windows:
            raise RuntimeError(
                "set_train_batch_size() while the noise decides on it: limit it by "
                f'"{SECTION}": {{"max_accumulation_steps": ...}}, or set "mode" to "advise"'
            )
        super().set_train_batch_size(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Set the micro-batch, as in DeepSpeed, if the loop tells how many samples each holds."""
        if self.noise_aware is not None and not self.noise_aware.tells_samples:
            raise RuntimeError(
                "set_train_micro_batch_size() while every micro-batch counts as "
                f"{self.noise_aware.config.samples_per_micro_batch} samples: from the first one "
                "on, call engine.noise_aware.set_samples(n) before each"
            )
        super().set_train_micro_batch_size(micro_batch_size)

    def _leave_windows(self, why: str) -> None:
        if self.noise_aware is not None:
            self.noise_aware.leave_windows_to_loop(why)

    def save_checkpoint(
        self, save_dir: str, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Save a checkpoint, with what was measured and decided in its client state."""
        state = dict(client_state or {})
        if self.noise_aware is None:
            return super().save_checkpoint(save_dir, tag, state, *args, **kwargs)
        state[SECTION] = self.noise_aware.state_dict()
        with self.noise_aware.saving():
            return super().save_checkpoint(save_dir, tag, state, *args, **kwargs)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, and go on with its window, rates and clipping threshold.

        With `load_module_only`, or without the optimizer's state, measuring starts anew.

        Raises:
            RuntimeError: a window is open; nothing is loaded then.
            ValueError: the state is of another version or number of parameter groups. What
                DeepSpeed itself has loaded by then stays.
        """
        if self.noise_aware is not None:
            _refuse_open_window(self.noise_aware)
        with nullcontext() if self.noise_aware is None else _explaining_ranks():
            path, state = super().load_checkpoint(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                *args,
                **kwargs,
            )
        ours = state.pop(SECTION, None) if isinstance(state, dict) else None
        if self.noise_aware is not None and path is not None:
            if ours is not None and load_optimizer_states and not load_module_only:
                self.noise_aware.load_state_dict(ours)
            else:
                self.noise_aware.restart()
        return path, state

    def destroy(self) -> None:
        """Remove the hooks, and free what DeepSpeed holds."""
        if self.noise_aware is not None:
            self.noise_aware.detach()
        super().destroy()


def _tell_of_no_optimizer(rank: int) -> None:
    if rank == 0:
        logger.warning(
            "noise: the engine has no optimizer, so nothing of it is measured: where it is to "
            'train, give the config an "optimizer", or pass optimizer='
        )


@contextmanager
def _explaining_ranks() -> Iterator[None]:
    try:
        yield
    except ZeRORuntimeException as error:
        raise type(error)(
            f"{error} Convert it with python -m deepspeed.checkpoint.ds_to_universal, and say "
            '"checkpoint": {"load_universal": true}'
        ) from error


def _refuse_open_window(noise: EngineNoise) -> None:
    if noise.taken:
        raise RuntimeError(
            f"load_checkpoint() after {noise.taken} of {noise.accumulation_steps} micro-batches of "
            "a window, whose gradients DeepSpeed would keep: call it where "
            "engine.was_step_applied(), or after optimizer.zero_grad() in place of the step, where "
            "that throws them away (at stage 2 in windows of 1 only)"
        )


def refusing(engine_class: type[Any]) -> type[Any]:
    """An engine class that refuses a config with the section instead of passing it over."""

    class Refusing(engine_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if read_section(kwargs["config_class"]) is not None:
                raise ValueError(
                    f'"{SECTION}" with a {engine_class.__name__} is not measured rightly yet: '
                    "leave the section out, or use a plain engine"
                )
            translate_optimizer(kwargs["config_class"])
            super().__init__(*args, **kwargs)

    Refusing.__name__, Refusing.__qualname__ = engine_class.__name__, engine_class.__qualname__
    return Refusing


def _checked(optimizer: Any, config: Any) -> Any:
    """An optimizer, or what will make one, if it is not to be refused."""
    if optimizer is None or isinstance(optimizer, Optimizer):
        refuse_optimizer(optimizer, config)
        return optimizer

    def make(params: Any) -> Any:
        made = optimizer(params)
        refuse_optimizer(made, config)
        return made

    return make


def _refuse_parallel_model(mpu: Any) -> None:
    size = getattr(mpu, "get_model_parallel_world_size", lambda: 1)()
    if size > 1:
        raise ValueError(
            f'mpu= spreads the model over {size} ranks, which with "{SECTION}" is not measured '
            "rightly yet: leave out one of the two"
        )
