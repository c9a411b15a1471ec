"""The same measurements and decisions for those who keep their own optimizer and loop.

The loop accumulates `monitor.accumulation_steps` backward passes in `p.grad`, each loss divided by
that number, and steps its optimizer. The monitor reads norms in the backward, without a copy of any
gradient, and closes the window when the optimizer steps. What it decides is carried out by the
schedulers of `noiseopt.schedulers`, or by the loop itself.
"""

import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from noiseopt.adaptation import Adaptation
from noiseopt.capture import (
    UNSEEN,
    BackwardCapture,
    device_of,
    end_row,
    norm_of_mean,
    only_builds_state,
    settled,
    squared_norms,
)
from noiseopt.control import RATE_RULES, NoiseConfig, Rates, group_names
from noiseopt.deciding import Number
from noiseopt.loop_checks import LoopChecks
from noiseopt.optim import NoiseAware
from noiseopt.optim.hyper import settings_of
from noiseopt.parallel import ranks_of
from noiseopt.readings import NoiseReadings


class NoiseMonitor(NoiseReadings):
    """Measures the gradient noise of any torch optimizer, and decides for it.

    Args:
        optimizer: the optimizer whose parameters are watched. Its steps close the windows.
        noise: "auto", "advise" (the schedulers then change nothing) or a `NoiseConfig`.
        rate_rule: "adam" (the saturating square root) or "sgd" (AdaScale's gain).
        grad_scaler: the GradScaler that scales the losses, if one does.
        process_group: the ranks that share the gradients; the default group if None.

    Attributes:
        config: the settings.
        optimizer: the optimizer.
        scales: whether a `NoiseAwareLR` scales its rates.

    Raises:
        TypeError: the optimizer is none of torch's, or measures its noise by itself.
        ValueError: an argument is out of range.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = NoiseMonitor(optimizer, noise=NoiseConfig(accumulation_steps=2))
        >>> for _ in range(monitor.accumulation_steps):
        ...     (model(torch.ones(8, 4)).mean() / monitor.accumulation_steps).backward()
        >>> optimizer.step()
        >>> monitor.num_updates
        1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        noise: str | NoiseConfig = "auto",
        *,
        rate_rule: str = "adam",
        grad_scaler: GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"the optimizer is a {type(optimizer).__name__}: give the monitor the torch "
                "optimizer that trains the model"
            )
        if isinstance(optimizer, NoiseAware):
            raise TypeError(
                f"{type(optimizer).__name__} measures its noise by itself: use its own readings, "
                "or give the monitor a plain torch optimizer"
            )
        self.config = noise if isinstance(noise, NoiseConfig) else NoiseConfig(mode=noise)
        if self.config.mode == "off":
            raise ValueError("mode is 'off': a monitor that measures nothing; leave it out instead")
        if rate_rule not in RATE_RULES:
            raise ValueError(f"rate_rule is {rate_rule!r}: it must be one of {tuple(RATE_RULES)}")
        self.optimizer = optimizer
        self.scales = False
        self._grad_scaler = grad_scaler
        self._process_group = process_group
        self._started = False
        self._only_builds_state = False  # whether the step that runs is checkpointing's
        self._passes_over = False  # whether a state was loaded since the window's backward passes
        groups = [group["params"] for group in optimizer.param_groups]
        ranks = ranks_of(groups, process_group)
        names = group_names(optimizer.param_groups)
        self._adaptation: Adaptation = Adaptation(self.config, rate_rule, names, ranks)
        told = weakref.proxy(self._adaptation)  # the hooks keep nothing alive
        self._capture = BackwardCapture(
            groups,
            lambda: told.steps,
            ranks.share if ranks.sharded else None,
            lambda: told.measures,
            lambda totals: told.summed_parts(totals),
        )
        self._capture.passes.end_with(self)
        self._checks = LoopChecks(ranks)
        self._micro_batches = 0
        self._closing: int | None = None  # the window's micro-batches, while the optimizer steps
        # The rates are read before the step, where no scheduler has scaled them; the window is
        # closed after it, so that a decision rules the next window and not this one.
        self._user_lrs: list[float | Tensor] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._close_window),
        ]

    @property
    def num_updates(self) -> int:
        """Updates of the optimizer. On an accelerator this waits for it."""
        return self._adaptation.num_updates

    @property
    def micro_batches(self) -> int:
        """Micro-batches in all closed windows, on this rank."""
        return self._micro_batches

    @property
    def rates(self) -> Rates:
        """The factors on the user's hyper-parameters for the open window.

        While the optimizer steps they are for the micro-batches that it had.
        """
        return self._adaptation.rates(self._closing or self.accumulation_steps)

    @property
    def max_norm(self) -> float:
        """The norm at which the open window's gradient is to be clipped; infinite for never."""
        return self._adaptation.max_norm

    def shorten_window(self, steps: int) -> None:
        """Say before its last backward that the open window ends early, at the end of the data.

        Raises:
            ValueError: it would not be shorter.
        """
        self._adaptation.shorten(steps, self._capture.taken())

    def detach(self) -> None:
        """Stop watching: remove every hook."""
        self._capture.detach()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Number]:
        """The state as plain numbers. An open window is left behind, and counted."""
        numbers = self._adaptation.to_numbers(dropped=self._num_taken)
        return numbers | {"monitor.micro_batches": self._micro_batches}

    def load_state_dict(self, state_dict: dict[str, Number]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another version or number of groups; nothing is changed then.
        """
        if "monitor.micro_batches" not in state_dict:
            raise ValueError(
                "the state lacks 'monitor.micro_batches': it is not of a NoiseMonitor; load what "
                "NoiseMonitor.state_dict() returned"
            )
        self._passes_over = self._num_taken > 0
        if self._passes_over:
            warnings.warn(
                f"a state is loaded inside a window: the {self._num_taken} micro-batches that it "
                "has had are not measured; load right after an update to lose nothing",
                stacklevel=2,
            )
        self._adaptation.load_numbers(state_dict)
        self._micro_batches = int(state_dict["monitor.micro_batches"])
        self._capture.clear()
        self._started = False  # ranks compare what they go on from, as at the start

    @property
    def _num_taken(self) -> int:
        return self._capture.num_skipped + len(self._capture)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._only_builds_state = not optimizer.state and only_builds_state()
        if self._only_builds_state:
            return
        self._user_lrs = [group["lr"] for group in optimizer.param_groups]
        if self._adaptation.ranks.all > 1:
            settings = settings_of(optimizer)
            self._adaptation.settings = lambda: settings
        self._settle()
        self._closing = len(self._capture) or None
        has_closure = any(map(callable, (*args[1:], *kwargs.values())))  # whose backward is to come
        if self._closing is None and not has_closure and not self._passes_over:
            self._refuse_unseen()
        self._passes_over = False

    def _refuse_unseen(self) -> None:
        """Refuse to pass over gradients that no backward pass has brought."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = [settled(param.grad) for param in params if param.grad is not None]
        if bool(squared_norms([grads], device_of([params])).sum() != 0):
            raise RuntimeError(UNSEEN)

    def _settle(self) -> None:
        groups = [group["params"] for group in self.optimizer.param_groups]
        new = groups[self._adaptation.num_groups :]
        for group in new:
            self._capture.add_group(group)
        if new:
            self._adaptation.set_groups(group_names(self.optimizer.param_groups))
        told = self._grad_scaler is not None
        self._checks.settle(self._capture, groups, self.accumulation_steps, told)

    @torch.no_grad()
    def _close_window(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._only_builds_state:
            return
        if len(self._capture) != self._closing:  # a closure's backward passes came since
            self._settle()
        rates = self.rates if self.scales else None
        self._closing = None
        if len(self._capture) == 0:
            return  # as after a closure that runs no backward: no window has ended
        adaptation = self._adaptation
        groups = [group["params"] for group in optimizer.param_groups]
        if not self._started:
            self._started = True
            adaptation.start(groups, self._process_group)
        samples = adaptation.samples.take_window(self._num_taken)
        measured = self._capture.close(groups, samples, self._loss_scale())
        row = adaptation.agree(measured, rates=rates)
        self._micro_batches += len(samples)
        # A GradScaler lets fused kernels skip by themselves, inside a step that was called.
        found_inf = getattr(optimizer, "found_inf", None)
        applied = True if found_inf is None else found_inf == 0
        end_row(row, applied, applied & (norm_of_mean(row) > adaptation.max_norm))
        adaptation.close_window(row, self._lr)

    def _loss_scale(self) -> float | Tensor:
        if self._grad_scaler is None or not self._grad_scaler.is_enabled():
            return 1.0
        scale = self._grad_scaler._get_scale_async()
        return 1.0 if scale is None else scale

    def _lr(self) -> float:
        return max(map(float, self._user_lrs))
