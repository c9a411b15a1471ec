"""A monitor and its schedulers on a plain torch optimizer, held against the drop-in optimizers."""

import copy

import pytest
import torch
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR

from noiseopt import NoiseAwareAdamW
from noiseopt.control import NoiseConfig
from noiseopt.monitor import NoiseMonitor
from noiseopt.optim.hyper import UPDATES
from noiseopt.schedulers import AccumulationScheduler, ClipScheduler, NoiseAwareLR
from tests.optim.helpers import advise, build, difference, draw, fixed, growing, loss_of, train

LR = 1e-2


def attach(model, config, optimizer=None):
    """A monitored AdamW with everything that carries decisions out."""
    optimizer = optimizer or AdamW(model.parameters(), lr=LR)
    monitor = NoiseMonitor(optimizer, config)
    return optimizer, monitor, NoiseAwareLR(monitor), ClipScheduler(monitor)


def run(model, optimizer, monitor, batches, schedule=None, clip=None):
    for window in AccumulationScheduler(monitor).windows(batches):
        for batch in window:
            (loss_of(model, batch) / len(window)).backward()
        if clip is not None:
            clip.clip_()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def test_it_decides_and_trains_as_the_drop_in_optimizer_does_on_the_same_data():
    ours, plain, batches = build(), build(), draw(120)
    internal = NoiseAwareAdamW(ours.parameters(), lr=LR, noise=growing())
    train(ours, internal, batches)
    internal.flush()
    optimizer, monitor, schedule, clip = attach(plain, growing())
    run(plain, optimizer, monitor, batches, schedule, clip)
    assert monitor.accumulation_steps == 4
    assert [d.action for d in monitor.decisions] == [d.action for d in internal.decisions]
    assert [d.batch for d in monitor.decisions] == [d.batch for d in internal.decisions]
    assert monitor.noise.scale == pytest.approx(internal.noise.scale, rel=1e-6)
    assert difference(ours, plain) < 1e-6


def test_a_run_that_is_monitored_late_corrects_adam_as_one_that_loaded_the_same_state():
    plain, batches = build(), draw(400, seed=3)
    optimizer = AdamW(plain.parameters(), lr=LR)
    train(plain, optimizer, draw(500))
    ours = copy.deepcopy(plain)
    config = growing(measure_interval=1)  # a monitor reads in the backward, where it costs
    internal = NoiseAwareAdamW(ours.parameters(), lr=LR, noise=config)
    internal.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(ours, internal, batches)
    internal.flush()
    _, monitor, schedule, clip = attach(plain, config, optimizer)
    run(plain, optimizer, monitor, batches, schedule, clip)
    assert monitor.num_updates == internal.num_updates
    assert difference(ours, plain) < 1e-6


def test_advice_changes_nothing():
    ours, plain, batches = build(), build(), draw(30)
    optimizer, monitor, schedule, clip = attach(ours, advise())
    run(ours, optimizer, monitor, batches, schedule, clip)
    train(plain, AdamW(plain.parameters(), lr=LR), batches)
    assert difference(ours, plain) == 0
    assert monitor.decisions


def test_the_schedule_is_advanced_once_for_each_micro_batch():
    model = build()
    optimizer = SGD(model.parameters(), lr=1.0)
    monitor = NoiseMonitor(optimizer, fixed(4))
    inner = StepLR(optimizer, step_size=1, gamma=0.5)
    schedule = NoiseAwareLR(monitor, inner)
    run(model, optimizer, monitor, draw(12), schedule)
    assert (monitor.num_updates, monitor.micro_batches, inner.last_epoch) == (3, 12, 12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**12)


def test_windows_hold_every_batch_once_and_the_last_may_be_shorter():
    monitor = NoiseMonitor(SGD(build().parameters(), lr=0.1), fixed(4))
    windows = list(AccumulationScheduler(monitor).windows(range(10)))
    assert windows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def raise_in_a_grown_window(model):
    """A step whose rates are scaled, and that raises, as it may for want of memory."""

    def fail(optimizer, args, kwargs):
        raise MemoryError

    optimizer = AdamW(model.parameters(), lr=LR)
    monitor = NoiseMonitor(optimizer, growing())
    schedule = NoiseAwareLR(monitor, LambdaLR(optimizer, lambda _: 1.0))
    run(model, optimizer, monitor, draw(120), schedule)
    assert monitor.rates.lr > 1
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    assert optimizer.param_groups[0]["lr"] > LR
    return optimizer, monitor, schedule


def test_a_state_that_is_saved_after_a_step_raised_holds_the_users_rates():
    optimizer, _, _ = raise_in_a_grown_window(build())
    saved = optimizer.state_dict()["param_groups"][0]
    assert (saved["lr"], saved["betas"], saved["weight_decay"]) == (LR, (0.9, 0.999), 1e-2)


def test_a_schedule_that_goes_on_after_a_step_raised_finds_the_users_rates():
    model = build()
    optimizer, monitor, schedule = raise_in_a_grown_window(model)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == LR
    assert schedule.get_last_lr() == [LR * monitor.rates.lr]


def test_the_gradient_is_clipped_at_the_decided_norm_and_counted():
    model = build()
    optimizer = SGD(model.parameters(), lr=0.0)
    monitor = NoiseMonitor(optimizer, fixed(max_norm=1e-3, decision_interval=1))
    clip = ClipScheduler(monitor)
    loss_of(model, draw(1)[0]).backward()
    before = clip.clip_()
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimizer.step()
    assert before > 1e-3
    assert after == pytest.approx(clip.max_norm, rel=1e-3)
    assert monitor.decision.total_clipped == 1
    (window,) = monitor.decision.windows
    assert sum(window.norms.big_sq) == pytest.approx(float(before) ** 2)


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped():
    model, batches = build(), draw(120)
    optimizer, monitor, schedule, clip = attach(model, growing())
    run(model, optimizer, monitor, batches, schedule, clip)
    other = copy.deepcopy(model)
    resumed = attach(other, growing())
    resumed[0].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed[1].load_state_dict(monitor.state_dict())
    resumed[2].load_state_dict(schedule.state_dict())
    more = draw(80, seed=7)
    run(model, optimizer, monitor, more, schedule, clip)
    run(other, resumed[0], resumed[1], more, resumed[2], resumed[3])
    assert resumed[1].state_dict() == monitor.state_dict()
    assert difference(model, other) == 0


def test_a_window_whose_step_the_scaler_skips_is_forgotten_and_its_batches_still_scheduled():
    model = build(torch.float32)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    config = fixed(2, decision_interval=1)
    monitor = NoiseMonitor(optimizer, config, grad_scaler=scaler)
    inner = LambdaLR(optimizer, lambda _: 1.0)
    schedule = NoiseAwareLR(monitor, inner)
    batches = draw(4, dtype=torch.float32)
    batches[1] = (batches[1][0] * float("inf"), batches[1][1])
    squares = []
    for window in AccumulationScheduler(monitor).windows(batches):
        for batch in window:
            scaler.scale(loss_of(model, batch) / len(window)).backward()
        scaler.unscale_(optimizer)
        squares.append(sum(p.grad.square().sum().item() for p in model.parameters()))
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    assert monitor.num_updates == 1
    assert inner.last_epoch == 4
    (measured,) = monitor.decision.windows
    assert measured.norms.count == 2
    assert sum(measured.norms.big_sq) == pytest.approx(squares[1], rel=1e-5)


def test_what_cannot_work_is_refused_with_a_remedy():
    model = build()
    plain = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="is a Sequential: give the monitor the torch optimizer"):
        NoiseMonitor(build())
    with pytest.raises(TypeError, match="use its own readings"):
        NoiseMonitor(NoiseAwareAdamW(model.parameters()))
    with pytest.raises(ValueError, match="leave it out"):
        NoiseMonitor(plain, "off")
    with pytest.raises(ValueError, match="rate_rule is 'adagrad'"):
        NoiseMonitor(plain, rate_rule="adagrad")
    other = StepLR(SGD(build().parameters(), lr=0.1), step_size=1)
    with pytest.raises(ValueError, match="not the one that the monitor watches"):
        NoiseAwareLR(NoiseMonitor(plain, NoiseConfig()), other)


def test_detached_it_watches_and_scales_no_more():
    model = build()
    optimizer, monitor, schedule, _ = attach(model, fixed())
    monitor.detach()
    schedule.detach()
    train(model, optimizer, draw(3))
    assert monitor.num_updates == 0


def test_a_short_last_window_is_measured_and_rated_as_what_it_is():
    """Two of four announced: told so, the two are measured whole and get the rates of two."""
    plain = build()
    optimizer, monitor, _, clip = attach(plain, NoiseConfig(accumulation_steps=4, max_norm=1e-3))
    windows = list(AccumulationScheduler(monitor).windows(draw(2)))
    assert [len(window) for window in windows] == [2]
    assert monitor.accumulation_steps == 2
    grads = []
    for batch in windows[0]:
        loss_of(plain, batch).div(2).backward()
        grads.append(torch.cat([p.grad.flatten().clone() for p in plain.parameters()]))
    clip.clip_()
    optimizer.step()
    monitor.state_dict()
    (window,) = monitor._adaptation._windows
    assert window.norms.big_sq[0] == pytest.approx(grads[-1].square().sum().item(), rel=1e-5)
    assert window.clipped


