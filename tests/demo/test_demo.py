"""The demo from end to end, on a tiny model: what it shows, what it keeps, and how it is ended."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from noiseopt import NoiseAwareAdamW, cli, report
from noiseopt.demo import prepare
from noiseopt.demo.folder import LossTable, make
from noiseopt.demo.gpt import GPT, Shape
from noiseopt.demo.run import ARMS, Demo
from noiseopt.demo.text import load
from noiseopt.demo.train import Clock, Settings, adamw, schedule, train
from noiseopt.record import read, replay

TINY = Settings(steps=45, batch_size=4, held_out=8, shape=Shape(2, 16, 2, 16))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run."""
    out = tmp_path_factory.mktemp("runs")
    demo = prepare(TINY, out, "tiny", force=False, track=False)
    assert demo.run() == 0
    return out / "tiny"


def test_both_arms_get_the_same_samples_and_learn(finished):
    arms = json.loads((finished / "summary.json").read_text())["arms"]
    assert list(arms) == ["AdamW", "NoiseAwareAdamW"]
    assert [arm["samples"] for arm in arms.values()] == [180, 180]
    assert arms["AdamW"]["updates"] == 45
    assert arms["NoiseAwareAdamW"]["updates"] < 45  # some windows were probes of two
    for arm in arms.values():
        assert arm["validation_loss"] < math.log(256)
        assert math.isclose(sum(arm["shares"].values()), 1)
        assert arm["shares"]["all-reduce"] == 0


def test_the_loss_table_has_every_point(finished):
    losses = report.read_losses(finished / report.LOSSES)
    for arm in losses.values():
        assert arm.samples.tolist() == [4 * step for step in range(1, 46)]
        assert math.isfinite(arm.held_out[-1])
    first = [arm.training[0] for arm in losses.values()]
    assert first[0] == first[1]  # the same weights met the same micro-batch


def test_the_record_can_be_decided_again(finished):
    record = read(finished / report.RECORD)
    assert len(record.decisions) == 4
    assert record.decisions[-1].loss is not None
    assert all(replayed.same for replayed in replay(record))


def test_the_settings_are_kept_and_the_picture_is_drawn(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["steps"], config["shape"]["width"]) == (45, 16)
    assert (finished / "plot.png").stat().st_size > 10_000
    assert "NoiseAwareAdamW, held out" in (finished / "report.html").read_text(encoding="utf-8")
    assert len((finished / "decisions.csv").read_text().splitlines()) == 5
    assert cli.main(["report", str(finished)]) == 0


def points_of(optimizer_of, settings=TINY):
    torch.manual_seed(settings.seed)
    model, points = GPT(settings.shape), []
    optimizer = optimizer_of(model)
    train("arm", model, optimizer, load(), settings, Clock(), points.append)
    return [
        replace(point, validation_loss=repr(point.validation_loss), updates=0) for point in points
    ]


def test_the_loop_is_the_same_for_both():
    def switched_off(model):
        kind = {"lr": TINY.lr, "betas": TINY.betas, "weight_decay": TINY.weight_decay}
        return NoiseAwareAdamW(model.parameters(), noise="off", **kind)

    unclipped = replace(TINY, max_norm=math.inf)
    assert points_of(switched_off) == points_of(lambda model: adamw(model, TINY), unclipped)


def test_the_schedule_rises_then_falls_to_a_tenth():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, replace(TINY, steps=200))
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert all(after <= before for before, after in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2, rel=1e-3)


def test_wandb_gets_an_offline_run_for_each_arm(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert prepare(TINY, Path("runs"), "tracked", force=False, track=True).run() == 0
    folder = tmp_path / "runs" / "tracked"
    runs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == len(ARMS)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    end = time.monotonic() + 20
    while b"noise/samples" not in runs[1].read_bytes():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert b"noise/samples" not in runs[0].read_bytes()
    assert "wandb: " not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("arm", list(ARMS))
def test_an_interrupted_run_keeps_and_shows_what_was_done(tmp_path, monkeypatch, capsys, arm):
    add = LossTable.add

    def add_then_interrupt(table, point):
        add(table, point)
        if point.arm == arm and point.samples == 120:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does

    monkeypatch.setattr(LossTable, "add", add_then_interrupt)
    assert Demo(TINY, make(tmp_path, "cut", force=False), track=False).run() == 130
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert summary["interrupted"]
    assert list(summary["arms"])[-1] == arm
    assert summary["arms"][arm]["samples"] == 120
    assert (tmp_path / "cut" / "plot.png").exists()
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_command_with_130(tmp_path):
    call = ("-m", "noiseopt", "demo", "--steps", "360", "--batch-size", "1", "--no-wandb")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        [sys.executable, *call, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        losses = tmp_path / "demo" / report.LOSSES
        end = time.monotonic() + 120
        while not losses.exists() or len(losses.read_text().splitlines()) < 3:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Run demo, seed 0" in printed
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["interrupted"]


def test_a_second_run_of_a_name_leaves_the_first_alone(tmp_path):
    first = make(tmp_path, "run", force=False)
    (first / "config.json").write_text("{}")
    (first / "mine").touch()
    assert make(tmp_path, "run", force=False) == tmp_path / "run-2"
    assert make(tmp_path, "run", force=False) == tmp_path / "run-3"
    assert (first / "mine").exists()
    assert make(tmp_path, "run", force=True) == first
    assert not list(first.iterdir())


def test_force_deletes_nothing_but_runs(tmp_path, capsys):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    call = ["demo", "--out", str(tmp_path), "--force", "--name", "documents"]
    assert cli.main(call) == 1
    assert "is not a run of the demo" in capsys.readouterr().err
    assert (tmp_path / "documents" / "letter").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp"])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(ValueError, match="without a path"):
        make(tmp_path, name, force=True)


@pytest.mark.parametrize(
    "arguments", [[], ["demo", "--steps", "0"], ["demo", "--lr", "x"], ["report"], ["fly"]]
)
def test_a_wrong_call_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: noiseopt" in capsys.readouterr().err


def test_without_its_extra_the_demo_says_what_to_install(tmp_path):
    program = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "rich" else found(name, *rest)
from noiseopt import cli
sys.exit(cli.main(["demo", "--out", {str(tmp_path)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the demo needs rich: pip install 'noiseopt[demo]'" in done.stderr
    assert not list(tmp_path.iterdir())
