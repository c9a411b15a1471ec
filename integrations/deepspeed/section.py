"""The "noise_aware" section of a DeepSpeed config: read, checked, and held against the rest of it.

What is not measured rightly yet is refused here, before anything is built.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch.optim import Adagrad

from noiseopt.control import RATE_RULES, NoiseConfig
from noiseopt.integrations.deepspeed.refusals import (
    REBUILT_ADAGRAD,
    REFUSALS,
    device_of_offload,
)
from noiseopt.optim import NoiseAware

SECTION = "noise_aware"
SCHEDULES = ("samples", "updates")

# What DeepSpeed's own keys say, or what its engine always does.
_ELSEWHERE = {
    "accumulation": "the engine accumulates: leave it out",
    "accumulation_steps": "set gradient_accumulation_steps, which is the first window's length",
    "gradients": "the engine averages gradients over ranks: leave it out",
    "loss_reduction": "the engine divides the loss: leave it out",
    "max_norm": "set gradient_clipping, which stays the ceiling of the clipping threshold",
    "skip_nonfinite": "the engine skips every update that is not finite: leave it out",
}
_OWN = ("enabled", "rate_rule", "schedule")
_KEYS = tuple(item.name for item in fields(NoiseConfig) if item.name not in _ELSEWHERE)

# DeepSpeed's AdamW without a compiled kernel is torch's own.
_TORCH_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "noiseawareadamw": ("adamw", {"torch_adam": True}),
    "noiseawareadam": ("adam", {"torch_adam": True, "adam_w_mode": False}),
    "noiseawaresgd": ("SGD", {}),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the section and the rest of the config say.

    Attributes:
        config: how to measure and decide.
        rate_rule: "adam" or "sgd"; None to choose by the optimizer's class.
        schedule: what a step of the engine's learning-rate scheduler stands for: "samples" (the
            micro-batches of the config's gradient_accumulation_steps, however windows change) or
            "updates".
    """

    config: NoiseConfig
    rate_rule: str | None
    schedule: str


def read_section(config: Any) -> Settings | None:
    """Read the section of a `DeepSpeedConfig`.

    Returns:
        None where the config does not ask for it.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a key is unknown, a value out of range, or the config asks for something that is
            not measured rightly yet; names the key and what to do.
    """
    whole: Mapping[str, Any] = config._param_dict
    _check_name(whole)
    if SECTION not in whole and not _names_ours(config):
        return None
    section = whole.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise TypeError(
            f'"{SECTION}" is {section!r}: it must be an object, such as {{"mode": "auto"}}'
        )
    _check_keys(section)
    if not _bool(section, "enabled", True) or section.get("mode") == "off":
        return None
    for refusal in REFUSALS:
        if refusal.applies(config):
            raise ValueError(f'"{refusal.key}" with "{SECTION}": {refusal.remedy}')
    return Settings(_noise_config(section, config), _rule(section), _schedule(section))


def translate_optimizer(config: Any) -> None:
    """Put torch's optimizer into a `DeepSpeedConfig` that names one of ours.

    The engine measures and decides, so what is left of it is the update. Where the update is
    offloaded, DeepSpeed's own CPU kernel makes it.

    Raises:
        ValueError: it is not one that a config may name, or `noise` is among its parameters.
    """
    if not _names_ours(config):
        return
    name = config.optimizer_name
    if name.lower() not in _TORCH_NAMES:
        raise ValueError(
            f'"optimizer.type" is {name!r}: with DeepSpeed it may be NoiseAwareAdamW, '
            "NoiseAwareAdam or NoiseAwareSGD"
        )
    params = dict(config.optimizer_params or {})
    if "noise" in params:
        raise ValueError(f'"optimizer.params.noise": put it into the section "{SECTION}"')
    config.optimizer_name, extra = _TORCH_NAMES[name.lower()]
    if _offloads(config):
        extra = {key: value for key, value in extra.items() if key != "torch_adam"}
    config.optimizer_params = params | extra


