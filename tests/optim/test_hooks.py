"""Hooks that read gradients come behind those that others add, whenever these do."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from noiseopt import NoiseAwareSGD, NoiseConfig, NoiseMonitor
from noiseopt.capture import LocalNorms
from noiseopt.capture.hooks import _is_known, _standing


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
    assert not _is_known(hook)


EDITS = {
    "in place": lambda param: param.grad.mul_(0.5),
    "by data": lambda param: param.grad.data.mul_(0.5),
    "anew": lambda param: setattr(param, "grad", param.grad * 0.5),
    "away": lambda param: setattr(param, "grad", None),
    "a little": lambda param: param.grad[0].mul_(0.999),
    "of sign": lambda param: param.grad.neg_(),
    "to what is finite": lambda param: param.grad.nan_to_num_(),
}
LOOKS = {
    "at the norm": lambda param: param.grad.norm(),
    "at nothing": lambda param: None,
    "to another place": lambda param: setattr(param, "grad", param.grad.clone()),
}


@pytest.mark.parametrize("added", ["before", "after"])
@pytest.mark.parametrize("change", [*EDITS, *LOOKS])
def test_what_a_hook_changes_after_accumulation_is_seen(param, change, added):
    def put():
        param.register_post_accumulate_grad_hook(lambda param: calls.append(change(param)))

    finite = change != "to what is finite"
    is_edit, change, calls = change in EDITS, (EDITS | LOOKS)[change], []
    if added == "before":
        put()
    local = LocalNorms([[param]])
    if added == "after":
        put()
    for scale in (1.0, 2.0):
        param.grad = None
        loss = scale * param.sum() if finite else (param * torch.nan).sum()
        local.open_window()
        loss.backward()
        assert local.passes.is_edited == is_edit
        (norms,) = local.passes.norms
        assert norms.isnan() if is_edit else norms == 4 * scale**2
        local.clear()
    assert len(calls) == 2


@pytest.mark.parametrize("finite", [True, False])
def test_hooks_that_look_after_accumulation_leave_a_window_measured(param, finite):
    param.register_post_accumulate_grad_hook(lambda param: None)
    both = [LocalNorms([[param]]) for _ in range(2)]
    for _ in range(2):
        (param.sum() if finite else (param * torch.nan).sum()).backward()
    assert not any(local.passes.is_edited for local in both)
    norms = torch.cat([norm for local in both for norm in local.passes.norms])
    wanted = torch.full_like(norms, 4.0 if finite else torch.nan)
    torch.testing.assert_close(norms, wanted, equal_nan=True)


def test_hooks_of_others_run_in_their_order_and_can_be_taken_down(param):
    calls = []
    for name in "ab":
        param.register_post_accumulate_grad_hook(lambda param, name=name: calls.append(name))
    local = LocalNorms([[param]])
    third = param.register_post_accumulate_grad_hook(lambda param: calls.append("c"))
    for _ in range(2):
        param.sum().backward()
    third.remove()
    param.sum().backward()
    assert "".join(calls) == "abcabcab"
    local.passes.detach()
    assert len(param._post_accumulate_grad_hooks) == 2
    param._post_accumulate_grad_hooks.clear()
    param.sum().backward()


@pytest.mark.parametrize("accumulation", ["internal", "external", "watched"])
def test_hooks_that_edit_after_accumulation_are_told_where_norms_are_read(
    param, accumulation, caplog
):
    def clamp(param):
        param.grad.clamp_(-0.1, 0.1)

    param.register_post_accumulate_grad_hook(clamp)
    optimizer = measuring([param], accumulation)
    for _ in range(3):
        param.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count("change p.grad") == (accumulation != "internal")


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


@pytest.mark.parametrize("accumulation", ["internal", "external", "watched"])
def test_a_trainer_that_its_parameters_hold_is_freed_with_them(accumulation):
    """As one whose method is a hook on them."""

    class Trainer:
        def __init__(self):
            self.model = torch.nn.Linear(3, 3)
            self.optimizer = measuring(self.model.parameters(), accumulation)
            self.model.weight.register_hook(self.see)

        def see(self, gradient):
            pass

    gc.collect()
    before = len(_standing)
    trainer = Trainer()
    for _ in range(2):
        trainer.model(torch.ones(2, 3)).sum().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    held = weakref.ref(trainer), weakref.ref(trainer.model.weight)
    del trainer
    gc.collect()
    assert [each() for each in held] == [None, None]
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
