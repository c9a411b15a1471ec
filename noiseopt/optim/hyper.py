"""Hyper-parameters as one update uses them: scaled for it, and the user's own again after it.

Writing `group["lr"]` for good would compound with the recursive schedulers and be overwritten by
the closed-form ones. Scaled inside the step and taken back, it is exact for all of them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from noiseopt.control import Rates, bias_correction, scaled_beta2

Group = dict[str, Any]

# Two numbers for each group: the updates that entered Adam's second moment, and by how much the
# sum of log(beta2) over them differs from what the user's own beta2 would have made it.
UPDATES = "second_moment_updates"
EXCESS = "second_moment_excess"


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


def has_second_moment(optimizer_class: type[Optimizer]) -> bool:
    """Whether its beta2 is the decay of Adam's second moment."""
    return issubclass(optimizer_class, (Adam, AdamW))


def decouples_weight_decay(optimizer_class: type[Optimizer]) -> bool:
    """Whether its weight decay is decoupled from the gradient, as in AdamW."""
    muon = getattr(torch.optim, "Muon", AdamW)
    return issubclass(optimizer_class, (AdamW, muon))


def start_numbers(optimizer: Optimizer, group: Group) -> dict[str, float]:
    """The numbers of a group's second moment as it is, all of it taken in at one beta2.

    Empty for an optimizer that has none. This waits for the device if the group has a state.
    """
    if not has_second_moment(type(optimizer)):
        return {}
    steps = [optimizer.state[p]["step"] for p in group["params"] if p in optimizer.state]
    return {UPDATES: int(max(map(float, steps), default=0.0)), EXCESS: 0.0}


def scaled_values(
    group: Group, noise: dict[str, Any], rates: Rates, least_beta2: float, decoupled: bool
) -> Group:
    """What one update puts in place of a group's values; empty if it uses them as they are.

    Args:
        group: an optimizer's parameter group.
        noise: its numbers, if it has a second moment; they take in this update.
        rates: the factors to apply.
        least_beta2: the least beta2 that scaling may lead to.
        decoupled: whether weight decay is decoupled from the gradient where the group does not say.
    """
    values: Group = {}
    step = rates.lr
    if UPDATES in noise:
        beta2, correction = _second_moment(group["betas"][1], noise, rates, least_beta2)
        step *= correction
        if beta2 is not None:
            values["betas"] = (group["betas"][0], beta2)
    if step != 1:
        values["lr"] = group["lr"] * step
    decay = rates.weight_decay * rates.lr / step
    if group.get("decoupled_weight_decay", decoupled) and decay != 1:
        values["weight_decay"] = group["weight_decay"] * decay
    return values


def _second_moment(
    own: Any, noise: dict[str, Any], rates: Rates, least_beta2: float
) -> tuple[Any, float]:
    """This update's beta2 (None for the user's own) and the correction of its step."""
    noise[UPDATES] += 1
    if (rates.beta2 == 1 and noise[EXCESS] == 0) or float(own) == 0:
        return None, 1.0
    beta2 = scaled_beta2(float(own), rates.beta2, least_beta2)
    log_own = math.log(float(own))
    noise[EXCESS] += math.log(beta2) - log_own
    log_decay = noise[UPDATES] * log_own + noise[EXCESS]
    correction = bias_correction(beta2, noise[UPDATES], log_decay)
    kept = torch.full_like(own, beta2) if isinstance(own, Tensor) else beta2
    return kept, correction
