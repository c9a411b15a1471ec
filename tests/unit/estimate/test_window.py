"""One window's noise sample: equal to the known formulas, unbiased, and clear about bad input."""

import math

import numpy as np
import pytest

from noiseopt.estimate import NoiseSample, WindowNorms

NORMS = [7.0, 5.5, 9.25, 6.0]
UNEQUAL = [3, 8, 1, 5]
MEAN_SQ = 4.5


def test_two_equal_gradients_give_the_two_batch_formula():
    """McCandlish et al. App. A.1 with B_small = 8 and B_big = 16."""
    small, big = (5.0 + 7.0) / 2, 3.5
    (sample,) = WindowNorms.from_micro_batches([5.0, 7.0], big, [8, 8]).noise()
    assert sample.signal == pytest.approx((16 * big - 8 * small) / (16 - 8), rel=1e-14)
    assert sample.trace == pytest.approx((small - big) / (1 / 8 - 1 / 16), rel=1e-14)


def test_weights_by_samples_give_the_analysis_of_variance():
    """S = (sum n_i q_i - N Q) / (K - 1), G2 = Q - S / N, for unequal n_i."""
    (sample,) = WindowNorms.from_micro_batches(NORMS, MEAN_SQ, UNEQUAL).noise()
    total = sum(UNEQUAL)
    weighted = sum(n * q for n, q in zip(UNEQUAL, NORMS, strict=True))
    trace = (weighted - total * MEAN_SQ) / (len(NORMS) - 1)
    assert sample.trace == pytest.approx(trace, rel=1e-13)
    assert sample.signal == pytest.approx(MEAN_SQ - trace / total, rel=1e-13)


def test_any_weights_give_the_general_formula():
    """S = (sum w_i q_i - Q) / sum w_i (1 - w_i) / n_i, G2 = Q - S sum w_i^2 / n_i."""
    raw = [0.5, 2.0, 1.0, 0.25]
    (sample,) = WindowNorms.from_micro_batches(NORMS, MEAN_SQ, UNEQUAL, raw).noise()
    w, n, q = np.array(raw) / sum(raw), np.array(UNEQUAL), np.array(NORMS)
    trace = ((w * q).sum() - MEAN_SQ) / (w * (1 - w) / n).sum()
    assert sample.trace == pytest.approx(trace, rel=1e-13)
    assert sample.signal == pytest.approx(MEAN_SQ - trace * (w * w / n).sum(), rel=1e-13)


def test_both_batches_of_equal_gradients_are_the_micro_batch_and_the_window():
    window = WindowNorms.from_micro_batches(NORMS, MEAN_SQ, [6] * 4)
    assert (window.small_batch, window.big_batch) == (pytest.approx(6), pytest.approx(24))
    assert (window.count, window.samples) == (4, 24)


def test_a_negative_sample_keeps_its_sign():
    """Nothing is floored before it is averaged."""
    assert WindowNorms.from_micro_batches([5.0, 5.0], 1.0, [4, 4]).noise()[0].signal < 0
    assert WindowNorms.from_micro_batches([1.0, 1.0], 2.0, [4, 4]).noise()[0].trace < 0


def test_each_group_has_its_own_sample():
    window = WindowNorms((5.0, 9.0), (3.0, 6.0), small_batch=4.0, big_batch=8.0, count=2, samples=8)
    assert window.noise() == (NoiseSample(16.0, 1.0), NoiseSample(24.0, 3.0))


@pytest.mark.parametrize("weights", [None, [1.0] * 5, [4.0, 1.0, 0.5, 2.0, 2.5]])
def test_the_sample_is_unbiased(weights):
    """Over 20 000 windows of known G and Sigma the mean is within four standard errors."""
    rng = np.random.default_rng(1)
    samples, dims, windows = np.array([1, 7, 2, 4, 16]), 6, 20_000
    true = rng.standard_normal(dims)
    root = rng.standard_normal((dims, dims))  # Sigma = root root^T
    w = samples / samples.sum() if weights is None else np.array(weights) / sum(weights)
    noise = rng.standard_normal((windows, 5, dims)) @ root.T / np.sqrt(samples)[:, None]
    gradients = true + noise
    norms = (gradients**2).sum(-1)
    means = (np.einsum("k,wkd->wd", w, gradients) ** 2).sum(-1)
    found = np.array(
        [
            (sample.trace, sample.signal)
            for q, mean in zip(norms.tolist(), means.tolist(), strict=True)
            for sample in WindowNorms.from_micro_batches(q, mean, samples.tolist(), weights).noise()
        ]
    )
    error = found.mean(0) - [(root**2).sum(), true @ true]
    assert (np.abs(error) < 4 * found.std(0) / math.sqrt(windows)).all()


def test_one_gradient_has_no_noise_sample():
    with pytest.raises(ValueError, match="window of 1 gradient"):
        WindowNorms.from_micro_batches([2.0], 2.0, [4]).noise()


@pytest.mark.parametrize(
    ("norms", "samples", "weights", "words"),
    [
        ([1.0, 2.0], [4], None, "2 norms, 1 sample counts"),
        ([1.0, 2.0], [4, 4], [1.0], "1 weights"),
        ([], [], None, "0 norms"),
        ([1.0, 2.0], [4, 0], None, "must be positive"),
        ([1.0, 2.0], [4, 4], [1.0, -1.0], "must be positive"),
    ],
)
def test_inconsistent_micro_batches_are_refused(norms, samples, weights, words):
    with pytest.raises(ValueError, match=words):
        WindowNorms.from_micro_batches(norms, 1.0, samples, weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_norm_anywhere_makes_the_window_not_finite(bad):
    good = WindowNorms((1.0, 2.0), (0.5, 1.0), 4.0, 8.0, 2, 8.0)
    assert good.finite
    assert not WindowNorms((1.0, bad), (0.5, 1.0), 4.0, 8.0, 2, 8.0).finite
    assert not WindowNorms((1.0, 2.0), (bad, 1.0), 4.0, 8.0, 2, 8.0).finite
