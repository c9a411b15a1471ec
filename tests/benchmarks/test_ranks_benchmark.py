import json
import math
from functools import partial

import pytest

from benchmarks import ranks as bench
from benchmarks import recording
from tests.distributed.ranks import NEEDS_FSDP2

pytestmark = NEEDS_FSDP2

TINY = bench.SIZES["tiny"]
PLAN = bench.Plan((TINY,), ranks=(2,), steps=2, rounds=1, together=True)
ARMS = {
    1: [bench.REFERENCE, bench.CONTROL, bench.OURS, bench.NOT_SENT],
    bench.WINDOW: [
        bench.REFERENCE,
        bench.CONTROL,
        bench.OURS,
        bench.ACCUMULATING,
        bench.EVERY,
    ],
}
PROFILED = [(1, bench.REFERENCE), (1, bench.OURS), (bench.WINDOW, bench.ACCUMULATING)]


@pytest.fixture(scope="module")
def results():
    return [record for records in bench.run(PLAN, list(bench.TASKS)) for record in records]


def of(results, kind):
    return [record for record in results if isinstance(record, kind)]


@pytest.mark.distributed
def test_every_comparison_has_every_arm(results):
    found = [(c.wrapping, c.window, c.arm) for c in of(results, bench.Cost)]
    assert sorted(found) == sorted(
        (wrapping, window, arm)
        for wrapping in bench.WRAPPINGS
        for window, arms in ARMS.items()
        for arm in arms
    )


@pytest.mark.distributed
def test_every_arm_is_compared_with_the_plain_loop(results):
    for c in of(results, bench.Cost):
        assert c.rounds == PLAN.steps / TINY.block
        for ratio in (c.wall, c.cpu):
            assert 0 < ratio[0] <= ratio[1] <= ratio[2]
            assert ratio == (1, 1, 1) or c.arm != bench.REFERENCE
        assert (c.target is not None) == (c.arm in (bench.OURS, bench.ACCUMULATING))
        assert c.holds == (c.target and "too few rounds")


@pytest.mark.distributed
def test_parts_are_within_the_update_and_called_as_often_as_they_should(results):
    cells = {}
    for share in of(results, bench.Share):
        cells.setdefault((share.wrapping, share.window, share.arm), []).append(share)
    assert set(cells) == {(w, *cell) for w in bench.WRAPPINGS for cell in PROFILED}
    parameters = sum(1 for _ in bench.GPT(TINY.shape).parameters())
    for (wrapping, window, arm), parts in cells.items():
        assert sum(part.share for part in parts) < 1
        calls = {part.where: part.calls for part in parts}
        assert calls["torch's step"] == 1
        assert calls.get(bench.ROW, 0) == (arm != bench.REFERENCE)
        averages = wrapping == "DDP" and arm == bench.ACCUMULATING
        assert calls.get(bench.GRADIENTS, 0) == averages
        if arm != bench.REFERENCE and not averages:
            assert calls["norms as gradients arrive"] == parameters * window


def traffic_of(results, wrapping):
    found = {t.arm: t for t in of(results, bench.Traffic) if t.wrapping == wrapping}
    assert set(found) == set(bench.TRAFFIC)
    assert all(t.loopback > t.bytes for t in found.values())
    return found


@pytest.mark.distributed
def test_a_long_window_sends_an_eighth(results):
    found = traffic_of(results, "DDP")
    for t in found.values():
        averaged = t.window if t.arm in (bench.EVERY, "ours, without accumulate()") else 1
        # On two ranks each sends about one gradient, besides which the row is little.
        assert t.bytes == pytest.approx(2 * averaged * t.gradient, rel=0.01)
    assert found[bench.ACCUMULATING].of_every == pytest.approx(1 / 8, rel=0.01)


@pytest.mark.distributed
def test_a_long_window_of_fsdp2_sends_its_parameters_all_the_same(results):
    """And of its gradients an eighth: as much as the loop that puts them off by itself."""
    found = traffic_of(results, "FSDP2")
    ours = found[bench.ACCUMULATING]
    one, every = found[bench.REFERENCE], found[bench.EVERY]
    assert ours.bytes == pytest.approx(found["plain, no_sync"].bytes, rel=0.01)
    assert every.bytes == pytest.approx(ours.window * one.bytes, rel=0.01)
    gradients = (every.bytes - ours.bytes) / (ours.window - 1)
    parameters = (ours.bytes - gradients) / ours.window
    assert gradients >= ours.gradient
    assert parameters >= ours.gradient
    assert one.bytes == pytest.approx(gradients + parameters, rel=0.01)


@pytest.mark.distributed
def test_the_row_is_timed_as_large_as_it_is(results):
    (row,) = of(results, bench.Row)
    assert row.ranks == 2
    assert row.bytes == 8 * bench.row_numbers()
    assert row.alone_us[0] <= row.alone_us[1] <= row.alone_us[2]
    assert row.share == pytest.approx(row.inside_us[1] / row.update_ms[1] / 1e3, abs=1e-4)
    assert 0 < row.share < 1


@pytest.mark.distributed
def test_predictions_start_from_what_was_sent(results):
    found = of(results, bench.Prediction)
    (row,) = of(results, bench.Row)
    assert {p.source for p in found} <= {"assumed", "measured here"}
    assert [p.ranks for p in found if p.source == "assumed"] == list(bench.PREDICTED_RANKS)
    assert {p.bytes for p in found} == {row.bytes}


