"""Ways in which a drop-in optimizer breaks inside torch and the frameworks around it.

One test or more for each row of a list that was gathered from torch, its checkpointing and its
users; rows that take several processes or an accelerator are tested elsewhere.
"""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import AveragedModel

from noiseopt import NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD, noise_aware
from tests.optim.helpers import (
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
    state_tensors,
    train,
    unchanged,
)

MODES = ["off", advise(1), advise(3), fixed(3)]


def name_of(config):
    return config if isinstance(config, str) else f"{config.mode}-{config.accumulation_steps}"


def to_boundary(model, optimizer):
    """Train for 60 micro-batches, and to the end of the window."""
    train(model, optimizer, draw(60))
    while not optimizer.applied:
        train(model, optimizer, draw(1))


# ---------------------------------------------------------------------- hooks


def fresh_class():
    """An optimizer class of which no instance was ever built."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad, alpha=group["lr"])

    return Plain


@pytest.mark.parametrize("noise", MODES, ids=name_of)
@pytest.mark.parametrize("built_first", ["torch's", "ours", "torch's in between"])
def test_step_hooks_fire_once_a_call(built_first, noise):
    """Torch wraps the `step` of every class that is instantiated: ours must not add a second."""
    plain = fresh_class()
    ours = noise_aware(plain)
    model = build()
    if built_first == "torch's":
        plain(model.parameters())
    optimizer = ours(model.parameters(), noise=noise)
    if built_first == "torch's in between":
        plain(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before any")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after any")),
    ]
    train(model, optimizer, draw(3))
    for handle in handles:
        handle.remove()
    assert calls == ["before any", "before", "after", "after any"] * 3
    assert optimizer.applied


@pytest.mark.parametrize("noise", MODES, ids=name_of)
def test_hooks_on_adamw_fire_once_a_call_after_an_adamw_was_built(noise):
    model = build()
    torch.optim.AdamW(model.parameters())
    optimizer = NoiseAwareAdamW(model.parameters(), noise=noise)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(None))
    train(model, optimizer, draw(6))
    assert len(calls) == 6


def test_applied_tells_a_moving_average_when_to_update():
    """What runs after every call counts micro-batches; what asks `applied` counts updates."""
    model, reference = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(3))
    average = AveragedModel(model)
    for batch in draw(12):
        train(model, optimizer, [batch])
        if optimizer.applied:
            average.update_parameters(model)
    plain, expected = torch.optim.AdamW(reference.parameters()), AveragedModel(reference)
    for at in range(0, 12, 3):
        batch = tuple(torch.cat(parts) for parts in zip(*draw(12)[at : at + 3], strict=True))
        train(reference, plain, [batch])
        expected.update_parameters(reference)
    assert average.n_averaged == 4 == optimizer.num_updates
    assert difference(average, expected) <= 1e-12


# ---------------------------------------------------------------------- GradScaler


def roundtrip(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


@pytest.mark.parametrize(
    "made", [lambda o: o, copy.deepcopy, roundtrip], ids=["new", "copied", "loaded"]
)
def test_a_scaler_unscales_before_a_fused_step(made):
    """Torch's fused optimizers offer to unscale by themselves: a window cannot let them."""
    model = build(torch.float32)
    optimizer = made(NoiseAwareAdamW(model.parameters(), fused=True, noise=advise(2)))
    assert not optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    params = optimizer.param_groups[0]["params"]
    for param in params:
        param.grad = torch.full_like(param, 2.0**10)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert all(torch.equal(param.grad, torch.ones_like(param)) for param in params)


def test_off_leaves_scaling_to_the_fused_kernel_as_torch_does():
    assert NoiseAwareAdamW(build().parameters(), fused=True, noise="off")._step_supports_amp_scaling


# ---------------------------------------------------------------------- where the state lives


def test_the_state_is_plain_numbers_under_one_key_of_each_group():
    model = build()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = NoiseAwareAdamW(groups, noise=growing())
    to_boundary(model, optimizer)
    state = optimizer.state_dict()
    plain = torch.optim.AdamW(build().parameters()).state_dict()
    assert state.keys() == plain.keys()
    assert all(isinstance(key, int) for key in state["state"])
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    for group in state["param_groups"]:
        assert set(group) == {*plain["param_groups"][0], "noise"}
        assert {type(value) for value in group["noise"].values()} <= {int, float, bool}
    one, other = (group["noise"] for group in state["param_groups"])
    assert one == other
    assert one is not other


def test_the_state_loads_with_weights_only():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing())
    to_boundary(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]


# ---------------------------------------------------------------------- distributed checkpoints


