import json
import math
import re
import shutil
import threading
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from typer.testing import CliRunner

from benchmarks.convergence import arms, rivals, table, work
from benchmarks.convergence import train as training
from benchmarks.convergence.__main__ import app
from benchmarks.convergence.cache import Cache, Run
from benchmarks.convergence.gradients import Spread, WindowGradient
from benchmarks.convergence.plan import Plan, config_of
from benchmarks.convergence.table import loss_of
from benchmarks.convergence.tuning import BETA2, Setting, best, ranked, untried
from benchmarks.convergence.workloads import MAIN, WORKLOADS, autoencoder, digits, gpt
from benchmarks.convergence.workloads.base import SPLITS, Data, Workload

sklearn = pytest.importorskip("sklearn")
STEPS = 32
ORDER = (
    *("constant-1-tuning", "auto-tuning", "constant-2-tuning", "constant-4-tuning", "ramp-tuning"),
    *("constant-16-reporting-1", "auto-reporting-1", "constant-1-reporting-2"),
    *("auto-reporting-3", "auto-without-lr-reporting-1"),
)
SPREAD = Spread(count=4, batch=32, small_sq=5.0, big_sq=2.0, deviation_l1=12.0, big_l1=3.0)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x, y):
        return (x @ self.weight - y).square().mean()


def line_data(split):
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            x = torch.randn(8, 6, generator=generator)
            yield x, x.sum(1) + torch.randn(8, generator=generator)

    held_out = next(batches(10_000 + SPLITS.index(split)))
    return Data(batches, [held_out])


TINY = Workload("line", Line, line_data, micro_batches=STEPS, micro_batch=8, lr=0.05)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "line", TINY)
    return TINY


def run_of(arm, workload="line", seed=1, lr=0.05, beta2=0.99, **options):
    config = config_of(workload, arm, lr, beta2, arms.settings(arm) | options)
    return Run(workload, arm, seed, "reporting", config)


def shortened(workload, micro_batches):
    """The same workload, ended early."""

    def load(split):
        data = workload.load(split)

        def batches(seed):
            yield from (b for _, b in zip(range(micro_batches), data.batches(seed), strict=False))

        return Data(batches, [tuple(part[:16] for part in data.held_out[0])])

    return replace(workload, load=load, micro_batches=micro_batches)


# --- workloads --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAIN)
def test_a_workload_trains_with_every_kind_of_arm(monkeypatch, name):
    monkeypatch.setitem(WORKLOADS, name, shortened(WORKLOADS[name], 16))
    found = {}
    for arm in ("constant-4", "gns-l1", "auto"):
        results, details = training.train(run_of(arm, name, lr=1e-3))
        found[arm] = results["samples"]
        assert math.isfinite(results["val_loss"])
        assert math.isfinite(results["val_loss_averaged"])
        assert details["trajectory"]
        assert len(json.dumps(details)) < 30_000
    assert set(found.values()) == {16 * WORKLOADS[name].micro_batch}


