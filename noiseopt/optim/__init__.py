"""The drop-in optimizers."""

from typing import Any

from noiseopt.optim import optimizers
from noiseopt.optim.noise_aware import NoiseAware as NoiseAware
from noiseopt.optim.optimizers import NoiseAwareAdam as NoiseAwareAdam
from noiseopt.optim.optimizers import NoiseAwareAdamW as NoiseAwareAdamW
from noiseopt.optim.optimizers import NoiseAwareSGD as NoiseAwareSGD
from noiseopt.optim.optimizers import noise_aware as noise_aware


def __getattr__(name: str) -> Any:
    if name == "NoiseAwareMuon":
        if hasattr(optimizers, name):
            return optimizers.NoiseAwareMuon
        raise ImportError("NoiseAwareMuon takes torch 2.9 or later, the first to have Muon")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
