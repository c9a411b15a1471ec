"""A replay in words, on the command line."""

import json
from dataclasses import replace

import pytest

from noiseopt import cli
from noiseopt.record import DecisionLog, read
from noiseopt.report.comparison import compare
from noiseopt.report.replaying import MAX_ROWS, parse_changes, rows, words
from tests.record.simulated import CONFIG, Simulated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a recorded run."""
    folder = tmp_path_factory.mktemp("run")
    simulated = Simulated()
    simulated.add_observer(DecisionLog(folder / "decisions.jsonl"))
    simulated.run()
    return folder


def test_the_same_comes_out(run, capsys):
    assert cli.main(["replay", str(run)]) == 0
    assert capsys.readouterr().out == "60 decisions, decided again: all come out the same.\n"
    assert cli.main(["replay", str(run / "decisions.jsonl")]) == 0


def test_a_record_that_does_not_come_out_again_fails(run, tmp_path, capsys):
    lines = (run / "decisions.jsonl").read_text().splitlines()
    values = json.loads(lines[20]) | {"accumulation_steps": 31, "reason": "because"}
    lines[20] = json.dumps(values)
    (tmp_path / "decisions.jsonl").write_text("".join(line + "\n" for line in lines))
    assert cli.main(["replay", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 of 60 decisions come out otherwise; the first:" in out
    assert "31: because" in out
    assert "The rules have changed since" in out


def test_other_settings_show_where_they_decide_otherwise(run, capsys):
    assert cli.main(["replay", str(run), "--set", "max_accumulation_steps=2"]) == 0
    out = capsys.readouterr().out
    assert "With max_accumulation_steps=2" in out
    assert "reason now" in out
    record = read(run / "decisions.jsonl")
    assert f"ends at 2 instead of {record.decisions[-1].accumulation_steps}" in out
    assert "is not known" in out


def test_updates_are_counted_by_the_windows_that_were_decided(run):
    record = read(run / "decisions.jsonl")
    same = compare(record, {"max_accumulation_steps": CONFIG.max_accumulation_steps})
    micro_batches = sum(w.micro_batches - w.skipped for d in record.decisions for w in d.windows)
    assert same.recorded_updates == same.updates == record.decisions[-1].num_updates
    one = compare(record, {"max_accumulation_steps": 1})
    assert one.updates == pytest.approx(micro_batches, rel=0.1)


def test_advice_that_is_not_applied_makes_no_fewer_updates(tmp_path):
    simulated = Simulated(replace(CONFIG, mode="advise", accumulation_steps=4))
    simulated.add_observer(DecisionLog(tmp_path / "decisions.jsonl"))
    simulated.run()
    record = read(tmp_path / "decisions.jsonl")
    found = compare(record, {"clip_z": 2.5})
    assert found.updates == found.recorded_updates == 599
    assert compare(record, {"mode": "auto"}).updates < 500


def test_many_rows_are_shown_from_both_ends(run):
    found = compare(read(run / "decisions.jsonl"), {"max_accumulation_steps": 2})
    shown = rows(replace(found, changes=[*found.changes] * 100))
    assert len(shown) == MAX_ROWS + 1
    assert shown[MAX_ROWS // 2][0] == "..."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_accumulation_steps", "is no setting: write NAME=VALUE"),
        ("nonsense=1", "there is no setting 'nonsense'"),
        ("min_count=many", "'many' is not of type float"),
        ("max_accumulation_steps=1.5", "'1.5' is not of type int"),
        ("verify=maybe", "verify is 'maybe'"),
        ("max_accumulation_steps=0", "max_accumulation_steps is 0"),
        ("probe_interval=4", "probe_interval cannot be changed"),
    ],
)
def test_settings_that_cannot_be_are_named(run, text, message, capsys):
    assert cli.main(["replay", str(run), "--set", text]) == 1
    assert message in capsys.readouterr().err


def test_a_run_without_a_record_or_without_decisions_is_named(tmp_path, capsys):
    assert cli.main(["replay", str(tmp_path)]) == 1
    assert "there is no record" in capsys.readouterr().err
    simulated = Simulated()
    simulated.add_observer(DecisionLog(tmp_path / "decisions.jsonl"))
    simulated.run(10)
    lines = (tmp_path / "decisions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "decisions.jsonl").write_text(lines[0])
    assert cli.main(["replay", str(tmp_path)]) == 1
    assert "holds no decision" in capsys.readouterr().err


def test_values_are_read_by_the_kind_of_their_setting():
    texts = ["mode=advise", "samples_per_micro_batch=none", "verify=True", "clip_z=2"]
    assert parse_changes(texts) == {
        "mode": "advise",
        "samples_per_micro_batch": None,
        "verify": True,
        "clip_z": 2.0,
    }


def test_words_are_told_for_every_outcome(run):
    record = read(run / "decisions.jsonl")
    assert words(compare(record), {})[0].endswith("all come out the same.")
    changes = {"max_accumulation_steps": CONFIG.max_accumulation_steps}
    assert words(compare(record, changes), changes)[0].endswith("all come out the same.")