@pytest.mark.parametrize("name", MAIN)
def test_a_seed_gives_the_same_batches_and_another_seed_others(name):
    data = WORKLOADS[name].load("reporting")
    first, again, other = (next(data.batches(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["digits", "autoencoder"])
def test_a_run_has_as_many_micro_batches_as_it_says_and_all_of_one_size(name):
    workload = WORKLOADS[name]
    sizes = [len(batch[0]) for batch in workload.load("tuning").batches(1)]
    assert sizes == [workload.micro_batch] * workload.micro_batches


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_constant_window_is_left_open(name):
    assert WORKLOADS[name].micro_batches % 32 == 0


def test_text_is_dealt_by_whole_files():
    texts = gpt.texts()
    names = [f"folder/module{number}.py" for number in range(400)]
    assert {gpt.part_of(name) for name in names} == set(texts)
    assert all(len(text) > 100_000 for text in texts.values())
    reporting, held_out = (bytes(texts["reporting", held].numpy()) for held in (False, True))
    for part in ("tuning", "reporting"):
        head = bytes(texts[part, True][:400].numpy())
        assert head not in reporting
    assert held_out[:400] not in bytes(texts["tuning", False].numpy())


CONTEXT = 1024  # longer than the texts in source that bytecode holds too


def test_where_the_text_changes_the_schedule_begins_anew():
    shift = WORKLOADS["gpt-shift"]
    half = shift.micro_batches // 2
    factors = [shift.schedule(done) for done in range(shift.micro_batches)]
    assert factors[half:] == factors[:half]
    assert factors[0] < 0.01
    assert max(factors) == 1
    config = config_of("gpt-shift", "seesaw", 0.004, 0.99, arms.settings("seesaw"))
    rival = training.Rival(nn.Linear(1, 1), shift, config, arms.rule("seesaw", {}))
    for rival._done in (0, half // 40, half, half + half // 40):  # the rate rises
        assert rival._peak_over_now() == 1
    for rival._done in (half // 2, half + half // 2):
        assert rival._peak_over_now() == pytest.approx(1 / factors[half // 2])
    assert factors[half - 1] == pytest.approx(0.1, abs=1e-4)
    data = gpt.load_shifting("tuning", steps=4, batch_size=2, context=CONTEXT)
    batches = [bytes(tokens.byte().numpy()) for (tokens,) in data.batches(1)]
    source, code = (
        bytes(texts["tuning", False].numpy()) for texts in (gpt.texts(), gpt.texts(gpt.bytecode))
    )
    assert [batch[: CONTEXT + 1] in source for batch in batches] == [True, True, False, False]
    assert [batch[: CONTEXT + 1] in code for batch in batches] == [False, False, True, True]
    held_out = bytes(data.held_out[0][0][0].byte().numpy())
    assert held_out in bytes(gpt.texts(gpt.bytecode)["tuning", True].numpy())


def test_held_out_digits_are_not_trained_on():
    assert digits.HELD_OUT["tuning"].start >= digits.TRAIN
    assert digits.HELD_OUT["tuning"].stop == digits.HELD_OUT["reporting"].start
    patches, labels = digits.images()
    assert len(patches) == len(labels) == 1797


def test_patches_are_cut_as_they_lie():
    pixels = torch.arange(2 * 3 * 20 * 40.0).reshape(2, 3, 20, 40)
    cut = autoencoder.patches(pixels, torch.tensor([[1, 4, 7]]))
    assert torch.equal(cut[0].view(8, 8, 3), pixels[1, :, 4:12, 7:15].permute(1, 2, 0))
    numbers = {part: len(found) for part, found in autoencoder.stripes().items()}
    assert sum(numbers.values()) == 2 * 640 // autoencoder.STRIPE
    assert min(numbers.values()) >= 4


# --- the loop ---------------------------------------------------------------------------------


def plain(window, lr, beta2, batches):
    """AdamW as anybody would write it, on the window-times batch."""
    torch.manual_seed(1)
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=0.1)
    for start in range(0, len(batches), window):
        x, y = (torch.cat(parts) for parts in zip(*batches[start : start + window], strict=True))
        optimizer.param_groups[0]["lr"] = lr * TINY.schedule(start + window - 1)
        model(x, y).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("window", [1, 4, 8])
def test_a_constant_is_plain_adamw_on_the_larger_batch(line, window):
    results, _ = training.train(run_of(f"constant-{window}"))
    data = line.load("reporting")
    model = plain(window, 0.05, max(0.99**window, 0.9), list(data.batches(1)))
    expected = training.validate(model, data.held_out)
    assert results["updates"] == STEPS // window
    assert results["val_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arm", [*arms.MAIN, *arms.ABLATIONS, "late-switch@factor=5"])
def test_every_arm_consumes_every_sample(line, arm):
    results, details = training.train(run_of(arm))
    assert results["samples"] == STEPS * 8
    assert math.isfinite(results["val_loss"])
    assert STEPS // 32 <= results["updates"] <= STEPS
    assert details["validation"][-1][0] < STEPS * 8


def test_a_window_that_does_not_fit_is_the_mean_of_what_is_left(line):
    """Five micro-batches to a window leave two at the end, which count as their mean."""
    data = line.load("reporting")
    batches = list(data.batches(1))
    torch.manual_seed(1)
    model = Line()
    trainer = training.Rival(model, line, run_of("constant-1").config, rivals.Rule(steps=5))
    for batch in batches:
        trainer.feed(batch, 0.05)
    assert trainer.updates == 7
    assert trainer._gradient is None


def test_ours_is_the_optimizer_with_default_settings_and_the_ceiling_of_all_arms(line):
    run = run_of("auto")
    torch.manual_seed(1)
    config = training.trainer_of(run, Line(), line).optimizer.config
    assert config == replace(type(config)(), samples_per_micro_batch=8, max_norm=arms.MAX_NORM)


@pytest.mark.parametrize("arm", ["constant-1", "seesaw", "auto"])
def test_every_arm_takes_other_settings_of_the_users(line, monkeypatch, arm):
    batch = next(iter(line.load("reporting").batches(1)))
    monkeypatch.setitem(WORKLOADS, "lower", replace(line, name="lower", beta1=0.8))
    for name, workload, betas in (
        (arm, "line", (0.9, 0.99)),
        (arm, "lower", (0.8, 0.99)),
        (f"{arm}@beta1=0.7,beta2=0.9", "lower", (0.7, 0.9)),
    ):
        trainer = training.trainer_of(run_of(name, workload), Line(), line)
        trainer.feed(batch, 0.05)
        assert trainer.optimizer.param_groups[0]["betas"] == betas
    assert run_of(f"{arm}@lr=0.01").config["lr"] == 0.01
    assert run_of(f"{arm}@beta1=0.9").config == run_of(arm).config


@pytest.mark.parametrize("parts", [4, 8])
def test_parts_have_the_mean_and_the_spread_of_their_gradients(parts):
    torch.manual_seed(0)
    model = Line().double()
    batches = [(torch.randn(8, 6).double(), torch.randn(8).double()) for _ in range(3)]
    gradient = WindowGradient(model, 3, parts)
    for batch in batches:
        gradient.add(batch)
    found, mean = gradient.spread(), model.weight.grad.clone()

    size = 4 if parts == 4 else 2
    pieces = [piece for x, y in batches for piece in zip(x.split(size), y.split(size), strict=True)]
    grads = torch.stack([torch.autograd.grad(model(*p), model.weight)[0] for p in pieces])
    torch.testing.assert_close(mean, grads.mean(0))
    assert (found.count, found.batch) == (24 // size, 24)
    assert found.small_sq == pytest.approx(grads.square().sum(1).mean().item())
    assert found.big_sq == pytest.approx(mean.square().sum().item())
    assert found.big_l1 == pytest.approx(mean.abs().sum().item())
    deviation = size**0.5 * grads.std(0, correction=1)
    assert found.deviation_l1 == pytest.approx(deviation.sum().item())
    assert found.trace == pytest.approx(deviation.square().sum().item())


def test_averaged_weights_have_their_half_life():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = training.AveragedWeights(model, half_life=4)
    nn.init.ones_(model.weight)
    average.update(4)
    average.update(8)
    average.load()
    assert model.weight.item() == pytest.approx(0.75)


# --- the rivals -------------------------------------------------------------------------------


def test_the_trace_is_unbiased_by_hand():
    assert SPREAD.trace == 32 / 3 * (5.0 - 2.0)


def test_adascale_by_hand():
    assert rivals.adascale_gain(3.0, 1.0, 4) == 4 / 1.75
    assert rivals.adascale_gain(1.0, 0.0, 4) == 4
    assert rivals.adascale_gain(0.0, 1.0, 4) == 1
    assert rivals.adascale_moments(SPREAD, 4) == (32.0 / 8, 2.0 - 1.0)
    rule = rivals.AdaScale()
    assert rule.lr_factor(4) == 1
    rule.learn(SPREAD, 0.1)
    assert rule.lr_factor(4) == pytest.approx(math.sqrt(5 / 2))
    rule.learn(replace(SPREAD, small_sq=2.0), 0.2)  # the plain mean of 4 and the floor, of 1 and 2
    assert rule.lr_factor(4) == pytest.approx(math.sqrt((2 + 1.5) / (2 / 4 + 1.5)), rel=1e-5)


def test_the_norm_test_by_hand():
    assert rivals.norm_test_fails(SPREAD, 0.7)  # 1 > 0.49 * 2
    assert not rivals.norm_test_fails(SPREAD, 0.8)
    assert rivals.ratio_batch(SPREAD.trace, SPREAD.big_sq, 0.5) == 64
    rule = rivals.NormTest(steps=4, theta=0.5)
    rule.learn(SPREAD, 0.01)
    assert rule.window(None) == 4  # the rate is still rising
    rule.learn(SPREAD, 0.5)
    assert rule.window(None) == 8
    assert rule.lr_factor(8) == 1
    assert replace(rule, scale_lr=True).lr_factor(4) == 2


def test_noise_scale_rules_by_hand():
    euclidean, of_signs = rivals.NoiseScaleL2(steps=4), rivals.NoiseScaleL1(steps=4)
    assert (euclidean.theta, of_signs.theta) == (0.3, 0.6)
    for rule in (euclidean, of_signs):
        rule.learn(SPREAD, 0.14)
        assert rule.window(None) == 4
        rule.learn(SPREAD, 0.15)
    assert euclidean.window(None) == math.ceil(32 / (0.09 * 2)) // 8
    assert of_signs.window(None) == math.ceil(144 / (0.36 * 9)) // 8
    assert of_signs.lr_factor(9) == 3
    of_signs.learn(replace(SPREAD, deviation_l1=0.0), 0.5)
    assert of_signs.window(None) == 5  # never smaller


def test_noise_scale_rules_forget_by_a_tenth():
    rule = rivals.NoiseScaleL2(steps=4)
    rule.learn(SPREAD, 0.01)
    rule.learn(replace(SPREAD, small_sq=8.0, big_sq=5.0), 0.02)
    assert rule._noise == pytest.approx(0.9 * 3.2 + 3.2)
    assert rule._signal == pytest.approx(0.9 * 0.2 + 0.5)


def test_seesaw_by_hand():
    rule = rivals.Seesaw()
    windows = [rule.window(rivals.Moment(0.5, decay)) for decay in (1, 1.9, 2.0, 2.15, 10.0)]
    assert windows == [1, 1, 1, 2, 9]  # powers of 1.1, rounded down
    assert rule.lr_factor(4) == 2
    assert rivals.Seesaw(alpha=2.0).window(rivals.Moment(0.5, 4.0)) == 4


def test_ramps_by_hand():
    shares = (0.0, 0.24, 0.25, 0.5, 0.75, 0.99)
    ramp, late = rivals.Ramp(), rivals.LateSwitch()
    assert [ramp.window(rivals.Moment(share, 1)) for share in shares] == [1, 1, 2, 4, 8, 8]
    assert [late.window(rivals.Moment(share, 1)) for share in shares] == [1, 1, 1, 1, 8, 8]
    assert ramp.lr_factor(4) == late.lr_factor(4) == 2


def test_beta2_is_kept_in_updates_or_in_samples():
    assert rivals.Seesaw().beta2(0.99, 4) == 0.99
    kept = rivals.Seesaw(keep_half_life=True)
    assert kept.beta2(0.99, 4) == 0.99**4
    assert kept.beta2(0.99, 16) == 0.9
    assert kept.beta2(0.85, 2) == 0.85


# --- arms, tuning and the plan ----------------------------------------------------------------


def test_an_arms_settings_are_in_its_name():
    assert arms.settings("auto") == {"max_norm": 1.0}
    assert arms.settings("auto@verify=False,decay_noise_fraction=0.5") == {
        "max_norm": 1.0,
        "verify": False,
        "decay_noise_fraction": 0.5,
    }
    assert arms.settings("seesaw@alpha=1.5") == {"alpha": 1.5}
    assert arms.settings("constant-8") == {"steps": 8, "keep_half_life": True}
    assert arms.settings("auto-with-verify@dwell_updates=9")["verify"] is True


@pytest.mark.parametrize("arm", ["autos", "auto@verif=1", "seesaw@beta=1", "constant-x"])
def test_an_unknown_arm_or_setting_is_refused(arm):
    with pytest.raises(ValueError, match=arm.partition("@")[0]):
        arms.settings(arm)


def test_the_search_surrounds_its_best():
    def loss(setting):
        return (setting.rung - 7) ** 2 + 3 * (setting.beta2 - 2) ** 2

    losses, start = {}, 0
    while missing := untried(losses, start):
        losses |= {setting: loss(setting) for setting in missing}
    assert best(losses) == Setting(7, 2)
    assert {setting.rung for setting in losses} >= {-2, 0, 2, 4, 6, 7, 8}
    assert Setting(2, 0).values(0.01) == (0.02, BETA2[0])


def test_rates_are_ranked_each_with_its_best_beta2():
    losses = {Setting(0, 1): 2.0, Setting(0, 2): 1.0, Setting(1, 1): 1.5, Setting(2, 2): math.inf}
    assert ranked(losses) == [Setting(0, 2), Setting(1, 1), Setting(2, 2)]


def test_what_diverged_is_not_the_best():
    assert best({Setting(4): math.inf, Setting(2): 1.0}) == Setting(2)


class Fake:
    """Runs that take no time."""

    def __init__(self):
        self.done = []

    def __call__(self, run, device):
        self.done.append(run.file)
        steps = arms.window_of(run.arm) or 3
        beta2 = 0.01 * run.config["options"].get("keep_half_life", 0)
        loss = 1 + abs(math.log(run.config["lr"] / 0.1)) + 0.01 * steps + run.seed / 1e3 - beta2
        results = {"updates": STEPS // steps, "samples": 256, "val_loss": loss}
        return results | {"val_loss_averaged": loss, "wall_seconds": 1.0}, {}

    @property
    def arms(self):
        return {re.match(r"line/(.*)-(tuning|reporting)", name)[1] for name in self.done}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The results of the whole programme on one workload, and the runs in their order."""
    folder, fake = tmp_path_factory.mktemp("results"), Fake()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKLOADS, "line", TINY)
        patch.setattr(work, "train", fake)
        work.work(work.Job(folder, ("line",)))
    return folder, fake.done


@pytest.fixture
def fake(line, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(work, "train", fake)
    return fake


@pytest.fixture
def finished(everything, fake, tmp_path):
    """A job whose runs are all done."""
    shutil.copytree(everything[0], tmp_path, dirs_exist_ok=True)
    return work.Job(tmp_path, ("line",))


def test_the_plan_follows_its_order(everything):
    _, done = everything
    assert len(set(done)) == len(done) > 60
    places = [done.index(next(name for name in done if kind in name)) for kind in ORDER]
    assert places == sorted(places)


def test_nothing_is_done_twice(finished, fake):
    work.work(finished)
    assert fake.done == []
    next((finished.cache.folder / "line").glob("ramp-reporting-2*")).unlink()
    work.work(finished)
    assert len(fake.done) == 1


def test_what_is_tuned_is_reported(finished):
    records = json.loads((finished.results / "convergence.json").read_text())
    reported = [r for r in records if r["split"] == "reporting"]
    assert {r["config"]["lr"] for r in reported} == {0.1}
    assert {r["arm"] for r in reported} == {*arms.MAIN, *arms.ABLATIONS}
    assert all(r["config"]["options"].get("keep_half_life") for r in reported if r["arm"] == "ramp")
    keys = "workload arm seed split updates samples val_loss val_loss_averaged wall_seconds config"
    assert set(records[0]) == {*keys.split(), "commit"}
    seeds = {(r["split"], r["seed"]) for r in records}
    reporting = {("reporting", seed) for seed in (1, 2, 3, 4, 5, 6)}
    assert seeds == {("tuning", seed) for seed in (101, 102, 103)} | reporting


def test_a_workload_may_take_what_another_was_tuned_to(finished, fake, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "long", replace(TINY, name="long", tuned_on="line", lr=7.0))
    job = replace(finished, workloads=("long",), arms=("ramp",), split="reporting", seeds=(4,))
    work.work(job)
    plan = Plan(job.cache, ("line", "long"))
    assert [name.rpartition("-")[0] for name in fake.done] == ["long/ramp-reporting-4"]
    assert plan.chosen("long", "constant-4") == plan.chosen("line", "constant-4")
    ours, theirs = (plan.run(name, "ramp", 4, "reporting").config for name in ("long", "line"))
    assert ours == theirs


def test_a_rate_at_the_edge_of_stability_is_not_chosen(fake, tmp_path, monkeypatch):
    def unstable(run, device):
        result, details = fake(run, device)
        if run.seed == 102 and run.config["lr"] == 0.1:
            result["val_loss"] = None
        return result, details

    monkeypatch.setattr(work, "train", unstable)
    job = work.Job(tmp_path, ("line",), ("constant-1",), seeds=(101,))
    work.work(job)
    losses = defaultdict(dict)
    for record in json.loads((tmp_path / "convergence.json").read_text()):
        losses[record["config"]["lr"], record["config"]["beta2"]][record["seed"]] = loss_of(record)
    again = {setting: seeds for setting, seeds in losses.items() if len(seeds) > 1}
    assert len({lr for lr, _ in again}) == len(again) == 3  # rates
    assert min(losses, key=lambda setting: losses[setting][101])[0] == 0.1
    assert all(set(seeds) == {101, 102, 103} for seeds in again.values())
    chosen = min(again, key=lambda setting: sum(again[setting].values()))
    assert chosen[0] != 0.1
    assert Plan(job.cache, ("line",)).chosen("line", "constant-1") == chosen


def test_named_arms_need_only_the_rate(fake, tmp_path):
    job = work.Job(tmp_path, ("line",), ("auto@verify=False",), seeds=(101,))
    work.work(job)
    assert fake.arms == {"constant-1", "auto@verify=False"}


def test_new_code_of_ours_is_run_again_in_its_place(finished, fake, monkeypatch):
    files = len(list(finished.cache.folder.glob("*/*.json")))
    monkeypatch.setattr(arms, "our_code", lambda: "another")
    work.work(finished)
    assert fake.arms == {"auto", *arms.ABLATIONS}
    assert len(list(finished.cache.folder.glob("*/*.json"))) == files


def test_a_run_that_fails_is_left_out_and_told_of(finished, fake, monkeypatch, capsys):
    def failing(run, device):
        if run.arm == "gns-l2":
            raise RuntimeError("no luck")
        return fake(run, device)

    for arm in ("gns-l2-reporting-1", "gns-l1-reporting-2"):
        next(finished.cache.folder.glob(f"*/{arm}*")).unlink()
    monkeypatch.setattr(work, "train", failing)
    with pytest.raises(SystemExit, match="gns-l2"):
        work.work(finished)
    assert "no luck" in capsys.readouterr().err
    assert fake.arms == {"gns-l1"}


def test_a_run_is_claimed_by_one(line, tmp_path):
    cache, run, seen = Cache(tmp_path), run_of("constant-1"), []
    with cache.claimed(run) as mine:
        other = threading.Thread(target=lambda: seen.append(work.running(cache)))
        other.start()
        other.join()
        with Cache(tmp_path).claimed(run) as theirs:
            assert mine
            assert not theirs
    assert len(seen[0]) == 1
    with cache.claimed(run) as mine:
        assert mine


def test_an_interrupted_write_leaves_nothing_that_counts(line, tmp_path):
    cache, run = Cache(tmp_path), run_of("constant-1")
    path = tmp_path / run.file
    path.parent.mkdir()
    path.with_name(path.name + ".7.part").write_text('{"record": ')
    assert cache.get(run) is None
    assert cache.records() == []


def test_the_plan_begins_with_the_rate_of_a_window_of_one(line, tmp_path):
    known = [item for item in Plan(Cache(tmp_path), ["line"]).everything() if item]
    assert {item.arm for item in known} == {"constant-1"}
    assert {item.seed for item in known} == {101}


# --- the table --------------------------------------------------------------------------------


def record(arm, seed, updates, loss, split="reporting", **config):
    workload = WORKLOADS["digits"].described()
    return {
        "workload": "digits",
        "arm": arm,
        "seed": seed,
        "split": split,
        "updates": updates,
        "samples": 19200,
        "val_loss": loss,
        "val_loss_averaged": loss and loss - 0.01,
        "wall_seconds": 1.0,
        "config": {"lr": 0.1, "beta2": 0.99, "workload": workload} | config,
        "commit": "none",
    }


RECORDS = [
    record("constant-1", 1, 2400, 1.00),
    record("constant-1", 2, 2400, 1.10),
    record("constant-4", 1, 600, 1.20),
    record("constant-4", 2, 600, 1.30),
    record("auto", 1, 1200, 1.01),
    record("auto", 2, 1200, 1.111),
    record("gns-l2", 1, 100, None),
    record("constant-1", 101, 2400, 0.9, "tuning", lr=0.2),
    record("constant-1", 101, 2400, 0.8, "tuning", lr=0.4),
]


def test_rows_compare_with_the_best_constant_and_the_frontier():
    found = {row.arm: row for row in table.rows(RECORDS, "digits")}
    assert list(found) == ["constant-1", "constant-4", "gns-l2", "auto"]
    auto = found["auto"]
    assert auto.update_ratio == 0.5
    assert auto.excess == pytest.approx(0.01)
    assert auto.excess_spread == pytest.approx(0.0, abs=1e-9)
    assert auto.above_frontier == pytest.approx(1.0605 / 1.15 - 1)
    assert auto.time_ratio == pytest.approx((2400 + 4 * 1200) / (2400 + 4 * 2400))
    assert found["constant-4"].excess == pytest.approx((0.2 + 2 / 11) / 2)
    assert found["gns-l2"].above_frontier is None
    assert found["gns-l2"].loss == math.inf


def test_the_frontier_is_of_the_seeds_that_all_constants_have():
    """A third seed of the arm and of one constant changes nothing."""
    more = [record("auto", 3, 1200, 9.0), record("constant-1", 3, 2400, 9.0)]
    auto = {row.arm: row for row in table.rows([*RECORDS, *more], "digits")}["auto"]
    assert auto.seeds == (1, 2, 3)
    assert auto.above_frontier == pytest.approx(1.0605 / 1.15 - 1)


def test_the_table_and_the_figure_are_redrawn_from_the_records(tmp_path):
    (tmp_path / "convergence.json").write_text(json.dumps(RECORDS))
    for split, suffix in (("reporting", ""), ("tuning", "-tuning")):
        done = CliRunner().invoke(app, ["table", "--split", split, "--results", str(tmp_path)])
        assert done.exit_code == 0, done.output
        written = (tmp_path / f"convergence{suffix}.md").read_text()
        assert written in done.output
        assert (tmp_path / f"convergence-digits{suffix}.png").stat().st_size > 10_000
    reporting = (tmp_path / "convergence.md").read_text()
    assert "| auto | 2 | 1200 | 50.0% | 1.0605 +- 0.0714 | 1.0505 | +1.00%" in reporting
    assert "| gns-l2 | 1 | 100 | 4.2% | diverged |" in reporting
    assert "constant-1 lr 0.4, beta2 0.99 per micro-batch (2 tried)" in reporting


def test_status_says_what_is_left(finished):
    words = ["status", "--workload", "line", "--results", str(finished.results)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "line         reporting" in done.output
    assert "running: nothing" in done.output


@pytest.mark.parametrize("words", [("--workload", "none"), ("--split", "test")])
def test_a_wrong_call_is_refused(words, tmp_path):
    done = CliRunner().invoke(app, ["run", *words, "--results", str(tmp_path)])
    assert done.exit_code == 2
