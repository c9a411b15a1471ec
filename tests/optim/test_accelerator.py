"""Where gradients are not on the CPU, numbers stay there, and only a decision waits for them.

The ways for an accelerator are held to those for the CPU, which other tests hold to torch.
"""

import pytest
import torch
from torch import nn

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseMonitor
from noiseopt.capture import LocalNorms
from noiseopt.capture.tally import _DeviceTally
from noiseopt.optim.hyper import MOMENTS, UPDATES
from noiseopt.schedulers import AccumulationScheduler, ClipScheduler, NoiseAwareLR
from tests.accelerator import CPU, DEVICE, Accelerator, OnDevice, to_device
from tests.optim.helpers import advise, build, draw, fixed, growing, loss_of

BATCHES = 80
READ = {"tolist"}  # what waiting for the numbers of all windows at once looks like
NOT_FINITE = (3, 8, 22, 41)  # in windows that have others


# ---------------------------------------------------------------------- what pretends


def on_device(*numbers):
    return OnDevice(torch.tensor(numbers))


WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "copied to the host": lambda x: torch.zeros(2).copy_(x),
    "made of a number": lambda x: torch.tensor(1.0, device=x.device),
    "to the device": lambda x: torch.ones(2).to(x.device),
    "compared": lambda x: torch.equal(x, x + 1),
    "where it is": lambda x: (x > 1).nonzero(),
    "selected": lambda x: torch.masked_select(x, x > 1),
    "indexed": lambda x: x[x > 1],
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_seen(name):
    with Accelerator() as accelerator:
        WAITING[name](on_device(1.0, 2.0))
    assert len(accelerator.waits) == 1


def test_what_goes_on_is_not():
    with Accelerator() as accelerator:
        x = on_device(1.0, 2.0)
        x.add_(x.new_full((), 3.0)).mul_(2)
        x[0] = 1.0
        x[1] = x.sum() + 0
        assert x.to("cpu", non_blocking=True).isnan().all()  # it has not come yet
        torch.full((2,), 1.0, device=x.device)
        torch._foreach_mul_([x], x[0] * 1)
        assert accelerator.waits == []
        assert (x.device, x.is_cpu) == (DEVICE, False)
        assert x.tolist() == [1.0, 11.0]


@pytest.mark.parametrize(
    "mixes",
    [lambda x: x + torch.ones(2), lambda x: x[0] * torch.ones(2)],
    ids=["vectors", "a number"],
)
def test_two_devices_do_not_mix(mixes):
    with Accelerator(), pytest.raises(AssertionError, match="two devices"):
        mixes(on_device(1.0, 2.0))


# ---------------------------------------------------------------------- optimizers


class Told:
    """What a run left: its weights, its decisions, and the waits of each micro-batch."""

    def __init__(self, model, decisions, micro_batches):
        held = (getattr(p.detach(), "held", p.detach()) for p in model.parameters())
        self.weights = torch.cat([param.flatten() for param in held])
        self.decisions = decisions
        self.micro_batches = micro_batches


def run(loop, accelerator=None, dtype=torch.float32, not_finite=NOT_FINITE):
    """Run a loop on the CPU, or on the accelerator; it yields after each micro-batch."""
    model, batches = build(dtype), draw(BATCHES, dtype=dtype)
    for at in not_finite:
        batches[at] = (batches[at][0] * torch.nan, batches[at][1])
    waits = []
    if accelerator is not None:
        model = to_device(model)
        batches = [tuple(OnDevice(part) for part in batch) for batch in batches]
        waits = accelerator.waits
    micro_batches, before = [], 0
    measured, steps = loop(model, batches)
    for step in steps:
        micro_batches.append((step, waits[before:]))
        before = len(waits)
    return Told(model, tuple(measured.decisions), micro_batches)


def both(loop, **kwargs):
    with Accelerator() as accelerator:
        there = run(loop, accelerator, **kwargs)
    return there, run(loop, **kwargs)


