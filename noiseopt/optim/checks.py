"""What a noise-aware optimizer refuses, each with the remedy, before anything is changed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from noiseopt.capture import is_sharded

# What torch's optimizers keep of a parameter in its own shape, and what their updates need.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
SETTINGS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")
NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")


def check_group(group: dict[str, Any]) -> None:
    """Refuse parameters and arguments that cannot be measured.

    Raises:
        ValueError: names what is in the way and what to do.
    """
    if not isinstance(group.get("noise", {}), dict):
        raise ValueError(
            f"a parameter group has noise={group['noise']!r}: it is a setting of the whole "
            "optimizer, not of a group's (and not to be passed through wrappers that shard "
            "parameters over ranks, such as ZeroRedundancyOptimizer, which are not supported)"
        )
    for name in NOT_NEGATIVE:
        value = group.get(name, 0.0)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(
                f"a parameter group has {name}={value!r}: it must be finite and not negative"
            )
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True cannot be measured: the window's sum is kept in place, outside "
            "the graph; use noise='off'"
        )
    if any(param.is_meta for param in group["params"]):
        raise ValueError(
            "parameters are on the meta device, where there is nothing to measure: build the "
            "optimizer after model.to_empty() and the model's initialisation"
        )
    flat = sum(getattr(param, "_fsdp_flattened", False) for param in group["params"])
    if flat:
        raise ValueError(
            f"{flat} parameters belong to FullyShardedDataParallel (FSDP1), whose gradients are "
            "not measured: shard the model with torch.distributed.fsdp.fully_shard, or use "
            "noise='off'"
        )
    expert = sum(getattr(param, "allreduce", True) is False for param in group["params"])
    if expert:
        raise ValueError(
            f"{expert} parameters are marked allreduce=False, as experts are whose gradients are "
            "averaged over other ranks, which is not measured yet: use noise='off'"
        )


def check_step(groups: Sequence[dict[str, Any]], has_gradient: bool) -> None:
    """Refuse a step that cannot be taken.

    Args:
        groups: the optimizer's parameter groups.
        has_gradient: whether some parameter of theirs has one.

    Raises:
        RuntimeError: no parameter has a gradient, a learning rate is not finite, or a CUDA graph is
            being captured.
    """
    if not has_gradient:
        params = [param for group in groups for param in group["params"]]
        kept = ", and run micro-batches whose gradients FSDP2 is to keep inside accumulate(model)"
        raise RuntimeError(
            f"step() found no gradient on any of {len(params)} parameters: call loss.backward() "
            "before step(), and zero_grad() after it or before backward()"
            f"{kept if any(map(is_sharded, params)) else ''}"
        )
    for index, group in enumerate(groups):
        if isinstance(group["lr"], float) and not math.isfinite(group["lr"]):
            raise RuntimeError(
                f"the learning rate of group {index} is {group['lr']}: the update would make its "
                "weights so; look at what sets it, such as the scheduler"
            )
    captures = any(group.get("capturable") for group in groups) and torch.cuda.is_available()
    if captures and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() is being captured in a CUDA graph, which would freeze the window and the "
            "decisions: use noise='off' in captured steps"
        )


def check_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse a state of another kind of optimizer, or of parameters of other shapes.

    Raises:
        ValueError: names what does not fit.
    """
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        return  # torch refuses that itself
    for index, group in enumerate(saved):
        if not isinstance(group.get("noise", {}), dict):
            raise ValueError(f"group {index} of the state has noise={group['noise']!r}: no numbers")
        lacking = [name for name in SETTINGS if name in optimizer.defaults and name not in group]
        if lacking:
            raise ValueError(
                f"group {index} of the state has no {', '.join(lacking)}: it is not of "
                f"{type(optimizer).__name__}, nor of the torch optimizer that it extends"
            )
        for key, param in zip(group["params"], groups[index]["params"], strict=True):
            _check_moments(state_dict["state"].get(key, {}), param, f"{key} of group {index}")


def _check_moments(saved: dict[str, Any], param: Tensor, name: str) -> None:
    for moment in MOMENTS:
        value = saved.get(moment)
        if isinstance(value, Tensor) and value.shape != param.shape:
            raise ValueError(
                f"{moment} of parameter {name} has shape {tuple(value.shape)} in the state and the "
                f"parameter {tuple(param.shape)}: load a state of the same model"
            )
