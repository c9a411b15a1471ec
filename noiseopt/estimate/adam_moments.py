"""What Adam's own moments suggest about the noise: a figure for dashboards, never for control."""

from noiseopt.estimate.window import NoiseSample


def noise_from_adam_moments(
    first_moment_sq: float, second_moment: float, beta1: float, batch: float
) -> NoiseSample:
    """Estimate the noise from Adam's bias-corrected moments, at no cost in gradients.

    With c = (1 - beta1) / (1 + beta1), the share of the variance that is left in the average of the
    gradients, E[v] = |G|^2 + tr(Sigma) / B and E[|m|^2] = |G|^2 + c tr(Sigma) / B. The two averages
    have different memories and the gradients they average were taken at different weights, whose
    movement depends on the same noise: near stationarity the signal is biased towards the negative.

    Args:
        first_moment_sq: the sum of m^2 over all coordinates.
        second_moment: the sum of v over all coordinates.
        beta1: the decay of m.
        batch: the samples in each gradient that entered the moments.

    Raises:
        ValueError: beta1 is not in (0, 1); at 0 both moments see the same gradient.
    """
    if not 0 < beta1 < 1:
        raise ValueError(f"beta1 is {beta1}: it must lie between 0 and 1 to tell signal from noise")
    left = (1 - beta1) / (1 + beta1)
    noise = (second_moment - first_moment_sq) / (1 - left)
    signal = (first_moment_sq - left * second_moment) / (1 - left)
    return NoiseSample(trace=noise * batch, signal=signal)
