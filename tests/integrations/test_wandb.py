"""The wandb observer against a real offline run, read back from the file that wandb wrote.

What matters: the rows and the step of the user's own logging are those of a run without it.
"""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from noiseopt.control import Controller, NoiseConfig, Start, Window, metrics, sqrt_gain
from noiseopt.estimate import WindowNorms
from noiseopt.integrations.wandb import WandbObserver
from tests.integrations.offline import Written

wandb = pytest.importorskip("wandb")

CONFIG = NoiseConfig(accumulation_steps=2, samples_per_micro_batch=4)
START = Start.of_run(CONFIG, "adam", ("decayed", "rest"))


def decisions(count):
    controller = Controller.create(CONFIG, sqrt_gain, num_groups=2)
    for index in range(count):
        small, big = 5.0 + index % 3 / 2, 3.0 + index % 2
        norms = WindowNorms((small, 2 * small), (big, 2 * big), 4.0, 8.0, 2, 8.0)
        controller = controller.learn(Window(norms, micro_batches=2))
        controller, decision = controller.decide(lr=1e-3)
        yield decision


def observing(run, **arguments):
    """An observer of every decision, as an optimizer has it."""
    observer = WandbObserver(run, **{"seconds": 0} | arguments)
    observer.on_start(lambda: START)
    return observer


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
    observer = observing(with_us)
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


def train_beside(run, observer, number=30):
    """A run whose loop logs for itself after each decision."""
    made = list(decisions(number))
    for decision in made:
        observer(decision)
        run.log({"loss": 1.0})
    observer.close()
    run.finish()
    return made


def test_what_is_logged_is_read_back(tmp_path, offline):
    run = offline("run")
    observer = observing(run)
    made = train_beside(run, observer)

    written = Written(tmp_path / "run")
    for decision, row in zip(made, written.rows, strict=True):
        assert metrics(decision, START.groups).items() <= row.items()
    assert written.metrics["noise/samples"].options.defined
    for section in ("noise/*", "decide/*", "clip/*", "group/*"):
        assert written.metrics[section].step_metric == "noise/samples"
    assert written.config["noiseopt"]["accumulation_steps"] == 2
    assert written.config["noiseopt"]["max_norm"] == "inf"
    assert metrics(made[-1], START.groups).items() <= written.summary.items()
    assert "group/decayed/scale" in written.summary


