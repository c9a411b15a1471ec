"""What one update does: the clipped mean, by torch's kernel, at rates that are then put back."""

import math

import pytest
import torch

from noiseopt import NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig
from noiseopt.capture import window
from noiseopt.capture.tally import _DeviceTally
from noiseopt.control import Rates
from noiseopt.optim import update
from noiseopt.optim.hyper import (
    EXCESSES,
    UPDATES,
    numbers_after,
    scaled_values,
    settings_of,
    values_from,
)
from tests.optim.helpers import (
    PAIRS,
    build,
    difference,
    draw,
    fixed,
    joined,
    loss_of,
    params_of,
    same_bits,
    train,
)

KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]
CALLS = 24


def clip(params, max_norm):
    """As `clip_grad_norm_`, whose divisor has 1e-6 added; returns whether it did anything."""
    params = list(params)
    norm = torch.nn.utils.get_total_norm([param.grad for param in params])
    for param in params:
        param.grad.mul_((max_norm / norm).clamp(max=1.0))
    return bool(norm > max_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_known_threshold_clips_the_mean_as_a_loop_would(name, kernel, steps, dtype):
    """The update, the gradient that is left, and the count of clipped updates."""
    ours, theirs, kwargs = PAIRS[name]
    kwargs = kwargs | kernel
    batches = draw(CALLS, dtype=dtype)
    model, reference = build(dtype), build(dtype)
    config = fixed(steps, max_norm=0.95, decision_interval=1)
    optimizer = ours(model.parameters(), noise=config, **kwargs)
    plain = theirs(reference.parameters(), **kwargs)
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    clipped = 0
    for at, batch in enumerate(batches):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        assert optimizer.applied == ((at + 1) % steps == 0)
        if optimizer.applied:
            plain.zero_grad()
            loss_of(reference, joined(batches[at + 1 - steps : at + 1], steps)[0]).backward()
            clipped += clip(reference.parameters(), 0.95)
            plain.step()
            for one, other in zip(model.parameters(), reference.parameters(), strict=True):
                assert (one.grad - other.grad).abs().max() <= bound
    assert difference(model, reference) <= bound
    assert 0 < clipped < CALLS // steps
    assert optimizer.decision.total_clipped == clipped


def test_the_clipped_update_is_that_of_torchs_own_clip():
    """To the 1e-6 that `clip_grad_norm_` adds to the norm."""
    batches = draw(CALLS)
    model, reference = build(), build()
    train(model, NoiseAwareAdamW(model.parameters(), noise=fixed(1, max_norm=0.2)), batches)
    plain = torch.optim.AdamW(reference.parameters())
    for batch in batches:
        plain.zero_grad()
        loss_of(reference, batch).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.2)
        plain.step()
    assert difference(model, reference) <= 1e-6


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_clipping_is_the_same_where_norms_are_not_read(kernel, steps, monkeypatch):
    """On an accelerator the arithmetic is the device's; here it is made to be, on the CPU."""
    batches = draw(CALLS, dtype=torch.float32)
    batches[2 * steps][0].fill_(math.nan)

    def run():
        model = build(torch.float32)
        config = fixed(steps, max_norm=0.95, decision_interval=1)
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config, **kernel)
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        return model, optimizer.decision

    model, decision = run()
    monkeypatch.setattr(update, "_read", lambda value: value)
    monkeypatch.setattr(
        window, "tally_on", lambda device, sums, share: _DeviceTally(sums, share, device)
    )
    twin, same = run()
    assert 0 < decision.total_clipped == same.total_clipped < CALLS // steps
    assert decision.total_skipped == same.total_skipped == 1
    assert same_bits(params_of(model), params_of(twin))


def test_a_double_without_a_gradient_leaves_the_clip_to_the_fused_kernel(monkeypatch):
    """It takes its scale in fp32 only, so one with a gradient must be scaled before."""
    calls = []
    scale_all = update.scale_all
    monkeypatch.setattr(update, "scale_all", lambda *args: (calls.append(args), scale_all(*args)))
    model = build(torch.float32)
    double = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    config = fixed(1, max_norm=0.01)
    optimizer = NoiseAwareAdamW([*model.parameters(), double], fused=True, noise=config)
    first, second = draw(2, dtype=torch.float32)
    loss_of(model, first).backward()
    optimizer.step()
    assert not calls
    optimizer.zero_grad()
    (loss_of(model, second) + double.sum()).backward()
    optimizer.step()
    assert len(calls) == 1
    norm = torch.nn.utils.get_total_norm([p.grad for p in (*model.parameters(), double)])
    assert norm.item() == pytest.approx(0.01, rel=1e-5)