def test_a_short_window_that_nobody_told_of_is_counted_and_not_learned_from():
    plain = build()
    optimizer, monitor, _, _ = attach(plain, NoiseConfig(accumulation_steps=4))
    for batch in draw(2):
        loss_of(plain, batch).backward()
    optimizer.step()
    numbers = monitor.state_dict()
    assert numbers["num_updates"] == 1
    assert numbers["estimator.windows"] == 0


def test_a_window_cannot_be_lengthened():
    _, monitor, _, _ = attach(build(), NoiseConfig(accumulation_steps=2))
    with pytest.raises(ValueError, match="of 2, of which 0 were taken: it cannot become 3"):
        monitor.shorten_window(3)


def test_checkpointing_may_build_the_state_of_a_monitored_optimizer():
    """Its step without a backward ends no window."""
    plain = build()
    optimizer, monitor, _, _ = attach(plain, growing())
    get_optimizer_state_dict(plain, optimizer)
    assert monitor.num_updates == 0
    assert optimizer.state


def test_without_a_threshold_an_infinite_gradient_stays_what_it_is():
    plain = build()
    _, _, _, clip = attach(plain, growing())
    loss_of(plain, draw(1)[0]).backward()
    parameter = next(plain.parameters())
    parameter.grad.view(-1)[0] = torch.inf
    assert clip.max_norm == torch.inf
    assert clip.clip_() == torch.inf
    assert not parameter.grad.isnan().any()


def test_a_checkpoint_loaded_after_the_schedule_was_built_counts():
    """The second moment's age is read at the first step, and the schedule says where it is."""
    trained, fresh = build(), build()
    old = AdamW(trained.parameters(), lr=LR)
    train(trained, old, draw(50))
    optimizer = AdamW(fresh.parameters(), lr=LR)
    monitor = NoiseMonitor(optimizer, growing())
    schedule = NoiseAwareLR(monitor, StepLR(optimizer, 100))
    optimizer.load_state_dict(old.state_dict())
    run(fresh, optimizer, monitor, draw(2), schedule)
    assert (
        schedule.state_dict()["second_moments"][0]["second_moment_updates"]
        == 50 + monitor.num_updates
    )
    assert schedule.last_epoch == schedule.scheduler.last_epoch
    assert schedule.base_lrs == [LR]


def test_a_second_scaling_of_one_optimizer_is_refused():
    """As where a notebook's cell is run again: each would put back what the other had scaled."""
    optimizer, monitor, schedule, _ = attach(build(), fixed(2))
    with pytest.raises(ValueError, match=r"has a NoiseAwareLR.*detach\(\)"):
        NoiseAwareLR(NoiseMonitor(optimizer))
    schedule.detach()
    NoiseAwareLR(monitor)


def test_a_step_that_the_fused_kernel_skips_for_a_grad_scaler_is_no_update():
    model = build(torch.float32)
    optimizer = AdamW(model.parameters(), lr=LR, fused=True)
    scaler = GradScaler("cpu", init_scale=2.0)
    monitor = NoiseMonitor(optimizer, fixed(1, decision_interval=3), grad_scaler=scaler)
    schedule = NoiseAwareLR(monitor)
    counted = []
    for index, batch in enumerate(draw(6, dtype=torch.float32)):
        (scaler.scale(loss_of(model, batch)) * (torch.inf if index == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update(2.0)
        optimizer.zero_grad()
        counted.append(schedule._numbers[0][UPDATES])
    assert counted == [1, 2, 2, 3, 4, 5]  # the third micro-batch brought a decision
    assert monitor.num_updates == 5 == next(iter(optimizer.state.values()))["step"]
    assert monitor.micro_batches == 6


def test_another_scheduler_cannot_run_ours_and_says_what_to_do():
    optimizer, _, ours, _ = attach(build(), fixed(2))
    theirs = StepLR(optimizer, 3)
    with pytest.raises(TypeError, match=r"give that one to NoiseAwareLR\(monitor, scheduler\)"):
        SequentialLR(optimizer, [ours, theirs], milestones=[4])


def test_a_load_inside_a_window_is_warned_of():
    model = build()
    _, monitor, _, _ = attach(model, fixed(3))
    state = monitor.state_dict()
    for batch in draw(2):
        loss_of(model, batch).backward()
    with pytest.warns(UserWarning, match="the 2 micro-batches that it has had are not measured"):
        monitor.load_state_dict(state)
