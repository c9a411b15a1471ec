"""Wall-clock to a target loss on two ranks where an update costs as much as four micro-batches.

    python benchmarks/wallclock.py --workload gpt   # writes results/wallclock-gpt.json, .md
    python benchmarks/wallclock.py --quick          # a smoke test; writes only to --output

Two processes of one thread each over gloo train a model of `benchmarks/convergence`, each rank on
half of every micro-batch: so a window of K on both has the batch of a window of K there, and the
constants' rates are those that were tuned there for it, on other data. A run has 1920 micro-batches
under the schedule that was tuned, as those of the digits have there; the others' have more.

The link is slow: whoever sums gradients over the ranks, once for each window, sleeps as long as
four micro-batches take (forward and backward, as measured first), besides what gloo takes. Each
micro-batch sleeps a millisecond too, as a stand-in for an accelerator that computes: so other work
on the machine disturbs less. Ours begin from the rate of a window of 1 and keep every default but
the objective.

Weights are copied along a run and validated after it, so validating costs no arm any time. The
target is the loss of the constant that tuning found best after 90 % of its samples, and a second
one after 60 %, on the tuning seed, which is not reported. A run's time is that of the first copy at
the target, on a straight line from the one before. The best constant is the quickest on the
reported seeds, of those that reached the target on every one. Modelled time is a * updates +
b * micro-batches, with a and b from a least-squares fit to all constant runs, ours not among them.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script

from benchmarks import recording
from benchmarks.convergence.arms import MAX_NORM
from benchmarks.convergence.plan import TUNING_SEEDS
from benchmarks.convergence.table import by_arm, mean_loss
from benchmarks.convergence.train import validate
from benchmarks.convergence.workloads import BETA1, MAIN, WORKLOADS, Batch, Workload
from benchmarks.ranks import on_ranks
from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.control import Decision
from noiseopt.control.rates import scaled_beta
from noiseopt.distributed import Ranks

RESULTS = recording.ROOT / "benchmarks/results"
RANKS = 2
UPDATE_COST = 4  # micro-batches
COMPUTE_SECONDS = 1e-3
WINDOWS = (1, 2, 4, 8, 16)
CONSTANTS = tuple(f"constant-{window}" for window in WINDOWS)
OURS = ("updates", "time")
SEEDS = (401, 402, 403)
COPIES = 40  # of the weights in a run
TARGETS = (0.9, 0.6)  # shares of the samples at which the best constant's loss is the target
CRITERION = 0.6
HEADINGS = (
    *("arm", "reached", "seconds", "of the best constant", "on each seed", "modelled"),
    *("loss at end", "updates", "whole run, s"),
)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        workload: of `benchmarks/convergence`.
        seeds: those that are reported.
        arms: those that run, by name.
        micro_batches: of each run.
    """

    workload: str = "autoencoder"
    seeds: tuple[int, ...] = SEEDS
    arms: tuple[str, ...] = (*CONSTANTS, *OURS)
    micro_batches: int = 1920


QUICK = Plan(arms=("constant-1", "constant-4", *OURS), seeds=(401,), micro_batches=160)


@dataclass
class Run:
    """One run; times in seconds.

    Attributes:
        role: "target" of the run that sets the target, or "reported".
        lr: its peak rate.
        beta2: at a window of 1.
        micro_batch: the time of one, as measured first.
        link: the sleep of each sum of gradients.
        updates: at the end.
        seconds: until the end.
        columns: of `curve`.
        curve: the run at each copy of the weights.
        changes: of ours: micro-batches, window, reason.
        costs: of ours, at the end: a and b as the optimizer has them, if known.
    """

    workload: str
    arm: str
    role: str
    seed: int
    lr: float
    beta2: float
    micro_batch: float
    link: float
    updates: int
    seconds: float
    columns: tuple[str, ...]
    curve: list[tuple[int, int, float, float]]
    changes: list[tuple[int, int, str]]
    costs: tuple[float, float] | None


