"""Loops that leave something out or over, on two real ranks: what must stay right all the same."""

import copy
import functools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import MEASURED, Warnings, batches_of, config_of, engine_of, run
from tests.distributed.ranks import result, run_on_ranks
from tests.optim.helpers import build, loss_of

pytestmark = pytest.mark.distributed

NOT_CLIPPED = {"gradient_clipping": 0.0}


def backward(engine, batch, factor=1.0):
    dtype = engines.dtype_of(engine)
    engine.backward(loss_of(engine, tuple(part.to(dtype) for part in batch)) * factor)


def skipped_backward(rank, stage, bf16, factor):
    """In a window of two the first backward is left out, as where the loss was not finite."""
    engines.set_up(rank)
    config = config_of(stage, bf16, steps=2, **NOT_CLIPPED)
    with Warnings() as texts, engine_of(config) as engine:
        engine.step()
        backward(engine, batches_of(1, rank)[0], factor)
        engine.step()
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        left = sum(bool(grad.any()) for grad in grads)
        return {
            "left": left,
            "finite": bool(engines.weights_of(engine).isfinite().all()),
            "applied": engine.was_step_applied(),
            "texts": texts,
        }


def uneven_backwards(rank):
    """One rank has a backward less in a window whose rates are scaled."""
    engines.set_up(rank)
    noise = MEASURED | {"decision_interval": 1000, "adapt_lr": True}
    with engine_of(config_of(steps=3, noise=noise)) as engine:
        adaptation = engine.noise_aware._adaptation
        controller = adaptation._controller
        # As after growth from windows of one, at a noise scale of four of them.
        state = replace(controller.state, noise_ratio=4.0, reference_steps=1.0)
        adaptation._controller = controller.at(state)
        for index, batch in enumerate(batches_of(9, rank)):
            if not (rank == 0 and index == 3):
                backward(engine, batch)
            engine.step()
        return engines.weights_of(engine), adaptation.rates(3).lr, adaptation.rates(2).lr


def resumed_by_the_loop(rank, folder):
    """Saved with windows of four that the loop ends, it goes on with windows of two."""
    engines.set_up(rank)

    def window(engine, batches):
        for index, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            backward(engine, batch)
        engine.step()

    with engine_of(config_of(stage=1, steps=4)) as engine:
        window(engine, batches_of(4, rank))
        engine.save_checkpoint(folder)
    seen = {}
    for mode in ("auto", "advise"):
        noise = MEASURED | {"mode": mode}
        with engine_of(config_of(stage=1, steps=2, noise=noise)) as engine:
            engine.load_checkpoint(folder)
            loaded = engine.noise_aware.accumulation_steps, engine.gradient_accumulation_steps()
            window(engine, batches_of(2, rank, seed=2))
            window(engine, batches_of(2, rank, seed=3))
            decision = engine.noise_aware.decision
            assert engine.noise_aware._adaptation.state.reference_steps == 2
            seen[mode] = loaded, engine.gradient_accumulation_steps(), decision.batch
    return seen


def resumed_in_other_parts(rank, folder):
    """Saved in windows of 2 x 4 samples, by the engine or by the loop, it goes on with 8 x 1."""
    engines.set_up(rank)
    found = []
    for loops in (False, True):
        for micro_batch, steps in ((4, 2), (1, 8)):
            config = config_of(1, steps=steps, train_micro_batch_size_per_gpu=micro_batch)
            with engine_of(config) as engine:
                if steps == 8:
                    engine.load_checkpoint(f"{folder} {loops}")
                parts = [each[:micro_batch] for each in batches_of(1, rank)[0]]
                for index in range(steps):
                    if loops:
                        engine.set_gradient_accumulation_boundary(index == steps - 1)
                    backward(engine, parts)
                    if not loops:
                        engine.step()
                if loops:
                    engine.step()
                engine.save_checkpoint(f"{folder} {loops}")
                noise = engine.noise_aware
                found.append((noise.accumulation_steps, noise._adaptation.state.reference_steps))
    return found


def no_optimizer(rank, stage):
    engines.set_up(rank)
    from noiseopt.integrations.deepspeed import initialize

    config = config_of(stage, optimizer=None)
    with Warnings() as texts:
        engine, *_ = initialize(model=build(torch.float32), config=config)
    inputs, _ = batches_of(1, rank)[0]
    found = engine.noise_aware, tuple(engine(inputs).shape), texts
    engine.destroy()
    return found


