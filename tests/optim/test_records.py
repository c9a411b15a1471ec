"""What an optimizer tells its observers suffices to decide its run again, whatever happens."""

import copy

import pytest
import torch

from noiseopt import NoiseAwareAdamW, NoiseMonitor
from noiseopt.record import DecisionLog, read, replay
from tests.optim.helpers import build, draw, fixed, growing, loss_of, train


@pytest.fixture
def path(tmp_path):
    return tmp_path / "decisions.jsonl"


def started(path, model, **settings):
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing(**settings))
    optimizer.add_observer(DecisionLog(path, resume=True))
    return optimizer


def assert_tells_all(path, decisions):
    """The record holds these decisions, and comes to each of them again."""
    record = read(path)
    assert repr(record.decisions) == repr(decisions)  # where nan is nan
    assert all(replayed.same for replayed in replay(record))
    return record


def updates(record):
    return [decision.num_updates for decision in record.decisions]


def test_a_run_is_told(path):
    model = build()
    optimizer = started(path, model)
    train(model, optimizer, draw(100))
    record = assert_tells_all(path, optimizer.decisions)
    assert record.config == optimizer.config
    assert {"grow"} <= {decision.action for decision in record.decisions}


def test_a_resumed_run_is_told_once(path):
    """The checkpoint lies between two decisions, with windows that are measured and not decided."""
    model = build()
    optimizer = started(path, model)
    train(model, optimizer, draw(17))
    while not optimizer.applied:
        train(model, optimizer, draw(1))
    saved = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    at = optimizer.num_updates
    assert at % 5
    train(model, optimizer, draw(50, seed=2))
    straight = optimizer.decisions

    model.load_state_dict(saved[1])
    other = started(path, model)
    other.load_state_dict(saved[0])
    train(model, other, draw(50, seed=2))
    record = read(path)
    assert updates(record) == [decision.num_updates for decision in straight]
    assert [d.reason for d in record.decisions] == [d.reason for d in straight]
    assert record.stretches[1].start.state.num_updates == at
    assert all(replayed.same for replayed in replay(record))


def test_a_plain_state_begins_the_record_anew(path):
    model = build()
    optimizer = started(path, model)
    train(model, optimizer, draw(40))
    plain = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="loaded inside a window"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.warns(RuntimeWarning, match="a run begins where"):
        train(model, optimizer, draw(40))
    assert updates(assert_tells_all(path, optimizer.decisions))[0] == 5
    assert path.with_name("decisions.superseded.jsonl").exists()


def test_a_group_that_is_added_between_decisions_is_told(path):
    model, more = build(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = started(path, model)
    train(model, optimizer, draw(28))
    optimizer.add_param_group({"params": [more], "name": "late"})
    for batch in draw(60):
        (loss_of(model, batch) + (more * torch.randn(3)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    record = assert_tells_all(path, optimizer.decisions)
    assert [stretch.start.groups for stretch in record.stretches] == [("0",), ("0", "late")]
    assert "group/late/scale_low" in optimizer.metrics()


def test_samples_that_are_told_later_are_told(path):
    model = build()
    optimizer = started(path, model, tokens_per_sample=3)
    for batch in draw(60):
        optimizer.set_samples(4)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    record = assert_tells_all(path, optimizer.decisions)
    assert {decision.unit for decision in record.decisions} == {"samples"}
    last = record.decisions[-1]
    assert last.tokens_seen == 3 * last.samples_seen


def test_a_monitor_is_told(path):
    model = build()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "name": "all"}], lr=0.01)
    monitor = NoiseMonitor(optimizer, noise=growing())
    monitor.add_observer(DecisionLog(path))
    for batch in draw(60):
        for _ in range(monitor.accumulation_steps):
            (loss_of(model, batch) / monitor.accumulation_steps).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert assert_tells_all(path, monitor.decisions).groups == ("all",)


def test_a_monitor_is_told_of_a_group_that_is_added(path):
    model, more = build(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = NoiseMonitor(optimizer, noise=growing())
    monitor.add_observer(DecisionLog(path))
    for index, batch in enumerate(draw(60)):
        if index == 17:
            optimizer.add_param_group({"params": [more], "name": "late"})
        for _ in range(monitor.accumulation_steps):
            loss = loss_of(model, batch) + (more * torch.randn(3)).sum()
            (loss / monitor.accumulation_steps).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert assert_tells_all(path, monitor.decisions).groups == ("0", "late")
    assert monitor.noise.groups[1].trace > 0


@pytest.mark.parametrize(
    ("names", "called"),
    [
        ((None, None), ("0", "1")),
        (("decayed", None), ("decayed", "1")),
        (("same", "same"), ("same-0", "same-1")),
    ],
)
def test_groups_are_called_by_their_names(path, names, called):
    model = build()
    parts = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    for part, name in zip(parts, names, strict=True):
        part |= {"name": name} if name else {}
    optimizer = NoiseAwareAdamW(parts, noise=growing())
    optimizer.add_observer(DecisionLog(path))
    train(model, optimizer, draw(20))
    assert read(path).groups == called


def test_plain_functions_observe_as_before():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing())
    seen = []
    optimizer.add_observer(seen.append)
    state = optimizer.state_dict()
    train(model, optimizer, draw(20))
    with pytest.warns(UserWarning, match="loaded inside a window"):
        optimizer.load_state_dict(state)
    train(model, optimizer, draw(20))
    assert [decision.num_updates for decision in seen[:2]] == [5, 10]
    assert seen[-len(optimizer.decisions)] is optimizer.decisions[0]


def test_a_loss_is_kept_as_it_was_reported():
    """As of a captured CUDA graph, whose memory the next replay fills anew."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), lr=0.1, noise=fixed(2, decision_interval=1))
    held = torch.zeros((), dtype=torch.float64)
    for batch, value in zip(draw(2), (1.0, 5.0), strict=True):
        loss_of(model, batch).backward()
        held.fill_(value)
        optimizer.report_loss(held)
        optimizer.step()
        optimizer.zero_grad()
    (window,) = optimizer.decision.windows
    assert (window.loss_sum, window.loss_count) == (6.0, 2)
