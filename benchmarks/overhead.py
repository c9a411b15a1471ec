"""What noiseopt costs next to torch's AdamW with clip_grad_norm_: time, memory and device waits.

    python benchmarks/overhead.py            # all of it; adds to results/overhead.json
    python benchmarks/overhead.py --quick    # a smoke test, writes nothing unless --output is given

Arms take their micro-batches in turn, in an order that is drawn anew for each, so that whatever
else the machine does meets all of them alike. A round is a block of micro-batches that ends, for
our arms, in a decision, which is never less often than by default. What is reported is the median
over rounds of an arm's time over the reference's, with quartiles; the arm "torch, again" is the
control: as far as its quartiles lie from 1, nothing is resolved. "torch's kernels alone" calls, on
a CPU, the kernels that measuring and clipping need, without any of our code.

update: one update with measuring and clipping. Gradients are copied into place before each, which
    is not timed. In a window of 4 the reference adds three of the four gradients to `p.grad`, as
    the backward pass would do; that is timed, since our optimizer adds by itself.
step: forward, backward and update of a byte-level GPT. `parts` is the same ratio with one median
    time of forward and backward put in for all arms of a round, where these do the same in them:
    it leaves out the noise of what is equal. Probes are measured in every second update, and put
    together with windows of one in the proportion of the default.
memory: bytes of parameter-sized tensors held beyond what torch's AdamW holds.
waits: steps without a decision under torch.cuda.set_sync_debug_mode("error").
"""

import argparse
import gc
import logging
import math
import random
import statistics
import sys
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script

from benchmarks import recording
from noiseopt import NoiseAwareAdamW, NoiseConfig

UPDATE_TARGET = 0.95
STEP_TARGET = 1.005
WINDOW = 4
NEVER = 10**9
CLIP = 1.0
SMALL = 240  # bytes; every parameter of our models is larger, and no row of norms is
MIN_ROUNDS = 3
SECONDS = 390.0  # after which each comparison still makes one round
RESULTS = Path(__file__).parent / "results"
NAME = "overhead.json"
REFERENCE, CONTROL, LEAST = "torch", "torch, again", "torch's kernels alone"


# --- models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A GPT, and how long it is measured.

    Attributes:
        name: about the number of its parameters.
        width: of the residual stream.
        layers: blocks.
        vocab: 256 for bytes; GPT-2's where its embedding is a large part of the model.
        context: tokens in a sequence.
        micro_batches: sequences in a micro-batch; one comparison of steps for each.
        updates: in a round of the "update" part; 0 leaves that out.
        windows: of four micro-batches in a round of the "step" part; or pairs of a window of one
            and a probe.
        peers: the sizes of the micro-batch at which they are measured.
        seconds: for each comparison, about; at least MIN_ROUNDS are made, in time.
    """

    name: str
    width: int
    layers: int
    vocab: int = 256
    context: int = 64
    micro_batches: tuple[int, ...] = (1, 4)
    updates: int = 10
    windows: int = 2
    peers: tuple[int, ...] = (1,)
    seconds: float = 15.0


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 64, 1, context=8, micro_batches=(1,), updates=2, windows=1, seconds=1),
        Size("1M", 128, 5, windows=3, peers=(1, 4), seconds=8),
        Size("1M, 1024 tokens", 128, 5, 256, 128, (8,), 0, peers=(), seconds=30),
        Size("1M, 4096 tokens", 128, 5, 256, 128, (32,), 0, 1, (), seconds=60),
        Size("12M", 384, 7, updates=5, windows=1),
        Size("124M", 768, 12, 50257, 32, (1,), updates=1, windows=1, peers=()),
    )
}
FULL = ("1M", "1M, 1024 tokens", "1M, 4096 tokens", "12M", "124M")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(width // 64, 1)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x))
        q, k, v = qkv.unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    """A pre-norm GPT with a tied head; returns the loss of predicting the next token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocab, size.width)
        self.places = nn.Parameter(0.02 * torch.randn(size.context, size.width))
        self.blocks = nn.Sequential(*(Block(size.width) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(text[:, :-1]) + self.places))
        logits = x @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def gpt(size: Size, device: torch.device) -> GPT:
    torch.manual_seed(0)
    return GPT(size).to(device)


# --- what is timed ----------------------------------------------------------------------------

CLOCKS = ("wall", "cpu")
Times = dict[tuple[str, str], float]  # by part and clock