def refuse_optimizer(optimizer: Any, config: Any) -> None:
    """Refuse an optimizer of the user's own that the engine cannot measure for.

    Raises:
        TypeError: it measures by itself, changes gradients into something else, or is replaced.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, NoiseAware) and optimizer.config.mode != "off":
        raise TypeError(
            f'optimizer= is a {name}, which measures by itself, and "{SECTION}" has the engine '
            "measure: pass the torch optimizer, or noise='off'"
        )
    if "muon" in name.lower() or "onebit" in name.lower() or name == "ZeroOneAdam":
        raise TypeError(
            f"optimizer= is a {name}, which leaves no plain mean gradient to measure for "
            f'"{SECTION}": use AdamW'
        )
    if isinstance(optimizer, Adagrad) and config.zero_enabled:
        raise TypeError(f'optimizer= is a {name} with "{SECTION}": {REBUILT_ADAGRAD}')


def _names_ours(config: Any) -> bool:
    name = config.optimizer_name
    return isinstance(name, str) and name.lower().startswith("noiseaware")


def _check_name(whole: Mapping[str, Any]) -> None:
    """Refuse a misspelt section, which DeepSpeed would pass over."""
    plain = SECTION.replace("_", "")
    for key in whole:
        letters = "".join(filter(str.isalpha, str(key).lower()))
        if key != SECTION and difflib.get_close_matches(letters, [plain], 1, 0.8):
            raise ValueError(
                f'"{key}" in the DeepSpeed config is unknown: did you mean "{SECTION}"?'
            )


def _check_keys(section: Mapping[str, Any]) -> None:
    for key in section:
        if key in _ELSEWHERE:
            raise ValueError(f'"{SECTION}.{key}" is said elsewhere: {_ELSEWHERE[key]}')
        if key not in _KEYS + _OWN:
            near = difflib.get_close_matches(str(key), _KEYS + _OWN, 1, 0.5)
            hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(_KEYS + _OWN)}"
            raise ValueError(f'"{SECTION}.{key}" is unknown: {hint}')


def _noise_config(section: Mapping[str, Any], config: Any) -> NoiseConfig:
    values = {key: value for key, value in section.items() if key in _KEYS}
    values.setdefault("samples_per_micro_batch", config.train_micro_batch_size_per_gpu)
    ceiling, steps = config.gradient_clipping, config.gradient_accumulation_steps
    if isinstance(ceiling, bool) or not isinstance(ceiling, int | float):
        raise TypeError(f'"gradient_clipping" is {ceiling!r}: it must be a number, 0 for none')
    try:
        return NoiseConfig(
            **values,
            accumulation="external",
            # A float where DeepSpeed has derived it from batch sizes and sequence_parallel_size.
            accumulation_steps=int(steps) if steps == int(steps) else steps,
            max_norm=ceiling if ceiling > 0 else math.inf,
        )
    except (TypeError, ValueError) as error:
        text = str(error)
        for ours, theirs in (
            ("NoiseConfig.accumulation_steps", '"gradient_accumulation_steps"'),
            ("NoiseConfig.", f"{SECTION}."),
            ("from min_", f"from {SECTION}.min_"),
            ("to max_", f"to {SECTION}.max_"),
        ):
            text = text.replace(ours, theirs)
        raise type(error)(f"in the DeepSpeed config, {text}") from error


def _rule(section: Mapping[str, Any]) -> str | None:
    rule = section.get("rate_rule")
    if rule is not None and rule not in list(RATE_RULES):
        raise ValueError(f'"{SECTION}.rate_rule" is {rule!r}: it must be one of {list(RATE_RULES)}')
    return rule


def _schedule(section: Mapping[str, Any]) -> str:
    schedule = section.get("schedule", SCHEDULES[0])
    if schedule not in SCHEDULES:
        raise ValueError(
            f'"{SECTION}.schedule" is {schedule!r}: it must be one of {list(SCHEDULES)}'
        )
    return str(schedule)


def _bool(section: Mapping[str, Any], key: str, default: bool) -> bool:
    value = section.get(key, default)
    if not isinstance(value, bool):
        raise TypeError(f'"{SECTION}.{key}" is {value!r}: it must be true or false')
    return value


def _offloads(config: Any) -> bool:
    offload = config.zero_config.offload_optimizer
    return offload is not None and device_of_offload(offload) != "none"
