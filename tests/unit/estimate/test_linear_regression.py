"""Real gradients of a linear regression, whose noise is known in closed form.

With features x ~ N(0, I) in d dimensions, targets x.w* + e with e ~ N(0, s^2) and delta = w - w*, a
sample's gradient of half the squared error is x (x.delta - e). Hence

    G = delta    and    Sigma = (|delta|^2 + s^2) I + delta delta^T.
"""

import math

import numpy as np
import pytest

from noiseopt.estimate import NoiseEstimator, WindowNorms

DIMS, RUNS, WINDOWS, SAMPLES = 16, 400, 80, 4
CELLS = [(1.5, 4), (3.0, 2), (16.0, 2), (16.0, 4)]  # B_noise / B and K


def micro_batch_norms(rng, scale, count, windows):
    """|g_i|^2 and |g|^2 of real gradients where |G| = 1 and B_noise = scale."""
    delta = np.zeros(DIMS)
    delta[0] = 1.0
    sd = math.sqrt((scale - 1) / DIMS - 1)  # so that tr(Sigma) = d (1 + s^2) + 1 = scale
    x = rng.standard_normal((windows, count, SAMPLES, DIMS), dtype=np.float32)
    residual = x @ delta - sd * rng.standard_normal((windows, count, SAMPLES))
    gradients = np.einsum("wknd,wkn->wkd", x, residual) / SAMPLES
    return (gradients**2).sum(-1).tolist(), (gradients.mean(1) ** 2).sum(-1).tolist()


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: f"r={cell[0]:g}-K={cell[1]}")
def cell(request):
    """Many runs' estimates of one noise, and the noise scale itself."""
    ratio, count = request.param
    scale = ratio * count * SAMPLES
    rng = np.random.default_rng(count)
    norms, means = micro_batch_norms(rng, scale, count, RUNS * WINDOWS)
    samples = [SAMPLES] * count
    windows = [
        WindowNorms.from_micro_batches(q, mean, samples)
        for q, mean in zip(norms, means, strict=True)
    ]
    estimates = []
    for start in range(0, len(windows), WINDOWS):
        estimator = NoiseEstimator()
        for window in windows[start : start + WINDOWS]:
            estimator = estimator.update(window)
        estimates.append(estimator.estimate(count * SAMPLES))
    return scale, estimates


def test_trace_signal_and_scale_are_within_two_percent(cell):
    """Beyond three standard errors of the simulation; the scale is that of the pooled averages.

    A single run's scale is biased upward, as any ratio is, and winsorising costs the skewed signal
    about 0.5 %.
    """
    scale, estimates = cell
    found = np.array([(estimate.trace / scale, estimate.signal) for estimate in estimates])
    error = np.abs(found.mean(0) - 1)
    allowed = 0.02 + 3 * found.std(0) / math.sqrt(RUNS)
    assert (error < allowed).all()
    pooled = found[:, 0].mean() / found[:, 1].mean()
    assert abs(pooled - 1) < allowed.max()


def test_the_two_sided_interval_covers_at_its_level(cell):
    """93 to 97 % where 95 % is promised, within three standard errors of the simulation.

    More where the signal is often below 0, which counts as 0 and widens the interval: 98 %.
    Measured over 1200 runs: 95, 96, 98 and 98 % in the order of the cells.
    """
    scale, estimates = cell
    intervals = [estimate.scale_interval for estimate in estimates]
    covered = np.mean([low <= scale <= high for low, high in intervals])
    error = 3 * math.sqrt(0.95 * 0.05 / RUNS)
    resolved = scale < 4 * estimates[0].batch
    assert 0.93 - error < covered < (0.97 + error if resolved else 1)


def test_the_one_sided_bounds_hold_at_least_as_often_as_promised(cell):
    """93 % or more of either, within three standard errors of the simulation."""
    scale, estimates = cell
    least = 0.93 - 3 * math.sqrt(0.95 * 0.05 / RUNS)
    assert np.mean([estimate.scale_lower <= scale for estimate in estimates]) > least
    assert np.mean([estimate.scale_upper >= scale for estimate in estimates]) > least