@dataclass
class Watch:
    """Wall and CPU time, summed over the with blocks."""

    device: torch.device
    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> None:
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Arm(ABC):
    """One way to train; `run` is one micro-batch.

    `update` times what comes after the backward pass, `rest` what comes before.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self.window, self.device, self.calls = window, device, 0
        self.reset()

    def reset(self) -> None:
        self.rest, self.update = Watch(self.device), Watch(self.device)

    def times(self) -> Times:
        watches = {"rest": self.rest, "update": self.update}
        return {
            (part, clock): getattr(watch, clock)
            for part, watch in watches.items()
            for clock in CLOCKS
        }

    @property
    def first(self) -> bool:
        return self.calls % self.window == 0

    @property
    def last(self) -> bool:
        return self.calls % self.window == self.window - 1

    def run(self) -> None:
        self.micro_batch()
        self.calls += 1

    @abstractmethod
    def micro_batch(self) -> None:
        """Do one micro-batch's work, timed by the clocks."""


class Update(Arm):
    """An update of parameters that all arms share, with gradients that are copied into p.grad."""

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor], window: int) -> None:
        super().__init__(window, params[0].device)
        self.params, self.grads = params, grads
        self.into = [p.grad for p in params]

    def set_grads(self) -> None:
        for param, grad in zip(self.params, self.into, strict=True):
            param.grad = grad
        torch._foreach_copy_(self.into, self.grads)


class TorchUpdate(Update):
    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        window: int,
        clip: float,
        **how: Any,
    ) -> None:
        super().__init__(params, grads, window)
        self.clip = clip * window
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, **how)
        if window > 1:  # the sum must outlast the other arms' turns
            self.into = [torch.empty_like(p) for p in params]

    def micro_batch(self) -> None:
        for param, grad in zip(self.params, self.into, strict=True):
            param.grad = grad
        if self.first:
            self.set_grads()
        with self.update:
            if not self.first:
                torch._foreach_add_(self.into, self.grads)
            if self.last:
                clip_grad_norm_(self.params, self.clip)
                self.optimizer.step()


class KernelsUpdate(TorchUpdate):
    """The kernels that ours calls, and nothing else: the least that its update can take."""

    def micro_batch(self) -> None:
        self.set_grads()
        with self.update:
            step_clipped(self.optimizer, self.into, self.clip)


def norm_of(grads: Sequence[Tensor]) -> float:
    return math.hypot(*(norm.item() for norm in torch._foreach_norm(grads)))


def step_clipped(optimizer: Any, grads: Sequence[Tensor], max_norm: float) -> None:
    """Update with torch's fused kernel, which clips as it goes."""
    optimizer.grad_scale = torch.tensor(max(norm_of(grads) / max_norm, 1.0))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()


class OurUpdate(Update):
    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], noise: NoiseConfig, **how: Any
    ) -> None:
        super().__init__(params, grads, noise.accumulation_steps)
        self.optimizer = NoiseAwareAdamW(params, lr=1e-4, noise=noise, **how)

    def micro_batch(self) -> None:
        self.set_grads()
        with self.update:
            self.optimizer.step()


class Step(Arm):
    """A training step of a model of its own: `after` is given what follows the backward pass."""

    def __init__(self, size: Size, batch: int, window: int, device: torch.device) -> None:
        super().__init__(window, device)
        self.model = gpt(size, device)
        self.params = list(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        shape = (32, batch, size.context + 1)
        self.data = torch.randint(size.vocab, shape, generator=generator).to(device)

    def micro_batch(self) -> None:
        with self.rest:
            self.before()
            loss = self.model(self.data[self.calls % len(self.data)])
            (loss / self.divisor).backward()
        with self.update:
            self.after()

    @property
    def divisor(self) -> int:
        return self.window

    def before(self) -> None:
        """What precedes the forward pass."""

    def after(self) -> None:
        """What follows the backward pass."""
        if self.last:
            self.clip()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def clip(self) -> None:
        clip_grad_norm_(self.params, CLIP)

    optimizer: Any


class TorchStep(Step):
    def __init__(self, size: Size, batch: int, window: int, device: torch.device) -> None:
        super().__init__(size, batch, window, device)
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=True)