def counted_once_for_two(rank):
    engines.set_up(rank)
    with engine_of(config_of(steps=2)) as engine:
        engine.noise_aware.set_samples(4)
        one, other = batches_of(2, rank)
        backward(engine, one)
        engine.step()
        backward(engine, other)
        with pytest.raises(ValueError, match="called 1 times for 2 micro-batches"):
            engine.step()


def end_of_the_data(rank, shortens, mode="auto"):
    """Five micro-batches in windows of three: the last two are an update of their own, or lost."""
    engines.set_up(rank)
    batches = batches_of(5, rank)
    config = config_of(stage=2, steps=3, noise=MEASURED | {"mode": mode}, **NOT_CLIPPED)
    with Warnings() as texts, engine_of(config) as engine:
        lengths = run(engine, batches[:3])
        if shortens:
            engine.noise_aware.shorten_window(2)
            with pytest.raises(ValueError, match="cannot become 3"):
                engine.noise_aware.shorten_window(3)
        lengths += run(engine, batches[3:])
        if not shortens:
            with pytest.raises(RuntimeError, match="2 of 3 micro-batches, each divided"):
                engine.noise_aware.shorten_window(2)
        steps = engine.gradient_accumulation_steps()
        last = [window.micro_batches for window in windows(engine)]
        engine.destroy()
        return {"lengths": lengths, "steps": steps, "windows": last, "texts": list(texts)}


class Increments:
    """A scheduler that is told how many samples it advances by, as Megatron's are."""

    def __init__(self, optimizer):
        self.told = []

    def step(self, increment):
        self.told.append(increment)

    def state_dict(self):
        return {}


def told_increments(rank):
    engines.set_up(rank)
    made = []

    def scheduler(optimizer):
        made.append(Increments(optimizer))
        return made[0]

    config = config_of(steps=4, noise=MEASURED | {"min_accumulation_steps": 1})
    with engine_of(config, lr_scheduler=scheduler) as engine:
        run(engine, batches_of(10, rank), (2, 2, 2))
    return made[0].told


def clipped_by(rank, way):
    """Windows of three at stage 0, whose gradients are far above the clipping threshold."""
    engines.set_up(rank)
    noise = MEASURED | {"min_accumulation_steps": 3, "max_accumulation_steps": 3}
    with engine_of(config_of(steps=3, noise=noise, gradient_clipping=1e-3)) as engine:
        for index, batch in enumerate(batches_of(9, rank)):
            if way == "the loop":
                engine.set_gradient_accumulation_boundary(index % 3 == 2)
            backward(engine, batch)
            engine.step()
        return engines.weights_of(engine), [w.clipped for w in windows(engine)]


