"""How a noise-aware optimizer is saved, loaded, copied, extended and shown.

Its state is plain numbers under "noise" in every parameter group, where torch, weights_only loading
and torch.distributed.checkpoint all keep them, and a plain optimizer passes them over.
"""

import copy
import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from noiseopt.adaptation import Adaptation
from noiseopt.control import NoiseConfig, group_names
from noiseopt.optim.checks import check_group, check_state
from noiseopt.optim.collector import GradientCollector
from noiseopt.optim.hyper import UPDATES, start_numbers
from noiseopt.optim.kernels import keep_fused, prefer_fused_in
from noiseopt.optim.unsure import UnsureUpdates
from noiseopt.parallel import ranks_of
from noiseopt.readings import NoiseReadings
from noiseopt.words import describe


class SavesNoise(NoiseReadings, Optimizer):
    """The part of `NoiseAware` that outlives a process. Not to be used alone."""

    config: NoiseConfig
    _process_group: dist.ProcessGroup | None
    _collector: GradientCollector
    _unsure: UnsureUpdates
    _logged = False
    _chose_fused = False
    _warned_of_open_window = False

    def _begin(self) -> None:
        raise TypeError("build a noise-aware optimizer through NoiseAware")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its gradients are measured from the next micro-batch on."""
        if self._adaptation:
            self._unsure.settle(self._numbers())
        super().add_param_group(param_group)
        if self._adaptation:
            group = self.param_groups.pop()
            check_group(group)
            self.param_groups.append(group)
            if ranks_of(self._all_params(), self._process_group) != self._adaptation.ranks:
                self.param_groups.pop()
                raise ValueError(
                    "the new group's gradients are averaged over other ranks than those of the "
                    "optimizer's other parameters: give them an optimizer of their own"
                )
            if self._chose_fused:
                prefer_fused_in(self, group)
            self._adaptation.set_groups(group_names(self.param_groups))
            self._start_numbers(group)
            self._collector.add_group(group["params"])

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, as in torch, with plain numbers under "noise" in each group.

        An open window is not part of it: loaded, it starts again from its first micro-batch.
        """
        self._publish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of the plain torch optimizer.

        Raises:
            ValueError: it does not fit; nothing has been changed then.
        """
        if self._adaptation:
            self._check_loaded(self._adaptation, state_dict)
            if self.config.mode == "auto":
                state_dict = keep_fused(self, state_dict)
        super().load_state_dict(state_dict)

    def _check_loaded(self, adaptation: Adaptation, state_dict: dict[str, Any]) -> None:
        if not self._optimizer_load_state_dict_pre_hooks:  # these may make it fit
            check_state(self, state_dict)
        for group in state_dict["param_groups"][:1]:
            if "version" in group.get("noise", {}):
                adaptation.check_numbers(group["noise"])
        if len(self._collector):
            warnings.warn(
                f"a state is loaded inside a window: the {len(self._collector)} micro-batches of "
                f"{self.accumulation_steps} that it has had are left out of every update; load "
                "where optimizer.applied is true, or before training, to lose nothing",
                stacklevel=3,
            )

    def _publish(self) -> None:
        """Write the numbers into the groups, where every checkpointer finds them."""
        if not self._adaptation:
            return
        dropped = len(self._collector)
        if dropped and not self._warned_of_open_window:
            self._warned_of_open_window = True
            warnings.warn(
                f"the state was taken inside a window, after {dropped} of "
                f"{self.accumulation_steps} micro-batches: a run that resumes from it starts the "
                "window again; take it where optimizer.applied is true to lose nothing",
                stacklevel=3,
            )
        self._unsure.settle(self._numbers())
        numbers = self._adaptation.to_numbers(dropped)
        for group in self.param_groups:
            group["noise"] = group["noise"] | numbers

    def _restore(self) -> None:
        """Go on from the numbers in the groups, or start where there are none."""
        assert self._adaptation is not None
        self._collector.abandon(self._all_params())
        self._unsure.forget()
        self._logged = False  # ranks compare what they go on from, as at the start
        numbers = self.param_groups[0].get("noise", {})
        if "version" in numbers:
            self._adaptation.load_numbers(numbers)
        else:
            self._adaptation.restart()
        self._collector.open_window()
        for group in self.param_groups:
            self._start_numbers(group)

    def _start_numbers(self, group: dict[str, Any]) -> None:
        noise = group.setdefault("noise", {})
        there = start_numbers(self, group)
        if UPDATES not in noise:
            noise.update(there)
        elif there:  # torch's optimizer passes them over, and may have gone on since
            noise[UPDATES] = max(noise[UPDATES], there[UPDATES])

    def __getstate__(self) -> dict[str, Any]:
        self._publish()
        own = {
            "config": self.config,
            "had_process_group": self._process_group is not None,
            "_chose_fused": self._chose_fused,
        }
        return super().__getstate__() | own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin._process_group = self._process_group
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_adaptation" in self.__dict__:
            self._restore()
        else:
            if "_process_group" not in self.__dict__:
                self._process_group = None
                if state.get("had_process_group"):
                    warnings.warn(
                        "the optimizer was pickled without its process_group and now shares its "
                        "gradients with the default group: build it anew, with a process_group, "
                        "and load the state_dict",
                        stacklevel=2,
                    )
            self._begin()

    def _numbers(self) -> list[dict[str, Any]]:
        """Those of each group."""
        return [group["noise"] for group in self.param_groups]

    def _all_params(self) -> list[list[Tensor]]:
        return [group["params"] for group in self.param_groups]

    def _describe(self, adaptation: Adaptation) -> str:
        return describe(adaptation, sum(map(len, self._all_params())))

    def __repr__(self) -> str:
        hidden = [group.pop("noise", None) for group in self.param_groups]
        try:
            text = super().__repr__()
        finally:
            for group, noise in zip(self.param_groups, hidden, strict=True):
                if noise is not None:
                    group["noise"] = noise
        line = self._describe(self._adaptation) if self._adaptation else "noise off"
        return f"{text[:-1]}{line}\n)"