class KernelsStep(TorchStep):
    """The kernels that ours calls, and nothing else: of norms, of the sum, of the update."""

    def after(self) -> None:
        grads = [p.grad for p in self.params]
        norm_of(grads)
        if self.first:
            self.sums = grads
        else:
            torch._foreach_add_(self.sums, grads)
        self.optimizer.zero_grad()
        if self.last:
            for param, total in zip(self.params, self.sums, strict=True):
                param.grad = total
            step_clipped(self.optimizer, self.sums, CLIP)
            self.optimizer.zero_grad()


class OurStep(Step):
    """Ours, where every micro-batch calls step()."""

    def __init__(self, size: Size, batch: int, noise: NoiseConfig, device: torch.device) -> None:
        super().__init__(size, batch, noise.accumulation_steps, device)
        self.optimizer = NoiseAwareAdamW(self.params, lr=1e-4, fused=True, noise=noise)

    @property
    def divisor(self) -> int:
        return 1

    def after(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class OurExternalStep(TorchStep):
    """Ours in the usual loop, which accumulates in p.grad; it clips by itself."""

    def __init__(self, size: Size, batch: int, noise: NoiseConfig, device: torch.device) -> None:
        Step.__init__(self, size, batch, noise.accumulation_steps, device)
        self.optimizer = NoiseAwareAdamW(self.params, lr=1e-4, fused=True, noise=noise)

    def clip(self) -> None:
        """Nothing: max_norm is in the settings."""


# --- peers: each in the usual loop, with clip_grad_norm_ unless it clips by itself ---------------


class AdaScaleStep(TorchStep):
    def __init__(self, *args: Any) -> None:
        from fairscale.optim import AdaScale

        super().__init__(*args)
        self.optimizer = AdaScale(
            self.optimizer, world_size=1, num_gradients_to_accumulate=self.window
        )


class AdaptDLStep(TorchStep):
    """AdaptDL's estimator on a stub of its model, driven as its data-parallel wrapper does."""

    kind = "GradientNoiseScale"

    def __init__(self, *args: Any) -> None:
        from adaptdl.torch import gradient_noise_scale

        super().__init__(*args)
        self.stub = argparse.Namespace(require_backward_grad_sync=True)
        estimator = getattr(gradient_noise_scale, self.kind)
        self.noise = estimator(self.stub, self.optimizer, num_replicas=1)

    def before(self) -> None:
        self.stub.require_backward_grad_sync = self.last

    def after(self) -> None:
        if self.last:
            self.clip()
            self.optimizer.step()
            self.noise.reset_accumulation()


class AdaptDLAdamStep(AdaptDLStep):
    kind = "AdamGradientNoiseScale"


class ZClipStep(TorchStep):
    def __init__(self, *args: Any) -> None:
        from zclip import ZClip

        super().__init__(*args)
        self.zclip = ZClip(max_grad_norm=CLIP)

    def clip(self) -> None:
        self.zclip.step(self.model)


class ScheduleFreeStep(TorchStep):
    def __init__(self, *args: Any) -> None:
        from schedulefree import AdamWScheduleFree

        super().__init__(*args)
        self.optimizer = AdamWScheduleFree(self.params, lr=1e-4)
        self.optimizer.train()


PEERS: dict[str, type[TorchStep]] = {
    "fairscale AdaScale": AdaScaleStep,
    "AdaptDL noise scale": AdaptDLStep,
    "AdaptDL Adam noise scale": AdaptDLAdamStep,
    "ZClip": ZClipStep,
    "schedule-free AdamW": ScheduleFreeStep,
}


# --- timing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """An arm in one comparison; ratios are to the arm "torch", as quartile, median, quartile.

    Attributes:
        kernel: of both: "fused", "foreach" or "for-loop".
        window: micro-batches in an update.
        micro_batch: sequences in one; None where there are none.
        wall_ms: the median time of a window, its mean over a round.
        cpu_ms: the same in CPU time, of which nothing is lost to others on the machine.
        parts: see the module's docstring.
        target: the largest ratio of CPU time (`parts`, if there is one; wall time on a GPU) that
            we aim at.
        holds: "yes", "no", "within noise" if the target lies between the quartiles, or "too few
            rounds" to tell.
    """

    part: str
    size: str
    parameters: int
    kernel: str
    window: int
    micro_batch: int | None
    arm: str
    rounds: int = 0
    wall_ms: float | None = None
    cpu_ms: float | None = None
    wall: tuple[float, ...] | None = None
    cpu: tuple[float, ...] | None = None
    parts: tuple[float, ...] | None = None
    target: float | None = None
    holds: str | None = None
    note: str | None = None


Build = Callable[[], Arm]


@dataclass(frozen=True)
class Comparison:
    """Arms that are measured in turn, the first of which is the reference.

    Attributes:
        clock: "wall" or "cpu": the one that counts.
        common: what their records have in common.
        arms: how each is built; an ImportError says that it is not installed.
        targets: the largest ratio aimed at, for each arm that has one.
        block: micro-batches in a round.
        seconds: to spend, about.
        equal_rest: whether all arms do the same until the end of the backward pass.
    """

    clock: str
    common: dict[str, Any]
    arms: dict[str, Build]
    targets: dict[str, float]
    block: int
    seconds: float
    equal_rest: bool = False

    def run(self, max_rounds: int, deadline: float) -> list[Timing]:
        built = {name: build_if_installed(build) for name, build in self.arms.items()}
        arms = {name: arm for name, arm in built.items() if arm is not None}
        rounds = self._measure(arms, max_rounds, deadline)
        return [
            self._timing(name, rounds) if name in arms else self._missing(name) for name in built
        ]

    def _missing(self, name: str) -> Timing:
        return Timing(**self.common, arm=name, note="not installed")

    def _measure(
        self, arms: dict[str, Arm], max_rounds: int, deadline: float
    ) -> dict[str, list[Times]]:
        """The times of each arm in each round; the first round is for warming up."""
        order, shuffle = list(arms.values()), random.Random(0).shuffle
        rounds: dict[str, list[Times]] = defaultdict(list)
        start = time.perf_counter()
        for number in range(max_rounds + 1):
            began = time.perf_counter()
            for arm in order:
                arm.reset()
            for _ in range(self.block):
                shuffle(order)
                for arm in order:
                    arm.run()
            for name, arm in arms.items():
                rounds[name].append(arm.times())
            now = time.perf_counter()
            enough = number >= MIN_ROUNDS and 2 * now - began - start > self.seconds
            if enough or (number >= 1 and 2 * now - began > deadline):
                break
        rounds = {name: times[1:] for name, times in rounds.items()}
        if PROBING in rounds:
            pairs = zip(rounds["noiseopt"], rounds[PROBING], strict=True)
            rounds[PROBING] = [rarer_probes(single, probing) for single, probing in pairs]
        return rounds

    def _timing(self, name: str, rounds: dict[str, list[Times]]) -> Timing:
        ours = rounds[name]
        pairs = list(zip(ours, rounds[REFERENCE], strict=True))
        ratios = {
            clock: quartiles([total(a, clock) / total(b, clock) for a, b in pairs])
            for clock in CLOCKS
        }
        parts = None
        if self.equal_rest:
            all_arms = zip(*rounds.values(), strict=True)
            rest = [statistics.median(t["rest", self.clock] for t in arms) for arms in all_arms]
            update = "update", self.clock
            parts = quartiles(
                [(r + a[update]) / (r + b[update]) for r, (a, b) in zip(rest, pairs, strict=True)]
            )
        windows = self.block / self.common["window"]
        wall, cpu = (statistics.median(total(t, clock) for t in ours) for clock in CLOCKS)
        target = self.targets.get(name)
        return Timing(
            **self.common,
            arm=name,
            rounds=len(ours),
            wall_ms=round(1e3 * wall / windows, 4),
            cpu_ms=round(1e3 * cpu / windows, 4),
            **ratios,
            parts=parts,
            target=target,
            holds=target and verdict(parts or ratios[self.clock], target, len(ours)),
        )


def rarer_probes(singles: Times, pair: Times) -> Times:
    """The times of PAIR micro-batches, were there a probe in every PROBE_INTERVALth update.

    Args:
        singles: of PAIR windows of one.
        pair: of a window of one and a probe.
    """
    count = PROBE_INTERVAL - 2  # windows of one besides the pair
    scale = PAIR / (count + PAIR)
    return {key: scale * (count / PAIR * singles[key] + pair[key]) for key in singles}


def build_if_installed(build: Build) -> Arm | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build()
    except ImportError:
        return None


def total(times: Times, clock: str) -> float:
    return times["rest", clock] + times["update", clock]


def quartiles(values: Sequence[float]) -> tuple[float, ...]:
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return tuple(round(cut, 4) for cut in cuts)


def verdict(ratio: Sequence[float], target: float, rounds: int) -> str:
    if rounds < MIN_ROUNDS:
        return "too few rounds"
    if ratio[-1] <= target:
        return "yes"
    return "no" if ratio[0] > target else "within noise"


KERNELS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}


def config(window: int, decision_interval: int, **settings: Any) -> NoiseConfig:
    """Settings under which the window stays as it is, whatever is measured."""
    return NoiseConfig(
        accumulation_steps=window,
        max_accumulation_steps=max(window, 2),
        decision_interval=decision_interval,
        dwell_updates=NEVER,
        **settings,
    )


def update_comparisons(size: Size, device: torch.device) -> Iterator[Comparison]:
    """Every kernel at a window of one, and the fused one at a window of four."""
    params = list(gpt(size, device).parameters())
    for param in params:
        param.grad = torch.empty_like(param)
    generator = torch.Generator().manual_seed(2)
    grads = [1e-3 * torch.randn(p.shape, generator=generator).to(device) for p in params]
    norm = torch.stack([g.square().sum(dtype=torch.float64) for g in grads]).sum().sqrt().item()
    common = {
        "part": "update",
        "size": size.name,
        "parameters": sum(p.numel() for p in params),
        "micro_batch": None,
    }
    for kernel, window in (*((kernel, 1) for kernel in KERNELS), ("fused", WINDOW)):
        how = KERNELS[kernel]

        def ours(mode: str, clip: float, window: int = window, how: dict[str, bool] = how) -> Build:
            settings = config(window, size.updates, mode=mode, max_norm=clip, probe_interval=0)
            return lambda: OurUpdate(params, grads, settings, **how)

        def theirs(window: int = window, how: dict[str, bool] = how) -> Arm:
            return TorchUpdate(params, grads, window, norm / 2, **how)

        arms = {
            "noiseopt, auto, clips": ours("auto", norm / 2),
            "noiseopt, auto, does not clip": ours("auto", 2 * norm),
        }
        targeted = arms if (kernel, window) == ("fused", 1) else ()
        if kernel == "fused":
            arms = arms | {"noiseopt, advise": ours("advise", 2 * norm)}
        if targeted and device.type == "cpu":
            arms = arms | {
                f"{LEAST}, {how}": lambda clip=clip: KernelsUpdate(
                    params, grads, 1, clip, fused=True
                )
                for how, clip in {"clips": norm / 2, "does not clip": 2 * norm}.items()
            }
        yield Comparison(
            "wall" if device.type == "cuda" else "cpu",
            common | {"kernel": kernel, "window": window},
            {REFERENCE: theirs, CONTROL: theirs, **arms},
            dict.fromkeys(targeted, UPDATE_TARGET),
            block=window * size.updates,
            seconds=size.seconds / 2,
        )


PROBE_INTERVAL = NoiseConfig().probe_interval
PROBING = f"noiseopt, probing every {PROBE_INTERVAL}th update"
PAIR = 3  # micro-batches in a window of one and a probe


def step_comparisons(
    size: Size, device: torch.device, peers: Sequence[str]
) -> Iterator[Comparison]:
    """Windows of one and of four, at every size of the micro-batch."""
    count = sum(p.numel() for p in gpt(size, device).parameters())
    for batch in size.micro_batches:

        def torch_step(window: int, batch: int = batch) -> Build:
            return lambda: TorchStep(size, batch, window, device)

        def ours(
            kind: Any, window: int, interval: int, batch: int = batch, **settings: Any
        ) -> Build:
            noise = config(window, interval, max_norm=CLIP, **settings)
            return lambda: kind(size, batch, noise, device)

        def peer(kind: type[TorchStep], batch: int = batch) -> Build:
            return lambda: kind(size, batch, WINDOW, device)

        common = {
            "part": "step",
            "size": size.name,
            "parameters": count,
            "kernel": "fused",
            "micro_batch": batch,
        }
        arms = {
            "noiseopt": ours(OurStep, 1, PAIR * size.windows, probe_interval=0),
            PROBING: ours(OurStep, 1, 2 * size.windows, probe_interval=2),
        }
        yield Comparison(
            "wall" if device.type == "cuda" else "cpu",
            common | {"window": 1},
            {REFERENCE: torch_step(1), CONTROL: torch_step(1), **arms},
            dict.fromkeys(arms, STEP_TARGET),
            block=PAIR * size.windows,
            seconds=size.seconds,
            equal_rest=True,
        )
        arms = {
            "noiseopt": ours(OurStep, WINDOW, size.windows),
            "noiseopt, external": ours(
                OurExternalStep,
                WINDOW,
                size.windows,
                accumulation="external",
                measure_interval=1,  # the most that it can cost
            ),
        }
        if device.type == "cpu":
            arms[LEAST] = peer(KernelsStep)
        others = {name: peer(PEERS[name]) for name in peers if batch in size.peers}
        yield Comparison(
            "wall" if device.type == "cuda" else "cpu",
            common | {"window": WINDOW},
            {REFERENCE: torch_step(WINDOW), CONTROL: torch_step(WINDOW), **arms, **others},
            {"noiseopt": STEP_TARGET},
            block=WINDOW * size.windows,
            seconds=1.5 * size.seconds,
        )


# --- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Parameter-sized memory beyond that of torch's AdamW, while p.grad is there for both.

    Attributes:
        window: micro-batches in it, by turns if there are several.
        gradient: bytes of one gradient of the whole model.
        in_window: bytes held after the first micro-batch of the (last) window.
        after_update: bytes held after the update.
        peak: bytes by which the most that was there at once is higher: within calls of step() and
            clip_grad_norm_ on the CPU, over whole training steps on a GPU.
        claim: the gradients of the whole model that we say are held inside a window.
        holds: whether exactly that is held, and nothing after a window of one.
    """

    part: str
    arm: str
    window: str
    gradient: int
    in_window: int
    after_update: int
    peak: int
    claim: int
    holds: str


class Allocations(TorchDispatchMode):
    """Bytes of parameter-sized tensors made under it: those alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._meet((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._meet(result, new=True)
        return result

    def _meet(self, tree: Any, new: bool) -> None:
        for storage in storages(tree):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                size = storage.nbytes() if new else 0
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def storages(tree: Any) -> Iterator[Any]:
    """The storages of parameter-sized tensors in nested lists, tuples and dicts."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > SMALL:
            yield leaf.untyped_storage()


def live_bytes() -> int:
    """Bytes of the parameter-sized tensors that are alive and not frozen, gradients included."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    tensors += [item.grad for item in tensors if item.is_leaf and item.grad is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages(tensors)}.values())


def memory_used(
    size: Size, device: torch.device, noise: NoiseConfig | None, windows: Sequence[int]
) -> tuple[int, int, int]:
    """Bytes held in the last of the windows and after it, and the most there was at once.

    Args:
        size: the model's.
        device: where it is trained.
        noise: settings of ours, or None for torch's optimizer.
        windows: micro-batches in each.
    """
    before, tracker, level = live_bytes(), Allocations(), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
    model = gpt(size, device)
    params = list(model.parameters())
    optimizer: Any = (
        torch.optim.AdamW(params, fused=True)
        if noise is None
        else NoiseAwareAdamW(params, fused=True, noise=noise)
    )
    accumulates = noise is not None and noise.accumulation == "internal"
    data = torch.randint(size.vocab, (1, size.context + 1)).to(device)
    held: list[int] = []
    for window in windows:
        for number in range(window):
            model(data).div(1 if accumulates else window).backward()
            with tracker:
                if number == window - 1 and noise is None:
                    clip_grad_norm_(params, CLIP)
                if number == window - 1 or accumulates:
                    optimizer.step()
            held.append(live_bytes() - before)
            if number == window - 1 or accumulates:
                optimizer.zero_grad()
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) - level if cuda else tracker.peak
    return held[-windows[-1]], held[-1], peak


def memory(size: Size, device: torch.device) -> list[Memory]:
    """What ours holds beyond torch's AdamW in the same windows."""
    gradient = sum(p.numel() * p.element_size() for p in gpt(size, device).parameters())
    cases = [
        ("noiseopt", (1, 1), config(1, NEVER, probe_interval=0, max_norm=CLIP), 0),
        ("noiseopt, probing", (1, 2), config(1, NEVER, probe_interval=2, max_norm=CLIP), 1),
        ("noiseopt, probing", (1, 2, 1), config(1, NEVER, probe_interval=2, max_norm=CLIP), 0),
        ("noiseopt", (WINDOW, WINDOW), config(WINDOW, NEVER, max_norm=CLIP), 1),
        (
            "noiseopt, external",
            (WINDOW, WINDOW),
            config(WINDOW, NEVER, max_norm=CLIP, accumulation="external"),
            0,
        ),
    ]
    found = []
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again and again
    for arm, windows, noise, claim in cases:
        theirs = memory_used(size, device, None, windows)
        ours = memory_used(size, device, noise, windows)
        in_window, after, peak = (a - b for a, b in zip(ours, theirs, strict=True))
        exact = in_window == claim * gradient and (windows[-1] > 1 or after == 0)
        found.append(
            Memory(
                part="memory",
                arm=arm,
                window=", ".join(map(str, windows)),
                gradient=gradient,
                in_window=in_window,
                after_update=after,
                peak=peak,
                claim=claim,
                holds="yes" if exact else "no",
            )
        )
    gc.unfreeze()
    return found


# --- device waits -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Waits:
    """Whether a step in which no decision is due makes the host wait for the device."""

    part: str
    arm: str
    window: int
    result: str


def waits(size: Size, device: torch.device) -> list[Waits]:
    found = []
    for window in (1, WINDOW):
        noise = config(window, NEVER, max_norm=CLIP)
        result = "needs a GPU"
        if device.type == "cuda":
            result = first_wait(OurStep(size, 1, noise, device), 4 * window) or "none"
        found.append(Waits("waits", "noiseopt", window, result))
    return found


def first_wait(arm: OurStep, micro_batches: int) -> str | None:
    """What torch says of the first call of step() that waits, after as many to warm up."""
    for number in range(2 * micro_batches):
        arm.model(arm.data[0]).backward()
        torch.cuda.set_sync_debug_mode("error" if number >= micro_batches else "default")
        try:
            arm.optimizer.step()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        arm.optimizer.zero_grad()
    return None


# --- output -----------------------------------------------------------------------------------

Result = Timing | Memory | Waits


def shown(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        low, middle, high = value
        return f"{middle:.3f} [{low:.3f}-{high:.3f}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_results(results: Sequence[Result], left_out: Sequence[str]) -> None:
    """A table with a column for each field but those left out, which go without saying."""
    rows = [{k: shown(v) for k, v in asdict(result).items()} for result in results]
    names = [name for name in rows[0] if name not in left_out]
    columns = [[name, *(row[name] for row in rows)] for name in names]
    columns = [column for column in columns if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line.rstrip())
    print(flush=True)


def print_timings(timings: Sequence[Timing]) -> None:
    head = timings[0]
    batch = "" if head.micro_batch is None else f", micro-batch of {head.micro_batch}"
    print(
        f"{head.part}: {head.parameters / 1e6:.1f}M parameters, {head.kernel}, "
        f"window of {head.window}{batch}"
    )
    print_results(timings, ("part", "size", "parameters", "kernel", "window", "micro_batch"))


def origin_of(arguments: Sequence[str], device: torch.device) -> dict[str, str]:
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return recording.origin_of(Path(__file__).name, arguments) | {"device": name}


def run(
    sizes: Sequence[Size], peers: Sequence[str], rounds: int, device: torch.device
) -> list[Result]:
    """Measure everything, printing each table as it is known."""
    results: list[Result] = []
    deadline = time.perf_counter() + SECONDS
    for size in sizes:
        for comparisons in (
            update_comparisons(size, device) if size.updates else (),
            step_comparisons(size, device, peers),
        ):
            for comparison in comparisons:
                timings = comparison.run(rounds, deadline)
                print_timings(timings)
                results += timings
                gc.collect()
    for kind in (memory, waits):
        found = kind(SIZES["tiny"], device)
        print_results(found, ())
        results += found
    return results


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke test of half a minute")
    parser.add_argument("--rounds", type=int, help="at most so many in each comparison")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help=f"default: {' '.join(FULL)}")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=list(PEERS),
        metavar="PEER",
        help=f"those to measure too, of {', '.join(PEERS)}; default: all",
    )
    parser.add_argument("--output", type=Path, help="folder for overhead.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    device = torch.device(options.device)
    names = options.sizes or (("tiny",) if options.quick else FULL)
    rounds = options.rounds or (3 if options.quick else 200)
    origin = origin_of(arguments, device)  # before others can commit what is not measured here
    results = run([SIZES[name] for name in names], options.peers, rounds, device)
    folder = options.output or (None if options.quick else RESULTS)
    if folder is not None:
        recording.append(results, origin, folder / NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