def test_a_value_that_ends_unknown_does_not_stay_in_the_summary(tmp_path, offline):
    run = offline("run")
    observer = observing(run)
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
    observer = observing(run, commit=True)
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
    observer = observing(run)
    run.finish()
    first, second, third = decisions(3)
    with pytest.warns(RuntimeWarning, match="logs nothing more to wandb"):
        observer(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observer(second)
        observer(third)
        observer.close()


def test_no_more_is_logged_than_the_cadence_allows(tmp_path, offline):
    run = offline("run")
    observer = observing(run, seconds=1000)
    made = train_beside(run, observer)
    written = Written(tmp_path / "run")
    assert [row.get("noise/samples") for row in written.rows] == [8, *[None] * 29]
    assert metrics(made[-1], START.groups).items() <= written.summary.items()


def test_the_changes_are_a_table(tmp_path, offline):
    run = offline("run")
    observer = observing(run)
    *_, known = decisions(30)
    changes = [
        replace(known, action="grow", num_updates=30 + index, reason=f"<reason {index}>")
        for index in range(3)
    ]
    for decision in (known, *changes):
        observer(decision)
    observer.close()
    run.finish()
    assert Written(tmp_path / "run").summary["decide/changes"]["nrows"] == 3
    *_, last = sorted(tmp_path.rglob("*.table.json"), key=lambda path: path.stat().st_mtime)
    table = json.loads(last.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["update"] for row in rows] == [30, 31, 32]
    assert rows[1]["reason"] == "<reason 1>"
    assert rows[0]["noise_scale"] == known.noise.scale
    assert rows[0]["max_norm"] is None  # infinite


def test_what_was_saved_is_summed_up(tmp_path, offline):
    """By hand: at a noise scale N the same progress takes another number of samples."""
    run = offline("run")
    observer = observing(run)
    *_, known = decisions(30)
    noise = replace(known.noise, scale=24.0)
    first = replace(known, noise=noise, num_updates=0, samples_seen=0.0, reference_updates=0.0)
    last = replace(first, num_updates=10, samples_seen=160.0, reference_updates=20.0)
    observer(first)
    observer(last)
    observer.close()
    run.finish()
    summary = Written(tmp_path / "run").summary
    assert summary["decide/updates_saved"] == 10
    # Batches of 16 in place of 8: 10 (1 + 24/8) / (1 + 24/16) updates of 8 would have done.
    assert summary["decide/samples_saved"] == pytest.approx(8 * 10 * (1 + 3) / (1 + 1.5) - 160)
    assert summary["clip/share_clipped"] == 0


def test_alerts_tell_of_trouble(tmp_path, offline):
    run = offline("run")
    observer = observing(run)
    *_, known = decisions(30)
    observer(known)
    observer(replace(known, total_skipped=2))
    observer(replace(known, total_skipped=2, clip_coefficient=0.05))
    observer(replace(known, total_skipped=2, action="revert", reason="the loss runs above"))
    observer.on_error(RuntimeError("ranks disagree on the learning rate"))
    run.finish()
    alerts = Written(tmp_path / "run").alerts
    assert [(alert.title.removeprefix("noiseopt: "), alert.level) for alert in alerts] == [
        ("gradients are not finite", "WARN"),
        ("the gradient spikes", "WARN"),
        ("a change was reverted", "WARN"),
        ("noiseopt stopped", "ERROR"),
    ]
    assert "2 micro-batches were left out" in alerts[0].text
    assert "the loss runs above" in alerts[2].text
    assert "disagree on the learning rate" in alerts[3].text


def test_two_optimizers_share_a_run_under_names_of_their_own(tmp_path, offline):
    run = offline("run")
    actor, critic = observing(run), observing(run, prefix="critic/")
    for one, other in zip(decisions(10), decisions(20), strict=False):
        actor(one)
        critic(replace(other, lr=0.5))
        run.log({"loss": 1.0})
    actor.close()
    critic.close()
    run.finish()
    written = Written(tmp_path / "run")
    assert {row["decide/lr"] for row in written.rows} == {1e-3}
    assert {row["critic/decide/lr"] for row in written.rows} == {0.5}
    assert written.metrics["critic/noise/*"].step_metric == "critic/noise/samples"
    assert {"noiseopt", "critic/noiseopt"} <= written.config.keys()


def test_settings_that_a_resumed_run_or_a_sweep_holds_are_replaced(tmp_path, offline):
    run = offline("run")
    run.config.update({"noiseopt": {"accumulation_steps": 9}, "mine": 1})
    observing(run)(next(decisions(1)))
    run.finish()
    config = Written(tmp_path / "run").config
    assert config["noiseopt"]["accumulation_steps"] == 2
    assert config["mine"] == 1


def test_a_run_that_was_resumed_is_counted_from_its_checkpoint(tmp_path, offline):
    """What was skipped before is no new trouble, and fewer updates are no negative progress."""
    run = offline("run")
    made = [replace(decision, total_skipped=3) for decision in decisions(30)]
    state = replace(START.state, num_updates=20, total_skipped=3)
    estimator = replace(state.estimator, samples_seen=made[19].samples_seen)
    start = replace(START, state=replace(state, estimator=estimator))
    observer = WandbObserver(run, seconds=0)
    for _ in range(2):
        observer.on_start(lambda: start)
        for decision in made[20:]:
            observer(decision)
    observer.close()
    run.finish()
    assert not Written(tmp_path / "run").alerts
    assert observer._progress.updates == 2 * 10


def test_a_run_that_is_switched_off_disturbs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = wandb.init(mode="disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observer = observing(run)
        for decision in decisions(30):
            observer(replace(decision, action="revert"))
        observer.close()
    run.finish()


def test_whatever_wandb_raises_is_warned_of_once(offline, monkeypatch):
    run = offline("run")
    observer = observing(run)
    called = []

    def fail(*arguments, **options):
        called.append(arguments)
        raise ConnectionError("the network is away")

    monkeypatch.setattr(run, "log", fail)
    made = decisions(30)
    with pytest.warns(RuntimeWarning, match="the network is away") as caught:
        observer(next(made))
    for decision in made:
        observer(decision)
    observer.close()
    assert (len(caught), len(called)) == (1, 1)


def test_a_negative_cadence_is_refused(offline):
    with pytest.raises(ValueError, match="seconds is -1"):
        WandbObserver(offline("run"), seconds=-1)


def test_where_wandb_is_absent_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'noiseopt\[wandb\]'"):
        WandbObserver()


def test_alerts_that_fail_take_nothing_else_with_them(tmp_path, offline, monkeypatch):
    run = offline("run")
    observer = observing(run)

    def fail(*arguments, **options):
        raise ConnectionError("no messages today")

    monkeypatch.setattr(run, "alert", fail)
    first, *others = decisions(10)
    with pytest.warns(RuntimeWarning, match="wandb's alerts"):
        observer(replace(first, action="revert"))
    for decision in others:
        observer(replace(decision, action="revert"))
        run.log({"loss": 1.0})
    observer.close()
    run.finish()
    assert len(Written(tmp_path / "run").rows) == 9


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
