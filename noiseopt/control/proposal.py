"""Which window to use next, and why: the rules, in the order in which they speak.

Where the learning rate rises again, give back what the window grew by as it fell. Revert what hurt.
Hold while the noise is unknown or uncertain, a change is being verified, the rate rises, or a
revert is recent. Halve the window when the batch lies above the noise scale and above what pays by
it, as after a change of the data: one that has grown by the estimate itself, since shrinking late
costs loss, and too early only updates; the user's own by the upper bound. Double it while the batch
stays below the one that pays: an update that costs r samples makes the most progress for its cost
at B = sqrt(r B_noise), here with the lower bound (McCandlish et al., arXiv 1812.06162, appendix D).
Where the user's schedule has lowered the rate by more than that, let the window follow it as long
as enough of the gradient is noise: with the square-root rule this trades a decay by a for one by
sqrt(a) at a times the batch (Seesaw, Meterez et al. 2026), which is equivalent where
tr(Sigma)/B >> |G|^2.

Where the objective is time, the price of an update is measured. The batch that pays then makes the
most progress in a second: it is where the product of samples a second and statistical efficiency,
1 / (1 + B / B_noise), is greatest (goodput; Pollux, Qiao et al., OSDI 2021). So a window shrinks to
it, though the noise scale be larger, unless the decay let it grow; and it follows the decay as far
as that makes a sample clearly quicker.
"""

import math
from dataclasses import dataclass, replace

from noiseopt.control.config import NoiseConfig
from noiseopt.control.costs import Costs, speed_up, timed_steps
from noiseopt.control.state import ControllerState
from noiseopt.estimate import NoiseEstimate, noise_fraction

ABOVE = math.sqrt(2)  # times what is enough, from where on a window that has grown is halved
FAR_ABOVE = 2 * math.sqrt(2)  # the same of the user's own, and of one that follows the decay
SLACK = 1.1  # times what the decay lets grow, to where a rate that jitters lets windows be
SUDDEN = 0.7  # of the rate at the decision before: below, it may be the start of a warm-up
LEAST_SPEED_UP = 1.05  # for which a window follows the decay, where the objective is time


@dataclass(frozen=True, slots=True)
class Change:
    """A proposed window and the reason for it.

    Attributes:
        action: "hold", "grow", "shrink" or "revert".
        steps: the window to use, in micro-batches on each rank.
        reason: why, in words and numbers.
        by_decay: whether it follows the learning rate; the next change need not wait for that.
    """

    action: str
    steps: int
    reason: str
    by_decay: bool = False


def propose(
    config: NoiseConfig,
    state: ControllerState,
    noise: NoiseEstimate | None,
    costs: Costs | None = None,
) -> Change:
    """Propose the next window.

    Args:
        config: the settings.
        state: the controller's state.
        noise: the estimate; None while it is unknown.
        costs: of time; None while they are unknown, or not asked for.
    """
    steps = state.accumulation_steps
    back = _follow_back(config, state)
    if back:
        return back
    verdict = state.verdict(config.loss_tolerance) if config.verify else "fine"
    if verdict == "hurt":
        return _revert(config, state)
    if noise is None:
        return Change("hold", steps, unknown(config, state))
    waiting = _wait(config, state, noise, verdict)
    if waiting:
        return Change("hold", steps, waiting)
    if config.objective == "time":
        if costs is None:
            return Change("hold", steps, _costs_unknown(config, steps))
        least, most = costs.price(steps)
    else:
        least = most = config.update_price * state.reference_steps
    return _shrink(config, state, noise, most) or _grow(config, state, noise, least)


def unknown(config: NoiseConfig, state: ControllerState) -> str:
    """Why there is no estimate yet, in words."""
    if state.accumulation_steps * state.gradients_per_step > 1:
        return f"noise unknown: {state.estimator.windows} windows measured so far"
    if config.mode == "auto" and config.probe_interval:
        return (
            "noise unknown: a window of 1 has one gradient and no spread; one in "
            f"{config.probe_interval} is a probe window of 2 ({state.estimator.windows} so far)"
        )
    return (
        "noise unknown: a window of 1 has one gradient and no spread, and nothing is probed; "
        "set accumulation_steps >= 2, or mode='auto' with probe_interval > 1"
    )


