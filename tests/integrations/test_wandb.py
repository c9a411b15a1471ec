"""The wandb observer against a real offline run, read back from the file that wandb wrote.

What matters: the rows and the step of the user's own logging are those of a run without it.
"""

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from noiseopt.control import Controller, NoiseConfig, Window, metrics, sqrt_gain
from noiseopt.estimate import WindowNorms
from noiseopt.integrations.wandb import WandbObserver
from tests.integrations.offline import Written

wandb = pytest.importorskip("wandb")

CONFIG = NoiseConfig(accumulation_steps=2, samples_per_micro_batch=4)


def decisions(count):
    controller = Controller.create(CONFIG, sqrt_gain)
    for index in range(count):
        norms = WindowNorms.from_micro_batches([5.0, 5.0 + index % 3], 3.0 + index % 2, [4, 4])
        controller = controller.learn(Window(norms, micro_batches=2))
        controller, decision = controller.decide(lr=1e-3)
        yield decision


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Start offline runs, each in a folder of its own."""
    monkeypatch.setenv("WANDB_SILENT", "true")

    def start(name):
        (tmp_path / name).mkdir()
        quiet = {"console": "off", "disable_git": True, "x_disable_stats": True}
        return wandb.init(
            mode="offline", dir=tmp_path / name, settings=wandb.Settings(silent=True, **quiet)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield start
        if wandb.run is not None:
            wandb.finish()


def train(run, observe):
    """Log as users do: plain rows, rows at a step of their own, several at one step."""
    made = iter(decisions(40))
    for step in range(10):
        observe(next(made))
        run.log({"loss": 1.0 / (1 + step)})
    for step in range(20, 50, 10):
        run.log({"loss": 1.0 / step}, step=step)
        observe(next(made))
        run.log({"validation": 2.0 / step}, step=step)
        observe(next(made))
    return run.step


def test_a_users_rows_and_steps_are_those_of_a_run_without_us(tmp_path, offline):
    with_us = offline("with")
    observer = WandbObserver(with_us, CONFIG)
    steps = [train(with_us, observer)]
    observer.close()
    with_us.finish()
    without = offline("without")
    steps.append(train(without, lambda decision: None))
    without.finish()

    found, expected = Written(tmp_path / "with"), Written(tmp_path / "without")
    assert steps[0] == steps[1]
    assert found.own_rows() == expected.own_rows()
    assert len(found.own_rows()) == 13
    assert all("noise/samples" in row for row in found.rows)


def test_what_is_logged_is_read_back(tmp_path, offline):
    run = offline("run")
    observer = WandbObserver(run, CONFIG)
    made = list(decisions(30))
    for decision in made:
        observer(decision)
        run.log({"loss": 1.0})
    observer.close()
    run.finish()

    written = Written(tmp_path / "run")
    for decision, row in zip(made, written.rows, strict=True):
        assert metrics(decision).items() <= row.items()
    assert written.metrics["noise/samples"].options.defined
    for section in ("noise/*", "decide/*", "clip/*"):
        assert written.metrics[section].step_metric == "noise/samples"
    assert written.config["noiseopt"]["accumulation_steps"] == 2
    assert written.config["noiseopt"]["max_norm"] == "inf"
    assert metrics(made[-1]).items() <= written.summary.items()


def test_a_value_that_ends_unknown_does_not_stay_in_the_summary(tmp_path, offline):
    run = offline("run")
    observer = WandbObserver(run)
    *_, known = decisions(30)
    observer(known)
    run.log({"loss": 1.0})
    lost = replace(known, noise=replace(known.noise, scale=math.inf), loss=math.nan)
    observer(lost)
    run.log({"loss": 2.0})
    observer.close()
    run.finish()

    first, second = Written(tmp_path / "run").rows
    assert "noise/scale" in first
    assert "noise/scale" not in second
    assert Written(tmp_path / "run").summary["noise/scale"] is None


def test_rows_of_its_own_when_asked(tmp_path, offline):
    run = offline("run")
    observer = WandbObserver(run, commit=True)
    for decision in decisions(5):
        observer(decision)
    run.finish()
    samples = [row["noise/samples"] for row in Written(tmp_path / "run").rows]
    assert samples == [8, 16, 24, 32, 40]


def test_the_active_run_is_found(tmp_path, offline):
    with pytest.raises(ValueError, match="no wandb run is active"):
        WandbObserver()
    run = offline("run")
    observer = WandbObserver()
    observer(next(decisions(1)))
    run.log({"loss": 1.0})
    run.finish()
    assert [row["noise/samples"] for row in Written(tmp_path / "run").rows] == [8]


def test_a_run_that_has_ended_is_warned_of_once(offline):
    run = offline("run")
    observer = WandbObserver(run)
    run.finish()
    first, second, third = decisions(3)
    with pytest.warns(RuntimeWarning, match="logs nothing more to wandb"):
        observer(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observer(second)
        observer(third)
        observer.close()


def test_importing_it_does_not_import_wandb():
    program = "import sys, noiseopt.integrations.wandb; print('wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
