"""What an adaptation says of itself when training starts, and in an optimizer's `repr`."""

from noiseopt.adaptation import Adaptation
from noiseopt.control import unknown


def describe(adaptation: Adaptation, num_params: int) -> str:
    """One line on what is measured and what is not known yet."""
    config, ranks = adaptation.config, adaptation.ranks.data
    line = (
        f"noise {config.mode}: {num_params} parameters in {adaptation.num_groups} groups, {ranks} "
        f"{'rank' if ranks == 1 else 'ranks'}, window of {adaptation.steps}"
        f" ({config.accumulation} accumulation, at most {config.max_accumulation_steps})"
    )
    if _lacks_losses(adaptation):
        line += "; no loss reported yet (report_loss), without which no change is verified"
    noise = adaptation.noise
    if noise is None:
        return f"{line}; {unknown(config, adaptation.state)}"
    low, high = noise.scale_interval
    return f"{line}; noise scale {noise.scale:.4g} [{low:.4g}, {high:.4g}] {noise.unit}"


def _lacks_losses(adaptation: Adaptation) -> bool:
    config = adaptation.config
    changes = config.min_accumulation_steps < config.max_accumulation_steps
    return adaptation.acts and config.verify and changes and not adaptation.losses.are_told


def can_measure(adaptation: Adaptation) -> bool:
    """Whether windows as they are, or probes, will show the noise."""
    config = adaptation.config
    probes = adaptation.acts and config.probe_interval > 0
    return adaptation.steps * adaptation.ranks.data > 1 or (
        probes and config.max_accumulation_steps > 1
    )
