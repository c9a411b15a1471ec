"""Train the demo's GPT with DeepSpeed, whose config switches noiseopt on.

    torchrun --standalone --nproc-per-node 2 examples/deepspeed/train.py \
        --deepspeed_config examples/deepspeed/zero3.json
    deepspeed --num_accelerators 2 examples/deepspeed/train.py \
        --deepspeed_config examples/deepspeed/zero1.json

Works on CPUs and on GPUs. Next to a script without noiseopt, `initialize` comes from another
module; the rest is the section "noise_aware" of the config. Started again with the same
`--checkpoint`, it goes on from there.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from noiseopt.control import Decision
from noiseopt.demo import text
from noiseopt.demo.gpt import GPT, Shape
from noiseopt.integrations.deepspeed import initialize
from noiseopt.record import DecisionLog, read
from noiseopt.report import table

COLUMNS = ("update", "samples", "window", "batch", "lr x", "noise scale", "clip at", "reason")
HOLDS = 8  # rows of the table at most that change nothing


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, help="micro-batches on each rank; default: schedule's")
    parser.add_argument("--text", type=Path, help="a folder of Python source; by default its own")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("train-deepspeed"))
    parser.add_argument("--record", type=Path, help="by default, in the checkpoint's folder")
    parser.add_argument("--local_rank", type=int, help="given by the launcher of DeepSpeed")
    return deepspeed.add_config_arguments(parser).parse_args(arguments)


def build(args: argparse.Namespace) -> Any:
    torch.manual_seed(args.seed)  # the same weights on every rank
    if get_accelerator().device_name() == "cpu":
        # Else the first start on CPUs compiles an extension, which takes most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = GPT(Shape(layers=args.layers, width=args.width, context=args.context))
    return initialize(args=args, model=model, model_parameters=model.parameters())[0]


def resume(engine: Any, folder: Path) -> int:
    """Load the latest checkpoint, if there is one; returns the micro-batches seen by each rank."""
    if not (folder / "latest").exists():
        return 0
    _, state = engine.load_checkpoint(str(folder))
    return int(state["seen"])


def save(engine: Any, folder: Path, seen: int) -> None:
    engine.save_checkpoint(str(folder), client_state={"seen": seen})


class Bar:
    """Progress on rank 0; where there is no terminal, a line for each change."""

    def __init__(self, engine: Any, seen: int, steps: int) -> None:
        self.noise, console = engine.noise_aware, Console(stderr=True, highlight=False)
        columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        state = TextColumn("{task.description}")
        shown = engine.global_rank == 0
        self.progress = Progress(*columns, state, console=console, disable=not shown)
        self.task = self.progress.add_task("", total=steps, completed=seen)
        if shown:
            self.noise.add_observer(self.say_what_changes)

    def say_what_changes(self, decision: Decision) -> None:
        if decision.action != "hold":
            change = f"{decision.num_updates} {decision.action} {decision.reason}"
            self.progress.console.print(change, soft_wrap=True)

    def show(self, seen: int, loss: torch.Tensor) -> None:
        state = f"loss {loss.item():.3f}  window {self.noise.accumulation_steps}"
        self.progress.update(self.task, completed=seen, description=state)


def train(engine: Any, data: torch.Tensor, args: argparse.Namespace, seen: int) -> int:
    """The usual loop, to the end of the window in which the last step lies."""
    schedule = engine.lr_scheduler
    steps = args.steps or schedule.total_num_steps * engine.noise_aware.config.accumulation_steps
    rank, ranks = engine.global_rank, engine.dp_world_size
    size, ended = engine.train_micro_batch_size_per_gpu(), True
    bar = Bar(engine, seen, steps)
    with bar.progress:
        while seen < steps or not ended:
            seed = args.seed * 10**9 + seen * ranks + rank  # goes on where a checkpoint was made
            (tokens,) = text.micro_batches(data, 1, size, args.context, seed)
            loss = engine(tokens.to(engine.device))
            engine.backward(loss)
            ended = engine.is_gradient_accumulation_boundary()
            engine.step()
            seen += 1
            if ended:
                bar.show(seen, loss)
            if ended and engine.global_steps % args.save_every == 0:
                save(engine, args.checkpoint, seen)
    return seen


def telling(decisions: Sequence[Decision]) -> list[Decision]:
    """Those that change something, and some between them."""
    each = -(-len(decisions) // HOLDS)
    return [d for n, d in enumerate(decisions, 1) if d.action != "hold" or n % each == 0]


def row(decision: Decision) -> tuple[str, ...]:
    noise, scale = decision.noise, "unknown"
    if noise is not None:
        low, high = noise.scale_interval
        scale = f"{noise.scale:.3g} [{low:.3g}, {high:.3g}]"
    counts = (decision.num_updates, decision.samples_seen, decision.accumulation_steps)
    shown = (*counts, decision.batch, round(decision.rates.lr, 3))
    reason = f"{decision.action}: {decision.reason}"
    return (*(f"{number:.10g}" for number in shown), scale, f"{decision.max_norm:.3g}", reason)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    deepspeed.utils.logger.setLevel("WARNING")
    # At every step DeepSpeed calls functions that new versions of torch have renamed.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    engine = build(args)
    seen = resume(engine, args.checkpoint)
    first = engine.global_rank == 0
    if first:
        log = DecisionLog(args.record or args.checkpoint / "decisions.jsonl", resume=True)
        engine.noise_aware.add_observer(log)
    data = text.load(args.text).train.chunk(engine.dp_world_size)[engine.global_rank]
    seen = train(engine, data, args, seen)
    save(engine, args.checkpoint, seen)
    if first and log.path.exists():  # else the run was shorter than a decision
        rows = [row(decision) for decision in telling(read(log.path).decisions)]
        table.show(f"Decisions, from {log.path}", COLUMNS, rows)
    engine.destroy()
    dist.barrier()  # none leaves while another still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
