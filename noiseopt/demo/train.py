"""The demo's training loop, one and the same for both optimizers."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.demo.gpt import GPT, Shape
from noiseopt.demo.text import Corpus, fixed_excerpts, micro_batches

POINTS = 100  # rows of the loss table, at most
VALIDATIONS = 8  # of them with a validation loss, evenly spaced


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long.

    Attributes:
        steps: micro-batches, the same for both optimizers.
        seed: of the weights and of the order of the data.
        batch_size: excerpts in a micro-batch.
        lr: the peak learning rate.
        betas: of both optimizers.
        weight_decay: of both optimizers.
        max_norm: where both clip: AdamW's loop by `clip_grad_norm_`, ours by itself, and at a
            threshold of its own where that is lower.
        warm_up: the share of the steps in which the learning rate rises.
        held_out: excerpts of the validation set.
        shape: the size of the model.
    """

    steps: int = 900
    seed: int = 0
    batch_size: int = 8
    lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    max_norm: float = 1.0
    warm_up: float = 0.05
    held_out: int = 256
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True)
class Point:
    """One row of the loss table.

    Attributes:
        arm: whose.
        samples: excerpts seen.
        updates: changes of the parameters so far.
        lr: the learning rate that the schedule asks for.
        train_loss: the mean since the row before.
        validation_loss: over the held-out excerpts; nan where it was not measured.
    """

    arm: str
    samples: int
    updates: int
    lr: float
    train_loss: float
    validation_loss: float


@dataclass
class Clock:
    """Seconds that passed in each part of the work."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what passes inside to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


def adamw(model: GPT, settings: Settings) -> torch.optim.AdamW:
    """The optimizer to compare with."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def noise_aware_adamw(model: GPT, settings: Settings) -> NoiseAwareAdamW:
    """The optimizer that is shown."""
    return NoiseAwareAdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        noise=NoiseConfig(samples_per_micro_batch=settings.batch_size, max_norm=settings.max_norm),
    )


def schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> LambdaLR:
    """A linear warm-up, then a cosine down to a tenth; it counts micro-batches."""
    warm_up = max(1, round(settings.warm_up * settings.steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, settings.steps - warm_up)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, factor)


def train(
    arm: str,
    model: GPT,
    optimizer: torch.optim.AdamW,
    corpus: Corpus,
    settings: Settings,
    clock: Clock,
    on_point: Callable[[Point], None],
) -> None:
    """Train on the micro-batches of the settings' seed; `on_point` is given each row."""
    ours = optimizer if isinstance(optimizer, NoiseAwareAdamW) else None
    scheduler = schedule(optimizer, settings)
    held_out = fixed_excerpts(corpus.validation, settings.held_out, settings.shape.context)
    every = max(1, settings.steps // POINTS)
    validate_every = every * max(1, settings.steps // every // VALIDATIONS)
    losses: list[Tensor] = []
    batches = micro_batches(
        corpus.train, settings.steps, settings.batch_size, settings.shape.context, settings.seed
    )
    for step, tokens in enumerate(batches, start=1):
        with clock("forward"):
            loss = model(tokens)
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            if ours:
                ours.report_loss(loss)
            else:
                clip_grad_norm_(model.parameters(), settings.max_norm)
            lr = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if ours and step == settings.steps:
                ours.flush()
        losses.append(loss.detach())
        if step % every == 0 or step == settings.steps:
            validating = step % validate_every == 0 or step == settings.steps
            on_point(
                Point(
                    arm=arm,
                    samples=step * settings.batch_size,
                    updates=ours.num_updates if ours else step,
                    lr=lr,
                    train_loss=torch.stack(losses).mean().item(),
                    validation_loss=validate(model, held_out) if validating else math.nan,
                )
            )
            losses.clear()


@torch.no_grad()
def validate(model: GPT, held_out: Tensor) -> float:
    """The mean loss over the held-out excerpts, in nats per byte."""
    losses = [model(part) * len(part) for part in torch.split(held_out, 32)]
    return (torch.stack(losses).sum() / len(held_out)).item()
