"""One run: a workload trained by an arm, validated along the way, and told as plain numbers."""

import math
import time
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.convergence import arms
from benchmarks.convergence.cache import Record, Run
from benchmarks.convergence.gradients import WindowGradient
from benchmarks.convergence.rivals import Moment, Rule
from benchmarks.convergence.workloads import BETA1, WORKLOADS, Batch, Workload
from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.control import Decision
from noiseopt.estimate import NoiseEstimate, NoiseEstimator

AVERAGE = 0.03  # the half-life of the averaged weights, as a share of the run
VALIDATIONS = 20
ROWS = 128  # of a trajectory, besides those where the window changed
EVENTS = 40
MEMORY = 8  # measured windows that a rival's noise is averaged over: some 3 % of the run
COLUMNS = (
    *("samples", "updates", "window", "lr_factor", "train_loss"),
    *("noise_scale", "fraction", "fraction_low", "fraction_high"),
)


def betas_of(config: dict[str, Any]) -> tuple[float, float]:
    """Adam's betas at a window of 1."""
    return config.get("beta1", BETA1), config["beta2"]


class Trainer(Protocol):
    """Trains a model micro-batch by micro-batch.

    Attributes:
        updates: changes of the weights so far.
        window: the micro-batches of the window that is or was open.
        lr_factor: the factor on the scheduled rate that goes with it.
        noise: the latest estimate of the noise, at this window's batch.
        events: changes that were decided, in words.
    """

    updates: int
    window: int
    lr_factor: float
    noise: NoiseEstimate | None
    events: list[list[Any]]

    def feed(self, batch: Batch, lr: float) -> Tensor:
        """Take in a micro-batch and maybe update; returns its loss."""

    def finish(self) -> None:
        """Apply what is left of an open window."""


