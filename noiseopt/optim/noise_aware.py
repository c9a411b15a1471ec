"""The mixin that makes a torch optimizer noise-aware, without changing what it is.

One call of `step()` brings one noisy gradient; the optimizer averages `accumulation_steps` of them
and applies the mean by torch's own kernels. In between it reads norms, and at decision points it
lets the controller choose the next windows, the rates and the clipping threshold.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from noiseopt.adaptation import Adaptation
from noiseopt.capture import device_of, end_row, only_builds_state
from noiseopt.control import NoiseConfig, group_names
from noiseopt.optim.checks import check_group, check_step
from noiseopt.optim.collector import GradientCollector
from noiseopt.optim.ended import Ended
from noiseopt.optim.hyper import decouples_weight_decay, overridden, settings_of, values_from
from noiseopt.optim.kernels import give_up_fused, prefer_fused
from noiseopt.optim.saving import SavesNoise
from noiseopt.optim.unsure import UnsureUpdates
from noiseopt.optim.update import AppliesMeans
from noiseopt.parallel import ranks_of
from noiseopt.words import can_measure

logger = logging.getLogger("noiseopt")


class NoiseAware(AppliesMeans):
    """Measures the gradient noise of a torch optimizer and adapts batch, rates and clipping to it.

    Combine it with an optimizer class through `noise_aware`. Every argument of that class comes
    first; two are added, by keyword only.

    Args:
        params: as for the torch optimizer.
        *args: as for the torch optimizer.
        noise: "auto" (measure and adapt), "advise" (measure, decide and record, change nothing),
            "off" (bitwise the torch optimizer), or a `NoiseConfig`.
        process_group: the ranks that share the gradients; the default group if None.
        **kwargs: as for the torch optimizer.

    Raises:
        ValueError: an argument is out of range, or a kind of parameter cannot be measured.
    """

    rate_rule: ClassVar[str] = "adam"

    def __init__(
        self,
        params: Any,
        *args: Any,
        noise: str | NoiseConfig = "auto",
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        self.config = noise if isinstance(noise, NoiseConfig) else NoiseConfig(mode=noise)
        self._process_group = process_group
        super().__init__(params, *args, **kwargs)
        self._begin()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]
        if "zero_grad" not in cls.__dict__:
            cls.zero_grad = _clearing(cls.zero_grad)  # type: ignore[method-assign]

    def _begin(self) -> None:
        """Set up measuring for the parameters and the numbers that the groups hold."""
        self._applied: Tensor | bool = False
        self._off_updates = 0
        self._logged = False
        if self.config.mode == "off":
            return
        for group in self.param_groups:
            check_group(group)
        acts = self.config.mode == "auto"
        self._chose_fused = acts and (self._chose_fused or prefer_fused(self))
        # torch's fused optimizers offer to unscale and skip by themselves; a window cannot let
        # them, since the loss scale may change inside it. GradScaler then does it before step().
        self._step_supports_amp_scaling = False
        self._decoupled = decouples_weight_decay(type(self))
        self._device = device_of(self._all_params())
        groups = self._all_params()
        ranks = ranks_of(groups, self._process_group)
        self._adaptation = Adaptation(
            self.config, self.rate_rule, group_names(self.param_groups), ranks
        )
        self._adaptation.settings = lambda: settings_of(self)
        self._unsure = UnsureUpdates(self.config.min_beta2)
        self._collector = GradientCollector(self.config, ranks, groups, self._adaptation)
        self._restore()

    # ------------------------------------------------------------------ what is offered

    @property
    def applied(self) -> bool:
        """Whether the last `step()` changed the parameters. On an accelerator this waits for it."""
        return bool(self._applied)

    @property
    def num_updates(self) -> int:
        """Updates applied; not calls of `step()`. On an accelerator this waits for it."""
        return self._adaptation.num_updates if self._adaptation else self._off_updates

    def set_loss_scale(self, scale: float | Tensor) -> None:
        """With accumulation="external": the factor on the losses of the open window."""
        if self._adaptation:
            self._collector.set_loss_scale(scale)

    def shorten_window(self, steps: int) -> None:
        """Say before its last micro-batch that the open window ends early, after so many.

        Raises:
            ValueError: it would not be shorter, or has had more already.
        """
        if self._adaptation:
            self._collector.go_on_unstepped(self._all_params())
            self._adaptation.shorten(steps, self._collector.taken())

    @contextmanager
    def accumulate(self, model: torch.nn.Module) -> Iterator[None]:
        """Wrap forward and backward of one micro-batch: gradients are averaged once per window.

        Under DDP, or with a model that is not wrapped, each rank sums its own gradients in fp32 and
        the optimizer averages the sums, weighted by their samples, when the window ends; a window
        of one DDP averages itself, while the backward runs. With `NoiseConfig(gradients="local")`
        the optimizer always does: then ranks may also bring different numbers of micro-batches, if
        each calls `flush` at the end of its data. FSDP2 sums unsharded gradients and reduces them
        in the window's last backward, each micro-batch weighing the same; before that `p.grad` is
        None, and after that block it is the window's mean, to be clipped by the loop if it clips.
        On a single rank it does nothing.

        Args:
            model: the wrapped model.

        Raises:
            ValueError: gradients are averaged by a mesh in a way that cannot wait.
        """
        if not self._adaptation:
            yield
            return
        self._count_unstepped(self._adaptation)
        with self._collector.accumulate(model, self._all_params()):
            yield

    @torch.no_grad()
    def _count_unstepped(self, adaptation: Adaptation) -> None:
        groups = self._all_params()
        if not self._collector.is_unstepped(groups):
            return
        if not self._logged:
            self._start(adaptation)
        ended = self._collector.take_unstepped(groups)
        if ended is not None:
            self._finish_out_of_turn(ended)

    def flush(self) -> bool:
        """Apply an open window as it is, for instance at the end of the data, and clear gradients.

        With `NoiseConfig(gradients="local")` it goes on to take part in the other ranks' windows
        until every rank has called it. Otherwise all ranks must have had as many micro-batches.

        Returns:
            Whether there was one to apply.

        Raises:
            RuntimeError: the open window's gradients are still in FSDP2's hands.
        """
        if not self._adaptation:
            return False
        self._count_unstepped(self._adaptation)
        if self.config.gradients == "local" and not self._logged:
            self._start(self._adaptation)
        if self.config.accumulation == "internal":
            self._adaptation.losses.forget()  # of one whose step a GradScaler has skipped
        windows = 0
        with torch.no_grad():
            for ended in self._collector.flush(self._all_params()):
                self._finish_out_of_turn(ended)
                windows += 1
        return windows > 0

    # ------------------------------------------------------------------ the step

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one micro-batch's gradient from `p.grad`; at the window's end, apply the mean.

        Args:
            closure: evaluates the model, runs the backward and returns the loss; called once.

        Raises:
            RuntimeError: no parameter has a gradient, or the ranks' gradients differ.
        """
        if not self._adaptation:
            self._off_updates, self._applied = self._off_updates + 1, True
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            # A closure may return anything; what is one number is taken for the loss.
            if isinstance(loss, int | float) or (isinstance(loss, Tensor) and loss.numel() == 1):
                self.report_loss(loss)
        with torch.no_grad():
            self._take_gradient(self._adaptation)
        return loss

    def _take_gradient(self, adaptation: Adaptation) -> None:
        if not self.state and only_builds_state():
            self._torch_step()
            return
        has_gradient = any(p.grad is not None for params in self._all_params() for p in params)
        if has_gradient or not self._collector.may_lack_gradients(self._all_params()):
            check_step(self.param_groups, has_gradient)
        if not self._logged:
            self._start(adaptation)
        self._applied = False
        ended = self._collector.take(self._all_params())
        if ended is not None:
            self._finish(ended)

    def _finish_out_of_turn(self, ended: Ended) -> None:
        """Apply what no `step()` of this rank's loop ends: at other ranks' rates, if they lead."""
        assert self._adaptation is not None
        groups = self.param_groups
        try:
            with overridden(groups, values_from(self._adaptation.followed, groups)):
                self._finish(ended)
        finally:
            self.zero_grad()  # which a loop does after its step()

    def _finish(self, ended: Ended) -> None:
        """Apply the mean that `p.grad` holds, and close the window."""
        assert self._adaptation is not None
        self._applied = False
        if self._chose_fused:
            give_up_fused(self)
        try:
            self._applied, clipped = self._apply(ended)
        finally:
            self._collector.clear(keep_memory=True)
        end_row(ended.row, self._applied, clipped)
        if self._adaptation.is_due:
            self._unsure.settle(self._numbers())
        try:
            self._adaptation.close_window(ended.row, self._user_lr)
        finally:  # an observer that raises finds everything in place
            if self._adaptation.steps == 1:
                self._collector.clear(keep_memory=False)
            self._collector.open_window()

    def _user_lr(self) -> float:
        return max(float(group["lr"]) for group in self.param_groups)

    def _start(self, adaptation: Adaptation) -> None:
        groups = self._all_params()
        adaptation.start(groups, self._process_group)
        self._logged = True
        level = logging.INFO if can_measure(adaptation) else logging.WARNING
        logger.log(level, "%s", self._describe(adaptation))