# --- the arms -----------------------------------------------------------------------------------


class Constant:
    """Plain AdamW, whose loop accumulates a window in `p.grad` and averages it once."""

    def __init__(self, model: nn.Module, lr: float, beta2: float, decay: float, window: int):
        self.model, self.window, self.updates, self._open = model, window, 0, 0
        self.params = list(model.parameters())
        betas = BETA1, scaled_beta(beta2, window, 0.9)
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=betas, weight_decay=decay)
        self.ranks, self.changes, self.costs = Ranks(RANKS, groups=(None,)), [], None

    def feed(self, batch: Batch, lr: float) -> None:
        (self.model(*batch) / self.window / RANKS).backward()
        self._open += 1
        if self._open < self.window:
            return
        self._open = 0
        self.ranks.sum_gradients_([p.grad for p in self.params if p.grad is not None], "a window")
        clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def finish(self) -> None:
        """Nothing is open: windows divide the data."""


class Ours:
    """The loop of the README."""

    def __init__(self, model: nn.Module, lr: float, beta2: float, decay: float, **settings: Any):
        self.model, self.fed, self.changes, self.costs = model, 0, [], None
        self.optimizer = NoiseAwareAdamW(
            model.parameters(),
            lr=lr,
            betas=(BETA1, beta2),
            weight_decay=decay,
            noise=NoiseConfig(max_norm=MAX_NORM, **settings),
        )
        self.optimizer.add_observer(self._observe)

    @property
    def updates(self) -> int:
        return self.optimizer.num_updates

    def feed(self, batch: Batch, lr: float) -> None:
        self.fed += 1
        with self.optimizer.accumulate(self.model):
            loss = self.model(*batch)
            loss.backward()
        self.optimizer.report_loss(loss)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        self.optimizer.flush()

    def _observe(self, decision: Decision) -> None:
        if decision.costs is not None:
            self.costs = (decision.costs.per_update, decision.costs.per_micro_batch)
        if decision.action != "hold":
            self.changes.append((self.fed, decision.accumulation_steps, decision.reason))


@contextmanager
def slowed(seconds: float) -> Iterator[None]:
    """Have every sum of gradients over the ranks take so much longer."""
    plain = Ranks.sum_gradients_

    def slow(self: Ranks, grads: Sequence[Tensor], what: str) -> None:
        time.sleep(seconds)
        plain(self, grads, what)

    with patch.object(Ranks, "sum_gradients_", slow):
        yield


# --- runs, on each rank -------------------------------------------------------------------------


def build(workload: Workload, seed: int) -> nn.Module:
    """The model, the same on both ranks, whose forward takes the stand-in's time too."""
    torch.manual_seed(seed)
    model = workload.build()
    model.register_forward_pre_hook(lambda *_: time.sleep(COMPUTE_SECONDS))
    return model


def part(batch: Batch) -> Batch:
    """This rank's half of a micro-batch."""
    return tuple(each.chunk(RANKS)[dist.get_rank()] for each in batch)


def micro_batch_seconds(name: str, repeats: int = 60) -> float:
    """The median time of forward and backward while both ranks compute, the same on both."""
    model, data = build(WORKLOADS[name], 0), WORKLOADS[name].load("tuning")
    times = []
    for _, batch in zip(range(repeats), data.batches(0), strict=False):
        dist.barrier()
        start = time.perf_counter()
        model(*part(batch)).backward()
        times.append(time.perf_counter() - start)
    seconds = torch.tensor(statistics.median(times[10:]), dtype=torch.float64)
    dist.all_reduce(seconds)
    return seconds.item() / RANKS


