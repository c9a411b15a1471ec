"""Killed without warning, again and again: the record parses, resumes and replays."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from noiseopt.record import read, replay

SCRIPT = Path(__file__).with_name("train_small.py")
STEPS, KILLS = 1500, 3


def start(folder):
    command = [sys.executable, SCRIPT, folder, str(STEPS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    return process


def finish(process):
    process.communicate()
    return process.returncode


def without_windows(decisions):
    """A stretch's first decision tells the windows since the checkpoint only."""
    return [replace(decision, windows=()) for decision in decisions]


def test_a_run_killed_at_random_points_ends_with_the_record_of_one_that_was_not(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    process = start(straight)
    began = time.monotonic()
    assert finish(process) == 0
    length = time.monotonic() - began

    draw = random.Random(0)
    for _ in range(KILLS):
        process = start(killed)
        time.sleep(draw.uniform(0.1, 0.6) * length / KILLS)
        process.kill()
        assert finish(process) != 0
        path = killed / "decisions.jsonl"
        if path.exists():
            assert all(replayed.same for replayed in replay(read(path)))
    assert finish(start(killed)) == 0

    whole, found = read(straight / "decisions.jsonl"), read(killed / "decisions.jsonl")
    assert len(found.stretches) > 1
    assert without_windows(found.decisions) == without_windows(whole.decisions)
    assert all(replayed.same for replayed in replay(found))
    assert all(replayed.same for replayed in replay(whole))
