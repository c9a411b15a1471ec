"""What it costs while it runs, and what it says: memory, log line, repr, observers, metrics."""

import copy
import gc
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD
from tests.optim.helpers import (
    PAIRS,
    advise,
    build,
    draw,
    fixed,
    growing,
    loss_of,
    params_of,
    same_bits,
    train,
)


def size_of(model):
    return sum(param.numel() for param in model.parameters())


@pytest.fixture
def only_new_objects():
    """Let the garbage collector pass over what is there already, which would take it seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes(at_least):
    """How many bytes the tensors of so many values or more hold, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.numel() >= at_least:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------------- memory


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("mode", [advise, fixed])
def test_a_window_of_one_holds_nothing_beyond_torchs(name, mode):
    """No parameter-sized tensor more than torch's optimizer has, while it runs and after."""
    ours, theirs, kwargs = PAIRS[name]

    def held(make):
        before = live_bytes(10_000)
        model = nn.Linear(200, 100)
        optimizer = make(model.parameters(), **kwargs)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 200)).square().mean().backward()
            optimizer.step()
        return live_bytes(10_000) - before, optimizer

    expected, _ = held(theirs)
    found, optimizer = held(lambda params, **kw: ours(params, noise=mode(1), **kw))
    assert found == expected > 0
    assert optimizer._collector.nbytes == 0


@pytest.mark.parametrize("mode", [advise, fixed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_longer_window_holds_one_gradient_in_fp32_or_wider(dtype, mode):
    model = build(dtype)
    optimizer = NoiseAwareSGD(model.parameters(), lr=1e-3, noise=mode(4))
    width = 8 if dtype == torch.float64 else 4
    assert optimizer._collector.nbytes == 0
    for batch in draw(9, dtype=dtype):
        train(model, optimizer, [batch])
        assert optimizer._collector.nbytes == width * size_of(model)


def test_the_buffer_goes_when_the_window_returns_to_one():
    """As after a probe, every third at first, and with what a flush or a load leaves behind."""
    model = build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing(min_count=1e9, probe_interval=12))
    held = []
    for batch in draw(8, dtype=torch.float32):
        train(model, optimizer, [batch])
        held.append(optimizer._collector.nbytes)
    whole = 4 * size_of(model)
    assert held == [0, 0, whole, 0, 0, 0, whole, 0]


def test_a_load_frees_the_buffer():
    model = build()
    state = NoiseAwareAdamW(model.parameters(), noise=advise(4)).state_dict()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(4))
    train(model, optimizer, draw(2))
    with pytest.warns(UserWarning, match="loaded inside a window"):
        optimizer.load_state_dict(state)
    assert optimizer._collector.nbytes == 0


@pytest.mark.usefixtures("only_new_objects")
def test_gradients_are_not_kept_alive_by_the_measurement():
    """Between decisions only rows of numbers are queued."""
    model = nn.Linear(200, 100)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(1, decision_interval=10**6))
    train(model, optimizer, [None] * 3, lambda m, _: m(torch.ones(2, 200)).square().mean())
    before = live_bytes(10_000)
    train(model, optimizer, [None] * 50, lambda m, _: m(torch.ones(2, 200)).square().mean())
    assert live_bytes(10_000) == before


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("config", "level", "words"),
    [
        (
            advise(1),
            logging.WARNING,
            ["noise advise", "4 parameters in 1 groups", "window of 1", "nothing is probed"],
        ),
        (advise(4), logging.INFO, ["window of 4", "0 windows measured so far"]),
        (growing(), logging.INFO, ["noise auto", "one in 2 is a probe window of 2", "at most 4"]),
        (fixed(1), logging.WARNING, ["window of 1", "noise unknown"]),
    ],
    ids=["advise-1", "advise-4", "auto", "auto-held"],
)
def test_the_first_step_logs_what_is_measured_and_what_is_unknown(config, level, words, caplog):
    caplog.set_level(logging.INFO, logger="noiseopt")
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    assert not caplog.records
    train(model, optimizer, draw(6))
    (record,) = caplog.records
    assert record.levelno == level
    assert record.name == "noiseopt"
    for part in words:
        assert part in record.getMessage()


def test_off_logs_nothing(caplog):
    caplog.set_level(logging.DEBUG, logger="noiseopt")
    model = build()
    train(model, NoiseAwareAdamW(model.parameters(), noise="off"), draw(3))
    assert not caplog.records


def test_repr_shows_torchs_groups_and_the_estimate():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.125, noise=growing())
    unknown = repr(optimizer)
    train(model, optimizer, draw(60))
    known = repr(optimizer)
    plain = repr(torch.optim.AdamW(model.parameters(), lr=0.125))
    for text in (unknown, known):
        assert text.startswith("NoiseAwareAdamW (\nParameter Group 0\n")
        assert text.split("\n")[1:-2] == plain.split("\n")[1:-1]
        assert text.count("\n") == plain.count("\n") + 1
    assert "noise unknown" in unknown
    assert f"noise scale {optimizer.noise.scale:.4g} [" in known
    assert "noise off" in repr(NoiseAwareAdamW(model.parameters(), noise="off"))


