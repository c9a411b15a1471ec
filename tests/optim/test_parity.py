"""What a torch optimizer does, ours does bit for bit where it changes nothing.

Two ways of changing nothing: noise="off", and noise="advise" with windows of one micro-batch, which
measures and decides but acts on none of it.
"""

import inspect
import io

import pytest
import torch
from torch.optim import Optimizer

from noiseopt.optim import NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD, noise_aware
from tests.optim.helpers import (
    NEEDS_MUON,
    PAIRS,
    build,
    draw,
    params_of,
    same_bits,
    state_tensors,
    train,
)

INERT = ["off", "advise"]

# LBFGS evaluates its closure several times a step and SparseAdam takes sparse gradients only: the
# one is refused, the other has its own test.
TABLE = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type)
    and issubclass(found, Optimizer)
    and found not in (Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
)

KERNELS = [{"foreach": False}, {"foreach": True}, {"fused": True}, {}]
ADAM = [
    {},
    {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
    {"amsgrad": True, "maximize": True},
    {"weight_decay": 0.0},
]
SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True},
]


def tensor_arguments():
    """Made anew for each optimizer: a Tensor lr belongs to one of them."""
    return [
        {"lr": torch.tensor(1e-2), "foreach": False},
        {"lr": torch.tensor(1e-2), "fused": True},
        {
            "lr": torch.tensor(1e-2),
            "betas": (torch.tensor(0.8), torch.tensor(0.95)),
            "foreach": False,
        },
        {"betas": (torch.tensor(0.8), torch.tensor(0.95))},
    ]


def rows():
    for name, arguments in [("AdamW", ADAM), ("Adam", ADAM), ("SGD", SGD)]:
        for kernel in KERNELS:
            for kwargs in arguments:
                yield pytest.param(name, kwargs | kernel, id=f"{name}-{kwargs | kernel}")


def assert_same_run(ours, theirs, kwargs, noise, dtype=torch.float32, bias=True, steps=12):
    models = build(dtype, bias=bias), build(dtype, bias=bias)
    optimizers = (
        ours(models[0].parameters(), noise=noise, **kwargs[0]),
        theirs(models[1].parameters(), **kwargs[1]),
    )
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, draw(steps, dtype=dtype))
    assert same_bits(*map(params_of, models))
    assert same_bits(*map(state_tensors, optimizers))
    return optimizers


@pytest.mark.parametrize("noise", INERT)
@pytest.mark.parametrize(("name", "kwargs"), list(rows()))
def test_parameters_and_state_agree_for_every_argument(name, kwargs, noise):
    ours, theirs, _ = PAIRS[name]
    assert_same_run(ours, theirs, (kwargs, kwargs), noise)


@pytest.mark.parametrize("noise", INERT)
@pytest.mark.parametrize("row", range(len(tensor_arguments())))
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_parameters_and_state_agree_for_tensor_arguments(name, row, noise):
    ours, theirs, _ = PAIRS[name]
    kwargs = tensor_arguments()[row], tensor_arguments()[row]
    optimizers = assert_same_run(ours, theirs, kwargs, noise)
    if "lr" in kwargs[0]:
        assert optimizers[0].param_groups[0]["lr"] is kwargs[0]["lr"]


@pytest.mark.parametrize("noise", INERT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_parameters_and_state_agree_in_other_precisions(name, dtype, noise):
    ours, theirs, kwargs = PAIRS[name]
    assert_same_run(ours, theirs, (kwargs, kwargs), noise, dtype)


@NEEDS_MUON
@pytest.mark.parametrize("noise", INERT)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lr": 1e-2, "weight_decay": 0.0, "momentum": 0.8, "nesterov": False},
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-5},
        {"adjust_lr_fn": "match_rms_adamw"},
    ],
    ids=str,
)
def test_muon_agrees_for_every_argument(kwargs, noise):
    from noiseopt.optim import NoiseAwareMuon

    kwargs = kwargs, kwargs
    assert_same_run(NoiseAwareMuon, torch.optim.Muon, kwargs, noise, bias=False)


@pytest.mark.parametrize("noise", INERT)
@pytest.mark.parametrize("name", TABLE)
def test_torchs_own_table_of_optimizer_inputs_agrees(name, noise):
    """Every optimizer of torch through `noise_aware`, with the inputs torch tests itself by."""
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = [info for info in optim_db if info.optim_cls.__name__ == name]
    ours = noise_aware(info.optim_cls)
    inputs = info.optim_inputs_func(device="cpu"), info.optim_inputs_func(device="cpu")
    assert inputs[0]
    for pair in zip(*inputs, strict=True):
        kwargs = tuple(one.kwargs for one in pair)
        assert_same_run(ours, info.optim_cls, kwargs, noise, bias=name != "Muon", steps=5)