def test_advise_does_not_clip():
    batches = draw(CALLS)
    model, reference = build(), build()
    config = NoiseConfig(mode="advise", max_norm=1e-3)
    train(model, NoiseAwareAdamW(model.parameters(), noise=config), batches)
    train(reference, torch.optim.AdamW(reference.parameters()), batches)
    assert same_bits(params_of(model), params_of(reference))


# ---------------------------------------------------------------------- a step that fails


def broken(optimizer):
    """Take a moment away, so that torch's step raises; returns what puts it back."""
    state = optimizer.state[optimizer.param_groups[0]["params"][-1]]
    kept = state.pop("exp_avg")
    return lambda: state.update(exp_avg=kept)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_groups_get_their_values_back_when_a_step_raises(kernel):
    model, batches = build(), draw(40)
    optimizer, _ = with_factor(NoiseAwareAdamW, model, lr=torch.tensor(0.01), **kernel_for(kernel))
    train(model, optimizer, batches[:2])
    (group,) = optimizer.param_groups
    before = dict(group)
    broken(optimizer)
    with pytest.raises(KeyError, match="exp_avg"):
        train(model, optimizer, batches[2:4])
    assert all(group[key] is before[key] for key in ("lr", "betas", "weight_decay", "eps"))


def kernel_for(kernel):
    """Torch takes a Tensor lr in every kernel but foreach."""
    return {} if kernel.get("foreach") else kernel


def test_after_a_step_that_raised_the_next_window_is_whole():
    """Nothing of the failed window enters it, and both moments count the updates that were made."""
    batches = draw(9)
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=fixed(3))
    plain = torch.optim.AdamW(reference.parameters())
    train(model, optimizer, batches[:3])
    mend = broken(optimizer)
    with pytest.raises(KeyError, match="exp_avg"):
        train(model, optimizer, batches[3:6])
    mend()
    optimizer.zero_grad()
    numbers = optimizer.state_dict()["param_groups"][0]["noise"]
    assert numbers["second_moment_updates"] == numbers["num_updates"] == 1
    train(model, optimizer, batches[6:])
    train(reference, plain, joined(batches[:3] + batches[6:], 3))
    assert difference(model, reference) <= 1e-12


# ---------------------------------------------------------------------- rates


def with_factor(optimizer_class, model, steps=2, noise_ratio=10.0, adapt_beta1=True, **kwargs):
    """An optimizer in a window of `steps`, grown from one, at a known noise."""
    config = NoiseConfig(
        max_accumulation_steps=steps,
        decision_interval=10**6,
        adapt_clip=False,
        adapt_beta1=adapt_beta1,
        adapt_beta2=True,
    )
    optimizer = optimizer_class(model.parameters(), noise=config, **kwargs)
    state = optimizer.state_dict()
    state["param_groups"][0]["noise"] |= {"accumulation_steps": steps, "noise_ratio": noise_ratio}
    optimizer.load_state_dict(state)
    return optimizer, math.sqrt((1 + noise_ratio) / (1 + noise_ratio / steps))


