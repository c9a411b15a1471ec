"""Norms in, estimate out: the gradient noise scale with its uncertainty. Pure Python, no torch."""

from noiseopt.estimate.adam_moments import noise_from_adam_moments as noise_from_adam_moments
from noiseopt.estimate.average import Average as Average
from noiseopt.estimate.estimator import GroupNoise as GroupNoise
from noiseopt.estimate.estimator import NoiseEstimate as NoiseEstimate
from noiseopt.estimate.estimator import NoiseEstimator as NoiseEstimator
from noiseopt.estimate.interval import RatioBounds as RatioBounds
from noiseopt.estimate.interval import noise_fraction as noise_fraction
from noiseopt.estimate.interval import ratio_bounds as ratio_bounds
from noiseopt.estimate.window import NoiseSample as NoiseSample
from noiseopt.estimate.window import WindowNorms as WindowNorms