def assert_same(there, here, rel=1e-6, skips=True):
    torch.testing.assert_close(there.weights, here.weights, rtol=rel, atol=rel, equal_nan=False)
    assert len(there.decisions) == len(here.decisions) >= 3
    for one, other in zip(there.decisions, here.decisions, strict=True):
        assert one.reason == other.reason
        assert one.accumulation_steps == other.accumulation_steps
        assert one.num_updates == other.num_updates
        assert one.total_skipped == other.total_skipped
        assert one.max_norm == pytest.approx(other.max_norm, rel=1e-5)
    assert (there.decisions[-1].total_skipped > 0) == skips
    last, other = there.decisions[-1].noise, here.decisions[-1].noise
    assert last.signal == pytest.approx(other.signal, rel=1e-4)
    assert last.trace == pytest.approx(other.trace, rel=1e-4)
    assert len({decision.accumulation_steps for decision in there.decisions}) > 1


def optimizing(cls, config, tells_weights=False, tensor_lr=False, **kwargs):
    """The plain loop; of each micro-batch it tells whether a decision or an update came."""

    def loop(model, batches):
        lr = torch.full((), 1e-2, device=batches[0][0].device) if tensor_lr else 1e-2
        optimizer = cls(model.parameters(), lr=lr, noise=config, **kwargs)

        def steps():
            for index, batch in enumerate(batches):
                decided = len(optimizer.decisions)
                if tells_weights:
                    optimizer.set_samples(4, weight=1.0 + index % 3)
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.report_loss(loss)
                closes = len(optimizer._collector) + 1 >= optimizer.accumulation_steps
                optimizer.step()
                optimizer.zero_grad()
                yield len(optimizer.decisions) > decided, closes

        return optimizer, steps()

    return loop


CONFIG = growing(accumulation_steps=2)
LOOPS = {
    "AdamW": optimizing(NoiseAwareAdamW, CONFIG, fused=True),
    "AdamW, clipped": optimizing(
        NoiseAwareAdamW, growing(accumulation_steps=2, max_norm=0.3), fused=True
    ),
    "AdamW, weights": optimizing(NoiseAwareAdamW, CONFIG, tells_weights=True, fused=True),
    "SGD": optimizing(NoiseAwareSGD, CONFIG, fused=True, momentum=0.9),
}


@pytest.mark.parametrize("name", LOOPS)
def test_only_decisions_wait(name):
    there, here = both(LOOPS[name])
    assert_same(there, here)
    # Skipped, the first update of a fused SGD would leave its momentum unset: its norm is read.
    assert_only_decisions_wait(there, looked_at=2 if name == "SGD" else 0)


def assert_only_decisions_wait(there, looked_at=0):
    """But for a run's first windows, of which one may have looked for a mistake in the loop."""
    assert any(decided for (decided, _), _ in there.micro_batches)
    for (decided, _), waits in there.micro_batches[looked_at:]:
        assert set(waits) == (READ if decided else set())


def test_a_rate_on_the_device_is_read_for_decisions():
    loop = optimizing(NoiseAwareAdamW, CONFIG, tensor_lr=True, fused=True)
    there, here = both(loop)
    assert_same(there, here)
    first_window = 2  # torch reads it at the start, and we do before there is a state
    for (decided, _), waits in there.micro_batches[first_window:]:
        assert set(waits) == (READ | {"aten::_local_scalar_dense"} if decided else set())


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_first_update_may_be_skipped(name):
    there, here = both(LOOPS[name], not_finite=(0, 1, 5))
    assert there.weights.isfinite().all()
    torch.testing.assert_close(there.weights, here.weights, rtol=1e-2, atol=1e-3)
    assert there.decisions[-1].total_skipped == here.decisions[-1].total_skipped == 3


def test_narrow_types():
    there, here = both(LOOPS["AdamW"], dtype=torch.bfloat16)
    assert_same(there, here, rel=2e-2)
    assert_only_decisions_wait(there)


