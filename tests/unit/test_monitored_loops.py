"""Loops of which a monitor must make out by itself what their passes were."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.monitor import NoiseMonitor
from noiseopt.schedulers import AccumulationScheduler, NoiseAwareLR
from tests.optim.helpers import build, draw, fixed, loss_of, unchanged


class Loop:
    """Windows by hand, under a GradScaler; a micro-batch may be made infinite."""

    def __init__(self, steps, **settings):
        self.model = build(torch.float32)
        self.optimizer = SGD(self.model.parameters(), lr=0.0)
        self.scaler = GradScaler("cpu", init_scale=2.0**10)
        config = fixed(steps, decision_interval=1, **settings)
        self.monitor = NoiseMonitor(self.optimizer, config, grad_scaler=self.scaler)
        self.schedule = NoiseAwareLR(self.monitor, LambdaLR(self.optimizer, lambda _: 1.0))
        self.batches = iter(draw(100, dtype=torch.float32))

    def backward(self, parts, bad=False):
        """A micro-batch's; its gradient, alone and unscaled, is returned."""
        batch = next(self.batches)
        loss = loss_of(self.model, batch) * (math.inf if bad else 1.0) / parts
        self.scaler.scale(loss).backward()
        params = [param for param in self.model.parameters() if param.requires_grad]
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss_of(self.model, batch), params)]
        )

    def step(self, set_to_none):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def window(self, length, bad=False, set_to_none=False):
        grads = [self.backward(length, bad and index == 0) for index in range(length)]
        self.step(set_to_none)
        return torch.stack(grads)

    @property
    def windows(self):
        return [window for decision in self.monitor.decisions for window in decision.windows]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("skipped", [1, 2])
def test_after_skipped_steps_a_window_is_measured_as_it_is(skipped, set_to_none):
    loop = Loop(4)
    for _ in range(skipped):
        loop.window(4, bad=True, set_to_none=set_to_none)
    grads = loop.window(4)
    (found,) = loop.windows
    assert (found.micro_batches, found.skipped) == (4, 0)
    small, big = grads.square().sum(1).mean().item(), grads.mean(0).square().sum().item()
    assert sum(found.norms.small_sq) == pytest.approx(small, rel=1e-4)
    assert sum(found.norms.big_sq) == pytest.approx(big, rel=1e-4)
    assert loop.schedule.last_epoch == 4 * skipped + 4


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_short_window_after_a_skipped_step_is_counted_and_not_learned_from(set_to_none):
    """Its two passes must not be taken for the last of four."""
    loop = Loop(4)
    loop.window(4, bad=True, set_to_none=set_to_none)
    loop.window(2)
    (found,) = loop.windows
    assert (found.micro_batches, found.skipped) == (2, 0)
    assert not found.norms.finite
    assert loop.schedule.last_epoch == 6


def test_a_parameter_that_thaws_does_not_hide_a_skipped_step():
    loop = Loop(2)
    bias = loop.model[0].bias.requires_grad_(False)
    loop.optimizer = SGD(loop.model.parameters(), lr=0.0)
    loop.monitor = NoiseMonitor(loop.optimizer, fixed(2), grad_scaler=loop.scaler)
    loop.schedule = NoiseAwareLR(loop.monitor, LambdaLR(loop.optimizer, lambda _: 1.0))
    loop.window(2, bad=True)
    bias.requires_grad_(True)
    loop.window(2)
    assert loop.schedule.last_epoch == 4


def test_a_new_groups_norms_are_unknown_once():
    loop = Loop(2)
    loop.schedule.scheduler = None  # torch's know no groups but those that they began with
    new = nn.Parameter(torch.ones(3))
    for late in (False, True, True):
        if late and len(loop.optimizer.param_groups) == 1:
            loop.optimizer.add_param_group({"params": [new]})
        for _ in range(2):
            loss = loss_of(loop.model, next(loop.batches)) + (new.sum() if late else 0.0)
            loop.scaler.scale(loss / 2).backward()
        loop.step(set_to_none=True)
    first, unknown, known = (window.norms for window in loop.windows)
    assert first.finite
    assert not unknown.finite
    assert [known.small_sq[1], known.big_sq[1]] == pytest.approx([3.0, 3.0], rel=1e-6)


def test_the_data_may_end_after_a_skipped_step():
    loop = Loop(4)
    batches = list(enumerate(draw(10, dtype=torch.float32)))
    lengths = []
    for window in AccumulationScheduler(loop.monitor).windows(batches):
        lengths.append(len(window))
        for index, batch in window:
            loss = loss_of(loop.model, batch) * (math.inf if index == 6 else 1.0)
            loop.scaler.scale(loss / len(window)).backward()
        loop.step(set_to_none=True)
    assert lengths == [4, 4, 2]
    assert loop.monitor.num_updates == 2
    assert loop.schedule.last_epoch == 10
    assert all(window.norms.finite for window in loop.windows)


def test_gradients_that_no_backward_brought_are_refused_before_anything_changes():
    """Passed over, they would leave a schedule in samples at its first value for ever."""
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.1)
    NoiseMonitor(optimizer, fixed(2))
    params = list(model.parameters())
    for param, grad in zip(
        params, torch.autograd.grad(loss_of(model, draw(1)[0]), params), strict=True
    ):
        param.grad = grad
    with unchanged(model), pytest.raises(RuntimeError, match="no backward pass was seen"):
        optimizer.step()


def test_a_closure_brings_its_backward_with_it():
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.1)
    monitor = NoiseMonitor(optimizer, fixed(1))
    for batch in draw(3):

        def closure(batch=batch):
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert monitor.num_updates == 3


@pytest.mark.parametrize("external", [True, False])
def test_a_checkpoint_after_a_short_window_loads(external):
    """The norm of its mean is not known, which is no difference between ranks."""

    def attached(model):
        if external:
            config = NoiseConfig(accumulation="external", accumulation_steps=4)
            optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
            return optimizer, optimizer
        optimizer = AdamW(model.parameters())
        return optimizer, NoiseMonitor(optimizer, NoiseConfig(accumulation_steps=4))

    def window(model, optimizer, length):
        for batch in draw(length):
            (loss_of(model, batch) / length).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = build()
    optimizer, measures = attached(model)
    window(model, optimizer, 3)
    saved = copy.deepcopy((optimizer.state_dict(), measures.state_dict()))
    numbers = saved[0]["param_groups"][0]["noise"] if external else saved[1]
    assert numbers["grad_norm"] == 0
    numbers["grad_norm"] = math.nan  # as earlier versions saved it
    optimizer, measures = attached(model)
    optimizer.load_state_dict(saved[0])
    measures.load_state_dict(saved[1] if not external else saved[0])
    window(model, optimizer, 4)
    assert measures.num_updates == 2
