"""A record decides again what was decided, and tells what other settings would have decided."""

import json
from dataclasses import replace

import pytest

from noiseopt import NoiseConfig
from noiseopt.record import DecisionLog, read, replay
from tests.record.simulated import CONFIG, Simulated


@pytest.fixture
def path(tmp_path):
    return tmp_path / "decisions.jsonl"


TIMED = replace(CONFIG, objective="time")


def recorded(path, *arguments, updates=600):
    simulated = Simulated(*arguments)
    simulated.add_observer(DecisionLog(path))
    simulated.run(updates)
    return read(path)


@pytest.mark.parametrize(
    ("config", "rule", "groups"),
    [
        (CONFIG, "adam", ("0",)),
        (CONFIG, "sgd", ("0", "1", "2")),
        (replace(CONFIG, mode="advise", accumulation_steps=4), "adam", ("0", "1")),
        (NoiseConfig(max_norm=1.0), "adam", ("0",)),
        (TIMED, "adam", ("0",)),
    ],
)
def test_the_same_comes_out(path, config, rule, groups):
    record = recorded(path, config, rule, groups)
    again = list(replay(record))
    assert len(again) == len(record.decisions) == 60
    assert all(replayed.same and replayed.same_deed for replayed in again)


def test_a_record_that_was_changed_differs_where_it_was(path):
    recorded(path)
    lines = path.read_text().splitlines()
    values = json.loads(lines[30])
    values["accumulation_steps"] += 1
    lines[30] = json.dumps(values)
    path.write_text("\n".join([*lines, ""]))
    again = list(replay(read(path)))
    assert [index for index, replayed in enumerate(again) if not replayed.same] == [29]
    assert not again[29].same_deed


def test_by_its_own_values_a_changed_replay_is_the_same(path):
    record = recorded(path)
    again = replay(record, {"max_accumulation_steps": CONFIG.max_accumulation_steps})
    assert all(replayed.same for replayed in again)


def test_a_limit_holds_from_the_start(path):
    record = recorded(path)
    assert max(decision.accumulation_steps for decision in record.decisions) > 2
    again = list(replay(record, {"max_accumulation_steps": 2}))
    assert max(replayed.again.accumulation_steps for replayed in again) == 2
    first = next(replayed for replayed in again if not replayed.same_deed)
    assert first.recorded.accumulation_steps > 2


def test_what_auto_would_have_done_follows_from_advice(path):
    """As if from the measurements of windows of the advised run's length."""
    record = recorded(path, replace(CONFIG, mode="advise", accumulation_steps=4))
    assert {decision.accumulation_steps for decision in record.decisions} >= {4, 8}
    assert all(window.micro_batches == 4 for d in record.decisions for window in d.windows)
    again = list(replay(record, {"mode": "auto"}))
    assert again[-1].again.accumulation_steps > 8


def test_a_changed_replay_goes_on_where_the_run_was_resumed(path):
    simulated = Simulated()
    simulated.add_observer(DecisionLog(path))
    simulated.run(300)
    simulated.load(simulated.controller.state)
    simulated.run(300)
    record = read(path)
    assert len(record.stretches) == 2
    straight = [replayed.again for replayed in replay(recorded(path.with_name("s.jsonl")), LIMIT)]
    assert [replayed.again for replayed in replay(record, LIMIT)] == straight


LIMIT = {"max_accumulation_steps": 2}


def test_a_changed_replay_of_what_was_resumed_keeps_to_its_limits(path):
    simulated = Simulated()
    simulated.run(590)
    assert simulated.controller.state.accumulation_steps > 2
    simulated.add_observer(DecisionLog(path))
    simulated.run(100)
    again = list(replay(read(path), LIMIT))
    assert {replayed.again.accumulation_steps for replayed in again} <= {1, 2}


@pytest.mark.parametrize("saved_at", [300, 305])
@pytest.mark.parametrize("changes", [{"max_accumulation_steps": 32}, {"max_reverts": 4}])
def test_a_change_that_changes_nothing_changes_nothing_across_a_resume(path, saved_at, changes):
    """Also where windows between the last decision and the checkpoint are in no decision."""
    simulated = Simulated()
    simulated.add_observer(DecisionLog(path))
    simulated.run(saved_at)
    simulated.load(simulated.controller.state)
    simulated.run(300)
    again = list(replay(read(path), changes))
    assert len(again) == (saved_at + 300) // 10
    assert all(replayed.same for replayed in again)


def test_a_stretch_keeps_to_its_own_bounds(path):
    simulated = Simulated()
    simulated.add_observer(DecisionLog(path))
    simulated.run(560)
    assert simulated.controller.state.accumulation_steps > 2
    lower = Simulated(replace(CONFIG, max_accumulation_steps=2))
    lower.add_observer(DecisionLog(path, resume=True))
    lower.load(simulated.controller.state.within(lower.config))
    lower.run(100)
    again = list(replay(read(path), {"clip_z": CONFIG.clip_z}))
    assert all(replayed.same for replayed in again)


def test_times_are_recorded_and_decided_by_again(path):
    record = recorded(path, TIMED)
    assert any("update costs" in d.reason for d in record.decisions if d.action == "grow")
    again = list(replay(record, {"max_accumulation_steps": 2}))
    assert max(replayed.again.accumulation_steps for replayed in again) == 2
    assert again[-1].again.costs is not None


def test_another_objective_decides_otherwise_as_far_as_times_are_known(path):
    timed = list(replay(recorded(path, TIMED), {"objective": "updates"}))
    assert not all(replayed.same_deed for replayed in timed)
    assert timed[-1].again.costs is None
    untimed = list(replay(recorded(path.with_name("u.jsonl")), {"objective": "time"}))
    assert {replayed.again.action for replayed in untimed} == {"hold"}
    assert "costs unknown" in untimed[-1].again.reason


def test_settings_of_the_averages_count_in_a_record_that_begins_late(path):
    simulated = Simulated()
    simulated.run(300)
    simulated.add_observer(DecisionLog(path))
    simulated.run(300)
    again = list(replay(read(path), {"half_life_fraction": 0.5}))
    assert not any(replayed.same for replayed in again[5:])
    with pytest.raises(ValueError, match="begins after 300 windows"):
        list(replay(read(path), {"accumulation_steps": 2}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_accumulation_steps": 0}, ValueError, "max_accumulation_steps is 0"),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"verify": 3}, TypeError, "verify is 3"),
        ({"decision_interval": 5}, ValueError, "decision_interval cannot be changed"),
        ({"mode": "off"}, ValueError, "mode='off' cannot be changed"),
    ],
)
def test_settings_that_cannot_be_are_refused(path, changes, error, message):
    record = recorded(path, updates=20)
    with pytest.raises(error, match=message):
        list(replay(record, changes))