@pytest.mark.parametrize("config", [advise(1), advise(4), fixed(4)], ids=name_of)
@pytest.mark.parametrize("make", [NoiseAwareAdamW, NoiseAwareAdam])
def test_the_zero_step_of_checkpointing_builds_the_state_and_is_not_counted(make, config):
    """DCP calls step() once with zero gradients and lr=0 on an optimizer without state."""
    batches = draw(8)
    model, reference = build(), build()
    optimizer = make(model.parameters(), lr=1e-2, noise=config)
    plain = make.__bases__[1](reference.parameters(), lr=1e-2)
    with unchanged(model):
        state = get_optimizer_state_dict(model, optimizer)
    get_optimizer_state_dict(reference, plain)
    assert len(optimizer.state) == len(state["state"]) == 4
    assert optimizer.num_updates == 0
    assert optimizer.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, batches)
    train(reference, plain, joined(batches, config.accumulation_steps))
    assert difference(model, reference) <= 1e-12
    assert optimizer.num_updates == 8 // config.accumulation_steps
    assert optimizer.state_dict()["param_groups"][0]["noise"]["micro_batches"] == 8


@pytest.mark.filterwarnings("ignore:the state was taken inside a window")
@pytest.mark.parametrize("make", [NoiseAwareSGD, NoiseAwareAdamW])
def test_inside_a_window_it_leaves_the_window_as_it_is(make):
    """SGD has no state without momentum, so DCP calls step() for every checkpoint."""
    batches = draw(8)
    model, reference = build(), build()
    optimizer = make(model.parameters(), lr=1e-2, noise=fixed(4))
    plain = make.__bases__[1](reference.parameters(), lr=1e-2)
    get_optimizer_state_dict(reference, plain)
    for batch in batches:
        with unchanged(model):
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, [batch])
    train(reference, plain, joined(batches, 4))
    assert difference(model, reference) <= 1e-12
    assert optimizer.num_updates == 2


def test_a_micro_batch_of_zeros_at_a_rate_of_zero_is_one_of_its_window():
    """A schedule that starts at 0, and labels of which a micro-batch has none."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.0, noise=fixed(3))
    for index, batch in enumerate(draw(3)):
        (loss_of(model, batch) * (index != 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.applied
    assert optimizer.num_updates == 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_warm_up_that_starts_at_zero_is_counted(sparse, tensor_lr):
    """lr=0 with a gradient that is not zero is a micro-batch like any other."""
    torch.manual_seed(0)
    model = nn.Embedding(5, 3, sparse=sparse)
    lr = torch.tensor(0.0) if tensor_lr else 0.0
    optimizer = NoiseAwareSGD(model.parameters(), lr=lr, noise=advise(2))
    with unchanged(model):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
    assert optimizer.num_updates == 2


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.6 itself reads one
@pytest.mark.filterwarnings("ignore:torch.distributed is .*assuming the intent is to")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("files", [False, True], ids=["in memory", "in files"])
def test_distributed_checkpoints_resume_bitwise(flat, files, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    batches = draw(80)

    def groups(model):
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]

    model = build()
    optimizer = NoiseAwareAdamW(groups(model), noise=growing(max_norm=1.0))
    to_boundary(model, optimizer)
    other = build()
    other.load_state_dict(model.state_dict())
    resumed = NoiseAwareAdamW(groups(other), noise=growing(max_norm=1.0))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if files:
        dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
        found = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
        dcp.load(found, checkpoint_id=tmp_path)
        state = found["optimizer"]
    set_optimizer_state_dict(other, resumed, state, options=options)
    numbers = [o.state_dict()["param_groups"][0]["noise"] for o in (optimizer, resumed)]
    assert numbers[0] == numbers[1]
    train(model, optimizer, batches[40:])
    train(other, resumed, batches[40:])
    assert same_bits(params_of(model), params_of(other))
    assert optimizer.accumulation_steps == resumed.accumulation_steps > 1


# ---------------------------------------------------------------------- graphs and compilers


def test_differentiable_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"differentiable=True.*noise='off'"):
        NoiseAwareAdamW(build().parameters(), differentiable=True)


@pytest.mark.parametrize("config", [advise(3), fixed(3, max_norm=0.5)], ids=name_of)
def test_a_compiled_model_trains_as_the_plain_one(config):
    batches = draw(12)
    model, plain = build(), build()
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, NoiseAwareAdamW(model.parameters(), noise=config), batches)
    train(plain, NoiseAwareAdamW(plain.parameters(), noise=config), batches)
    assert difference(model, plain) <= 1e-12


@pytest.mark.parametrize("config", ["off", advise(3), fixed(3, max_norm=0.5)], ids=name_of)
def test_a_compiled_step_does_what_the_plain_one_does(config):
    batches = draw(12)
    model, plain = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    step = torch.compile(optimizer.step, backend="eager")
    for batch in batches:
        loss_of(model, batch).backward()
        step()
        optimizer.zero_grad()
    train(plain, reference := NoiseAwareAdamW(plain.parameters(), noise=config), batches)
    assert difference(model, plain) <= 1e-12
    assert optimizer.num_updates == reference.num_updates
    torch.compiler.reset()


# ---------------------------------------------------------------------- wrappers and kinds


def test_readings_cannot_be_written():
    """A wrapper that mixes its class with ours would otherwise shadow them without a word."""
    optimizer = NoiseAwareAdamW(build().parameters())
    for name in ("accumulation_steps", "applied", "num_updates", "noise", "decision", "decisions"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 3)


def test_parameters_are_looked_up_in_the_groups_at_every_step():
    """Wrappers put other tensors into `param_groups` after the optimizer was built."""
    model, other = build(), build(seed=7)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(3))
    optimizer.param_groups[0]["params"] = list(other.parameters())
    expected = build(seed=7)
    with unchanged(model):
        train(other, optimizer, draw(6))
    train(expected, NoiseAwareAdamW(expected.parameters(), noise=advise(3)), draw(6))
    assert same_bits(params_of(other), params_of(expected))


@pytest.mark.parametrize("steps", [1, 3])
def test_adam_keeps_its_own_words_on_sparse_gradients(steps):
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(steps))
    plain = torch.optim.AdamW(model.parameters())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as expected:
        plain.step()
    for _ in range(steps - 1):
        optimizer.step()
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as error:
        optimizer.step()
    assert str(error.value) == str(expected.value)


def test_a_subclass_of_ours_may_take_its_own_arguments():
    class Mine(NoiseAwareAdamW):
        def __init__(self, params, power, **kwargs):
            super().__init__(params, lr=10.0**-power, **kwargs)
            self.power = power

    model, plain = build(), build()
    train(model, Mine(model.parameters(), 2, noise=advise(2)), draw(6))
    train(plain, NoiseAwareAdamW(plain.parameters(), lr=0.01, noise=advise(2)), draw(6))
    assert same_bits(params_of(model), params_of(plain))


def test_nothing_is_applied_that_flush_was_not_asked_for():
    """A partial window at the end of the data stays open, through evaluation and zero_grad."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(4))
    train(model, optimizer, draw(4))
    with unchanged(model):
        train(model, optimizer, draw(3))
        optimizer.zero_grad()
        model.eval()
        model(draw(1)[0][0])
        model.train()
    state = [tensor.clone() for tensor in state_tensors(optimizer)]
    assert optimizer.flush()
    assert not same_bits(state, state_tensors(optimizer))


