"""A recorded run decided again: by its own settings, or by others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from noiseopt.control import RATE_RULES, Controller, ControllerState, Decision, Start
from noiseopt.record.reading import Record

# These say what is measured and when is decided, which a record has settled.
SETTLED = {
    *("accumulation", "gradients", "loss_reduction", "skip_nonfinite"),
    *("samples_per_micro_batch", "tokens_per_sample"),
    *("decision_interval", "probe_interval", "measure_interval"),
}
# What of a controller's state is decided, not measured.
DECIDED = (
    *("accumulation_steps", "kept_steps", "reference_steps", "noise_ratio", "max_norm"),
    *("verification", "changed_at_samples", "changed_at_updates", "reverts", "blocked_until"),
    "caution",
)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A decision as it was recorded, and as it comes out again from the same measurements.

    Attributes:
        recorded: the decision in the record.
        again: what is decided now.
    """

    recorded: Decision
    again: Decision

    @property
    def same(self) -> bool:
        """Whether they are equal, evidence and reason included."""
        one, other = self.recorded, self.again
        return one == other or repr(one) == repr(other)  # where nan is nan

    @property
    def same_deed(self) -> bool:
        """Whether they lead to the same windows, rates and clipping."""
        one, other = self.recorded, self.again
        return (one.accumulation_steps, one.rates, one.max_norm) == (
            other.accumulation_steps,
            other.rates,
            other.max_norm,
        )


def replay(record: Record, changes: Mapping[str, Any] | None = None) -> Iterator[Replayed]:
    """Decide a recorded run again, from its measurements and learning rates.

    By its own settings, every stretch is decided again from the state it began with, and the same
    comes out unless the rules have changed since. With changed settings, what was measured stays
    as it is: what another window would have done to the gradients is not known, only what would
    have been decided from these.

    Args:
        record: the run.
        changes: values of `NoiseConfig` to be changed.

    Raises:
        ValueError: a changed value is out of range, or is of what a record has settled.
        TypeError: there is no such setting, or its value is of the wrong type.
    """
    settled = SETTLED & (changes or {}).keys()
    if settled or (changes or {}).get("mode") == "off":
        names = ", ".join(sorted(settled)) or "mode='off'"
        raise ValueError(f"{names} cannot be changed: a record has settled what was measured")
    controller: Controller | None = None
    for stretch in record.stretches:
        if not changes:
            controller = stretch.start.controller()
        else:
            controller = _changed(stretch.start, changes, controller)
        for recorded in stretch.decisions:
            if recorded.unit == "samples":
                controller = controller.counting_samples()  # as set_samples() has it
            for window in recorded.windows:
                controller = controller.learn(window)
            controller, again = controller.decide(recorded.lr, recorded.windows, recorded.seconds)
            yield Replayed(recorded, again)


def _changed(start: Start, changes: Mapping[str, Any], before: Controller | None) -> Controller:
    """The controller that goes on, or begins, with changed settings."""
    config = replace(start.config, **changes)
    if not start.state.num_windows and before is None:
        fresh = Start.of_run(config, start.rule, start.groups).controller()
        return fresh.on_ranks(start.state.num_ranks)
    if before is None and "accumulation_steps" in changes:
        raise ValueError(
            "accumulation_steps cannot be changed: it is the first window, and the record begins "
            f"after {start.state.num_windows} windows"
        )
    state = start.state if before is None else _decided_by(before, start)
    controller = Controller(config, RATE_RULES[start.rule], state.within(config))
    return controller.with_estimator_settings()


def _decided_by(before: Controller, start: Start) -> ControllerState:
    """A start's state, with what would have been decided by then in place of what was.

    What was measured is the start's: no decision tells the windows between the last one and a
    checkpoint. Where the averages themselves are changed, they go on as they are.
    """
    samples = start.config.samples_per_micro_batch
    config = replace(before.config, samples_per_micro_batch=samples)
    before = replace(before, config=config)
    own, state = before.on_ranks(start.state.num_ranks).state, start.state
    if len(own.estimator.groups) != len(start.groups):
        return state
    decided = {name: getattr(own, name) for name in DECIDED}
    if own.estimator.settings != state.estimator.settings:
        decided["estimator"] = own.estimator
    return replace(state, **decided)
