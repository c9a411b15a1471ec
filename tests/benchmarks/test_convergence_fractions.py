"""The noise fractions along a run: what each norm weighs; signal and noise are told apart."""

from dataclasses import replace

import pytest
import torch

from benchmarks.convergence import fractions
from benchmarks.convergence.cache import Run
from benchmarks.convergence.workloads import WORKLOADS
from tests.benchmarks.test_convergence_benchmark import TINY


def gradients(signal, deviation, number=4000):
    """Draws of one tensor of two coordinates."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    return [[row] for row in torch.tensor(signal).double() + noise * torch.tensor(deviation)]


@pytest.mark.parametrize(
    ("by", "expected"),
    [((1.0, 1.0), (1 + 4) / (1 + 4 + 4 + 1)), ((1.0, 0.0), 1 / (1 + 4)), ((0.0, 1.0), 4 / (4 + 1))],
)
def test_the_fraction_is_that_of_the_weighted_norm(by, expected):
    grads = gradients((2.0, 1.0), (1.0, 2.0), number=20_000)
    found = fractions.noise_fraction(grads, [torch.tensor(by).double()])
    assert found == pytest.approx(expected, abs=0.02)


def test_few_gradients_are_not_biased():
    many = gradients((1.0, 0.0), (1.0, 0.0))
    pairs = zip(many[::2], many[1::2], strict=True)
    ones = [torch.ones(2).double()]
    noise = [fractions.noise_fraction(list(pair), ones) * small(pair) for pair in pairs]
    assert sum(noise) / len(noise) == pytest.approx(1.0, abs=0.05)  # sigma^2


def small(pair):
    return sum(float(grad[0].square().sum()) for grad in pair) / 2


def test_coordinates_are_weighed_by_powers_of_adams_second_moment():
    moments = [torch.tensor([4.0, 4.0])]
    damped = 2 * (1 + fractions.DAMPING)
    for power, exponent in ((0.0, 0), (0.5, 1), (1.0, 2)):
        (by,) = fractions.weights(moments, power)
        torch.testing.assert_close(by, torch.full((2,), damped**-exponent))
    (by,) = fractions.weights([torch.tensor([0.0, 1.0])], 1.0)
    assert by.isfinite().all()


def test_a_window_averages_the_noise_away():
    assert fractions.in_window(0.75, 3) == pytest.approx(0.5)  # noise 3, signal 1
    assert fractions.in_window(1.0, 8) == 1.0


def test_a_run_is_looked_at_in_ten_points_and_goes_on_as_if_it_were_not(monkeypatch):
    line = replace(TINY, name="line")
    monkeypatch.setitem(WORKLOADS, "line", line)
    monkeypatch.setattr(fractions, "DRAWN", 2)
    config = {"lr": 0.05, "beta2": 0.99, "options": {}, "workload": line.described()}
    run = Run("line", "seesaw", 3, "tuning", config)
    rows = list(fractions.along(run))
    assert [row.share for row in rows] == pytest.approx(
        [(i + 1) * (line.micro_batches // 10) / line.micro_batches for i in range(len(rows))]
    )
    assert len(rows) >= fractions.POINTS
    assert all(0 < f < 2 for row in rows for f in row.fractions)
    assert rows[-1].window > rows[0].window == 1
    table = fractions.markdown("line", rows)
    assert table.count("\n") == len(rows) + 3