class SlowAdam:
    """Adam with betas that change: the weights in its moments are summed as they are."""

    def __init__(self, model, lr, betas, weight_decay, decoupled):
        self.params, self.lr, (self.beta1, self.beta2) = list(model.parameters()), lr, betas
        self.weight_decay, self.decoupled = weight_decay, decoupled
        self.first = [torch.zeros_like(param) for param in self.params]
        self.second = [torch.zeros_like(param) for param in self.params]
        self.weight1 = self.weight2 = 0.0

    @torch.no_grad()
    def step(self, lr=1.0, beta1=1.0, beta2=1.0, weight_decay=1.0, least=0.9):
        rate, decay = self.lr * lr, self.weight_decay
        own, used1 = self.beta2, self.beta1**beta1
        used = own if beta2 == 1 else max(own**beta2, min(least, own))
        self.weight1 = used1 * self.weight1 + 1 - used1
        self.weight2 = used * self.weight2 + 1 - used
        for param, first, second in zip(self.params, self.first, self.second, strict=True):
            grad = param.grad
            if self.decoupled:
                param.mul_(1 - rate * decay * weight_decay)
            else:
                grad = grad + decay * param
            first.mul_(used1).add_((1 - used1) * grad)
            second.mul_(used).add_((1 - used) * grad * grad)
            param.sub_(rate * first / self.weight1 / (second / self.weight2).sqrt())


ADAMS = {
    "AdamW": (NoiseAwareAdamW, {}, True),
    "Adam": (NoiseAwareAdam, {}, False),
    "Adam, decoupled": (NoiseAwareAdam, {"decoupled_weight_decay": True}, True),
}
# pyproject.toml allows torch >= 2.6, and this argument came with 2.7: from there on it must run.
NEEDS_DECOUPLED = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch before 2.7 has no Adam(decoupled_weight_decay=)"
)
SWITCHES = [
    {},
    *({name: False} for name in ("adapt_lr", "adapt_beta1")),
    *({name: True} for name in ("adapt_beta2", "adapt_weight_decay")),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=NEEDS_DECOUPLED if "decoupled" in name else ()) for name in ADAMS],
)
def test_a_grown_window_updates_at_the_decided_rates(name, switches, kernel):
    """Windows grow from 2 to 8 while training; the slow reference follows `decision.rates`."""
    ours, extra, decoupled = ADAMS[name]
    kwargs = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.3}
    config = NoiseConfig(
        accumulation_steps=2,
        max_accumulation_steps=8,
        decision_interval=4,
        min_count=2.0,
        dwell_updates=4,
        update_price=1e18,
        verify=False,
        adapt_clip=False,
        **switches,
    )
    model, reference = build(), build()
    optimizer = ours(model.parameters(), noise=config, eps=1e-30, **kwargs, **extra, **kernel)
    slow = SlowAdam(reference, decoupled=decoupled, **kwargs)
    batches, window, lengths = draw(200, size=2), [], []
    for batch in batches:
        decision = optimizer.decision
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        window.append(batch)
        if optimizer.applied:
            reference.zero_grad()
            loss_of(reference, joined(window, len(window))[0]).backward()
            rates = {} if decision is None else decision.rates
            slow.step(
                *(getattr(rates, key, 1.0) for key in ("lr", "beta1", "beta2", "weight_decay")),
            )
            assert difference(model, reference) <= 1e-10
            lengths.append(len(window))
            window = []
    assert (lengths[0], lengths[-1]) == (2, 8)
    rates = optimizer.decision.rates
    assert rates.beta1 == (1.0 if "adapt_beta1" in switches else rates.lr)
    assert rates.beta2 == (4.0 if "adapt_beta2" in switches else 1.0)
    assert (rates.lr == 1.0) == ("adapt_lr" in switches)
    expected = 4.0 / rates.lr if "adapt_weight_decay" in switches else 1.0
    assert rates.weight_decay == pytest.approx(expected)


