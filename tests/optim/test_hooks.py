"""Hooks that read gradients come behind those that others add, whenever these do."""

import pytest
import torch

from noiseopt.capture import LocalNorms


@pytest.fixture
def param():
    return torch.nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("measured_before", [False, True])
def test_hooks_that_were_added_before_a_window_are_read_through_in_it(param, measured_before):
    measured = measured_before
    local = LocalNorms([[param]], lambda: measured)
    local.open_window()
    param.register_hook(lambda grad: grad * 3)
    measured = True
    local.open_window()
    param.sum().backward()
    assert local.take([[param]], 1).tolist() == [[36.0]]


def test_two_that_read_the_same_do_not_move_past_each_other(param):
    both = [LocalNorms([[param]]) for _ in range(2)]
    before = list(param._backward_hooks)
    for local in both * 2:
        local.open_window()
    assert list(param._backward_hooks) == before
    param.register_hook(lambda grad: grad * 3)
    for local in both * 2:
        local.open_window()
    param.sum().backward()
    assert [local.take([[param]], 1).item() for local in both] == [36.0, 36.0]


def test_what_is_detached_reads_nothing_and_is_not_put_up_again(param):
    local = LocalNorms([[param]])
    local.passes.detach()
    param.register_hook(lambda grad: grad * 3)
    local.open_window()
    param.sum().backward()
    assert len(local) == 0
