"""A record is read whole, also while it is written, and damage is named with its place."""

import pytest

import noiseopt
from noiseopt.record import DecisionLog, read
from tests.record.simulated import CONFIG, Simulated


def recorded(path, updates=50, **arguments):
    simulated = Simulated(**arguments)
    simulated.add_observer(DecisionLog(path))
    return simulated.run(updates)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "decisions.jsonl"


def test_what_was_written_is_read(path):
    decisions = recorded(path, rule="sgd", groups=("decayed", "rest"))
    record = read(path)
    assert record.decisions == decisions
    assert (record.config, record.groups) == (CONFIG, ("decayed", "rest"))
    assert [stretch.start.rule for stretch in record.stretches] == ["sgd"]
    assert not record.cut
    assert list(record.times) == sorted(record.times)
    assert len(record.times) == len(decisions)
    assert f'"version": "{noiseopt.__version__}"' in path.read_text().splitlines()[0]


def test_a_killed_run_loses_its_last_line_only(path):
    decisions = recorded(path)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, (last + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        assert read(path).cut
        assert read(path).decisions == decisions[:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], "no start"),
        (lambda lines: ["not json", *lines], "line 1: "),
        (lambda lines: lines[1:], "line 1: it is no start"),
        (lambda lines: [lines[0], lines[1][:99], *lines[2:]], "line 2: "),
        (lambda lines: [*lines[:2], '{"schema": 2, "time": 1}'], "line 3: its kind is None"),
    ],
)
def test_damage_is_named_with_its_place(path, damage, message):
    recorded(path)
    lines = damage(path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"{path.name}(, | has ){message}"):
        read(path)


def test_a_missing_record_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"decisions\.jsonl"):
        read(path)
