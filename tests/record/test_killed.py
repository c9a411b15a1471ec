"""Killed without warning, again and again: the record parses, resumes and replays."""

import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from noiseopt.record import read, replay

SCRIPT = Path(__file__).with_name("train_small.py")
STEPS, KILLS = 1500, 3


def start(folder):
    command = [sys.executable, SCRIPT, folder, str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process):
    process.communicate()
    return process.returncode


def kill_after(steps, process):
    """It goes on meanwhile, so that this strikes anywhere in a step."""
    assert all(process.stdout.readline() == "step\n" for _ in range(steps))
    process.kill()
    assert finish(process) == -signal.SIGKILL


def without_windows(decisions):
    """A stretch's first decision tells the windows since the checkpoint only."""
    return [replace(decision, windows=()) for decision in decisions]


def test_a_run_killed_at_random_points_ends_with_the_record_of_one_that_was_not(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert finish(start(straight)) == 0

    draw = random.Random(0)
    for _ in range(KILLS):
        kill_after(draw.randint(50, 300), start(killed))
        path = killed / "decisions.jsonl"
        if path.exists():
            assert all(replayed.same for replayed in replay(read(path)))
    assert finish(start(killed)) == 0

    whole, found = read(straight / "decisions.jsonl"), read(killed / "decisions.jsonl")
    assert len(found.stretches) > 1
    assert without_windows(found.decisions) == without_windows(whole.decisions)
    assert all(replayed.same for replayed in replay(found))
    assert all(replayed.same for replayed in replay(whole))
