"""The clipping benchmark: rivals against hand-computed numbers, injections, counts, a run."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.clipping import __main__ as bench
from benchmarks.clipping import table
from benchmarks.clipping import train as training
from benchmarks.clipping.metrics import measured
from benchmarks.clipping.rules import RULES, AdaGC, AutoClip, Fixed, NoClipping, ZClip
from benchmarks.clipping.scenarios import FULL_LENGTH, SCENARIOS, Injection, Plan, Scenario
from benchmarks.clipping.tasks import TASKS, Task
from benchmarks.clipping.train import OURS, Trace, train

pytest.importorskip("sklearn")
PLAN = Plan(((1, 40), (2, 20), (4, 10), (2, 10), (1, 40)))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Line(nn.Module):
    """A linear regression whose labels are counts, so that labels can be drawn anew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, y):
        return (self.layer(x).squeeze(1) - y).square().mean()


def line_batches(split, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, 4, generator=generator)
        yield x, (3 * x[:, 0]).round()


LINE = Task(
    build=Line,
    batches=line_batches,
    held_out=lambda split: [next(line_batches(split, 10_000))],
    other=lambda batch: (-batch[0], batch[1]),
    lr=0.01,
)


def grads(*norms):
    """One gradient of each norm."""
    return [torch.tensor([3.0, 4.0], dtype=torch.float64) * norm / 5 for norm in norms]


def clipped(rule, *norms):
    """The norms that a rule leaves of one tensor's, in turn."""
    left = []
    for norm in norms:
        tensors = grads(norm)
        rule.clip_(tensors)
        left.append(tensors[0].norm().item())
    return left


# ---------------------------------------------------------------- the rivals


def test_a_fixed_norm_scales_all_tensors_alike():
    tensors = grads(3.0, 4.0)
    Fixed(1.0).clip_(tensors)
    assert [t.norm().item() for t in tensors] == pytest.approx([0.6, 0.8])
    assert clipped(Fixed(1.0), 0.5, 1.0) == [0.5, 1.0]


def test_no_clipping_leaves_gradients():
    assert clipped(NoClipping(), 1e6) == [1e6]


def test_autoclip_is_the_percentile_of_all_norms_so_far():
    # numpy's linear percentile, rank p (n - 1): of 1, 1 -> 1; of 1, 3 -> 1 + 0.1 * 2;
    # of 1, 2, 3 -> 1 + 0.2
    assert clipped(AutoClip(), 1.0, 3.0, 2.0) == pytest.approx([1.0, 1.2, 1.2])


def test_zclip_follows_its_formulas():
    rule = ZClip(max_norm=math.inf, warm_up=2, epsilon=0.0)
    # mean 2 and deviation 1 from the warm-up; z = 10 - 2 = 8 leads to 2 + 2.5^2 / 8 = 2.78125,
    # which is what the averages learn from: the mean first, then the variance around it.
    assert clipped(rule, 1.0, 3.0, 10.0) == pytest.approx([1.0, 3.0, 2.78125])
    mean = 0.97 * 2 + 0.03 * 2.78125
    variance = 0.97 + 0.03 * (2.78125 - mean) ** 2
    assert (rule._mean, rule._variance) == pytest.approx((mean, variance))
    within = mean + 2.49 * math.sqrt(variance)
    assert clipped(rule, within) == pytest.approx([within])


def test_zclip_has_a_ceiling_besides():
    assert clipped(ZClip(warm_up=2), 0.5, 3.0, 0.9) == pytest.approx([0.5, 1.0, 0.9])


def test_adagc_clips_each_tensor_at_its_own_average():
    rule = AdaGC(warm_up=2)
    for first, second in ((0.3, 0.4), (3.0, 4.0)):
        rule.clip_(grads(first, second))
    # the second was clipped as a whole to 0.6 and 0.8, above the least so far
    assert rule._gammas == pytest.approx([0.3, 0.4])
    tensors = grads(1.0, 0.2)
    rule.clip_(tensors)
    assert [t.norm().item() for t in tensors] == pytest.approx([1.05 * 0.3, 0.2])
    expected = [0.98 * 0.3 + 0.02 * 1.05 * 0.3, 0.98 * 0.4 + 0.02 * 0.2]
    assert rule._gammas == pytest.approx(expected)


