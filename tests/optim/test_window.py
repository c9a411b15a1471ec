"""A window of K micro-batches is one batch K times as large, whatever the loop does in between.

The oracle is torch's own optimizer on the joined batches, in float64. Only where a loop edits each
micro-batch's gradient is it a slower one: the edited gradients, made one by one, and their mean.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, noise_aware
from tests.optim.helpers import (
    FEATURES,
    NEEDS_MUON,
    OUTPUTS,
    PAIRS,
    advise,
    build,
    difference,
    draw,
    fixed,
    joined,
    loss_of,
    params_of,
    same_bits,
    train,
    unchanged,
)

EXACT = 1e-12
STEPS, UPDATES = 4, 5
KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


def zero_before(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def zero_after(model, optimizer, batch):
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def model_zero_grad(model, optimizer, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def set_to_zero(model, optimizer, batch):
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, batch).backward()
    optimizer.step()


def by_hand(model, optimizer, batch):
    for param in model.parameters():
        param.grad = None
    loss_of(model, batch).backward()
    optimizer.step()


def several_backwards(model, optimizer, batch):
    for sample in range(len(batch[0])):
        (loss_of(model, [part[sample : sample + 1] for part in batch]) / len(batch[0])).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_closure(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)


def assigned(model, optimizer, batch):
    params = list(model.parameters())
    for param, grad in zip(params, torch.autograd.grad(loss_of(model, batch), params), strict=True):
        param.grad = grad
    optimizer.step()


def zeroed_twice(model, optimizer, batch):
    optimizer.zero_grad()
    zero_after(model, optimizer, batch)
    model.zero_grad(set_to_none=False)


LOOPS = [
    zero_before,
    zero_after,
    model_zero_grad,
    set_to_zero,
    by_hand,
    several_backwards,
    with_closure,
    assigned,
    zeroed_twice,
]


def large(theirs, kwargs, batches, steps=STEPS, dtype=torch.float64, bias=True):
    """Torch's optimizer on batches of so many micro-batches."""
    model = build(dtype, bias=bias)
    return train(model, theirs(model.parameters(), **kwargs), joined(batches, steps))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_any_loop_gives_what_the_large_batch_gives(loop, name):
    ours, theirs, kwargs = PAIRS[name]
    batches = draw(STEPS * UPDATES)
    model = build()
    optimizer = ours(model.parameters(), noise=advise(STEPS), **kwargs)
    for batch in batches:
        loop(model, optimizer, batch)
    assert difference(model, large(theirs, kwargs, batches)) <= EXACT
    assert optimizer.num_updates == UPDATES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("name", PAIRS)
def test_every_kernel_applies_the_mean(name, kernel, steps, dtype):
    ours, theirs, kwargs = PAIRS[name]
    kwargs = kwargs | kernel
    batches = draw(steps * UPDATES, dtype=dtype)
    model = build(dtype)
    train(model, ours(model.parameters(), noise=advise(steps), **kwargs), batches)
    bound = EXACT if dtype == torch.float64 else 2e-5
    assert difference(model, large(theirs, kwargs, batches, steps, dtype)) <= bound


@pytest.mark.parametrize("mode", [advise, fixed])
@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("name", PAIRS)
def test_told_sample_counts_weight_the_mean(name, kernel, mode):
    """Micro-batches of 1 to 7 samples give what all their samples give in one batch."""
    ours, theirs, kwargs = PAIRS[name]
    sizes = [3, 1, 5, 2, 7, 4, 1, 1, 6, 2, 2, 3]
    batches, kwargs = draw(len(sizes), sizes), kwargs | kernel
    model = build()
    optimizer = ours(model.parameters(), noise=mode(4), **kwargs)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.set_samples(len(batch[0]))
        optimizer.step()
        optimizer.zero_grad()
    assert difference(model, large(theirs, kwargs, batches)) <= EXACT


@pytest.mark.parametrize(
    "name",
    [
        *("RMSprop", "Adagrad", "NAdam", "Adafactor", "Rprop"),
        pytest.param("Muon", marks=NEEDS_MUON),
    ],
)
def test_optimizers_made_aware_by_name_average_too(name):
    theirs = getattr(torch.optim, name)
    batches = draw(STEPS * UPDATES)
    model = build(bias=False)
    train(model, noise_aware(theirs)(model.parameters(), noise=advise(STEPS)), batches)
    assert difference(model, large(theirs, {}, batches, bias=False)) <= 1e-10


