"""One update: the mean clipped and applied by torch's own kernels, at the decided rates."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from noiseopt.capture import scale_all
from noiseopt.optim.ended import Ended
from noiseopt.optim.hyper import overridden, scaled_values
from noiseopt.optim.saving import SavesNoise


class AppliesMeans(SavesNoise):
    """The part of `NoiseAware` that changes the parameters. Not to be used alone."""

    _device: torch.device
    _decoupled: bool

    def _apply(self, ended: Ended) -> tuple[Tensor | bool, Tensor | bool]:
        """Clip, average and update in torch's kernel; return what of it was done."""
        assert self._adaptation is not None
        norm = _read(ended.norm)
        factor = None if ended.scale is None else _read(ended.scale)
        clipped: Tensor | bool = False
        if self._adaptation.max_norm < math.inf:
            coefficient = _coefficient(norm, self._adaptation.max_norm)
            clipped = coefficient < 1
            factor = coefficient if factor is None else coefficient * factor
        found_inf: Tensor | bool = False
        if self.config.skip_nonfinite and self._adaptation.acts:
            if isinstance(norm, Tensor) and self._kernels_can_skip:
                found_inf = ~norm.isfinite()
            # Others cannot skip by themselves: this reads the norm.
            elif not math.isfinite(norm):
                return False, False
        self._update(ended.steps, factor, found_inf)
        return (~found_inf if isinstance(found_inf, Tensor) else True), clipped

    def _update(self, steps: int, factor: Tensor | float | None, found_inf: Tensor | bool) -> None:
        assert self._adaptation is not None
        rates = self._adaptation.rates(steps)
        groups = self.param_groups
        numbers = [dict(each) for each in self._numbers()]
        values = [
            scaled_values(group, noise, rates, self.config.min_beta2, self._decoupled)
            for group, noise in zip(groups, numbers, strict=True)
        ]
        if isinstance(factor, float) and factor == 1:
            factor = None
        with overridden(groups, values) if any(values) else nullcontext():
            if factor is not None and not self._scales_in_kernel:
                scale_all(self._all_grads(), factor)
                factor = None
            if factor is not None or isinstance(found_inf, Tensor):
                self._torch_step_scaled(factor, found_inf)
            else:
                self._torch_step()
        if isinstance(found_inf, Tensor) or len(self._unsure):
            self._unsure.add(found_inf, self._numbers(), groups, rates)
        for group, noise in zip(groups, numbers, strict=True):
            group["noise"] = noise

    def _torch_step_scaled(self, factor: Tensor | float | None, found_inf: Tensor | bool) -> None:
        """Have the fused kernel divide by `grad_scale` and skip by `found_inf` as it goes."""
        if isinstance(factor, Tensor):
            self.grad_scale: Tensor | None = factor.reciprocal().float()
        else:
            inverse = math.inf if factor == 0 else 1 / (factor or 1.0)
            self.grad_scale = torch.full((), inverse, dtype=torch.float32, device=self._device)
        self.found_inf: Tensor | None = found_inf.float() if isinstance(found_inf, Tensor) else None
        try:
            self._torch_step()
        finally:
            self.grad_scale = self.found_inf = None

    def _torch_step(self, closure: Callable[[], Any] | None = None) -> Any:
        # torch wraps the `step` of every class of which an instance was built, to run the hooks:
        # called through the wrapper they would run twice.
        step = super().step.__func__  # type: ignore[attr-defined]
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        return step(self, closure)

    def _all_grads(self) -> list[Tensor]:
        return [p.grad for group in self._all_params() for p in group if p.grad is not None]

    @property
    def _all_fused(self) -> bool:
        return all(group.get("fused") for group in self.param_groups)

    @property
    def _kernels_can_skip(self) -> bool:
        """Whether kernels may skip an update; momentum that begins in it would be left unset."""
        begun = len(self.state) == sum(map(len, self._all_params()))
        return self._all_fused and (begun or not any(map(self._begins_momentum, self.param_groups)))

    def _begins_momentum(self, group: dict[str, Any]) -> bool:
        return bool(group.get("momentum")) and any(
            param.grad is not None and self.state.get(param, {}).get("momentum_buffer") is None
            for param in group["params"]
        )

    @property
    def _scales_in_kernel(self) -> bool:
        """Whether the fused kernels may scale the gradients: they take the scale in fp32 only."""
        params = [param for group in self._all_params() for param in group]
        if torch.float64 not in map(attrgetter("dtype"), params):
            return self._all_fused
        doubles = [param for param in params if param.dtype == torch.float64]
        return self._all_fused and all(param.grad is None for param in doubles)


def _read(value: Tensor | float) -> Tensor | float:
    """A plain number, which takes less arithmetic, where reading it waits for nothing."""
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


def _coefficient(norm: Tensor | float, max_norm: float) -> Tensor | float:
    """What clips a gradient of this norm: 1 if it need not be, nan if the norm is."""
    if isinstance(norm, Tensor):
        return (max_norm / norm).clamp(max=1.0)
    return 1.0 if norm <= max_norm else max_norm / norm
