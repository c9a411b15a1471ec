"""What a `NoiseMonitor` decides, carried out on a plain torch optimizer by the user's own loop.

Example:
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> monitor = NoiseMonitor(optimizer)
    >>> schedule = NoiseAwareLR(monitor, torch.optim.lr_scheduler.LinearLR(optimizer))
    >>> accumulation, clip = AccumulationScheduler(monitor), ClipScheduler(monitor)
    >>> for window in accumulation.windows(torch.ones(6, 8, 4)):
    ...     for batch in window:
    ...         (model(batch).square().mean() / len(window)).backward()
    ...     norm = clip.clip_()
    ...     optimizer.step()
    ...     schedule.step()
    ...     optimizer.zero_grad()
    >>> monitor.micro_batches
    6
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from noiseopt.monitor import NoiseMonitor
from noiseopt.optim.hyper import (
    decouples_weight_decay,
    scaled_values,
    start_numbers,
)
from noiseopt.optim.unsure import UnsureUpdates

MOST_UNSURE = 256  # updates, where the monitor was detached and no decision settles them

T = TypeVar("T")


class NoiseAwareLR(LRScheduler):
    """Scales the rates inside each `optimizer.step()` and takes the factors back after it.

    `group["lr"]` stays what the user's own schedule makes it, so every torch scheduler keeps its
    meaning. That schedule, if given, is advanced once for each micro-batch that was consumed: it
    counts samples, whatever the windows do. Learning rate, betas and decoupled weight decay follow
    the batch, each as `NoiseConfig` says.

    Args:
        monitor: whose decisions to carry out.
        scheduler: the user's own schedule, whose `step()` takes no argument.

    Raises:
        ValueError: the schedule belongs to another optimizer, or this one has such a scaling.
        TypeError: its `step()` takes a metric.
    """

    def __init__(self, monitor: NoiseMonitor, scheduler: LRScheduler | None = None) -> None:
        if scheduler is not None and scheduler.optimizer is not monitor.optimizer:
            raise ValueError("the scheduler's optimizer is not the one that the monitor watches")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau takes a metric in its step(): call that yourself, and give "
                "NoiseAwareLR the monitor alone"
            )
        hooks = monitor.optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), NoiseAwareLR) for hook in hooks):
            raise ValueError(
                "the optimizer has a NoiseAwareLR, and two would scale each other's rates: call "
                "detach() of the one that is there"
            )
        self.optimizer = monitor.optimizer
        self.monitor = monitor
        monitor.scales = True
        self.scheduler = scheduler
        self._decoupled = decouples_weight_decay(type(self.optimizer))
        # Filled at the first step, so that a state loaded before it counts.
        self._numbers: list[dict[str, float]] = []
        self._unsure = UnsureUpdates(monitor.config.min_beta2)
        self._decision = monitor.decision
        self._saved: list[dict[str, Any]] = []
        self._advanced = monitor.micro_batches
        self._handles = [
            self.optimizer.register_step_pre_hook(self._scale),
            self.optimizer.register_step_post_hook(self._restore),
            self.optimizer.register_state_dict_pre_hook(lambda optimizer: self._put_back()),
        ]

    @property
    def last_epoch(self) -> int:
        """How far the user's schedule has advanced: by micro-batches."""
        return self._advanced if self.scheduler is None else self.scheduler.last_epoch

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        raise TypeError(
            "NoiseAwareLR has no schedule of its own for another scheduler, such as SequentialLR, "
            "to run: give that one to NoiseAwareLR(monitor, scheduler)"
        )

    @property
    def base_lrs(self) -> list[Any]:  # type: ignore[override]
        """The learning rates that the user's schedule starts from."""
        if self.scheduler is not None:
            return self.scheduler.base_lrs
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Advance the user's schedule by the micro-batches consumed since the last call."""
        self._put_back()
        consumed, self._advanced = (
            self.monitor.micro_batches - self._advanced,
            self.monitor.micro_batches,
        )
        if self.scheduler is not None:
            for _ in range(consumed):
                self.scheduler.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates of the open window, the adapted factor included."""
        factor = self.monitor.rates.lr
        return [group["lr"] * factor for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state of the user's schedule, and the numbers of this one."""
        inner = None if self.scheduler is None else self.scheduler.state_dict()
        self._unsure.settle(self._numbers)
        return {"scheduler": inner, "second_moments": [dict(n) for n in self._numbers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; load the monitor's first."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        self._numbers = [dict(n) for n in state_dict["second_moments"]]
        self._unsure.forget()
        self._advanced = self.monitor.micro_batches

    def detach(self) -> None:
        """Stop scaling."""
        self.monitor.scales = False
        for handle in self._handles:
            handle.remove()

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()
        rates, least = self.monitor.rates, self.monitor.config.min_beta2
        groups = optimizer.param_groups
        if len(self._numbers) < len(groups) or len(self._unsure) >= MOST_UNSURE:
            self._unsure.settle(self._numbers)
        while len(self._numbers) < len(groups):
            self._numbers.append(start_numbers(optimizer, groups[len(self._numbers)]))
        found_inf = getattr(optimizer, "found_inf", None)  # set by a GradScaler for fused kernels
        if found_inf is not None or len(self._unsure):
            skipped = False if found_inf is None else found_inf != 0
            self._unsure.add(skipped, self._numbers, groups, rates)
        for group, numbers in zip(groups, self._numbers, strict=True):
            values = scaled_values(group, numbers, rates, least, self._decoupled)
            self._saved.append({key: group[key] for key in values})
            group.update(values)

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()
        if self.monitor.decision is not self._decision:  # which has waited for the device
            self._decision = self.monitor.decision
            self._unsure.settle(self._numbers)

    def _put_back(self) -> None:
        """Also after a step that raised: then before a rate is scheduled, saved or used again."""
        for group, saved in zip(self.optimizer.param_groups, self._saved, strict=False):
            group.update(saved)
        self._saved = []


class AccumulationScheduler:
    """Hands out micro-batches in windows of the decided length.

    Args:
        monitor: whose decisions to carry out.
    """

    def __init__(self, monitor: NoiseMonitor) -> None:
        self.monitor = monitor

    def windows(self, batches: Iterable[T]) -> Iterator[list[T]]:
        """Yield lists of micro-batches, each as long as the window that is open then.

        The last may be shorter. Divide each loss by the length of its list.
        """
        window: list[T] = []
        for batch in batches:
            window.append(batch)
            if len(window) >= self.monitor.accumulation_steps:
                yield window
                window = []
        if window:
            self.monitor.shorten_window(len(window))
            yield window


class ClipScheduler:
    """Clips at the decided norm.

    Args:
        monitor: whose decisions to carry out.
    """

    def __init__(self, monitor: NoiseMonitor) -> None:
        self.monitor = monitor

    @property
    def max_norm(self) -> float:
        """The norm at which the open window's gradient is clipped; infinite for never."""
        return self.monitor.max_norm

    def clip_(self) -> Tensor:
        """Clip the gradients in place, by `torch.nn.utils.clip_grad_norm_`.

        Under a GradScaler call its `unscale_` before it. What is not finite stays so: skipping it
        is the GradScaler's part.

        Returns:
            Their norm before, 0-d.
        """
        params = [p for group in self.monitor.optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            if self.max_norm == math.inf:
                return get_total_norm([p.grad for p in params if p.grad is not None])
            return clip_grad_norm_(params, self.max_norm)