def test_published_settings_are_the_defaults():
    zclip, adagc, autoclip = ZClip(), AdaGC(), AutoClip()
    assert (zclip.alpha, zclip.z, zclip.warm_up, zclip.max_norm) == (0.97, 2.5, 25, 1.0)
    assert (adagc.beta, adagc.relative, adagc.warm_up, adagc.max_norm) == (0.98, 1.05, 100, 1.0)
    assert autoclip.percentile == 10


# ---------------------------------------------------------------- plan and injections


def test_the_batch_doubles_and_halves():
    windows = list(Plan().windows())
    assert len(windows) == Plan().updates == FULL_LENGTH
    assert sum(windows) == Plan().micro_batches == 1890
    changes = [new for old, new in pairwise(windows[320:]) if new != old]
    assert changes[:4] == [4, 2, 1, 2]  # the last is a probe
    probes = [*range(8, 321, 8)]  # the first 64, which come four times as often
    assert [update + 1 for update in range(320) if windows[update] == 2] == probes


def test_a_phase_ends_where_ours_can_decide():
    with pytest.raises(ValueError, match="multiple of 10"):
        Plan(((1, 15), (2, 10)))


def test_injections_are_where_they_are_said_to_be():
    plan = Plan()
    factors = {
        update: found.factor
        for update in range(plan.updates)
        if (found := SCENARIOS["outliers"].injection(update, plan))
    }
    assert list(factors) == list(range(150, 1120, 50))
    assert list(factors.values())[:4] == [10, 100, 1000, 10]
    noisy = [u for u in range(1120) if SCENARIOS["label noise"].injection(u, plan)]
    assert noisy == list(range(440, 600))
    early = [u for u in range(1120) if SCENARIOS["early outliers"].injection(u, plan)]
    assert early == [30, 60, 90]
    assert not any(SCENARIOS["clean"].injection(u, plan) for u in range(1120))
    switched = [SCENARIOS["domain switch"].switched(u, plan) for u in (559, 560)]
    assert switched == [False, True]


def test_an_injection_spoils_the_batch():
    inputs, labels = torch.zeros(500, 2), torch.full((500,), 3)
    generator = torch.Generator().manual_seed(0)
    same, wrong = Injection(wrong_labels=0.5).apply((inputs, labels), generator)
    # a tenth of what is drawn anew is right by chance
    assert torch.equal(same, inputs)
    assert (wrong != labels).float().mean().item() == pytest.approx(0.45, abs=0.1)
    nans, right = Injection(nan_inputs=True).apply((inputs, labels), generator)
    assert nans.isnan().all()
    assert torch.equal(right, labels)


def test_one_micro_batch_of_a_window_is_spoiled_and_a_switch_changes_all():
    batches = line_batches("tuning", 0)
    clean = list(zip(range(4), line_batches("tuning", 0), strict=False))
    outlier = Scenario((Injection(factor=10.0),), first=0)
    window, is_clean = training.window_of(batches, 4, 1, LINE, outlier, Plan())
    assert not is_clean
    assert [part.factor for part in window] == [1, 1, 1, 10]
    assert all(torch.equal(part.batch[0], b[0]) for part, (_, b) in zip(window, clean, strict=True))
    stretch = replace(outlier, whole_window=True)
    window, _ = training.window_of(batches, 4, 1, LINE, stretch, Plan())
    assert [part.factor for part in window] == [10] * 4
    switched = training.window_of(line_batches("t", 0), 4, 9, LINE, Scenario(switch=0), Plan())
    assert torch.equal(switched[0][0].batch[0], -clean[0][1][0])
    assert switched[1]


def test_what_is_injected_reaches_the_gradient():
    seen = []

    class Spy:
        def clip_(self, grads):
            seen.append(training.norm_of(grads))

    model = Line()
    rival = training.Rival(model, Spy(), guarded=False)
    batch = next(line_batches("tuning", 0))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for factor in (1.0, 100.0):
        model.load_state_dict(start)
        rival.update([training.Part(batch, factor)], lr=0.0)
    assert seen[1] / seen[0] == pytest.approx(100, rel=1e-5)


# ---------------------------------------------------------------- counts


def test_false_clips_are_counted_on_clean_updates_that_settled():
    clean = [True] * 110
    clean[105] = False
    factors = [0.5] * 100 + [1.0, 0.5, 1.0, 0.0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0]
    found = measured(Trace(clean, factors, [1.0] * 110))
    assert found["clean_updates"] == 9
    assert found["false_clips"] == pytest.approx(2 / 9, rel=1e-4)
    assert found["kept"] == pytest.approx(7.5 / 9, rel=1e-4)
    assert (found["bad_updates"], found["caught"]) == (1, 1.0)


