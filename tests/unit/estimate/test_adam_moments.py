"""Adam's moments at frozen weights give back the noise that made them."""

import math

import numpy as np
import pytest

from noiseopt.estimate import noise_from_adam_moments


def test_the_expected_moments_give_the_noise_exactly():
    trace, signal, batch, beta1 = 40.0, 3.0, 8, 0.9
    left = (1 - beta1) / (1 + beta1)
    found = noise_from_adam_moments(
        signal + left * trace / batch, signal + trace / batch, beta1, batch
    )
    assert found.trace == pytest.approx(trace, rel=1e-12)
    assert found.signal == pytest.approx(signal, rel=1e-12)


def test_simulated_moments_give_the_noise_within_the_monte_carlo_error():
    """Bias-corrected m and v of iid gradients of known G and Sigma, 400 runs of 300 steps."""
    rng = np.random.default_rng(2)
    runs, dims, batch, beta1, beta2, steps = 400, 50, 4, 0.9, 0.95, 300
    true = 0.3 * rng.standard_normal(dims)
    sd = rng.uniform(0.5, 3.0, dims)
    m, v = np.zeros((runs, dims)), np.zeros((runs, dims))
    for _ in range(steps):
        gradient = true + sd * rng.standard_normal((runs, dims)) / math.sqrt(batch)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
    m, v = m / (1 - beta1**steps), v / (1 - beta2**steps)
    pairs = zip((m**2).sum(1).tolist(), v.sum(1).tolist(), strict=True)
    samples = [noise_from_adam_moments(m_sq, v_sum, beta1, batch) for m_sq, v_sum in pairs]
    found = np.array([(sample.trace, sample.signal) for sample in samples])
    error = found.mean(0) - [(sd**2).sum(), true @ true]
    assert (np.abs(error) < 4 * found.std(0) / math.sqrt(runs)).all()


@pytest.mark.parametrize("beta1", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_beta1_without_two_views_is_refused(beta1):
    with pytest.raises(ValueError, match="beta1 is"):
        noise_from_adam_moments(1.0, 2.0, beta1, 4)
