"""Weights & Biases: an observer that adds each decision to a run that you log to yourself.

    run = wandb.init(...)
    optimizer.add_observer(WandbObserver(run))

The values ride on the run's next own row: nothing is committed and no step is named, for a row with
an older step is dropped without an error. So the step stays yours, and if you log more rarely than
decisions are made, a row carries the newest of them. The charts' axis is the samples seen; the
updates, `decide/num_updates`, can be chosen instead.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from noiseopt.control import Decision, NoiseConfig, Progress, Start, metrics
from noiseopt.integrations.sink import Sink

AXIS = "noise/samples"
SECTIONS = ("noise/*", "decide/*", "clip/*", "group/*")
TABLE = "decide/changes"
COLUMNS = (
    *("update", "samples", "action", "window", "batch", "lr_factor", "max_norm", "noise_scale"),
    *("noise_scale_low", "noise_scale_high", "reason"),
)
MAX_ROWS = 1000
TABLE_SECONDS = 60.0
SPIKE = 0.1  # the clip coefficient below which a gradient is told of


class Run(Protocol):
    """What is used of a `wandb.Run`."""

    @property
    def config(self) -> Any:
        """The run's settings."""

    @property
    def summary(self) -> Any:
        """The run's final values."""

    def define_metric(self, name: str, step_metric: str | None = None) -> Any:
        """Declare a metric and its axis."""

    def log(self, data: dict[str, Any], *, commit: bool | None = None) -> None:
        """Add values to the current row."""

    def alert(self, title: str, text: str, level: str | None = None) -> None:
        """Send a message to the run's owner."""


class _Counts(NamedTuple):
    """What a run has counted."""

    updates: int = 0
    samples: float = 0.0
    skipped: int = 0

    @classmethod
    def of(cls, decision: Decision) -> "_Counts":
        return cls(decision.num_updates, decision.samples_seen, decision.total_skipped)

    @classmethod
    def of_start(cls, start: Start) -> "_Counts":
        state = start.state
        return cls(state.num_updates, state.estimator.samples_seen, state.total_skipped)

    def since(self, before: "_Counts") -> "_Counts":
        return _Counts(
            self.updates - before.updates,
            self.samples - before.samples,
            self.skipped - before.skipped,
        )


