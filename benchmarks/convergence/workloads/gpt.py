"""A byte-level GPT on the source of Python's standard library, in less than one epoch.

In `gpt-shift` the schedule begins anew in the middle and the text changes, as where a model is
trained further on something else: from source to the bytecode that Python makes of it.

Files are dealt by a hash of their names: one in sixteen is held out for tuning, one for reporting,
and the others are halved, so that what a rate was tuned on is not what it is reported on.
"""

import hashlib
import marshal
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.convergence.workloads.base import SPLITS, Batch, Data, Workload
from noiseopt.demo.gpt import GPT, Shape
from noiseopt.demo.text import NOT_THE_LIBRARY, fixed_excerpts, micro_batches

HELD_OUT = 512  # excerpts
PARTS = 16
MARSHAL = 2  # the last version whose bytes do not depend on how often an object is used


def part_of(name: str) -> tuple[str, bool]:
    """The split of a file, and whether it is held out there."""
    number = hashlib.sha256(name.encode()).digest()[0] % PARTS
    return SPLITS[number % 2], number < len(SPLITS)


def bytecode(source: bytes) -> bytes:
    """What Python makes of a file."""
    return marshal.dumps(compile(source, "", "exec"), MARSHAL)


@cache
def texts(text_of: Callable[[bytes], bytes] = bytes) -> dict[tuple[str, bool], Tensor]:
    """Of each split what is trained on and what is held out: every file's text, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    parts = {(split, held_out): bytearray() for split in SPLITS for held_out in (False, True)}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_THE_LIBRARY & set(name.parts):
            parts[part_of(name.as_posix())] += text_of(path.read_bytes())
    return {part: torch.frombuffer(content, dtype=torch.uint8) for part, content in parts.items()}


def load(split: str, steps: int, batch_size: int, context: int) -> Data:
    """Random excerpts to train on, and evenly spaced ones of other files to validate on."""
    train, held_out = texts()[split, False], texts()[split, True]

    def batches(seed: int) -> Iterator[Batch]:
        for tokens in micro_batches(train, steps, batch_size, context, seed):
            yield (tokens,)

    parts = fixed_excerpts(held_out, HELD_OUT, context).split(64)
    return Data(batches, [(part,) for part in parts])


def load_shifting(split: str, steps: int, batch_size: int, context: int) -> Data:
    """Source in the first half of the run, bytecode in the second, which is validated on."""
    source, code = texts(), texts(bytecode)

    def batches(seed: int) -> Iterator[Batch]:
        for part in (source, code):
            train = part[split, False]
            for tokens in micro_batches(train, steps // 2, batch_size, context, seed):
                yield (tokens,)

    parts = fixed_excerpts(code[split, True], HELD_OUT, context).split(64)
    return Data(batches, [(part,) for part in parts])


def workload(name: str, shape: Shape, steps: int, batch_size: int, lr: float) -> Workload:
    """A size of this workload."""
    return Workload(
        name=name,
        build=partial(GPT, shape),
        load=partial(load, steps=steps, batch_size=batch_size, context=shape.context),
        micro_batches=steps,
        micro_batch=batch_size,
        lr=lr,
        settings=asdict(shape) | {"held_out": HELD_OUT},
    )


# 0.44M parameters on 1.05M bytes, and on four times as many
SMALL_SHAPE = Shape(layers=2, width=128, heads=4, context=64)
SMALL = workload("gpt", SMALL_SHAPE, 2048, 8, lr=2e-3)
LONG = replace(workload("gpt-long", SMALL_SHAPE, 8192, 8, lr=2e-3), beta1=0.8, tuned_on=SMALL.name)
SHIFT = replace(
    workload("gpt-shift", SMALL_SHAPE, 4096, 8, lr=2e-3),
    load=partial(load_shifting, steps=4096, batch_size=8, context=SMALL_SHAPE.context),
    cycles=2,
    tuned_on=SMALL.name,
)
# 11M parameters on 25M bytes, four epochs of a split: minutes on an accelerator
LARGE = workload("gpt-large", Shape(layers=6, width=384, heads=6, context=256), 6144, 16, lr=1e-3)
