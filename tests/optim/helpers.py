"""Small models, data of fixed seeds and plain loops that the drop-in optimizers are held to."""

import contextlib

import pytest
import torch
from torch import nn

from noiseopt import NoiseConfig
from noiseopt.optim import NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD

# pyproject.toml allows torch >= 2.6, and Muon came with 2.9: with that or later it must be tested.
NEEDS_MUON = pytest.mark.skipif(torch.__version__ < "2.9", reason="torch before 2.9 has no Muon")

FEATURES, HIDDEN, OUTPUTS = 6, 8, 3

GROWING = {
    "decision_interval": 5,
    "min_count": 2.0,
    "dwell_updates": 5,
    "dwell_fraction": 0.0,
    "update_price": 1e12,
    "max_accumulation_steps": 4,
    "adapt_beta2": True,
    "verify": False,
}

# Our class, torch's, and arguments that exercise its state.
PAIRS = {
    "AdamW": (NoiseAwareAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adam": (NoiseAwareAdam, torch.optim.Adam, {"lr": 1e-2}),
    "SGD": (NoiseAwareSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


def build(dtype=torch.float64, seed=0, bias=True):
    """A small network; without bias all of its parameters are matrices."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN, bias=bias),
        nn.Tanh(),
        nn.Linear(HIDDEN, OUTPUTS, bias=bias),
    ).to(dtype)


def draw(number, size=4, dtype=torch.float64, seed=1):
    """So many batches of inputs and targets, of one size or of a list of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * number if isinstance(size, int) else size
    return [
        (
            torch.randn(n, FEATURES, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(n, OUTPUTS, generator=generator, dtype=torch.float64).to(dtype),
        )
        for n in sizes
    ]


def joined(batches, steps):
    """The same data in batches of so many times the size."""
    return [
        tuple(torch.cat(parts) for parts in zip(*batches[at : at + steps], strict=True))
        for at in range(0, len(batches), steps)
    ]


def loss_of(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def train(model, optimizer, batches, loss=loss_of):
    """The plain loop."""
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def advise(steps=1, **settings):
    """Windows of so many micro-batches and nothing else changed."""
    return NoiseConfig(
        mode="advise",
        accumulation_steps=steps,
        max_accumulation_steps=max(steps, 32),
        **settings,
    )


def fixed(steps=1, **settings):
    """Mode "auto" with every decision held: what it does at once is left, skips and clipping."""
    return NoiseConfig(
        **{
            "accumulation_steps": steps,
            "min_accumulation_steps": steps,
            "max_accumulation_steps": steps,
            "adapt_clip": False,
        }
        | settings
    )


def growing(**settings):
    """Mode "auto" that decides often and grows soon: a run of few updates sees everything."""
    return NoiseConfig(**GROWING | {"probe_interval": 2} | settings)


def params_of(model):
    return [param.detach().clone() for param in model.parameters()]


def difference(one, other):
    """The largest difference between two models' parameters."""
    return max(
        (a.detach() - b.detach()).abs().max().item()
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def state_tensors(optimizer):
    """Every tensor of the optimizer's state, in the order of the parameters."""
    return [
        value
        for group in optimizer.param_groups
        for param in group["params"]
        for _, value in sorted(optimizer.state[param].items())
        if isinstance(value, torch.Tensor)
    ]


def same_bits(one, other):
    """Whether two lists of tensors agree bit for bit."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@contextlib.contextmanager
def unchanged(*models):
    """Fail if a block changes a bit of the models' parameters."""
    before = [params_of(model) for model in models]
    yield
    assert all(same_bits(a, params_of(b)) for a, b in zip(before, models, strict=True))
