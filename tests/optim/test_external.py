"""accumulation="external": the loop accumulates in `p.grad`, and backwards are measured.

Held against the internal mode on the same data: the same windows, decisions and weights.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig
from tests.optim.helpers import (
    FEATURES,
    OUTPUTS,
    advise,
    build,
    difference,
    draw,
    fixed,
    growing,
    joined,
    loss_of,
    params_of,
    same_bits,
    train,
    unchanged,
)

STEPS = 4
KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


def external(config):
    return replace(config, accumulation="external")


def close_to(window, expected, tolerance=1e-10):
    """Whether two windows agree: norms to rounding, all else exactly."""
    for name in ("small_sq", "big_sq", "small_batch", "big_batch", "samples"):
        one, other = (getattr(w.norms, name) for w in (window, expected))
        assert one == pytest.approx(other, rel=tolerance), name
    bare = [
        replace(w, norms=replace(w.norms, **dict.fromkeys(("small_sq", "big_sq"), ())))
        for w in (window, expected)
    ]
    assert bare[0].norms.count == bare[1].norms.count
    assert replace(bare[0], norms=None) == replace(bare[1], norms=None)
    return True


def windows_of(optimizer):
    return [window for decision in optimizer.decisions for window in decision.windows]


def accumulate(model, optimizer, batches, before_step=None, loss_scale=1.0, told=False):
    """The loop of a framework: as many backwards as the optimizer asks for, then one step."""
    batches = list(batches)
    while len(batches) >= optimizer.accumulation_steps:
        steps = optimizer.accumulation_steps
        window, batches = batches[:steps], batches[steps:]
        total = sum(len(batch[0]) for batch in window)
        optimizer.zero_grad()
        for batch in window:
            weight = len(batch[0]) / total if told else 1 / steps
            if told:
                optimizer.set_samples(len(batch[0]))
            (loss_of(model, batch) * weight * loss_scale).backward()
        if before_step is not None:
            before_step(list(model.parameters()))
        optimizer.step()


def internal_windows(config, batches, told=False, lr=1e-2):
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=lr, noise=config)
    for batch in batches:
        loss_of(model, batch).backward()
        if told:
            optimizer.set_samples(len(batch[0]))
        optimizer.step()
        optimizer.zero_grad()
    return model, windows_of(optimizer)


@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("mode", [advise, fixed])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_windows_and_weights_are_those_of_the_internal_mode(steps, told, mode, kernel):
    config = mode(steps, decision_interval=1)
    batches = draw(steps * 6, [3, 1, 4, 2, 5] * 6 if told else 4)[: steps * 6]
    expected, windows = internal_windows(config, batches, told)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=external(config), **kernel)
    accumulate(model, optimizer, batches, told=told)
    assert difference(model, expected) <= 1e-12
    assert len(windows_of(optimizer)) == len(windows) == 6
    assert all(map(close_to, windows_of(optimizer), windows))
    assert optimizer.num_updates == 6


def test_a_growing_run_makes_the_decisions_of_the_internal_mode():
    """The loop follows `accumulation_steps` through probes and growth."""
    config = growing(max_norm=1.0)
    batches = draw(200)
    model, internal = build(), build()
    one = NoiseAwareAdamW(model.parameters(), lr=3e-3, noise=external(config))
    other = NoiseAwareAdamW(internal.parameters(), lr=3e-3, noise=config)
    accumulate(model, one, batches)
    train(internal, other, batches)
    assert [d.accumulation_steps for d in one.decisions] == [
        d.accumulation_steps for d in other.decisions
    ]
    assert one.accumulation_steps == 4
    assert one.noise.scale == pytest.approx(other.noise.scale, rel=1e-8)
    assert one.decision.total_clipped == other.decision.total_clipped > 0


def test_no_gradient_is_kept():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=external(fixed(4)))
    accumulate(model, optimizer, draw(8))
    for batch in draw(3):
        loss_of(model, batch).backward()
    assert optimizer._collector.nbytes == 0


# ---------------------------------------------------------------------- what loops do before step()


def test_a_clip_before_the_step_does_not_enter_the_measurement():
    """Norms are read in the backward, before the loop can clip; the update is the clipped one."""
    config = advise(STEPS, decision_interval=1)
    batches = draw(STEPS * 5)
    norms = []

    def clip(params):
        norms.append(float(nn.utils.clip_grad_norm_(params, 0.1)))

    model, reference = build(), build()
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.1, noise=external(config))
    accumulate(model, optimizer, batches, clip)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in joined(batches, STEPS):
        plain.zero_grad()
        loss_of(reference, batch).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        plain.step()
    assert difference(model, reference) <= 1e-12
    for window, norm in zip(windows_of(optimizer), norms, strict=True):
        assert sum(window.norms.big_sq) ** 0.5 == pytest.approx(norm, rel=1e-9)
        assert sum(window.norms.small_sq) > sum(window.norms.big_sq) > 0.1**2


class Experts(nn.Module):
    """A shared layer and two experts of which each micro-batch uses one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(FEATURES, FEATURES)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, OUTPUTS) for _ in range(2))
        self.double()

    def forward(self, inputs, expert):
        return self.experts[expert](self.shared(inputs))


