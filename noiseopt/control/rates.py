"""How the hyper-parameters follow the batch: learning rate, both betas and weight decay.

With kappa = B' / B and noise = B_noise / B, all at the reference batch B for which the user chose
them. Sources: AdaScale (Johnson et al., arXiv 2007.05105, eq. 2) for SGD; the square-root rule of
Malladi et al. (arXiv 2205.10287) where noise dominates, fading out where it does not, for Adam;
beta2 by Marek et al. (arXiv 2507.07101); weight decay by Bergsma et al. (arXiv 2505.13738).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

RateRule = Callable[[float, float], float]


def adascale_gain(kappa: float, noise: float) -> float:
    """The gain r in [1, kappa] of one step at kappa times the batch: (1 + noise)/(1 + noise/kappa).

    Example:
        >>> adascale_gain(4.0, math.inf), adascale_gain(4.0, 0.0)
        (4.0, 1.0)
    """
    return kappa if math.isinf(noise) else (1 + noise) / (1 + noise / kappa)


def sqrt_gain(kappa: float, noise: float) -> float:
    """The square root of AdaScale's gain: sqrt(kappa) where noise dominates, 1 where it is absent.

    Example:
        >>> sqrt_gain(4.0, math.inf), sqrt_gain(4.0, 0.0)
        (2.0, 1.0)
    """
    return math.sqrt(adascale_gain(kappa, noise))


RATE_RULES: dict[str, RateRule] = {"adam": sqrt_gain, "sgd": adascale_gain}


@dataclass(frozen=True, slots=True)
class Rates:
    """The factors that one update puts on the user's hyper-parameters, and takes back.

    Attributes:
        lr: factor on the learning rate.
        beta1: exponent on Adam's beta1; as the factor on the learning rate it keeps the distance
            over which the first moment averages.
        beta2: exponent on beta2; the batch's growth keeps its half-life in samples.
        weight_decay: factor on decoupled weight decay, which keeps its timescale in samples.
    """

    lr: float = 1.0
    beta1: float = 1.0
    beta2: float = 1.0
    weight_decay: float = 1.0


def scaled_beta(beta: float, exponent: float, least: float) -> float:
    """A beta to the power of the batch's growth, not below `least` unless the user's own is.

    Example:
        >>> scaled_beta(0.95, 2.0, least=0.9)
        0.9025
    """
    return max(beta**exponent, min(least, beta)) if exponent != 1 else beta


def bias_correction(
    beta: float, own: float, num_updates: int, log_decay: float, own_log_decay: float
) -> float:
    """By what scaling a beta makes torch's debiased moment too large, or too small.

    torch divides a moment by 1 - beta^t with today's beta. What it holds is the weight
    1 - prod(beta_s) of all earlier ones. Where the user's own beta changes, torch is off by as much
    without any scaling, which is left as it is.

    Args:
        beta: today's beta.
        own: the user's own today.
        num_updates: t, this update included.
        log_decay: the sum of log(beta_s) over the t updates, this one included.
        own_log_decay: the same of the user's own betas.
    """
    if own == 0 or (beta == own and log_decay == own_log_decay):
        return 1.0
    held = math.expm1(log_decay) / math.expm1(own_log_decay)
    return held * math.expm1(num_updates * math.log(own)) / math.expm1(num_updates * math.log(beta))
