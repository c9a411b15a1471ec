"""Error of the gradient-noise estimate against samples seen: ours and the published formulas.

Every arm sees the same gradients and is held to the exact tr(Sigma), |G|^2 and noise scale. Rivals
are written here from their published formulas, each with its source and its known defect. An arm's
memory is "ours" where its formula is averaged with our half-life, and "published" where its own
constants are kept: at frozen weights a longer memory always wins, on moving weights it lags.

    python benchmarks/estimator.py            # prints, writes results/estimator.json and .png
    python benchmarks/estimator.py --quick    # a smoke test; writes only if --output is given

A record at `samples` pools 16 moments in the last half of the run so far, to steady the figures.
Errors of the scale are squared differences of logarithms over the runs with a usable (positive,
finite) value; the others are counted in `unusable`. `signal_ratio` and `scale_ratio` are an arm's
squared error over ours on the same runs, with a 95 % bootstrap interval over the seeds. `coverage`
is our interval's, of the exact scale at that moment; `coverage_average` is of the exact scale with
|G|^2 averaged over our memory, which leaves out the lag on moving weights.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script

from benchmarks import recording
from noiseopt.estimate import NoiseEstimator, WindowNorms

Array = NDArray[np.float64]
Stream = Iterator[tuple[torch.Tensor, torch.Tensor]]

BATCH = 64  # samples in a window, in every set-up
MICRO_BATCHES = 8  # the finest split that is drawn; K = 2 merges these by fours
COUNTS = (2, MICRO_BATCHES)
BLOCK = 10  # GPT-NeoX's n_batches
MOMENTS = 16  # at which each record is pooled
CONFIDENCE = 0.95
CLAIM = 2.0  # the squared error of two-norm estimators is to be at least this multiple of ours
SPECTRUM = torch.arange(1, 641, dtype=torch.float32) ** (-1 / 3)  # diag(Sigma); d_eff is 521
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Norms:
    """What every arm may see of a set of runs, and the truth; arrays are [windows, seeds].

    Attributes:
        count: K, the micro-batches in a window.
        small: the mean over the K micro-batches of |g_i|^2.
        first: |g_1|^2, which is all that one rank knows without communication.
        big: |g|^2 of the window's mean gradient.
        cross: <g_t, g_(t-1)> of successive windows' means; 0 in the first row.
        block: |mean of BLOCK successive windows' means|^2, [windows // BLOCK, seeds].
        signal: the exact |G|^2 at each window's weights.
        trace: the exact tr(Sigma), for one sample.
    """

    count: int
    small: Array
    first: Array
    big: Array
    cross: Array
    block: Array
    signal: Array
    trace: float

    @property
    def windows(self) -> int:
        return len(self.big)


@dataclass(frozen=True)
class Reading:
    """What an arm says at the moments asked for; arrays are [moments, seeds].

    Attributes:
        trace: its estimate of tr(Sigma); nan where it has none.
        signal: its estimate of |G|^2; nan where it has none.
        scale: its estimate of tr(Sigma)/|G|^2; nan where it has no usable value.
        altered: the share of windows whose value it changed before averaging.
        low: the lower end of its interval for the scale, if it gives one.
        high: the upper end.
    """

    trace: Array
    signal: Array
    scale: Array
    altered: float = 0.0
    low: Array | None = None
    high: Array | None = None


@dataclass(frozen=True)
class Arm:
    """An estimator under test: `memory` is "ours" or "published", see the module's docstring."""

    name: str
    memory: str
    read: Callable[[Norms, Array], Reading]


@dataclass(frozen=True)
class Record:
    """One arm in one set-up, K and number of samples seen; see the module's docstring."""

    setup: str
    arm: str
    memory: str
    r: float
    K: int
    samples: int
    rel_sq_error_signal: float | None
    sq_error_log_scale: float | None
    bias_signal: float | None
    bias_scale: float | None
    unusable: float
    altered: float
    coverage: float | None
    coverage_average: float | None
    unbounded: float | None
    signal_ratio: list[float] | None
    scale_ratio: list[float] | None
    seeds: int
    command: str
    commit: str
    versions: str


# --- the averages -----------------------------------------------------------------------------


