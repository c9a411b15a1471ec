"""The learning-rate rules, beta2 and the bias correction against their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.control import adascale_gain, bias_correction, scaled_beta, sqrt_gain

growth = st.floats(1, 64)
noises = st.floats(0, 1e6)


@given(growth, noises)
def test_adascale_is_the_ratio_of_the_expected_squared_norms(kappa, noise):
    """(|G|^2 + tr(Sigma)/B) / (|G|^2 + tr(Sigma)/(kappa B)) with |G|^2 = 1 and B = 1."""
    expected = (1 + noise) / (1 + noise / kappa)
    assert adascale_gain(kappa, noise) == pytest.approx(expected)
    assert sqrt_gain(kappa, noise) == pytest.approx(math.sqrt(expected))


@pytest.mark.parametrize("kappa", [0.25, 0.5, 1.0, 2.0, 8.0])
def test_the_limits_are_the_linear_and_the_root_rule_and_none(kappa):
    assert adascale_gain(kappa, 0.0) == sqrt_gain(kappa, 0.0) == 1
    assert adascale_gain(kappa, math.inf) == kappa
    assert sqrt_gain(kappa, math.inf) == math.sqrt(kappa)
    assert adascale_gain(kappa, 1e12) == pytest.approx(kappa)


@given(growth, growth, noises)
def test_the_gain_rises_with_the_batch_and_stays_between_one_and_kappa(one, other, noise):
    less, more = sorted((one, other))
    assert adascale_gain(less, noise) <= adascale_gain(more, noise) * (1 + 1e-12)
    assert 1 - 1e-12 <= adascale_gain(more, noise) <= more * (1 + 1e-12)


@given(growth, noises, noises)
def test_the_gain_rises_with_the_noise(kappa, one, other):
    less, more = sorted((one, other))
    assert adascale_gain(kappa, less) <= adascale_gain(kappa, more) * (1 + 1e-12)


@given(growth, noises)
def test_a_smaller_batch_takes_back_what_the_larger_gave(kappa, noise):
    """Back from kappa B, where the noise is noise / kappa, the gain is the inverse."""
    back = adascale_gain(1 / kappa, noise / kappa)
    assert back == pytest.approx(1 / adascale_gain(kappa, noise))
    assert back <= 1 + 1e-12


@given(st.floats(0.5, 0.9999), st.floats(0.125, 64))
def test_beta2_keeps_its_half_life_in_samples(beta2, kappa):
    """A half-life of h updates of B samples is one of h / kappa updates of kappa B samples."""
    scaled = scaled_beta(beta2, kappa, least=1e-30)
    assert math.log(2) / -math.log(scaled) * kappa == pytest.approx(math.log(2) / -math.log(beta2))


def test_beta2_has_a_floor_unless_the_user_is_below_it():
    assert scaled_beta(0.95, 8.0, least=0.9) == 0.9
    assert scaled_beta(0.8, 8.0, least=0.9) == 0.8
    assert scaled_beta(0.8, 0.5, least=0.9) == pytest.approx(math.sqrt(0.8))
    assert scaled_beta(0.95, 1.0, least=0.99) == 0.95


@given(st.lists(st.floats(0.5, 0.9999), min_size=1, max_size=40))
def test_the_bias_correction_is_that_of_a_loop_with_changing_betas(betas):
    """torch's debiased moment of a constant is the constant times the correction."""
    value, moment, weight = 3.0, 0.0, 0.0
    for beta in betas:
        moment = beta * moment + (1 - beta) * value
        weight = beta * weight + (1 - beta)
    assert moment / weight == pytest.approx(value)  # the loop's own check
    of_torch = moment / (1 - betas[-1] ** len(betas))
    updates, own = len(betas), 0.9
    decay, own_decay = math.fsum(map(math.log, betas)), len(betas) * math.log(own)
    factor = bias_correction(betas[-1], own, updates, decay, own_decay)
    assert of_torch == pytest.approx(value * factor, rel=1e-6)


def test_a_beta_that_is_not_scaled_needs_no_correction():
    decay = 7 * math.log(0.95)
    assert bias_correction(0.95, 0.95, 7, decay, decay) == 1
    assert bias_correction(0.0, 0.0, 3, -math.inf, -math.inf) == 1.0


@given(
    st.lists(st.floats(0.3, 0.9999), min_size=2, max_size=60),
    st.floats(1 / 8, 8),
)
def test_a_changing_beta_of_the_users_own_is_corrected_by_what_scaling_did(own, exponent):
    """The moment with scaled betas over that with the user's own, each as torch debiases it."""
    moments, betas = [0.0, 0.0], [0.0, 0.0]
    for each in own:
        betas = [each, scaled_beta(each, exponent, 0.0)]
        moments = [b * m + 1 - b for b, m in zip(betas, moments, strict=True)]
    plain, scaled = (m / (1 - b ** len(own)) for m, b in zip(moments, betas, strict=True))
    logs = math.fsum(map(math.log, own))
    factor = bias_correction(betas[1], own[-1], len(own), exponent * logs, logs)
    assert 0 < factor == pytest.approx(scaled / plain, rel=1e-6)
