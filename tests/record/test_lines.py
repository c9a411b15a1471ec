"""A line holds a start or a decision without a loss, and what is damaged is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.control import Start
from noiseopt.record import from_line, read, replay, to_line
from tests.record.simulated import CONFIG, Simulated

DECISIONS = Simulated(groups=("decayed", "rest")).run()
FIRST = DECISIONS[0]


def test_the_simulated_run_covers_what_a_record_must_hold():
    assert {"hold", "grow"} <= {decision.action for decision in DECISIONS}
    assert FIRST.noise is None
    assert math.isinf(FIRST.max_norm)
    assert any(math.isinf(d.noise.scale_interval[1]) for d in DECISIONS if d.noise)
    assert any(window.norms is None for d in DECISIONS for window in d.windows)
    assert any(decision.verifying for decision in DECISIONS)
    assert any(decision.clip_coefficient < 1 for decision in DECISIONS)


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: str(decision.num_updates))
def test_every_decision_is_kept(decision):
    assert from_line(to_line(decision))[0] == decision


def test_records_from_before_there_was_time_are_read_and_replayed():
    """The file was written by the version before `measure_interval`, `objective` and `beta1`."""
    found = read(Path(__file__).with_name("earlier.jsonl"))
    (stretch,) = found.stretches
    assert stretch.start.config.objective == "updates"
    assert stretch.start.config.measure_interval == 1
    assert [decision.num_updates for decision in stretch.decisions] == [10, 20]
    assert stretch.start.config.grow_by_noise
    for replayed in replay(found):
        one, other = replayed.recorded, replayed.again
        assert one.rates == other.rates
        assert (one.action, one.batch, one.noise) == (other.action, other.batch, other.noise)


def test_a_line_says_no_more_than_before_there_was_time():
    start, decision = (json.loads(to_line(item)) for item in (START, FIRST))
    assert "objective" not in start["config"]
    assert not any(name.startswith("timing") for name in start["state"])
    assert not {"seconds", "costs"} & decision.keys()


@pytest.mark.parametrize("index", [0, 1, -1])
def test_times_are_kept(index):
    simulated = Simulated(replace(CONFIG, objective="time"))
    decision = simulated.run(300)[index]
    assert (decision.seconds is None) == (index == 0)
    assert (decision.costs is None) == (index != -1)
    assert from_line(to_line(decision))[0] == decision
    assert from_line(to_line(simulated.now()))[0] == simulated.now()


def test_every_start_is_kept():
    simulated = Simulated(CONFIG, "sgd", ("decayed", "rest"))
    simulated.run(123)
    assert from_line(to_line(simulated.now()))[0] == simulated.now()
    assert math.isinf(Start.of_run(CONFIG, "adam").state.max_norm)
    assert from_line(to_line(Start.of_run(CONFIG, "adam")))[0] == Start.of_run(CONFIG, "adam")


def test_lines_are_strict_json_with_one_envelope():
    def refuse(constant):
        raise AssertionError(constant)

    for item in (Start.of_run(CONFIG, "adam"), *DECISIONS):
        values = json.loads(to_line(item, "abc"), parse_constant=refuse)
        assert values["schema"] == 2
        assert values["kind"] == ("start" if isinstance(item, Start) else "decision")
        assert 1.7e9 < values["time"] < 1e10
        assert values["config_hash"]


@given(value=st.floats())
def test_every_float_is_kept(value):
    found, _ = from_line(to_line(replace(FIRST, samples_seen=value, loss=value)))
    assert repr(found.samples_seen) == repr(found.loss) == repr(value)
    assert type(found.loss) is float


@given(reason=st.text())
def test_every_reason_is_kept_on_one_line(reason):
    line = to_line(replace(FIRST, reason=reason))
    assert line.isascii()
    assert "\n" not in line
    assert from_line(line)[0].reason == reason


def damaged(item, **changes):
    values = json.loads(to_line(item)) | changes
    return json.dumps({name: value for name, value in values.items() if value is not Ellipsis})


START = Start.of_run(CONFIG, "adam")


DAMAGES = [
    ("not json", "Expecting value"),
    ("[1]", "does not say its schema"),
    ('{"loss": 1}', "does not say its schema"),
    (damaged(START, schema=1), "its schema is 1; this noiseopt reads 2"),
    (damaged(START, time=None), "its time is None"),
    (damaged(START, kind="other"), "its kind is 'other'"),
    (damaged(START, kind="decision"), "Decision lacks accumulation_steps"),
    (damaged(START, config=...), "Start lacks config"),
    (damaged(START, rule="lamb"), "rule is 'lamb': it must be one of"),
    (damaged(START, config={"mode": "maybe"}), "Start.config lacks"),
    (damaged(START, state={}), "lacks 'estimator.samples_seen'"),
    (damaged(START, state=[]), r"Start.state is \[\]"),
    (damaged(START, groups="0"), "Start.groups is '0'"),
    (damaged(FIRST, accumulation_steps=...), "Decision lacks accumulation_steps"),
    (damaged(FIRST, action=7), "Decision.action is 7"),
    (damaged(FIRST, rates=3), "Decision.rates is 3"),
    (damaged(FIRST, windows=[[None, 1]]), "Decision.windows lacks applied"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_damage_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        from_line(line)


def test_settings_out_of_range_are_refused():
    values = json.loads(to_line(START))
    values["config"]["mode"] = "maybe"
    with pytest.raises(ValueError, match="mode is 'maybe'"):
        from_line(json.dumps(values))