def extra_backward_on_one_rank(rank):
    """The second rank's loop runs two backwards for its first micro-batch, which sum up."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(stage=0, steps=2)) as engine:
        one, other, more = batches_of(3, rank)
        backward(engine, one)
        if rank == 1:
            backward(engine, more)
        engine.step()
        backward(engine, other)
        engine.step()
        return texts, [window.norms.finite for window in windows(engine)]


def spread_sequences(rank):
    """A mesh that has two ranks share each sequence."""
    engines.set_up(rank)
    from deepspeed.utils import groups

    from noiseopt.integrations.deepspeed import initialize

    net = build(torch.float32)
    try:
        with pytest.raises(ValueError, match=r"over 2 ranks.*leave out one of the two"):
            initialize(
                model=net, config=config_of(), model_parameters=net.parameters(), mesh_param=(1, 2)
            )
    finally:
        groups.mesh_device = None


# ------------------------------------------------------------------ windows of the loop's own

OWN_RATES = {
    "decision_interval": 2,
    "min_count": 2.0,
    **dict.fromkeys(("adapt_beta1", "adapt_beta2", "adapt_weight_decay", "adapt_clip"), False),
}


def own_window(engine, way, batches):
    """A window that the loop ends, its loss divided by itself."""
    factor = engine.gradient_accumulation_steps() / len(batches)
    if way == "coalesce":
        with engine.coalesce_grad_reduction():
            for batch in batches:
                backward(engine, batch, factor)
        engine.step()
        return
    *first, last = batches
    with engine.no_sync() if way == "no_sync" else nullcontext():
        for batch in first:
            if way == "boundary":
                engine.set_gradient_accumulation_boundary(False)
            backward(engine, batch, factor)
    if way == "boundary":
        engine.set_gradient_accumulation_boundary(True)
    backward(engine, last, factor)
    engine.step()


def own_config(way, stage, mode="auto"):
    more = {"managed_gradient_accumulation": False} if way == "unmanaged" else {}
    return config_of(stage, steps=1, noise=OWN_RATES | {"mode": mode}, **NOT_CLIPPED, **more)


def rates_used(engine):
    """The learning rate of each update to come, under its number, as the optimizer finds it."""
    used, step = {}, engine.basic_optimizer.step

    def spy(*args, **kwargs):
        used[engine.global_steps] = engine.basic_optimizer.param_groups[0]["lr"]
        return step(*args, **kwargs)

    engine.basic_optimizer.step = spy
    return used


def own_length(rank, way, stage, mode="auto"):
    """Windows of four, where the config says one; the last of two; then one on a fresh start."""
    engines.set_up(rank)
    with engine_of(own_config(way, stage, mode)) as engine:
        noise, used = engine.noise_aware, rates_used(engine)
        batches = batches_of(50, rank)
        for at in range(0, 48, 4):
            own_window(engine, way, batches[at : at + 4])
        decision, factor = noise.decision, noise.lr_factor
        own_window(engine, way, batches[48:])
        noise.restart()
        own_window(engine, way, batches[:2])
        own_window(engine, way, batches[2:4])
        return list(used.values()), decision, factor, noise.decision


def short_first(rank):
    """A first window of one, then windows of four, for which the config was written."""
    engines.set_up(rank)
    config = config_of(0, steps=4, noise=OWN_RATES, **NOT_CLIPPED)
    with engine_of(config) as engine:
        used, batches = rates_used(engine), batches_of(49, rank)
        for at, end in ((0, 1), *((at, at + 4) for at in range(1, 49, 4))):
            own_window(engine, "boundary", batches[at:end])
        return list(used.values())[1:], engine.noise_aware.decision


def resumed_length(rank, folder):
    """Saved with windows of four that the loop ends, it goes on with such, and with one of two."""
    engines.set_up(rank)
    config, batches = own_config("unmanaged", 1), batches_of(50, rank)
    with engine_of(config) as engine:
        for at in range(0, 40, 4):
            own_window(engine, "unmanaged", batches[at : at + 4])
        engine.save_checkpoint(folder)
    with engine_of(config) as engine:
        engine.load_checkpoint(folder)
        used = rates_used(engine)
        for at in (40, 44):
            own_window(engine, "unmanaged", batches[at : at + 4])
        decision = engine.noise_aware.decision
        own_window(engine, "unmanaged", batches[48:])
        return list(used.values()), decision


def no_backward_on_one_rank(rank, first):
    """In one window of the loop's own the first rank has no backward; the update by plain SGD."""
    engines.set_up(rank)
    more = {"managed_gradient_accumulation": False, "optimizer": SGD} | NOT_CLIPPED
    with engine_of(config_of(stage=0, **more)) as engine:
        batches = batches_of(3, rank)
        for batch in () if first else batches[:1]:
            backward(engine, batch)
            engine.step()
        before = engines.weights_of(engine)
        if rank == 1:
            backward(engine, batches[1])
        engine.step()
        update = before - engines.weights_of(engine)
        wanted = plain_update(before, batches_of(3, 1)[1:2], 2)
        backward(engine, batches[2])
        engine.step()
        return update, wanted, windows(engine), engines.weights_of(engine)


def unseen_on_one_rank(rank, mode):
    """After a run's first windows, one in which the second rank calls loss.backward() itself."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(2, noise=MEASURED | {"mode": mode})) as engine:
        for index, batch in enumerate(batches_of(25, rank)):
            if rank == 1 and index == 22:
                loss_of(engine, batch).backward()
            else:
                backward(engine, batch)
            engine.step()
        return engines.weights_of(engine), windows(engine), texts


# ------------------------------------------------------------------ gradients that are thrown away

SGD = {"type": "NoiseAwareSGD", "params": {"lr": 1.0, "weight_decay": None}}
THREE = MEASURED | {"min_accumulation_steps": 3, "max_accumulation_steps": 3}
TWO = MEASURED | {"min_accumulation_steps": 2}
FOUR = MEASURED | {"min_accumulation_steps": 4}


class Wrapped(torch.nn.Module):
    """A model around another, whose parameters it has."""

    def __init__(self):
        super().__init__()
        self.inner = build(torch.float32)

    def forward(self, inputs):
        return self.inner(inputs)


def plain_update(weights, batches, parts):
    """SGD's update at a rate of one, its gradients by plain autograd.

    Args:
        batches: the micro-batches of every rank.
        parts: by how many the sum of their gradients is divided.
    """
    model = build(torch.float32)
    torch.nn.utils.vector_to_parameters(weights.clone(), model.parameters())
    optimizer = torch.optim.SGD(engines.groups_of(model), lr=1.0)
    for batch in batches:
        (loss_of(model, batch) / parts).backward()
    optimizer.step()
    return weights - torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def cleared(rank, stage, by, kind="plain", wraps=False):
    """A loop that clears gradients after every micro-batch: SGD's update by a window of three."""
    engines.set_up(rank)
    net = Wrapped() if wraps else build(torch.float32)
    inner = net.inner if wraps else net
    allowed = {"zero_allow_untested_optimizer": True}
    config = config_of(stage, steps=3, noise=THREE, optimizer=SGD, **allowed, **NOT_CLIPPED)
    with Warnings() as texts, engine_of(config, net) as engine:
        clears = {"engine": engine.zero_grad, "optimizer": engine.optimizer.zero_grad}
        clears |= {"model": inner.zero_grad, "hand": lambda: throw_away(net)}
        for _ in range(3 if kind == "after none" else 0):
            engine.step()
        before, batches = engines.weights_of(engine), batches_of(3, rank)
        for index, batch in enumerate(batches):
            times = 0 if kind == "left out" and index == 1 else 2 if kind == "twice" else 1
            for _ in range(times):
                backward(engine, batch, 1 / times)
            engine.step()
            clears[by]()
        update = before - engines.weights_of(engine)
        places = (0, 2) if kind == "left out" else (0, 1, 2)
        used = [batches_of(3, one)[place] for one in range(2) for place in places]
        wanted = plain_update(before, used, 6)
        measured = [window.norms.finite for window in windows(engine)]
    return update, wanted, texts, measured