class WandbObserver:
    """Log each decision to a run. Trouble with wandb is warned of once and never stops training.

    The settings go into the run's config. The summary holds the last values and, of what this
    process has seen, the samples that the batches have saved against the first one (negative where
    they cost some; by the measured noise, see `noiseopt.control.Progress`) and a table of changes.
    Alerts are sent when a change is reverted, when gradients are not finite or spike, and when
    ranks disagree.

    Args:
        run: the run; the active one if not given. In a distributed run only rank 0 has one.
        prefix: put before every name, such as "critic/" for the second of two optimizers.
        seconds: the least time between two decisions that are logged; 0 logs all.
        commit: give each decision a row of its own. This advances the run's step: only for a run
            to which nothing else is logged.

    Raises:
        ValueError: no run was given and none is active, or `seconds` is negative.
    """

    def __init__(
        self,
        run: Run | None = None,
        *,
        prefix: str = "",
        seconds: float = 1.0,
        commit: bool = False,
    ) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds is {seconds}: it must be at least 0")
        run = _active_run() if run is None else run
        self._sink, self._alerts = Sink[Run](run, "wandb"), Sink[Run](run, "wandb's alerts")
        self._prefix, self._seconds, self._commit = prefix, seconds, commit
        self._logged_at = self._tabled_at = -math.inf
        self._groups: tuple[str, ...] = ()
        self._names: set[str] = set()
        self._last: Decision | None = None
        self._counts = _Counts()
        self._progress = Progress()
        self._changes: list[Decision] = []
        self._has_new_changes = False
        self._sink.write(lambda run: _declare(run, prefix))

    def on_start(self, now: Callable[[], Start]) -> None:
        """Decisions begin, or begin anew after a load: keep the settings in the run's own."""
        start = now()
        self._groups, self._counts = start.groups, _Counts.of_start(start)
        config = {f"{self._prefix}noiseopt": _plain(start.config)}
        self._sink.write(lambda run: run.config.update(config, allow_val_change=True))

    def on_error(self, error: Exception) -> None:
        """Training stops because ranks disagree: tell the run's owner."""
        self._alert("noiseopt stopped", str(error), "ERROR")

    def __call__(self, decision: Decision) -> None:
        """Log a decision; values that are not finite are left out."""
        self._take(decision)
        now = time.monotonic()
        if now - self._logged_at >= self._seconds:
            self._logged_at = now
            self._sink.write(lambda run: run.log(self._values(decision), commit=self._commit))
        if self._has_new_changes and now - self._tabled_at >= TABLE_SECONDS:
            self._tabled_at = now
            self._sink.write(self._write_table)

    def close(self) -> None:
        """Complete the summary with the last decision; call it before the run's own `finish()`.

        A value that was logged earlier and is not finite or unknown at the end becomes None there.
        """
        last = self._last
        if last is not None:
            final = dict.fromkeys(sorted(self._names)) | self._values(last)
            final |= {f"{self._prefix}decide/samples_saved": self._samples_saved(last)}
            self._sink.write(lambda run: run.summary.update(final))
            if self._has_new_changes:
                self._sink.write(self._write_table)

    def _take(self, decision: Decision) -> None:
        before, self._counts = self._counts, _Counts.of(decision)
        self._last = decision
        if decision.noise is not None:
            step = self._counts.since(before)
            scale = decision.noise.scale
            self._progress = self._progress.after(step.updates, step.samples, scale)
        if decision.action != "hold":
            self._changes.append(decision)
            del self._changes[:-MAX_ROWS]
            self._has_new_changes = True
        for title, text in _troubles(decision, self._counts.since(before).skipped):
            self._alert(f"noiseopt: {title}", text, "WARN")

    def _alert(self, title: str, text: str, level: str) -> None:
        self._alerts.write(lambda run: run.alert(self._prefix + title, text, level))

    def _values(self, decision: Decision) -> dict[str, Any]:
        found = metrics(decision, self._groups)
        values = {f"{self._prefix}{name}": value for name, value in found.items()}
        self._names |= values.keys()
        return values

    def _samples_saved(self, last: Decision) -> float | None:
        if not self._progress.samples or not last.reference_updates:
            return None
        reference = last.samples_seen / last.reference_updates
        return self._progress.samples_at(reference) - self._progress.samples

    def _write_table(self, run: Run) -> None:
        import wandb

        rows = [_row(change) for change in self._changes]
        self._has_new_changes = False
        run.summary[f"{self._prefix}{TABLE}"] = wandb.Table(columns=list(COLUMNS), data=rows)


def _active_run() -> Run:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("wandb is missing: pip install 'noiseopt[wandb]'") from error
    if wandb.run is None:
        raise ValueError("no wandb run is active: call wandb.init() first, or give the run")
    return wandb.run


def _declare(run: Run, prefix: str) -> None:
    run.define_metric(prefix + AXIS)
    for section in SECTIONS:
        run.define_metric(prefix + section, step_metric=prefix + AXIS)


def _plain(config: NoiseConfig) -> dict[str, Any]:
    settings: Mapping[str, Any] = asdict(config)
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }


def _troubles(decision: Decision, skipped: int) -> list[tuple[str, str]]:
    """What the run's owner should hear of, as titles and texts."""
    at = f"at update {decision.num_updates}"
    found = []
    if decision.action == "revert":
        found.append(("a change was reverted", f"{at}: {decision.reason}"))
    if skipped > 0:
        text = f"{at}: {skipped} micro-batches were left out, {decision.total_skipped} so far"
        found.append(("gradients are not finite", text))
    if decision.clip_coefficient < SPIKE:
        text = f"{at}: a gradient was clipped to {decision.clip_coefficient:.3g} of its norm"
        found.append(("the gradient spikes", text))
    return found


def _row(change: Decision) -> list[Any]:
    noise = change.noise
    scales = (noise.scale, *noise.scale_interval) if noise else (None, None, None)
    numbers = (change.rates.lr, change.max_norm, *scales)
    lr_factor, *others = (n if n is not None and math.isfinite(n) else None for n in numbers)
    counts = (change.num_updates, change.samples_seen, change.action, change.accumulation_steps)
    return [*counts, change.batch, lr_factor, *others, change.reason]
