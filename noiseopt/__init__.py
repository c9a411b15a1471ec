"""Torch optimizers that measure gradient noise and act on it."""

from noiseopt.control import Decision as Decision
from noiseopt.control import NoiseConfig as NoiseConfig
from noiseopt.estimate import NoiseEstimate as NoiseEstimate
from noiseopt.optim import NoiseAwareAdam as NoiseAwareAdam
from noiseopt.optim import NoiseAwareAdamW as NoiseAwareAdamW
from noiseopt.optim import NoiseAwareSGD as NoiseAwareSGD
from noiseopt.optim import noise_aware as noise_aware

__version__ = "0.1.0"
