"""What noiseopt costs across ranks, next to plain DDP and FSDP2 with AdamW and clip_grad_norm_.

    python benchmarks/ranks.py            # all of it; adds to results/ranks.json
    python benchmarks/ranks.py --quick    # a smoke test, writes nothing unless --output is given

Ranks are processes of one thread each on this machine, over gloo.

cost: time of whole updates (forward, backward, step) of a byte-level GPT on two ranks. Arms take
    their updates in turn, in an order that is drawn anew for each, a barrier before each; an update
    lasts until the slower rank is done. A round holds a decision of our arms, and as many windows
    that are measured as a long run has: the first ones, which all are, are left out. The machine's
    speed changes meanwhile, so each update is compared with the plain loop's beside it. Reported is
    the median of that ratio over rounds, mean over the places in a round (of which one has the
    decision), with a bootstrap interval of 95 % over rounds; the arm "plain, again" is the control:
    nothing smaller than its distance from 1 is resolved. "ours, row not sent" is what is left if
    the row's all-reduce took no time at all: a bound on what overlapping it, or sending it more
    rarely, could gain.
share: where our updates spend their time when all are measured, each part without those inside it.
    The row's all-reduce includes waiting for the other rank. In rounds of their own, since watching
    takes time too.
traffic: bytes for each update: those that the ranks' own connections received, and those that the
    loopback interface carried for whomever; the least of several rounds. FSDP2 gathers parameters
    in every micro-batch, however rarely it averages gradients.
row: the row's all-reduce on 1 to 8 ranks, alone and inside updates. Where there are more ranks than
    cores, they take turns on them.
prediction: the share of an update that the row takes on more ranks, by a model whose constants are
    assumptions: nothing of it was measured, except where it says so.
"""

import argparse
import logging
import math
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script

from benchmarks import recording
from benchmarks.steady import past_first_windows
from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.adaptation import Adaptation
from noiseopt.agreement import Agreement
from noiseopt.capture import LocalNorms, passes, tally
from noiseopt.capture.row import TAIL
from noiseopt.capture.sums import GradientSums
from noiseopt.demo.gpt import GPT, VOCABULARY, Shape
from noiseopt.distributed import Ranks
from noiseopt.optim import collector
from noiseopt.optim.noise_aware import NoiseAware

TARGET = 1.01
WINDOW, LONG_WINDOW = 4, 8
CLIP = 1.0
LR = 1e-4
NEVER = 10**9
MIN_ROUNDS = 5
RESAMPLES = 2000
NAME = "ranks.json"
DEVICE = f"CPU, {os.cpu_count()} cores, 1 thread for each rank, gloo"
RESULTS = Path(__file__).parent / "results"
REFERENCE, CONTROL = "plain", "plain, again"
OURS, NOT_SENT = "ours", "ours, row not sent"
ACCUMULATING = "ours, accumulate()"
EVERY = "plain, every micro-batch averaged"
WRAPPINGS = ("DDP", "FSDP2")

# Assumptions of the prediction, for a cluster of accelerators in one data centre.
HOP_SECONDS = 20e-6  # from one rank to another, launch included
LINK_BYTES_PER_SECOND = 12.5e9  # 100 Gbit/s
UPDATE_SECONDS = (0.01, 0.1, 1.0)  # a very short update, a short one and a usual one
PREDICTED_RANKS = tuple(2**n for n in range(1, 11))


@dataclass(frozen=True)
class Size:
    """A GPT, and how long it is measured.

    Attributes:
        name: about the number of its parameters.
        shape: of the model.
        batch: sequences in a micro-batch of each rank.
        block: updates in a round, and between two decisions; by default there are ten.
        steps: updates of each arm, for each length of the window.
    """

    name: str
    shape: Shape
    batch: int
    block: int
    steps: Mapping[int, int]


