"""Which runs there are, and in which order: the most telling first.

What is tuned decides what is reported, so the plan is drawn up anew after every run, as far as it
can be known. First the rate of a window of 1 on the tuning seeds, and ours and Seesaw with it; then
the other constants and the rivals' second way with beta2; then every arm on the reporting seeds;
then ours with each part removed.

A constant's rate and beta2 are searched for on the first tuning seed, and the best few rates are
run on the others: one that is best for one seed may lie at the edge of stability for the next.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import product
from statistics import fmean
from typing import Any

from benchmarks.convergence import arms
from benchmarks.convergence.cache import CODE, Cache, Record, Run
from benchmarks.convergence.tuning import Setting, best, ranked, untried
from benchmarks.convergence.workloads import BETA1, WORKLOADS

TUNING_SEEDS = (101, 102, 103)  # the first is searched on, the others choose among the best
FINALISTS = 3
REPORTING_SEEDS = (1, 2, 3, 4, 5, 6)
FIRST = ("auto", "seesaw")
VARIANTS = ("norm-test@theta=0.9", "adascale@steps=2")  # on the tuning seed, for the record

Item = Run | None  # None: not known yet, since it rests on runs that have not finished


class Plan:
    """Runs in order, as far as what has finished determines them now; make a new one afterwards.

    Args:
        cache: what has finished.
        workloads: their names.
    """

    def __init__(self, cache: Cache, workloads: Iterable[str]) -> None:
        self.cache = cache
        self.workloads = tuple(workloads)
        self._searches: dict[tuple[str, int], tuple[dict[Setting, float], int | None]] = {}

    def everything(self) -> Iterator[Item]:
        """The whole programme."""
        for workload in self.workloads:
            yield from self.tuning(workload, "constant-1")
        for workload, arm in product(self.workloads, FIRST):
            yield from self.tuning(workload, arm)
        for workload, arm in product(self.workloads, (*arms.MAIN, *VARIANTS)):
            yield from self.tuning(workload, arm)
        for seed, workload, arm in product(REPORTING_SEEDS, self.workloads, arms.MAIN):
            yield self.run(workload, arm, seed, "reporting")
        for workload, arm, seed in product(self.workloads, arms.ABLATIONS, REPORTING_SEEDS):
            yield self.run(workload, arm, seed, "reporting")

    def named(self, names: Iterable[str], split: str, seeds: Iterable[int]) -> Iterator[Item]:
        """Some arms, and before them the tuning that they need."""
        names = tuple(names)
        for workload, arm in product(self.workloads, ("constant-1", *names)):
            yield from self.tuning(workload, arm, only_choice=True)
        for seed, workload, arm in product(seeds, self.workloads, names):
            yield self.run(workload, arm, seed, split)

    def tuning(self, workload: str, arm: str, only_choice: bool = False) -> Iterator[Item]:
        """The runs on the tuning seeds, by which an arm's settings are chosen, if any are."""
        workload = tuned_on(workload)
        window = arms.window_of(arm)
        if window:
            yield from self._search(workload, window)
        elif not only_choice or len(list(self._ways(arm))) > 1:
            lr = self.chosen(workload, "constant-1")
            for options in self._ways(arm):
                yield self._on_tuning_seed(workload, arm, *lr, options) if lr else None

    def run(self, workload: str, arm: str, seed: int, split: str) -> Item:
        """An arm with its chosen settings."""
        window = arms.window_of(arm)
        lr = self.chosen(workload, f"constant-{window or 1}")
        options = self._way(workload, arm) if lr else None
        if lr is None or options is None:
            return None
        return Run(workload, arm, seed, split, config_of(workload, arm, *lr, options))

    def chosen(self, workload: str, arm: str) -> tuple[float, float] | None:
        """The rate and beta2 of a constant arm at a window of 1; None while they are sought."""
        workload = tuned_on(workload)
        window = arms.window_of(arm) or 1
        means = {
            setting: self._mean_loss(workload, window, setting)
            for setting in self._finalists(workload, window)
        }
        known = {setting: loss for setting, loss in means.items() if loss is not None}
        if not known or len(known) < len(means):
            return None
        return best(known).values(WORKLOADS[workload].lr)

    def records(self) -> list[Record]:
        """What has finished and belongs to the results.

        That is all on the tuning split, and on the reporting split what was trained with the
        settings that were chosen in the end.
        """
        known = {run.file for run in self.everything() if run}
        found = []
        for record in self.cache.records():
            run = Run(*(record[key] for key in ("workload", "arm", "seed", "split", "config")))
            current = run.config["workload"] == WORKLOADS[run.workload].described()
            if current and (run.split == "tuning" or "@" in run.arm or run.file in known):
                found.append(record)
        return found

    def _search(self, workload: str, window: int) -> Iterator[Item]:
        if window > 1:
            yield from self._search(workload, window // 2)
        losses, start = self._known(workload, window)
        missing = untried(losses, start) if start is not None else []
        for setting in (*sorted(losses), *missing):
            yield self._constant(workload, window, setting)
        if start is None or missing:
            yield None
        for seed, setting in product(TUNING_SEEDS[1:], self._finalists(workload, window)):
            yield self._constant(workload, window, setting, seed)

    def _known(self, workload: str, window: int) -> tuple[dict[Setting, float], int | None]:
        if (workload, window) not in self._searches:
            self._searches[workload, window] = self._follow(workload, window)
        return self._searches[workload, window]

    def _follow(self, workload: str, window: int) -> tuple[dict[Setting, float], int | None]:
        """The losses of the settings tried, and where the search began; None if not known yet.

        It lies about sqrt(2) times the best rate of half the window.
        """
        start = 0
        if window > 1:
            before, first = self._known(workload, window // 2)
            if first is None or untried(before, first):
                return {}, None
            start = best(before).rung - 1
        losses: dict[Setting, float] = {}
        while True:
            missing = untried(losses, start)
            found = {setting: self._loss(workload, window, setting) for setting in missing}
            known = {setting: loss for setting, loss in found.items() if loss is not None}
            if not known:
                return losses, start
            losses |= known

    def _finalists(self, workload: str, window: int) -> list[Setting]:
        """The best few rates on the seed that is searched on; none while it is searched on."""
        losses, start = self._known(workload, window)
        if start is None or untried(losses, start):
            return []
        return ranked(losses)[:FINALISTS]

    def _mean_loss(self, workload: str, window: int, setting: Setting) -> float | None:
        """Over the tuning seeds; None while one of them is not known."""
        losses = [self._loss(workload, window, setting, seed) for seed in TUNING_SEEDS]
        known = [loss for loss in losses if loss is not None]
        return fmean(known) if len(known) == len(losses) else None

    def _loss(
        self, workload: str, window: int, setting: Setting, seed: int = TUNING_SEEDS[0]
    ) -> float | None:
        return self._loss_of(self._constant(workload, window, setting, seed))

    def _loss_of(self, run: Run) -> float | None:
        record = self.cache.get(run)
        if record is None:
            return None
        return math.inf if record["val_loss"] is None else float(record["val_loss"])

    def _constant(
        self, workload: str, window: int, setting: Setting, seed: int = TUNING_SEEDS[0]
    ) -> Run:
        arm = f"constant-{window}"
        values = setting.values(WORKLOADS[workload].lr)
        return self._on_tuning_seed(workload, arm, *values, arms.settings(arm), seed)

    def _ways(self, arm: str) -> Iterator[dict[str, Any]]:
        """The settings of an arm that are tried on the tuning seed."""
        options = arms.settings(arm)
        yield options
        if not arms.is_ours(arm) and "keep_half_life" not in options:
            yield options | {"keep_half_life": True}

    def _way(self, workload: str, arm: str) -> dict[str, Any] | None:
        """The better of an arm's ways; None while it is not known."""
        workload = tuned_on(workload)
        ways = list(self._ways(arm))
        lr = self.chosen(workload, "constant-1")
        if len(ways) == 1 or lr is None:
            return ways[0]
        losses = [
            self._loss_of(self._on_tuning_seed(workload, arm, *lr, options)) for options in ways
        ]
        known = [loss for loss in losses if loss is not None]
        return ways[losses.index(min(known))] if len(known) == len(ways) else None

    def _on_tuning_seed(
        self,
        workload: str,
        arm: str,
        lr: float,
        beta2: float,
        options: dict[str, Any],
        seed: int = TUNING_SEEDS[0],
    ) -> Run:
        config = config_of(workload, arm, lr, beta2, options)
        return Run(workload, arm, seed, "tuning", config)


def tuned_on(workload: str) -> str:
    """The workload whose tuning chooses this one's settings."""
    return WORKLOADS[workload].tuned_on or workload


def config_of(
    workload: str, arm: str, lr: float, beta2: float, options: dict[str, Any]
) -> dict[str, Any]:
    """Everything that such a run depends on but its seed and split."""
    own = {"lr": lr, "beta1": WORKLOADS[workload].beta1, "beta2": beta2}
    config: dict[str, Any] = {key: options.get(key, value) for key, value in own.items()}
    if config["beta1"] == BETA1:
        del config["beta1"]  # as in records from before it could be chosen
    config["options"] = {key: value for key, value in options.items() if key not in own}
    config["workload"] = WORKLOADS[workload].described()
    if arms.is_ours(arm):
        config[CODE] = arms.our_code()
    return config
