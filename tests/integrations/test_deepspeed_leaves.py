"""The hooks on an engine's parameters read what is measured, and see what is stray."""

import pytest
import torch

pytest.importorskip("deepspeed")

from noiseopt.integrations.deepspeed.leaves import LeafNorms


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)


@pytest.fixture
def leaves(model):
    return LeafNorms([list(model.parameters())], torch.device("cpu"))


def window(model, leaves, measured):
    leaves.listen(measured)
    loss = model(torch.ones(2, 4)).sum()
    with leaves.reading(loss, measured):
        loss.backward()
    norms = leaves.norms[-1]
    leaves.clear()
    return norms


def test_only_what_is_measured_is_read(model, leaves):
    assert window(model, leaves, measured=False).isnan().all()
    expected = sum(p.grad.square().sum() for p in model.parameters())
    model.zero_grad()
    torch.testing.assert_close(window(model, leaves, measured=True)[0], expected.double())


def test_a_hook_that_came_later_is_read_from_the_first_window_on(model, leaves):
    for param in model.parameters():
        param.register_hook(lambda grad: grad * 3)
    norm = window(model, leaves, measured=True)
    torch.testing.assert_close(
        norm[0], sum(p.grad.square().sum() for p in model.parameters()).double()
    )


def test_what_is_frozen_later_may_stay_so_and_come_back(model, leaves):
    model.bias.requires_grad_(False)
    for measured in (False, True):
        norm = window(model, leaves, measured)
    torch.testing.assert_close(norm[0], torch.tensor(16.0, dtype=torch.float64))
    model.bias.requires_grad_(True)
    norm = window(model, leaves, measured=True)
    torch.testing.assert_close(norm[0], torch.tensor(20.0, dtype=torch.float64))


@pytest.mark.parametrize("before", [False, True])
def test_a_stray_backward_at_the_start_of_a_measured_window_is_seen(model, leaves, before):
    window(model, leaves, measured=before)
    leaves.listen(True)
    model(torch.ones(2, 4)).sum().backward()
    assert leaves.strays


def test_a_stray_backward_in_a_window_that_is_not_measured_is_let_pass(model, leaves):
    leaves.listen(False)
    model(torch.ones(2, 4)).sum().backward()
    assert not leaves.strays


def test_detached_hooks_stay_away(model, leaves):
    leaves.detach()
    for measured in (False, True):
        leaves.listen(measured)
        model(torch.ones(2, 4)).sum().backward()
    assert not leaves.strays
