"""Random loops against the large batch: window lengths, ways to zero, lost gradients, samples."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD
from tests.optim.helpers import advise, difference, fixed

# Rates for a window's own length, as of a flushed one, would differ from the large batch's.
PLAIN = dict.fromkeys(("adapt_lr", "adapt_beta1", "adapt_beta2", "adapt_weight_decay"), False)
WAYS_TO_ZERO = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "one by one": lambda model, optimizer: [param.grad.zero_() for param in with_grad(model)],
}


class Heads(nn.Module):
    """Three layers of which each micro-batch uses some."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3)).double()

    def loss(self, inputs, use):
        return sum(self.heads[index](inputs).square().sum(1) for index in sorted(use)).mean()


def with_grad(model):
    return [param for param in model.parameters() if param.grad is not None]


class Reference:
    """Torch's optimizer on whole windows.

    A parameter without a gradient in the whole window has none; one whose gradient the loop has
    set to zero has zeros, by which torch's moments and weight decay go on.
    """

    def __init__(self, make, weighted, **kwargs):
        self.model, self.weighted = Heads(), weighted
        self.optimizer = make(self.model.parameters(), **kwargs)
        self.window, self.touched = [], set()

    def take(self, inputs, use, model):
        self.window.append((inputs, use))
        self.touched |= {i for i, p in enumerate(model.parameters()) if p.grad is not None}

    def apply(self):
        self.optimizer.zero_grad()
        weights = [len(inputs) if self.weighted else 1.0 for inputs, _ in self.window]
        for weight, (inputs, use) in zip(weights, self.window, strict=True):
            (self.model.loss(inputs, use) * weight / sum(weights)).backward()
        for index, param in enumerate(self.model.parameters()):
            if index in self.touched and param.grad is None:
                param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.window, self.touched = [], set()


micro_batches = st.lists(
    st.tuples(
        st.integers(1, 4),  # samples
        st.sets(st.integers(0, 2), min_size=1),  # the layers it uses
        st.sampled_from(sorted(WAYS_TO_ZERO)),
        st.booleans(),  # zero right after the step, or before the next backward
        st.sampled_from([False, False, True]),  # flush after it
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=60)
@given(
    micro_batches,
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([advise, fixed]),
    st.sampled_from([NoiseAwareAdamW, NoiseAwareSGD]),
    st.sampled_from([{"foreach": True}, {"foreach": False}, {"fused": True}]),
)
def test_any_sequence_of_micro_batches_is_the_large_batches(
    calls, steps, weighted, mode, make, kernel
):
    """With sample counts the weighted mean, without them the plain one; flushes here and there."""
    kwargs = {"lr": 0.05} | kernel
    model = Heads()
    optimizer = make(model.parameters(), noise=mode(steps, **PLAIN), **kwargs)
    reference = Reference(make.__bases__[1], weighted, **kwargs)
    generator = torch.Generator().manual_seed(len(calls))
    zeroed = True
    for size, use, way, after, flush in calls:
        inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        if not zeroed:
            WAYS_TO_ZERO[way](model, optimizer)
        model.loss(inputs, use).backward()
        reference.take(inputs, use, model)
        if weighted:
            optimizer.set_samples(size)
        optimizer.step()
        if optimizer.applied:
            reference.apply()
        zeroed = after
        if after:
            WAYS_TO_ZERO[way](model, optimizer)
        if flush and reference.window:
            assert optimizer.flush()
            reference.apply()
            zeroed = False
    assert optimizer.flush() == bool(reference.window)
    if reference.window:
        reference.apply()
    assert difference(model, reference.model) <= 1e-12