@pytest.mark.parametrize("foreach", [True, False])
def test_other_kernels_read_one_number_for_an_update(foreach):
    """They cannot skip by themselves: see README."""
    there, here = both(optimizing(NoiseAwareAdamW, CONFIG, foreach=foreach))
    assert_same(there, here)
    for (decided, closes), waits in there.micro_batches:
        assert waits.count("aten::_local_scalar_dense") == closes
        assert len(waits) == closes + decided


def test_advice_costs_other_kernels_nothing():
    config = advise(2, decision_interval=5)
    there, here = both(optimizing(NoiseAwareAdamW, config, foreach=True), not_finite=())
    torch.testing.assert_close(there.weights, here.weights, rtol=0, atol=0)
    assert_only_decisions_wait(there)


def test_windows_of_the_loops_own():
    there, here = both(accumulating(NoiseAwareAdamW, fused=True), not_finite=())
    assert_same(there, here, skips=False)
    assert_only_decisions_wait(there, looked_at=1)


def accumulating(cls, **kwargs):
    """A loop that accumulates in `p.grad`, and follows the windows."""

    def loop(model, batches):
        config = growing(accumulation_steps=2, accumulation="external")
        optimizer = cls(model.parameters(), lr=1e-2, noise=config, **kwargs)

        def steps():
            left = list(batches)
            while left:
                decided, window = len(optimizer.decisions), left[: optimizer.accumulation_steps]
                del left[: len(window)]
                if len(window) < optimizer.accumulation_steps:
                    optimizer.shorten_window(len(window))
                for batch in window:
                    (loss_of(model, batch) / len(window)).backward()
                optimizer.step()
                optimizer.zero_grad()
                yield len(optimizer.decisions) > decided, True

        return optimizer, steps()

    return loop


@pytest.mark.parametrize("hook", ["looks", "halves"])
def test_hooks_after_accumulation(hook):
    def call(param):
        if hook == "looks":
            param.grad.norm()
        else:
            param.grad.mul_(0.5)

    with Accelerator():
        param = nn.Parameter(on_device(1.0, 2.0, 3.0, 4.0))
        param.register_post_accumulate_grad_hook(call)
        local = LocalNorms([[param]])
        param.sum().backward()
        assert local.passes.is_edited == (hook == "halves")
        assert local.passes.norms[0].tolist() == pytest.approx(
            [4.0 if hook == "looks" else torch.nan], nan_ok=True
        )


def test_monitor_and_schedulers():
    there, here = both(monitored, not_finite=())
    assert_same(there, here, skips=False)
    assert_only_decisions_wait(there, looked_at=1)


