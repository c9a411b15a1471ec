import json
import math

import numpy as np
import pytest
import torch

from benchmarks import estimator as bench

ORIGIN = {"command": "test", "commit": "none", "versions": "none"}
PLAN = bench.Plan(seeds=40, other_seeds=8, checkpoints=(32, 64), population=48, training=2)


@pytest.fixture(scope="module")
def records():
    torch.set_num_threads(1)
    small = bench.Plan(seeds=4, other_seeds=4, checkpoints=(32,), population=48, training=2)
    return [record for cell in bench.run(small, ORIGIN) for record in cell]


@pytest.fixture(scope="module")
def noisy():
    stream = bench.quadratic(bench.weights_at(3.0, 40), 0.0, torch.Generator().manual_seed(1))
    return bench.observe(stream, 64, float(bench.SPECTRUM.sum()))


def z_score(error):
    """How many standard errors the mean over seeds is from zero."""
    return error.mean() / (error.std(ddof=1) / math.sqrt(len(error)))


def final_errors(read, norms):
    now = np.array([norms.windows])
    reading = read(norms, now)
    return reading.trace[0] / norms.trace - 1, reading.signal[0] / norms.signal[-1] - 1


def test_every_cell_has_every_arm(records):
    cells = {(record.setup, record.K) for record in records}
    assert len(cells) == len(bench.setups(PLAN)) * len(bench.COUNTS)
    for cell in cells:
        arms = [(r.arm, r.memory) for r in records if (r.setup, r.K) == cell]
        assert arms == [(arm.name, arm.memory) for arm in bench.ARMS]


def test_the_table_names_every_arm(records, capsys):
    bench.print_records(records[: len(bench.ARMS)])
    bench.print_claim(records)
    text = " ".join(capsys.readouterr().out.split())
    for arm in bench.ARMS:
        assert arm.name.split(",")[0] in text


@pytest.mark.parametrize("count", bench.COUNTS)
def test_ours_is_unbiased(noisy, count):
    for errors in final_errors(bench.read_ours, noisy[count]):
        assert abs(z_score(errors)) < 4


@pytest.mark.parametrize("count", bench.COUNTS)
def test_the_plug_in_is_not(noisy, count):
    assert z_score(final_errors(bench.read_plug_in, noisy[count])[1]) > 20


def test_flooring_biases_the_signal_upwards_where_noise_dominates():
    stream = bench.quadratic(bench.weights_at(30.0, 40), 0.0, torch.Generator().manual_seed(2))
    norms = bench.observe(stream, 64, float(bench.SPECTRUM.sum()))[8]
    assert abs(z_score(final_errors(bench.read_ours, norms)[1])) < 4
    assert z_score(final_errors(bench.read_adascale, norms)[1]) > 4


def test_stationary_weights_have_sgds_own_variance():
    """And there successive gradients have the product -|G|^2, while ours reads |G|^2."""
    generator = torch.Generator().manual_seed(3)
    start = bench.stationary_weights(40, 1.0, generator)
    norms = bench.observe(bench.quadratic(start, 1.0, generator), 64, float(bench.SPECTRUM.sum()))[
        8
    ]
    expected = float((bench.SPECTRUM**2 / (bench.BATCH * (2 - bench.SPECTRUM))).sum())
    assert abs(z_score(norms.signal.mean(axis=0) / expected - 1)) < 4
    assert abs(z_score(norms.cross[1:].mean(axis=0) / -expected - 1)) < 4
    times = np.array([64])
    assert abs(z_score(bench.read_ours(norms, times).signal[0] / expected - 1)) < 4
    assert np.isnan(bench.read_differenced(norms, times).scale).all()


def test_our_decays_are_the_estimators(noisy):
    """The average with our decays is the estimator's own, where nothing is winsorised."""
    norms, times = noisy[8], np.array([40, 64])
    ours = bench.read_ours(norms, times)
    same = bench.averaged(
        *bench.unbiased(norms, norms.small), bench.our_decays(norms.windows), times - 1
    )
    assert ours.altered == 0
    np.testing.assert_allclose(ours.trace, same.trace, rtol=1e-9)
    np.testing.assert_allclose(ours.signal, same.signal, rtol=1e-9)


def test_a_micro_batch_of_the_population_has_autograds_norm():
    generator = torch.Generator().manual_seed(4)
    text = bench.library_bytes()
    parameters = bench.trained_parameters(text, 1, generator)
    samples = bench.sequences(text, 12, generator)
    rows = bench.compact(bench.per_sample_gradients(parameters, samples))
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    torch.stack([bench.sequence_loss(leaves, sample) for sample in samples]).mean().backward()
    expected = sum(float(leaf.grad.double().square().sum()) for leaf in leaves.values())
    assert float(rows.double().mean(0).square().sum()) == pytest.approx(expected, rel=1e-4)


def test_what_is_written_is_valid_json(records, tmp_path):
    cell = [record for record in records if record.setup == records[0].setup]
    bench.write(cell, tmp_path)
    found = json.loads((tmp_path / "estimator.json").read_text())
    assert len(found) == len(cell)
    assert (tmp_path / "estimator.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ([2.5, 2.1, 3.0], "yes"),
        ([1.5, 1.2, 1.9], "no"),
        ([2.0, 1.9, 2.1], "within"),
        (None, "no value"),
    ],
)
def test_a_verdict_says_what_the_seeds_can_tell(ratio, expected):
    assert bench.verdict(ratio).startswith(expected)
