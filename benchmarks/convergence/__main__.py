"""The command line: run, status, table, fractions."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.convergence import arms, plots
from benchmarks.convergence.fractions import along
from benchmarks.convergence.fractions import markdown as markdown_of_fractions
from benchmarks.convergence.plan import REPORTING_SEEDS, TUNING_SEEDS, Plan
from benchmarks.convergence.table import markdown
from benchmarks.convergence.work import Job, collect, running, work_in
from benchmarks.convergence.workloads import MAIN, SPLITS, WORKLOADS

RESULTS = Path(__file__).resolve().parents[1] / "results"
FRACTIONS = "The noise fraction of one micro-batch (of Seesaw's window) along its run, by norm"

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
Results = Annotated[Path, typer.Option(help="The folder of results.")]
Workloads = Annotated[list[str] | None, typer.Option("--workload", help="Some workloads only.")]


@app.command()
def run(
    workload: Workloads = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Some arms only, such as 'auto@verify=False'.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of these arms: tuning or reporting.")] = "tuning",
    seed: Annotated[
        list[int] | None, typer.Option(help="Of these arms; by default those of the split.")
    ] = None,
    results: Results = RESULTS,
    device: Annotated[str, typer.Option(help="Where models are trained.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Runs at a time, each on one thread.")] = 1,
) -> None:
    """Do every run that has not been done. It may be stopped at any time and started again."""
    workloads = _checked(workload, split)
    for name in arm or ():
        arms.settings(name)
    seeds = seed or (TUNING_SEEDS[:1] if split == "tuning" else REPORTING_SEEDS)
    work_in(jobs, Job(results, workloads, tuple(arm or ()), split, tuple(seeds), device))


@app.command()
def status(workload: Workloads = None, results: Results = RESULTS) -> None:
    """Say what is done, what is left and what is running."""
    cache = Job(results).cache
    items = list(Plan(cache, _checked(workload)).everything())
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    left: Counter[tuple[str, str]] = Counter()
    for item in {item.file: item for item in items if item}.values():
        record = cache.get(item)
        if record:
            seconds[item.workload, item.split].append(record["wall_seconds"])
        else:
            left[item.workload, item.split] += 1
    for name, split in sorted(seconds.keys() | left.keys()):
        known = seconds[name, split]
        pace = f", {sum(known) / len(known):.0f} s each" if known else ""
        print(f"{name:12} {split:10} {len(known):4} done {left[name, split]:4} left{pace}")
    print(f"{items.count(None)} steps wait for others before they are known")
    for name in running(cache) or ["nothing"]:
        print(f"running: {name}")


@app.command()
def table(
    split: Annotated[str, typer.Option(help="tuning or reporting.")] = "reporting",
    results: Results = RESULTS,
) -> None:
    """Gather finished runs, if there are any, and redraw the table and the figures."""
    _checked(None, split)
    if Job(results).cache.folder.is_dir():
        collect(results)
    records = json.loads((results / "convergence.json").read_text())
    suffix = "" if split == "reporting" else f"-{split}"
    text = markdown(records, split)
    (results / f"convergence{suffix}.md").write_text(text)
    print(text)
    for name in sorted({r["workload"] for r in records if r["split"] == split}):
        plots.draw(records, name, split, results / f"convergence-{name}{suffix}.png")


@app.command()
def fractions(workload: Workloads = None, results: Results = RESULTS) -> None:
    """Measure the noise along Seesaw runs, in the norms that could gate growth."""
    cache, parts = Job(results).cache, [f"# {FRACTIONS}"]
    for name in _checked(workload):
        run = Plan(cache, (name,)).run(name, "seesaw", TUNING_SEEDS[0], "tuning")
        if run is None:
            raise typer.BadParameter(f"{name} is not tuned yet: do its runs first")
        parts.append(markdown_of_fractions(name, list(along(run))))
        print(parts[-1], flush=True)
    (results / "convergence-fractions.md").write_text("\n\n".join(parts) + "\n")


def _checked(workloads: list[str] | None, split: str = "tuning") -> tuple[str, ...]:
    for name in workloads or ():
        if name not in WORKLOADS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(WORKLOADS)}")
    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}")
    return tuple(workloads or MAIN)


if __name__ == "__main__":
    app()
