"""Hooks that read gradients come behind those that others add, whenever these do."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from noiseopt import NoiseAwareSGD, NoiseConfig, NoiseMonitor
from noiseopt.capture import LocalNorms
from noiseopt.capture.hooks import _is_torchs, _standing


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


def test_where_others_come_after_a_window_has_opened_nothing_is_known(param):
    local = LocalNorms([[param]])
    param.register_hook(lambda grad: grad * 3)
    param.sum().backward()
    assert local.take([[param]], 1).isnan().all()
    local.open_window()
    param.sum().backward()
    assert local.take([[param]], 1).tolist() == [[36.0]]


def trained(param, adds_hook, windows=6):
    """A loop of its own windows, of two passes each; what was measured of them, and their norms."""
    config = NoiseConfig(mode="advise", accumulation="external", accumulation_steps=2)
    config = replace(config, decision_interval=1, samples_per_micro_batch=1)
    optimizer = NoiseAwareSGD([param], lr=0.0, noise=config)
    for window in range(windows):
        for _ in range(2):
            handle = param.register_hook(lambda grad: grad * 3) if adds_hook(window) else None
            (param.sum() / 2).backward()
            if handle and adds_hook(window + 1):
                handle.remove()
        optimizer.step()
        optimizer.zero_grad()
    return [decision.windows[0].norms.small_sq for decision in optimizer.decisions]


def test_hooks_that_are_added_for_each_backward_are_told(param, caplog):
    assert trained(param, adds_hook=lambda window: True) == [()] * 6
    assert caplog.text.count("were added before a backward") == 1


def test_hooks_that_were_added_in_few_windows_are_not(param, caplog):
    trained(param, adds_hook=lambda window: True, windows=2)
    assert "were added before" not in caplog.text


def test_hooks_that_were_taken_down_by_hand_are_put_up_again(param):
    local = LocalNorms([[param]])
    param._backward_hooks.clear()
    local.open_window()
    param.sum().backward()
    assert local.take([[param]], 1).tolist() == [[4.0]]


def test_a_hook_that_was_taken_down_beside_another_is_put_up_again(param):
    local = LocalNorms([[param]])
    param._backward_hooks.clear()
    param.register_hook(lambda grad: 2 * grad)
    local.open_window()
    param.sum().backward()
    assert local.take([[param]], 1).tolist() == [[16.0]]


def test_a_pass_that_was_thrown_away_leaves_its_window_measured(param, caplog):
    optimizer = torch.optim.SGD([param], lr=0.1)
    monitor = NoiseMonitor(optimizer, NoiseConfig(mode="advise", decision_interval=1))
    for _ in range(4):
        hook = param.register_hook(lambda grad: grad)
        param.sum().backward()
        hook.remove()
        optimizer.zero_grad()
        (2 * param.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    windows = [window for decision in monitor.decisions for window in decision.windows]
    assert [window.norms.small_sq for window in windows] == [(16.0,)] * 4
    assert "were added before" not in caplog.text


def test_a_hook_of_torch_distributed_that_edits_is_one_of_the_loops(param):
    param.register_hook(torch.distributed.all_reduce)
    (hook,) = param._backward_hooks.values()
    assert not _is_torchs(hook)


def test_hooks_that_are_added_once_cost_a_window(param, caplog):
    found = trained(param, adds_hook=lambda window: window == 0)
    assert found[0] == ()
    assert all(found[1:])
    assert "were added before" not in caplog.text


def measuring(params, kind):
    if kind == "watched":
        optimizer = torch.optim.SGD(params, lr=0.1)
        NoiseMonitor(optimizer)
        return optimizer
    return NoiseAwareSGD(params, lr=0.1, noise=NoiseConfig(accumulation=kind))


@pytest.mark.parametrize("accumulation", ["internal", "external", "watched"])
def test_an_optimizer_that_is_dropped_leaves_its_parameters_to_be_freed(accumulation):
    gc.collect()
    before = len(_standing)
    model = torch.nn.Linear(3, 3)
    optimizer = measuring(model.parameters(), accumulation)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()  # takes the hooks down
    gc.collect()
    assert weight() is None
    assert len(_standing) == before


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("kind", ["external", "watched"])
def test_an_optimizer_may_be_freed_while_the_backward_of_another_runs(kind, at):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    params = list(model.parameters())
    freed = []

    def free(grad):
        if not freed:
            freed.append(gc.collect())

    gc.collect()
    gc.disable()  # what is dropped stays until the hook asks
    try:
        for hooked in (False, True):
            if hooked:
                params[at].register_hook(free)
            optimizer = measuring(params, kind)
            for _ in range(2):
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        gc.enable()
    assert freed[0] > 0
