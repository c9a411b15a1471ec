"""Both arms of the demo, one after the other, and what is shown and kept of them."""

import math
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import noiseopt
from noiseopt import NoiseAwareAdamW, report
from noiseopt.demo.folder import SUMMARY, LossTable, write_json, write_settings
from noiseopt.demo.gpt import GPT
from noiseopt.demo.progress import Bars
from noiseopt.demo.text import Corpus, load
from noiseopt.demo.tracking import Tracking
from noiseopt.demo.train import Clock, Point, Settings, adamw, noise_aware_adamw, train
from noiseopt.record import DecisionLog, Record

ARMS = {"AdamW": adamw, "NoiseAwareAdamW": noise_aware_adamw}
PARTS = ("forward", "backward", "all-reduce", "optimizer")
LAST_CHANGES = 6
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


@dataclass
class Arm:
    """What has been done with one optimizer so far."""

    points: list[Point] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    @property
    def validation_loss(self) -> float:
        """The latest; nan if there is none."""
        known = (p.validation_loss for p in reversed(self.points) if p.validation_loss > 0)
        return next(known, math.nan)

    def sums(self) -> dict[str, Any]:
        """Everything that is compared, as plain values."""
        seconds = sum(self.clock.seconds.values())
        loss = self.validation_loss
        return {
            "updates": self.points[-1].updates,
            "samples": self.points[-1].samples,
            "validation_loss": None if math.isnan(loss) else loss,
            "seconds": seconds,
            "shares": {part: self.clock.seconds.get(part, 0.0) / seconds for part in PARTS},
        }


class Demo:
    """One run of the demo: its folder, and its arms so far."""

    def __init__(self, settings: Settings, folder: Path, track: bool) -> None:
        self.settings = settings
        self.folder = folder
        self.track = track
        self.arms: dict[str, Arm] = {}

    def run(self) -> int:
        """Train with both optimizers, show the difference, and return the exit code."""
        write_settings(self.folder, self.settings)
        interrupted = False
        try:
            with one_thread():
                self._train_all(load())
        except KeyboardInterrupt:
            interrupted = True
        self._finish(interrupted)
        return INTERRUPTED if interrupted else 0

    def _train_all(self, corpus: Corpus) -> None:
        table = LossTable(self.folder)
        with closing(table), Bars(self.settings.steps) as bars:
            for name in ARMS:
                self.arms[name] = Arm()
                self._train(name, corpus, table, bars)

    def _train(self, name: str, corpus: Corpus, table: LossTable, bars: Bars) -> None:
        arm, settings = self.arms[name], self.settings
        torch.manual_seed(settings.seed)
        model = GPT(settings.shape)
        optimizer = ARMS[name](model, settings)
        bars.start(name)
        if isinstance(optimizer, NoiseAwareAdamW):
            optimizer.add_observer(DecisionLog(self.folder / report.RECORD))
        with self._tracking(name, optimizer) as tracking:

            def on_point(point: Point) -> None:
                arm.points.append(point)
                table.add(point)
                bars.show(point, point.samples // settings.batch_size, optimizer)
                if tracking:
                    tracking.log(point)

            train(name, model, optimizer, corpus, settings, arm.clock, on_point)

    def _tracking(
        self, name: str, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[Tracking | None]:
        if not self.track:
            return nullcontext()
        return closing(Tracking(self.folder, name, self.settings, optimizer))

    def _finish(self, interrupted: bool) -> None:
        """Keep and show what was done, be it all or not."""
        sums = {name: arm.sums() for name, arm in self.arms.items() if arm.points}
        record = report.read_run(self.folder) if (self.folder / report.RECORD).is_file() else None
        verdict = dict(report.facts(record))["verdict"] if record else None
        versions = {
            "noiseopt": noiseopt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        content = {"interrupted": interrupted, "arms": sums, "verdict": verdict}
        write_json(self.folder / SUMMARY, content | {"versions": versions})
        if sums:
            report.write({self.folder: record})
            _show_arms(f"Run {self.folder.name}, seed {self.settings.seed}", sums)
        else:
            print("Interrupted before the first losses were known.")
        if record:
            _show_decisions(record)
            print(f"Verdict: {verdict}")
        print("Written:")
        for path in sorted(self.folder.iterdir()):
            print(f"  {path}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the same results on any number of cores.

    A model of this size gains little from more, and where other programs are running, threads that
    wait for each other lose far more than that.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _show_arms(title: str, sums: dict[str, dict[str, Any]]) -> None:
    arms = sums.values()
    rows = [
        ["updates", *(f"{arm['updates']}" for arm in arms)],
        ["samples", *(f"{arm['samples']}" for arm in arms)],
        ["validation loss", *(_loss(arm["validation_loss"]) for arm in arms)],
        ["training time", *(f"{arm['seconds']:.1f} s" for arm in arms)],
        *([f"  {part}", *(_share(arm, part) for arm in arms)] for part in PARTS),
    ]
    report.show(title, ("", *sums), rows)


def _share(arm: dict[str, Any], part: str) -> str:
    return "0% (one process)" if part == "all-reduce" else f"{arm['shares'][part]:.0%}"


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _show_decisions(record: Record) -> None:
    changes = [decision for decision in record.decisions if decision.action != "hold"]
    print(f"{len(record.decisions)} decisions, {len(changes)} of them changes:")
    if len(changes) > LAST_CHANGES:
        print(f"  ... {len(changes) - LAST_CHANGES} earlier ...")
    for decision in changes[-LAST_CHANGES:]:
        print(f"  {report.change(decision)}")
    if record.decisions and record.decisions[-1].action == "hold":
        print(f"  {report.change(record.decisions[-1])}")