def test_classes_that_name_arguments_in_their_own_way_are_made_aware():
    """One takes any argument, and clears gradients in a way that takes none, as FusedAdam does."""

    class Plain(torch.optim.SGD):
        def __init__(self, params, lr=0.1, **others):
            super().__init__(params, lr=lr, **others)

        def zero_grad(self):
            super().zero_grad(set_to_none=False)

    ours = noise_aware(Plain)
    assert list(inspect.signature(ours).parameters)[-3:] == ["noise", "process_group", "others"]
    model, batches = build(), draw(4)
    train(model, ours(model.parameters(), momentum=0.9, noise=advise(1)), batches)
    assert not any(param.grad.any() for param in model.parameters())
    assert difference(model, large(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, batches, 1)) == 0


def test_what_zero_grad_takes_can_be_asked_as_of_torchs():
    """As Accelerate asks before it passes `set_to_none` on."""
    for made in (NoiseAwareAdamW, NoiseAwareSGD, type("Own", (NoiseAwareAdamW,), {})):
        assert list(inspect.signature(made.zero_grad).parameters) == ["self", "set_to_none"]


def test_parameters_stand_still_inside_a_window():
    model, batches = build(), draw(3)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(4))
    with unchanged(model):
        train(model, optimizer, batches)
        assert not optimizer.applied
    zero_after(model, optimizer, batches[0])
    assert optimizer.applied


def test_the_applied_mean_is_left_in_the_gradient():
    batches = draw(4)
    for kernel in KERNELS:
        model, reference = build(), build()
        optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(4), **kernel)
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        loss_of(reference, joined(batches, 4)[0]).backward()
        for param, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert (param.grad - other.grad).abs().max() <= EXACT


# ---------------------------------------------------------------------- what loops do to gradients


def of_edited_gradients(theirs, kwargs, batches, steps, edit, dtype=torch.float64):
    """The slow reference: edit each micro-batch's gradient by itself, then apply the plain mean."""
    model = build(dtype)
    optimizer = theirs(model.parameters(), **kwargs)
    params = list(model.parameters())
    for at in range(0, len(batches), steps):
        total = [torch.zeros_like(param) for param in params]
        for batch in batches[at : at + steps]:
            model.zero_grad()
            loss_of(model, batch).backward()
            edit(params)
            for one, param in zip(total, params, strict=True):
                one += param.grad / steps
        for one, param in zip(total, params, strict=True):
            param.grad = one
        optimizer.step()
    return model


@pytest.mark.parametrize("name", PAIRS)
def test_a_loop_that_clips_clips_each_micro_batch(name):
    """And the clipped gradients are what is averaged."""
    ours, theirs, kwargs = PAIRS[name]
    batches = draw(STEPS * UPDATES)

    def clip(params):
        assert nn.utils.clip_grad_norm_(params, 0.3) > 0.3

    model = build()
    optimizer = ours(model.parameters(), noise=advise(STEPS), **kwargs)
    for batch in batches:
        loss_of(model, batch).backward()
        clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    expected = of_edited_gradients(theirs, kwargs, batches, STEPS, clip)
    assert difference(model, expected) <= EXACT


