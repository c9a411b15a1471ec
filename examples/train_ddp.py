r"""Train the demo's GPT under DDP; killed at any time, it goes on from its latest checkpoint.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        examples/train_ddp.py --steps 4000

Works on CPUs and on GPUs. Started again on as many ranks, it goes on by itself; `--folder` must be
one that all nodes share. Without the variable, processes that torchrun starts again may read from
its store where those before them listened, and wait for them in vain.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.control import Decision
from noiseopt.demo import text
from noiseopt.demo.gpt import GPT, Shape
from noiseopt.record import DecisionLog


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="micro-batches on each rank")
    parser.add_argument("--text", type=Path, help="a folder of Python source; by default its own")
    parser.add_argument("--batch-size", type=int, default=8, help="excerpts in a micro-batch")
    parser.add_argument("--window", type=int, default=1, help="micro-batches in the first window")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("train-ddp"))
    return parser.parse_args(arguments)


def join() -> torch.device:
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def draw(data: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """A micro-batch of random excerpts; what comes next is in the generator's state."""
    starts = torch.randint(len(data) - args.context, (args.batch_size, 1))
    return data[starts + torch.arange(args.context + 1)].long()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def save(path: Path, parts: dict, position: int, device: torch.device) -> None:
    """Replace the latest checkpoint at once, so that there is a whole one at any time."""
    random_states = [None] * dist.get_world_size()
    dist.all_gather_object(random_states, random_state(device))
    if dist.get_rank() == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"position": position, "random": random_states}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)


def resume(path: Path, parts: dict, device: torch.device) -> int:
    """Load the latest checkpoint, if there is one; return the position in the data."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if len(state["random"]) != dist.get_world_size():
        raise SystemExit(f"{path} is of {len(state['random'])} ranks: go on with as many")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    random = state["random"][dist.get_rank()]
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"])
    return state["position"]


def say_what_changes(decision: Decision) -> None:
    if decision.action != "hold":
        print(decision.num_updates, decision.action, decision.reason, flush=True)


def record(optimizer: NoiseAwareAdamW, folder: Path) -> None:
    """Write every decision, and print those that change something."""
    optimizer.add_observer(DecisionLog(folder / "decisions.jsonl", resume=True))
    optimizer.add_observer(say_what_changes)


def main(arguments: list[str] | None = None) -> None:
    args, device = parse(arguments), join()
    rank, checkpoint = dist.get_rank(), args.folder / "checkpoint.pt"
    torch.manual_seed(args.seed)  # the same weights on every rank
    net = GPT(Shape(layers=args.layers, width=args.width, context=args.context)).to(device)
    model = DistributedDataParallel(net)
    config = NoiseConfig(
        accumulation_steps=args.window, samples_per_micro_batch=args.batch_size, max_norm=1.0
    )
    optimizer = NoiseAwareAdamW(model.parameters(), lr=args.lr, weight_decay=0.1, noise=config)
    scheduler = CosineAnnealingLR(optimizer, T_max=args.steps)  # counts micro-batches

    torch.manual_seed(args.seed + 1 + rank)  # other data and dropout on every rank
    data = text.load(args.text).train.chunk(dist.get_world_size())[rank]
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    start = resume(checkpoint, parts, device)
    if rank == 0:
        record(optimizer, args.folder)

    for position in range(start + 1, args.steps + 1):
        tokens = draw(data, args).to(device)
        with optimizer.accumulate(model):
            loss = model(tokens)
            loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if optimizer.applied and optimizer.num_updates % args.save_every == 0:
            save(checkpoint, parts, position, device)
    optimizer.flush()
    save(checkpoint, parts, args.steps, device)
    dist.barrier()  # none leaves while another still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
