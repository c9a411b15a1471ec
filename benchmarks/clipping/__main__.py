"""The command line: does every run that has not been done, and writes the table."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.clipping.metrics import measured, rounded
from benchmarks.clipping.rules import RULES
from benchmarks.clipping.scenarios import SCENARIOS, Plan
from benchmarks.clipping.table import markdown
from benchmarks.clipping.tasks import TASKS
from benchmarks.clipping.train import GUARDED, OURS, train
from benchmarks.convergence.cache import write, write_records
from benchmarks.recording import origin_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
NAME = "clipping"
CODE = ("noiseopt", "benchmarks/convergence/workloads")
QUICK = Plan(((1, 40), (2, 30), (4, 20), (2, 20), (1, 40)))
SEEDS = {"digits": (1, 2, 3), "gpt": (1, 2, 3)}
ON_ITS_OWN = {"gpt": ("clean",)}  # the scenarios of a task that is not run in all


@dataclass(frozen=True)
class Run:
    """What a result depends on, the code aside."""

    task: str
    scenario: str
    arm: str
    seed: int
    split: str = "reporting"
    updates: int = Plan().updates

    def done_in(self, records: Sequence[dict[str, Any]], commit: str) -> bool:
        """Whether there is a record of it from the same code."""
        wanted = vars(self) | {"commit": commit}
        return any(wanted.items() <= record.items() for record in records)


def all_runs(tasks: Sequence[str] = tuple(TASKS)) -> Iterator[Run]:
    """Every run, seed by seed."""
    for task, seed in ((name, seed) for name in tasks for seed in SEEDS[name]):
        for scenario in ON_ITS_OWN.get(task, tuple(SCENARIOS)):
            rivals = list(RULES)
            if scenario == "nans":
                rivals += [name + GUARDED for name in RULES]
            yield from (Run(task, scenario, arm, seed) for arm in (*OURS, *rivals))


def quick_runs() -> list[Run]:
    """A few arms in every scenario."""
    arms = ("noiseopt", "fixed 1.0", "adagc")
    pairs = product(SCENARIOS, arms)
    return [Run("digits", *pair, 101, "tuning", QUICK.updates) for pair in pairs]


def do(run: Run, plan: Plan) -> dict[str, Any]:
    """Do a run; returns its record."""
    began = time.perf_counter()
    scenario = SCENARIOS[run.scenario]
    trace, loss = train(TASKS[run.task], run.arm, scenario, run.seed, run.split, plan)
    found = {**vars(run), **measured(trace), "loss": rounded(loss)}
    return found | {"wall_seconds": round(time.perf_counter() - began, 1)}


def main(arguments: Sequence[str]) -> None:
    """Do what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument("--table", action="store_true", help="draw the table anew, and run nothing")
    parser.add_argument("--tuning", action="store_true", help="seed 101 of the tuning split")
    parser.add_argument("--task", choices=TASKS, action="append", help="some tasks only")
    parser.add_argument("--output", type=Path, help=f"folder for {NAME}.json and {NAME}.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.output or (None if options.quick or options.tuning else RESULTS)
    origin = origin_of(NAME, arguments, CODE)
    origin |= {"command": " ".join(("python -m benchmarks.clipping", *arguments))}
    runs = quick_runs() if options.quick else list(all_runs(options.task or tuple(TASKS)))
    if options.table:
        runs = []
    if options.tuning:
        runs = [replace(run, seed=101, split="tuning") for run in runs if run.seed == 1]
    records = work(runs, QUICK if options.quick else Plan(), origin, folder)
    print(markdown(records))


def work(
    runs: Sequence[Run], plan: Plan, origin: dict[str, str], folder: Path | None
) -> list[dict[str, Any]]:
    """Do the runs of which the folder has no record; returns all records."""
    path = folder and folder / f"{NAME}.json"
    records = read(path)
    for run in runs:
        if run.done_in(records, origin["commit"]):
            continue
        record = do(run, plan) | origin | {"device": "CPU, 1 thread"}
        known = read(path) if path else records
        records = [old for old in known if not vars(run).items() <= old.items()] + [record]
        if path:
            write_records(path, records)
        print(*vars(run).values(), record["loss"], record["wall_seconds"], file=sys.stderr)
    if path:
        write(path.with_suffix(".md"), markdown(records))
    return records


def read(path: Path | None) -> list[dict[str, Any]]:
    """The records of a file, if there is one."""
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else []
    return records


if __name__ == "__main__":
    main(sys.argv[1:])