def _wait(
    config: NoiseConfig, state: ControllerState, noise: NoiseEstimate, verdict: str
) -> str | None:
    """Why nothing may change now; None if something may."""
    if noise.count < config.min_count:
        count, least = noise.count, config.min_count
        return f"the estimate rests on {count:.1f} windows of the {least:g} required"
    if state.reverts >= config.max_reverts:
        return f"{state.reverts} changes were reverted: no more are made"
    if state.verification.pending and verdict == "open":
        return "the last change is being verified against the loss"
    if state.phase == "warm-up":
        return f"the learning rate is rising ({state.lr:.3g})"
    if state.estimator.samples_seen < state.blocked_until:
        return "nothing changes for a while after a revert"
    return None


def _follow_back(config: NoiseConfig, state: ControllerState) -> Change | None:
    steps, least = state.accumulation_steps, config.min_accumulation_steps
    enough = max(state.kept_steps, _by_decay_at_most(config, state, state.decay), least)
    follows = steps <= SLACK * state.reference_steps * state.decay
    if not config.grow_in_decay or state.phase != "warm-up" or follows or enough >= steps:
        return None
    rose = f"the learning rate rose to 1/{state.decay:.2f} of its peak"
    return Change("shrink", enough, f"{rose}, and the window follows it back", by_decay=True)


def _revert(config: NoiseConfig, state: ControllerState) -> Change:
    verification = state.verification
    low, high = config.min_accumulation_steps, config.max_accumulation_steps
    return Change(
        "revert",
        min(max(verification.revert_to, low), high),
        f"the loss runs {verification.mean_excess:.4g} above its trend of "
        f"{verification.expected:.4g} since the window became {state.accumulation_steps}",
    )


def _costs_unknown(config: NoiseConfig, steps: int) -> str:
    one = "costs unknown: windows of one length do not tell an update's time from a micro-batch's"
    if config.mode != "auto":
        return f"{one}, and no others are made"
    if timed_steps(config.min_accumulation_steps, steps, config.max_accumulation_steps) is None:
        return (
            f"{one}, and no other that is allowed is far enough from {steps}: set "
            f"max_accumulation_steps >= {2 * steps}"
        )
    return f"{one}; some decisions' windows are of another, to be timed"


