"""A small run with checkpoints that is started again and again until it is done.

It writes a line at each step.

python train_small.py FOLDER STEPS
"""

import os
import sys
from pathlib import Path

import torch

from noiseopt import NoiseAwareAdamW, NoiseConfig
from noiseopt.record import DecisionLog

CONFIG = NoiseConfig(
    decision_interval=3,
    probe_interval=2,
    min_count=2.0,
    dwell_updates=5,
    dwell_fraction=0.0,
    update_price=1e12,
    samples_per_micro_batch=4,
    max_accumulation_steps=2,
    verify=False,
)


def main(folder, steps):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-3, noise=CONFIG)
    optimizer.add_observer(DecisionLog(folder / "decisions.jsonl", resume=True))
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    for step in range(done, steps):
        sys.stdout.write("step\n")
        sys.stdout.flush()
        torch.manual_seed(step)
        x = torch.randn(4, 64)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.applied and optimizer.num_updates % 40 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"done": step + 1}, folder / "partial.pt")
            os.replace(folder / "partial.pt", checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
