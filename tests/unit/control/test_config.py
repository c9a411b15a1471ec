"""Settings are checked once, before anything is changed, and the message says what to do."""

import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from noiseopt.control import NoiseConfig

INTEGERS = {
    "accumulation_steps": 1,
    "min_accumulation_steps": 1,
    "max_accumulation_steps": 1,
    "decision_interval": 1,
    "probe_interval": 0,
    "measure_interval": 1,
    "dwell_updates": 1,
    "max_reverts": 1,
}  # with the least allowed value
AT_LEAST_ONE = ("half_life_windows", "winsorise", "min_count", "max_lr_factor")
AT_LEAST_ZERO = ("dwell_fraction", "loss_tolerance")
POSITIVE = ("samples_per_micro_batch", "tokens_per_sample", "update_price", "clip_z", "max_norm")
SHARES = ("half_life_fraction", "confidence", "decay_noise_fraction", "min_beta2")
FLOATS = (*AT_LEAST_ONE, *AT_LEAST_ZERO, *POSITIVE, *SHARES)
SWITCHES = (
    *(
        "grow_by_noise",
        "grow_in_decay",
        "shrink",
        "adapt_lr",
        "adapt_beta1",
        "adapt_beta2",
        "adapt_weight_decay",
    ),
    *("verify", "adapt_clip", "skip_nonfinite"),
)
WORDS = ("mode", "accumulation", "gradients", "loss_reduction", "objective")

OUT_OF_RANGE = [
    *((name, least - 1) for name, least in INTEGERS.items()),
    *((name, 0.999) for name in AT_LEAST_ONE),
    *((name, -1e-9) for name in AT_LEAST_ZERO),
    *((name, value) for name in POSITIVE for value in (0.0, -1.0)),
    *((name, value) for name in SHARES for value in (0.0, 1.0, -0.1, 2.0)),
    *((name, math.nan) for name in FLOATS),
    ("probe_interval", 1),
    ("samples_per_micro_batch", math.inf),
    ("tokens_per_sample", math.inf),
    ("update_price", math.inf),
    ("confidence", 0.05),
    ("mode", "on"),
    ("accumulation", "both"),
    ("gradients", "ddp"),
    ("loss_reduction", "none"),
    ("objective", "loss"),
]
WRONG_TYPE = [
    *((name, value) for name in INTEGERS for value in (2.0, "2", True, None)),
    *((name, value) for name in FLOATS for value in ("1", True, [1.0])),
    *((name, value) for name in SWITCHES for value in (1, "yes", None)),
    *((name, value) for name in WORDS for value in (None, 1, True)),
]


def test_every_field_is_tested_here():
    """A new field needs its bad values in this file."""
    named = {*INTEGERS, *FLOATS, *SWITCHES, *WORDS}
    assert {item.name for item in fields(NoiseConfig)} == named


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"NoiseConfig\.{name} is") as caught:
        NoiseConfig(**{name: value})
    assert repr(value) in str(caught.value)
    assert "it must be" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_a_value_of_the_wrong_type_is_refused_by_name_and_value(name, value):
    with pytest.raises(TypeError, match=rf"NoiseConfig\.{name} is") as caught:
        NoiseConfig(**{name: value})
    assert repr(value) in str(caught.value)
    assert "it must be of type" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation_steps": 33},
        {"accumulation_steps": 2, "min_accumulation_steps": 4},
        {"min_accumulation_steps": 8, "max_accumulation_steps": 4, "accumulation_steps": 8},
    ],
)
def test_contradicting_windows_are_refused_with_both_limits(settings):
    with pytest.raises(ValueError, match=r"min_accumulation_steps = \d+ to max_acc.* = \d+"):
        NoiseConfig(**settings)


def test_an_unknown_or_positional_setting_is_refused():
    with pytest.raises(TypeError, match="noise_scale"):
        NoiseConfig(noise_scale=3)
    with pytest.raises(TypeError):
        NoiseConfig("auto")


def test_the_defaults_and_the_edges_are_valid():
    assert NoiseConfig() == NoiseConfig()
    edges = {
        **INTEGERS,
        **dict.fromkeys(AT_LEAST_ONE, 1),  # integers do where a float is wanted
        **dict.fromkeys(AT_LEAST_ZERO, 0),
        "max_norm": math.inf,
        "samples_per_micro_batch": None,
        "tokens_per_sample": None,
        "mode": "off",
        "accumulation": "external",
    }
    config = NoiseConfig(**edges)
    assert all(getattr(config, name) == value for name, value in edges.items())


def test_settings_cannot_be_changed_and_copies_are_checked_again():
    config = NoiseConfig()
    with pytest.raises(FrozenInstanceError):
        config.mode = "off"
    with pytest.raises(ValueError, match="clip_z is -1"):
        replace(config, clip_z=-1.0)