def test_moments_of_a_torch_checkpoint_are_corrected_from_their_own_age():
    """After 12 updates by torch beta2 is squared, and the correction counts all of them."""
    kwargs = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.3}
    batches = draw(12 + 20)
    model, reference = build(), build()
    plain = torch.optim.AdamW(model.parameters(), eps=1e-30, **kwargs)
    slow = SlowAdam(reference, decoupled=True, **kwargs)
    train(model, plain, batches[:12])
    for batch in batches[:12]:
        reference.zero_grad()
        loss_of(reference, batch).backward()
        slow.step()
    optimizer, factor = with_factor(NoiseAwareAdamW, model, eps=1e-30, **kwargs)
    numbers = optimizer.state_dict()["param_groups"][0]["noise"]
    for key in (UPDATES, *EXCESSES):
        del numbers[key]
    state = plain.state_dict()
    state["param_groups"][0]["noise"] = numbers
    optimizer.load_state_dict(state)
    train(model, optimizer, batches[12:])
    for batch in joined(batches[12:], 2):
        reference.zero_grad()
        loss_of(reference, batch).backward()
        slow.step(lr=factor, beta1=factor, beta2=2.0, weight_decay=1.0)
    assert difference(model, reference) <= 1e-10


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_beta1_of_the_users_that_rises_is_corrected_by_what_scaling_did(factor):
    """As by OneCycleLR, whose momentum rises at the end."""
    numbers, moments, updates = numbers_after(0), [0.0, 0.0], 600
    for index in range(1, updates + 1):
        own = 0.5 + 0.45 * index / updates
        group = {"lr": 1.0, "betas": (own, 0.99), "weight_decay": 0.0}
        values = scaled_values(group, numbers, Rates(lr=factor, beta1=factor), 0.9, True)
        betas = [own, values["betas"][0]]
        moments = [beta * m + 1 - beta for beta, m in zip(betas, moments, strict=True)]
        plain, scaled = (m / (1 - beta**index) for beta, m in zip(betas, moments, strict=True))
        assert betas[1] == pytest.approx(own**factor)
        assert values["lr"] * scaled == pytest.approx(factor * plain, rel=1e-9)


def test_a_state_from_before_beta1_followed_goes_on():
    """It lacks the first moment's excess: its beta1 was the user's own in every update."""
    kwargs = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.3}
    batches = draw(12 + 20)
    model, reference = build(), build()
    slow = SlowAdam(reference, decoupled=True, **kwargs)
    before, factor = with_factor(NoiseAwareAdamW, model, adapt_beta1=False, eps=1e-30, **kwargs)
    train(model, before, batches[:12])
    state = before.state_dict()
    numbers = state["param_groups"][0]["noise"]
    assert numbers.pop(EXCESSES[0]) == 0 != numbers[EXCESSES[1]]
    optimizer, _ = with_factor(NoiseAwareAdamW, model, eps=1e-30, **kwargs)
    optimizer.load_state_dict(state)
    train(model, optimizer, batches[12:])
    for index, batch in enumerate(joined(batches, 2)):
        reference.zero_grad()
        loss_of(reference, batch).backward()
        slow.step(lr=factor, beta1=1.0 if index < 6 else factor, beta2=2.0, weight_decay=1.0)
    assert difference(model, reference) <= 1e-10


def test_factors_stay_within_their_limit():
    model = build()
    optimizer, _ = with_factor(NoiseAwareSGD, model, steps=32, noise_ratio=1e9, lr=0.1)
    before = params_of(model)
    train(model, optimizer, draw(31))
    loss_of(model, draw(1, seed=9)[0]).backward()
    optimizer.step()
    for old, param in zip(before, model.parameters(), strict=True):
        assert (param - (old - 0.1 * 4.0 * param.grad)).abs().max() <= 1e-15


def test_a_flushed_window_is_applied_at_the_rates_of_its_own_length():
    """One micro-batch left of a window of two that grew from one: the user's own rate."""
    model = build()
    optimizer, _ = with_factor(NoiseAwareSGD, model, lr=0.1)
    before = params_of(model)
    loss_of(model, draw(1)[0]).backward()
    grads = [param.grad.clone() for param in model.parameters()]
    optimizer.step()
    assert optimizer.flush()
    for old, grad, param in zip(before, grads, model.parameters(), strict=True):
        assert (param - (old - 0.1 * grad)).abs().max() <= 1e-15


def test_settings_of_another_rank_are_taken_as_they_are():
    """Of the kinds that this rank's are, where that loses nothing."""
    theirs = torch.optim.SGD(
        build().parameters(), lr=0.1, momentum=0.5, weight_decay=0, nesterov=True
    )
    ours = torch.optim.SGD(build().parameters(), lr=1, momentum=0.9, weight_decay=1, nesterov=True)
    (values,) = values_from(settings_of(theirs), ours.param_groups)
    wanted = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0, "nesterov": True}
    assert {name: values[name] for name in wanted} == wanted
    assert isinstance(values["weight_decay"], int)
    assert values["nesterov"] is True