@pytest.mark.parametrize("uses", [[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]], ids=str)
def test_parameters_that_the_last_backward_does_not_touch_are_measured_before_the_clip(uses):
    batches = draw(STEPS)
    config = advise(STEPS, decision_interval=1)
    model, internal = Experts(), Experts()
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.1, noise=external(config))
    reference = NoiseAwareSGD(internal.parameters(), lr=0.1, noise=config)
    for (inputs, targets), use in zip(batches, uses, strict=True):
        ((model(inputs, use) - targets).square().mean() / STEPS).backward()
        reference.zero_grad()
        (internal(inputs, use) - targets).square().mean().backward()
        reference.step()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert close_to(*windows_of(optimizer), *windows_of(reference))


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)], ids=["float", "tensor"])
def test_a_loss_scale_is_taken_out_of_the_norms(scale):
    def unscale(params):
        for param in params:
            param.grad.div_(float(scale))

    config = advise(STEPS, decision_interval=1)
    batches = draw(STEPS * 3)
    expected, windows = internal_windows(config, batches)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=external(config))
    optimizer.set_loss_scale(scale)
    accumulate(model, optimizer, batches, unscale, loss_scale=1024.0)
    assert difference(model, expected) <= 1e-12
    assert all(map(close_to, windows_of(optimizer), windows))


def test_a_grad_scaler_that_skips_a_step_loses_that_window_only():
    """An inf in the first window: GradScaler does not step, and the next window is whole."""
    batches = draw(STEPS * 3)
    batches[1] = torch.full_like(batches[1][0], torch.inf), batches[1][1]
    model, reference = build(), build()
    config = external(advise(STEPS, decision_interval=1))
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for at in range(0, len(batches), STEPS):
        optimizer.zero_grad()
        for batch in batches[at : at + STEPS]:
            scaler.scale(loss_of(model, batch) / STEPS).backward()
        optimizer.set_loss_scale(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    train(reference, torch.optim.AdamW(reference.parameters()), joined(batches[STEPS:], STEPS))
    assert difference(model, reference) <= 1e-6
    assert [window.norms.count for window in windows_of(optimizer)] == [STEPS, STEPS]
    assert optimizer.noise is None
    assert all(window.norms.finite for window in windows_of(optimizer))


@pytest.mark.parametrize("position", range(STEPS))
def test_a_bad_micro_batch_costs_the_window(position):
    """Its gradient is in the sum already: no update, nothing learned, counted; then on."""
    batches = draw(STEPS * 2)
    spoilt = list(batches[:STEPS])
    spoilt[position] = torch.full_like(spoilt[position][0], torch.nan), spoilt[position][1]
    model, reference = build(), build()
    config = external(fixed(STEPS, decision_interval=1))
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    with unchanged(model):
        accumulate(model, optimizer, spoilt)
    assert not optimizer.applied
    assert (optimizer.num_updates, optimizer.decision.total_skipped) == (0, STEPS)
    accumulate(model, optimizer, batches[STEPS:])
    train(reference, torch.optim.AdamW(reference.parameters()), joined(batches[STEPS:], STEPS))
    assert difference(model, reference) <= 1e-12
    assert optimizer.num_updates == 1


@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
def test_its_own_threshold_clips_the_accumulated_gradient(kernel):
    batches = draw(STEPS * 6)
    model, internal = build(), build()
    config = fixed(STEPS, max_norm=0.9, decision_interval=1)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=external(config), **kernel)
    accumulate(model, optimizer, batches)
    reference = NoiseAwareAdamW(internal.parameters(), noise=config)
    train(internal, reference, batches)
    assert difference(model, internal) <= 1e-12
    assert 0 < optimizer.decision.total_clipped == reference.decision.total_clipped < 6


