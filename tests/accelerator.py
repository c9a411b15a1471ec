"""A pretended accelerator, and what the host would wait for on a real one.

Its tensors keep their data out of sight and say that they are on `DEVICE`, so code goes the ways
that it goes on a GPU; kernels run on the CPU. Written down is what makes the host wait for a GPU:
reading a number, and copies between host and device that are not told to go on meanwhile. Copies
to the host that are have not come yet when they are read: they are nan.
"""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy")  # which needs nothing that a CPU build of torch lacks
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
READS = (
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default),
    *(aten.nonzero.default, aten.masked_select.default),  # whose shape depends on values
)


class OnDevice(Tensor):
    """A tensor of the accelerator.

    Attributes:
        held: its data, on the CPU.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of an Accelerator")


class Accelerator(TorchDispatchMode):
    """While it is entered, there is a device, which torch's fused and foreach kernels take.

    Attributes:
        waits: what the host has waited for, by the names of functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._others = ExitStack()

    def __enter__(self) -> "Accelerator":
        torchs = importlib.import_module("torch.optim.optimizer")
        for kind in ("fused", "foreach"):
            name = f"_get_{kind}_kernels_supported_devices"
            self._others.enter_context(patch.object(torchs, name, lambda: ["cpu", DEVICE.type]))
        self._others.enter_context(_Numbers(self.waits))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._others.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.waits.append(func._schema.name)
        return _run(func, args, kwargs)


class _Numbers(TorchFunctionMode):
    """Tensors of numbers and numbers of tensors, which torch makes out of sight of dispatch."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.data_ptr) and isinstance(args[0], OnDevice):
            if func is Tensor.tolist:
                self._waits.append("tolist")
            return func(args[0].held)
        makes = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if makes and torch.device(kwargs.get("device") or CPU) == DEVICE:
            self._waits.append(func.__name__)
            return OnDevice(func(*args, **{**kwargs, "device": CPU}))
        return func(*args, **kwargs)


def to_device(model: nn.Module) -> nn.Module:
    """Move a model's parameters, by making new ones."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(OnDevice(param.clone()))
    return model


def _waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    there = [isinstance(each, OnDevice) for each in args if isinstance(each, Tensor)]
    if func in READS:
        return any(there)
    if func is aten.index.Tensor:
        return any(each is not None and each.dtype == torch.bool for each in args[1])
    if func is aten._to_copy.default:
        to = torch.device(kwargs["device"]) == DEVICE if "device" in kwargs else there[0]
        return there[0] != to and not kwargs.get("non_blocking", False)
    if func is aten.copy_.default:
        goes_on = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        return there[0] != there[1] and not goes_on
    return False


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a kernel on what tensors hold. What is changed in place stays the tensor that it is."""
    owners: dict[int, OnDevice] = {}

    def held(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, OnDevice):
            return tensor
        owners[id(tensor.held)] = tensor
        return tensor.held

    def on_cpu(device: torch.device) -> torch.device:
        return CPU if device == DEVICE else device

    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    joins = func in (aten.cat.default, aten.stack.default)
    # Numbers on the CPU go with any device's tensors, but not where they are joined to them.
    counted = [each for each in tensors if isinstance(each, OnDevice) or each.dim() > 0 or joins]
    places = {isinstance(each, OnDevice) for each in counted}
    takes_both = func in COPIES or "_foreach_" in func._schema.name  # which takes each pair alone
    assert takes_both or len(places) < 2, f"{func} takes tensors of two devices"
    inputs = tree_map_only(Tensor, held, (list(args), dict(kwargs)))
    on_host, named = tree_map_only(torch.device, on_cpu, inputs)
    asked = kwargs.get("device")
    stays = bool(owners) if asked is None else torch.device(asked) == DEVICE

    def given(tensor: Tensor) -> Tensor:
        if id(tensor) in owners:
            return owners[id(tensor)]
        return OnDevice(tensor) if stays and not any(tensor is each for each in args) else tensor

    found = tree_map_only(Tensor, given, func(*on_host, **named))
    if func is aten._to_copy.default and owners and not stays and kwargs.get("non_blocking"):
        found.fill_(torch.nan)
    return found
