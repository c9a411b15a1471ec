"""The demo in wandb: one offline run for each arm, in the run's own folder."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noiseopt import NoiseAwareAdamW
from noiseopt.demo.train import Point, Settings


class Tracking:
    """Logs an arm to wandb: offline, unless WANDB_MODE says otherwise, and silent.

    Args:
        folder: the run's folder; wandb makes one of its own in it.
        arm: the arm's name.
        settings: what is trained.
        optimizer: if it is ours, its decisions are logged too.
    """

    def __init__(self, folder: Path, arm: str, settings: Settings, optimizer: Any) -> None:
        import wandb

        self._run = wandb.init(
            project="noiseopt-demo",
            group=folder.name,
            name=f"{folder.name}-{arm}",
            dir=folder,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=asdict(settings),
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._observer = None
        if isinstance(optimizer, NoiseAwareAdamW):
            from noiseopt.integrations.wandb import WandbObserver

            self._observer = WandbObserver(self._run, seconds=0, commit=True)
            optimizer.add_observer(self._observer)
        self._run.define_metric("samples")
        for name in ("train_loss", "validation_loss", "lr", "updates"):
            self._run.define_metric(name, step_metric="samples")

    def log(self, point: Point) -> None:
        """Log a row of the loss table."""
        row = asdict(point)
        del row["arm"]
        self._run.log({name: value for name, value in row.items() if value == value})

    def close(self) -> None:
        """End the run."""
        if self._observer:
            self._observer.close()
        self._run.finish()
