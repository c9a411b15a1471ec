"""Torch optimizers that measure gradient noise and act on it."""

import importlib
from typing import Any

from noiseopt.control import Decision as Decision
from noiseopt.control import NoiseConfig as NoiseConfig
from noiseopt.estimate import NoiseEstimate as NoiseEstimate
from noiseopt.monitor import NoiseMonitor as NoiseMonitor
from noiseopt.optim import NoiseAwareAdam as NoiseAwareAdam
from noiseopt.optim import NoiseAwareAdamW as NoiseAwareAdamW
from noiseopt.optim import NoiseAwareSGD as NoiseAwareSGD
from noiseopt.optim import noise_aware as noise_aware

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "NoiseAwareMuon":
        return importlib.import_module("noiseopt.optim").NoiseAwareMuon
    raise AttributeError(f"module 'noiseopt' has no attribute {name!r}")