# pyproject.toml allows torch >= 2.6, whose own AdamW puts its count of steps on the default device.
UNFUSED = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 fails in its own AdamW, unless that is fused"
)


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=UNFUSED)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_default_device_that_is_not_the_parameters_own_is_left_alone(steps, fused):
    """As under `torch.set_default_device("cuda")` with a model on the CPU."""

    def run(device):
        model = build()
        config = advise(steps, decision_interval=2, max_norm=0.1)
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, fused=fused, noise=config)
        batches = draw(24)
        with torch.device(device):
            for batch in batches:
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.report_loss(loss.item())
                optimizer.step()
                optimizer.zero_grad()
        return model, optimizer

    (model, optimizer), (other, expected) = run("meta"), run("cpu")
    assert difference(model, other) == 0
    assert optimizer.decision == expected.decision


def test_looking_at_the_state_of_an_idle_parameter_breaks_nothing():
    """`optimizer.state` makes an empty one of it; torch passes that over."""
    model, idle = build(), nn.Linear(2, 2)
    params = [*model.parameters(), *idle.parameters()]
    optimizer = NoiseAwareAdamW(params)
    train(model, optimizer, draw(2))
    assert optimizer.state[idle.weight] == {}
    resumed = copy.deepcopy(optimizer)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.num_updates == 2


@pytest.mark.parametrize("kinds", ["sd", "ds", "sds", "dsd", "ddss"])
def test_a_gradient_may_be_sparse_in_one_micro_batch_and_dense_in_another(kinds):
    def gradient(param, kind, index):
        rows = torch.tensor([index % 3, 1])
        (nn.functional.embedding(rows, param, sparse=kind == "s").square().sum()).backward()

    ours, plain = (nn.Parameter(torch.arange(6.0).reshape(3, 2)) for _ in range(2))
    optimizer = NoiseAwareSGD([ours], lr=0.1, noise=fixed(len(kinds)))
    reference = torch.optim.SGD([plain], lr=0.1)
    for _ in range(2):
        for index, kind in enumerate(kinds):
            gradient(ours, kind, index)
            optimizer.step()
            optimizer.zero_grad()
            gradient(plain, "d", index)
        plain.grad /= len(kinds)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(ours, plain)
