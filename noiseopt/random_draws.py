"""Whether random numbers were drawn in a window, and which: ranks that draw the same show it."""

import math
import zlib

import torch

from noiseopt.distributed import DIGESTS

# After a run's first windows the random state, which takes a while to read, is looked at in two of
# so many. Their distances have no common divisor: what draws once in some windows, as a data loader
# does in each epoch, is not met in three of them in a row.
SEEN_IN, CYCLE = (7, 15), 15


class RandomDraws:
    """What this rank has drawn.

    Args:
        windows_at_first: of a run's windows so many are all looked at.
    """

    def __init__(self, windows_at_first: int) -> None:
        self._at_first = windows_at_first
        self._state: int | None = None

    def digest(self, windows: int, device: torch.device) -> float:
        """A digest of the random state, if some number was drawn since the last window; else 0.

        Args:
            windows: those that there were before; where this one is not looked at, it is nan.
            device: whose random numbers.
        """
        place = windows % CYCLE or CYCLE
        looks = windows < self._at_first or place in SEEN_IN
        if not looks and place + 1 not in SEEN_IN:
            return math.nan
        now = _random_state(device)
        drawn, self._state = now if self._state not in (None, now) else 0, now
        return drawn if looks else math.nan


def _random_state(device: torch.device) -> int:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return zlib.crc32(state.numpy().tobytes()) % DIGESTS