@cache
def our_decays(windows: int) -> Array:
    """Our factor on the past at each window of a run, read off NoiseEstimator's sum of weights."""
    estimator, weights = NoiseEstimator(), [1.0]
    for _ in range(windows):
        estimator = estimator.update(WindowNorms((2.0,), (1.0,), BATCH / 2, BATCH, 2, BATCH))
        weights.append(estimator.average.weight)
    return (np.array(weights[1:]) - 1) / np.array(weights[:-1])


def average(values: Array, decays: Array) -> Array:
    """The debiased exponential average after each row."""
    total, weight, result = np.zeros(values.shape[1]), 0.0, np.empty_like(values)
    for row, (value, decay) in enumerate(zip(values, decays, strict=True)):
        total, weight = decay * total + value, decay * weight + 1
        result[row] = total / weight
    return result


def unbiased(norms: Norms, small: Array) -> tuple[Array, Array]:
    """tr(Sigma) and |G|^2 of each window: McCandlish et al., arXiv 1812.06162, App. A.1."""
    trace = BATCH * (small - norms.big) / (norms.count - 1)
    return trace, norms.big - trace / BATCH


def usable_ratio(trace: Array, signal: Array) -> Array:
    """trace / signal where both are positive, otherwise nan."""
    usable = (trace > 0) & (signal > 0)
    return np.divide(trace, signal, out=np.full_like(signal, np.nan), where=usable)


def averaged(trace: Array, signal: Array, decays: Array, rows: Array) -> Reading:
    """Average both streams with the same weights and divide last."""
    traces, signals = average(trace, decays)[rows], average(signal, decays)[rows]
    return Reading(traces, signals, usable_ratio(traces, signals))


# --- the arms ---------------------------------------------------------------------------------


def read_ours(norms: Norms, times: Array) -> Reading:
    """noiseopt.NoiseEstimator with its defaults, fed window by window."""
    shape = (len(times), norms.big.shape[1])
    found = {key: np.empty(shape) for key in ("trace", "signal", "low", "high")}
    row_of = {int(time): row for row, time in enumerate(times)}
    altered = 0
    for seed in range(shape[1]):
        estimator = NoiseEstimator()
        pairs = zip(norms.small[:, seed].tolist(), norms.big[:, seed].tolist(), strict=True)
        for time, (small, big) in enumerate(pairs, start=1):
            window = WindowNorms((small,), (big,), BATCH / norms.count, BATCH, norms.count, BATCH)
            estimator = estimator.update(window)
            row = row_of.get(time)
            estimate = estimator.estimate(BATCH, CONFIDENCE) if row is not None else None
            if estimate is not None:
                values = (estimate.trace, estimate.signal, *estimate.scale_interval)
                for key, value in zip(found, values, strict=True):
                    found[key][row, seed] = value
        altered += estimator.average.winsorised
    scale = usable_ratio(found["trace"], found["signal"])
    return Reading(scale=scale, altered=altered / norms.big.size, **found)


def read_two_batch(norms: Norms, times: Array) -> Reading:
    """McCandlish et al. 2018 App. A.1 with one small norm. Defect: the other K-1 unused."""
    return averaged(*unbiased(norms, norms.first), our_decays(norms.windows), times - 1)


def read_kungfu(norms: Norms, times: Array) -> Reading:
    """KungFu's NoiseScale op: one rank's small norm. Defect: 0.9 is the newest value's weight."""
    streams = []
    for values in unbiased(norms, norms.first):
        recent = values.copy()
        for row in range(1, len(recent)):
            recent[row] = 0.9 * values[row] + 0.1 * recent[row - 1]
        streams.append(recent[times - 1])
    return Reading(*streams, usable_ratio(*streams))


