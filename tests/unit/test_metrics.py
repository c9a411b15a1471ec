"""A decision as named numbers: what is known is there, what is not is left out."""

import math
from dataclasses import replace

from noiseopt.control import Controller, NoiseConfig, Window, metrics, sqrt_gain
from noiseopt.estimate import WindowNorms


def decision_after(windows: int, groups: int = 1, **settings):
    config = NoiseConfig(accumulation_steps=2, samples_per_micro_batch=4, **settings)
    controller = Controller.create(config, sqrt_gain, groups)
    for index in range(windows):
        small, big = (5.0 + index % 3 / 2,) * groups, (3.0 + index % 2,) * groups
        norms = WindowNorms(small, big, 4.0, 8.0, 2, 8.0)
        controller = controller.learn(Window(norms, micro_batches=2))
    return controller.decide(lr=1e-3)[1]


def test_an_unknown_noise_leaves_the_samples_and_the_decision():
    found = metrics(decision_after(1))
    assert found["noise/samples"] == 8
    assert [name for name in found if name.startswith("noise/")] == ["noise/samples"]
    assert "clip/max_norm" not in found  # infinite: no clipping


def test_every_number_of_the_estimate_is_named():
    decision = decision_after(40)
    noise = decision.noise
    found = metrics(decision)
    assert found["noise/scale"] == noise.scale
    assert (found["noise/scale_low"], found["noise/scale_high"]) == noise.scale_interval
    assert (found["noise/signal"], found["noise/trace"]) == (noise.signal, noise.trace)
    assert found["decide/accumulation_steps"] == decision.accumulation_steps
    assert found["decide/lr_factor"] == decision.rates.lr


def test_only_finite_floats_come_out():
    decision = decision_after(40)
    noise = replace(decision.noise, scale=math.inf, scale_interval=(3.0, math.inf), signal=math.nan)
    found = metrics(replace(decision, noise=noise, loss=None, grad_norm=math.nan))
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert found["noise/scale_low"] == 3.0
    assert not {"noise/scale", "noise/scale_high", "noise/signal", "decide/loss"} & found.keys()


def test_a_single_group_is_the_model_and_is_not_named_again():
    assert {name.split("/")[0] for name in metrics(decision_after(40))} == {
        "noise",
        "decide",
        "clip",
    }


def test_groups_are_named_by_number_or_as_they_are_called():
    decision = decision_after(40, groups=2)
    group = decision.noise.groups[1]
    for names, name in ((), "1"), (("decayed", "rest"), "rest"), (("of another",), "1"):
        found = metrics(decision, names)
        assert found[f"group/{name}/scale"] == group.scale
        assert found[f"group/{name}/scale_low"] == group.scale_interval[0]
        assert found[f"group/{name}/trace"] == group.trace
        assert found[f"group/{name}/signal"] == group.signal


def test_tokens_are_told_where_their_number_is_known():
    assert "noise/tokens" not in metrics(decision_after(40))
    assert metrics(decision_after(40, tokens_per_sample=128))["noise/tokens"] == 40 * 8 * 128


def test_updates_saved_are_counted_against_windows_of_the_first_length():
    decision = replace(decision_after(40), num_updates=30)
    assert decision.reference_updates == 40
    assert metrics(decision)["decide/updates_saved"] == 10
