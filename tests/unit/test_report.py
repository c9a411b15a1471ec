"""The report says what the record says: its words never outrun the interval."""

import csv
import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from noiseopt import cli, report
from noiseopt.control import Controller, NoiseConfig, Start, Window, sqrt_gain
from noiseopt.estimate import WindowNorms, noise_fraction
from noiseopt.record import DecisionLog, read, replay, to_line
from noiseopt.report.table import plain
from tests.record.simulated import CONFIG as SIMULATED
from tests.record.simulated import Simulated

CONFIG = NoiseConfig(accumulation_steps=2, samples_per_micro_batch=4)


def decide(windows):
    controller = Controller.create(CONFIG, sqrt_gain)
    learned = []
    for index in range(windows):
        norms = WindowNorms.from_micro_batches([5.0, 5.0 + index % 3], 3.0 + index % 2, [4, 4])
        learned.append(Window(norms, micro_batches=2))
        controller = controller.learn(learned[-1])
    return controller.decide(1e-3, tuple(learned))[1]


def with_interval(low, high, count=100.0, batch=8.0):
    """Return a decision whose noise scale lies in an interval."""
    decision = decide(40)
    fractions = (noise_fraction(low, batch), noise_fraction(high, batch))
    noise = replace(
        decision.noise,
        scale=math.sqrt(low * high) if math.isfinite(high) else 2 * low,
        scale_interval=(low, high),
        fraction_interval=fractions,
        count=count,
        effective_count=count,
        batch=batch,
    )
    return replace(decision, noise=noise)


def write(folder, decisions):
    folder.mkdir(exist_ok=True)
    lines = map(to_line, [Start.of_run(CONFIG, "adam"), *decisions])
    (folder / report.RECORD).write_text("".join(line + "\n" for line in lines))
    return read(folder / report.RECORD)


@pytest.mark.parametrize(
    ("low", "high", "begins", "contains"),
    [
        (9.0, 30.0, "balanced at", "between 52.9% and 78.9%"),
        (7.9, 900.0, "balanced or too noisy at", "between 49.7% and 99.1%"),
        (31.0, 40.0, "balanced or too noisy at", "between 79.5% and 83.3%"),
        (33.0, 40.0, "too noisy at", "at most 19.5% of the progress"),
        (0.5, 7.9, "balanced or wasteful at", "between 5.9% and 49.7%"),
        (0.5, 2.1, "balanced or wasteful at", "between 5.9% and 20.8%"),
        (0.5, 1.9, "wasteful at", "at most 19.2% of the squared gradient"),
        (0.0, math.inf, "undecided at", "between 0% and 100%"),
        (90.0, math.inf, "too noisy at", "no upper bound"),
        (1e9, 2e9, "too noisy at", "at most 0.1% of the progress"),
    ],
)
def test_the_verdict_is_no_stronger_than_the_interval(low, high, begins, contains):
    text = report.verdict(with_interval(low, high), CONFIG)
    assert text.startswith(begins)
    assert contains in text


def test_a_run_that_is_too_noisy_is_told_which_windows_would_gain_how_much():
    """The batch that pays is sqrt(4 x 8 x 90) = 53.7, 13 of 4: (1 + 90/8) / (1 + 90/52)."""
    text = report.verdict(with_interval(90.0, 100.0), CONFIG)
    assert "windows of up to 13 micro-batches (52 samples)" in text
    assert "would make 4.49 times as much or more" in text


def test_a_run_that_is_wasteful_is_told_what_half_the_batch_would_keep():
    """(1 + 1.9/8) / (1 + 1.9/4) = 83.9 %."""
    decision = with_interval(0.5, 1.9)
    text = report.verdict(decision, CONFIG)
    assert "half the batch would make 83.9% of the progress or more" in text
    assert "shorter windows would save samples" in text
    least = replace(CONFIG, min_accumulation_steps=2)
    assert "smaller micro-batches would save samples" in report.verdict(decision, least)


def test_few_windows_decide_nothing():
    text = report.verdict(with_interval(90.0, 100.0, count=7.0), CONFIG)
    assert text.startswith("undecided")
    assert "it rests on 7.0 windows, to act takes 8" in text


def test_an_unknown_noise_decides_nothing():
    text = report.verdict(decide(1), CONFIG)
    assert text.startswith("undecided: noise unknown")


def test_the_facts_are_those_of_the_last_decision(tmp_path):
    grown = replace(decide(10), action="grow", accumulation_steps=4, reason="there is room")
    record = write(tmp_path, [decide(1), grown, with_interval(9.0, math.inf)])
    facts = dict(report.facts(record))
    assert facts["updates"] == "40"
    assert facts["samples"] == "320"
    assert facts["noise scale"] == "18 samples (95%: 9 or more, no upper bound)"
    assert facts["changes"] == "update 10: grow to 4: there is room"
    assert facts["clipped"] == "0 of 40 updates"
    assert list(facts)[-1] == "verdict"


def test_many_changes_are_shown_from_both_ends(tmp_path):
    grown = replace(decide(10), action="grow")
    record = write(tmp_path, [replace(grown, num_updates=n) for n in range(100)])
    texts = [text for name, text in report.facts(record) if name in ("changes", "")]
    assert texts[0].startswith("update 0: ")
    assert texts[-1].startswith("update 99: ")
    shown = [text for text in texts if text.startswith("update")]
    assert f"... {100 - len(shown)} more ..." in texts


def test_a_record_without_decisions_and_one_that_was_cut(tmp_path):
    empty = write(tmp_path, [])
    assert report.facts(empty) == [
        ("verdict", "undecided: the run ended before its first decision")
    ]
    cut = replace(write(tmp_path / "cut", [decide(40)]), cut=True)
    assert "cut short" in dict(report.facts(cut))["record"]


