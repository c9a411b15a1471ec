"""A micro-batch that is not finite: out of the parameters, out of the statistics, in the count."""

import math

import pytest
import torch
from torch import nn

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig
from tests.optim.helpers import (
    PAIRS,
    advise,
    build,
    difference,
    draw,
    fixed,
    loss_of,
    params_of,
    same_bits,
    state_tensors,
    train,
)

STEPS = 4
KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]
BAD = [math.inf, -math.inf, math.nan]


def spoilt(batch, value):
    inputs, targets = batch
    inputs = inputs.clone()
    inputs[0, 0] = value
    return inputs, targets


def take(model, optimizer, batches, samples=False):
    """A loop in which a bad input makes a bad gradient, as in life."""
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if samples:
            optimizer.set_samples(len(batch[0]))
        optimizer.step()


def all_finite(model):
    return all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("samples", [False, True], ids=["equal", "told"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("bad", [(0,), (1,), (3,), (0, 3), (0, 1, 2), (1, 2, 3)], ids=str)
def test_the_update_is_the_mean_of_the_others(bad, name, kernel, samples):
    """First, middle, last, all but one: as if the bad ones had not been in the window."""
    ours, theirs, kwargs = PAIRS[name]
    kwargs = kwargs | kernel
    sizes = [1, 3, 2, 5] if samples else [4] * STEPS
    batches = draw(3 * STEPS, sizes * 3)
    model, reference = build(), build()
    optimizer = ours(model.parameters(), noise=fixed(STEPS, decision_interval=1), **kwargs)
    plain = theirs(reference.parameters(), **kwargs)
    for at in range(0, len(batches), STEPS):
        window = batches[at : at + STEPS]
        middle = at == STEPS
        given = [
            spoilt(batch, BAD[index % 3]) if middle and index in bad else batch
            for index, batch in enumerate(window)
        ]
        take(model, optimizer, given, samples)
        assert optimizer.applied
        left = [b for index, b in enumerate(window) if not middle or index not in bad]
        train(reference, plain, [tuple(torch.cat(parts) for parts in zip(*left, strict=True))])
        (measured,) = optimizer.decision.windows
        assert measured.skipped == STEPS - len(left)
        assert measured.micro_batches == STEPS
        assert measured.norms.count == len(left)
        assert measured.norms.samples == (sum(len(b[0]) for b in left) if samples else len(left))
        assert measured.norms.finite
    assert difference(model, reference) <= 1e-12
    assert optimizer.decision.total_skipped == len(bad)
    assert optimizer.metrics()["clip/total_skipped"] == len(bad)


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_window_with_nothing_finite_changes_no_bit(name, kernel, steps, value):
    """No update, no state, no count; the windows after it go on."""
    ours, _, kwargs = PAIRS[name]
    model = build(torch.float32)
    config = fixed(steps, decision_interval=1)
    optimizer = ours(model.parameters(), noise=config, **kwargs, **kernel)
    good = draw(2 * steps, dtype=torch.float32)
    take(model, optimizer, good[:steps])
    params = params_of(model)
    state = [tensor.clone() for tensor in state_tensors(optimizer)]
    numbers = dict(optimizer.param_groups[0]["noise"])
    estimate = optimizer._adaptation._controller.state.estimator
    take(model, optimizer, [spoilt(batch, value) for batch in good[:steps]])
    assert not optimizer.applied
    assert same_bits(params, params_of(model))
    assert same_bits(state, state_tensors(optimizer))
    assert optimizer.param_groups[0]["noise"] == numbers
    assert optimizer._adaptation._controller.state.estimator == estimate
    assert optimizer.num_updates == 1
    assert optimizer.decision.total_skipped == steps
    assert optimizer.decision.grad_norm is None
    take(model, optimizer, good[steps:])
    assert optimizer.applied
    assert optimizer.num_updates == 2
    assert all_finite(model)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_sum_that_overflows_is_not_applied(kernel):
    """Each gradient is finite, their mean's norm is not: nothing changes and nothing is learned."""
    param = nn.Parameter(torch.ones(4))
    config = fixed(2, decision_interval=1)
    optimizer = NoiseAwareSGD([param], lr=0.1, momentum=0.9, noise=config, **kernel)
    for _ in range(2):
        param.grad = torch.full((4,), 8e18)
        optimizer.step()
    assert not optimizer.applied
    assert torch.equal(param, torch.ones(4))
    assert not optimizer.state[param].get("momentum_buffer", torch.zeros(1)).any()
    assert optimizer.decision.num_updates == 0
    assert optimizer.decision.total_skipped == 2
    assert optimizer._adaptation._controller.state.estimator.windows == 0
    assert optimizer.decision.samples_seen == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_a_flushed_window_with_nothing_finite_is_not_applied(steps):
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=fixed(4))
    batches = [spoilt(batch, math.nan) for batch in draw(steps)]
    before = params_of(model)
    take(model, optimizer, batches)
    assert optimizer.flush()
    assert not optimizer.applied
    assert optimizer.num_updates == 0
    assert same_bits(before, params_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 2)], ids=str)
