"""One run: a task trained by an arm in a scenario, told as plain numbers.

Ours is the optimizer itself, in the loop of the README. What its controller would propose is
replaced by the plan's windows, as if it had decided on them; its rates stay as they are, so that
clipping is all in which it differs. Everything else is its own.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

from benchmarks.clipping.rules import RULES, Rule, norm_of
from benchmarks.clipping.scenarios import Batch, Plan, Scenario
from benchmarks.clipping.tasks import Task
from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.control import Decision, controller
from noiseopt.control.proposal import Change
from noiseopt.control.state import ControllerState

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARM_UP = 0.05  # of the run, in which the rate rises
OURS: dict[str, dict[str, Any]] = {
    "noiseopt": {},
    "noiseopt, ceiling 1.0": {"max_norm": 1.0},
    "noiseopt, clip_z 3.5": {"clip_z": 3.5},
}
GUARDED = " + skip"  # a rival that leaves out an update whose gradient is not finite


@dataclass(frozen=True)
class Part:
    """A micro-batch, and the factor on its loss."""

    batch: Batch
    factor: float = 1.0


@dataclass
class Trace:
    """What happened, by updates.

    Attributes:
        clean: whether nothing was injected.
        factors: what clipping left of the gradient's norm; 0 where the update was left out, and nan
            where the gradient was not finite and was used nevertheless.
        losses: after it, on held-out samples.
        restarts: the updates from which on the losses are of another domain.
        nonfinite: the first update after which a parameter, and so the loss, was not finite; where
            the loss does not show it, the last.
    """

    clean: list[bool] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    nonfinite: int | None = None


class Trainer(Protocol):
    """Trains a model window by window.

    Attributes:
        factors: of every update so far, as in `Trace`; ours are told late, with its decisions.
    """

    factors: list[float]

    def update(self, window: Sequence[Part], lr: float) -> None:
        """Take in a window and update."""


class Rival:
    """Plain AdamW, whose gradients a rule clips."""

    def __init__(self, model: nn.Module, rule: Rule, guarded: bool) -> None:
        self.model, self.rule, self.guarded = model, rule, guarded
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.factors: list[float] = []

    def update(self, window: Sequence[Part], lr: float) -> None:
        self.optimizer.zero_grad()
        for part in window:
            (self.model(*part.batch) * (part.factor / len(window))).backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = norm_of(grads)
        if self.guarded and not math.isfinite(norm):
            self.factors.append(0.0)
            return
        self.rule.clip_(grads)
        self.factors.append(norm_of(grads) / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class Ours:
    """The loop of somebody who uses our optimizer, as the README has it."""

    def __init__(self, model: nn.Module, noise: NoiseConfig) -> None:
        self.model = model
        self.optimizer = NoiseAwareAdamW(
            model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, noise=noise
        )
        self.factors: list[float] = []
        self._max_norm = noise.max_norm
        self.optimizer.add_observer(self._observe)

    def update(self, window: Sequence[Part], lr: float) -> None:
        steps = self.optimizer.accumulation_steps
        if steps != len(window):
            raise RuntimeError(f"the optimizer's window is {steps}, and the plan's {len(window)}")
        for part in window:
            loss = self.model(*part.batch)
            (loss * part.factor).backward()
            self.optimizer.report_loss(loss)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _observe(self, decision: Decision) -> None:
        for window in decision.windows:
            factor = float(window.applied)
            if window.clipped and window.norms is not None:
                factor = self._max_norm / math.sqrt(math.fsum(window.norms.big_sq))
            self.factors.append(factor)
        self._max_norm = decision.max_norm


def config(**changes: Any) -> NoiseConfig:
    """The defaults with such changes, whose rates do not follow the windows of the plan."""
    rates = ("adapt_lr", "adapt_beta1", "adapt_beta2", "adapt_weight_decay")
    held = dict.fromkeys((*rates, "verify"), False)
    return NoiseConfig(**held | changes)


@contextmanager
def deciding_on(plan: Plan) -> Iterator[None]:
    """Let every controller decide on the windows of a plan."""

    def planned(config: NoiseConfig, state: ControllerState, *measured: object) -> Change:
        steps = plan.steps(state.num_windows)
        larger = "grow" if steps > state.accumulation_steps else "shrink"
        action = "hold" if steps == state.accumulation_steps else larger
        return Change(action, steps, "the benchmark's plan")

    with mock.patch.object(controller, "propose", planned):
        yield


def trainer_of(arm: str, model: nn.Module) -> Trainer:
    """The trainer of an arm."""
    if arm in OURS:
        return Ours(model, config(**OURS[arm]))
    return Rival(model, RULES[arm.removesuffix(GUARDED)](), arm.endswith(GUARDED))


def schedule(share: float) -> float:
    """The factor on the peak rate after such a share of the run: warm-up, cosine to a tenth."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def window_of(
    batches: Iterator[Batch], steps: int, update: int, task: Task, scenario: Scenario, plan: Plan
) -> tuple[list[Part], bool]:
    """The next window, and whether it is clean."""
    found = list(islice(batches, steps))
    if len(found) < steps:
        raise RuntimeError(f"the data ends in update {update + 1} of {plan.updates}")
    if scenario.switched(update, plan):
        found = [task.other(batch) for batch in found]
    injection = scenario.injection(update, plan)
    if injection is None:
        return [Part(batch) for batch in found], True
    generator = torch.Generator().manual_seed(update)
    kept = 0 if scenario.whole_window else steps - 1
    spoiled = [Part(injection.apply(b, generator), injection.factor) for b in found[kept:]]
    return [*map(Part, found[:kept]), *spoiled], False


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over samples."""
    total = sum(model(*batch).item() * len(batch[0]) for batch in batches)
    return float(total / sum(len(batch[0]) for batch in batches))


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is."""
    return math.isfinite(norm_of([p.detach() for p in model.parameters()]))


def train(
    task: Task, arm: str, scenario: Scenario, seed: int, split: str, plan: Plan
) -> tuple[Trace, float]:
    """Do a run; returns what happened and the loss at its end, nan if it diverged."""
    torch.manual_seed(seed)
    model, trace = task.build(), Trace()
    trainer, batches = trainer_of(arm, model), task.batches(split, seed)
    held_out, done = task.held_out(split), 0
    with deciding_on(plan):
        for update, steps in enumerate(plan.windows()):
            if scenario.switched(update, plan) and not trace.restarts:
                held_out = [task.other(batch) for batch in held_out]
                trace.restarts.append(update)
            window, clean = window_of(batches, steps, update, task, scenario, plan)
            done += steps
            trainer.update(window, task.lr * schedule(done / plan.micro_batches))
            trace.clean.append(clean)
            trace.losses.append(mean_loss(model, held_out[:1]))
            last = update == plan.updates - 1
            if (last or not math.isfinite(trace.losses[-1])) and not all_finite(model):
                trace.nonfinite = update
                break
    trace.factors = trainer.factors
    return trace, math.nan if trace.nonfinite is not None else mean_loss(model, held_out)
