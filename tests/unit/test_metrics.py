"""A decision as named numbers: what is known is there, what is not is left out."""

import math
from dataclasses import replace

from noiseopt.control import Controller, NoiseConfig, Window, metrics, sqrt_gain
from noiseopt.estimate import WindowNorms


def decision_after(windows: int):
    config = NoiseConfig(accumulation_steps=2, samples_per_micro_batch=4)
    controller = Controller.create(config, sqrt_gain)
    for index in range(windows):
        norms = WindowNorms.from_micro_batches([5.0, 5.0 + index % 3], 3.0 + index % 2, [4, 4])
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


def test_names_are_one_level_deep():
    assert all(name.count("/") == 1 for name in metrics(decision_after(40)))