SIZES = {
    size.name: size
    for size in (
        Size("tiny", Shape(1, 64, 2, 16), 1, 2, {1: 4, WINDOW: 4}),
        # 44 tensors of next to nothing: what is left is what each update costs, however long.
        Size("70K", Shape(5, 32, 2, 16), 1, 8, {1: 800, WINDOW: 200}),
        Size("1M", Shape(5, 128, 4, 128), 4, 8, {1: 120, WINDOW: 40}),
        Size("1M, 4096 tokens", Shape(5, 128, 4, 128), 32, 4, {1: 48, WINDOW: 24}),
        Size("10M", Shape(8, 320, 5, 128), 1, 4, {1: 32, WINDOW: 16}),
    )
}
FULL = ("1M", "1M, 4096 tokens", "10M")


# --- one way to train ---------------------------------------------------------------------------


def wrapped_gpt(wrapping: str, shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(shape)
    if wrapping == "DDP":
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


class Arm(ABC):
    """A model of its own, in its own loop.

    Args:
        wrapping: "DDP" or "FSDP2".
        size: of the model and its micro-batches.
        window: micro-batches in an update.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, wrapping: str, size: Size, window: int) -> None:
        self.wrapping, self.window = wrapping, window
        self.model = wrapped_gpt(wrapping, size.shape)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (16, size.batch, size.shape.context + 1)
        self.data = torch.randint(VOCABULARY, shape, generator=generator)
        self.taken = 0

    def batch(self) -> Tensor:
        self.taken += 1
        return self.data[self.taken % len(self.data)]

    @abstractmethod
    def update(self) -> None:
        """Train on one window."""


class Plain(Arm):
    """The usual loop; it averages gradients in a window's last backward, or in every one."""

    def __init__(self, wrapping: str, size: Size, window: int, every: bool = False) -> None:
        super().__init__(wrapping, size, window)
        self.every = every
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def update(self) -> None:
        for index in range(self.window):
            with self.averaging(self.every or index == self.window - 1):
                (self.model(self.batch()) / self.window).backward()
        self.clip()
        self.apply()
        self.optimizer.zero_grad()

    def averaging(self, now: bool) -> Any:
        model: Any = self.model
        if self.wrapping == "DDP":
            return nullcontext() if now else model.no_sync()
        if self.window > 1:
            model.set_requires_gradient_sync(now)
        return nullcontext()

    def clip(self) -> None:
        clip_grad_norm_(self.model.parameters(), CLIP)

    def apply(self) -> None:
        self.optimizer.step()


class Ours(Arm):
    """Ours, which clips by itself; with accumulate() or without, and sending its row or not."""

    optimizer: NoiseAwareAdamW

    def __init__(
        self,
        wrapping: str,
        size: Size,
        window: int,
        accumulates: bool = False,
        sends: bool = True,
        measures_all: bool = False,
    ) -> None:
        super().__init__(wrapping, size, window)
        self.accumulates = accumulates
        noise = config(window, size.block)
        if measures_all:
            noise = replace(noise, measure_interval=1)
        self.optimizer = NoiseAwareAdamW(self.model.parameters(), lr=LR, fused=True, noise=noise)
        past_first_windows(self.optimizer._adaptation)
        if not sends:
            keep_rows(self.optimizer)

    def update(self) -> None:
        for _ in range(self.window):
            with self.optimizer.accumulate(self.model) if self.accumulates else nullcontext():
                self.model(self.batch()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def config(window: int, decision_interval: int) -> NoiseConfig:
    """Settings under which the window stays as it is, whatever is measured."""
    return NoiseConfig(
        accumulation_steps=window,
        max_accumulation_steps=max(window, 2),
        decision_interval=decision_interval,
        dwell_updates=NEVER,
        max_norm=CLIP,
    )


class OneForAll(Ranks):
    """Ranks that take their own numbers for everyone's."""

    def __eq__(self, other: object) -> bool:
        return Ranks(self.data, self.model, self.sharded, self.groups) == other

    __hash__ = Ranks.__hash__

    def begin_sum_(self, numbers: Tensor, what: str) -> Callable[[], None]:
        numbers.mul_(self.all)
        return lambda: None


def keep_rows(optimizer: NoiseAwareAdamW) -> None:
    agreement = optimizer._adaptation._agreement
    ranks = agreement.ranks
    agreement.ranks = OneForAll(ranks.data, ranks.model, ranks.sharded, ranks.groups)


def arms_of(window: int) -> dict[str, Callable[..., Arm]]:
    """How each arm of a comparison is built; the first is the reference."""
    arms: dict[str, Callable[..., Arm]] = {REFERENCE: Plain, CONTROL: Plain, OURS: Ours}
    if window == 1:
        return arms | {NOT_SENT: partial(Ours, sends=False)}
    return arms | {
        ACCUMULATING: partial(Ours, accumulates=True),
        EVERY: partial(Plain, every=True),
    }


# --- processes ----------------------------------------------------------------------------------

Jobs = Mapping[str, Callable[[], Any]]


def on_ranks(ranks: int, jobs: Jobs) -> dict[str, list[Any]]:
    """Run jobs in turn on so many processes; what each rank returned, by the job's name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(ranks, port, folder, jobs), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    return {name: [each[name] for each in found] for name in jobs}


def _work(rank: int, ranks: int, port: int, folder: str, jobs: Jobs) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found = {}
    for name, job in jobs.items():
        found[name] = job()
        dist.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process while Python ends (pytorch issue 190489)


# --- the cost of updates ------------------------------------------------------------------------

Times = dict[str, list[tuple[float, float]]]  # of each arm's updates: wall and CPU seconds


def cost(wrapping: str, size: Size, window: int, steps: int) -> Times:
    """This rank's times."""
    arms = {name: build(wrapping, size, window) for name, build in arms_of(window).items()}
    return in_turns({name: arm.update for name, arm in arms.items()}, size.block, steps)


def in_turns(updates: Mapping[str, Callable[[], None]], block: int, steps: int) -> Times:
    """This rank's times of arms that take turns; the first round is for warming up."""
    order, shuffle = list(updates), random.Random(0).shuffle  # the same on every rank
    times: Times = {name: [] for name in order}
    for number in range(block + steps):
        shuffle(order)
        for name in order:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            updates[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number >= block:
                times[name].append((wall, cpu))
    return times


@dataclass(frozen=True)
class Cost:
    """An arm's time over that of the plain loop, as lower end, ratio and upper end.

    Attributes:
        window: micro-batches in an update.
        wall_ms: of the median round, for each update.
        cpu_ms: the same in CPU time of all ranks.
        holds: "yes" or "no" if the interval of wall time lies on one side of the target, "within
            noise" if it does not, or "too few rounds" to tell.
    """

    part: str
    wrapping: str
    size: str
    parameters: int
    window: int
    micro_batch: int
    ranks: int
    arm: str
    rounds: int
    wall_ms: float
    cpu_ms: float
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    target: float | None = None
    holds: str | None = None


def costs(wrapping: str, size: Size, window: int, found: Sequence[Times]) -> list[Cost]:
    """The records of one comparison, from the times of all ranks."""
    block, updates = size.block, {n: updates_of([times[n] for times in found]) for n in found[0]}
    records = []
    for name, ours in updates.items():
        rounds = len(ours[0]) // block
        wall, cpu = (median_round(seconds, block) for seconds in ours)
        pairs = zip(ours, updates[REFERENCE], strict=True)
        wall_ratio, cpu_ratio = (ratio(a, b, block) for a, b in pairs)
        target = TARGET if name in (OURS, ACCUMULATING) else None
        records.append(
            Cost(
                part="cost",
                wrapping=wrapping,
                size=size.name,
                parameters=count(size.shape),
                window=window,
                micro_batch=size.batch,
                ranks=len(found),
                arm=name,
                rounds=rounds,
                wall_ms=round(1e3 * wall, 4),
                cpu_ms=round(1e3 * cpu, 4),
                wall=wall_ratio,
                cpu=cpu_ratio,
                target=target,
                holds=target and verdict(wall_ratio, target, rounds),
            )
        )
    return records


def count(shape: Shape) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(shape).parameters())


def updates_of(ranks: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Seconds of each update: of the slower rank, and of all ranks' CPUs."""
    updates = list(zip(*ranks, strict=True))
    wall = [max(wall for wall, _ in update) for update in updates]
    cpu = [sum(cpu for _, cpu in update) for update in updates]
    return wall, cpu


def in_rounds(values: Sequence[float], block: int) -> list[Sequence[float]]:
    return [values[at : at + block] for at in range(0, len(values), block)]


def median_round(seconds: Sequence[float], block: int) -> float:
    """Seconds of an update in the median round."""
    return statistics.median(map(statistics.fmean, in_rounds(seconds, block)))


def ratio(ours: Sequence[float], theirs: Sequence[float], block: int = 1) -> tuple[float, ...]:
    """The ratio of values, each to the one beside it, between the ends of its interval."""
    rounds = in_rounds([a / b for a, b in zip(ours, theirs, strict=True)], block)

    def of(sample: Sequence[Sequence[float]]) -> float:
        return statistics.fmean(map(statistics.median, zip(*sample, strict=True)))

    draw = random.Random(0)
    again = sorted(of(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    low, high = again[round(0.025 * RESAMPLES)], again[round(0.975 * RESAMPLES) - 1]
    return tuple(round(value, 4) for value in (low, of(rounds), high))


def verdict(interval: Sequence[float], target: float, rounds: int) -> str:
    if rounds < MIN_ROUNDS:
        return "too few rounds"
    if interval[-1] <= target:
        return "yes"
    return "no" if interval[0] > target else "within noise"


# --- where the time goes ------------------------------------------------------------------------


ROW = "the row's all-reduce"
AVERAGING = "averaging gradients: flattening and copying"
GRADIENTS = "averaging gradients: the all-reduce"


class Stopwatch:
    """Time in functions, each without those that are watched inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inside: list[tuple[str, float]] = [("", 0.0)]

    @contextmanager
    def on(self, parts: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Watch functions, each given as its owner, its name and what it is called here."""
        with ExitStack() as stack:
            for owner, name, label in parts:
                timed = self._timed(getattr(owner, name), label)
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            around, _ = self._inside[-1]
            name = GRADIENTS if (label, around) == (ROW, AVERAGING) else label
            self._inside.append((name, 0.0))
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name] += spent - self._inside.pop()[1]
                self.calls[name] += 1
                around, inside = self._inside[-1]
                self._inside[-1] = around, inside + spent

        return timed


PARTS = (
    (passes, "begun_norm", "norms as gradients arrive"),
    (passes.BackwardPasses, "_take", "confirming that they are accumulated"),
    (passes.BackwardPasses, "_end", "end of the backward: norms joined, entries sampled"),
    (LocalNorms, "take", "factor from the sampled entries"),
    (tally._HostTally, "norms_of", "norm of the mean"),
    (GradientSums, "add", "adding to the window's sum"),
    (GradientSums, "merge", "adding the last gradient"),
    (Ranks, "begin_sum_", ROW),
    (Agreement, "_finish", "waiting for the row, and looking at it"),
    (Ranks, "sum_gradients_", AVERAGING),
    (collector, "reduce_window", "the rest of averaging"),
    (Adaptation, "agree", "making and checking the row"),
    (Adaptation, "close_window", "deciding"),
    (NoiseAware, "_torch_step", "torch's step"),
    (NoiseAware, "_take_gradient", "the rest of step()"),
    (Plain, "clip", "clip_grad_norm_"),
    (Plain, "apply", "torch's step"),
)


def profile(
    wrapping: str, size: Size, window: int, build: Callable[..., Arm], steps: int
) -> tuple[float, dict[str, float], dict[str, int]]:
    """Seconds in so many updates of an arm, in their parts, and how often each was called."""
    arm, watch = build(wrapping, size, window), Stopwatch()
    for _ in range(size.block):
        arm.update()
    dist.barrier()
    with watch.on(PARTS):
        start = time.perf_counter()
        for _ in range(steps):
            arm.update()
        spent = time.perf_counter() - start
    return spent, dict(watch.seconds), dict(watch.calls)


@dataclass(frozen=True)
class Share:
    """A part of an update, on the mean rank.

    Attributes:
        calls: in an update.
        us: microseconds in an update.
        share: of the update.
    """

    part: str
    wrapping: str
    size: str
    window: int
    arm: str
    where: str
    calls: float
    us: float
    share: float


def shares(
    wrapping: str, size: Size, window: int, arm: str, steps: int, found: Sequence[Any]
) -> list[Share]:
    spent = statistics.fmean(seconds for seconds, _, _ in found)
    records = []
    for label in dict.fromkeys([*(label for _, _, label in PARTS), GRADIENTS]):
        inside = statistics.fmean(parts.get(label, 0.0) for _, parts, _ in found)
        calls = found[0][2].get(label, 0) / steps
        if calls:
            us, part = round(1e6 * inside / steps, 2), round(inside / spent, 5)
            records.append(
                Share("share", wrapping, size.name, window, arm, label, round(calls, 3), us, part)
            )
    return records


# --- bytes on the wire --------------------------------------------------------------------------

TRAFFIC: dict[str, tuple[Callable[..., Arm], int]] = {
    REFERENCE: (Plain, 1),
    OURS: (Ours, 1),
    "plain, no_sync": (Plain, LONG_WINDOW),
    EVERY: (partial(Plain, every=True), LONG_WINDOW),
    "ours, without accumulate()": (Ours, LONG_WINDOW),
    ACCUMULATING: (partial(Ours, accumulates=True), LONG_WINDOW),
}
REFERENCES = {1: REFERENCE, LONG_WINDOW: EVERY}
BYTES_START, BYTES_END = 128, 136  # tcpi_bytes_received in Linux's struct tcp_info


def on_loopback() -> int:
    """What the loopback interface has carried so far, for whomever."""
    (line,) = [x for x in Path("/proc/net/dev").read_text().splitlines() if "lo:" in x]
    return int(line.split(":")[1].split()[0])


def received() -> int:
    """What the TCP connections of this process have brought so far."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and os.readlink(link).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(link.name))) as opened:
                if opened.family in (socket.AF_INET, socket.AF_INET6):
                    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_END)
                    total += int.from_bytes(info[BYTES_START:BYTES_END], sys.byteorder)
    return total


def traffic(wrapping: str, size: Size, updates: int, rounds: int) -> dict[str, tuple[float, float]]:
    """The least bytes for each update of the arms, which take turns: received, and on loopback."""
    arms = {name: build(wrapping, size, window) for name, (build, window) in TRAFFIC.items()}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(rounds + 1):  # the first sets up
        for name, arm in arms.items():
            dist.barrier()
            own, all_carried = received(), on_loopback()
            for _ in range(updates):
                arm.update()
            own, all_carried = received() - own, on_loopback() - all_carried
            found[name].append((own / updates, all_carried / updates))
    return {
        name: (min(own for own, _ in counts[1:]), min(carried for _, carried in counts[1:]))
        for name, counts in found.items()
    }


@dataclass(frozen=True)
class Traffic:
    """Bytes for each update, on all ranks together.

    Attributes:
        gradient: bytes of one gradient.
        bytes: received by the ranks.
        of_every: that over the same where every micro-batch of such a window is averaged.
        loopback: carried by the interface, with headers and acknowledgements.
        loopback_of_every: the same ratio of it.
    """

    part: str
    wrapping: str
    size: str
    window: int
    ranks: int
    arm: str
    gradient: int
    bytes: int
    of_every: float
    loopback: int
    loopback_of_every: float


def traffics(
    wrapping: str, size: Size, found: Sequence[Mapping[str, tuple[float, float]]]
) -> list[Traffic]:
    counts = {
        name: (sum(each[name][0] for each in found), min(each[name][1] for each in found))
        for name in found[0]
    }
    records = []
    for name, (_, window) in TRAFFIC.items():
        (own, carried), (own_every, carried_every) = counts[name], counts[REFERENCES[window]]
        records.append(
            Traffic(
                part="traffic",
                wrapping=wrapping,
                size=size.name,
                window=window,
                ranks=len(found),
                arm=name,
                gradient=4 * count(size.shape),
                bytes=round(own),
                of_every=round(own / own_every, 5),
                loopback=round(carried),
                loopback_of_every=round(carried / carried_every, 5),
            )
        )
    return records


# --- the row ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The all-reduce of the row on so many ranks; times as quartile, median, quartile.

    Attributes:
        cores: of this machine.
        bytes: of the row; on one rank none is sent, and one of the same size is timed.
        alone_us: one all-reduce after another.
        update_ms: an update around it, under DDP with a window of one.
        inside_us: the all-reduce in it, with the wait for other ranks.
        share: of the median update.
    """

    part: str
    ranks: int
    cores: int
    size: str
    bytes: int
    alone_us: tuple[float, ...]
    update_ms: tuple[float, ...] | None = None
    inside_us: tuple[float, ...] | None = None
    share: float | None = None


def all_reduces(numbers: int, blocks: int, calls: int = 20) -> list[float]:
    """Seconds of an all-reduce of so many numbers, the mean of each block of calls."""
    values = torch.ones(numbers, dtype=torch.float64)
    means = []
    for _ in range(blocks + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(values)
        means.append((time.perf_counter() - start) / calls)
        values.fill_(1.0)
    return means[1:]


def rows_in_updates(size: Size, updates: int) -> tuple[int, list[float], list[float]]:
    """The row's numbers, and the seconds of each update and of its row, its wait included."""
    numbers, inside, whole = 0, [], []
    arm, begin, finish = Ours("DDP", size, 1), Ranks.begin_sum_, Agreement._finish

    def begun(self: Ranks, row: Tensor, what: str) -> Callable[[], None]:
        nonlocal numbers
        numbers, start = len(row), time.perf_counter()
        end = begin(self, row, what)
        inside.append(time.perf_counter() - start)
        return end

    def finished(self: Agreement, *args: Any) -> None:
        start = time.perf_counter()
        finish(self, *args)
        if inside:
            inside[-1] += time.perf_counter() - start

    with patch.object(Ranks, "begin_sum_", begun), patch.object(Agreement, "_finish", finished):
        for _ in range(updates + 2):
            start = time.perf_counter()
            arm.update()
            whole.append(time.perf_counter() - start)
    return numbers, whole[2:], inside[2:]


def row_job(size: Size, blocks: int, updates: int) -> dict[str, Any]:
    """This rank's measurements of the row."""
    found: dict[str, Any] = {"alone": all_reduces(row_numbers(), blocks)}
    if dist.get_world_size() > 1:
        found["numbers"], found["whole"], found["inside"] = rows_in_updates(size, updates)
    return found


def row_numbers(groups: int = 1) -> int:
    """How many numbers are sent for so many parameter groups."""
    sent: list[Tensor] = []

    class Noting(Ranks):
        def begin_sum_(self, numbers: Tensor, what: str) -> Callable[[], None]:
            sent.append(numbers)
            numbers.mul_(self.all)
            return lambda: None

    row = torch.ones(2 * groups + TAIL, dtype=torch.float64)
    Agreement(Noting(2), on_error=print).sum_(row, groups, None, "a window", at_once=True)
    return len(sent[0])


def row_of(size: Size, found: Sequence[Mapping[str, Any]]) -> Row:
    row = Row(
        part="row",
        ranks=len(found),
        cores=os.cpu_count() or 1,
        size=size.name,
        bytes=8 * row_numbers(),
        alone_us=quartiles([1e6 * s for each in found for s in each["alone"]]),
    )
    if len(found) == 1:
        return row
    whole = [s for each in found for s in each["whole"]]
    inside = [s for each in found for s in each["inside"]]
    return replace(
        row,
        update_ms=quartiles([1e3 * s for s in whole]),
        inside_us=quartiles([1e6 * s for s in inside]),
        share=round(statistics.median(inside) / statistics.median(whole), 5),
    )


def quartiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(cut, 4) for cut in statistics.quantiles(values, n=4, method="inclusive"))


# --- more ranks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The row's share of an update by alpha * ceil(log2 R) + bytes / bandwidth.

    Ranks come to it together, since the gradients were averaged just before.

    Attributes:
        hop_us: alpha, in microseconds.
        source: where that is from.
        row_us: the all-reduce.
        shares: of updates as long as `updates_s` says.
    """

    part: str
    ranks: int
    bytes: int
    source: str
    hop_us: float
    link_bytes_per_s: float
    row_us: float
    updates_s: tuple[float, ...]
    shares: tuple[float, ...]


def row_seconds(ranks: int, size: int, hop: float = HOP_SECONDS) -> float:
    """How long the all-reduce of so many bytes takes, by the model."""
    return hop * math.ceil(math.log2(ranks)) + size / LINK_BYTES_PER_SECOND


def predictions(size: int, hop: float, source: str) -> list[Prediction]:
    found = []
    for ranks in PREDICTED_RANKS:
        seconds = row_seconds(ranks, size, hop)
        found.append(
            Prediction(
                part="prediction",
                ranks=ranks,
                bytes=size,
                source=source,
                hop_us=round(1e6 * hop, 2),
                link_bytes_per_s=LINK_BYTES_PER_SECOND,
                row_us=round(1e6 * seconds, 2),
                updates_s=UPDATE_SECONDS,
                shares=tuple(round(seconds / (update + seconds), 6) for update in UPDATE_SECONDS),
            )
        )
    return found


def measured_hop(rows: Sequence[Row]) -> float | None:
    """Alpha on this machine, from the most ranks that each have a core."""
    fitting = [row for row in rows if 1 < row.ranks <= row.cores]
    if not fitting:
        return None
    row = max(fitting, key=lambda row: row.ranks)
    return 1e-6 * row.alone_us[1] / math.ceil(math.log2(row.ranks))


# --- output -------------------------------------------------------------------------------------

Result = Cost | Share | Traffic | Row | Prediction


def shown(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " ".join(f"{number:.4g}" for number in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_results(results: Sequence[Result], common: Sequence[str]) -> None:
    """A table with a column for each field; those that all share are said above it."""
    rows = [{k: shown(v) for k, v in asdict(result).items()} for result in results]
    head = [f"{name} {rows[0][name]}" for name in common if name != "part"]
    print(f"{rows[0]['part']}: {', '.join(head)}")
    columns = [[name, *(row[name] for row in rows)] for name in rows[0] if name not in common]
    columns = [column for column in columns if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip())
    print(flush=True)


def origin_of(arguments: Sequence[str]) -> dict[str, str]:
    origin = recording.origin_of(Path(__file__).name, arguments)
    return origin | {"device": DEVICE}


# --- the parts ----------------------------------------------------------------------------------

OF_COST = ("part", "wrapping", "size", "parameters", "window", "micro_batch", "ranks")
OF_SHARE = ("part", "wrapping", "size", "window", "arm")
OF_TRAFFIC = ("part", "wrapping", "size", "ranks", "gradient")
OF_ROW = ("part", "cores", "size", "bytes")
OF_PREDICTION = ("part", "source", "bytes", "hop_us", "link_bytes_per_s", "updates_s")


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Attributes:
        sizes: of models; only the first serves for what is no comparison of costs.
        ranks: on how many the row is measured.
        steps: updates of each arm; None for each size's own number.
        windows: the lengths of those in which costs are compared.
        rounds: of the counted bytes; the row is measured in proportion.
        together: whether processes are started once for all that runs on as many, which is faster
            and shows nothing before the end.
    """

    sizes: tuple[Size, ...]
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    steps: int | None = None
    windows: tuple[int, ...] = (1, WINDOW)
    rounds: int = 5
    together: bool = False


@dataclass(frozen=True)
class Task:
    """A job for so many ranks, how its results become records, and what these have in common."""

    ranks: int
    job: Callable[[], Any]
    records: Callable[[list[Any]], Sequence[Result]]
    common: tuple[str, ...]


def cost_tasks(plan: Plan) -> Iterator[Task]:
    for size in plan.sizes:
        for window in size.steps.keys() & plan.windows:
            for wrapping in WRAPPINGS:
                job = partial(cost, wrapping, size, window, plan.steps or size.steps[window])
                yield Task(2, job, partial(costs, wrapping, size, window), OF_COST)


def share_tasks(plan: Plan) -> Iterator[Task]:
    size = plan.sizes[0]
    steps = plan.steps or size.steps[WINDOW]
    for wrapping in WRAPPINGS:
        for window, name in ((1, REFERENCE), (1, OURS), (WINDOW, ACCUMULATING)):
            build = arms_of(window)[name]
            if name != REFERENCE:
                build = partial(build, measures_all=True)
            job = partial(profile, wrapping, size, window, build, steps)
            records = partial(shares, wrapping, size, window, name, steps)
            yield Task(2, job, records, OF_SHARE)


def traffic_tasks(plan: Plan) -> Iterator[Task]:
    size = plan.sizes[0]
    for wrapping in WRAPPINGS:
        job = partial(traffic, wrapping, size, 2, plan.rounds)
        yield Task(2, job, partial(traffics, wrapping, size), OF_TRAFFIC)


def row_tasks(plan: Plan) -> Iterator[Task]:
    size = plan.sizes[0]
    job = partial(row_job, size, 5 * plan.rounds, 4 * plan.rounds)
    for ranks in plan.ranks:
        yield Task(ranks, job, lambda found: [row_of(size, found)], OF_ROW)


TASKS: dict[str, Callable[[Plan], Iterator[Task]]] = {
    "cost": cost_tasks,
    "share": share_tasks,
    "traffic": traffic_tasks,
    "row": row_tasks,
}


def run(plan: Plan, parts: Sequence[str]) -> Iterator[Sequence[Result]]:
    """Measure, printing each table as it is known."""
    rows: list[Row] = []
    for records in run_tasks([task for name in parts for task in TASKS[name](plan)], plan.together):
        rows += (record for record in records if isinstance(record, Row))
        yield records
    for source, hop in (("assumed", HOP_SECONDS), ("measured here", measured_hop(rows))):
        if rows and hop is not None:
            predicted = predictions(rows[0].bytes, hop, source)
            print_results(predicted, OF_PREDICTION)
            yield predicted


def run_tasks(tasks: Sequence[Task], together: bool) -> Iterator[Sequence[Any]]:
    """Each task's records, printed as they are known."""
    for group in groups_of(tasks, together):
        jobs = {str(number): task.job for number, task in enumerate(group)}
        found = on_ranks(group[0].ranks, jobs)
        for task, results in zip(group, found.values(), strict=True):
            records = task.records(results)
            print_results(records, task.common)
            yield records


def groups_of(tasks: Sequence[Task], together: bool) -> list[list[Task]]:
    """Those that share their processes."""
    if not together:
        return [[task] for task in tasks]
    by_ranks: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        by_ranks[task.ranks].append(task)
    return list(by_ranks.values())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test of half a minute")
    parser.add_argument("--parts", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help=f"default: {' '.join(FULL)}")
    parser.add_argument("--ranks", nargs="+", type=int, help="for the row; default: 1 2 4 8")
    parser.add_argument("--steps", type=int, help="updates of each arm in each comparison")
    parser.add_argument("--windows", nargs="+", type=int, choices=(1, WINDOW), default=(1, WINDOW))
    parser.add_argument("--output", type=Path, help="folder for ranks.json")
    options = parser.parse_args(arguments)
    names = options.sizes or (("tiny",) if options.quick else FULL)
    plan = Plan(
        tuple(SIZES[name] for name in names),
        tuple(options.ranks or ((2,) if options.quick else (1, 2, 4, 8))),
        options.steps,
        tuple(options.windows),
        rounds=2 if options.quick else 5,
        together=options.quick,
    )
    folder = options.output or (None if options.quick else RESULTS)
    origin = origin_of(arguments)  # before others can commit what is not measured here
    for results in run(plan, options.parts):
        if folder is not None:
            recording.append(results, origin, folder / NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