@pytest.mark.parametrize("noise", INERT)
def test_sparse_adam_agrees(noise):
    models = [torch.nn.Embedding(10, 4, sparse=True) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = noise_aware(torch.optim.SparseAdam)(list(models[0].parameters()), noise=noise)
    theirs = torch.optim.SparseAdam(list(models[1].parameters()))
    for seed in range(6):
        rows = torch.randint(10, (5,), generator=torch.Generator().manual_seed(seed))
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model(rows).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_bits(*map(params_of, models))


def test_off_takes_capturable_as_torch_does():
    """On the CPU torch refuses it in step(); the message comes through."""
    errors = []
    for make in (torch.optim.AdamW, lambda p, **kw: NoiseAwareAdamW(p, noise="off", **kw)):
        model = build()
        optimizer = make(model.parameters(), capturable=True)
        with pytest.raises(AssertionError) as error:
            train(model, optimizer, draw(1))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_off_differentiates_through_the_step_as_torch_does():
    def derivative(make):
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        param = weight.clone()
        optimizer = make([param], lr=rate, differentiable=True)
        param.grad = torch.arange(3.0, dtype=torch.float64)
        optimizer.step()
        param.square().sum().backward()
        return rate.grad

    ours = derivative(lambda params, **kw: NoiseAwareAdamW(params, noise="off", **kw))
    assert torch.equal(ours, derivative(torch.optim.AdamW))
    assert ours != 0


@pytest.mark.parametrize("noise", INERT)
@pytest.mark.parametrize("name", PAIRS)
def test_a_state_goes_to_torch_and_back_in_mid_run(name, noise):
    """Torch for 5 updates, ours for 5, torch for 5: bitwise torch for 15."""
    ours, theirs, kwargs = PAIRS[name]
    batches = draw(15, dtype=torch.float32)
    model, straight = build(torch.float32), build(torch.float32)
    train(straight, theirs(straight.parameters(), **kwargs), batches)
    state = None
    for part, make in enumerate([theirs, lambda p, **kw: ours(p, noise=noise, **kw), theirs]):
        optimizer = make(model.parameters(), **kwargs)
        if state is not None:
            optimizer.load_state_dict(state)
        train(model, optimizer, batches[5 * part : 5 * part + 5])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    assert same_bits(params_of(model), params_of(straight))


@pytest.mark.parametrize(
    "cls",
    [
        NoiseAwareAdamW,
        NoiseAwareAdam,
        NoiseAwareSGD,
        noise_aware(torch.optim.RMSprop),
        noise_aware(torch.optim.Adafactor),
    ],
)
def test_torchs_parameters_are_an_exact_prefix_and_ours_are_keyword_only(cls):
    torch_class = next(c for c in cls.__mro__ if c.__module__.startswith("torch.optim"))
    theirs = list(inspect.signature(torch_class).parameters.values())
    own = list(inspect.signature(cls).parameters.values())
    assert own[: len(theirs)] == theirs
    assert [p.name for p in own[len(theirs) :]] == ["noise", "process_group"]
    assert {p.kind for p in own[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_torchs_positional_arguments_keep_their_places():
    optimizer = NoiseAwareAdamW(build().parameters(), 0.5, (0.8, 0.9), 1e-3, 0.2, True)
    group = optimizer.param_groups[0]
    expected = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True}
    assert {key: group[key] for key in expected} == expected


def test_ours_is_an_instance_of_torchs_class():
    model = build()
    assert isinstance(NoiseAwareAdamW(model.parameters()), torch.optim.AdamW)
    assert isinstance(NoiseAwareSGD(model.parameters()), torch.optim.SGD)
    assert isinstance(noise_aware(torch.optim.Rprop)(model.parameters()), torch.optim.Rprop)


@pytest.mark.parametrize("noise", INERT)
def test_the_closure_is_called_once_and_its_loss_returned(noise):
    model, (batch,) = build(), draw(1)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=noise)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (model(batch[0]) - batch[1]).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


@pytest.mark.parametrize("returned", [None, 1.5, (torch.ones(()), "more"), torch.ones(3)])
@pytest.mark.parametrize("noise", INERT)
def test_a_closure_may_return_anything_as_in_torch(noise, returned):
    model, (batch,) = build(), draw(1)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=noise)

    def closure():
        (model(batch[0]) - batch[1]).square().mean().backward()
        return returned

    assert optimizer.step(closure) is returned