# ---------------------------------------------------------------------- changes and mistakes


def test_a_backward_that_fails_half_way_is_forgotten():
    """As after running out of memory: zero the gradients, take a smaller batch, go on."""
    batches = draw(STEPS)
    model = build()
    config = external(advise(STEPS, decision_interval=1))
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)

    def fail(grad):
        raise MemoryError("no memory left")

    handle = model[0].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        loss_of(model, batches[0]).backward()
    handle.remove()
    accumulate(model, optimizer, batches)
    _, windows = internal_windows(advise(STEPS, decision_interval=1), batches)
    assert close_to(*windows_of(optimizer), *windows)


def test_reentrant_checkpointing_is_refused_with_the_remedy():
    """It runs backwards inside the backward: a micro-batch would count as several."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=external(advise(2)))
    inputs, targets = draw(1)[0]
    found = checkpoint(model, inputs.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (found - targets).square().mean().backward()
    assert optimizer.num_updates == 0  # and is there: one that is gone takes its hooks with it


def test_checkpointing_without_reentry_measures_the_same():
    batches = draw(STEPS)
    _, windows = internal_windows(advise(STEPS, decision_interval=1), batches)
    model = build()
    config = external(advise(STEPS, decision_interval=1))
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    for inputs, targets in batches:
        found = checkpoint(model, inputs, use_reentrant=False)
        ((found - targets).square().mean() / STEPS).backward()
    optimizer.step()
    assert close_to(*windows_of(optimizer), *windows)


def test_tied_parameters_are_one_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)).double()
    model[1].weight = model[0].weight
    optimizer = NoiseAwareSGD(
        model.parameters(), lr=1e-30, noise=external(advise(1, decision_interval=1))
    )
    model(torch.tensor([1, 2, 2])).logsumexp(-1).sum().backward()
    norm = model[0].weight.grad.square().sum().item()
    optimizer.step()
    assert sum(windows_of(optimizer)[0].norms.small_sq) == pytest.approx(norm)


def test_gradients_taken_aside_are_not_counted():
    """`torch.autograd.grad`, as a penalty or a probe uses it, brings nothing to `p.grad`."""
    batches = draw(STEPS)
    _, windows = internal_windows(advise(STEPS, decision_interval=1), batches)
    model = build()
    config = external(advise(STEPS, decision_interval=1))
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    for batch in batches:
        torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
        (loss_of(model, batch) / STEPS).backward()
    optimizer.step()
    assert close_to(*windows_of(optimizer), *windows)


@pytest.mark.parametrize("open_window", [False, True])
def test_a_group_may_be_added_between_windows_and_inside_one(open_window):
    batches = draw(STEPS * 3)
    model, reference = build(), build()
    config = external(advise(STEPS))
    optimizer = NoiseAwareAdamW(model[0].parameters(), noise=config)
    plain = torch.optim.AdamW(reference[0].parameters())
    accumulate(model, optimizer, batches[:STEPS])
    train(reference, plain, joined(batches[:STEPS], STEPS))
    for network in (model, reference):
        network.zero_grad()
    for index, batch in enumerate(batches[STEPS : 2 * STEPS]):
        if index == (2 if open_window else 0):
            for network, each in ((model, optimizer), (reference, plain)):
                network[2].zero_grad()
                each.add_param_group({"params": network[2].parameters()})
        for network in (model, reference):
            (loss_of(network, batch) / STEPS).backward()
    optimizer.step()
    plain.step()
    optimizer.zero_grad()
    plain.zero_grad()
    accumulate(model, optimizer, batches[2 * STEPS :])
    train(reference, plain, joined(batches[2 * STEPS :], STEPS))
    assert difference(model, reference) <= 1e-12
    assert optimizer.num_updates == 3


def test_a_copy_watches_its_own_model():
    batches = draw(STEPS * 4)
    model = build()
    config = external(growing())
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    accumulate(model, optimizer, batches[:STEPS])
    other, its_optimizer = copy.deepcopy((model, optimizer))
    with unchanged(other):
        accumulate(model, optimizer, batches[STEPS:])
    accumulate(other, its_optimizer, batches[STEPS:])
    assert same_bits(params_of(model), params_of(other))
    assert [d.noise for d in optimizer.decisions][-2:] == [
        d.noise for d in its_optimizer.decisions
    ][-2:]


def test_a_state_taken_inside_a_window_warns_and_flush_has_nothing_to_do():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=external(advise(STEPS)))
    loss_of(model, draw(1)[0]).backward()
    with pytest.warns(UserWarning, match="after 1 of 4 micro-batches"):
        optimizer.state_dict()
    assert not optimizer.flush()


def test_a_step_without_a_backward_is_refused():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=external(advise(2)))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="no backward pass was seen"):
        optimizer.step()


@pytest.mark.parametrize("all_frozen", [False, True])
def test_a_parameter_that_was_frozen_at_the_start_is_measured_from_its_second_window(all_frozen):
    """In its first one nothing was read of it: the noise is unknown, and no update is lost."""
    batches = draw(8)
    model, reference = build(), build()
    config = external(advise(2, decision_interval=1))
    model[0].requires_grad_(False)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    model[0].requires_grad_(True)
    model[2].requires_grad_(not all_frozen)
    accumulate(model, optimizer, batches)
    always = NoiseAwareAdamW(reference.parameters(), lr=1e-2, noise=config)
    reference[2].requires_grad_(not all_frozen)
    accumulate(reference, always, batches)
    assert same_bits(params_of(model), params_of(reference))
    first, *others = windows_of(optimizer)
    assert (first.micro_batches, first.skipped, first.applied) == (2, 0, True)
    assert first.norms.small_sq == ()
    assert all(map(math.isnan, first.norms.big_sq))
    assert others == windows_of(always)[1:]


def test_a_parameter_that_is_frozen_for_a_while_is_measured_again():
    model, batches = build(), draw(8)
    config = external(advise(2, decision_interval=1))
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.0, noise=config)
    for at, trains in ((0, False), (2, True), (4, True), (6, True)):
        model[0].requires_grad_(trains)
        accumulate(model, optimizer, batches[at : at + 2])
    frozen, *others = (window.norms for window in windows_of(optimizer))
    assert frozen.finite
    reference = build()
    always = NoiseAwareSGD(reference.parameters(), lr=0.0, noise=config)
    accumulate(reference, always, batches)
    assert others == [window.norms for window in windows_of(always)][1:]


@pytest.mark.parametrize("before", [0, 2])
def test_hooks_of_the_user_that_came_later_are_read_through_from_their_second_window_on(before):
    """What they make of a gradient is what is applied."""
    model, reference = build(), build()
    config = external(advise(2, decision_interval=1))
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.0, noise=config)
    batches = draw(6)
    accumulate(model, optimizer, batches[:before])
    for param in model.parameters():
        param.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    accumulate(model, optimizer, batches[before:])
    halves = []
    for batch in batches[4:]:  # losses are divided before the hooks see their gradients
        grads = torch.autograd.grad(loss_of(reference, batch) / 2, list(reference.parameters()))
        halves.append(torch.cat([grad.clamp(-0.01, 0.01).flatten() for grad in grads]))
    last = windows_of(optimizer)[-1].norms
    assert sum(last.small_sq) == pytest.approx(sum(4 * h.dot(h).item() for h in halves) / 2)
    assert sum(last.big_sq) == pytest.approx(sum(halves).square().sum().item())


@pytest.mark.parametrize("told", [1, 3])
def test_sample_counts_that_do_not_match_the_backwards_are_refused(told):
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=external(advise(2)))
    for batch in draw(2):
        loss_of(model, batch).backward()
    for _ in range(told):
        optimizer.set_samples(4)
    with pytest.raises(ValueError, match=f"{told} times for 2 micro-batches"):
        optimizer.step()


def test_windows_may_be_shorter_than_asked():
    """The end of the data: what is there is measured and applied as it is."""
    batches = draw(3)
    model, reference = build(), build()
    config = external(NoiseConfig(mode="advise", accumulation_steps=8, decision_interval=1))
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    for batch in batches:
        (loss_of(model, batch) / 3).backward()
    optimizer.step()
    train(reference, torch.optim.AdamW(reference.parameters()), joined(batches, 3))
    assert difference(model, reference) <= 1e-12
    assert windows_of(optimizer)[0].norms.count == 3
