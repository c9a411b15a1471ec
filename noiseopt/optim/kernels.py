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
    them.

    Returns:
        Whether it now does.
    """
    groups = optimizer.param_groups
    if optimizer.state or not all(_takes_fused(optimizer, group) for group in groups):
        return False
    for group in groups:
        group["fused"] = True
    return True


def prefer_fused_in(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Let torch use its fused kernel in a new group too, if it can and the user chose none."""
    if _takes_fused(optimizer, group):
        group["fused"] = True


def give_up_fused(optimizer: Optimizer) -> None:
    """Leave the choice to torch again in groups for whose gradients it has no fused kernel.

    It has none for sparse ones, and for SGD's momentum none where some begins after the others.
    """
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
        if not group["fused"]:
            continue
        trained = [param for param in group["params"] if param.grad is not None]
        if any(param.grad.layout != torch.strided for param in trained):
            group["fused"] = None
        elif group["momentum"]:
            states = [optimizer.state.get(param, {}) for param in trained]
            begun = [state.get("momentum_buffer") is not None for state in states]
            if any(begun) and not all(begun):
                group["fused"] = None


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


def _takes_fused(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether torch has a fused kernel for a group: for SGD over DTensors it has none."""
    params = group["params"]
    has_one = isinstance(optimizer, Adam | AdamW) or (
        isinstance(optimizer, SGD) and not any(map(is_sharded, params))
    )
    chosen = group.get("fused", False) is not None or group.get("foreach") is not None
    if chosen or not has_one or not all(param.device.type in FUSED_ON for param in params):
        return False
    return bool(_default_to_fused_or_foreach(params, False, use_fused=True)[0])
