"""Where the fused kernel is preferred, which is on a GPU: here the CPU is taken for one."""

import copy

import pytest
import torch
from torch import nn

from noiseopt import NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD, noise_aware
from tests.optim.helpers import build, difference, draw, fixed, params_of, same_bits, train


@pytest.fixture(autouse=True)
def cpu_for_gpu(monkeypatch):
    monkeypatch.setattr("noiseopt.optim.kernels.FUSED_ON", ("cpu",))


def fused_of(optimizer):
    (fused,) = {group.get("fused") for group in optimizer.param_groups}
    return fused


@pytest.mark.parametrize("ours", [NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD])
def test_it_is_preferred_where_the_user_chose_none(ours):
    params = list(build().parameters())
    assert fused_of(ours(params, lr=0.1)) is True
    assert fused_of(ours(params, lr=0.1, noise="advise")) is None
    assert fused_of(ours(params, lr=0.1, noise="off")) is None
    assert fused_of(ours(params, lr=0.1, fused=False)) is False
    assert fused_of(ours(params, lr=0.1, foreach=True)) is None


def test_not_of_an_optimizer_whose_state_is_elsewhere():
    """Adagrad makes its state, with step counts on the CPU, when it is built."""
    optimizer = noise_aware(torch.optim.Adagrad)(build().parameters(), lr=0.1)
    assert fused_of(optimizer) is None


def test_not_over_a_state_that_is_there():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1, foreach=False)
    train(model, optimizer, draw(4))
    optimizer.param_groups[0]["foreach"] = None
    assert fused_of(copy.deepcopy(optimizer)) is None


def test_sparse_gradients_leave_it():
    def trained(**kwargs):
        torch.manual_seed(0)
        model = nn.Embedding(6, 3, sparse=True)
        optimizer = NoiseAwareSGD(model.parameters(), lr=0.1, noise=fixed(2), **kwargs)
        for index in range(8):
            model(torch.tensor([index % 6, 2])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return params_of(model), fused_of(optimizer)

    (chosen, fused), (plain, _) = trained(), trained(foreach=False)
    assert fused is None
    assert same_bits(chosen, plain)


@pytest.mark.parametrize("ours", [NoiseAwareAdamW, NoiseAwareSGD])
def test_a_plain_state_does_not_end_it(ours):
    theirs = {NoiseAwareAdamW: torch.optim.AdamW, NoiseAwareSGD: torch.optim.SGD}[ours]
    model = build()
    plain = theirs(model.parameters(), lr=0.1)
    train(model, plain, draw(4))
    optimizer = ours(model.parameters(), lr=0.1)
    state = plain.state_dict()
    optimizer.load_state_dict(state)
    assert fused_of(optimizer) is True
    assert state["param_groups"][0]["fused"] is None
    off = ours(model.parameters(), lr=0.1, noise="off")
    off.load_state_dict(state)
    assert fused_of(off) is None


def test_a_state_that_chose_another_kernel_is_followed():
    model = build()
    chosen = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1)
    optimizer.load_state_dict(chosen.state_dict())
    assert (fused_of(optimizer), optimizer.param_groups[0]["foreach"]) == (None, True)


def test_sparse_gradients_that_come_later_leave_it():
    def trained(**kwargs):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        start = nn.Parameter(torch.ones(3))
        optimizer = NoiseAwareSGD([*table.parameters(), start], lr=0.1, noise=fixed(2), **kwargs)
        for index in range(8):
            out = start + (table(torch.tensor(index % 6)) if index >= 4 else 0.0)
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [start.detach(), table.weight.detach()], fused_of(optimizer)

    (chosen, fused), (plain, _) = trained(), trained(foreach=False)
    assert fused is None
    assert same_bits(chosen, plain)


@pytest.mark.parametrize("copied", [False, True])
def test_momentum_that_begins_later_leaves_it(copied):
    """A branch that is thawed or first used in mid-run; torch's fused kernel fails there."""

    def trained(ours, **kwargs):
        model = build()
        late = model[2].bias.requires_grad_(False)
        optimizer = ours(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, **kwargs)
        train(model, optimizer, draw(3))
        if copied:
            model, optimizer = copy.deepcopy((model, optimizer))
            late = model[2].bias
        late.requires_grad_(True)
        train(model, optimizer, draw(3, seed=2))
        return model, optimizer

    model, optimizer = trained(NoiseAwareSGD, noise=fixed())
    plain, _ = trained(torch.optim.SGD, foreach=False)
    assert fused_of(optimizer) is None
    assert difference(model, plain) < 1e-12


def test_a_new_group_is_looked_at_on_its_own():
    ours = NoiseAwareAdamW(build().parameters(), lr=0.1, noise=fixed())
    ours.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    ours.add_param_group({"params": [waves]})
    assert [group["fused"] for group in ours.param_groups] == [True, True, None]
    waves.abs().sum().backward()
    ours.step()
    assert ours.applied
