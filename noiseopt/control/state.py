"""Everything about a controller that changes, and its form as a flat dict of plain numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

from noiseopt.control.clipping import NormLevel
from noiseopt.control.config import NoiseConfig
from noiseopt.control.costs import Timing
from noiseopt.control.verification import Verification
from noiseopt.estimate import NoiseEstimator

T = TypeVar("T")
Number = int | float


@dataclass(frozen=True, slots=True)
class ControllerState:
    """The state between two decisions.

    Attributes:
        estimator: the noise estimator.
        norms: level and spread of the gradient norm.
        verification: the loss trend and a pending judgement.
        accumulation_steps: the decided window.
        kept_steps: the window without what it grew by as the learning rate fell, to which it goes
            back where the rate rises again.
        reference_steps: the window for which the user's rates were chosen; not whole where that
            was on another number of ranks.
        noise_ratio: the noise scale's lower bound over the reference batch; 0 while unknown.
        max_norm: the norm at which clipping begins, as last decided; infinite for never.
        num_windows: windows closed, with or without an update.
        num_updates: updates applied.
        gradients_per_step: independent gradients that each micro-batch brings, from all ranks.
        micro_batches: micro-batches seen on one rank, as if there had always been `num_ranks`.
        num_ranks: ranks that take part; 0 while unknown.
        samples_per_micro_batch: what the settings say that one holds on each; 0 if they do not.
        total_clipped: updates whose gradient was clipped.
        total_skipped: micro-batches left out because they were not finite.
        total_dropped: micro-batches of open windows that checkpoints left behind.
        counts_samples: whether windows come counted in samples, not in micro-batches.
        lr: the user's learning rate at the last decision.
        previous_lr: the one before.
        peak_lr: the highest so far.
        changed_at_samples: samples seen at the last change of the window.
        changed_at_updates: updates applied by then.
        reverts: how many changes were reverted.
        blocked_until: no growth before so many samples.
        caution: the factor on the noise scale after reverts.
        decided_at_samples: samples seen at the last decision.
        loss_sum: sum of the losses reported since the last decision.
        loss_count: their number.
        grad_norm: the last window's gradient norm; 0 if it was skipped or is not known.
        clip_coefficient: the least factor that clipping put on a gradient since the last decision.
        timing: the time of windows; None if the objective is not time.
    """

    estimator: NoiseEstimator
    norms: NormLevel
    verification: Verification
    accumulation_steps: int
    kept_steps: int
    reference_steps: float
    noise_ratio: float = 0.0
    max_norm: float = math.inf
    num_windows: int = 0
    num_updates: int = 0
    gradients_per_step: int = 1
    micro_batches: float = 0.0
    num_ranks: int = 0
    samples_per_micro_batch: float = 0.0
    total_clipped: int = 0
    total_skipped: int = 0
    total_dropped: int = 0
    counts_samples: bool = False
    lr: float = 0.0
    previous_lr: float = 0.0
    peak_lr: float = 0.0
    changed_at_samples: float = 0.0
    changed_at_updates: int = 0
    reverts: int = 0
    blocked_until: float = 0.0
    caution: float = 1.0
    decided_at_samples: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    timing: Timing | None = field(default=None, metadata={"optional": True})

    @classmethod
    def initial(cls, config: NoiseConfig, num_groups: int) -> "ControllerState":
        """The state before the first window."""
        steps = config.accumulation_steps
        return cls(
            estimator=NoiseEstimator(
                half_life_fraction=config.half_life_fraction,
                half_life_windows=config.half_life_windows,
                winsorise=config.winsorise,
            ).with_groups(num_groups),
            norms=NormLevel(),
            verification=Verification(),
            accumulation_steps=steps,
            kept_steps=steps,
            reference_steps=float(steps),
            max_norm=config.max_norm,
            samples_per_micro_batch=float(config.samples_per_micro_batch or 0.0),
            counts_samples=config.samples_per_micro_batch is not None,
            timing=_timing(config),
        )

    @property
    def unit(self) -> str:
        """What samples are: "samples" or "micro-batches"."""
        return "samples" if self.counts_samples else "micro-batches"

    @property
    def decay(self) -> float:
        """The highest learning rate so far over the one now; infinite where that is 0."""
        if self.peak_lr == 0:
            return 1.0
        return max(self.peak_lr / self.lr, 1.0) if self.lr > 0 else math.inf

    @property
    def phase(self) -> str:
        """What the user's schedule is doing: "warm-up", "stable" or "decay"."""
        if self.lr > self.previous_lr:
            return "warm-up"
        return "decay" if self.lr < self.peak_lr * (1 - 1e-6) else "stable"

    def within(self, config: NoiseConfig) -> "ControllerState":
        """The same state in the bounds of other settings, as after a load."""
        low, high = config.min_accumulation_steps, config.max_accumulation_steps
        ceiling = config.max_norm
        return replace(
            self,
            accumulation_steps=min(max(self.accumulation_steps, low), high),
            kept_steps=min(max(self.kept_steps, low), high),
            max_norm=min(self.max_norm, ceiling) if config.adapt_clip else ceiling,
            timing=self.timing if self.timing and _timing(config) else _timing(config),
        )

    def verdict(self, tolerance: float) -> str:
        """Whether the last change hurt the loss: "hurt", "fine" or "open"."""
        return self.verification.verdict(max(self.estimator.samples_seen, 1.0), tolerance)

    def dwelt(self, config: NoiseConfig) -> bool:
        """Whether the last change is so many samples back that a window that grew may shrink."""
        distance = self.estimator.samples_seen - self.changed_at_samples
        return distance >= config.dwell_fraction * self.estimator.samples_seen

    def settled(self, config: NoiseConfig) -> bool:
        """Whether it is so many samples and updates back that a window may grow by the noise.

        Or the user's own window, or a shorter one, shrink.
        """
        updates = self.num_updates - self.changed_at_updates
        return self.dwelt(config) and updates >= config.dwell_updates