def test_a_gradient_that_became_nan_was_not_caught():
    found = measured(Trace([False, False], [math.nan, 0.0], [1.0, 1.0]))
    assert (found["bad_updates"], found["caught"]) == (2, 1.0)


def test_spikes_rise_above_the_trend_of_their_own_domain():
    losses = [1.0] * 60 + [1.49, 1.51, 2.0] + [1.0] * 10
    assert measured(Trace([True] * 73, [1.0] * 73, losses))["spikes"] == 2
    assert measured(Trace([True] * 73, [1.0] * 73, losses))["worst"] == 2.0
    jump = [1.0] * 60 + [3.0] * 60
    assert measured(Trace([True] * 120, [1.0] * 120, jump))["spikes"] > 0
    assert measured(Trace([True] * 120, [1.0] * 120, jump, [60]))["spikes"] == 0


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("arm", [*OURS, *RULES])
def test_every_arm_sees_the_plan_and_learns(arm):
    trace, loss = train(LINE, arm, SCENARIOS["clean"], 0, "tuning", PLAN)
    assert len(trace.factors) == len(trace.losses) == PLAN.updates
    assert loss < trace.losses[0]
    assert trace.nonfinite is None


def test_ours_stays_on_the_plan_and_refuses_another():
    optimizer = training.Ours(Line(), training.config())
    batch = training.Part(next(line_batches("tuning", 0)))
    with pytest.raises(RuntimeError, match="window is 1, and the plan's 2"):
        optimizer.update([batch, batch], lr=0.1)


def test_ours_tells_what_it_clipped():
    trace, _ = train(LINE, "noiseopt, ceiling 1.0", SCENARIOS["outliers"], 0, "tuning", PLAN)
    reference, _ = train(LINE, "fixed 1.0", SCENARIOS["outliers"], 0, "tuning", PLAN)
    # until a level is known, the ceiling is all there is, as in the rival; the first gradients of
    # both are those of the same weights
    assert trace.factors[:2] == pytest.approx(reference.factors[:2], rel=1e-4)
    bad = [factor for good, factor in zip(trace.clean, trace.factors, strict=True) if not good]
    assert bad
    assert max(bad) < 1


def test_no_nan_reaches_our_weights_and_one_does_without_a_guard():
    for arm, ends in (("noiseopt", None), ("fixed 1.0 + skip", None), ("fixed 1.0", 3)):
        trace, loss = train(LINE, arm, SCENARIOS["nans"], 0, "tuning", PLAN)
        assert trace.nonfinite == ends
        assert math.isnan(loss) == (ends is not None)
    assert not trace.clean[ends]
    assert all(trace.clean[:ends])


def test_left_out_updates_are_caught():
    trace, _ = train(LINE, "fixed 1.0 + skip", SCENARIOS["nans"], 0, "tuning", PLAN)
    bad = [factor for good, factor in zip(trace.clean, trace.factors, strict=True) if not good]
    assert bad
    assert set(bad) == {0.0}


@pytest.mark.parametrize("task", TASKS)
def test_the_full_plan_fits_into_the_data(task):
    assert sum(1 for _ in TASKS[task].batches("tuning", 0)) >= Plan().micro_batches


def test_the_data_must_suffice():
    short = replace(LINE, batches=lambda split, seed: iter([next(line_batches(split, seed))] * 5))
    with pytest.raises(RuntimeError, match="data ends in update 6"):
        train(short, "none", SCENARIOS["clean"], 0, "tuning", PLAN)


# ---------------------------------------------------------------- tables and the command


def record(arm, seed, loss, false_clips=0.0, scenario="clean", nonfinite=None):
    return {
        "task": "digits",
        "scenario": scenario,
        "arm": arm,
        "seed": seed,
        "loss": loss,
        "false_clips": false_clips,
        "kept": 1.0,
        "caught": None,
        "spikes": 0,
        "worst": 1.0,
        "nonfinite_update": nonfinite,
    }


