"""Micro-batch gradients where they pass in the backward, for loops that accumulate by themselves.

A hook on each parameter reads the norm of what one backward brings; the hook after accumulation
confirms it and, in the window's last backward, reads the norm of what has been accumulated, before
the loop can clip or unscale it. No gradient is kept.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

from noiseopt.capture.norms import device_of, squared_norm, squared_norms, sum_dtype
from noiseopt.capture.row import Measured


class BackwardCapture:
    """Hooks on parameters that gather the norms of a window's micro-batches.

    Args:
        groups: the parameters of each group. Frozen ones are passed over.
        window_steps: tells how many backward passes the current window is to have.

    A backward pass is one micro-batch. Reentrant checkpointing runs others inside it, whose norms
    would not add where they share a parameter: it is refused.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], window_steps: Callable[[], int]) -> None:
        self._window_steps = window_steps
        self._num_groups = len(groups)
        self._device = device_of(groups)
        self._handles: list[Any] = []
        self._passing: dict[Tensor, Tensor] = {}
        self._current: list[list[Tensor]] = []
        self._mean: dict[Tensor, tuple[int, Tensor]] = {}
        self._small: list[Tensor] = []
        self._task = -1
        self.watched: dict[Tensor, int] = {}
        for index, params in enumerate(groups):
            self._attach_all(params, index)

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Watch one more group."""
        self._attach_all(params, self._num_groups)
        self._num_groups += 1
        self._small = [torch.cat([norms, norms.new_zeros(1)]) for norms in self._small]

    def _attach_all(self, params: Sequence[Tensor], group: int) -> None:
        for param in params:
            if param.requires_grad:
                self._attach(param, group)

    def __len__(self) -> int:
        """How many backward passes the open window has had."""
        return len(self._small)

    def _attach(self, param: Tensor, group: int) -> None:
        self.watched[param] = group

        def before(grad: Tensor) -> None:
            self._passing[param] = squared_norm(grad, self._device)

        def after(accumulated: Tensor) -> None:
            self._take(param, group, accumulated)

        hooked: Any = param
        self._handles.append(hooked.register_hook(before))
        self._handles.append(hooked.register_post_accumulate_grad_hook(after))

    def _take(self, param: Tensor, group: int, accumulated: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # What a backward that failed half-way has left is dropped here.
            _refuse_nested_backward()
            self._task, self._current = task, [[] for _ in range(self._num_groups)]
            Variable._execution_engine.queue_callback(self._close_micro_batch)
            if len(self) >= self._window_steps():
                self._mean.clear()  # of a window that went on, or whose step was skipped
        self._current[group].append(self._passing.pop(param))
        if len(self) + 1 >= self._window_steps() and accumulated.grad is not None:
            self._mean[param] = group, squared_norm(accumulated.grad, self._device)

    def _close_micro_batch(self) -> None:
        zero = torch.zeros((), dtype=sum_dtype(self._device), device=self._device)
        self._small.append(
            torch.stack([torch.stack([zero, *norms]).sum() for norms in self._current])
        )
        self._current = []
        if len(self) >= self._window_steps():
            self._read_untouched()

    def _read_untouched(self) -> None:
        """Read what the last backward did not bring, before the loop can change it."""
        for param, group in self.watched.items():
            if param.grad is not None and param not in self._mean:
                self._mean[param] = group, squared_norm(param.grad, self._device)

    def close(
        self,
        groups: Sequence[Sequence[Tensor]],
        samples: Sequence[float],
        loss_scale: float | Tensor,
    ) -> Measured:
        """End the window at the optimizer's step.

        A backward brings h_i = w_i g_i: the loop has put the weight w_i, and a loss scale, on the
        loss. `p.grad` is the loop's own: nothing is left to be done to it. The mean of a window
        that is shorter than was announced is unknown (nan).

        Args:
            groups: the optimizer's parameters.
            samples: n_i of each backward, to which the weights are proportional.
            loss_scale: the factor on every loss.

        Raises:
            ValueError: the number of sample counts is not that of backward passes.
            RuntimeError: the optimizer has parameters with a gradient that are not watched, or no
                backward was seen.
        """
        missing = [
            param
            for params in groups
            for param in params
            if param.grad is not None and param not in self.watched
        ]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of the optimizer's parameters have a gradient but are not "
                "watched: the model or the optimizer was changed after measuring began; attach "
                "the monitor, or build the optimizer, after the change"
            )
        if not self._small:
            raise RuntimeError(
                "no backward pass was seen since the last step(): call loss.backward() on a loss "
                "of the watched parameters first"
            )
        samples = samples[self._forget_skipped() :]
        if len(samples) != len(self):
            raise ValueError(
                f"set_samples() was called {len(samples)} times for {len(self)} backward passes: "
                "call it once for each, or never"
            )
        big = torch.stack([self._group_mean(index, params) for index, params in enumerate(groups)])
        if len(self) < self._window_steps():
            big = big * math.nan  # the loop may have clipped or unscaled it: not to be learned from
        parts = torch.stack(self._small)
        self.clear()
        counts = torch.stack([parts.new_full((), value) for value in samples])
        weights = counts / counts.sum()
        scale_sq = torch.as_tensor(loss_scale).to(parts.device, parts.dtype).square()
        small = parts / weights.square()[:, None] / scale_sq
        used = weights * small.sum(1).isfinite()
        return Measured(small, big / scale_sq, counts, used, None)

    def _forget_skipped(self) -> int:
        """Forget windows whose step a GradScaler skipped; return how many backwards they had."""
        extra = len(self) - self._window_steps()
        if extra <= 0 or bool(torch.stack(self._small).isfinite().all()):
            return 0
        del self._small[:extra]
        return extra

    def _group_mean(self, group: int, params: Sequence[Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=sum_dtype(self._device), device=self._device)
        parts = [norm for index, norm in self._mean.values() if index == group]
        unread = [p.grad for p in params if p.grad is not None and p not in self._mean]
        if unread:
            parts.append(squared_norms([unread], self._device)[0])
        return torch.stack([zero, *parts]).sum()

    def clear(self) -> None:
        """Forget the open window."""
        self._passing.clear()
        self._mean.clear()
        self._small, self._current = [], []

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.watched.clear()


def _refuse_nested_backward() -> None:
    """Raise where this backward runs inside the backward of another, as checkpoints may have it."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            raise RuntimeError(
                "a backward pass runs inside another, as with reentrant checkpointing, and brings "
                "a micro-batch's gradient in several parts: use checkpoint(use_reentrant=False), "
                "or accumulation='internal'"
            )
        frame = frame.f_back