def job(
    plan: Plan, arm: str, seed: int, rates: tuple[float, float], micro: float | None
) -> dict[str, Any]:
    """One run on this rank; without the time of a micro-batch, on a link that is not slowed."""
    workload = WORKLOADS[plan.workload]
    model = build(workload, seed)
    (lr, beta2), data = rates, workload.load("reporting")
    trainer: Constant | Ours
    if arm in OURS:
        samples = workload.micro_batch // RANKS
        settings = {"objective": arm, "samples_per_micro_batch": samples}
        trainer = Ours(model, lr, beta2, workload.weight_decay, **settings)
    else:
        window = int(arm.rpartition("-")[2])
        trainer = Constant(model, lr, beta2, workload.weight_decay, window)
    stretch = plan.micro_batches / workload.micro_batches
    batches = [
        batch for _, batch in zip(range(plan.micro_batches), data.batches(seed), strict=False)
    ]
    batches = [part(batch) for batch in batches]
    torch.manual_seed(seed + dist.get_rank())
    role, link = ("reported", UPDATE_COST * micro) if micro else ("target", 0.0)
    with slowed(link):
        copies, seconds = train(
            trainer, model, batches, lambda done: lr * workload.schedule(int(done / stretch))
        )
    curve = [(*counts, loss) for counts, loss in zip(*validated(model, copies, data), strict=True)]
    return asdict(
        Run(
            *(plan.workload, arm, role, seed, lr, beta2, micro or 0.0, link),
            *(trainer.updates, seconds),
            ("micro_batches", "updates", "seconds", "val_loss"),
            curve,
            trainer.changes,
            trainer.costs,
        )
    )


Copy = tuple[int, int, float, list[Tensor]]


def train(
    trainer: Constant | Ours,
    model: nn.Module,
    batches: list[Batch],
    lr: Callable[[int], float],
) -> tuple[list[Copy], float]:
    """Train; returns copies of the weights along the way, and the seconds it took."""
    copies: list[Copy] = []
    updates = 0
    dist.barrier()
    start = time.perf_counter()
    for done, batch in enumerate(batches, start=1):
        trainer.feed(batch, lr(done - 1))
        if done == len(batches):
            trainer.finish()
        due = done * COPIES >= len(batches) * (len(copies) + 1)
        if due and trainer.updates > updates:
            passed, updates = time.perf_counter() - start, trainer.updates
            weights = [p.detach().clone() for p in model.parameters()]
            copies.append((done, updates, passed, weights))
    return copies, time.perf_counter() - start


def validated(
    model: nn.Module, copies: list[Copy], data: Any
) -> tuple[list[tuple[int, int, float]], list[float]]:
    """The counts of each copy and its loss; the ranks share the work."""
    losses = torch.zeros(len(copies), dtype=torch.float64)
    for index in range(dist.get_rank(), len(copies), RANKS):
        with torch.no_grad():
            for param, value in zip(model.parameters(), copies[index][3], strict=True):
                param.copy_(value)
        losses[index] = validate(model, data.held_out)
    dist.all_reduce(losses)
    return [copy[:3] for copy in copies], losses.tolist()


# --- what comes out -----------------------------------------------------------------------------


def tuned(workload: str) -> dict[str, tuple[float, tuple[float, float]]]:
    """Each constant's mean loss in the convergence tuning, with the rate and beta2 chosen there."""
    records = json.loads((RESULTS / "convergence.json").read_text())
    found = by_arm(records, workload, "tuning")
    best = {}
    for arm in CONSTANTS:
        config = next(iter(found[arm].values()))["config"]
        best[arm] = mean_loss(found[arm]), (config["lr"], config["beta2"])
    return best


def at_target(run: Run, target: float) -> tuple[float, float, float] | None:
    """Micro-batches, updates and seconds when a run first was at a loss; None if it never was."""
    before = (0, 0, 0.0, math.inf)
    for now in run.curve:
        if now[3] <= target:
            share = 1.0
            if math.isfinite(before[3]):
                share = (before[3] - target) / (before[3] - now[3])
            found = [a + share * (b - a) for a, b in zip(before[:3], now[:3], strict=True)]
            return found[0], found[1], found[2]
        before = now
    return None


