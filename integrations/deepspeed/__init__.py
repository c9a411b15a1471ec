"""DeepSpeed: training that measures its noise, switched on by a section of the config.

    { "train_micro_batch_size_per_gpu": 8,
      "optimizer": {"type": "NoiseAwareAdamW", "params": {"lr": 3e-4}},
      "noise_aware": {"mode": "auto", "max_accumulation_steps": 64},
      "zero_optimization": {"stage": 3} }

Either call `initialize` from here in place of `deepspeed.initialize`, or call `enable()` once: then
`deepspeed.initialize` itself, and whatever calls it, honours the section. Nothing of DeepSpeed is
changed before that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed

from noiseopt.integrations.deepspeed.engine import NoiseAwareEngine as NoiseAwareEngine
from noiseopt.integrations.deepspeed.engine import refusing
from noiseopt.integrations.deepspeed.noise import EngineNoise as EngineNoise

_REFUSING = ("DeepSpeedHybridEngine", "DualPipeVEngine", "PipelineEngine")
# What to do without an extension of DeepSpeed's.
_BUILDS = {
    "deepspeed_shm_comm": 'set deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] to False',
    "cpu_adam": "leave out the offload of the optimizer",
}
_before: dict[str, Any] = {}


def initialize(*args: Any, **kwargs: Any) -> Any:
    """Do what `deepspeed.initialize` does, honouring the section "noise_aware" of the config.

    Args:
        *args: as for `deepspeed.initialize`.
        **kwargs: as for `deepspeed.initialize`.

    Returns:
        The engine, whose `noise_aware` tells what is measured and decided, the optimizer, the
        dataloader and the learning-rate scheduler.

    Raises:
        TypeError: a value of the section, or the optimizer, is of the wrong type.
        ValueError: the section is wrong, or contradicts the rest of the config.
        RuntimeError: DeepSpeed could not compile one of its extensions.
    """
    with _enabled(), _explaining_builds():
        return deepspeed.initialize(*args, **kwargs)


def enable() -> None:
    """Have `deepspeed.initialize` honour the section from now on; twice is once."""
    if _before:
        return
    replacements = {"DeepSpeedEngine": NoiseAwareEngine}
    replacements |= {name: refusing(getattr(deepspeed, name)) for name in _REFUSING}
    for name, engine_class in replacements.items():
        _before[name] = getattr(deepspeed, name)
        setattr(deepspeed, name, engine_class)


def disable() -> None:
    """Undo `enable`; engines that were built in between stay as they are."""
    while _before:
        setattr(deepspeed, *_before.popitem())


@contextmanager
def _explaining_builds() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        remedy = next((_BUILDS[op] for op in _BUILDS if op in str(error)), None)
        if remedy is None:
            raise
        raise RuntimeError(
            f"{error} DeepSpeed compiles it when it is first used: install ninja and a C++ "
            f"compiler, or {remedy}"
        ) from error


@contextmanager
def _enabled() -> Iterator[None]:
    was = bool(_before)
    enable()
    try:
        yield
    finally:
        if not was:
            disable()
