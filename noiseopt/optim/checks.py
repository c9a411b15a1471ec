"""What a noise-aware optimizer refuses, each with the remedy, before anything is changed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach


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
        RuntimeError: no parameter has a gradient, or a CUDA graph is being captured.
    """
    if not has_gradient:
        total = sum(len(group["params"]) for group in groups)
        raise RuntimeError(
            f"step() found no gradient on any of {total} parameters: call loss.backward() before "
            "step(), and zero_grad() after it or before backward()"
        )
    captures = any(group.get("capturable") for group in groups) and torch.cuda.is_available()
    if captures and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() is being captured in a CUDA graph, which would freeze the window and the "
            "decisions: use noise='off' in captured steps"
        )


def prefer_fused(optimizer: Optimizer) -> None:
    """On a GPU, let torch use its fused kernel where the user chose none.

    It is the only kernel that skips a step without the host waiting for the device.
    """
    groups = optimizer.param_groups
    chosen = any(
        group.get("fused", False) is not None or group.get("foreach") is not None
        for group in groups
    )
    params = [param for group in groups for param in group["params"]]
    if chosen or not all(param.is_cuda for param in params):
        return
    if _default_to_fused_or_foreach(params, False, use_fused=True)[0]:
        optimizer.defaults["fused"] = True
        for group in groups:
            group["fused"] = True
