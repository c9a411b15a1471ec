"""DeepSpeed's optimizer wrappers: where each keeps parameters, mean gradients, scale and clipping.

Sources: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/bf16_optimizer.py, runtime/fp16/{fused,unfused}_optimizer.py; tested for each of them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.optim import Optimizer

from noiseopt.capture import scale_all
from noiseopt.optim.hyper import decouples_weight_decay, numbers_after, start_numbers

Groups = list[list[Tensor]]


class Wrapper:
    """An engine's optimizer without ZeRO: every rank holds the whole mean in `param.grad`.

    Between the backward that ends a window and the update, that is: averaged over ranks, not yet
    clipped, and still multiplied by the loss scale.

    Args:
        engine: the engine.

    Attributes:
        sharded: whether each rank holds but a part of the mean.
        spends_grad: whether `param.grad` is spent after a backward, its sum being kept elsewhere.
    """

    sharded = False
    spends_grad = False

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.optimizer = engine.optimizer
        self.basic: Optimizer = engine.basic_optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups with the hyper-parameters that the next update uses."""
        return self.basic.param_groups

    def params(self) -> Groups:
        """The model's own parameters in each group."""
        return [list(group) for group in self.optimizer.fp16_groups]

    def mean(self) -> Groups:
        """The parts of the mean gradient that this rank holds, in each group."""
        return [[grad for p in group if (grad := p.grad) is not None] for group in self.params()]

    @property
    def loss_scale(self) -> float:
        """What the mean is still to be divided by."""
        return float(getattr(self.optimizer, "loss_scale", 1.0))

    def set_max_norm(self, max_norm: float) -> None:
        """Clip from the next update on at this norm; never, if it is infinite."""
        clip = 0.0 if max_norm == torch.inf else max_norm
        # Without a wrapper the engine reads its config, and every wrapper what it was built with.
        self._engine._config.gradient_clipping = clip
        if hasattr(self.optimizer, "clip_grad"):
            self.optimizer.clip_grad = clip

    def throws_away(self, by_optimizer: bool, steps: int) -> bool:
        """Whether `zero_grad` leaves nothing of an open window's gradients in updates to come.

        Args:
            by_optimizer: whether it is the optimizer's; if not, the engine's or the model's.
            steps: the window's length.
        """
        return True

    @property
    def takes_norm(self) -> bool:
        """Whether an update can be lent the mean's norm, which DeepSpeed would read again."""
        return False

    def lent_norm(self, norm: Tensor) -> AbstractContextManager[None]:
        """Lend an update, if it takes it, the norm of the whole mean, without the loss scale."""
        return nullcontext()

    @property
    def decouples_weight_decay(self) -> bool:
        """Whether weight decay is decoupled from the gradient."""
        mode = getattr(self.basic, "adam_w_mode", None)
        return decouples_weight_decay(type(self.basic)) if mode is None else bool(mode)

    def moments(self) -> list[dict[str, float]]:
        """The numbers of each group's moments as they are; see `noiseopt.optim.hyper`."""
        return [self._moments(group) for group in self.basic.param_groups]

    def _moments(self, group: dict[str, Any]) -> dict[str, float]:
        if not isinstance(self.basic, FusedAdam | DeepSpeedCPUAdam):
            return start_numbers(self.basic, group)
        if not group.get("bias_correction", True):
            return {}
        states = [self.basic.state[p] for p in group["params"] if p in self.basic.state]
        steps = [state.get("step", 0) for state in states]
        return numbers_after(int(max([group.get("step", 0), *steps])))


class PlainWrapper(Wrapper):
    """Stage 0 in fp32: the optimizer itself, which applies whatever it gets."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        own = {param for group in self.params() for param in group}
        self._strangers = list(own ^ set(engine.module.parameters()))

    @property
    def takes_norm(self) -> bool:
        """Whether what the engine clips together is what is measured."""
        return not any(param.requires_grad for param in self._strangers)

    def lent_norm(self, norm: Tensor) -> AbstractContextManager[None]:
        """Have the engine clip by this norm, which it would have averaged over ranks."""
        return _replaced(self._engine, "clip_fp32_gradients", partial(self._clip, norm))

    def _clip(self, norm: Tensor) -> None:
        coefficient = self._engine.gradient_clipping() / (norm + 1e-6)
        if coefficient < 1:
            scale_all([grad for group in self.mean() for grad in group], coefficient)

    def params(self) -> Groups:
        """The model's own parameters in each group."""
        return [list(group["params"]) for group in self.basic.param_groups]

    @contextmanager
    def withheld(self) -> Iterator[None]:
        """Have the engine's update find no gradient, and say afterwards that it was skipped."""
        engine = self._engine
        engine.zero_grad()
        clip, engine._config.gradient_clipping = engine._config.gradient_clipping, 0.0
        try:
            yield
        finally:
            engine._config.gradient_clipping = clip
        engine._step_applied = False
        engine.skipped_steps += 1