def throw_away(model):
    for param in model.parameters():
        param.grad = None


def copied_model(rank):
    """A copy of the model, made while its gradients are kept, clears its own; so does it later."""
    engines.set_up(rank)
    net = build(torch.float32)
    with engine_of(config_of(stage=0, steps=2), net) as engine:
        batch = batches_of(1, rank)[0]
        backward(engine, batch)
        engine.step()
        twin = copy.deepcopy(net)
        twin.zero_grad()
        cleared = [p.grad is None for p in twin.parameters()]
        net.zero_grad()
        kept = [p.grad is not None for p in net.parameters()]
    net.zero_grad()
    return cleared, kept, [p.grad is None for p in net.parameters()]


def thrown_away_late(rank):
    """Between a window's last backward and its step, as where a loss was found not to be finite."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(0, steps=2)) as engine:
        one, other = batches_of(2, rank)
        backward(engine, one)
        engine.step()
        backward(engine, other)
        engine.module.zero_grad()
        engine.step()
        return texts, [window.norms.finite for window in windows(engine)]


def hooked(rank, stage, each):
    """Hooks of the user's, put up after the engine was made, make gradients smaller."""
    engines.set_up(rank)
    net, hooks = build(torch.float32), []
    with engine_of(config_of(stage, steps=2), net) as engine:
        for index, batch in enumerate(batches_of(2, rank)):
            if each or index == 0:
                for hook in hooks:
                    hook.remove()
                hooks = [param.register_hook(lambda grad: grad / 10) for param in net.parameters()]
            backward(engine, batch)
            engine.step()
        return windows(engine)[0].norms.small_sq


def thawed_inside(rank):
    """Frozen for two windows, in the second of which hooks are put up again, and in the third not
    from its second micro-batch on."""
    engines.set_up(rank)
    net = build(torch.float32)
    with engine_of(config_of(0, steps=2, lr=0.0), net) as engine:
        for index, batch in enumerate(batches_of(6, rank)):
            net[0].weight.requires_grad_(index >= 5)
            if index == 2:
                net[2].weight.register_hook(lambda grad: grad * 1)
            backward(engine, batch)
            engine.step()
        return windows(engine)[-1].norms.small_sq


SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def cleared_by_the_loop(rank, way, stage, by, sums=False):
    """Windows of three that the loop ends: gradients cleared inside the first, and before each."""
    engines.set_up(rank)
    more = {"managed_gradient_accumulation": False} if way == "unmanaged" else {}
    more |= SUMS if sums else {}
    config = config_of(stage, sums, steps=3, noise=THREE, **NOT_CLIPPED, **more)
    net = build(torch.float32)
    with Warnings() as texts, engine_of(config, net) as engine:
        clears = {"engine": engine, "optimizer": engine.optimizer, "model": net}
        for index, batch in enumerate(batches_of(6, rank)):
            if index < 4:
                clears[by].zero_grad()
            if way == "boundary":
                engine.set_gradient_accumulation_boundary(index % 3 == 2)
            backward(engine, batch)
            if index % 3 == 2:
                engine.step()
        return texts, [window.norms.finite for window in windows(engine)]