def loss_at(run: Run, share: float) -> float:
    """The loss of a run after a share of its micro-batches, on a straight line between copies."""
    counts = [row[0] for row in run.curve]
    return float(np.interp(share * counts[-1], counts, [row[3] for row in run.curve]))


def costs_of(runs: Sequence[Run]) -> tuple[float, float]:
    """Seconds for each update and each micro-batch, by least squares over the constants."""
    constants = [run for run in runs if run.arm in CONSTANTS]
    counts = [(run.updates, run.curve[-1][0]) for run in constants]
    found, *_ = np.linalg.lstsq(np.array(counts), [run.seconds for run in constants], rcond=None)
    return float(found[0]), float(found[1])


@dataclass(frozen=True)
class Row:
    """An arm at a target; ratios are to the best constant's.

    Attributes:
        target: the loss.
        share: at which share of its samples the best constant reached it on the tuning seed.
        reached: on how many seeds.
        seconds: the mean time; None if some seed did not reach it.
        modelled: the mean modelled time; likewise.
        ratio: of the times.
        ratios: the same on each seed.
        modelled_ratio: of the modelled times.
        loss: the mean loss at the end.
        updates: their mean at the end.
        total: the mean time of whole runs.
    """

    share: float
    target: float
    arm: str
    reached: int
    seeds: int
    seconds: float | None
    modelled: float | None
    ratio: float | None
    ratios: tuple[float, ...]
    modelled_ratio: float | None
    loss: float
    updates: float
    total: float


def summary(runs: Sequence[Run]) -> list[Row]:
    """Every arm at every target."""
    (best,) = (run for run in runs if run.role == "target")
    reported = [run for run in runs if run.role == "reported"]
    a, b = costs_of(reported)
    arms = dict.fromkeys(run.arm for run in reported)
    found = []
    for share in TARGETS:
        target = loss_at(best, share)
        times = {
            arm: [at_target(run, target) for run in reported if run.arm == arm] for arm in arms
        }
        seconds = {arm: [each and each[2] for each in times[arm]] for arm in arms}
        modelled = {
            arm: [each and b * each[0] + a * each[1] for each in times[arm]] for arm in arms
        }
        rivals = [arm for arm in arms if arm in CONSTANTS and None not in seconds[arm]]
        rival = min(rivals, key=lambda arm: statistics.fmean(seconds[arm]), default=None)
        rival_modelled = min(rivals, key=lambda arm: statistics.fmean(modelled[arm]), default=None)
        for arm in arms:
            mine = [run for run in reported if run.arm == arm]
            pairs = zip(seconds[arm], seconds[rival], strict=True) if rival else ()
            found.append(
                Row(
                    share,
                    target,
                    arm,
                    sum(each is not None for each in times[arm]),
                    len(mine),
                    _mean(seconds[arm]),
                    _mean(modelled[arm]),
                    _over(seconds, arm, rival),
                    tuple(own / other for own, other in pairs if own is not None),
                    _over(modelled, arm, rival_modelled),
                    statistics.fmean(run.curve[-1][3] for run in mine),
                    statistics.fmean(run.updates for run in mine),
                    statistics.fmean(run.seconds for run in mine),
                )
            )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _over(times: dict[str, list[Any]], arm: str, rival: str | None) -> float | None:
    own, other = _mean(times[arm]), _mean(times[rival]) if rival else None
    return own / other if own is not None and other is not None else None


