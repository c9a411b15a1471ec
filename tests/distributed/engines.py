"""DeepSpeed engines for tests, with all that can differ in them, and a plain loop over them."""

import copy
import logging
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from tests.optim.helpers import build, loss_of

MICRO_BATCH = 4
GROUPS = ({"weight_decay": 0.1}, {"weight_decay": 0.0})

# What tests ask for by default: decide at every update, and change nothing but the window.
MEASURED = {
    "decision_interval": 1,
    "adapt_lr": False,
    "adapt_beta1": False,
    "adapt_beta2": False,
    "adapt_weight_decay": False,
    "adapt_clip": False,
    "max_accumulation_steps": 8,
}


class Warnings(logging.Handler):
    """What the package warns of, meanwhile."""

    def __enter__(self):
        self.texts = []
        logging.getLogger("noiseopt").addHandler(self)
        return self.texts

    def __exit__(self, *exception):
        logging.getLogger("noiseopt").removeHandler(self)

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.texts.append(record.getMessage())


def set_up(rank):
    """What a launcher would have set, no C++ extension for shared memory, and fp16 on the CPU.

    DeepSpeed refuses that there, where torch can do it by now.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def config_of(stage=0, bf16=False, steps=1, noise=MEASURED, lr=1e-3, **more):
    """A config whose AdamW is torch's."""
    params = {"lr": lr, "weight_decay": 0.1}
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": steps,
        "steps_per_print": None,
        "gradient_clipping": 0.05,
        "optimizer": {"type": "NoiseAwareAdamW", "params": params},
        "noise_aware": noise,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    return merged(config, more)


def merged(config, more):
    """A config with more, or with other, settings; None takes one away."""
    whole = dict(config)
    for key, value in more.items():
        old = whole.get(key)
        whole[key] = merged(old, value) if isinstance(old, dict) and value else value
    return {key: value for key, value in whole.items() if value is not None}


def groups_of(model):
    """Its weights in one group and its biases in another."""
    named = [item for item in model.named_parameters() if item[1].requires_grad]
    return [
        {"params": [p for name, p in named if name.endswith("weight")]} | GROUPS[0],
        {"params": [p for name, p in named if not name.endswith("weight")]} | GROUPS[1],
    ]


@contextmanager
def engine_of(config, model=None, optimizer=None, lr_scheduler=None):
    """A noise-aware engine, taken down after use."""
    from noiseopt.integrations.deepspeed import initialize

    model = build(torch.float32) if model is None else model
    engine, *_ = initialize(
        model=model,
        config=config,
        model_parameters=None if optimizer is not None else groups_of(model),
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    try:
        yield engine
    finally:
        engine.destroy()


def batches_of(number, rank, seed=1):
    """So many micro-batches of one rank: a stream that no other has."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return [
        (
            torch.randn(MICRO_BATCH, 6, generator=generator),
            torch.randn(MICRO_BATCH, 3, generator=generator),
        )
        for _ in range(number)
    ]


def dtype_of(engine):
    return next(engine.module.parameters()).dtype


def run(engine, batches, plan=(), loss=loss_of):
    """The plain loop. Windows take the lengths of a plan, as if they had been decided."""
    noise, planned, lengths, taken = engine.noise_aware, iter(plan), [], 0
    before = noise._adaptation._num_windows

    def follow_plan(decision):
        noise._adaptation.steps = next(planned, noise.accumulation_steps)

    if plan:
        noise.add_observer(follow_plan)
    for batch in batches:
        engine.backward(loss(engine, tuple(part.to(dtype_of(engine)) for part in batch)))
        engine.step()
        taken += 1
        if noise._adaptation._num_windows > before + len(lengths):
            lengths.append(taken)
            taken = 0
    return lengths


def weights_of(engine):
    """All parameters in one vector, as the update has them: in fp32, and whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    parts = [p for p in engine.module.parameters() if p.requires_grad]
    if engine.zero_optimization():
        parts = list(map(safe_get_full_fp32_param, parts))
    return torch.cat([part.detach().float().flatten() for part in parts])


def plain_run(lengths, batches, model, dtype, optimizer_of, clip=0.05, used=()):
    """The same training without DeepSpeed, by one process that takes every rank's micro-batches.

    Args:
        batches: those of each rank.
        clip: the norm at which every update is clipped.
        used: for each update that norm and the hyper-parameters of each group, if they change.

    Returns:
        For each window the squared norms in each group: the mean of the micro-batches' own, and
        that of their mean; and the weights at the end.
    """
    optimizer = optimizer_of(groups_of(model))
    params = [list(group["params"]) for group in optimizer.param_groups]
    norms, streams = [], [iter(each) for each in batches]
    for index, length in enumerate(lengths):
        grads = [
            micro_gradients(model, next(stream), dtype, params)
            for stream in streams
            for _ in range(length)
        ]
        mean = [
            [sum(of_p) / len(grads) for of_p in zip(*g, strict=True)]
            for g in zip(*grads, strict=True)
        ]
        small = [sum(squared(micro[i]) for micro in grads) / len(grads) for i in range(2)]
        norms.append((small, [squared(group) for group in mean]))
        for group, mean_grads in zip(params, mean, strict=True):
            for param, grad in zip(group, mean_grads, strict=True):
                param.grad = grad.float()
        if used:
            clip, values = used[index]
            for group, value in zip(optimizer.param_groups, values, strict=True):
                group.update(value)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    flat = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return norms, torch.cat(flat)


def micro_gradients(model, batch, dtype, params):
    """The gradient of one micro-batch in each group, as a model of this type has it."""
    flat = [p for group in params for p in group]
    if dtype == torch.float32:
        twin, own = model, flat
    else:
        twin = copy.deepcopy(model).to(dtype)
        index = {id(p): i for i, p in enumerate(model.parameters())}
        of_twin = list(twin.parameters())
        own = [of_twin[index[id(p)]] for p in flat]
    value = loss_of(twin, tuple(part.to(dtype) for part in batch))
    grads = iter(torch.autograd.grad(value, own, allow_unused=True))
    return [
        [torch.zeros_like(p) if (g := next(grads)) is None else g.float() for p in group]
        for group in params
    ]


def squared(tensors):
    return float(sum(t.double().square().sum() for t in tensors))