def halve(engine, how):
    """Edit the gradients that an engine holds."""
    from deepspeed.utils import safe_set_full_grad

    for param in engine.module.parameters():
        if how == "in place":
            param.grad.mul_(0.5)
        elif how == "anew":
            param.grad = param.grad * 0.5
        elif getattr(param, "ds_numel", 0) % 2 == 0:  # what stage 3 need not pad
            safe_set_full_grad(param, torch.ones(getattr(param, "ds_shape", param.shape)))


def halve_in_a_hook(param, is_due):
    if is_due():
        param.grad.mul_(0.5)


def look_in_a_hook(param, is_due):
    param.grad.sum()


HOOKS = {"in a hook": halve_in_a_hook, "not at all": look_in_a_hook}


def edited(rank, stage, how, at=1, bf16=False, first=2, **more):
    """Three windows of two; in the second gradients are edited after one of the backwards."""
    engines.set_up(rank)
    net = build(torch.float32)
    config = config_of(stage, bf16, steps=2, noise=TWO, **NOT_CLIPPED, **more)
    now = [0]
    if how in HOOKS:
        for param in net.parameters():
            hook = functools.partial(HOOKS[how], is_due=lambda: now[0] == first + at)
            param.register_post_accumulate_grad_hook(hook)
    with Warnings() as texts, engine_of(config, net) as engine:
        for index, batch in enumerate(batches_of(6, rank)):
            now[0] = index
            backward(engine, batch)
            if index == first + at and how == "by norm":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            elif index == first + at and how not in HOOKS:
                halve(engine, how)
            engine.step()
        measured = [window.norms.finite for window in windows(engine)]
    setters = [vars(param).get("set_full_hp_grad") for param in net.parameters()]
    restored = all(getattr(setter, "__self__", None) is not None for setter in setters if setter)
    return texts, measured, restored


def divided_losses(rank, by, longer=True):
    """A loop that divides its losses by itself, in windows of two that become windows of four."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(steps=2, noise=TWO)) as engine:
        noise, told = engine.noise_aware, []

        def lengthen(decision):
            told.append(decision.loss)
            noise._adaptation.steps = 4 if longer else 2

        noise.add_observer(lengthen)
        for batch in batches_of(10, rank):
            parts = 2 if by == "a constant" else engine.gradient_accumulation_steps()
            loss = loss_of(engine, batch)
            engine.backward(loss / parts, scale_wrt_gas=False)
            engine.step()
        return texts, told


def divided_by_own_windows(rank):
    """The transformers Trainer's way: windows that the loop ends, their losses divided by itself.

    Two of four and one of two, at a rate of zero; the losses told, and those of the same by hand.
    """
    engines.set_up(rank)
    with engine_of(config_of(steps=4, noise=FOUR, lr=0.0)) as engine:
        batches, told, wanted = batches_of(10, rank), [], []
        engine.noise_aware.add_observer(lambda decision: told.append(decision.loss))
        for window in (batches[:4], batches[4:8], batches[8:]):
            losses = [loss_of(engine, batch) for batch in window]
            for index, loss in enumerate(losses, start=1):
                engine.set_gradient_accumulation_boundary(index == len(window))
                engine.backward(loss / len(window), scale_wrt_gas=False)
            engine.step()
            wanted.append(float(sum(losses)) / len(window))
        return told, wanted


def windows(engine):
    return [window for decision in engine.noise_aware.decisions for window in decision.windows]


CASES = {
    **{
        f"skipped {stage} {bf16} {factor}": functools.partial(
            skipped_backward, stage=stage, bf16=bf16, factor=factor
        )
        for stage, bf16 in ((0, False), (0, True), (1, False), (2, True))
        for factor in (1.0, float("nan"))
    },
    "uneven": uneven_backwards,
    "no optimizer 0": functools.partial(no_optimizer, stage=0),
    "no optimizer 3": functools.partial(no_optimizer, stage=3),
    "counts": counted_once_for_two,
    "end, shortened": functools.partial(end_of_the_data, shortens=True),
    "end, advised": functools.partial(end_of_the_data, shortens=True, mode="advise"),
    "end": functools.partial(end_of_the_data, shortens=False),
    "increments": told_increments,
    "extra": extra_backward_on_one_rank,
    **{
        f"own {way} {stage} {mode}": functools.partial(own_length, way=way, stage=stage, mode=mode)
        for way, stage, mode in (
            ("no_sync", 0, "auto"),
            ("unmanaged", 0, "auto"),
            ("unmanaged", 1, "advise"),
            ("boundary", 2, "auto"),
            ("coalesce", 2, "auto"),
        )
    },
    "none in the first": functools.partial(no_backward_on_one_rank, first=True),
    "none in the second": functools.partial(no_backward_on_one_rank, first=False),
    "unseen auto": functools.partial(unseen_on_one_rank, mode="auto"),
    "unseen advise": functools.partial(unseen_on_one_rank, mode="advise"),
    **{f"model {s}": functools.partial(cleared, stage=s, by="model") for s in range(4)},
    "model inside": functools.partial(cleared, stage=1, by="model", wraps=True),
    "twice 0": functools.partial(cleared, stage=0, by="engine", kind="twice"),
    "twice 3": functools.partial(cleared, stage=3, by="optimizer", kind="twice"),
    "left out 0": functools.partial(cleared, stage=0, by="engine", kind="left out"),
    "left out 1": functools.partial(cleared, stage=1, by="optimizer", kind="left out"),
    "after none": functools.partial(cleared, stage=0, by="engine", kind="after none"),
    **{f"by hand {s}": functools.partial(cleared, stage=s, by="hand") for s in (0, 1)},
    "copied": copied_model,
    **{
        f"hooked {stage} {each}": functools.partial(hooked, stage=stage, each=each)
        for stage in (0, 2)
        for each in (False, True)
    },
    "thrown away late": thrown_away_late,
    "thawed inside": thawed_inside,
    **{
        f"cleared, {way} {stage} {by}": functools.partial(
            cleared_by_the_loop, way=way, stage=stage, by=by
        )
        for way, stage, by in (
            ("boundary", 0, "engine"),
            ("unmanaged", 1, "model"),
            ("boundary", 2, "optimizer"),
            ("boundary", 3, "optimizer"),
            ("unmanaged", 3, "engine"),
        )
    },
    **{
        f"cleared, sums in fp32 {by}": functools.partial(
            cleared_by_the_loop, way="boundary", stage=1, by=by, sums=True
        )
        for by in ("model", "optimizer")
    },
    "edited by norm": functools.partial(edited, stage=0, how="by norm"),
    "edited at first": functools.partial(edited, stage=0, how="by norm", first=0),
    "spent": functools.partial(edited, stage=1, how="in place", bf16=True, **SUMS),
    "edited anew": functools.partial(edited, stage=0, how="anew"),
    "edited in bf16": functools.partial(edited, stage=0, how="in place", bf16=True),
    "edited inside": functools.partial(edited, stage=0, how="in place", at=0),
    "edited inside 1": functools.partial(edited, stage=1, how="in place", at=0),
    **{
        f"edited in a hook {s}": functools.partial(edited, stage=s, how="in a hook")
        for s in range(4)
    },
    **{f"looked at {s}": functools.partial(edited, stage=s, how="not at all") for s in range(4)},
    **{f"set {s}": functools.partial(edited, stage=s, how="by a setter") for s in (1, 2, 3)},
    "divided by a constant": functools.partial(divided_losses, by="a constant"),
    "divided by two": functools.partial(divided_losses, by="a constant", longer=False),
    "divided by the length": functools.partial(divided_losses, by="the length"),
    "divided by its own": divided_by_own_windows,
    "short first": short_first,
    "sequences": spread_sequences,
    "clipped by the loop": functools.partial(clipped_by, way="the loop"),
    "clipped by the engine": functools.partial(clipped_by, way="the engine"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    resumed = functools.partial(resumed_by_the_loop, folder=str(folder / "saved"))
    length = functools.partial(resumed_length, folder=str(folder / "length"))
    parts = functools.partial(resumed_in_other_parts, folder=str(folder / "parts"))
    resuming = {"resumed": resumed, "resumed length": length, "resumed in parts": parts}
    return run_on_ranks(CASES | resuming, folder)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("skipped")])
def test_a_skipped_backward_leaves_no_gradient_behind(ranks, name):
    for found in result(ranks, name):
        assert found["left"] == 0
        assert found["finite"]
        assert found["applied"] == ("nan" not in name)
        assert not [text for text in found["texts"] if "zero_grad" in text]


def test_ranks_apply_the_same_rates_however_many_backwards_each_had(ranks):
    (first, long, short), (second, *_) = result(ranks, "uneven")
    assert long != pytest.approx(short, rel=0.05)
    assert torch.equal(first, second)


def test_micro_batches_of_another_size_make_the_same_batch(ranks):
    for found in result(ranks, "resumed in parts"):
        assert found == [(2, 2.0), (8, 8.0)] * 2


def test_windows_that_the_loop_ends_resume_at_another_length(ranks):
    for found in result(ranks, "resumed"):
        for loaded, steps, batch in found.values():
            assert loaded in ((4, 4), (2, 2))
            assert steps == 2
            assert batch == 2 * 2 * engines.MICRO_BATCH


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_an_optimizer_runs_and_says_that_it_measures_nothing(ranks, stage):
    for rank, (noise, shape, texts) in enumerate(result(ranks, f"no optimizer {stage}")):
        assert noise is None
        assert shape == (engines.MICRO_BATCH, 3)
        assert any("has no optimizer" in text for text in texts) == (rank == 0)


def test_sample_counts_that_are_not_one_each_are_refused(ranks):
    result(ranks, "counts")


@pytest.mark.parametrize("name", ["end, shortened", "end, advised"])
def test_the_last_window_can_be_shorter(ranks, name):
    for found in result(ranks, name):
        assert found["lengths"] == [3, 2]
        assert found["windows"] == [3, 2]
        assert found["steps"] == 3  # again, for data that would come
        assert not [text for text in found["texts"] if "no update" in text]


def test_micro_batches_that_no_update_took_are_told(ranks):
    first, _ = result(ranks, "end")
    assert first["windows"] == [3]
    (text,) = [text for text in first["texts"] if "in no update" in text]
    assert text.startswith("2 of 3 micro-batches")


def test_schedulers_that_count_samples_are_told_all_of_them(ranks):
    for told in result(ranks, "increments"):
        assert told == [2 * engines.MICRO_BATCH * steps for steps in (4, 2, 2, 2)]


def test_whoever_ends_windows_they_are_clipped_alike(ranks):
    for (weights, clipped), (same, _) in zip(
        result(ranks, "clipped by the loop"), result(ranks, "clipped by the engine"), strict=True
    ):
        assert clipped == [True] * 3
        torch.testing.assert_close(weights, same, rtol=0, atol=1e-7)


def test_sequences_that_are_spread_over_ranks_are_refused(ranks):
    result(ranks, "sequences")


def test_what_one_ranks_loop_does_is_told_there(ranks):
    (first, measured), (second, also) = result(ranks, "extra")
    assert measured == also == [False]
    assert not first
    (text,) = second
    assert text.startswith("rank 1: 3 backward passes in 2 calls of engine.step()")


def half_the_window(decision):
    """The square-root rule's factor at half the batch; see Malladi et al., arXiv 2205.10287."""
    noise = decision.noise.scale_lower / decision.batch
    return max(math.sqrt((1 + noise) / (1 + noise / 0.5)), 0.5)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("own ")])