def table(runs: Sequence[Run], origin: dict[str, str]) -> str:
    """The results as a page."""
    rows, reported = summary(runs), [run for run in runs if run.role == "reported"]
    (a, b), (best,) = costs_of(reported), (run for run in runs if run.role == "target")
    micro, link = reported[0].micro_batch, reported[0].link
    lines = [
        "# Wall-clock to a target loss, two ranks, a slowed link",
        "",
        f"Written by `{origin['command']}` at {origin['commit']}",
        f"({origin['versions']}); the file says what the arms are.",
        f"A micro-batch took {1e3 * micro:.2f} ms when it was measured first, and the sum of the",
        f"gradients sleeps {1e3 * link:.2f} ms. Fitted to the constants' runs an update costs",
        f"{1e3 * a:.2f} ms and a micro-batch {1e3 * b:.2f} ms: modelled time is by these.",
    ]
    for share in TARGETS:
        at = [row for row in rows if row.share == share]
        lines += [
            "",
            f"## A loss of {at[0].target:.4f}: that of {best.arm} at {share:.0%} of its samples",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in at:
            each = " ".join(f"{ratio:.2f}" for ratio in row.ratios) or "-"
            cells = [row.arm, f"{row.reached} of {row.seeds}", _cell(row.seconds, "{:.1f}")]
            cells += [_cell(row.ratio, "{:.2f}"), each, _cell(row.modelled_ratio, "{:.2f}")]
            cells += [f"{row.loss:.4f}", f"{row.updates:.0f}", f"{row.total:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_verdict(rows)])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _verdict(rows: Sequence[Row]) -> list[str]:
    (ours,) = (row for row in rows if row.arm == "time" and row.share == TARGETS[0])
    if ours.ratio is None:
        return [
            f'Criterion: at most {CRITERION}. "time" reached it on {ours.reached} seeds: missed.'
        ]
    word = "met" if ours.ratio <= CRITERION else "missed"
    return [f'Criterion: "time" at most {CRITERION} at the first target; {ours.ratio:.2f}: {word}.']


def rounds(plan: Plan) -> Iterator[list[Run]]:
    """The run that sets the target; then those of each seed, in an order drawn for it."""
    settings = tuned(plan.workload)
    best = min(settings, key=lambda arm: settings[arm][0])
    first = partial(job, plan, best, TUNING_SEEDS[0], settings[best][1], None)
    found = on_ranks(RANKS, {"micro": partial(micro_batch_seconds, plan.workload), "target": first})
    micro = found["micro"][0]
    yield [Run(**found["target"][0])]
    for seed in plan.seeds:
        arms = random.Random(seed).sample(plan.arms, len(plan.arms))
        rates = {arm: settings["constant-1" if arm in OURS else arm][1] for arm in arms}
        found = on_ranks(
            RANKS, {arm: partial(job, plan, arm, seed, rates[arm], micro) for arm in arms}
        )
        yield [Run(**found[arm][0]) for arm in plan.arms]


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, print the table and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=MAIN, default=Plan.workload)
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS, help="those to report")
    parser.add_argument("--quick", action="store_true", help="a smoke test, of the autoencoder")
    parser.add_argument("--output", type=Path, help="the file for results; the page goes beside it")
    arguments = parser.parse_args(argv)
    plan = QUICK if arguments.quick else Plan(arguments.workload, tuple(arguments.seed))
    output = arguments.output
    if not output and not arguments.quick:
        output = RESULTS / f"wallclock-{plan.workload}.json"
    given = sys.argv[1:] if argv is None else argv
    origin = recording.origin_of("wallclock.py", given, ("noiseopt", "benchmarks/convergence"))
    runs: list[Run] = []
    for found in rounds(plan):
        if output and not runs:
            output.unlink(missing_ok=True)  # only now, so that a failed start loses nothing
        runs += found
        for run in found:
            print(f"{run.role} {run.seed} {run.arm}: {run.curve[-1][3]:.4f} in {run.seconds:.1f} s")
        if output:
            recording.append(found, origin, output)
            if found[0].role == "reported":
                output.with_suffix(".md").write_text(table(runs, origin) + "\n")
    print(table(runs, origin))


if __name__ == "__main__":
    main()