def _shrink(
    config: NoiseConfig, state: ControllerState, noise: NoiseEstimate, price: float
) -> Change | None:
    steps, users = state.accumulation_steps, math.ceil(state.reference_steps)
    if steps > users:
        rested, least, scale = state.dwelt(config), users, noise.scale
    else:
        rested, least, scale = state.settled(config), 1, noise.scale_upper
    smaller = max(steps // 2, least, config.min_accumulation_steps)
    if not config.shrink or smaller >= steps or not rested:
        return None
    enough = _enough(config, state, noise, price, state.caution * scale, steps)
    if noise.batch < _above(config, state, steps) * enough:
        return None
    reason = f"a batch of {enough:.4g} is enough at this noise: {noise.batch:.4g} is above it"
    return Change("shrink", smaller, reason)


def _enough(
    config: NoiseConfig,
    state: ControllerState,
    noise: NoiseEstimate,
    price: float,
    scale: float,
    steps: int,
) -> float:
    """The batch above which windows of so many steps are not worth it, at this noise scale."""
    paying = _paying(state, noise, price, scale)
    follows = _follows_decay(config, state, steps)
    return max(paying, scale) if config.objective == "updates" or follows else paying


def _above(config: NoiseConfig, state: ControllerState, steps: int) -> float:
    """How many times what is enough a batch of so many steps is where it is halved."""
    grown = steps > math.ceil(state.reference_steps)
    return ABOVE if grown and not _follows_decay(config, state, steps) else FAR_ABOVE


def _follows_decay(config: NoiseConfig, state: ControllerState, steps: int) -> bool:
    """Whether windows of so many steps are of a length that the decay lets grow."""
    most = _by_decay_at_most(config, state, state.decay)
    return config.grow_in_decay and state.reference_steps < steps <= most


def paying_batch(price: float, scale: float) -> float:
    """The batch of the most progress for its cost, where an update costs `price` samples.

    One step makes 1 / (1 + scale / B) of an exact step's progress for price + B samples
    (McCandlish et al., arXiv 1812.06162, appendix D).

    Example:
        >>> paying_batch(price=32.0, scale=8.0)
        16.0
    """
    return math.sqrt(price * scale) if price > 0 else 0.0


def _paying(state: ControllerState, noise: NoiseEstimate, price: float, scale: float) -> float:
    """The batch that pays at this noise scale, where an update costs `price` micro-batches."""
    return paying_batch(price * noise.batch / state.accumulation_steps, scale)


def _grow(
    config: NoiseConfig, state: ControllerState, noise: NoiseEstimate, price: float
) -> Change:
    by_noise = _grow_by_noise(config, state, noise, price)
    if state.phase != "decay":
        return by_noise
    by_decay = _grow_by_decay(config, state, noise, price)
    if "grow" in (by_decay.action, by_noise.action):
        return max(by_decay, by_noise, key=lambda change: change.steps)
    return replace(by_decay, reason=f"{by_decay.reason}; {by_noise.reason}")


def _grow_by_noise(
    config: NoiseConfig, state: ControllerState, noise: NoiseEstimate, price: float
) -> Change:
    steps = state.accumulation_steps
    larger = min(2 * steps, config.max_accumulation_steps)
    batch = noise.batch * larger / steps
    room = _paying(state, noise, price, state.caution * noise.scale_lower)
    if not config.grow_by_noise:
        return Change("hold", steps, "growth by the noise scale is off")
    if larger == steps:
        return Change("hold", steps, f"the window is at its limit of {steps}")
    pays = f"{room:.4g} that pays at this noise"
    if config.objective == "time":
        pays += f", where an update costs at least {price:.3g} micro-batches"
    if batch > room:
        return Change("hold", steps, f"a batch of {batch:.4g} exceeds the {pays}")
    if not state.settled(config):
        return Change("hold", steps, "too soon after the last change")
    return Change("grow", larger, f"a batch of {batch:.4g} is below the {pays}")


def _by_decay_at_most(config: NoiseConfig, state: ControllerState, decay: float) -> int:
    """The longest window that such a decay lets grow."""
    most = state.reference_steps * decay + 1e-9
    return math.floor(min(most, config.max_accumulation_steps))


def _lasting_decay(state: ControllerState) -> float:
    """The decay; of the decision before, where the rate has fallen suddenly since."""
    if 0 < state.lr < SUDDEN * state.previous_lr:
        return max(state.peak_lr / state.previous_lr, 1.0)
    return state.decay


def _grow_by_decay(
    config: NoiseConfig, state: ControllerState, noise: NoiseEstimate, price: float
) -> Change:
    steps, decay = state.accumulation_steps, _lasting_decay(state)
    if not config.grow_in_decay or state.lr <= 0:
        return Change("hold", steps, "growth in decay is off, or the learning rate is 0")
    allowed = _by_decay_at_most(config, state, decay)
    larger = min(allowed, 2 * steps)
    fell = f"the learning rate fell to 1/{decay:.2f} of its peak"
    if larger <= steps:
        return Change("hold", steps, f"{fell}: by that, a window of {allowed} at most")
    quicker = speed_up(price, steps, larger)
    if config.objective == "time" and quicker < LEAST_SPEED_UP:
        gained = f"windows of {larger} make a sample {quicker:.3f} times as quick"
        return Change("hold", steps, f"{fell}, but {gained}: growth takes {LEAST_SPEED_UP:g}")
    fraction = noise_fraction(state.caution * noise.scale_lower, noise.batch)
    share = f"noise is at least {fraction:.3f} of the gradient"
    if fraction < config.decay_noise_fraction:
        least = config.decay_noise_fraction
        return Change("hold", steps, f"{fell}, but {share}: growth takes {least:.3g}")
    enough = _enough(config, state, noise, price, state.caution * noise.scale_lower, larger)
    batch = noise.batch * larger / steps
    if batch >= _above(config, state, larger) * enough:  # it would be taken back
        return Change(
            "hold", steps, f"{fell}, but a batch of {batch:.4g} is above the {enough:.4g} it takes"
        )
    return Change("grow", larger, f"{fell} and {share}", by_decay=True)
