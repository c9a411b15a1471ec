"""Weights & Biases: an observer that adds each decision to a run that you log to yourself.

    run = wandb.init(...)
    optimizer.add_observer(WandbObserver(run))

The values ride on the run's next own row: nothing is committed and no step is named, for a row with
an older step is dropped without an error. So the step stays yours, and if you log more rarely than
decisions are made, a row carries the newest of them. The charts' axis is the samples seen.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from noiseopt.control import Decision, NoiseConfig, metrics

AXIS = "noise/samples"
SECTIONS = ("noise/*", "decide/*", "clip/*")


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


class WandbObserver:
    """Log each decision to a run. Trouble with wandb is warned of once and never stops training.

    Args:
        run: the run; the active one if not given. In a distributed run only rank 0 has one.
        config: the optimizer's settings, to be kept under "noiseopt" in the run's own.
        commit: give each decision a row of its own. This advances the run's step: only for a run
            to which nothing else is logged.

    Raises:
        ValueError: no run was given and none is active.
    """

    def __init__(
        self, run: Run | None = None, config: NoiseConfig | None = None, *, commit: bool = False
    ) -> None:
        self._run: Run | None = _active_run() if run is None else run
        self._commit = commit
        self._names: set[str] = set()
        self._last: Decision | None = None
        self._try(lambda run: _declare(run, config))

    def __call__(self, decision: Decision) -> None:
        """Log a decision; values that are not finite are left out."""
        values = metrics(decision)
        self._names |= values.keys()
        self._last = decision
        self._try(lambda run: run.log(values, commit=self._commit))

    def close(self) -> None:
        """Put the last decision into the summary; call it before the run's own `finish()`.

        A value that was logged earlier and is not finite or unknown at the end becomes None there.
        """
        if self._last is not None:
            final = dict.fromkeys(sorted(self._names)) | metrics(self._last)
            self._try(lambda run: run.summary.update(final))

    def _try(self, action: Callable[[Run], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever wandb raises, training goes on
            self._run = None
            warnings.warn(
                f"noiseopt logs nothing more to wandb: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )


def _active_run() -> Run:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("wandb is missing: pip install 'noiseopt[wandb]'") from error
    if wandb.run is None:
        raise ValueError("no wandb run is active: call wandb.init() first, or give the run")
    return wandb.run


def _declare(run: Run, config: NoiseConfig | None) -> None:
    run.define_metric(AXIS)
    for section in SECTIONS:
        run.define_metric(section, step_metric=AXIS)
    if config is not None:
        run.config.update({"noiseopt": _plain(asdict(config))})


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }
