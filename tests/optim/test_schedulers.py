"""A user's scheduler sees the learning rate that it would see alone, while updates use another.

The window is grown to two by the numbers of a loaded state, so that a factor on the rate is in
force from the first update; SGD without momentum then shows the rate that was used.
"""

import copy

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig
from tests.optim.helpers import advise, build, draw, loss_of

CALLS = 24
WINDOW = 2

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda call: 1 / (1 + call)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda call: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=5, gamma=0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [3, 11], gamma=0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.2, total_iters=7),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=CALLS),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=7),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.4, total_steps=CALLS + 1, cycle_momentum="betas" in o.defaults
    ),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.1, total_iters=CALLS),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=CALLS, power=2.0),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, base_lr=0.01, max_lr=0.2, step_size_up=4, cycle_momentum="betas" in o.defaults
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 4, 0.5)]
    ),
}
# SequentialLR of torch 2.6 warns of the way in which it itself starts a scheduler.
EPOCH = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
every_scheduler = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=EPOCH if name == "SequentialLR" else ()) for name in SCHEDULERS],
)


def grown(optimizer_class, model, **kwargs):
    """An optimizer whose window has grown to two, and the factor that it puts on the rate."""
    config = NoiseConfig(
        max_accumulation_steps=WINDOW, decision_interval=10**6, adapt_beta2=True, adapt_clip=False
    )
    optimizer = optimizer_class(model.parameters(), noise=config, **kwargs)
    state = optimizer.state_dict()
    state["param_groups"][0]["noise"] |= {"accumulation_steps": WINDOW, "noise_ratio": 10.0}
    optimizer.load_state_dict(state)
    assert optimizer.accumulation_steps == WINDOW
    gain = (1 + 10.0) / (1 + 10.0 / WINDOW)
    return optimizer, gain if optimizer_class is NoiseAwareSGD else gain**0.5


def advance(scheduler, call):
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(float(call // 6))
    else:
        scheduler.step()


def scheduled_alone(name, optimizer_class, **kwargs):
    """What each group holds before each call when torch's optimizer and the scheduler run alone."""
    model = build()
    optimizer = optimizer_class(model.parameters(), **kwargs)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for call, batch in enumerate(draw(CALLS)):
        group = optimizer.param_groups[0]
        seen.append(copy.deepcopy({key: group[key] for key in group if key != "params"}))
        loss_of(model, batch).backward()
        optimizer.step()
        advance(scheduler, call)
    return seen


@every_scheduler
def test_the_scheduler_alone_sets_the_rate_and_updates_use_it_times_the_factor(name):
    expected = scheduled_alone(name, torch.optim.SGD, lr=0.1)
    model = build()
    optimizer, factor = grown(NoiseAwareSGD, model, lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    (group,) = optimizer.param_groups
    params = list(model.parameters())
    for call, batch in enumerate(draw(CALLS)):
        assert group["lr"] == expected[call]["lr"]
        before = [param.detach().clone() for param in params]
        loss_of(model, batch).backward()
        optimizer.step()
        assert group["lr"] == expected[call]["lr"]
        if optimizer.applied:
            for old, param in zip(before, params, strict=True):
                used = old - expected[call]["lr"] * factor * param.grad
                assert (param - used).abs().max() <= 1e-15
        optimizer.zero_grad()
        advance(scheduler, call)
    assert optimizer.num_updates == CALLS // WINDOW


@every_scheduler
def test_betas_and_weight_decay_stay_the_schedulers_and_the_users(name):
    """OneCycleLR and CyclicLR move beta1 as well; an update uses another beta2 and decay."""
    kwargs = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.97)}
    expected = scheduled_alone(name, torch.optim.AdamW, **kwargs)
    model = build()
    optimizer, _ = grown(NoiseAwareAdamW, model, **kwargs)
    scheduler = SCHEDULERS[name](optimizer)
    for call, batch in enumerate(draw(CALLS)):
        group = optimizer.param_groups[0]
        assert {key: group[key] for key in expected[call]} == expected[call]
        loss_of(model, batch).backward()
        optimizer.step()
        assert {key: group[key] for key in expected[call]} == expected[call]
        optimizer.zero_grad()
        advance(scheduler, call)


@pytest.mark.parametrize("name", ["LambdaLR", "CosineAnnealingLR", "ExponentialLR", "CyclicLR"])
@pytest.mark.parametrize("optimizer_class", [NoiseAwareSGD, NoiseAwareAdamW])
def test_a_tensor_rate_keeps_its_identity_and_follows_the_scheduler(name, optimizer_class):
    plain = optimizer_class.__bases__[1]
    model = build()
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer, _ = grown(optimizer_class, model, lr=rate)
    scheduler = SCHEDULERS[name](optimizer)
    expected = scheduled_alone(name, plain, lr=torch.tensor(0.1, dtype=torch.float64))
    (group,) = optimizer.param_groups
    kept = group["lr"]
    for call, batch in enumerate(draw(CALLS)):
        loss_of(model, batch).backward()
        optimizer.step()
        assert group["lr"] is kept
        assert torch.equal(kept, expected[call]["lr"])
        optimizer.zero_grad()
        advance(scheduler, call)


def test_a_schedule_in_calls_ends_with_the_data_whatever_the_window():
    """100 calls in windows of 4: 25 updates, and the cosine has come down to zero."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1, noise=advise(4))
    scheduler = schedulers.CosineAnnealingLR(optimizer, T_max=100)
    for batch in draw(100):
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert optimizer.num_updates == 25
    assert optimizer.param_groups[0]["lr"] == 0