def _clearing(theirs: Callable[..., None]) -> Callable[..., None]:
    """A torch optimizer's own `zero_grad`, with its own arguments, which is seen before it runs."""
    if hasattr(theirs, "is_seen"):
        return theirs

    @wraps(theirs)
    def zero_grad(self: NoiseAware, *args: Any, **kwargs: Any) -> None:
        if self._adaptation:
            self._collector.see_clearing()
        theirs(self, *args, **kwargs)

    zero_grad.is_seen = True  # type: ignore[attr-defined]
    return zero_grad


def _signature(cls: type[NoiseAware]) -> inspect.Signature:
    """The torch optimizer's own arguments, then ours, as `help` and editors show them."""
    if "__init__" in cls.__dict__:
        own = list(inspect.signature(cls.__init__).parameters.values())
        return inspect.Signature(own[1:])
    torch_class = next(
        base
        for base in cls.__mro__
        if issubclass(base, Optimizer) and not issubclass(base, SavesNoise)
    )
    theirs = inspect.signature(torch_class).parameters.values()
    rest = [each for each in theirs if each.kind is each.VAR_KEYWORD]  # which comes last
    ours = inspect.signature(NoiseAware.__init__).parameters
    named = [each for each in theirs if each not in rest]
    return inspect.Signature([*named, ours["noise"], ours["process_group"], *rest])
