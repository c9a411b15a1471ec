"""The settings of noise-aware training: plain values, checked once, before anything is changed."""

import math
from dataclasses import dataclass, fields
from typing import Any

MODES = ("auto", "advise", "off")
ACCUMULATIONS = ("internal", "external")
GRADIENTS = ("auto", "local")
LOSS_REDUCTIONS = ("mean", "sum")
OBJECTIVES = ("updates", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig:
    """What a noise-aware optimizer measures, decides and may change.

    Attributes:
        mode: "auto" measures and adapts; "advise" measures, decides and records, and changes
            nothing; "off" is torch's own optimizer.
        accumulation_steps: micro-batches in the first window; with the learning rate they are the
            reference from which the batch is scaled.
        min_accumulation_steps: the shortest window that may be decided.
        max_accumulation_steps: the longest window that may be decided.
        accumulation: "internal": each call of `step()` brings one micro-batch and the optimizer
            averages a window of them. "external": the loop accumulates a whole window in `p.grad`,
            as long as `accumulation_steps` says, and calls `step()` once.
        gradients: "auto": when `step()` is called `p.grad` holds the mean over ranks, as DDP and
            FSDP2 leave it, except after `accumulate(model)`. "local": it holds this rank's own, as
            of a model that is not wrapped, or of DDP inside `accumulate(model)`; the optimizer
            averages them over all samples, and ranks may have different numbers of micro-batches.
        loss_reduction: "mean": the loss is a mean over its micro-batch. "sum": it is a sum, and
            `set_samples` says of how many or of what weight; the optimizer divides by the sum of
            all, over ranks and micro-batches.
        objective: what windows are chosen for. "updates": as few as `update_price` and the noise
            allow. "time": the most progress in a second, by the price of an update that is
            measured. While the costs of an update and of a micro-batch are not known apart, and now
            and then later, the windows between two decisions are twice as long, to time them.
        samples_per_micro_batch: samples in one micro-batch on one rank. If not given, noise and
            batches are counted in micro-batches.
        tokens_per_sample: tokens in one sample, such as the length of a sequence; for the record
            only. If given, decisions tell the tokens seen.
        half_life_fraction: half-life of the averages, as a share of the samples seen.
        half_life_windows: its least length, in measured windows.
        winsorise: standard deviations beyond which a window counts as an outlier.
        confidence: the level of every interval and bound.
        decision_interval: updates between two decisions. Measurements stay on the device until
            then, so that no other update waits for it.
        probe_interval: where windows have one gradient and show no noise, every so many updates
            use a window of two; the first 64 such probes come four times as often, and after 512
            there is one in every 512th part of the run. 0 never probes: the noise stays unknown.
        measure_interval: where gradients are read as the backward brings them (across ranks, by
            DeepSpeed, with external accumulation), windows from one that is read to the next; a
            run's first 64 all are. The others still tell the norm of their mean.
        min_count: measured windows that an estimate must rest on to be acted upon.
        grow_by_noise: grow up to the root of the noise scale times the price of an update.
        update_price: what an update is taken to cost, in batches of the first window: at 4 windows
            grow up to twice the geometric mean of that batch and the noise scale, at 1 up to that
            mean. A short run of some thousand micro-batches loses less at 1, and saves less.
        grow_in_decay: grow as the schedule lowers the learning rate (Seesaw, Meterez et al. 2026),
            and give that back as it raises it again.
        decay_noise_fraction: in decay, the noise fraction's lower bound that growth requires. Of
            the norm in which Adam steps, noise is a larger part than of the plain one.
        shrink: halve the window when the batch lies above both the noise scale and what pays; where
            the objective is time, above what pays. A window that has grown is halved from sqrt(2)
            times that on, or from 2 sqrt(2) while it follows a falling learning rate; the first
            window, or a shorter one, from 2 sqrt(2) times what the scale's upper bound says.
        dwell_fraction: the least distance of growth by the noise, or of shrinking, from the last
            such change, as a share of the samples seen.
        dwell_updates: the same in updates, and before the first change too; the longer of the two
            holds. Windows that have grown may shrink without it. Short runs lost by growing
            earlier (`benchmarks/convergence`).
        adapt_lr: couple the learning rate to the batch by the optimizer's own rule.
        max_lr_factor: the largest factor on the user's learning rate; its inverse is the smallest.
            If not given, what the optimizer's rule makes of four times the batch, 2 for Adam and 4
            for SGD: growth beyond it cools, as a lower rate would.
        adapt_beta1: keep the distance over which Adam's first moment averages, half-life times
            learning rate.
        adapt_beta2: keep the half-life of Adam's second moment in samples; off, since losses were
            no higher without it (`benchmarks/convergence`).
        min_beta2: the least beta2 that this may lead to.
        adapt_weight_decay: keep the timescale of decoupled weight decay in samples; off, since
            losses were lower without it (`benchmarks/convergence`).
        verify: watch the loss after a change, where it is known, and revert what hurt; off, since
            it found nothing to revert and holds up growth (`benchmarks/convergence`).
        loss_tolerance: how much worse than its trend, relative to it, the loss may become.
        max_reverts: reverts after which the batch is no longer changed, but for giving back what
            it grew by as the learning rate fell.
        adapt_clip: clip at the noise-predicted norm, widened by its observed spread.
        clip_z: standard deviations of the log norm above its level where clipping begins.
        max_norm: a ceiling on the norm that holds from the first update, as in
            `clip_grad_norm_`; infinite for none.
        skip_nonfinite: leave out micro-batches whose gradient is not finite.

    Raises:
        ValueError: a value is out of its range or contradicts another; names both and what is
            allowed.
        TypeError: a value is of the wrong type.
    """

    mode: str = "auto"
    accumulation_steps: int = 1
    min_accumulation_steps: int = 1
    max_accumulation_steps: int = 32
    accumulation: str = "internal"
    gradients: str = "auto"
    loss_reduction: str = "mean"
    objective: str = "updates"
    samples_per_micro_batch: float | None = None
    tokens_per_sample: float | None = None
    half_life_fraction: float = 0.03
    half_life_windows: float = 32.0
    winsorise: float = 5.0
    confidence: float = 0.95
    decision_interval: int = 10
    probe_interval: int = 32
    measure_interval: int = 4
    min_count: float = 8.0
    grow_by_noise: bool = True
    update_price: float = 4.0
    grow_in_decay: bool = True
    decay_noise_fraction: float = 1 / 3
    shrink: bool = True
    dwell_fraction: float = 0.05
    dwell_updates: int = 400
    adapt_lr: bool = True
    max_lr_factor: float | None = None
    adapt_beta1: bool = True
    adapt_beta2: bool = False
    min_beta2: float = 0.9
    adapt_weight_decay: bool = False
    verify: bool = False
    loss_tolerance: float = 0.005
    max_reverts: int = 3
    adapt_clip: bool = True
    clip_z: float = 3.0
    max_norm: float = math.inf
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            self._settle_type(item.name, str(item.type))
        self._check("mode", self.mode in MODES, f"one of {MODES}")
        self._check("accumulation", self.accumulation in ACCUMULATIONS, f"one of {ACCUMULATIONS}")
        self._check("gradients", self.gradients in GRADIENTS, f"one of {GRADIENTS}")
        reductions = LOSS_REDUCTIONS
        self._check("loss_reduction", self.loss_reduction in reductions, f"one of {reductions}")
        self._check("objective", self.objective in OBJECTIVES, f"one of {OBJECTIVES}")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        for name in _NOT_NEGATIVE:
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in _POSITIVE:
            self._check(name, getattr(self, name) > 0, "positive")
        for name in _SHARES:
            self._check(name, 0 < getattr(self, name) < 1, "between 0 and 1")
        self._check("confidence", self.confidence > 0.5, "above 0.5 and below 1")
        self._check_range()

    def _check_range(self) -> None:
        low, high = self.min_accumulation_steps, self.max_accumulation_steps
        self._check(
            "accumulation_steps",
            low <= self.accumulation_steps <= high,
            f"from min_accumulation_steps = {low} to max_accumulation_steps = {high}",
        )
        for name, otherwise in _COUNTS:
            value = getattr(self, name)
            given = value is not None
            self._check(
                name, not given or 0 < value < math.inf, f"positive and finite, {otherwise}"
            )
        if self.accumulation == "external":
            self._check("gradients", self.gradients == "auto", "'auto': the loop averages them")
            self._check("loss_reduction", self.loss_reduction == "mean", "'mean': the loop divides")
        self._check("update_price", self.update_price < math.inf, "finite")
        self._check(
            "probe_interval", self.probe_interval != 1, "0 (never) or at least 2 updates apart"
        )

    def _settle_type(self, name: str, annotation: str) -> None:
        value: Any = getattr(self, name)
        kind = annotation.removeprefix("<class '").removesuffix("'>").split(" ")[0]
        allowed: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "float": (int, float),
            "bool": (bool,),
            "str": (str,),
        }
        if value is None and "None" in annotation:
            return
        if not isinstance(value, allowed[kind]) or (kind != "bool" and isinstance(value, bool)):
            raise TypeError(f"NoiseConfig.{name} is {value!r}: it must be of type {kind}")
        if kind == "float":
            value = float(getattr(self, name))
            object.__setattr__(self, name, value)  # what a state holds keeps its first type
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"NoiseConfig.{name} is nan: it must be a number")

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"NoiseConfig.{name} is {getattr(self, name)!r}: it must be {allowed}")


_COUNTS = (
    ("samples_per_micro_batch", "or None to count micro-batches"),
    ("tokens_per_sample", "or None not to count tokens"),
)
_AT_LEAST_ONE = (
    "accumulation_steps",
    "min_accumulation_steps",
    "max_accumulation_steps",
    "half_life_windows",
    "winsorise",
    "decision_interval",
    "measure_interval",
    "min_count",
    "dwell_updates",
    "max_lr_factor",
    "max_reverts",
)
_NOT_NEGATIVE = ("probe_interval", "dwell_fraction", "loss_tolerance")
_POSITIVE = ("clip_z", "max_norm", "update_price")
_SHARES = ("half_life_fraction", "confidence", "decay_noise_fraction", "min_beta2")