def read_neox(norms: Norms, times: Array) -> Reading:
    """GPT-NeoX GradientNoiseScale: B_big is n batches in a row. Defect: the weights move."""
    blocks = len(norms.block)
    decays = our_decays(blocks * BLOCK).reshape(blocks, BLOCK).prod(axis=1)
    return averaged(*_neox_streams(norms), decays, times // BLOCK - 1)


def read_neox_published(norms: Norms, times: Array) -> Reading:
    """The same with its EMA of 0.99. Defect: debiased by batches where it counts blocks of n."""
    rows, beta = times // BLOCK - 1, 0.99
    decays = np.full(len(norms.block), beta)
    debiased = averaged(*_neox_streams(norms), decays, rows)
    factor = ((1 - beta ** (rows + 1)) / (1 - beta ** (BLOCK * (rows + 1))))[:, None]
    return Reading(debiased.trace * factor, debiased.signal * factor, debiased.scale)


def _neox_streams(norms: Norms) -> tuple[Array, Array]:
    small = norms.big[BLOCK - 1 :: BLOCK][: len(norms.block)]
    trace = BATCH * (small - norms.block) / (1 - 1 / BLOCK)
    return trace, (BLOCK * norms.block - small) / (BLOCK - 1)


def _adascale(norms: Norms, decays: Array, times: Array) -> Reading:
    trace, signal = unbiased(norms, norms.small)
    micro_batch = BATCH / norms.count  # fairscale's unit of variance, to which its floor applies
    altered = float(((trace < 1e-6 * micro_batch) | (signal < 0)).mean())
    trace, signal = np.maximum(trace, 1e-6 * micro_batch), np.maximum(signal, 0.0)
    reading = averaged(trace, signal, decays, times - 1)
    return Reading(reading.trace, reading.signal, reading.scale, altered)


def read_adascale(norms: Norms, times: Array) -> Reading:
    """fairscale adascale.py (Johnson et al. 2020 B.3). Defect: floored before averaging."""
    return _adascale(norms, our_decays(norms.windows), times)


def read_adascale_published(norms: Norms, times: Array) -> Reading:
    """The same with its EMA of max(1 - S/1000, 0), S = K. Defect: floored before averaging."""
    return _adascale(norms, np.full(norms.windows, max(1 - norms.count / 1000, 0.0)), times)


def read_adaptdl(norms: Norms, times: Array) -> Reading:
    """AdaptDL gradient_noise_scale.py, EMA 0.999^S, S = K. Defect: memory shrinks as K grows."""
    decays = np.full(norms.windows, 0.999**norms.count)
    reading = averaged(*unbiased(norms, norms.small), decays, times - 1)
    return Reading(reading.trace, np.maximum(reading.signal, 0.0), reading.scale)


def read_differenced(norms: Norms, times: Array) -> Reading:
    """AdaptDL with K = 1: successive windows as a pair. Defect: the weights moved by that noise."""
    trace = 0.5 * BATCH * (norms.big[1:] + norms.big[:-1] - 2 * norms.cross[1:])
    reading = averaged(trace, norms.cross[1:], our_decays(norms.windows)[1:], times - 2)
    return Reading(reading.trace, np.maximum(reading.signal, 0.0), reading.scale)


def _crowson(norms: Norms, times: Array, beta: float) -> Reading:
    decays, floor = np.full(norms.windows, beta), 1e-8
    reading = averaged(*unbiased(norms, norms.small), decays, times - 1)
    floored = reading.signal * (1 - beta ** times[:, None]) <= floor
    return Reading(reading.trace, reading.signal, np.where(floored, np.nan, reading.scale))


def read_nanogns(norms: Norms, times: Array) -> Reading:
    """nanoGNS exact/ddpgns.py, EMA 0.995. Defect: a negative |G|^2 is printed as 1e-8."""
    return _crowson(norms, times, 0.995)


def read_k_diffusion(norms: Norms, times: Array) -> Reading:
    """k-diffusion gns.py (Crowson), EMA 0.9998. Defect: remembers 3,465 steps; the same floor."""
    return _crowson(norms, times, 0.9998)


def read_plug_in(norms: Norms, times: Array) -> Reading:
    """|g|^2 for |G|^2, arXiv 2602.03001 Alg. 1 in the 2-norm. Defect: too large by tr(Sigma)/B."""
    trace, _ = unbiased(norms, norms.small)
    return averaged(trace, norms.big, our_decays(norms.windows), times - 1)


def read_mean_of_ratios(norms: Norms, times: Array) -> Reading:
    """The average of each window's ratio. Defect: E[a/b] is not E[a]/E[b], and b changes sign."""
    trace, signal = unbiased(norms, norms.small)
    scale = average(trace / signal, our_decays(norms.windows))[times - 1]
    none = np.full_like(scale, np.nan)
    return Reading(none, none, np.where(scale > 0, scale, np.nan))


ARMS = (
    Arm("noiseopt", "ours", read_ours),
    Arm("two-batch, one small norm", "ours", read_two_batch),
    Arm("KungFu", "published", read_kungfu),
    Arm("GPT-NeoX, n = 10", "ours", read_neox),
    Arm("GPT-NeoX, n = 10", "published", read_neox_published),
    Arm("AdaScale", "ours", read_adascale),
    Arm("AdaScale", "published", read_adascale_published),
    Arm("AdaptDL", "published", read_adaptdl),
    Arm("AdaptDL, K = 1", "ours", read_differenced),
    Arm("nanoGNS, 0.995", "published", read_nanogns),
    Arm("k-diffusion, 0.9998", "published", read_k_diffusion),
    Arm("plug-in |g|^2", "ours", read_plug_in),
    Arm("mean of ratios", "ours", read_mean_of_ratios),
)
TWO_NORM = ("two-batch, one small norm", "KungFu", "GPT-NeoX, n = 10")  # whom the claim is about


# --- the set-ups ------------------------------------------------------------------------------


def quadratic(start: torch.Tensor, rate: float, generator: torch.Generator) -> Stream:
    """SGD on 1/2 sum h theta^2 with gradient noise of covariance diag(h): G = h theta.

    Args:
        start: the weights, [seeds, dimensions].
        rate: the learning rate; at 0 the weights are frozen.
        generator: the source of the noise.

    Yields:
        The micro-batch gradients [seeds, MICRO_BATCHES, dimensions] and the exact |G|^2 [seeds].
    """
    weights = start
    deviation = (SPECTRUM * MICRO_BATCHES / BATCH).sqrt()
    noise = torch.empty(len(start), MICRO_BATCHES, start.shape[1])
    while True:
        gradient = SPECTRUM * weights
        noisy = noise.normal_(generator=generator).mul_(deviation).add_(gradient[:, None])
        yield noisy, gradient.square().sum(-1)
        if rate:
            weights = weights - rate * noisy.mean(1)


def weights_at(ratio: float, seeds: int) -> torch.Tensor:
    """Weights where G is proportional to Sigma's square root and tr(Sigma)/(B |G|^2) = ratio."""
    return SPECTRUM.rsqrt().mul((BATCH * ratio) ** -0.5).expand(seeds, -1)


def stationary_weights(seeds: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Draws from SGD's stationary distribution, Var = rate / (B (2 - rate h)) for Sigma = h."""
    deviation = (rate / (BATCH * (2 - rate * SPECTRUM))).sqrt()
    return deviation * torch.randn(seeds, len(SPECTRUM), generator=generator)


def resampled(gradients: torch.Tensor, seeds: int, generator: torch.Generator) -> Stream:
    """Micro-batches drawn with replacement from a population of per-sample gradients."""
    signal = gradients.double().mean(0).square().sum().expand(seeds)
    shape = (seeds * MICRO_BATCHES, BATCH // MICRO_BATCHES)
    while True:
        chosen = torch.randint(len(gradients), shape, generator=generator)
        means = torch.nn.functional.embedding_bag(chosen, gradients, mode="mean")
        yield means.view(seeds, MICRO_BATCHES, -1), signal


def observe(stream: Stream, windows: int, trace: float) -> dict[int, Norms]:
    """Take the norms of `windows` windows, with K = 2 and K = 8 from the same gradients."""
    rows: dict[Any, list[torch.Tensor]] = {}
    previous = block = torch.zeros(())
    for window in range(windows):
        gradients, signal = next(stream)
        pair = gradients.unflatten(1, (2, -1)).mean(2)
        mean = pair.mean(1)
        for count, parts in ((2, pair), (MICRO_BATCHES, gradients)):
            norms = torch.linalg.vecdot(parts, parts).double()
            rows.setdefault(("small", count), []).append(norms.mean(1))
            rows.setdefault(("first", count), []).append(norms[:, 0])
        block = block + mean / BLOCK
        rows.setdefault("big", []).append(torch.linalg.vecdot(mean, mean))
        rows.setdefault("cross", []).append((mean * previous).sum(-1))
        rows.setdefault("signal", []).append(signal)
        if window % BLOCK == BLOCK - 1:
            rows.setdefault("block", []).append(torch.linalg.vecdot(block, block))
            block = torch.zeros(())
        previous = mean
    stacked = {key: torch.stack(values).double().numpy() for key, values in rows.items()}
    shared = {key: stacked[key] for key in ("big", "cross", "block", "signal")}
    return {
        count: Norms(count, stacked["small", count], stacked["first", count], **shared, trace=trace)
        for count in COUNTS
    }


# --- a small language model on the bytes of Python's own library ------------------------------

WIDTH, CONTEXT = 24, 32
MODULES = ("argparse", "ast", "difflib", "doctest", "inspect", "pickle", "tarfile", "typing")


def library_bytes() -> torch.Tensor:
    """The source text of some modules of the standard library, as byte values."""
    folder = Path(os.__file__).parent
    text = b"".join((folder / f"{name}.py").read_bytes() for name in MODULES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def sequences(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random stretches of CONTEXT + 1 bytes; one of them is one sample."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def initial_parameters(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A transformer of one layer and one head."""
    shapes = {
        "embedding": (256, WIDTH),
        "position": (CONTEXT, WIDTH),
        "attention": (WIDTH, 3 * WIDTH),
        "projection": (WIDTH, WIDTH),
        "inner": (WIDTH, 4 * WIDTH),
        "outer": (4 * WIDTH, WIDTH),
        "head": (WIDTH, 256),
    }
    return {
        name: torch.randn(shape, generator=generator) * (shape[0] if shape[0] < 256 else 1) ** -0.5
        for name, shape in shapes.items()
    }


def sequence_loss(parameters: dict[str, torch.Tensor], sequence: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of predicting each byte of one sequence from those before it."""
    p, normal = parameters, torch.nn.functional.layer_norm
    x = p["embedding"][sequence[:-1]] + p["position"]
    query, key, value = (normal(x, (WIDTH,)) @ p["attention"]).chunk(3, dim=-1)
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    x = x + (query @ key.T * WIDTH**-0.5 + mask).softmax(-1) @ value @ p["projection"]
    x = x + torch.relu(normal(x, (WIDTH,)) @ p["inner"]) @ p["outer"]
    return torch.nn.functional.cross_entropy(normal(x, (WIDTH,)) @ p["head"], sequence[1:])


def trained_parameters(
    text: torch.Tensor, steps: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The checkpoint: `steps` of Adam at a batch of 32 sequences."""
    parameters = {k: v.requires_grad_() for k, v in initial_parameters(generator).items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=3e-3)
    losses = torch.func.vmap(sequence_loss, in_dims=(None, 0))
    for _ in range(steps):
        optimizer.zero_grad()
        losses(parameters, sequences(text, 32, generator)).mean().backward()
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


def per_sample_gradients(
    parameters: dict[str, torch.Tensor], samples: torch.Tensor
) -> torch.Tensor:
    """Every sample's gradient, flattened: [samples, parameters]."""
    gradient = torch.func.vmap(torch.func.grad(sequence_loss), in_dims=(None, 0), chunk_size=128)
    return torch.cat([part.flatten(1) for part in gradient(parameters, samples).values()], dim=1)


def compact(gradients: torch.Tensor) -> torch.Tensor:
    """The same vectors in coordinates of their own span; every norm and product is kept."""
    return torch.linalg.qr(gradients.T, mode="r").R.T.contiguous()


def population(size: int, steps: int) -> tuple[torch.Tensor, float]:
    """`size` per-sample gradients at a trained checkpoint, and their exact tr(Sigma)."""
    generator, text = torch.Generator().manual_seed(40), library_bytes()
    parameters = trained_parameters(text, steps, generator)
    gradients = compact(per_sample_gradients(parameters, sequences(text, size, generator)))
    exact = gradients.double()
    return gradients, float((exact - exact.mean(0)).square().sum(1).mean())


# --- scores -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How large the benchmark is.

    Attributes:
        seeds: runs of each frozen Gaussian set-up.
        other_seeds: runs of each other set-up.
        checkpoints: the windows after which records are made; the last is the run's length.
        population: per-sample gradients of the language model.
        training: steps before the language model's checkpoint.
    """

    seeds: int = 200
    other_seeds: int = 64
    checkpoints: tuple[int, ...] = (32, 128, 512, 2048)
    population: int = 1024
    training: int = 300


QUICK = Plan(seeds=16, other_seeds=8, checkpoints=(32, 128), population=96, training=20)
Setup = tuple[str, Callable[[], tuple[Stream, float]]]


def setups(plan: Plan) -> list[Setup]:
    """Name and source of each set-up; the sources are made only when they are needed."""
    total = float(SPECTRUM.sum())

    def seeded(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    def frozen(ratio: float, number: int) -> Callable[[], tuple[Stream, float]]:
        start = weights_at(ratio, plan.seeds)
        return lambda: (quadratic(start, 0.0, seeded(number)), total)

    def stationary() -> tuple[Stream, float]:
        generator = seeded(20)
        start = stationary_weights(plan.other_seeds, 1.0, generator)
        return quadratic(start, 1.0, generator), total

    def descent() -> tuple[Stream, float]:  # r rises from 0.3 to 8
        return quadratic(weights_at(0.3, plan.other_seeds), 0.005, seeded(30)), total

    def language_model() -> tuple[Stream, float]:
        gradients, trace = population(plan.population, plan.training)
        return resampled(gradients, plan.other_seeds, seeded(41)), trace

    return [
        *((f"frozen, r = {r:g}", frozen(r, 10 + i)) for i, r in enumerate((0.3, 3.0, 30.0))),
        ("SGD, stationary", stationary),
        ("SGD, descending", descent),
        ("language model", language_model),
    ]


def moments(checkpoint: int) -> Array:
    """The windows at which a checkpoint's record is pooled: the last half of the run so far."""
    return np.linspace(checkpoint / 2, checkpoint, MOMENTS + 1)[1:].astype(int)


def error_ratio(theirs: Array, ours: Array) -> list[float] | None:
    """A squared error over ours, with its bootstrap interval over seeds; nan is left out."""
    both = np.isfinite(theirs) & np.isfinite(ours)
    if not both.any():
        return None
    upper, lower = (np.where(both, errors, 0.0).sum(axis=0) for errors in (theirs, ours))
    draws = np.random.default_rng(0).integers(len(upper), size=(1000, len(upper)))
    ratios = upper[draws].sum(axis=1) / np.maximum(lower[draws].sum(axis=1), 1e-300)
    ratio = upper.sum() / lower.sum()
    return [round(float(x), 3) for x in (ratio, *np.quantile(ratios, (0.025, 0.975)))]


def mean_or_none(values: Array) -> float | None:
    """The mean of what is finite, if anything is."""
    kept = values[np.isfinite(values)]
    return float(f"{kept.mean():.4g}") if kept.size else None


def errors(reading: Reading, norms: Norms, times: Array) -> tuple[Array, Array]:
    """The relative error of |G|^2 and the error of the scale's logarithm, with their signs."""
    signal = norms.signal[times - 1]
    return reading.signal / signal - 1, np.log(reading.scale * signal / norms.trace)


def score(reading: Reading, norms: Norms, times: Array) -> dict[str, Any]:
    """The fields of a record that depend on one arm alone."""
    of_signal, of_scale = errors(reading, norms, times)
    intervals: dict[str, float | None]
    intervals = dict.fromkeys(("coverage", "coverage_average", "unbounded"))
    if reading.low is not None and reading.high is not None:
        remembered = average(norms.signal, our_decays(norms.windows))
        for name, signal in (("coverage", norms.signal), ("coverage_average", remembered)):
            exact = norms.trace / signal[times - 1]
            intervals[name] = float(((reading.low <= exact) & (exact <= reading.high)).mean())
        intervals["unbounded"] = float(np.isinf(reading.high).mean())
    return {
        "rel_sq_error_signal": mean_or_none(of_signal**2),
        "sq_error_log_scale": mean_or_none(of_scale**2),
        "bias_signal": mean_or_none(of_signal),
        "bias_scale": mean_or_none(of_scale),
        "unusable": round(float(np.isnan(reading.scale).mean()), 4),
        "altered": round(reading.altered, 6),
        **{name: None if x is None else round(x, 4) for name, x in intervals.items()},
    }


def part(reading: Reading, rows: slice) -> Reading:
    """The reading at some of its moments."""
    ends = (None if end is None else end[rows] for end in (reading.low, reading.high))
    return Reading(
        reading.trace[rows], reading.signal[rows], reading.scale[rows], reading.altered, *ends
    )


def records_of(setup: str, norms: Norms, plan: Plan, origin: dict[str, Any]) -> list[Record]:
    """Run every arm on one set of norms."""
    times = np.concatenate([moments(checkpoint) for checkpoint in plan.checkpoints])
    readings = [arm.read(norms, times) for arm in ARMS]
    records = []
    for index, checkpoint in enumerate(plan.checkpoints):
        rows = slice(index * MOMENTS, (index + 1) * MOMENTS)
        now = times[rows]
        ours = [error**2 for error in errors(part(readings[0], rows), norms, now)]
        for arm, reading in zip(ARMS, readings, strict=True):
            theirs = [error**2 for error in errors(part(reading, rows), norms, now)]
            record = Record(
                setup=setup,
                arm=arm.name,
                memory=arm.memory,
                r=float(f"{norms.trace / BATCH / norms.signal[now - 1].mean():.4g}"),
                K=norms.count,
                samples=checkpoint * BATCH,
                signal_ratio=error_ratio(theirs[0], ours[0]),
                scale_ratio=error_ratio(theirs[1], ours[1]),
                seeds=norms.big.shape[1],
                **score(part(reading, rows), norms, now),
                **origin,
            )
            records.append(record)
    return records


def run(plan: Plan, origin: dict[str, Any]) -> Iterator[list[Record]]:
    """The records of each set-up and K in turn."""
    for setup, source in setups(plan):
        stream, trace = source()
        for norms in observe(stream, plan.checkpoints[-1], trace).values():
            yield records_of(setup, norms, plan, origin)


# --- output -----------------------------------------------------------------------------------


def verdict(ratio: Sequence[float] | None) -> str:
    """Whether a squared error is at least CLAIM times ours, as far as the seeds can tell."""
    if ratio is None:
        return "no value"
    if ratio[1] >= CLAIM:
        return "yes"
    return "no" if ratio[2] < CLAIM else f"within {CLAIM:g} +- error"


def shown(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def shown_ratio(ratio: Sequence[float] | None) -> str:
    return "-" if ratio is None else "{:.3g} [{:.3g}, {:.3g}]".format(*ratio)


def print_records(records: list[Record]) -> None:
    """One set-up and K at its last checkpoint."""
    from rich.console import Console
    from rich.table import Table

    last = [record for record in records if record.samples == records[-1].samples]
    head = last[0]
    table = Table(
        title=f"{head.setup}: K = {head.K}, r = {head.r:.3g}, {head.samples:,} samples, "
        f"{head.seeds} seeds; interval covers {shown(head.coverage, '.1%')} "
        f"(the average over its memory {shown(head.coverage_average, '.1%')}), "
        f"unbounded {shown(head.unbounded, '.1%')}",
        title_justify="left",
    )
    columns = ("|G|^2: sq. error", "/ ours", "bias", "log scale: sq. error", "/ ours", "bias")
    for column in ("arm", "memory", *columns, "unusable", "altered"):
        table.add_column(column, justify="left" if column in ("arm", "memory") else "right")
    for record in last:
        table.add_row(
            record.arm,
            record.memory,
            shown(record.rel_sq_error_signal),
            shown_ratio(record.signal_ratio),
            shown(record.bias_signal, "+.3f"),
            shown(record.sq_error_log_scale),
            shown_ratio(record.scale_ratio),
            shown(record.bias_scale, "+.3f"),
            shown(record.unusable, ".1%"),
            shown(record.altered, ".1%"),
        )
    Console(width=170).print(table)


def print_claim(records: list[Record]) -> None:
    """Is our squared error at most half that of the two-norm estimators, cell by cell?"""
    from rich.console import Console
    from rich.table import Table

    title = f"Is the two-norm estimators' squared error at least {CLAIM:g} times ours?"
    table = Table(title=title, title_justify="left")
    for column in ("set-up", "r", "K", "arm", "memory", "|G|^2", "", "log scale", ""):
        table.add_column(column)
    end = max(record.samples for record in records)
    for record in records:
        if record.arm in TWO_NORM and record.samples == end:
            cells = [record.setup, f"{record.r:.3g}", str(record.K), record.arm, record.memory]
            for ratio in (record.signal_ratio, record.scale_ratio):
                cells += [shown_ratio(ratio), verdict(ratio)]
            table.add_row(*cells)
    Console(width=170).print(table)


STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("noiseopt", "ours"): {"color": "black", "linewidth": 2.6, "zorder": 9},
    ("two-batch, one small norm", "ours"): {"color": "C0"},
    ("KungFu", "published"): {"color": "C0", "linestyle": "--"},
    ("GPT-NeoX, n = 10", "ours"): {"color": "C1"},
    ("AdaScale", "ours"): {"color": "C2"},
    ("AdaptDL", "published"): {"color": "C3", "linestyle": "--"},
    ("AdaptDL, K = 1", "ours"): {"color": "C3"},
    ("k-diffusion, 0.9998", "published"): {"color": "C4", "linestyle": "--"},
    ("plug-in |g|^2", "ours"): {"color": "C5"},
    ("mean of ratios", "ours"): {"color": "C7"},
}


def described(arm: tuple[str, str]) -> str:
    name, memory = arm
    return name if name == "noiseopt" else f"{name} ({memory.replace('ours', 'our')} memory)"


def curve(
    records: list[Record], setup: str, arm: tuple[str, str], field: str
) -> list[tuple[int, float]]:
    """An arm's values of a field against samples, in one set-up at the larger K."""
    kept = [r for r in records if (r.setup, r.K, r.arm, r.memory) == (setup, COUNTS[-1], *arm)]
    return [(r.samples, getattr(r, field)) for r in kept if getattr(r, field) is not None]


def draw(records: list[Record], path: Path) -> None:
    """Squared error against samples seen at K = 8, a column for each set-up."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(record.setup for record in records))
    fields = {
        "rel_sq_error_signal": "squared relative error of $|G|^2$",
        "sq_error_log_scale": "squared error of log noise scale",
    }
    figure = Figure(figsize=(2.7 * len(names), 7), layout="constrained")
    axes = figure.subplots(len(fields), len(names), sharex=True, sharey="row", squeeze=False)
    for row, (field, label) in enumerate(fields.items()):
        axes[row, 0].set_ylabel(label)
        for axis, name in zip(axes[row], names, strict=True):
            axis.set(xscale="log", yscale="log", title=name if row == 0 else "")
            axis.set_xlabel("samples seen" if row else "")
            axis.grid(alpha=0.25)
            for arm, style in STYLES.items():
                points = curve(records, name, arm, field)
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", ms=3, **style)
    lines = [Line2D([], [], **style) for style in STYLES.values()]
    figure.legend(lines, map(described, STYLES), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write(records: list[Record], folder: Path) -> None:
    """Write the records, one to a line, and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(record), allow_nan=False) for record in records)
    (folder / "estimator.json").write_text(f"[\n{lines}\n]\n")
    draw(records, folder / "estimator.png")


def origin_of(arguments: Sequence[str]) -> dict[str, str]:
    versions = f"numpy {np.__version__}"
    return recording.origin_of(Path(__file__).name, arguments, ("noiseopt/estimate",), versions)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test of half a minute")
    parser.add_argument("--output", type=Path, help="folder for estimator.json and estimator.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = QUICK if options.quick else Plan()
    folder = options.output or (None if options.quick else RESULTS)
    records: list[Record] = []
    for found in run(plan, origin_of(arguments)):
        print_records(found)
        records += found
    print_claim(records)
    if folder is not None:
        write(records, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