class Ours:
    """The loop of somebody who uses our optimizer, as the README has it."""

    def __init__(self, model: nn.Module, workload: Workload, config: dict[str, Any]) -> None:
        self.model = model
        self.optimizer = NoiseAwareAdamW(
            model.parameters(),
            lr=config["lr"],
            betas=betas_of(config),
            weight_decay=workload.weight_decay,
            noise=NoiseConfig(samples_per_micro_batch=workload.micro_batch, **config["options"]),
        )
        self.updates, self.window, self.lr_factor = 0, 1, 1.0
        self.noise: NoiseEstimate | None = None
        self.events: list[list[Any]] = []
        self.optimizer.add_observer(self._observe)

    def feed(self, batch: Batch, lr: float) -> Tensor:
        loss: Tensor = self.model(*batch)
        loss.backward()
        self.optimizer.report_loss(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += self.optimizer.applied
        return loss.detach()

    def finish(self) -> None:
        self.updates += self.optimizer.flush()

    def _observe(self, decision: Decision) -> None:
        self.window = decision.accumulation_steps
        self.lr_factor, self.noise = decision.rates.lr, decision.noise
        if decision.action != "hold":
            self.events.append([decision.samples_seen, decision.action, decision.reason])


class Rival:
    """Plain AdamW, whose windows and rates a rule chooses.

    Its noise is measured by our estimator from windows that are cut into parts, as often as the
    rule needs it or for the record; it changes nothing that the rule does not.
    """

    def __init__(
        self, model: nn.Module, workload: Workload, config: dict[str, Any], rule: Rule
    ) -> None:
        self.model, self.workload, self.rule = model, workload, rule
        self.beta1, self.beta2 = betas_of(config)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config["lr"], weight_decay=workload.weight_decay
        )
        self.updates, self.window, self.lr_factor = 0, 1, 1.0
        self.noise: NoiseEstimate | None = None
        self.events: list[list[Any]] = []
        self._estimator = NoiseEstimator(half_life_windows=MEMORY)
        self._done, self._left, self._measured_at = 0, 0, 0
        self._gradient: WindowGradient | None = None

    def feed(self, batch: Batch, lr: float) -> Tensor:
        if self._gradient is None:
            self._gradient = self._open()
        loss = self._gradient.add(batch)
        self._done += 1
        self._left -= 1
        if self._left == 0:
            self._update(self._gradient, lr)
            self._gradient = None
        return loss

    def finish(self) -> None:
        """Nothing is open: the last window is no longer than the data."""

    def _open(self) -> WindowGradient:
        total = self.workload.micro_batches
        decay = self._peak_over_now()
        window = self.rule.window(Moment(self._done / total, decay))
        self.window, self.lr_factor = window, self.rule.lr_factor(window)
        self._left = min(window, total - self._done)
        self._measuring = self._done - self._measured_at >= self.rule.measured * total
        return WindowGradient(self.model, self._left, self.rule.parts if self._measuring else 0)

    def _peak_over_now(self) -> float:
        length = self.workload.micro_batches // self.workload.cycles
        rising = self._done % length <= round(self.workload.warm_up * length)
        return 1.0 if rising else 1 / self.workload.schedule(self._done)

    def _update(self, gradient: WindowGradient, lr: float) -> None:
        if self._measuring:
            spread = gradient.spread()
            samples = (self._done - self._measured_at) * self.workload.micro_batch
            self._measured_at = self._done
            self._estimator = self._estimator.update(spread.norms(samples))
            self.noise = self._estimator.estimate(spread.batch)
            self.rule.learn(spread, self._done / self.workload.micro_batches)
        clip_grad_norm_(self.model.parameters(), arms.MAX_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_factor
            group["betas"] = (self.beta1, self.rule.beta2(self.beta2, self.window))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1


class AveragedWeights:
    """An exponential average of the weights, whose half-life is counted in micro-batches."""

    def __init__(self, model: nn.Module, half_life: float) -> None:
        self._params: list[Tensor] = list(model.parameters())
        self._average = [p.detach().clone() for p in self._params]
        self._half_life, self._seen = half_life, 0

    @torch.no_grad()
    def update(self, seen: int) -> None:
        """Take in the weights after so many micro-batches."""
        share = 1 - 2 ** (-(seen - self._seen) / self._half_life)
        torch._foreach_lerp_(self._average, self._params, share)
        self._seen = seen

    @torch.no_grad()
    def load(self) -> None:
        """Put the averages in the place of the weights."""
        torch._foreach_copy_(self._params, self._average)


class Trajectory:
    """Rows along a run, few enough to keep."""

    def __init__(self, total: int) -> None:
        self.rows: list[list[float | None]] = []
        self._losses: list[Tensor] = []
        self._every, self._next, self._window = total / ROWS, 0.0, 1

    def add(self, done: int, loss: Tensor, trainer: Trainer, samples: int) -> None:
        """Take in a micro-batch's loss."""
        self._losses.append(loss)
        if done < self._next and trainer.window == self._window:
            return
        self._next, self._window = done + self._every, trainer.window
        noise, mean = trainer.noise, torch.stack(self._losses).mean().item()
        row = [samples, trainer.updates, trainer.window, trainer.lr_factor, mean]
        if noise is not None:
            row += [noise.scale, noise.fraction, *noise.fraction_interval]
        self.rows.append([finite(value) for value in row])
        self._losses.clear()


def finite(value: float) -> float | None:
    """Five digits of a number; None for what is none."""
    if isinstance(value, int):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


@torch.no_grad()
def validate(model: nn.Module, held_out: list[Batch]) -> float:
    """The mean loss over held-out samples."""
    total = sum(model(*batch).item() * len(batch[0]) for batch in held_out)
    return float(total / sum(len(batch[0]) for batch in held_out))


def trainer_of(run: Run, model: nn.Module, workload: Workload) -> Trainer:
    """The trainer of a run's arm."""
    if arms.is_ours(run.arm):
        return Ours(model, workload, run.config)
    return Rival(model, workload, run.config, arms.rule(run.arm, run.config["options"]))


def train(run: Run, device: str = "cpu") -> tuple[Record, Record]:
    """Do a run; returns its results, and the details that go with them."""
    started, computed = time.perf_counter(), time.process_time()
    workload = WORKLOADS[run.workload]
    data = workload.load(run.split)
    held_out = [_on(device, batch) for batch in data.held_out]
    torch.manual_seed(run.seed)
    model = workload.build().to(device)
    trainer = trainer_of(run, model, workload)
    total = workload.micro_batches
    average = AveragedWeights(model, AVERAGE * total)
    trajectory = Trajectory(total)
    validations: list[list[float | None]] = []
    updates = done = 0
    for done, batch in enumerate(data.batches(run.seed), start=1):
        loss = trainer.feed(_on(device, batch), run.config["lr"] * workload.schedule(done - 1))
        if done == total:
            trainer.finish()
        if trainer.updates == updates:
            trajectory.add(done, loss, trainer, done * workload.micro_batch)
            continue
        updates = trainer.updates
        average.update(done)
        trajectory.add(done, loss, trainer, done * workload.micro_batch)
        if done * VALIDATIONS >= total * (len(validations) + 1) and done < total:
            part = validate(model, held_out[::4])
            validations.append([done * workload.micro_batch, updates, finite(part)])
    if done != total:
        raise RuntimeError(f"{run.workload} has {done} micro-batches, and not {total}")
    loss_at_end = validate(model, held_out)
    average.load()
    results = {
        "updates": updates,
        "samples": done * workload.micro_batch,
        "val_loss": _number(loss_at_end),
        "val_loss_averaged": _number(validate(model, held_out)),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    return results, {
        "cpu_seconds": round(time.process_time() - computed, 1),
        "validation_columns": ["samples", "updates", "val_loss_of_a_quarter"],
        "validation": validations,
        "trajectory_columns": list(COLUMNS),
        "trajectory": trajectory.rows,
        "events": trainer.events[:EVENTS],
    }


def _on(device: str, batch: Batch) -> Batch:
    return tuple(part.to(device) for part in batch)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