def monitored(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    monitor = NoiseMonitor(optimizer, growing(accumulation_steps=2, max_norm=0.3))
    schedule = NoiseAwareLR(monitor, torch.optim.lr_scheduler.LinearLR(optimizer))
    accumulation, clip = AccumulationScheduler(monitor), ClipScheduler(monitor)

    def steps():
        for window in accumulation.windows(batches):
            decided = len(monitor.decisions)
            for batch in window:
                (loss_of(model, batch) / len(window)).backward()
            clip.clip_()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield len(monitor.decisions) > decided, True

    return monitor, steps()


class Hop(nn.Module):
    """Takes activations from one device to another, if there are two."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def forward(self, inputs):
        return inputs if self.device is None else inputs.to(self.device)


@pytest.mark.parametrize("first_there", [True, False])
def test_a_model_on_two_devices(first_there):
    def weights(two_devices):
        first, activation, second = build(torch.float32)
        places = [None] * 3
        if two_devices:
            places = [DEVICE, CPU, CPU] if first_there else [CPU, DEVICE, CPU]
            to_device(first if first_there else second)
        model = nn.Sequential(
            Hop(places[0]), first, Hop(places[1]), activation, second, Hop(places[2])
        )
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=CONFIG, foreach=False)
        for index, batch in enumerate(draw(BATCHES, dtype=torch.float32)):
            (loss_of(model, batch) * (torch.nan if index in NOT_FINITE else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found = [getattr(param.detach(), "held", param.detach()) for param in model.parameters()]
        return torch.cat([each.flatten() for each in found]), optimizer.decisions[-1].noise

    with Accelerator():
        there, noise = weights(two_devices=True)
    here, same = weights(two_devices=False)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    assert noise.trace == pytest.approx(same.trace, rel=1e-4)
    assert noise.signal == pytest.approx(same.signal, rel=1e-4)


def test_sparse_gradients_that_are_not_finite_are_left_out(monkeypatch):
    """The pretended device has none: here the tally is a device's, and the data is on the CPU."""

    def weights():
        torch.manual_seed(0)
        model = nn.Embedding(6, 3, sparse=True)
        optimizer = NoiseAwareSGD(model.parameters(), lr=0.1, noise=fixed(3), momentum=0.0)
        for index in range(9):
            loss = model(torch.tensor([index % 6, 2, 2])).square().sum()
            (loss * (torch.nan if index in (1, 5, 6, 7, 8) else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    here = weights()
    monkeypatch.setattr(
        "noiseopt.capture.window.tally_on",
        lambda device, sums, share: _DeviceTally(sums, share, device),
    )
    assert here.isfinite().all()
    torch.testing.assert_close(weights(), here)


# ---------------------------------------------------------------------- updates that are skipped


def moments_of(optimizer):
    return {key: optimizer.param_groups[0]["noise"][key] for key in MOMENTS}


@pytest.mark.parametrize("saves", [False, True])
def test_skipped_updates_do_not_count_for_the_moments(saves):
    """Which ones the kernel skipped is known at the next decision, or when the state is read."""
    seen = {}

    def loop(model, batches):
        config = growing(accumulation_steps=2)
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config, fused=True)
        place = model[0].weight.device.type

        def steps():
            for batch in batches:
                decided = len(optimizer.decisions)
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                decides = len(optimizer.decisions) > decided
                ends = len(optimizer._collector) == 0
                if saves and ends:
                    optimizer.state_dict()
                if (saves and ends) or decides:
                    seen.setdefault(place, []).append(moments_of(optimizer))
                yield decides, None

        return optimizer, steps()

    both(loop, not_finite=(4, 5, 14, 15, 16, 17, 18, 19))
    assert len(seen["cpu"]) > 4
    for there, here in zip(seen[DEVICE.type], seen["cpu"], strict=True):
        assert there == pytest.approx(here, rel=1e-3)
        assert there[UPDATES] == here[UPDATES]


def test_skipped_updates_are_known_before_a_group_is_added():
    with Accelerator():
        model = to_device(build(torch.float32))
        optimizer = NoiseAwareAdamW(model[0].parameters(), lr=1e-2, noise=fixed(1), fused=True)
        for factor in (1.0, torch.nan, 1.0):
            (model(OnDevice(torch.ones(4, 6))).square().mean() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.add_param_group({"params": model[2].parameters()})
        assert [group["noise"][UPDATES] for group in optimizer.param_groups] == [2, 0]


def test_state_goes_over_to_the_next_process():
    """Saved on the accelerator, loaded there: it goes on as if it had never stopped."""

    def weights(stops):
        model = to_device(build(torch.float32))
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=CONFIG, fused=True)
        for batch in draw(BATCHES, dtype=torch.float32):
            loss_of(model, [OnDevice(part) for part in batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if stops and optimizer.applied:
                stops, state = False, optimizer.state_dict()
                optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=CONFIG, fused=True)
                optimizer.load_state_dict(state)
        optimizer.flush()
        return torch.cat([param.detach().held.flatten() for param in model.parameters()])

    with Accelerator():
        torch.testing.assert_close(weights(stops=True), weights(stops=False), rtol=0, atol=0)
