"""An autoencoder of photographs: patches of 8 x 8 pixels squeezed through 16 numbers.

scikit-learn brings two photographs. Stripes of 40 columns are dealt to the splits, every fourth one
of each held out; training patches are drawn at random from inside the others.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.convergence.workloads.base import SPLITS, Batch, Data, Workload

SIZE = 8
STRIPE = 40
FEATURES = 3 * SIZE * SIZE
WIDTHS = (FEATURES, 160, 96, 16, 96, 160, FEATURES)
MICRO_BATCH = 8
STEPS = 4096
EVERY = 4  # a held-out stripe in so many
STEP = 5  # pixels between two held-out patches


class Autoencoder(nn.Module):
    """A perceptron that reproduces its input."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(WIDTHS):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, patches: Tensor) -> Tensor:
        """The mean squared error, where the patches' variance is 1."""
        error: Tensor = self.layers(patches) - patches
        return error.square().mean()


@cache
def stripes() -> dict[tuple[str, bool], Tensor]:
    """The stripes of each split, to train on and held out, (number, 3, 427, 40).

    The first half of a photograph's stripes would be its left half: neighbours go to the splits in
    turn, and held-out stripes touch stripes but share no pixel with them.
    """
    from sklearn.datasets import load_sample_images

    parts: dict[tuple[str, bool], list[Tensor]] = {
        (split, held_out): [] for split in SPLITS for held_out in (False, True)
    }
    for photograph in load_sample_images().images:
        pixels = torch.tensor(photograph).permute(2, 0, 1).float()
        pixels = (pixels - pixels.mean()) / pixels.std()
        for number, stripe in enumerate(pixels.split(STRIPE, dim=2)):
            held_out = number // len(SPLITS) % EVERY == EVERY - 1
            parts[SPLITS[number % len(SPLITS)], held_out].append(stripe)
    return {part: torch.stack(found) for part, found in parts.items()}


def patches(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Patches of stripes, (number, features); `chosen` has their stripes, rows and columns."""
    stripe, row, column = chosen.unbind(1)
    inside = torch.arange(SIZE)
    rows = (row[:, None] + inside)[:, :, None]
    columns = (column[:, None] + inside)[:, None, :]
    return pixels[stripe[:, None, None], :, rows, columns].flatten(1)


def load(split: str) -> Data:
    """Random patches to train on, and a fixed grid of held-out ones."""
    train, held_out = stripes()[split, False], stripes()[split, True]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        ends = torch.tensor([len(train), train.shape[2] - SIZE + 1, STRIPE - SIZE + 1])
        for _ in range(STEPS):
            drawn = torch.rand(MICRO_BATCH, 3, generator=generator)
            yield (patches(train, (drawn * ends).long()),)

    starts = [torch.arange(0, end - SIZE + 1, STEP) for end in held_out.shape[2:]]
    grid = torch.cartesian_prod(torch.arange(len(held_out)), *starts)
    return Data(batches, [(part,) for part in patches(held_out, grid).split(512)])


PHOTOGRAPHS = Workload(
    name="autoencoder",
    build=Autoencoder,
    load=load,
    micro_batches=STEPS,
    micro_batch=MICRO_BATCH,
    lr=1e-3,
    settings={"widths": list(WIDTHS), "stripe": STRIPE},
)