def test_the_model_is_a_tree_of_hops_and_a_link():
    size = int(bench.LINK_BYTES_PER_SECOND)
    assert bench.row_seconds(2, 0) == pytest.approx(bench.HOP_SECONDS)
    assert bench.row_seconds(1024, 0) == pytest.approx(10 * bench.HOP_SECONDS)
    assert bench.row_seconds(5, size, hop=1.0) == pytest.approx(4.0)
    last = bench.predictions(168, 1e-3, "told")[-1]
    assert last.ranks == 1024
    assert last.row_us == pytest.approx(1e4, rel=1e-3)
    for update, share in zip(last.updates_s, last.shares, strict=True):
        assert share == pytest.approx(1e-2 / (update + 1e-2), abs=1e-5)


def test_a_hop_is_measured_where_each_rank_has_a_core():
    row = partial(bench.Row, "row", size="tiny", bytes=168)
    rows = [
        row(1, 4, alone_us=(1, 1, 1)),
        row(4, 4, alone_us=(90.0, 100.0, 120.0)),
        row(8, 4, alone_us=(900, 1000, 1200)),
    ]
    assert bench.measured_hop(rows) == pytest.approx(50e-6)
    assert bench.measured_hop(rows[:1]) is None


def test_an_update_is_as_slow_as_its_slower_rank():
    ranks = [[(1.0, 0.5), (4.0, 0.5)], [(3.0, 1.0), (2.0, 2.0)]]
    assert bench.updates_of(ranks) == ([3.0, 4.0], [1.5, 2.5])
    assert bench.median_round([3.0, 4.0, 5.0, 8.0, 1.0, 1.0], block=2) == 3.5


def test_ratios_are_those_of_the_times():
    plain, ours = [(2.0, 1.0), (3.0, 1.0)] * 4, [(2.2, 1.0), (3.3, 1.5)] * 4
    slower = {bench.REFERENCE: plain, bench.OURS: ours}
    faster = dict.fromkeys(slower, [(1.0, 0.0)] * 8)
    reference, record = bench.costs("DDP", TINY, 1, [faster, slower])
    assert (reference.wall_ms, reference.cpu_ms, reference.wall) == (2500, 1000, (1, 1, 1))
    assert (record.wall_ms, record.cpu_ms) == (2750, 1250)
    assert record.wall == (1.1, 1.1, 1.1)
    assert record.cpu == (1.25, 1.25, 1.25)
    assert (record.arm, record.rounds, record.holds) == (bench.OURS, 4, "too few rounds")


def test_each_value_is_compared_with_the_one_beside_it():
    theirs = [1.0 + 0.3 * (number % 7) for number in range(40)]
    assert bench.ratio([1.5 * value for value in theirs], theirs) == (1.5, 1.5, 1.5)
    ours = [value * (1 + 0.1 * (number % 3)) for number, value in enumerate(theirs)]
    low, middle, high = bench.ratio(ours, theirs)
    assert low <= middle == 1.1 <= high
    assert low < high


def test_what_is_dear_at_one_place_of_a_round_counts_by_its_share():
    theirs = [1.0, 2.0] * 20
    ours = [1.0, 2.8] * 20
    assert bench.ratio(ours, theirs, block=2) == (1.2, 1.2, 1.2)
    ours[7] = 100.0  # something else ran on the machine
    assert bench.ratio(ours, theirs, block=2)[1] == 1.2


@pytest.mark.parametrize(
    ("interval", "word"),
    [((0.9, 1.0, 1.01), "yes"), ((1.0, 1.01, 1.02), "within noise"), ((1.02, 1.03, 1.1), "no")],
)
def test_a_target_holds_if_the_interval_is_below_it(interval, word):
    assert bench.verdict(interval, 1.01, rounds=bench.MIN_ROUNDS) == word
    assert bench.verdict(interval, 1.01, rounds=bench.MIN_ROUNDS - 1) == "too few rounds"


def test_time_inside_a_watched_function_is_not_counted_twice():
    class Work:
        def outer(self):
            self.inner()
            self.inner()

        def inner(self):
            return math.factorial(3000)

    watch = bench.Stopwatch()
    with watch.on([(Work, "outer", "outer"), (Work, "inner", "inner")]):
        Work().outer()
    Work().outer()
    assert watch.calls == {"outer": 1, "inner": 2}
    assert 0 < watch.seconds["outer"] < watch.seconds["inner"]


def test_sizes_are_what_their_names_say():
    for name, millions in (("1M", 1), ("10M", 10)):
        assert bench.count(bench.SIZES[name].shape) / 1e6 == pytest.approx(millions, rel=0.05)


def test_records_are_appended(results, tmp_path):
    origin = bench.origin_of(["--quick"])
    recording.append(results[:2], origin, tmp_path / bench.NAME)
    recording.append(results[-1:], origin, tmp_path / bench.NAME)
    records = json.loads((tmp_path / "ranks.json").read_text())
    assert [record["part"] for record in records] == ["cost", "cost", "prediction"]
    for record in records:
        assert record["command"] == "python benchmarks/ranks.py --quick"
        assert {"commit", "device", "versions"} <= set(record)