def test_what_a_state_knows_is_known_after_loading_it(caplog):
    caplog.set_level(logging.INFO, logger="noiseopt")
    model, other = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=fixed(4))
    train(model, optimizer, draw(4 * 5 * 8))
    resumed = NoiseAwareAdamW(other.parameters(), noise=fixed(4))
    assert resumed.noise is None
    resumed.load_state_dict(optimizer.state_dict())
    words = f"noise scale {optimizer.noise.scale:.4g} ["
    for known in (resumed, copy.deepcopy(resumed)):
        assert known.noise == optimizer.noise
        assert words in repr(known)
    caplog.clear()
    train(other, resumed, draw(4))
    assert words in caplog.text


def test_losses_that_are_not_reported_are_named_where_changes_were_to_be_verified():
    def shown(noise, loss=None):
        optimizer = NoiseAwareAdamW(build().parameters(), noise=noise)
        if loss is not None:
            optimizer.report_loss(loss)
        return "no loss reported yet" in repr(optimizer)

    assert shown(growing(verify=True))
    assert not shown(growing(verify=True), loss=1.0)
    assert not shown(growing(verify=False))
    assert not shown(advise(4))
    assert not shown(replace(growing(verify=True), max_accumulation_steps=1))


def test_repr_of_a_group_leaves_the_numbers_where_they_are():
    optimizer = NoiseAwareAdamW(build().parameters())
    before = optimizer.state_dict()
    repr(optimizer)
    assert optimizer.state_dict() == before


# ---------------------------------------------------------------------- readings


def test_observers_get_every_decision_once_in_order():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing())
    seen, also = [], []
    optimizer.add_observer(seen.append)
    optimizer.add_observer(also.append)
    train(model, optimizer, draw(100))
    assert seen == also == list(optimizer.decisions)
    assert [d.num_updates for d in seen] == list(range(5, 5 * len(seen) + 1, 5))
    assert seen[-1] is optimizer.decision


def test_an_observer_may_take_the_state_and_read_everything():
    """At a decision the window is over: nothing is lost, and no warning is due."""
    model, other = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing())
    states = []

    def observe(decision):
        states.append(optimizer.state_dict()["param_groups"][0]["noise"])
        assert optimizer.decision is decision
        assert optimizer.applied
        assert optimizer.num_updates == decision.num_updates
        assert optimizer.accumulation_steps in (1, 2, 3, 4)

    optimizer.add_observer(observe)
    train(model, optimizer, draw(60))
    assert states
    assert all(state["total_dropped"] == 0 for state in states)
    train(other, NoiseAwareAdamW(other.parameters(), noise=growing()), draw(60))
    assert same_bits(params_of(model), params_of(other))


def test_an_observer_that_raises_does_not_spoil_the_next_window():
    model, other = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=fixed(2, decision_interval=2))

    def fail(decision):
        raise OSError("the disk is full")

    optimizer.add_observer(fail)
    failed = 0
    for batch in draw(12):
        loss_of(model, batch).backward()
        try:
            optimizer.step()
        except OSError:
            failed += 1
        optimizer.zero_grad()
    assert failed == 3
    train(other, NoiseAwareAdamW(other.parameters(), noise=fixed(2, decision_interval=2)), draw(12))
    assert same_bits(params_of(model), params_of(other))


def test_metrics_are_plain_finite_floats():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing(max_norm=1.0))
    assert optimizer.metrics() == {}
    for batch in draw(60):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        for value in optimizer.metrics().values():
            assert type(value) is float
            assert math.isfinite(value)
    found = optimizer.metrics()
    assert found["noise/scale"] == optimizer.noise.scale
    assert found["decide/accumulation_steps"] == optimizer.decision.accumulation_steps
    assert found["clip/max_norm"] == 1.0
    assert found["decide/loss"] > 0


def test_metrics_stay_finite_where_the_gradient_does_not():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(2, decision_interval=1))
    for value in (1.0, 1.0, math.nan, math.inf, 1.0, 1.0):
        for param in model.parameters():
            param.grad = torch.full_like(param, value)
        optimizer.step()
        assert all(map(math.isfinite, optimizer.metrics().values()))


def test_samples_and_updates_are_counted_apart():
    """12 calls, 3 updates, 60 samples."""
    model = build()
    config = advise(4, samples_per_micro_batch=5, decision_interval=1)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    train(model, optimizer, draw(12, 5))
    assert optimizer.num_updates == 3
    assert optimizer.decision.num_updates == 3
    assert optimizer.decision.samples_seen == 60
    assert optimizer.decision.batch == 20