def test_verdicts_are_of_pairs_of_equal_seeds():
    ours = [record("noiseopt", seed, 1.1 + seed, 0.002 * seed) for seed in (1, 2, 3)]
    rivals = [record("fixed 1.0", seed, 1.0 + seed + 0.01 * (seed - 2)) for seed in (1, 2, 3)]
    text = table.markdown([*ours, *rivals])
    half = 4.303 * 0.01 / math.sqrt(3)
    assert f"worse (+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}])" in text
    assert "digits: holds, 0.40%, at most 0.60% in a run" in text
    ours[2]["false_clips"] = 0.01
    ours[2] |= {"nonfinite_update": 7, "loss": None}
    text = table.markdown([*ours, *rivals])
    assert "digits: missed" in text
    assert "no NaN reaches the weights: missed, 1 of 3 runs" in text


def test_differences_within_their_spread_are_not_told_apart():
    assert table.verdict([0.1, -0.1, 0.05]).startswith("not told apart")
    assert table.verdict([-0.1, -0.11, -0.09]).startswith("better")


def test_what_is_caught_is_not_told_of_nans():
    outliers, nans = (
        {"noiseopt": [record("noiseopt", 1, 1.0, scenario=name) | {"caught": 0.5}]}
        for name in ("outliers", "nans")
    )
    assert "| 50% |" in table.row(outliers, "noiseopt")
    assert "50%" not in table.row(nans, "noiseopt")


def test_where_the_fixed_norm_diverges_its_guarded_form_is_the_base():
    runs = {arm: [record(arm, 1, loss)] for arm, loss in (("fixed 1.0", None), ("noiseopt", 1.25))}
    runs["fixed 1.0 + skip"] = [record("fixed 1.0 + skip", 1, 1.0)]
    assert table.row(runs, "noiseopt").endswith("| 1.2500 | +0.2500 |")
    assert table.row(runs, "fixed 1.0 + skip").endswith("| 1.0000 | - |")


def test_a_rival_that_diverged_is_not_the_best():
    runs = {"none": [record("none", 1, 0.5), record("none", 2, None)]}
    runs["fixed 1.0"] = [record("fixed 1.0", 1, 0.9)]
    runs["noiseopt"] = [record("noiseopt", 1, 0.1)]
    assert table.best_rival(runs) == "fixed 1.0"


def test_every_arm_runs_in_every_scenario_and_guarded_ones_with_nans():
    runs = list(bench.all_runs())
    assert len(set(runs)) == len(runs)
    assert {run.seed for run in runs} == {1, 2, 3}
    assert {run.split for run in runs} == {"reporting"}
    per_seed = [run for run in runs if run.seed == 1 and run.task == "digits"]
    assert len(per_seed) == len(SCENARIOS) * (len(OURS) + len(RULES)) + len(RULES)


def test_the_smoke_run_writes_what_it_is_told_to_and_goes_on(tmp_path, monkeypatch, capsys):
    names = [("clean", "noiseopt"), ("nans", "noiseopt"), ("nans", "fixed 1.0")]
    quick = [run for run in bench.quick_runs() if (run.scenario, run.arm) in names]
    monkeypatch.setattr(bench, "quick_runs", lambda: quick[2:])
    monkeypatch.setattr(bench, "origin_of", lambda *_: {"commit": "1234567"})
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    bench.main(["--quick"])
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(bench, "quick_runs", lambda: quick)
    bench.main(["--quick", "--output", str(tmp_path)])
    records = json.loads((tmp_path / "clipping.json").read_text())
    assert [(r["scenario"], r["arm"]) for r in records] == names
    assert [r["nonfinite_update"] is None for r in records] == [True, True, False]
    assert all(r["commit"] == "1234567" and "python -m" in r["command"] for r in records)
    assert "## digits, nans" in (tmp_path / "clipping.md").read_text()
    monkeypatch.setattr(bench, "do", lambda *_: pytest.fail("was done already"))
    (tmp_path / "clipping.md").unlink()
    bench.main(["--table", "--output", str(tmp_path)])
    assert "## digits, nans" in (tmp_path / "clipping.md").read_text()
    bench.main(["--quick", "--output", str(tmp_path)])
    assert "| fixed 1.0 |" in capsys.readouterr().out


def test_negatives_keep_what_is_there():
    images, labels = next(iter(TASKS["digits"].held_out("tuning")))
    other, same = TASKS["digits"].other((images, labels))
    assert torch.equal(same, labels)
    assert torch.allclose(1 - other.flip(1), images, atol=1e-6)
    assert not torch.equal(other, images)