def _timing(config: NoiseConfig) -> Timing | None:
    return Timing() if config.objective == "time" else None


def _state_names(state: Any) -> list[str]:
    kind: Any = type(state)
    return _names_of_kind(kind)


@cache
def _names_of_kind(kind: type[Any]) -> list[str]:
    return [item.name for item in fields(kind) if not item.metadata.get("setting")]


def to_numbers(state: Any, prefix: str = "") -> dict[str, Number]:
    """Flatten nested dataclasses and tuples of them into {"outer.inner": number}, without None."""
    if state is None:
        return {}
    if is_dataclass(state):
        items = [(name, getattr(state, name)) for name in _state_names(state)]
    elif isinstance(state, tuple):
        items = [(str(index), value) for index, value in enumerate(state)]
    else:
        return {prefix: state}
    numbers: dict[str, Number] = {}
    for name, value in items:
        numbers |= to_numbers(value, f"{prefix}.{name}" if prefix else name)
    return numbers


def from_numbers(like: T, numbers: Mapping[str, Number], prefix: str = "") -> T:
    """Rebuild what `to_numbers` flattened, in the shape of `like`.

    What is optional and was not saved, as by other settings, stays as it is in `like`.

    Raises:
        ValueError: a number is missing; names it.
    """
    if isinstance(like, ControllerState) and "accumulation_steps" in numbers:
        # States from before lack these: what grew by the decay was not told apart, and stays.
        lacked = {"kept_steps": numbers["accumulation_steps"], "samples_per_micro_batch": 0.0}
        numbers = {**lacked, **numbers}
    return cast("T", _rebuild(like, numbers, prefix))


def _is_there(state: Any, name: str, numbers: Mapping[str, Number], prefix: str) -> bool:
    if getattr(state, name) is None:
        return False
    optional = any(item.name == name and item.metadata.get("optional") for item in fields(state))
    return not optional or any(key.startswith(f"{prefix}{name}.") for key in numbers)


def _rebuild(like: Any, numbers: Mapping[str, Number], prefix: str) -> Any:
    if is_dataclass(like):
        inner = f"{prefix}." if prefix else ""
        old: Any = like
        names = [name for name in _state_names(old) if _is_there(old, name, numbers, inner)]
        new = {name: _rebuild(getattr(old, name), numbers, inner + name) for name in names}
        return replace(old, **new)
    if isinstance(like, tuple):
        return tuple(
            _rebuild(value, numbers, f"{prefix}.{index}") for index, value in enumerate(like)
        )
    if prefix not in numbers:
        raise ValueError(
            f"the saved noise state lacks {prefix!r}: it is of another version or number of "
            "parameter groups; load the optimizer without its 'noise' entries to start it anew"
        )
    return type(like)(numbers[prefix])
