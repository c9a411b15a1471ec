"""Doing what the plan says, one run after the other, in as many processes as are asked for."""

import fcntl
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.convergence.cache import Cache, Run, write_records
from benchmarks.convergence.plan import Item, Plan
from benchmarks.convergence.train import train
from benchmarks.convergence.workloads import MAIN
from benchmarks.recording import commit

WAIT = 5.0  # seconds until another process may have finished what this one needs


@dataclass(frozen=True)
class Job:
    """What a process works on, in a form that can be sent to it.

    Attributes:
        results: the folder of results.
        workloads: their names.
        arms: some arms only; everything if empty.
        split: of these arms.
        seeds: of these arms.
        device: where models are trained.
    """

    results: Path
    workloads: tuple[str, ...] = MAIN
    arms: tuple[str, ...] = ()
    split: str = "tuning"
    seeds: tuple[int, ...] = ()
    device: str = "cpu"

    @property
    def cache(self) -> Cache:
        return Cache(self.results / "convergence" / "runs")

    def items(self, plan: Plan) -> Iterator[Item]:
        """The runs asked for."""
        if self.arms:
            return plan.named(self.arms, self.split, self.seeds)
        return plan.everything()


def work(job: Job) -> None:
    """Do every run that has not been done and that no other process is at."""
    torch.set_num_threads(1)
    cache, failed = job.cache, set[str]()
    try:
        while step(job, cache, failed):
            collect(job.results, cache)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")


def step(job: Job, cache: Cache, failed: set[str]) -> bool:
    """Do the first run that is left, or wait for another process; False if nothing is left."""
    busy = False
    for run in job.items(Plan(cache, job.workloads)):
        if run is None or run.file in failed or cache.get(run) is not None:
            continue
        with cache.claimed(run) as mine:
            if mine:
                do(run, cache, job.device, failed)
                return True
            busy = True
    if busy:
        time.sleep(WAIT)
    return busy


def do(run: Run, cache: Cache, device: str, failed: set[str]) -> None:
    """Do a run and keep it. One that fails is told of and left out, so that others go on."""
    try:
        results, details = train(run, device)
    except Exception:
        traceback.print_exc()
        failed.add(run.file)
        return
    cache.put(run, results | {"commit": commit("noiseopt", "benchmarks/convergence")}, details)
    loss, updates, seconds = (results[key] for key in ("val_loss", "updates", "wall_seconds"))
    shown = "diverged" if loss is None else f"{loss:.4f}"
    lr, beta2 = run.config["lr"], run.config["beta2"]
    print(
        f"{run.workload} {run.arm} seed {run.seed} ({run.split}, lr {lr:g}, beta2 {beta2:g}): "
        f"{shown} after {updates} updates, {seconds:.0f} s",
        flush=True,
    )


def work_in(jobs: int, job: Job) -> None:
    """Work in so many processes."""
    if jobs == 1:
        work(job)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(job,)) for _ in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)


def collect(results: Path, cache: Cache | None = None) -> None:
    """Gather the finished runs in convergence.json."""
    cache = cache or Job(results).cache
    names = {path.name for path in cache.folder.glob("*") if path.is_dir()}
    records = Plan(cache, sorted(names)).records()
    write_records(results / "convergence.json", records)


def running(cache: Cache) -> list[str]:
    """The runs that some process is at."""
    found = []
    for path in sorted(cache.folder.glob("*/*.lock")):
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"{path.parent.name}/{path.name.removesuffix('.json.lock')}")
    return found