def test_the_users_rate_is_for_the_windows_that_the_loop_makes(ranks, name):
    for used, decision, factor, restarted in result(ranks, name):
        usual, (short, *anew) = used[:12], used[12:]
        assert usual == [1e-3] * 12
        assert (decision.accumulation_steps, factor) == (4, 1.0)
        assert decision.batch == 4 * 2 * engines.MICRO_BATCH
        assert decision.noise.scale_lower > 0
        half = 1.0 if "advise" in name else half_the_window(decision)
        assert short == pytest.approx(1e-3 * half)
        assert anew == [1e-3] * 2
        assert restarted.batch == 2 * 2 * engines.MICRO_BATCH


def test_the_users_rate_stays_for_the_windows_that_were_saved(ranks):
    for (*usual, short), decision in result(ranks, "resumed length"):
        assert usual == [1e-3] * 2
        assert decision.batch == 4 * 2 * engines.MICRO_BATCH
        assert short == pytest.approx(1e-3 * half_the_window(decision))


@pytest.mark.parametrize("name", ["none in the first", "none in the second"])
def test_a_rank_without_a_backward_takes_part_in_the_window(ranks, name):
    one, other = result(ranks, name)
    assert torch.equal(one[3], other[3])
    for update, wanted, seen, _ in (one, other):
        torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-7)
        assert [window.norms.finite for window in seen] == [True, False, True][3 - len(seen) :]
        assert [window.micro_batches for window in seen] == [1] * len(seen)
        assert all(window.applied for window in seen)


@pytest.mark.parametrize("name", ["unseen auto", "unseen advise"])
def test_a_rank_whose_backward_was_not_seen_takes_part_in_the_window(ranks, name):
    (weights, seen, quiet), (same, _, texts) = result(ranks, name)
    assert torch.equal(weights, same)
    assert [index for index, window in enumerate(seen) if not window.norms.finite] == [22]
    assert len(seen) == 25
    assert not quiet
    assert sum("outside of engine.backward" in text for text in texts) == 1


CLEARED = [name for name, case in CASES.items() if getattr(case, "func", None) is cleared]


