r"""Train the demo's GPT under FSDP2; killed at any time, it goes on from its latest checkpoint.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        examples/train_fsdp2.py --steps 8000 --bf16

Works on CPUs and on GPUs. Started again, also on another number of ranks, it goes on by itself;
`--folder` must be one that all nodes share. Without the variable, processes that torchrun starts
again may read from its store where those before them listened, and wait for them in vain.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.control import Decision
from noiseopt.demo import text
from noiseopt.demo.gpt import GPT, Shape
from noiseopt.record import DecisionLog


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000, help="micro-batches of all ranks")
    parser.add_argument("--text", type=Path, help="a folder of Python source; by default its own")
    parser.add_argument("--batch-size", type=int, default=8, help="excerpts in a micro-batch")
    parser.add_argument("--window", type=int, default=1, help="micro-batches in the first window")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="compute the blocks in bfloat16")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("train-fsdp2"))
    return parser.parse_args(arguments)


def join() -> torch.device:
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def build(args: argparse.Namespace, device: torch.device) -> GPT:
    model = GPT(Shape(layers=args.layers, width=args.width, context=args.context)).to(device)
    policy = MixedPrecisionPolicy()
    if args.bf16:  # what the blocks add up, the loss and all gradients stay in fp32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model)


def draw(data: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """A micro-batch of random excerpts; what comes next is in the generator's state."""
    starts = torch.randint(len(data) - args.context, (args.batch_size, 1))
    return data[starts + torch.arange(args.context + 1)].long()


class Run(Stateful):
    """What is saved of a run, but for the random state of each rank.

    Attributes:
        seen: micro-batches of all ranks: the position in the data, on any number of them.
    """

    def __init__(self, model: GPT, optimizer: NoiseAwareAdamW, scheduler: CosineAnnealingLR):
        self.model, self.optimizer, self.scheduler, self.seen = model, optimizer, scheduler, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        scheduler = self.scheduler.state_dict()
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer, self.seen = state["model"], state["optimizer"], state["seen"]
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        # It counts micro-batches on each rank, of which there may be others than before.
        here = {"T_max": self.scheduler.T_max, "last_epoch": self.seen // dist.get_world_size()}
        self.scheduler.load_state_dict(state["scheduler"] | here)


def random_file(folder: Path) -> Path:
    return folder / f"random-{dist.get_rank()}-of-{dist.get_world_size()}.pt"


def save(run: Run, folder: Path) -> None:
    """Write a checkpoint under another name first, so that what has its name is whole."""
    path = folder / f"checkpoint-{run.seen:09}"
    if path.exists():
        return
    partial = folder / "partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
    dist.barrier()
    dcp.save({"run": run}, checkpoint_id=partial)
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, random_file(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        os.replace(partial, path)
    dist.barrier()


def resume(run: Run, folder: Path, seed: int) -> None:
    """Load the latest checkpoint, if there is one."""
    latest = max(folder.glob("checkpoint-*"), default=None)
    if latest is not None:
        dcp.load({"run": run}, checkpoint_id=latest)
    if latest is None or not random_file(latest).exists():
        torch.manual_seed(seed + 1 + run.seen + dist.get_rank())  # other data on every rank
        return
    state = torch.load(random_file(latest), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def say_what_changes(decision: Decision) -> None:
    if decision.action != "hold":
        print(decision.num_updates, decision.action, decision.reason, flush=True)


def record(optimizer: NoiseAwareAdamW, folder: Path) -> None:
    """Write every decision, and print those that change something."""
    optimizer.add_observer(DecisionLog(folder / "decisions.jsonl", resume=True))
    optimizer.add_observer(say_what_changes)


def train(run: Run, data: torch.Tensor, args: argparse.Namespace, device: torch.device) -> None:
    model, optimizer, ranks = run.model, run.optimizer, dist.get_world_size()
    taken = 0
    while run.seen + ranks <= args.steps:
        if run.seen + 2 * ranks > args.steps:  # the end of the data ends its window too
            optimizer.shorten_window(taken + 1)
        ends = taken + 1 == optimizer.accumulation_steps
        tokens = draw(data, args).to(device)
        with optimizer.accumulate(model):
            loss = model(tokens)
            loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()
        run.scheduler.step()
        optimizer.zero_grad()
        run.seen += ranks
        taken = 0 if ends else taken + 1
        if optimizer.applied and optimizer.num_updates % args.save_every == 0:
            save(run, args.folder)


def main(arguments: list[str] | None = None) -> None:
    args, device = parse(arguments), join()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = build(args, device)
    config = NoiseConfig(
        accumulation_steps=args.window, samples_per_micro_batch=args.batch_size, max_norm=1.0
    )
    optimizer = NoiseAwareAdamW(model.parameters(), lr=args.lr, weight_decay=0.1, noise=config)
    scheduler = CosineAnnealingLR(optimizer, T_max=args.steps // ranks)  # counts micro-batches
    run = Run(model, optimizer, scheduler)
    resume(run, args.folder, args.seed)
    if rank == 0:
        record(optimizer, args.folder)
    train(run, text.load(args.text).train.chunk(ranks)[rank], args, device)
    save(run, args.folder)
    dist.barrier()  # none leaves while another still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
