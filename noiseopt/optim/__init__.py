"""The drop-in optimizers."""

from noiseopt.optim.noise_aware import NoiseAware as NoiseAware
from noiseopt.optim.optimizers import NoiseAwareAdam as NoiseAwareAdam
from noiseopt.optim.optimizers import NoiseAwareAdamW as NoiseAwareAdamW
from noiseopt.optim.optimizers import NoiseAwareSGD as NoiseAwareSGD
from noiseopt.optim.optimizers import noise_aware as noise_aware

__all__ = ["NoiseAware", "NoiseAwareAdam", "NoiseAwareAdamW", "NoiseAwareSGD", "noise_aware"]

try:
    from noiseopt.optim.optimizers import NoiseAwareMuon as NoiseAwareMuon
except ImportError:  # torch before 2.9 has no Muon
    pass
else:
    __all__ += ["NoiseAwareMuon"]