def test_an_advised_run_is_told_what_auto_would_have_done(tmp_path):
    simulated = Simulated(replace(SIMULATED, mode="advise", accumulation_steps=4))
    simulated.add_observer(DecisionLog(tmp_path / report.RECORD))
    simulated.run()
    advised = dict(report.facts(read(tmp_path / report.RECORD)))["auto"]
    auto = list(replay(read(tmp_path / report.RECORD), {"mode": "auto"}))[-1].again
    assert auto.accumulation_steps > 4
    assert f"a window of {auto.accumulation_steps} micro-batches" in advised
    assert "instead of 599" in advised
    assert "auto" not in dict(report.facts(write(tmp_path / "auto", [decide(40)])))


def test_advice_is_not_told_as_a_deed():
    advice = replace(decide(40), action="grow", applied=False)
    assert "advice, not applied" in report.change(advice)


def picture_size(path: Path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def write_losses(folder, rows):
    with (folder / report.LOSSES).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arm", "samples", "updates", "lr", "train_loss", "validation_loss"])
        table.writerows(rows)


@pytest.mark.parametrize(
    "decisions",
    [
        [],
        [decide(1)],
        [decide(1), decide(20), with_interval(0.0, math.inf), with_interval(3.0, 5.0)],
        [replace(with_interval(0.0, math.inf), action="revert", grad_norm=None, loss=2.0)],
        [replace(decide(5), windows=(Window(None, 2, 2, applied=False),))],
    ],
    ids=["none", "unknown", "infinite", "reverted", "skipped"],
)
@pytest.mark.parametrize("losses", [True, False])
def test_a_picture_is_drawn(tmp_path, decisions, losses):
    write(tmp_path, decisions)
    if losses:
        rows = [["AdamW", 8 * n, n, 1e-3, 5 - n / 9, "nan" if n % 3 else 5.0] for n in range(9)]
        write_losses(tmp_path, [*rows, *(["ours", *row[1:]] for row in rows), ["ours", 3]])
    width, height = picture_size(report.report([tmp_path])[-1])
    assert width > 600
    assert height > 900


def test_every_loss_of_the_table_is_read_and_a_cut_row_left_out(tmp_path):
    write_losses(tmp_path, [["a", 8, 1, 1e-3, 2.5, "nan"], ["b", 8, 1, 1e-3, 2.0, 2.25], ["b", 16]])
    losses = report.read_losses(tmp_path / report.LOSSES)
    assert losses["a"].training.tolist() == [2.5]
    assert math.isnan(losses["a"].held_out[0])
    assert losses["b"].held_out.tolist() == [2.25]
    assert report.read_losses(tmp_path / "absent.csv") == {}


def test_the_command_prints_and_draws(tmp_path, capsys):
    write(tmp_path, [decide(1), with_interval(9.0, 30.0)])
    assert cli.main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "balanced at a batch of 8 samples" in " ".join(printed.split())
    assert str(tmp_path / report.PICTURE) in printed.replace("\n", "")


@pytest.mark.parametrize("given_as", ["folder", "record", "out"])
def test_a_record_is_never_written_over(tmp_path, given_as, capsys):
    write(tmp_path, [decide(1), with_interval(9.0, 30.0)])
    record = tmp_path / report.RECORD
    before = record.read_bytes()
    run = str(tmp_path if given_as == "folder" else record)
    out = ["--out", str(record)] if given_as == "out" else []
    assert cli.main(["report", run, *out]) == (1 if out else 0)
    assert record.read_bytes() == before
    assert (tmp_path / "report.html").exists() == (not out)
    assert ("is a record's name" in capsys.readouterr().err) == bool(out)


def test_a_record_of_another_name_has_its_own_pages(tmp_path):
    write(tmp_path, [decide(1), with_interval(9.0, 30.0)])
    (tmp_path / report.RECORD).rename(tmp_path / "critic.jsonl")
    assert cli.main(["report", str(tmp_path / "critic.jsonl")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("critic.jsonl", "critic.report.html", "critic.plot.png", "critic.decisions.csv")
    }


def test_the_page_goes_into_a_folder_that_is_made(tmp_path):
    write(tmp_path, [decide(1), with_interval(9.0, 30.0)])
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "new" / "pages")]) == 0
    assert (tmp_path / "new" / "pages" / "report.html").is_file()


def test_a_folder_without_a_record_is_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert f"there is no record {tmp_path}/decisions.jsonl" in captured.err
    assert captured.out == ""
    (tmp_path / report.RECORD).write_text("something else\n")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "line 1" in capsys.readouterr().err


def without(*modules):
    """Return a program's beginning, in which these modules are not installed."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from noiseopt import cli
"""


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_without_rich_the_table_is_plain_and_without_matplotlib_help_is_given(tmp_path):
    write(tmp_path, [with_interval(9.0, 30.0)])
    call = f"sys.exit(cli.main(['report', {str(tmp_path)!r}]))"
    done = run(without("rich") + call)
    assert done.returncode == 0
    assert "\nverdict         balanced at a batch of 8 samples" in done.stdout
    done = run(without("matplotlib") + call)
    assert done.returncode == 1
    assert "matplotlib is missing: pip install 'noiseopt[demo]'" in done.stderr
    assert "balanced at a batch" in done.stdout  # what can be said without a picture is said


def test_a_plain_table_is_aligned(capsys):
    plain("Title", ("", "a", "b"), [("name", "1", "22"), ("n", "333", "4")], sys.stdout)
    assert capsys.readouterr().out == "Title\n      a    b\nname  1    22\nn     333  4\n"