@pytest.mark.parametrize("name", [name for name in CLEARED if "hand" not in name])
def test_whatever_clears_gradients_inside_a_window_its_update_takes_all(ranks, name):
    for update, wanted, texts, measured in result(ranks, name):
        torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-6)
        assert sum("is passed over" in text for text in texts) == 1
        assert measured == [not ("twice" in name or "left out" in name)]


@pytest.mark.parametrize("name", [name for name in CLEARED if "hand" in name])
def test_gradients_that_are_thrown_away_by_hand_are_told(ranks, name):
    for rank, (_, _, texts, measured) in enumerate(result(ranks, name)):
        assert measured == [False]
        (text,) = texts
        assert text.startswith(f"rank {rank}: gradients were thrown away inside a window")


def test_gradients_that_are_thrown_away_before_a_step_are_told(ranks):
    for rank, (texts, measured) in enumerate(result(ranks, "thrown away late")):
        assert measured == [False]
        (text,) = texts
        assert text.startswith(f"rank {rank}: gradients were thrown away inside a window")


def test_a_parameter_that_thaws_inside_a_window_is_measured_from_then_on(ranks):
    model = build(torch.float32)
    params = [list(group["params"]) for group in engines.groups_of(model)]
    wanted = [0.0, 0.0]
    for rank in range(2):
        for index, batch in list(enumerate(batches_of(6, rank)))[4:]:
            grads = engines.micro_gradients(model, batch, torch.float32, params)
            if index == 4:
                grads[0] = grads[0][1:]  # still frozen
            wanted = [w + engines.squared(g) / 4 for w, g in zip(wanted, grads, strict=True)]
    for seen in result(ranks, "thawed inside"):
        assert seen == pytest.approx(wanted, rel=1e-5)


def test_the_configs_windows_are_what_its_rate_is_for(ranks):
    for used, decision in result(ranks, "short first"):
        assert used == [1e-3] * 12
        assert decision.batch == 4 * 2 * engines.MICRO_BATCH


def test_a_models_copy_clears_its_own_gradients(ranks):
    for cleared, kept, later in result(ranks, "copied"):
        assert all(cleared)
        assert all(kept)
        assert all(later)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_are_read_as_the_users_hooks_leave_them(ranks, stage, each):
    model = build(torch.float32)
    params = [list(group["params"]) for group in engines.groups_of(model)]
    grads = [
        engines.micro_gradients(model, batch, torch.float32, params)
        for rank in range(2)
        for batch in batches_of(2, rank)
    ]
    wanted = [sum(engines.squared(micro[i]) for micro in grads) / len(grads) / 100 for i in (0, 1)]
    for seen in result(ranks, f"hooked {stage} {each}"):
        assert seen == pytest.approx(wanted, rel=1e-5)


HARMLESS = (  # they keep them apart
    "cleared, boundary 2 optimizer",
    "cleared, unmanaged 3 engine",
    "cleared, sums in fp32 model",
)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cleared, ")])
def test_what_is_cleared_inside_a_window_of_the_loops_own_is_told(ranks, name):
    for texts, measured in result(ranks, name):
        assert measured == [name in HARMLESS, True]
        thrown = [text for text in texts if "were thrown away inside a window" in text]
        assert len(thrown) == (name not in HARMLESS)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("edited", "set "))])
def test_gradients_that_are_edited_before_their_step_are_told(ranks, name):
    for rank, (texts, measured, restored) in enumerate(result(ranks, name)):
        first = name == "edited at first"
        assert measured == [not first, first, True]
        (text,) = texts
        assert text.startswith(f"rank {rank}: gradients were edited between")
        assert restored


@pytest.mark.parametrize("name", ["spent", *(f"looked at {stage}" for stage in range(4))])
def test_what_leaves_gradients_as_they_are_used_is_not_told(ranks, name):
    for texts, measured, _ in result(ranks, name):
        assert measured == [True] * 3
        assert not texts


@pytest.mark.parametrize("by", ["a constant", "two", "the length"])
def test_a_loop_that_divides_its_losses_is_told_once_windows_change(ranks, by):
    (texts, _), (others, _) = result(ranks, f"divided by {by}")
    told = [text for text in texts if "updates are 2 times what they should be" in text]
    assert len(told) == (by != "two")
    assert not others


def test_losses_that_the_loop_divides_are_told_whole(ranks):
    runs = result(ranks, "divided by its own")
    wanted = [sum(means) / 2 for means in zip(*(mean for _, mean in runs), strict=True)]
    for told, _ in runs:
        assert told == pytest.approx(wanted, rel=1e-5)
