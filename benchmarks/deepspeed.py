"""What noiseopt costs in a DeepSpeed engine, next to the same engine without it.

    python benchmarks/deepspeed.py          # all of it; adds to results/deepspeed.json
    python benchmarks/deepspeed.py --quick  # a smoke test, writes nothing unless --output is given

Time of whole updates (forward, backward, step) of a byte-level GPT at each ZeRO stage, on two ranks
of one thread each on this machine, over gloo, in fp32. Both engines clip at the same norm and run
torch's AdamW. How arms take turns, and what is reported, is as in benchmarks/ranks.py: the ratio to
the plain engine, with a bootstrap interval of 95 %; the arm "plain, again" is the control.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # else this file hides the package
import deepspeed

from benchmarks import ranks, recording
from benchmarks.ranks import CONTROL, FULL, OURS, REFERENCE, RESULTS, SIZES, Cost, Size, Times
from benchmarks.steady import past_first_windows
from noiseopt.demo.gpt import GPT, VOCABULARY
from noiseopt.integrations.deepspeed import initialize

STAGES = (0, 1, 2, 3)
RANKS = 2
NAME = "deepspeed.json"


class Arm:
    """A model and an engine of its own, in the usual loop.

    Args:
        stage: of ZeRO.
        size: of the model and its micro-batches.
        window: micro-batches in an update.
        ours: whether the config has the section "noise_aware".
    """

    def __init__(self, stage: int, size: Size, window: int, ours: bool = False) -> None:
        self.window, self.taken = window, 0
        torch.manual_seed(0)
        model = GPT(size.shape)
        build = initialize if ours else deepspeed.initialize
        self.engine = build(
            model=model,
            model_parameters=model.parameters(),
            config=config(stage, size, window) | (section(size, window) if ours else {}),
        )[0]
        if ours:
            past_first_windows(self.engine.noise_aware._adaptation)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (16, size.batch, size.shape.context + 1)
        self.data = torch.randint(VOCABULARY, shape, generator=generator)

    def update(self) -> None:
        for _ in range(self.window):
            self.taken += 1
            loss = self.engine(self.data[self.taken % len(self.data)])
            self.engine.backward(loss)
            self.engine.step()


def config(stage: int, size: Size, window: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": size.batch,
        "gradient_accumulation_steps": window,
        "gradient_clipping": ranks.CLIP,
        "steps_per_print": ranks.NEVER,
        # torch's own, which is also what NoiseAwareAdamW becomes, and needs no compiler
        "optimizer": {"type": "AdamW", "params": {"lr": ranks.LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }


def section(size: Size, window: int) -> dict[str, Any]:
    """Settings under which the window stays as it is, whatever is measured."""
    fixed = ranks.config(window, size.block)
    return {
        "noise_aware": {
            "max_accumulation_steps": fixed.max_accumulation_steps,
            "decision_interval": fixed.decision_interval,
            "dwell_updates": fixed.dwell_updates,
        }
    }


ARMS: Mapping[str, Callable[..., Arm]] = {
    REFERENCE: Arm,
    CONTROL: Arm,
    OURS: partial(Arm, ours=True),
}


def cost(stage: int, size: Size, window: int, steps: int) -> Times:
    """This rank's times at one stage."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    # Not compiled, so that both arms reduce by gloo and no compiler is needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # At every step DeepSpeed calls functions that new versions of torch have renamed.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    arms = {name: build(stage, size, window) for name, build in ARMS.items()}
    times = ranks.in_turns({name: arm.update for name, arm in arms.items()}, size.block, steps)
    for arm in arms.values():
        arm.engine.destroy()
    return times


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Attributes:
        sizes: of models.
        stages: of ZeRO.
        steps: updates of each arm; None for each size's own number.
        windows: the lengths of those that are compared.
        together: whether processes are started once for everything, which is faster and shows
            nothing before the end.
    """

    sizes: tuple[Size, ...]
    stages: tuple[int, ...] = STAGES
    steps: int | None = None
    windows: tuple[int, ...] = (1, ranks.WINDOW)
    together: bool = False


def tasks_of(plan: Plan) -> Iterator[ranks.Task]:
    for size in plan.sizes:
        for window in size.steps.keys() & plan.windows:
            for stage in plan.stages:
                yield ranks.Task(
                    RANKS,
                    partial(cost, stage, size, window, plan.steps or size.steps[window]),
                    partial(ranks.costs, f"ZeRO {stage}", size, window),
                    ranks.OF_COST,
                )


def run(plan: Plan) -> Iterator[Sequence[Cost]]:
    """Measure, printing each table as it is known."""
    yield from ranks.run_tasks(list(tasks_of(plan)), plan.together)


def origin_of(arguments: Sequence[str]) -> dict[str, str]:
    code, versions = ("noiseopt", "integrations"), f"deepspeed {deepspeed.__version__}"
    origin = recording.origin_of(Path(__file__).name, arguments, code, versions)
    return origin | {"device": ranks.DEVICE}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test of half a minute")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help=f"default: {' '.join(FULL)}")
    parser.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, help="updates of each arm in each comparison")
    both = (1, ranks.WINDOW)
    parser.add_argument("--windows", nargs="+", type=int, choices=both, default=both)
    parser.add_argument("--output", type=Path, help=f"folder for {NAME}")
    options = parser.parse_args(arguments)
    names = options.sizes or (("tiny",) if options.quick else FULL)
    sizes = tuple(SIZES[name] for name in names)
    stages, windows = tuple(options.stages), tuple(options.windows)
    plan = Plan(sizes, stages, options.steps, windows, together=options.quick)
    folder = options.output or (None if options.quick else RESULTS)
    origin = origin_of(arguments)  # before others can commit what is not measured here
    for results in run(plan):
        if folder is not None:
            recording.append(results, origin, folder / NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
