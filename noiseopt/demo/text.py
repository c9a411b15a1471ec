"""The demo's text: the source of Python's own standard library, as bytes.

Every computer that runs the demo has it, it is free, and it is real. Whole files are held out for
validation, chosen by a hash of their names, so that adding or losing a file moves no other one.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BUDGET = 16_000_000  # bytes that are read at most, about a quarter more than there are
LEAST = 100_000  # bytes of either part, below which this is not the library that was expected
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 16  # one file of so many


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes from other files to validate on, both of shape (length,)."""

    train: Tensor
    validation: Tensor


def load(folder: Path | None = None, budget: int = BUDGET) -> Corpus:
    """Read the corpus from the standard library, or from the Python files of a folder.

    Raises:
        FileNotFoundError: the folder holds too little Python source.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
    for name in _names(root):
        held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
        content = (root / name).read_bytes()
        parts[held_out] += content[: max(budget - sum(map(len, parts.values())), 0)]
    if min(map(len, parts.values())) < LEAST:
        raise FileNotFoundError(
            f"{root} holds too little Python source to train on: the demo needs Python's standard "
            "library as files"
        )
    train, validation = (torch.frombuffer(parts[held], dtype=torch.uint8) for held in (False, True))
    return Corpus(train, validation)


def _names(root: Path) -> list[str]:
    names = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in NOT_THE_LIBRARY]  # not walked into
        here = Path(folder).relative_to(root)
        names += [(here / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def micro_batches(
    data: Tensor, number: int, batch_size: int, context: int, seed: int
) -> Iterator[Tensor]:
    """Yield micro-batches of independent random excerpts, (batch_size, context + 1) each.

    The same seed gives the same ones in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        starts = torch.randint(len(data) - context, (batch_size,), generator=generator)
        yield _excerpts(data, starts, context)


def fixed_excerpts(data: Tensor, number: int, context: int) -> Tensor:
    """Return evenly spaced excerpts, (number, context + 1)."""
    starts = torch.linspace(0, len(data) - context - 1, number).long()
    return _excerpts(data, starts, context)


def _excerpts(data: Tensor, starts: Tensor, context: int) -> Tensor:
    return data[starts[:, None] + torch.arange(context + 1)].long()
