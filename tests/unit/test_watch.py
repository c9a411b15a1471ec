"""The terminal view follows a record that is being written, taken back or begun anew."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from noiseopt import cli
from noiseopt.record import DecisionLog, tail
from noiseopt.watch import Watch, sparkline
from tests.record.simulated import Simulated


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "decisions.jsonl"


def started(path, **arguments):
    simulated = Simulated()
    simulated.add_observer(DecisionLog(path, **arguments))
    return simulated


def text_of(watch, now=None):
    stream = io.StringIO()
    console = Console(file=stream, width=100, highlight=False)
    console.print(watch.view(time.time() if now is None else now))
    return stream.getvalue()


def seen(watch):
    return [decision.num_windows for decision, _ in watch._decisions]


def test_before_the_first_decision_it_waits(path):
    watch = Watch(path)
    watch.look()
    assert "No decision yet" in text_of(watch)


def test_it_shows_what_the_latest_decision_says(path):
    decisions = started(path).run(400)
    watch = Watch(path)
    watch.look()
    text, last = text_of(watch), decisions[-1]
    assert "Run run" in text
    assert f"{last.num_updates}" in text
    assert f"{last.accumulation_steps}, a batch of {last.batch:.4g} samples" in text
    assert last.reason[:40] in text
    changes = [d for d in decisions if d.action != "hold"]
    assert f"update {changes[-1].num_updates}: grow to" in text
    assert "verdict" in text


def test_it_follows(path):
    simulated, watch = started(path), Watch(path)
    for known in (30, 60, 90):
        simulated.run(30)
        watch.look()
        assert seen(watch) == list(range(10, known + 1, 10))
    watch.look()
    assert len(seen(watch)) == 9


def test_a_line_that_is_being_written_waits_for_its_end(path):
    started(path).run(30)
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    watch = Watch(path)
    watch.look()
    assert seen(watch) == [10, 20]
    with path.open("ab") as file:
        file.write(content[-50:])
    watch.look()
    assert seen(watch) == [10, 20, 30]


def test_it_begins_anew_with_a_resumed_run_and_with_a_new_file(path):
    simulated, watch = started(path, resume=True, max_bytes=60_000), Watch(path)
    simulated.run(20)
    state = simulated.controller.state
    simulated.run(80)
    watch.look()
    simulated.load(state)
    simulated.run(20)
    watch.look()
    assert seen(watch) == [10, 20, 30, 40]
    simulated.run(400)
    watch.look()
    assert seen(watch)[-1] == 440
    assert seen(watch) == sorted(set(seen(watch)))


def test_an_old_decision_is_told_to_be_old(path):
    started(path).run(30)
    watch = Watch(path)
    watch.look()
    assert "s old" not in text_of(watch)
    assert "the latest decision is 3600 s old" in text_of(watch, time.time() + 3600)


def test_text_of_a_run_is_not_taken_for_markup(path):
    simulated = started(path)
    simulated.run(30)
    content = path.read_text()
    path.write_text(content.replace('"reason": "', '"reason": "[red]not markup[/nonsense] '))
    watch = Watch(path)
    watch.look()
    assert "[red]not markup[/nonsense]" in text_of(watch)


@pytest.mark.parametrize("options", [["--once"], []], ids=["once", "no terminal"])
def test_the_command_shows_a_run_once(path, capsys, options):
    started(path).run(50)
    assert cli.main(["watch", str(path.parent), *options]) == 0
    assert "noise scale" in capsys.readouterr().out


def test_a_damaged_record_is_named(path, capsys):
    started(path).run(50)
    path.write_text(path.read_text().replace('"kind": "start"', '"kind": 7'))
    assert cli.main(["watch", str(path.parent), "--once"]) == 1
    error = capsys.readouterr().err
    assert f"{path}: its kind is 7" in error


def test_a_run_that_resumes_between_two_looks_with_as_many_bytes_is_seen(path):
    """The file is taken back and written on: its length alone does not tell."""
    simulated, watch = started(path), Watch(path)
    simulated.run(40)
    state = simulated.controller.state
    simulated.run(10)
    watch.look()
    simulated.load(state)
    simulated.run(60)
    watch.look()
    assert seen(watch) == list(range(10, 101, 10))


def test_a_first_look_at_a_long_record_reads_its_end_only(path, monkeypatch):
    monkeypatch.setattr(tail, "FAR", 20_000)
    simulated = started(path)
    simulated.run(600)
    watch = Watch(path)
    watch.look()
    assert 3 < len(seen(watch)) < 15
    assert seen(watch)[-1] == 600
    assert "noise scale" in text_of(watch)
    simulated.run(20)
    watch.look()
    assert seen(watch)[-3:] == [600, 610, 620]


def test_a_full_file_takes_nothing_from_the_view(path):
    simulated, watch = started(path, max_bytes=30_000), Watch(path)
    for known in range(10, 400, 10):
        simulated.run(10)
        watch.look()
        assert seen(watch) == list(range(10, known + 1, 10))


def test_a_low_terminal_shows_fewer_changes(path):
    started(path).run(600)
    watch = Watch(path)
    watch.look()
    stream = io.StringIO()
    Console(file=stream, width=80, highlight=False).print(watch.view(time.time(), height=24))
    assert len(stream.getvalue().splitlines()) <= 24
    assert "Latest changes" in stream.getvalue()


def test_a_run_that_is_not_there_is_named_where_it_is_not_waited_for(path, capsys):
    assert cli.main(["watch", str(path.parent), "--once"]) == 1
    assert "there is no record" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_the_command_follows_a_live_run_until_it_is_interrupted(path):
    """In a terminal, which the view is redrawn in."""
    command = [sys.executable, "-m", "noiseopt", "watch", str(path.parent), "--every", "0.05"]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(command, stdout=inside, stderr=inside)
    os.close(inside)
    timer = threading.Timer(120, process.kill)
    timer.start()
    shown, simulated = b"", started(path)
    try:
        while b"grow to" not in shown:
            shown += os.read(terminal, 10_000)
            if b"No decision yet" in shown:
                simulated.run(10)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # which is how a terminal says that no one writes
            while os.read(terminal, 10_000):
                pass
        assert process.wait() == 0
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([float("nan")], " "),
        ([3.0, 3.0], "▁▁"),
        ([0.0, 7.0], "▁█"),
        ([float("inf"), 1.0, 2.0], " ▁█"),
    ],
)
def test_a_sparkline(values, shown):
    assert sparkline(values) == shown


def test_a_long_sparkline_is_made_of_means():
    line = sparkline([float(index) for index in range(1000)])
    assert len(line) == 48
    assert list(line) == sorted(line)


def test_cadence_must_be_positive(path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["watch", str(path.parent), "--every", "0"])
    assert "not positive" in capsys.readouterr().err