def test_narrow_gradients_are_skipped_too(bad, dtype):
    param = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = NoiseAwareSGD([param], lr=1.0, noise=fixed(3))
    for index in range(3):
        param.grad = torch.full((3,), math.inf if index in bad else index + 1.0, dtype=dtype)
        optimizer.step()
    left = [index + 1.0 for index in range(3) if index not in bad]
    assert optimizer.applied == bool(left)
    assert torch.equal(param, torch.full_like(param, -sum(left) / len(left) if left else 0.0))


def test_one_bad_value_in_a_sparse_gradient_is_found():
    model = nn.Embedding(5, 3, sparse=True).double()
    before = model.weight.detach().clone()
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.1, noise=fixed(2))
    for scale in (math.nan, 1.0):
        optimizer.zero_grad()
        (scale * model(torch.tensor([1, 2])).sum()).backward()
        optimizer.step()
    expected = before.clone()
    expected[1:3] -= 0.1
    assert torch.allclose(model.weight, expected, atol=1e-15)


def test_a_group_without_gradients_does_not_hide_one_that_is_bad():
    model = build()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = NoiseAwareAdamW(groups, noise=fixed(1))
    before = params_of(model)
    model[2].weight.grad = torch.full_like(model[2].weight, math.nan)
    optimizer.step()
    assert not optimizer.applied
    assert same_bits(before, params_of(model))


@pytest.mark.parametrize(
    "noise",
    [advise(1), advise(3), fixed(1, skip_nonfinite=False), fixed(3, skip_nonfinite=False)],
    ids=["advise-1", "advise-3", "auto-1", "auto-3"],
)
def test_advise_and_the_switch_let_it_through_as_torch_does(noise):
    """And what is measured stays finite."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=noise)
    batches = draw(3 * 12)
    take(model, optimizer, batches)
    windows = optimizer._adaptation._controller.state.estimator.windows
    for _ in range(noise.accumulation_steps):
        optimizer.zero_grad()
        for param in model.parameters():
            param.grad = torch.full_like(param, math.nan)
        optimizer.step()
    assert optimizer.applied
    assert not all_finite(model)
    optimizer.state_dict()
    state = optimizer._adaptation._controller.state
    assert math.isfinite(state.estimator.average.trace)
    assert math.isfinite(state.norms.level)
    assert state.estimator.windows >= windows


def test_a_run_with_bad_micro_batches_here_and_there_keeps_its_statistics():
    """One in seven is bad: the noise scale is that of the run without them, within its interval."""
    scales = []
    for every in (0, 7):
        model = build()
        config = NoiseConfig(
            accumulation_steps=4,
            min_accumulation_steps=4,
            max_accumulation_steps=4,
            samples_per_micro_batch=4,
        )
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-30, noise=config)
        for index, batch in enumerate(draw(400)):
            bad = every and index % every == 0
            take(model, optimizer, [spoilt(batch, math.nan) if bad else batch])
        scales.append(optimizer.noise)
    clean, dirty = scales
    low, high = clean.scale_interval
    assert low < dirty.scale < high
    assert optimizer.decision.total_skipped == len(range(0, 400, 7))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_run_that_stands_still_says_so_once_each_time(kernel, caplog):
    model = build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=fixed(1), **kernel)
    batches = draw(100, dtype=torch.float32)
    bad = [spoilt(batch, math.nan) for batch in batches]

    def warnings():
        return [r.getMessage() for r in caplog.records if "stand still" in r.getMessage()]

    take(model, optimizer, batches[:3] + bad[:10] + batches[3:30] + bad[10:25])
    assert not warnings()
    take(model, optimizer, bad[25:85])
    assert len(warnings()) == 1
    assert "the last 20 windows ended without an update" in warnings()[0]
    assert optimizer.num_updates == 30
    take(model, optimizer, batches[30:31] + bad[:40])
    assert len(warnings()) == 2


def test_a_window_that_is_skipped_leaves_the_loops_gradients_alone():
    """Kept as zeros, those of an idle parameter go on to decay it, as in torch."""

    def trained(optimizer_class, **kwargs):
        used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        idle.grad = torch.zeros(2)
        optimizer = optimizer_class([used, idle], lr=0.1, weight_decay=0.1, **kwargs)
        for factor in (1.0, math.nan, 1.0) if kwargs else (1.0, 1.0):
            for _ in range(2 if kwargs else 1):
                (used.sum() * factor).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return idle

    ours = trained(NoiseAwareAdamW, noise=fixed(2))
    torch.testing.assert_close(ours, trained(torch.optim.AdamW))


def test_the_loss_of_a_step_that_a_scaler_skipped_is_in_no_window():
    model = build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=fixed(4, decision_interval=1))
    for value in (1.0, 2.0):
        loss_of(model, draw(1, dtype=torch.float32)[0]).backward()
        optimizer.report_loss(value)
        optimizer.step()
    optimizer.report_loss(math.inf)  # whose step does not come
    optimizer.flush()
    (window,) = optimizer.decision.windows
    assert (window.loss_sum, window.loss_count) == (3.0, 2)
