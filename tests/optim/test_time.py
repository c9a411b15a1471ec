"""Where the objective is time the optimizer reads the host's clock, and only there."""

import time
from dataclasses import replace

import pytest

import noiseopt.clock
from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.record import DecisionLog, read, replay
from tests.optim.helpers import build, draw, loss_of

TIMED = NoiseConfig(
    objective="time",
    samples_per_micro_batch=4,
    decision_interval=4,
    min_count=2.0,
    dwell_updates=4,
    dwell_fraction=0.0,
    max_accumulation_steps=8,
    verify=False,
)


class FakeClock:
    """A clock that stands still unless it is told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def run(config, micro_batches, passes, seed=0, observers=()):
    """The plain loop; `passes` has time pass, by whether there was an update."""
    net = build()
    optimizer = NoiseAwareAdamW(net.parameters(), lr=1e-3, noise=config)
    for observer in observers:
        optimizer.add_observer(observer)
    for batch in draw(micro_batches, seed=1 + seed):
        loss_of(net, batch).backward()
        optimizer.step()
        passes(optimizer.applied)
        optimizer.zero_grad()
    return optimizer


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(noiseopt.clock, "time", clock)
    return clock


def advancing(clock, per_update=4.0, per_micro_batch=1.0):
    def passes(applied):
        clock.now += per_micro_batch + per_update * applied

    return passes


def test_the_costs_are_those_of_the_loop(clock):
    optimizer = run(TIMED, 1500, advancing(clock))
    last = optimizer.decision
    assert last.costs.per_update == pytest.approx(4.0)
    assert last.costs.per_micro_batch == pytest.approx(1.0)
    assert optimizer.metrics()["decide/seconds_per_update"] == pytest.approx(4.0)
    assert {d.action for d in optimizer.decisions} == {"hold", "grow"}
    assert optimizer.accumulation_steps > 1


def test_a_time_belongs_to_the_decisions_windows_before(clock):
    first, second, third, *_ = run(TIMED, 40, advancing(clock)).decisions
    assert (first.seconds, second.seconds) == (None, None)
    taken = sum(4.0 + window.micro_batches for window in second.windows)
    assert third.seconds == pytest.approx(taken)


def test_other_objectives_read_no_clock(clock):
    clock.perf_counter = None  # a call would raise
    untimed = run(replace(TIMED, objective="updates"), 100, lambda applied: None)
    assert {d.seconds for d in untimed.decisions} == {None}
    assert not any("timing" in name for name in untimed.param_groups[0]["noise"])


def test_real_sleeps_are_told_apart():
    """A sleep is never shorter than asked for; other work may stretch both, but not fourfold."""

    def sleeps(applied):
        time.sleep(0.005 + 0.1 * applied)

    last = run(replace(TIMED, decision_interval=2), 60, sleeps).decision
    assert last.costs is not None, last.reason
    assert last.costs.per_update > 2 * last.costs.per_micro_batch > 0.005


def test_a_recorded_run_decides_alike_again(clock, tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    run(TIMED, 800, advancing(clock), observers=[log])
    again = list(replay(read(tmp_path / "decisions.jsonl")))
    assert any(replayed.recorded.action == "grow" for replayed in again)
    assert all(replayed.same for replayed in again)


def test_what_was_timed_is_saved_and_goes_on(clock):
    optimizer = run(TIMED, 600, advancing(clock))
    other = NoiseAwareAdamW(build().parameters(), lr=1e-3, noise=TIMED)
    other.load_state_dict(optimizer.state_dict())
    assert other._adaptation.state == optimizer._adaptation.state
    assert min(other._adaptation.state.timing.seconds) > 0
    plain = NoiseAwareAdamW(
        build().parameters(), lr=1e-3, noise=replace(TIMED, objective="updates")
    )
    plain.load_state_dict(optimizer.state_dict())
    other.load_state_dict(plain.state_dict())
    assert other._adaptation.state.num_updates == optimizer.num_updates