class ShardedWrapper(Wrapper):
    """ZeRO stages 1 and 2."""

    sharded = True

    def throws_away(self, by_optimizer: bool, steps: int) -> bool:
        """Not where it is added to sums kept elsewhere: at stage 2 those of longer windows."""
        optimizer = self.optimizer
        keeps_sums = optimizer.cpu_offload or optimizer.use_separate_grad_accum
        return not keeps_sums and (steps == 1 or not optimizer.partition_gradients)

    @property
    def takes_norm(self) -> bool:
        """Not where gradients are offloaded: their norms are known from the backward."""
        return type(self.optimizer) is DeepSpeedZeroOptimizer and not self.optimizer.cpu_offload

    def lent_norm(self, norm: Tensor) -> AbstractContextManager[None]:
        """Lend an update the norm of the whole mean, which is without the loss scale."""
        scaled = (norm * self.loss_scale).float()
        return _answering(self.optimizer, "scaled_global_norm", norm, scaled)

    def params(self) -> Groups:
        """The model's own parameters in each group."""
        return [list(group) for group in self.optimizer.bit16_groups]

    def mean(self) -> Groups:
        """The parts of the mean gradient that this rank holds, in each group."""
        if self.optimizer.cpu_offload:
            get_accelerator().synchronize()  # DeepSpeed copies them there meanwhile
            return [_held([flat.grad]) for flat in self.optimizer.single_partition_of_fp32_groups]
        averaged = self.optimizer.averaged_gradients
        return [_held(averaged.get(index)) for index in range(len(self.optimizer.bit16_groups))]


class Stage3Wrapper(Wrapper):
    """ZeRO stage 3, whose groups are split into sub-groups."""

    sharded = True

    def throws_away(self, by_optimizer: bool, steps: int) -> bool:
        """The optimizer's only, after which sums are begun anew."""
        return by_optimizer

    @property
    def takes_norm(self) -> bool:
        """Not where gradients are offloaded, as at stages 1 and 2."""
        whole = type(self.optimizer) is DeepSpeedZeroOptimizer_Stage3
        return whole and not self.optimizer.offload_optimizer

    def lent_norm(self, norm: Tensor) -> AbstractContextManager[None]:
        """Lend an update the norm of the whole mean, as if that were of one sub-group."""
        scaled = (norm * self.loss_scale).float()
        return _answering(self.optimizer, "_get_norm_groups", norm, [scaled])

    def params(self) -> Groups:
        """The model's own parameters in each group."""
        return self._by_group(self.optimizer.fp16_groups)

    def mean(self) -> Groups:
        """The parts of the mean gradient that this rank holds, in each group."""
        optimizer = self.optimizer
        if optimizer.offload_optimizer:
            get_accelerator().synchronize()
            return self._by_group([[flat.grad] for flat in optimizer.fp32_partitioned_groups_flat])
        averaged = optimizer.averaged_gradients
        return self._by_group([averaged.get(index) for index in range(len(optimizer.fp16_groups))])

    def moments(self) -> list[dict[str, float]]:
        """The same of its groups, which hold their parameters inside an update only."""
        own = self._by_group([[flat] for flat in self.optimizer.fp32_partitioned_groups_flat])
        groups = zip(self.basic.param_groups, own, strict=True)
        return [self._moments(group | {"params": params}) for group, params in groups]

    def _by_group(self, of_subgroups: Iterable[Iterable[Tensor | None] | None]) -> Groups:
        groups: Groups = [[] for _ in self.basic.param_groups]
        for index, tensors in enumerate(of_subgroups):
            groups[self.optimizer.sub_group_to_group_id[index]] += _held(tensors)
        return groups


class Bf16Wrapper(Wrapper):
    """Stage 1 in bf16 with fp32 accumulation."""

    sharded = True
    spends_grad = True

    def throws_away(self, by_optimizer: bool, steps: int) -> bool:
        """The optimizer's only, which clears the sums."""
        return by_optimizer

    def params(self) -> Groups:
        """The model's own parameters in each group."""
        return [list(group) for group in self.optimizer.bf16_groups]

    def mean(self) -> Groups:
        """The parts of the mean gradient that this rank holds, in each group."""
        return [[part] for part in self.optimizer.fp32_groups_gradient_flat_partition]


def wrapper_of(engine: Any) -> Wrapper:
    """The wrapper of an engine's optimizer.

    Raises:
        ValueError: there is no optimizer, or one that is not known here.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer and isinstance(optimizer, Optimizer):
        return PlainWrapper(engine)
    kinds: tuple[tuple[type, type[Wrapper]], ...] = (
        (BF16_Optimizer, Bf16Wrapper),
        (DeepSpeedZeroOptimizer_Stage3, Stage3Wrapper),
        (DeepSpeedZeroOptimizer, ShardedWrapper),
    )
    for kind, wrapper in kinds:
        if isinstance(optimizer, kind):
            return wrapper(engine)
    if engine.basic_optimizer is not None and hasattr(optimizer, "fp16_groups"):
        return Wrapper(engine)
    raise ValueError(
        f"the engine's optimizer is of type {type(optimizer).__name__}, which cannot be measured: "
        'give the config an "optimizer", or pass optimizer='
    )


def _held(tensors: Iterable[Tensor | None] | None) -> list[Tensor]:
    return [tensor for tensor in tensors or () if tensor is not None]


def _answering(
    optimizer: Any, name: str, norm: Tensor, answer: Any
) -> AbstractContextManager[None]:
    """Spare a method that reads a norm; of one that is not finite DeepSpeed judges by its own."""
    read = getattr(optimizer, name, None)  # by another name nobody calls what is put there

    def known(*args: Any) -> Any:
        return answer if read is None or bool(norm.isfinite()) else read(*args)

    return _replaced(optimizer, name, known)


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Have an object's method be another for the duration of a with block."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
