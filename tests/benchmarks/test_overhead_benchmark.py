import json
import math

import pytest
import torch

from benchmarks import overhead as bench
from benchmarks import recording

TINY = bench.SIZES["tiny"]
CPU = torch.device("cpu")
UPDATES = {"noiseopt, auto, clips", "noiseopt, auto, does not clip"}
LEAST = {f"{bench.LEAST}, clips", f"{bench.LEAST}, does not clip"}
OURS = {
    ("update", "fused", 1): UPDATES | {"noiseopt, advise"} | LEAST,
    ("update", "foreach", 1): UPDATES,
    ("update", "for-loop", 1): UPDATES,
    ("update", "fused", 4): UPDATES | {"noiseopt, advise"},
    ("step", "fused", 1): {"noiseopt", bench.PROBING},
    ("step", "fused", 4): {"noiseopt", "noiseopt, external", bench.LEAST},
}


class Missing(bench.TorchStep):
    def __init__(self, *args):
        raise ImportError


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    peers = dict(bench.PEERS)
    bench.PEERS |= dict.fromkeys(peers, bench.TorchStep) | {"ZClip": Missing}
    try:
        return bench.run([TINY], list(peers), 1, CPU)
    finally:
        bench.PEERS.update(peers)


@pytest.fixture(scope="module")
def timings(results):
    return [result for result in results if isinstance(result, bench.Timing)]


def test_every_comparison_has_every_arm(timings):
    assert {(t.part, t.kernel, t.window) for t in timings} == set(OURS)
    for cell, ours in OURS.items():
        arms = [t.arm for t in timings if (t.part, t.kernel, t.window) == cell]
        peers = set(bench.PEERS) if cell == ("step", "fused", 4) else set()
        assert set(arms) == {bench.REFERENCE, bench.CONTROL} | ours | peers
        assert len(arms) == len(set(arms))


def test_a_peer_that_is_not_installed_is_reported(timings):
    missing = [t for t in timings if t.note == "not installed"]
    assert [t.arm for t in missing] == ["ZClip"]
    assert missing[0].rounds == 0
    assert missing[0].cpu is None


def test_what_ran_was_measured(timings):
    for t in timings:
        if t.note is None:
            assert t.rounds == 1
            assert all(map(math.isfinite, (*t.wall, *t.cpu)))
            assert t.cpu_ms > 0
        if t.arm == bench.REFERENCE:
            assert t.wall == t.cpu == (1, 1, 1)


def test_the_memory_is_what_we_say(results):
    used = [r for r in results if isinstance(r, bench.Memory)]
    assert [(r.arm, r.window, r.claim) for r in used] == [
        ("noiseopt", "1, 1", 0),
        ("noiseopt, probing", "1, 2", 1),
        ("noiseopt, probing", "1, 2, 1", 0),
        ("noiseopt", "4, 4", 1),
        ("noiseopt, external", "4, 4", 0),
    ]
    gradient = sum(p.nbytes for p in bench.gpt(TINY, CPU).parameters())
    for r in used:
        assert r.gradient == gradient
        assert r.in_window == r.claim * gradient
        assert r.after_update == (gradient if r.window == "4, 4" and r.claim else 0)
        assert r.peak == (gradient if r.claim or "2" in r.window else 0)
        assert r.holds == "yes"


def test_no_parameter_is_too_small_to_be_counted():
    for size in bench.SIZES.values():
        with torch.device("meta"):
            assert all(p.nbytes > bench.SMALL for p in bench.GPT(size).parameters())


def test_waits_need_a_gpu(results):
    found = [r for r in results if isinstance(r, bench.Waits)]
    assert [(r.window, r.result) for r in found] == [(1, "needs a GPU"), (4, "needs a GPU")]


def test_the_gradient_that_torch_applies_is_the_sum_over_its_window():
    params = [torch.nn.Parameter(torch.zeros(3))]
    params[0].grad = torch.empty(3)
    arm = bench.TorchUpdate(params, [torch.ones(3)], 4, clip=100.0)
    for _ in range(4):
        arm.run()
    assert params[0].grad.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("max_norm", [0.1, 100.0], ids=["clips", "does not clip"])
def test_the_kernels_alone_update_as_torch_does(max_norm):
    found = []
    for kind in (bench.TorchUpdate, bench.KernelsUpdate):
        params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(2, 2))]
        grads = [torch.tensor([1.0, -2.0, 3.0]), torch.full((2, 2), 0.5)]
        for param in params:
            param.grad = torch.empty_like(param)
        arm = kind(params, grads, 1, clip=max_norm, fused=True)
        for factor in (1.0, 0.25, 4.0):
            arm.grads = [factor * grad for grad in grads]
            arm.run()
        found.append([*params, *(param.grad for param in params)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


def test_the_kernels_alone_train_as_torch_does():
    arms = [kind(TINY, 1, 4, CPU) for kind in (bench.TorchStep, bench.KernelsStep)]
    for _ in range(8):
        for arm in arms:
            arm.run()
    torch.testing.assert_close(*([p.detach() for p in arm.params] for arm in arms))


def test_sizes_are_what_their_names_say():
    for name, millions in (("1M", 1), ("12M", 12), ("124M", 124)):
        with torch.device("meta"):
            count = sum(p.numel() for p in bench.GPT(bench.SIZES[name]).parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.05)


def test_probes_are_mixed_in_as_often_as_by_default():
    singles, pair = {("update", "cpu"): 3.0}, {("update", "cpu"): 5.0}
    mixed = bench.rarer_probes(singles, pair)["update", "cpu"]
    # A window of one takes 1 and a probe 4: over the default's cycle, scaled to 3 micro-batches.
    cycle = (bench.PROBE_INTERVAL - 1) * 1 + 4
    assert mixed == pytest.approx(cycle * 3 / (bench.PROBE_INTERVAL + 1))


@pytest.mark.parametrize(
    ("ratio", "word"),
    [((0.9, 0.92, 0.95), "yes"), ((0.94, 0.96, 0.97), "within noise"), ((0.96, 1, 1), "no")],
)
def test_a_target_holds_if_the_upper_quartile_meets_it(ratio, word):
    assert bench.verdict(ratio, 0.95, rounds=3) == word
    assert bench.verdict(ratio, 0.95, rounds=2) == "too few rounds"


def test_tables_name_every_arm(results, timings, capsys):
    bench.print_timings([t for t in timings if (t.part, t.window) == ("step", 4)])
    text = capsys.readouterr().out
    for arm in (bench.REFERENCE, bench.CONTROL, *OURS["step", "fused", 4], *bench.PEERS):
        assert arm in text
    assert "not installed" in text


def test_records_are_appended(results, tmp_path):
    origin = bench.origin_of(["--quick"], CPU)
    recording.append(results[:2], origin, tmp_path / bench.NAME)
    recording.append(results[-1:], origin, tmp_path / bench.NAME)
    records = json.loads((tmp_path / "overhead.json").read_text())
    assert [record["part"] for record in records] == ["update", "update", "waits"]
    for record in records:
        assert record["command"] == "python benchmarks/overhead.py --quick"
        assert {"commit", "device", "versions"} <= set(record)
