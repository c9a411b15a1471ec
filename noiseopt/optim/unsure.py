"""Updates of which only the device knows whether its kernel made or skipped them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noiseopt.control import Rates
from noiseopt.optim.hyper import MOMENTS, UPDATES, Group, scaled_betas

Numbers = Sequence[dict[str, Any]]


class UnsureUpdates:
    """What updates added to their groups' numbers, until it is known which were made.

    Args:
        least_beta2: the least beta2 that scaling may lead to.
    """

    def __init__(self, least_beta2: float) -> None:
        self._least_beta2 = least_beta2
        self._before: list[dict[str, Any]] = []
        self._updates: list[tuple[Tensor | bool, Rates, list[Any]]] = []

    def __len__(self) -> int:
        """How many updates there are."""
        return len(self._updates)

    def add(
        self, skipped: Tensor | bool, numbers: Numbers, groups: Sequence[Group], rates: Rates
    ) -> None:
        """Count one more. Nothing waits for it.

        Args:
            skipped: whether the kernel skipped it, 0-d; False if it is known not to have.
            numbers: of each group, as they were before it.
            groups: with the user's own betas.
            rates: the factors that it applied.
        """
        if not self._updates:
            self._before = [{key: each[key] for key in MOMENTS if key in each} for each in numbers]
        self._updates.append((skipped, rates, [group.get("betas") for group in groups]))

    def settle(self, numbers: Numbers) -> None:
        """Take back, in place, what skipped updates added. This waits for the device.

        Args:
            numbers: of each group, as they are.
        """
        updates, self._updates = self._updates, []
        unsure = [skipped for skipped, *_ in updates if isinstance(skipped, Tensor)]
        read = iter(torch.stack(unsure).tolist() if unsure else ())
        skipped = [isinstance(each, Tensor) and next(read) for each, *_ in updates]
        if not any(skipped):
            return
        made = [update for update, was in zip(updates, skipped, strict=True) if not was]
        for index, (each, before) in enumerate(zip(numbers, self._before, strict=True)):
            if UPDATES in before:
                for _, rates, betas in made:
                    scaled_betas(betas[index], before, rates, self._least_beta2)
                each.update(before)

    def forget(self) -> None:
        """Leave the numbers as they are, as where others were loaded."""
        self._updates = []
