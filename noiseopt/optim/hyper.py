"""Hyper-parameters as one update uses them: scaled for it, and the user's own again after it.

Writing `group["lr"]` for good would compound with the recursive schedulers and be overwritten by
the closed-form ones. Scaled inside the step and taken back, it is exact for all of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from noiseopt.control import Rates, bias_correction, scaled_beta

Group = dict[str, Any]

# The numbers of each group: the updates that entered Adam's moments; by how much the sums of
# log(beta1) and log(beta2) over them differ from what the user's own betas would have made them;
# and those sums of the user's own, each 0 until its beta is scaled for the first time.
UPDATES = "second_moment_updates"
EXCESSES = ("first_moment_excess", "second_moment_excess")
OWN_DECAYS = ("first_moment_own_decay", "second_moment_own_decay")
MOMENTS = (UPDATES, *EXCESSES, *OWN_DECAYS)
_SUMS = tuple(zip(EXCESSES, OWN_DECAYS, strict=True))


@contextmanager
def overridden(groups: Sequence[Group], values: Sequence[Group]) -> Iterator[None]:
    """Put values into groups for the duration of a with block; identities are kept."""
    saved = [{key: group[key] for key in new} for group, new in zip(groups, values, strict=True)]
    for group, new in zip(groups, values, strict=True):
        group.update(new)
    try:
        yield
    finally:
        for group, old in zip(groups, saved, strict=True):
            group.update(old)


def settings_of(optimizer: Optimizer) -> dict[str, object]:
    """The groups' hyper-parameters, as far as looking at them waits for no device."""
    return {
        f"{name} of group {index}": _plain(value)
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name in optimizer.defaults and _is_plain(value)
    }


def values_from(settings: Mapping[str, object], groups: Sequence[Group]) -> list[Group]:
    """What `settings_of` another rank's optimizer says of each group, tensors where it has them."""
    return [
        {
            name: _like(own, settings[key])
            for name, own in group.items()
            if (key := f"{name} of group {index}") in settings
        }
        for index, group in enumerate(groups)
    ]


def _like(own: Any, value: Any) -> Any:
    if isinstance(own, tuple | list):
        return tuple(map(_like, own, value))
    if isinstance(own, Tensor):
        return torch.full_like(own, value)
    is_count = isinstance(own, int) and not isinstance(own, bool) and float(value).is_integer()
    return int(value) if is_count else value


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, Tensor):
        return value.is_cpu and value.numel() == 1
    return isinstance(value, int | float)


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    # 1 and 1.0 are the same, and are to look the same.
    return value if isinstance(value, bool) else float(value)  # type: ignore[arg-type]


def has_moments(optimizer_class: type[Optimizer]) -> bool:
    """Whether its betas are the decays of Adam's two moments."""
    return issubclass(optimizer_class, (Adam, AdamW))


def decouples_weight_decay(optimizer_class: type[Optimizer]) -> bool:
    """Whether its weight decay is decoupled from the gradient, as in AdamW."""
    muon = getattr(torch.optim, "Muon", AdamW)
    return issubclass(optimizer_class, (AdamW, muon))


def start_numbers(optimizer: Optimizer, group: Group) -> dict[str, float]:
    """The numbers of a group's moments as they are, all of them taken in at the same betas.

    Empty for an optimizer that has none. This waits for the device if the group has a state.
    """
    if not has_moments(type(optimizer)):
        return {}
    # Looking at what a parameter has none of yet leaves an empty state there.
    states = [optimizer.state.get(param, {}) for param in group["params"]]
    steps = [float(state["step"]) for state in states if "step" in state]
    return numbers_after(int(max(steps, default=0.0)))


def numbers_after(num_updates: int) -> dict[str, float]:
    """The numbers of moments that took in so many updates at the same betas."""
    return {UPDATES: num_updates, **dict.fromkeys((*EXCESSES, *OWN_DECAYS), 0.0)}


def scaled_values(
    group: Group, noise: dict[str, Any], rates: Rates, least_beta2: float, decoupled: bool
) -> Group:
    """What one update puts in place of a group's values; empty if it uses them as they are.

    Args:
        group: an optimizer's parameter group.
        noise: its numbers, if it has moments; they take in this update.
        rates: the factors to apply.
        least_beta2: the least beta2 that scaling may lead to.
        decoupled: whether weight decay is decoupled from the gradient where the group does not say.
    """
    values: Group = {}
    step = rates.lr
    if UPDATES in noise:
        betas, correction = scaled_betas(group["betas"], noise, rates, least_beta2)
        step *= correction
        if betas is not None:
            values["betas"] = betas
    if step != 1:
        values["lr"] = group["lr"] * step
    decay = rates.weight_decay * rates.lr / step
    if group.get("decoupled_weight_decay", decoupled) and decay != 1:
        values["weight_decay"] = group["weight_decay"] * decay
    return values


def scaled_betas(
    own: tuple[Any, Any], noise: dict[str, Any], rates: Rates, least_beta2: float
) -> tuple[tuple[Any, Any] | None, float]:
    """This update's betas (None for the user's own) and the correction of its step.

    The group's numbers, `noise`, take in this update.
    """
    noise[UPDATES] += 1
    excesses = [noise.get(key, 0.0) for key in EXCESSES]  # states from before lack some
    if rates.beta1 == rates.beta2 == 1 and not any(excesses):
        return None, 1.0
    exponents, least = (rates.beta1, rates.beta2), (0.0, least_beta2)
    used, corrections = [], []
    for keys, beta, exponent, floor in zip(_SUMS, own, exponents, least, strict=True):
        scaled, correction = _moment(float(beta), keys, noise, exponent, floor)
        used.append(torch.full_like(beta, scaled) if isinstance(beta, Tensor) else scaled)
        corrections.append(correction)
    return (used[0], used[1]), math.sqrt(corrections[1]) / corrections[0]


def _moment(
    own: float, keys: tuple[str, str], noise: dict[str, Any], exponent: float, least: float
) -> tuple[float, float]:
    """A moment's beta in this update, and by what torch's debiased moment is too large."""
    if own == 0:
        return own, 1.0
    beta, updates, log_own = scaled_beta(own, exponent, least), noise[UPDATES], math.log(own)
    excess = noise.get(keys[0], 0.0) + math.log(beta) - log_own
    own_decay = (noise.get(keys[1], 0.0) or (updates - 1) * log_own) + log_own
    noise.update(zip(keys, (excess, own_decay), strict=True))
    return beta, bias_correction(beta, own, updates, own_decay + excess, own_decay)
