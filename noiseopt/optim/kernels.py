"""Which of torch's kernels makes the updates.

On a GPU only its fused ones skip an update that is not finite without the host waiting for the
device: they are preferred where the user chose none.
"""

from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach

from noiseopt.capture import is_sharded

FUSED_ON = ("cuda",)  # kinds of devices


def prefer_fused(optimizer: Optimizer) -> bool:
    """Let torch use its fused kernel, if it can and the user chose none.

    Not for an optimizer that has a state, whose step counts may not be where that kernel reads
    them; nor for SGD over DTensors, for which torch has none.

    Returns:
        Whether it now does.
    """
    groups = optimizer.param_groups
    chosen = any(
        group.get("fused", False) is not None or group.get("foreach") is not None
        for group in groups
    )
    params = [param for group in groups for param in group["params"]]
    has_one = isinstance(optimizer, Adam | AdamW) or (
        isinstance(optimizer, SGD) and not any(map(is_sharded, params))
    )
    if chosen or optimizer.state or not has_one:
        return False
    if not all(param.device.type in FUSED_ON for param in params):
        return False
    if not _default_to_fused_or_foreach(params, False, use_fused=True)[0]:
        return False
    _set_fused(optimizer, True)
    return True


def give_up_fused_if_sparse(optimizer: Optimizer) -> None:
    """Leave the choice to torch again where gradients are sparse, which no fused kernel takes."""
    grads = (param.grad for group in optimizer.param_groups for param in group["params"])
    if any(grad is not None and grad.layout != torch.strided for grad in grads):
        _set_fused(optimizer, None)


def keep_fused(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state to load, with the fused kernel where it says nothing and the optimizer has that.

    As that of torch's own optimizer on a GPU: loaded as it is, every update would wait.
    """
    pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    keeps = [_keeps_fused(group, saved) for group, saved in pairs]
    if not any(keeps) or len(keeps) != len(state_dict["param_groups"]):
        return state_dict
    saved_groups = zip(state_dict["param_groups"], keeps, strict=True)
    groups = [{**saved, "fused": True} if keep else saved for saved, keep in saved_groups]
    return {**state_dict, "param_groups": groups}


def _keeps_fused(group: dict[str, Any], saved: dict[str, Any]) -> bool:
    there = all(param.device.type in FUSED_ON for param in group["params"])
    silent = saved.get("fused", False) is None and saved.get("foreach") is None
    return bool(group.get("fused")) and there and silent


def _set_fused(optimizer: Optimizer, fused: bool | None) -> None:
    optimizer.defaults["fused"] = fused
    for group in optimizer.param_groups:
        group["fused"] = fused
