"""The controller: windows in, decisions out, one pure transition at a time.

`learn` takes in one window; `decide` proposes a change (see `proposal`) and follows it. Neither
knows a clock or randomness: the same windows and learning rates give the same decisions.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from noiseopt.control.config import NoiseConfig
from noiseopt.control.costs import ENOUGH, Timing, timed_steps
from noiseopt.control.decision import Decision, Window
from noiseopt.control.proposal import Change, propose
from noiseopt.control.rates import RateRule, Rates
from noiseopt.control.state import ControllerState
from noiseopt.control.verification import Verification
from noiseopt.estimate import NoiseEstimate

CAUTION_AFTER_REVERT = 0.5
RATE_FOLLOWS = 4.0  # growth of the batch that the learning rate follows, unless told
PROBES_AT_FIRST = 64  # of them, four times as often as later
PROBES_PER_RUN = 512  # after so many, probes become rarer as the run grows longer
MEASURED_AT_FIRST = 64  # windows; mistakes in a loop show there


@dataclass(frozen=True, slots=True)
class Controller:
    """Settings and state; `learn` and `decide` return the next controller.

    Attributes:
        config: the user's settings.
        rule: the optimizer's learning-rate rule, from `noiseopt.control.rates`.
        state: everything that changes, as plain numbers.
    """

    config: NoiseConfig
    rule: RateRule
    state: ControllerState

    @classmethod
    def create(cls, config: NoiseConfig, rule: RateRule, num_groups: int = 1) -> "Controller":
        """A controller at the start of a run."""
        return cls(config, rule, ControllerState.initial(config, num_groups))

    def counting_samples(self) -> "Controller":
        """The same controller, whose windows come counted in samples."""
        return self._with(counts_samples=True)

    def with_groups(self, number: int) -> "Controller":
        """The same controller with so many more parameter groups."""
        return self._with(estimator=self.state.estimator.with_groups(number))

    def with_estimator_settings(self) -> "Controller":
        """The same controller, whose averages go on as its settings say."""
        config = self.config
        estimator = replace(
            self.state.estimator,
            half_life_fraction=config.half_life_fraction,
            half_life_windows=config.half_life_windows,
            winsorise=config.winsorise,
        )
        return self._with(estimator=estimator)

    def on_ranks(self, ranks: int) -> "Controller":
        """The same controller on so many ranks, its batches as near as whole windows allow.

        The window, and what it is compared with, is counted in micro-batches on each rank: on
        twice the ranks half as many make the same batch, and so do half as many of twice the
        samples, where the settings say another number of them than the state. What is in samples
        stays as it is.
        """
        state, config = self.state, self.config
        samples = float(config.samples_per_micro_batch or state.samples_per_micro_batch)
        of_ranks = state.num_ranks / ranks if state.num_ranks and ranks else 1.0
        of_samples = state.samples_per_micro_batch / samples if samples else 1.0
        ratio = of_ranks * (of_samples or 1.0)
        gradients = max(round(state.gradients_per_step / of_ranks), 1)
        moved = replace(
            state,
            num_ranks=ranks,
            samples_per_micro_batch=samples,
            accumulation_steps=round(state.accumulation_steps * ratio),
            kept_steps=round(state.kept_steps * ratio),
            reference_steps=state.reference_steps * ratio,
            gradients_per_step=max(gradients, ranks) if of_ranks == 1 else gradients,
            micro_batches=state.micro_batches * ratio,
            verification=state.verification.scaled(ratio),
            timing=state.timing if ratio == of_ranks == 1 or state.timing is None else Timing(),
        )
        return self.at(moved.within(config))

    def window_steps(self, num_windows: int) -> int:
        """The length of the window after so many others: the decided one, or a probe."""
        return self._timed_steps(num_windows) or self._noise_steps(num_windows)

    def _timed_steps(self, num_windows: int) -> int | None:
        """Another length, where windows of one alone are known, in every other decision's windows.

        All of them: an accelerator is timed from one decision to the next only.
        """
        config, state = self.config, self.state
        if state.timing is None or config.mode != "auto":
            return None
        steps = state.accumulation_steps
        is_turn = num_windows // config.decision_interval % 2 == 1
        if not is_turn or state.timing.probes(steps) > ENOUGH:
            return None
        return timed_steps(config.min_accumulation_steps, steps, config.max_accumulation_steps)

    def _noise_steps(self, num_windows: int) -> int:
        """The decided length, or a probe of two where windows of one gradient show no noise."""
        steps, interval = self.state.accumulation_steps, self.config.probe_interval
        may_probe = self.config.mode == "auto" and self.config.max_accumulation_steps >= 2
        if steps * self.state.gradients_per_step > 1 or not may_probe or not interval:
            return steps
        often = max(interval // 4, 2)
        if num_windows < PROBES_AT_FIRST * often:
            interval = often
        interval = max(interval, num_windows // PROBES_PER_RUN)
        return 2 if (num_windows + 1) % interval == 0 else 1

    def measures(self, num_windows: int) -> bool:
        """Whether the window after so many others is measured where that costs something."""
        due = num_windows % self.config.measure_interval == 0
        is_probe = self._noise_steps(num_windows) != self.state.accumulation_steps
        return due or is_probe or num_windows < MEASURED_AT_FIRST

    def rates(self, steps: int) -> Rates:
        """The factors on the hyper-parameters for a window of so many steps.

        As much of the window's growth as the user's schedule lowered the learning rate by takes the
        rule's limit of pure noise, as Seesaw does; the rest takes the noise as it was measured.
        """
        config, state = self.config, self.state
        kappa = steps / state.reference_steps
        if kappa == 1:
            return Rates()
        in_decay = min(max(kappa, 1.0), state.decay)
        lr = 1.0
        if config.adapt_lr:
            lr = self.rule(kappa / in_decay, state.noise_ratio) * self.rule(in_decay, math.inf)
        most = config.max_lr_factor or self.rule(RATE_FOLLOWS, math.inf)
        lr = min(max(lr, 1 / most), most)
        return Rates(
            lr=lr,
            beta1=lr if config.adapt_beta1 else 1.0,
            beta2=kappa if config.adapt_beta2 else 1.0,
            weight_decay=kappa / lr if config.adapt_weight_decay else 1.0,
        )

    def batch(self, steps: float) -> float:
        """Samples in a window of so many steps on all ranks, by the mean micro-batch so far."""
        state = self.state
        if state.micro_batches and state.estimator.samples_seen:
            return steps * state.estimator.samples_seen / state.micro_batches
        return steps * max(state.num_ranks, 1) * (self.config.samples_per_micro_batch or 1.0)

    def estimate(self) -> NoiseEstimate | None:
        """The noise by what was learned so far; None while it is unknown."""
        batch = self.batch(self.state.accumulation_steps)
        return self.state.estimator.estimate(batch, self.config.confidence, self.state.unit)

    def learn(self, window: Window) -> "Controller":
        """Take in one window."""
        if window.ranks != self.state.num_ranks:
            return self.on_ranks(window.ranks).learn(window)
        state = self.state
        estimator, norms, grad_norm = state.estimator, state.norms, 0.0
        gradients = state.gradients_per_step
        if window.norms is not None:
            estimator = estimator.update(window.norms)
            big_sq = math.fsum(window.norms.big_sq)
            grad_norm = 0.0 if math.isnan(big_sq) else math.sqrt(big_sq)
            if window.norms.finite:  # else gradients may be missing that were not seen
                gradients = max(1, window.norms.count // window.micro_batches)
            if grad_norm > 0 and window.norms.finite:
                norms = norms.update(math.log(grad_norm / self._norm_ratio(window.norms.big_batch)))
        factor = state.max_norm / grad_norm if window.clipped and grad_norm > 0 else 1.0
        has_loss = window.loss_count > 0 and math.isfinite(window.loss_sum)
        return self._with(
            estimator=estimator,
            norms=norms,
            gradients_per_step=gradients,
            grad_norm=grad_norm,
            clip_coefficient=min(state.clip_coefficient, factor),
            num_windows=state.num_windows + 1,
            num_updates=state.num_updates + window.applied,
            micro_batches=state.micro_batches + window.micro_batches - window.skipped,
            total_clipped=state.total_clipped + window.clipped,
            total_skipped=state.total_skipped + window.skipped,
            loss_sum=state.loss_sum + (window.loss_sum if has_loss else 0.0),
            loss_count=state.loss_count + (window.loss_count if has_loss else 0),
            timing=state.timing.count(window.micro_batches) if state.timing else None,
        )

    def at(self, state: ControllerState) -> "Controller":
        """The same controller in another state."""
        return replace(self, state=state)

    def decide(
        self, lr: float, windows: tuple[Window, ...] = (), seconds: float | None = None
    ) -> tuple["Controller", Decision]:
        """Decide on the windows to come.

        Args:
            lr: the user's learning rate now, the adapted factor not included.
            windows: what was learned since the last decision, for the record.
            seconds: the time between the two decisions before this one, if it was measured.
        """
        loss = self.state.loss_sum / self.state.loss_count if self.state.loss_count else None
        here = self._observe(lr, loss, seconds)
        state, noise = here.state, here.estimate()
        costs = state.timing.costs if state.timing else None
        change = propose(self.config, state, noise, costs)
        decided = here._follow(change, noise)
        applied = self.config.mode == "auto"
        steps = decided.state.accumulation_steps
        return (decided if applied else here), Decision(
            num_windows=state.num_windows,
            num_updates=state.num_updates,
            reference_updates=state.micro_batches / state.reference_steps,
            samples_seen=state.estimator.samples_seen,
            tokens_seen=here._tokens(),
            unit=state.unit,
            action=change.action,
            reason=change.reason,
            applied=applied,
            phase=state.phase,
            accumulation_steps=steps,
            batch=decided.batch(steps),
            rates=decided.rates(steps),
            max_norm=decided.state.max_norm,
            verifying=decided.state.verification.judgement if applied else None,
            noise=noise,
            lr=lr,
            loss=loss,
            grad_norm=state.grad_norm or None,
            clip_coefficient=self.state.clip_coefficient,
            total_clipped=state.total_clipped,
            total_skipped=state.total_skipped,
            total_dropped=state.total_dropped,
            ranks=max(state.num_ranks, 1),
            windows=windows,
            seconds=seconds,
            costs=costs,
        )

    def _with(self, **changes: Any) -> "Controller":
        return self.at(replace(self.state, **changes))

    def _observe(self, lr: float, loss: float | None, seconds: float | None) -> "Controller":
        state = self.state
        samples = state.estimator.samples_seen
        verification = state.verification
        if samples > 0:
            middle = (state.decided_at_samples + samples) / 2
            verification = verification.observe(middle, loss)
        return self._with(
            verification=verification,
            previous_lr=state.lr,
            lr=lr,
            peak_lr=max(state.peak_lr, lr),
            loss_sum=0.0,
            loss_count=0,
            clip_coefficient=1.0,
            decided_at_samples=samples,
            timing=state.timing.decided(seconds) if state.timing else None,
        )

    def _tokens(self) -> float | None:
        tokens = self.config.tokens_per_sample
        known = tokens is not None and self.state.counts_samples
        return self.state.estimator.samples_seen * tokens if known and tokens else None

    def _norm_ratio(self, batch: float) -> float:
        """m(batch) / m(reference batch) by the measured noise; 1 while it is unknown."""
        estimator = self.state.estimator
        if estimator.average.count < self.config.min_count:
            return 1.0
        norm = estimator.norm_at(self.batch(self.state.reference_steps))
        return estimator.norm_at(batch) / norm if norm > 0 else 1.0

    def _follow(self, change: Change, noise: NoiseEstimate | None) -> "Controller":
        """The controller after a change was made, or held."""
        state = self.state
        samples, verification = state.estimator.samples_seen, state.verification
        noise_ratio = state.noise_ratio
        if noise is not None and noise.count >= self.config.min_count:
            reference = noise.batch * state.reference_steps / state.accumulation_steps
            noise_ratio = state.caution * noise.scale_lower / reference
        if verification.pending and state.verdict(self.config.loss_tolerance) != "open":
            verification = verification.finish()
        changed = change.steps != state.accumulation_steps
        if change.action == "revert":
            grew = change.steps < state.accumulation_steps
            state = replace(
                state,
                reverts=state.reverts + 1,
                caution=state.caution * (CAUTION_AFTER_REVERT if grew else 1.0),
                blocked_until=samples * (1 + self.config.dwell_fraction),
            )
        elif change.action == "shrink" and change.by_decay:
            verification = Verification()  # the loss leaves its trend with the rate
        elif changed and self.config.verify:
            verification = verification.start(state.accumulation_steps)
        if changed and not change.by_decay:
            state = replace(state, changed_at_samples=samples, changed_at_updates=state.num_updates)
        return self.at(
            replace(
                state,
                verification=verification,
                accumulation_steps=change.steps,
                kept_steps=self._kept_steps(change),
                noise_ratio=noise_ratio,
                max_norm=self._threshold(change.steps),
            )
        )

    def _kept_steps(self, change: Change) -> int:
        steps, kept = self.state.accumulation_steps, self.state.kept_steps
        if change.by_decay or change.steps == steps:
            return kept
        all_kept = kept == steps < change.steps  # a shrunk window that is taken back
        return change.steps if change.action == "grow" or all_kept else min(kept, change.steps)

    def _threshold(self, steps: int) -> float:
        """The norm at which clipping begins in windows of so many steps; infinite for never."""
        if not self.config.adapt_clip:
            return self.config.max_norm
        level = self.state.norms.threshold(self.config.clip_z)
        return min(self.config.max_norm, level * self._norm_ratio(self.batch(steps)))
