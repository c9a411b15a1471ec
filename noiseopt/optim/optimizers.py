"""torch's optimizers made noise-aware: each adds its learning-rate rule, and nothing else."""

import torch
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from noiseopt.control import RATE_RULES
from noiseopt.optim.noise_aware import NoiseAware


class NoiseAwareAdamW(NoiseAware, AdamW):
    """`torch.optim.AdamW` that measures its gradient noise and adapts to it.

    Takes every argument of `torch.optim.AdamW`, then `noise` and `process_group`; `NoiseAware` says
    what these mean and what it offers. Its learning rate follows the square root of AdaScale's
    gain, and beta1 the learning rate.
    """


class NoiseAwareAdam(NoiseAware, Adam):
    """`torch.optim.Adam` that measures its gradient noise and adapts to it.

    Takes every argument of `torch.optim.Adam`, then `noise` and `process_group`; see `NoiseAware`.
    """


class NoiseAwareSGD(NoiseAware, SGD):
    """`torch.optim.SGD` that measures its gradient noise and adapts to it.

    Takes every argument of `torch.optim.SGD`, then `noise` and `process_group`; see `NoiseAware`.
    Its learning rate follows AdaScale's gain, momentum as it is.
    """

    rate_rule = "sgd"


if hasattr(torch.optim, "Muon"):

    class NoiseAwareMuon(NoiseAware, torch.optim.Muon):
        """`torch.optim.Muon` that measures its gradient noise and adapts to it.

        Takes every argument of `torch.optim.Muon`, then `noise` and `process_group`; see
        `NoiseAware`. Its learning rate follows the square root of AdaScale's gain.
        """


def noise_aware(optimizer_class: type[Optimizer], rate_rule: str = "adam") -> type[NoiseAware]:
    """Make any torch optimizer class noise-aware.

    The result is a subclass of both `NoiseAware` and the given class, and takes all of its
    arguments, then `noise` and `process_group`. To pickle its instances, bind it to a name in a
    module of yours, as with any class made by a call.

    Args:
        optimizer_class: the class; its `step()` must not need a closure.
        rate_rule: how its learning rate follows the batch: "adam" (the saturating square root, for
            optimizers that normalise the gradient) or "sgd" (AdaScale's gain).

    Raises:
        TypeError: it is not an optimizer class, is noise-aware already, or needs a closure.
        ValueError: there is no such rule.

    Example:
        >>> NoiseAwareRMSprop = noise_aware(torch.optim.RMSprop)
        >>> issubclass(NoiseAwareRMSprop, torch.optim.RMSprop)
        True
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"{optimizer_class!r} is not a torch optimizer class")
    if issubclass(optimizer_class, NoiseAware):
        raise TypeError(f"{optimizer_class.__name__} is noise-aware already")
    if issubclass(optimizer_class, LBFGS):
        raise TypeError("LBFGS evaluates its closure several times a step: no window can hold that")
    if rate_rule not in RATE_RULES:
        raise ValueError(f"rate_rule is {rate_rule!r}: it must be one of {tuple(RATE_RULES)}")
    namespace = {
        "__doc__": f"`{optimizer_class.__name__}`, noise-aware; see `NoiseAware`.",
        "rate_rule": rate_rule,
    }
    return type(f"NoiseAware{optimizer_class.__name__}", (NoiseAware, optimizer_class), namespace)
