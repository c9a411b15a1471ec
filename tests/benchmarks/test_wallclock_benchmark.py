"""The wall-clock benchmark: its smoke run, and the arithmetic behind its table."""

import json
from dataclasses import replace

import pytest

from benchmarks import recording
from benchmarks import wallclock as bench


def made(arm, seed, losses, per_update=4.0, window=1, role="reported"):
    """A run of ten micro-batches between two copies, one second each."""
    curve, seconds = [], 0.0
    for index, loss in enumerate(losses, start=1):
        done = 10 * index
        seconds = done + per_update * done / window
        curve.append((done, done // window, seconds, loss))
    head = ("autoencoder", arm, role, seed, 1e-3, 0.9, 1.0, 4.0)
    names = ("micro_batches", "updates", "seconds", "val_loss")
    return bench.Run(*head, curve[-1][1], seconds, names, curve, [], None)


FALLING = [1.0, 0.8, 0.6, 0.5]
RUNS = [
    made("constant-1", 101, FALLING, role="target"),
    made("constant-1", 1, FALLING),
    made("constant-2", 1, [1.0, 0.8, 0.6, 0.54], window=2),
    made("constant-16", 1, [1.0, 0.9, 0.8, 0.8], window=10),
    made("time", 1, FALLING, window=5),
]


def test_a_time_is_read_off_between_two_copies():
    run = RUNS[1]
    assert bench.at_target(run, 1.0) == (10, 10, 50.0)
    assert bench.at_target(run, 0.55) == pytest.approx((35, 35, 175.0))
    assert bench.at_target(run, 0.4) is None
    assert bench.loss_at(run, 0.9) == pytest.approx(0.54)


def test_costs_come_from_the_constants():
    slow = replace(RUNS[4], seconds=1e6)
    assert bench.costs_of([*RUNS[1:4], slow]) == pytest.approx((4.0, 1.0))


def test_ratios_are_to_the_quickest_constant_that_reached_the_target():
    rows = {row.arm: row for row in bench.summary(RUNS) if row.share == 0.9}
    assert {arm: row.reached for arm, row in rows.items()} == {
        "constant-1": 1,
        "constant-2": 1,
        "constant-16": 0,
        "time": 1,
    }
    assert rows["constant-2"].ratio == 1.0
    assert rows["constant-16"].ratio is None
    assert rows["time"].ratio == rows["time"].ratios[0]
    assert rows["time"].ratio == pytest.approx(36 * 1.8 / (40 * 3), rel=1e-3)
    assert rows["time"].modelled_ratio == pytest.approx(rows["time"].ratio, rel=1e-3)


def test_the_page_says_whether_the_criterion_is_met():
    origin = recording.origin_of("wallclock.py", [])
    assert "0.54: met." in bench.table(RUNS, origin)
    missed = [*RUNS[:4], replace(RUNS[4], curve=RUNS[4].curve[:2])]
    assert "on 0 seeds: missed." in bench.table(missed, origin)


@pytest.mark.parametrize("workload", bench.MAIN)
def test_every_constant_was_tuned(workload):
    tuned = bench.tuned(workload)
    assert set(tuned) == set(bench.CONSTANTS)
    assert all(lr > 0 and 0.9 <= beta2 < 1 for _, (lr, beta2) in tuned.values())


@pytest.mark.distributed
def test_the_smoke_run_writes_every_arm(tmp_path, monkeypatch):
    plan = replace(bench.QUICK, micro_batches=64)
    monkeypatch.setattr(bench, "QUICK", plan)
    bench.main(["--quick", "--output", str(tmp_path / "wallclock.json")])
    records = json.loads((tmp_path / "wallclock.json").read_text())
    assert [record["role"] for record in records] == ["target", *["reported"] * len(plan.arms)]
    assert [record["arm"] for record in records[1:]] == list(plan.arms)
    for record in records[1:]:
        assert record["curve"][-1][:2] == [64, record["updates"]]
        assert record["link"] == pytest.approx(4 * record["micro_batch"])
        assert record["seconds"] > record["updates"] * record["link"]
    updates = {record["arm"]: record["updates"] for record in records[1:]}
    assert (updates["constant-1"], updates["constant-4"]) == (64, 16)
    assert "| time |" in (tmp_path / "wallclock.md").read_text()