def scaled_run(optimizer, model, batches, scaler):
    scales = []
    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_may_change_inside_a_window(fused):
    """GradScaler doubles it every third micro-batch, windows have four."""
    batches = draw(STEPS * UPDATES, dtype=torch.float32)
    model = build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(STEPS), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = scaled_run(optimizer, model, batches, scaler)
    assert scales[-1] == 1024 * 2 ** (len(batches) // 3)
    expected = large(torch.optim.AdamW, {"lr": 1e-2}, batches, dtype=torch.float32)
    assert difference(model, expected) <= 2e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("position", range(STEPS))
def test_a_micro_batch_that_the_scaler_refuses_is_left_out(position, fused):
    """The window then waits for one more; the scale is halved as with any optimizer."""
    good = draw(2 * STEPS, dtype=torch.float32)
    bad = torch.full_like(good[0][0], torch.inf), good[0][1]
    model = build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(STEPS), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = scaled_run(optimizer, model, [*good[:position], bad, *good[position:]], scaler)
    assert scales[-1] == 512
    assert optimizer.num_updates == 2
    expected = large(torch.optim.AdamW, {"lr": 1e-2}, good, dtype=torch.float32)
    assert difference(model, expected) <= 2e-5


def test_unscaling_and_clipping_by_the_loop_work_as_with_any_optimizer():
    batches = draw(STEPS * UPDATES, dtype=torch.float32)
    model = build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(STEPS), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def clip(params):
        nn.utils.clip_grad_norm_(params, 0.3)

    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.unscale_(optimizer)
        clip(model.parameters())
        scaler.step(optimizer)
        scaler.update()
    kwargs = {"lr": 1e-2}
    expected = of_edited_gradients(
        torch.optim.AdamW, kwargs, batches, STEPS, clip, dtype=torch.float32
    )
    assert difference(model, expected) <= 2e-5


# ---------------------------------------------------------------------- kinds of parameters


def bf16_gradients(number):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(number, 4096, generator=generator).add(0.3).to(torch.bfloat16)


def test_bf16_gradients_are_summed_in_fp32():
    """Of 64: the sum is exact to 1e-6 where one kept in bf16 is off by 1e-2."""
    grads = bf16_gradients(64)
    param = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = NoiseAwareSGD([param], lr=1.0, noise=advise(65))
    narrow = torch.zeros_like(param)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        narrow += grad
    (buffer,) = optimizer._collector._window._sums.totals.values()
    exact = grads.double().sum(0)

    def error(total):
        return ((total - exact).norm() / exact.norm()).item()

    assert buffer.dtype == torch.float32
    assert error(buffer) < 1e-6
    assert error(narrow) > 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
def test_the_mean_is_rounded_to_a_narrow_type_once(dtype, kernel):
    """Its error is half a unit in the last place; a sum beyond the type's range does no harm."""
    unit = torch.finfo(dtype).eps
    grads = bf16_gradients(48).float().mul(torch.finfo(torch.float16).max / 32).to(dtype)
    param = nn.Parameter(torch.zeros(4096, dtype=dtype))
    optimizer = NoiseAwareSGD([param], lr=1e-8, noise=fixed(48), **kernel)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    assert optimizer.applied
    exact = grads.double().mean(0)
    assert ((param.grad - exact).abs() <= 0.51 * unit * exact.abs() + 1e-3).all()


class Branches(nn.Module):
    """Two branches of which a batch uses one or both, and a frozen layer before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.first = nn.Linear(FEATURES, OUTPUTS)
        self.second = nn.Linear(FEATURES, OUTPUTS)
        self.idle = nn.Linear(2, 2)
        self.double()

    def forward(self, inputs, use):
        inputs = self.frozen(inputs)
        return sum(getattr(self, name)(inputs) for name in use)


BOTH, ONE, TWO = ("first", "second"), ("first",), ("second",)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "uses",
    [
        [BOTH, ONE, TWO, BOTH],
        [ONE, BOTH, BOTH, TWO],
        [ONE, ONE, TWO, ONE],
        [TWO, TWO, TWO, ONE],
        [ONE, ONE, ONE, ONE],
    ],
    ids=["first-and-last", "second-in-last-only", "once-in-middle", "not-in-last", "never"],
)
def test_parameters_unused_in_some_micro_batches_count_as_zero_there(uses, name, to_none):
    """As in the large batch; frozen and idle ones are passed over."""
    ours, theirs, kwargs = PAIRS[name]
    batches = draw(STEPS * UPDATES)
    model, reference = Branches(), Branches()
    optimizer = ours(model.parameters(), noise=advise(STEPS), **kwargs)
    plain = theirs(reference.parameters(), **kwargs)

    def loss(model, index):
        inputs, targets = batches[index]
        return (model(inputs, uses[index % STEPS]) - targets).square().mean()

    for index in range(len(batches)):
        optimizer.zero_grad(set_to_none=to_none)
        loss(model, index).backward()
        optimizer.step()
    for at in range(0, len(batches), STEPS):
        plain.zero_grad(set_to_none=to_none)
        (sum(loss(reference, at + i) for i in range(STEPS)) / STEPS).backward()
        plain.step()
    assert difference(model, reference) <= EXACT
    assert same_bits(params_of(model.idle), params_of(Branches().idle))


def test_tied_parameters_get_their_common_gradient():
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)).double()
        model[1].weight = model[0].weight
        return model

    rows = torch.randint(7, (20, 3), generator=torch.Generator().manual_seed(0))

    def loss(model, rows):
        return nn.functional.cross_entropy(model(rows).flatten(0, 1), rows.flatten())

    model, reference = tied(), tied()
    train(model, NoiseAwareAdamW(model.parameters(), noise=advise(4)), rows.split(1), loss)
    train(reference, torch.optim.AdamW(reference.parameters()), rows.split(4), loss)
    assert difference(model, reference) <= EXACT


@pytest.mark.parametrize("mode", [advise, fixed])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("samples", [None, [3, 1, 2, 2]], ids=["equal", "told"])
def test_sparse_gradients_are_summed_as_in_the_large_batch(momentum, samples, mode):
    """Rows seen in several micro-batches, in one, or in none; a dense parameter beside them."""

    def embedder():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)).double()

    sizes = samples or [2, 2, 2, 2]
    generator = torch.Generator().manual_seed(0)
    windows = [[torch.randint(8, (n,), generator=generator) for n in sizes] for _ in range(5)]

    def loss(model, rows):
        return model(rows).square().sum(1).mean()

    model, reference = embedder(), embedder()
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.1, momentum=momentum, noise=mode(4))
    for rows in (rows for window in windows for rows in window):
        loss(model, rows).backward()
        if samples:
            optimizer.set_samples(len(rows))
        optimizer.step()
        optimizer.zero_grad()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=momentum)
    train(reference, plain, [torch.cat(window) for window in windows], loss)
    assert difference(model, reference) <= EXACT


@pytest.mark.parametrize("kernel", [{}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_complex_parameters_are_averaged_too(name, kernel):
    ours, theirs, kwargs = PAIRS[name]

    def network():
        torch.manual_seed(0)
        return nn.Linear(FEATURES, OUTPUTS, dtype=torch.complex128)

    def loss(model, batch):
        return (model(batch[0].to(torch.complex128)) - batch[1]).abs().square().mean()

    batches = draw(STEPS * UPDATES)
    model, reference = network(), network()
    optimizer = ours(model.parameters(), noise=advise(STEPS), **kwargs, **kernel)
    train(model, optimizer, batches, loss)
    train(
        reference,
        theirs(reference.parameters(), **kwargs, **kernel),
        joined(batches, STEPS),
        loss,
    )
    assert difference(model, reference) <= EXACT


def test_gradients_of_any_memory_layout_are_summed():
    """Transposed and channels-last gradients, as convolutions make them."""

    def network():
        torch.manual_seed(0)
        model = nn.Conv2d(2, 3, 3).double().to(memory_format=torch.channels_last)
        return nn.Sequential(model)

    data = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()

    def loss(model, images):
        return model(images.to(memory_format=torch.channels_last)).square().mean()

    model, reference = network(), network()
    train(model, NoiseAwareAdamW(model.parameters(), noise=advise(3)), data.split(1), loss)
    train(reference, torch.optim.AdamW(reference.parameters()), data.split(3), loss)
    assert difference(model, reference) <= EXACT


# ---------------------------------------------------------------------- groups, copies, the end


def groups_of(model):
    return [
        {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 0.0},
        {"params": model[2].parameters(), "lr": 1e-3, "betas": (0.7, 0.8)},
    ]


def test_parameter_groups_keep_their_own_arguments():
    batches = draw(STEPS * UPDATES)
    model, reference = build(), build()
    train(model, NoiseAwareAdamW(groups_of(model), noise=advise(STEPS)), batches)
    train(reference, torch.optim.AdamW(groups_of(reference)), joined(batches, STEPS))
    assert difference(model, reference) <= EXACT


def test_named_parameters_are_taken_as_in_torch():
    batches = draw(STEPS * UPDATES)
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model.named_parameters(), noise=advise(STEPS))
    train(model, optimizer, batches)
    train(reference, torch.optim.AdamW(reference.parameters()), joined(batches, STEPS))
    assert difference(model, reference) <= EXACT
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_a_group_may_be_empty_as_in_torch():
    batches = draw(STEPS * UPDATES)
    model, reference = build(), build()

    def groups(model):
        return [{"params": []}, {"params": model.parameters()}]

    train(model, NoiseAwareAdamW(groups(model), noise=advise(STEPS)), batches)
    train(reference, torch.optim.AdamW(groups(reference)), joined(batches, STEPS))
    assert difference(model, reference) <= EXACT


@pytest.mark.parametrize("mode", [advise, fixed])
def test_a_group_may_be_added_between_windows(mode):
    batches = draw(STEPS * UPDATES)
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model[0].parameters(), noise=mode(STEPS))
    plain = torch.optim.AdamW(reference[0].parameters())
    train(model, optimizer, batches[: 2 * STEPS])
    train(reference, plain, joined(batches[: 2 * STEPS], STEPS))
    model.zero_grad()
    reference.zero_grad()
    for each, network in [(optimizer, model), (plain, reference)]:
        each.add_param_group({"params": network[2].parameters(), "lr": 1e-2})
    train(model, optimizer, batches[2 * STEPS :])
    train(reference, plain, joined(batches[2 * STEPS :], STEPS))
    assert difference(model, reference) <= EXACT


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_group_added_inside_a_window_counts_as_zero_before(at):
    """It enters the window's mean with the micro-batches that it was there for."""
    batches = draw(2 * STEPS)
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model[0].parameters(), noise=advise(STEPS))
    train(model, optimizer, batches[:at])
    model.zero_grad()
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, batches[at:])
    plain = torch.optim.AdamW(reference.parameters())
    losses = [loss_of(reference, batch) / STEPS for batch in batches[:STEPS]]
    torch.autograd.backward(losses, inputs=list(reference[0].parameters()), retain_graph=True)
    torch.autograd.backward(losses[at:], inputs=list(reference[2].parameters()))
    plain.step()
    plain.zero_grad()
    train(reference, plain, joined(batches[STEPS:], STEPS))
    assert difference(model, reference) <= EXACT


def copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, saved], ids=lambda f: f.__name__)
@pytest.mark.parametrize("noise", ["off", "advise", "auto", advise(3), fixed(3, max_norm=0.1)])
@pytest.mark.parametrize("fused", [None, True])
def test_a_copy_steps_as_the_original_does(noise, duplicate, fused):
    batches = draw(12)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=noise, fused=fused)
    train(model, optimizer, batches[:6])
    other, its_optimizer = duplicate(model, optimizer)
    assert type(its_optimizer) is NoiseAwareAdamW
    assert its_optimizer.config == optimizer.config
    with unchanged(other):
        train(model, optimizer, batches[6:])
    train(other, its_optimizer, batches[6:])
    assert same_bits(params_of(model), params_of(other))


def test_a_copy_taken_inside_a_window_starts_the_window_again():
    batches = draw(8)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(4))
    train(model, optimizer, batches[:6])
    with pytest.warns(UserWarning, match="after 2 of 4 micro-batches"):
        other, its_optimizer = copied(model, optimizer)
    train(other, its_optimizer, batches[:4])
    assert its_optimizer.num_updates == 2
    train(model, optimizer, batches[6:])
    assert optimizer.num_updates == 2


@pytest.mark.parametrize("left", [1, 2, 3])
def test_flush_applies_the_mean_of_what_is_there(left):
    """As a last batch that is smaller than the others."""
    batches = draw(STEPS + left)
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(STEPS))
    train(model, optimizer, batches)
    assert not optimizer.applied
    assert optimizer.flush()
    assert optimizer.applied
    assert optimizer.num_updates == 2
    with unchanged(model):
        assert not optimizer.flush()
    ends = [joined(batches[:STEPS], STEPS)[0], joined(batches[STEPS:], left)[0]]
    train(reference, torch.optim.AdamW(reference.parameters()), ends)
    assert difference(model, reference) <= EXACT


def test_what_was_flushed_is_in_no_window_after_it():
    """A loop that clears gradients after each step() does not after flush()."""
    batches = draw(STEPS + 1)
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(STEPS))
    plain = torch.optim.AdamW(reference.parameters())
    for _ in range(2):  # epochs
        train(model, optimizer, batches)
        optimizer.flush()
        train(reference, plain, [*joined(batches[:STEPS], STEPS), batches[-1]])
    assert difference(model, reference) <= EXACT


def test_flush_of_an_empty_window_does_nothing():
    model = build()
    for noise in ("off", "auto", advise(4)):
        with unchanged(model):
            assert not NoiseAwareAdamW(model.parameters(), noise=noise).flush()


def test_accumulate_wraps_a_micro_batch_on_one_rank_without_effect():
    batches = draw(STEPS * UPDATES)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(STEPS))
    for batch in batches:
        with optimizer.accumulate(model):
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert difference(model, large(torch.optim.AdamW, {}, batches)) <= EXACT
