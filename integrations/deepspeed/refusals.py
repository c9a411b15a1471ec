"""What a DeepSpeed config may not ask for together with the section, each with the remedy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def device_of_offload(offload: Any) -> str:
    """Where a part is offloaded to."""
    return str(getattr(offload.device, "value", offload.device))


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that a config may ask for and must not.

    Attributes:
        key: under which it does.
        applies: whether it does.
        remedy: what to do instead.
    """

    key: str
    applies: Callable[[Any], bool]
    remedy: str


def _said(*path: str) -> Callable[[Any], bool]:
    """Whether the config's own text enables something."""

    def applies(config: Any) -> bool:
        value: Any = config._param_dict
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return bool(value.get("enabled") if isinstance(value, Mapping) else value)

    return applies


def _size(*path: str) -> Callable[[Any], bool]:
    """Whether a number of ranks is said that is above one."""

    def applies(config: Any) -> bool:
        value: Any = config._param_dict
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return isinstance(value, int) and value > 1

    return applies


def _is_onebit(config: Any) -> bool:
    return str(config.optimizer_name).lower() in ("onebitadam", "zerooneadam", "onebitlamb")


def _is_muon(config: Any) -> bool:
    return str(config.optimizer_name).lower() in ("muon", "noiseawaremuon")


def _is_rebuilt_adagrad(config: Any) -> bool:
    offload = config.zero_config.offload_optimizer
    offloads = offload is not None and device_of_offload(offload) != "none"  # to its own kernel
    is_adagrad = str(config.optimizer_name).lower() == "adagrad"
    return bool(config.zero_enabled and is_adagrad and not offloads)


def _on_nvme(part: str) -> Callable[[Any], bool]:
    def applies(config: Any) -> bool:
        offload = getattr(config.zero_config, part)
        return offload is not None and device_of_offload(offload) == "nvme"

    return applies


def _splits_offload(config: Any) -> bool:
    offload = config.zero_config.offload_optimizer
    return offload is not None and device_of_offload(offload) != "none" and offload.ratio < 1


def _keeps_overflow(config: Any) -> bool:
    bf16 = config.bfloat16_config
    return bool(bf16.enabled and not bf16.check_grad_overflow)


def _plans_samples(config: Any) -> bool:
    sampling = config.data_efficiency_config["data_sampling"]
    return bool(config.data_efficiency_enabled and sampling["enabled"])


def _drops_tokens(config: Any) -> bool:
    return bool(config.data_efficiency_config["data_routing"]["random_ltd"]["enabled"])


def _is_fp16_without_zero(config: Any) -> bool:
    return bool(config.float16_config.enabled and not config.zero_enabled)


def _autocasts_to_fp16(config: Any) -> bool:
    return bool(config.torch_autocast_enabled and config.torch_autocast_dtype == torch.float16)


def _narrows_gradients(config: Any) -> bool:
    sent, fp16, bf16 = (
        config.communication_data_type,
        config.float16_config.enabled,
        config.bfloat16_config.enabled,
    )
    held = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
    return sent is not None and torch.promote_types(sent, held) != sent


_NOT_YET = "is not measured rightly yet; leave one of the two out"
_ZERO = "zero_optimization"
REBUILT_ADAGRAD = (
    "under ZeRO DeepSpeed builds another Adagrad, which neither rates nor schedulers reach; use "
    "AdamW, or ZeRO stage 0"
)
REFUSALS = (
    Refusal(
        f"{_ZERO}.zenflow",
        lambda config: config.zero_config.zenflow is not None,
        "ZenFlow decides on accumulation by itself; leave one of the two out",
    ),
    Refusal(
        f"{_ZERO}.offload_optimizer.super_offload",
        lambda config: getattr(config.zero_config.offload_optimizer, "super_offload", False),
        "SuperOffload updates while gradients still come; set it to false",
    ),
    Refusal(
        f"{_ZERO}.compute_grad_norm",
        lambda config: not config.zero_config.compute_grad_norm,
        "without the norm neither clipping nor the skipping of what is not finite works; "
        "set it to true",
    ),
    Refusal(
        f"{_ZERO}.zero_quantized_gradients",
        lambda config: config.zero_config.zero_quantized_gradients,
        "quantised communication biases the mean gradient's norm; set it to false",
    ),
    Refusal(
        f"{_ZERO}.elastic_checkpoint",
        lambda config: config.zero_config.elastic_checkpoint,
        "with torch's kernels DeepSpeed cannot load such checkpoints again; set it to false, and "
        "make universal checkpoints for another number of ranks",
    ),
    *(
        Refusal(f"{_ZERO}.{part}.device", _on_nvme(part), 'offload to "nvme" ' + _NOT_YET)
        for part in ("offload_optimizer", "offload_param")
    ),
    Refusal(
        f"{_ZERO}.offload_optimizer.ratio",
        _splits_offload,
        "what is not offloaded has an optimizer of its own, not reached yet; set it to 1.0",
    ),
    Refusal(
        "optimizer.type",
        _is_onebit,
        "compressed communication biases the mean gradient's norm; use AdamW",
    ),
    Refusal(
        "optimizer.type",
        _is_muon,
        "DeepSpeed's Muon leaves no plain mean gradient to measure; use AdamW",
    ),
    Refusal("optimizer.type", _is_rebuilt_adagrad, REBUILT_ADAGRAD),
    Refusal(
        "gradient_allreduce_op",
        lambda config: config.gradient_allreduce_op != "mean",
        'ranks must average their gradients; set it to "mean"',
    ),
    Refusal(
        "communication_data_type",
        _narrows_gradients,
        "compressed communication biases the mean gradient's norm; leave it out, or set it to "
        '"fp32"',
    ),
    Refusal(
        "bf16.check_grad_overflow",
        _keeps_overflow,
        "an update that is not finite would be applied; set it to true",
    ),
    Refusal(
        "fp16",
        _is_fp16_without_zero,
        "without ZeRO DeepSpeed divides gradients by a loss scale that it has not applied; use "
        "ZeRO stage 1, or bf16",
    ),
    Refusal(
        "torch_autocast.dtype",
        _autocasts_to_fp16,
        'torch\'s loss scale is not followed; use "bfloat16", or the section "fp16"',
    ),
    Refusal(
        "data_efficiency.data_sampling",
        _plans_samples,
        "it plans its samples for a batch that does not change; leave one of the two out",
    ),
    Refusal(
        "data_efficiency.data_routing.random_ltd",
        _drops_tokens,
        "its schedule counts updates, of which longer windows make fewer; leave one of the two out",
    ),
    Refusal("hybrid_engine", _said("hybrid_engine"), "the hybrid engine " + _NOT_YET),
    Refusal(
        "compile.deepcompile",
        lambda config: config.compile_config.deepcompile,
        "DeepCompile " + _NOT_YET,
    ),
    Refusal(
        "tensor_parallel.autotp_size",
        _size("tensor_parallel", "autotp_size"),
        "tensor parallelism " + _NOT_YET,
    ),
    Refusal(
        "sequence_parallel_size",
        _size("sequence_parallel_size"),
        "sequence parallelism " + _NOT_YET,
    ),
    Refusal("expert_parallel", _said("expert_parallel"), "expert parallelism " + _NOT_YET),
)
