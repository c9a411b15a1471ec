"""What the account costs: the record, wandb and TensorBoard, next to a training step of the demo.

    python benchmarks/observers.py          # adds to results/observers.json
    python benchmarks/observers.py --quick  # a smoke test, writes nothing unless --output is given

The demo's model is trained with `NoiseAwareAdamW` in its default settings. Blocks of steps, each up
to a decision, are observed and not observed in turn, in an order drawn anew for each pair.

share: time spent in an observer's calls over the time of all steps of the observed blocks, the
    observers' own left out. This is what training waits for.
ratio: the time of an observed block over that of the other one of its pair: the median over pairs,
    with a bootstrap interval of 95 %. It holds what runs beside training, too: wandb's and
    TensorBoard's threads.
    "control" is the same between the unobserved blocks and others of their kind.
"""

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import wandb
from torch.utils.tensorboard import SummaryWriter

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ranks, recording
from benchmarks.ranks import RESULTS
from noiseopt.control import Decision
from noiseopt.demo import text
from noiseopt.demo.gpt import GPT
from noiseopt.demo.train import Settings, noise_aware_adamw
from noiseopt.integrations.tensorboard import TensorBoardObserver
from noiseopt.integrations.wandb import WandbObserver
from noiseopt.record import DecisionLog

NAME = "observers.json"
TARGET = 0.005
OBSERVED, PLAIN, CONTROL = "observed", "plain", "control"


class Timed:
    """An observer whose calls are timed, and that can be left out."""

    def __init__(self, observer: Any) -> None:
        self.observer, self.seconds, self.calls, self.on = observer, 0.0, 0, True

    def __call__(self, decision: Decision) -> None:
        if self.on:
            began = time.perf_counter()
            self.observer(decision)
            self.seconds += time.perf_counter() - began
            self.calls += 1


@dataclass(frozen=True)
class Share:
    """An observer's time over that of training.

    Attributes:
        ms: of one call.
        share: of the time of a training step without it.
        holds: whether all observers together stay below the target; for them alone.
    """

    part: str
    observer: str
    decisions: int
    ms: float
    share: float
    target: float | None = None
    holds: bool | None = None


@dataclass(frozen=True)
class Ratio:
    """Observed blocks over others, as lower end, ratio and upper end.

    Attributes:
        block_ms: of the median block that is not observed.
    """

    part: str
    blocks: int
    block_ms: float
    wall: tuple[float, ...]
    cpu: tuple[float, ...]


def measure(blocks: int, folder: Path, settings: Settings) -> list[Share | Ratio]:
    """Train so many blocks of each kind."""
    torch.manual_seed(settings.seed)
    model = GPT(settings.shape)
    optimizer = noise_aware_adamw(model, settings)
    run = wandb.init(
        mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off")
    )
    log = DecisionLog(folder / "decisions.jsonl")
    observers = {
        "record": log,
        "wandb": WandbObserver(run, seconds=0),
        "tensorboard": TensorBoardObserver(SummaryWriter(folder / "tensorboard")),
    }
    timed = {name: Timed(observer) for name, observer in observers.items()}
    for name, one in timed.items():
        optimizer.add_observer(observers[name])  # so that each is told the start
        optimizer._adaptation.observers[-1] = one
    block = blocks_of(model, optimizer, settings, run)
    times = in_turns(blocks, block, timed)
    run.finish()
    plain = sum(wall for wall, _ in times[OBSERVED]) - sum(one.seconds for one in timed.values())
    shares = [
        Share("share", name, one.calls, 1e3 * one.seconds / one.calls, one.seconds / plain)
        for name, one in timed.items()
    ]
    total = sum(one.share for one in shares)
    ms = sum(one.ms for one in shares)
    all_of_them = Share("share", "all", shares[0].decisions, ms, total, TARGET, total <= TARGET)
    return [*shares, all_of_them, *ratios(times)]


def blocks_of(model: GPT, optimizer: Any, settings: Settings, run: Any) -> Callable[[], None]:
    """The steps up to the next decision, in the demo's loop; at their end the loop logs a loss."""
    context = settings.shape.context
    made = text.micro_batches(text.load().train, 64, settings.batch_size, context, settings.seed)
    batches = cycle(list(made))

    def block() -> None:
        latest = optimizer.decision
        while optimizer.decision is latest:
            loss = model(next(batches))
            loss.backward()
            optimizer.report_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
        run.log({"loss": loss.item()})

    return block


def in_turns(
    blocks: int, block: Callable[[], None], timed: dict[str, Timed]
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU time of each block, by kind; the first of each are for warming up."""
    times: dict[str, list[tuple[float, float]]] = {OBSERVED: [], PLAIN: [], CONTROL: []}
    order, shuffle = list(times), random.Random(0).shuffle
    for number in range(blocks + 1):
        shuffle(order)
        for kind in order:
            for one in timed.values():
                one.on = kind == OBSERVED and number > 0
            wall, cpu = time.perf_counter(), time.process_time()
            block()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                times[kind].append((wall, cpu))
    return times


def ratios(times: dict[str, list[tuple[float, float]]]) -> Iterator[Ratio]:
    wall, cpu = zip(*times[PLAIN], strict=True)
    for kind in (OBSERVED, CONTROL):
        of_wall, of_cpu = zip(*times[kind], strict=True)
        yield Ratio(
            part=f"ratio, {kind}",
            blocks=len(wall),
            block_ms=round(1e3 * statistics.median(wall), 2),
            wall=ranks.ratio(of_wall, wall),
            cpu=ranks.ratio(of_cpu, cpu),
        )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test of half a minute")
    parser.add_argument("--blocks", type=int, help="of each kind (150)")
    parser.add_argument("--output", type=Path, help=f"folder for {NAME}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    folder = options.output or (None if options.quick else RESULTS)
    code = ("noiseopt", "integrations")
    origin = recording.origin_of(Path(__file__).name, arguments, code) | {"device": "CPU, 1 thread"}
    blocks = options.blocks or (2 if options.quick else 150)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(blocks, Path(scratch), Settings())
    ranks.print_results([one for one in results if isinstance(one, Share)], ("part",))
    ranks.print_results([one for one in results if isinstance(one, Ratio)], ())
    if folder is not None:
        recording.append(results, origin, folder / NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
