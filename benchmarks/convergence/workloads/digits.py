"""An MLP-mixer on scikit-learn's handwritten digits, for many epochs.

Pixels are noisy, with new noise in every epoch and fixed noise in the held-out images: without it
the task is learned to a loss so small that its spread over seeds hides every difference.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.convergence.workloads.base import Batch, Data, Workload

TRAIN = 1280
HELD_OUT = {"tuning": slice(TRAIN, 1540), "reporting": slice(1540, None)}
COPIES = 8  # of each held-out image, each with noise of its own
NOISE = 0.4  # its deviation; the pixels lie between 0 and 1
EPOCHS = 12
MICRO_BATCH = 8
PATCHES, PIXELS = 16, 4
WIDTH, LAYERS = 48, 3


class MixerBlock(nn.Module):
    """Mixes the patches, then the features of each, both with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patches = nn.Sequential(
            nn.Linear(PATCHES, 2 * PATCHES), nn.GELU(), nn.Linear(2 * PATCHES, PATCHES)
        )
        self.features = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of each patch, (batch, patches, width), in and out."""
        x = x + self.patches(self.norm1(x).mT).mT
        mixed: Tensor = x + self.features(self.norm2(x))
        return mixed


class Mixer(nn.Module):
    """Classifies images of 8 x 8, given as 16 patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, WIDTH))
        self.blocks = nn.Sequential(*(MixerBlock() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy in nats."""
        x = self.blocks(self.embed(images) + self.positions)
        return F.cross_entropy(self.head(self.norm(x).mean(1)), labels)


@cache
def images() -> Batch:
    """All images as patches, (1797, 16, 4) between 0 and 1, and labels, in one fixed random order.

    scikit-learn's own order has runs of the same writer.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(found.images).float()[order] / 16
    patches = pixels.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, PATCHES, PIXELS)
    return patches, torch.from_numpy(found.target)[order]


def load(split: str) -> Data:
    """The same training images in both splits, and other held-out ones."""
    patches, labels = images()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(TRAIN, generator=generator).split(MICRO_BATCH):
                noise = torch.randn(len(chosen), PATCHES, PIXELS, generator=generator)
                yield patches[chosen] + NOISE * noise, labels[chosen]

    held, held_labels = patches[HELD_OUT[split]], labels[HELD_OUT[split]]
    generator = torch.Generator().manual_seed(0)
    noisy: list[Batch] = [
        (held + NOISE * torch.randn(held.shape, generator=generator), held_labels)
        for _ in range(COPIES)
    ]
    return Data(batches, noisy)


DIGITS = Workload(
    name="digits",
    build=Mixer,
    load=load,
    micro_batches=EPOCHS * TRAIN // MICRO_BATCH,
    micro_batch=MICRO_BATCH,
    lr=2e-3,
    settings={"noise": NOISE, "width": WIDTH, "layers": LAYERS, "copies": COPIES},
)
