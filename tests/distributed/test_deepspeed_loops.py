"""DeepSpeed on two real ranks: checkpoints, schedules, and loops that do things their own way."""

import csv
import functools
import os
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch

from noiseopt.control import Rates
from noiseopt.control.clipping import MIN_COUNT
from tests.distributed import engines
from tests.distributed.engines import (
    MEASURED,
    Warnings,
    batches_of,
    config_of,
    engine_of,
    run,
)
from tests.distributed.ranks import result, run_on_ranks
from tests.distributed.test_deepspeed import (
    CONSTANT,
    DYNAMIC,
    FP32_SUMS,
    OFFLOAD,
    wide,
    worst_norm,
)
from tests.integrations.offline import Written
from tests.optim.helpers import GROWING, loss_of

pytestmark = pytest.mark.distributed

STAGES = (0, 1, 2, 3)
OWN_LENGTHS = (3, 3, 2)
BATCHES, SAVED_AT = 120, 60
ADAPTIVE = {"noise": GROWING | {"decision_interval": 2}, "lr": 1e-2, "gradient_clipping": 10.0}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 1000, "warmup_type": "linear"}}
FALLING = {
    "type": "WarmupDecayLR",
    "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-2, "total_num_steps": 200},
}
LEARNED = MIN_COUNT + 8  # updates after which the clipping threshold is known
LATE = ADAPTIVE | {
    "noise": ADAPTIVE["noise"] | {"dwell_updates": MIN_COUNT, "max_accumulation_steps": 3},
    "scheduler": FALLING,
    "steps": 2,
}
LATE_BATCHES = 2 * LEARNED + 90
SHORT = {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 1e-2}}


def step(engine, batch):
    engine.backward(loss_of(engine, batch))
    engine.step()


def facts(engine):
    return {
        "decisions": engine.noise_aware.decisions,
        "weights": engines.weights_of(engine),
        "windows": [w for d in engine.noise_aware.decisions for w in d.windows],
        "steps": engine.gradient_accumulation_steps(),
        "batch": engine.train_batch_size(),
        "since_tick": since_tick(engine),
        "clip": (engine.gradient_clipping(), getattr(engine.optimizer, "clip_grad", None)),
    }


# ------------------------------------------------------------------ checkpoints


def resumed_run(rank, folder, late=False, client=False, **settings):
    """One run, and one that goes on from its checkpoint in another engine.

    Args:
        late: whether it is saved after the clipping threshold was learned, and inside a tick.
        client: whether the optimizer is torch's own, offloaded.
    """
    engines.set_up(rank)
    config = config_of(**{"scheduler": SHORT} | (LATE if late else ADAPTIVE) | settings)
    if client:
        config = engines.merged(config, {"optimizer": None, **OFFLOAD})
    batches = batches_of(LATE_BATCHES if late else BATCHES, rank)
    with resumable(config, client) as engine:
        at = 0
        while not (engine.was_step_applied() and due(engine, at, late)):
            step(engine, cast(engine, batches[at]))
            at += 1
        engine.save_checkpoint(folder, client_state={"mine": 3})
        saved = facts(engine)
        run(engine, batches[at:])
        whole = facts(engine)
    with resumable(config, client) as engine:
        path, state = engine.load_checkpoint(folder)
        loaded = facts(engine)
        run(engine, batches[at:])
        ended = facts(engine)
    return {
        "whole": whole,
        "ended": ended,
        "saved": saved,
        "loaded": loaded,
        "state": state,
        "found": path is not None,
    }


def resumable(config, client):
    net = engines.build(torch.float32)
    optimizer = torch.optim.AdamW(engines.groups_of(net), lr=1e-2) if client else None
    return engine_of(config, net, optimizer)


def due(engine, at, late):
    """Whether a run is to be saved here."""
    if not late:
        return at >= SAVED_AT
    return engine.noise_aware.num_updates > LEARNED and since_tick(engine) > 0


def since_tick(engine):
    return engine.noise_aware._control.state_dict()["since_tick"]  # the window may be open


def cast(engine, batch):
    return tuple(part.to(engines.dtype_of(engine)) for part in batch)


def plain_load(rank, stage, folder):
    """A checkpoint of DeepSpeed alone, after five updates: how many Adam's moments hold by us."""
    engines.set_up(rank)
    with engine_of(config_of(stage=stage, noise_aware={"enabled": False})) as engine:
        for batch in batches_of(5, rank):
            step(engine, batch)
        engine.save_checkpoint(folder)
    with engine_of(config_of(stage=stage, **ADAPTIVE)) as engine:
        engine.load_checkpoint(folder)
        loaded = engine.noise_aware.state_dict()["control"]["second_moments"]
        step(engine, batches_of(1, rank)[0])
        went_on = engine.noise_aware.state_dict()["control"]["second_moments"]
    return [[group["second_moment_updates"] for group in each] for each in (loaded, went_on)]


def other_loads(rank, folder):
    """What is loaded without the optimizer's state, and into an engine that has no section."""
    engines.set_up(rank)
    batches = batches_of(40, rank)
    with engine_of(config_of(stage=1, **ADAPTIVE)) as engine:
        run(engine, batches)
        engine.save_checkpoint(folder)
    with engine_of(config_of(stage=1, **ADAPTIVE)) as engine:
        engine.load_checkpoint(folder, load_module_only=True)
        fresh = engine.noise_aware.num_updates, engine.gradient_accumulation_steps()
    with engine_of(config_of(stage=1, noise_aware={"enabled": False})) as engine:
        engine.load_checkpoint(folder)
        plain = engine.noise_aware is None
        engine.save_checkpoint(f"{folder}/plain")
    with engine_of(config_of(stage=1, **ADAPTIVE)) as engine:
        engine.load_checkpoint(f"{folder}/plain")
        from_plain = engine.noise_aware.num_updates
        run(engine, batches)
        went_on = engine.noise_aware.num_updates
    return fresh, plain, from_plain, went_on


def loaded_by_others(rank, folder, **settings):
    """Saved with a learned clipping threshold, at first in vain; loaded without the section."""
    engines.set_up(rank)
    config = config_of(**ADAPTIVE, **settings)
    with engine_of(config) as engine:
        step(engine, cast(engine, batches_of(1, rank)[0]))
        engine.noise_aware._control.set_max_norm(0.5)
        before = facts(engine)["clip"]
        with pytest.raises(ValueError, match="save_dir"):
            engine.save_checkpoint("")
        engine.save_checkpoint(folder)
        after = facts(engine)["clip"]
    with engine_of(config | {"noise_aware": {"enabled": False}}) as engine:
        built = engine.gradient_clipping(), getattr(engine.optimizer, "clip_grad", None)
        engine.load_checkpoint(folder)
        loaded = engine.gradient_clipping(), getattr(engine.optimizer, "clip_grad", None)
    return before, after, built, loaded


# ------------------------------------------------------------------ schedules


def scheduled_run(rank, schedule):
    engines.set_up(rank)
    noise = MEASURED | {"schedule": schedule}
    with (
        Warnings() as texts,
        engine_of(config_of(steps=2, noise=noise, scheduler=WARMUP)) as engine,
    ):
        rates = []
        engine.noise_aware.add_observer(lambda decision: rates.append(decision.lr))
        lengths = run(engine, batches_of(21, rank), (4, 1, 1, 4, 3, 6))
        return {
            "lengths": lengths,
            "ticks": engine.lr_scheduler.last_batch_iteration + 1,
            "rates": rates,
            "texts": texts,
        }


# ------------------------------------------------------------------ loops of their own


def owned_run(rank, way, stage):
    """A loop that says itself where windows of three end."""
    engines.set_up(rank)
    more = {"managed_gradient_accumulation": False} if way == "unmanaged" else {}
    steps = 3 if way in ("boundary", "unmanaged") else 1
    more |= {"noise": GROWING, "lr": 1e-2, "gradient_clipping": 10.0, "scheduler": WARMUP}
    config = config_of(stage, steps=steps, **more)
    with Warnings() as texts, engine_of(config) as engine:
        contexts = {"no_sync": engine.no_sync, "coalesce": engine.coalesce_grad_reduction}
        batches = batches_of(90, rank)
        for at in range(0, len(batches), 3):
            own_window(engine, way, batches[at : at + 3], contexts.get(way, nullcontext))
        updates, ticks = (
            engine.noise_aware.num_updates,
            engine.lr_scheduler.last_batch_iteration + 1,
        )
        return facts(engine) | {"texts": texts, "updates": updates, "ticks": ticks}


def own_window(engine, way, batches, context):
    *first, last = batches
    if way == "coalesce":
        with context():
            for batch in batches:
                engine.backward(loss_of(engine, batch))
        engine.step()
        return
    with context():
        for batch in first:
            if way == "boundary":
                engine.set_gradient_accumulation_boundary(False)
            engine.backward(loss_of(engine, batch))
    if way == "boundary":
        engine.set_gradient_accumulation_boundary(True)
    step(engine, last)


def owned_norms(rank, way, stage):
    """Windows of three and of two that a loop ends, at weights that stay where they are."""
    engines.set_up(rank)
    more = {"managed_gradient_accumulation": False} if way == "unmanaged" else {}
    steps = 3 if way in ("boundary", "unmanaged") else 1
    config = config_of(stage, steps=steps, lr=CONSTANT, gradient_clipping=0.0, **more)
    with engine_of(config, wide()) as engine:
        contexts = {"no_sync": engine.no_sync, "coalesce": engine.coalesce_grad_reduction}
        batches = iter(batches_of(sum(OWN_LENGTHS), rank))
        for length in OWN_LENGTHS:
            window = list(islice(batches, length))
            own_window(engine, way, window, contexts.get(way, nullcontext))
        return facts(engine)["windows"]


def late_owner(rank):
    """A loop that says where windows end after the engine has changed them."""
    engines.set_up(rank)
    with engine_of(config_of(steps=1)) as engine:
        run(engine, batches_of(3, rank), (2, 2))
        with pytest.raises(RuntimeError, match=r"set_gradient_accumulation_boundary.*first one on"):
            engine.set_gradient_accumulation_boundary(True)


def twice_backward(rank, stage):
    """Two backwards in one step."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(stage=stage)) as engine:
        one, other, last = batches_of(3, rank)
        engine.backward(loss_of(engine, one))
        if stage in (1, 2):
            with pytest.raises(RuntimeError, match="2 backward passes in 1 calls"):
                step(engine, other)
            return None
        step(engine, other)
        step(engine, last)
        return facts(engine)["windows"], texts


def direct_backward(rank, stage):
    """A backward that the engine is not told of."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(stage=stage, steps=2)) as engine:
        one, other, *rest = batches_of(4, rank)
        loss_of(engine, one).backward()
        engine.step()
        step(engine, other)
        run(engine, rest)
        return facts(engine)["windows"], texts


def clearing_run(rank, stage, clears):
    """A loop ported from plain torch, which clears gradients after every micro-batch."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(stage=stage, steps=2)) as engine:
        for batch in batches_of(5, rank):
            step(engine, batch)
            if clears == "engine":
                engine.zero_grad()
            elif clears == "optimizer":
                engine.optimizer.zero_grad()
        return facts(engine), texts, engine.noise_aware.taken


def thrown_away(rank, stage):
    """A gradient that the loop throws away before its step, which DeepSpeed lets it do."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(stage=stage)) as engine:
        bad, good = batches_of(2, rank)
        engine.backward(loss_of(engine, bad))
        engine.zero_grad()
        gone = all(param.grad is None for param in engine.module.parameters())
        step(engine, good)
        return gone, texts


def used_twice(rank, stage):
    """A layer inside and outside of a reentrant checkpoint: its gradient comes in two parts."""
    from tests.distributed.test_deepspeed import UsedTwice

    engines.set_up(rank)
    with (
        Warnings() as texts,
        engine_of(config_of(stage=stage), UsedTwice(reentrant=True)) as engine,
    ):
        run(engine, batches_of(3, rank))
        return facts(engine)["windows"], texts


def counted(rank):
    """Samples that the loop tells of, for the estimate: the engine weighs micro-batches alike."""
    engines.set_up(rank)
    with engine_of(config_of(steps=2)) as engine:
        for samples, batch in zip((4, 2, 4, 1), batches_of(4, rank), strict=True):
            engine.noise_aware.set_samples(samples)
            step(engine, batch)
        return facts(engine)["windows"]


def differing(rank):
    """Ranks whose settings differ."""
    engines.set_up(rank)
    noise = MEASURED | {"confidence": 0.9 + 0.05 * rank}
    disagree = pytest.raises(RuntimeError, match=r"disagree on what they start from.*settings")
    with engine_of(config_of(noise=noise)) as engine, disagree:
        step(engine, batches_of(1, rank)[0])


def differing_betas(rank):
    """As JSON has them, in a list."""
    engines.set_up(rank)
    config = config_of(optimizer={"params": {"betas": [0.9, 0.99 + 0.005 * rank]}})
    with engine_of(config) as engine, pytest.raises(RuntimeError, match="disagree") as caught:
        step(engine, batches_of(1, rank)[0])
    return str(caught.value)


# ------------------------------------------------------------------ nothing is changed by watching


def usual(engine, batches):
    for batch in batches:
        step(engine, cast(engine, batch))


def twice_in_a_step(engine, batches):
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        engine.backward(loss_of(engine, one))
        step(engine, other)


def again_through_a_graph(engine, batches):
    for batch in batches:
        loss = loss_of(engine, batch)
        engine.backward(loss, retain_graph=True)
        engine.backward(loss)
        engine.step()


def with_a_penalty(engine, batches):
    for inputs, targets in batches:
        inputs.requires_grad_()
        outputs = engine.module(inputs)
        (slopes,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        engine.backward((outputs - targets).square().mean() + slopes.square().mean())
        engine.step()


def with_own_batches(engine, batches):
    for index, batch in enumerate(batches):
        if engine.was_step_applied():
            engine.micro_steps = 0
            engine.set_train_batch_size(2 * engines.MICRO_BATCH * (1 + index % 3))
        step(engine, batch)


LOOPS = {
    "usual": usual,
    "twice in a step": twice_in_a_step,
    "again through a graph": again_through_a_graph,
    "with a penalty": with_a_penalty,
    "with own batches": with_own_batches,
}


def advised(rank, stage, bf16=False, loop="usual"):
    """Weights and rates with mode "advise", and those of DeepSpeed alone."""
    deepspeed = engines.set_up(rank)
    noise = {"mode": "advise", "decision_interval": 1}
    config = config_of(stage, bf16, steps=2, noise=noise, scheduler=WARMUP)
    params = {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}
    theirs = engines.merged(config, {"optimizer": {"type": "AdamW", "params": params}})
    found = []
    for build_engine, settings in ((initialize_ours, config), (deepspeed.initialize, theirs)):
        net = engines.build(torch.float32)
        engine, *_ = build_engine(
            model=net, config=settings, model_parameters=engines.groups_of(net)
        )
        LOOPS[loop](engine, batches_of(12, rank))
        weights = engines.weights_of(engine)
        found.append((weights, engine.get_lr(), engine.global_steps, engine.train_batch_size()))
        engine.destroy()
    (ours, *rest), (alone, *wanted) = found
    return torch.equal(ours, alone), rest == wanted, rest[1]


def initialize_ours(**arguments):
    from noiseopt.integrations.deepspeed import initialize

    return initialize(**arguments)


# ------------------------------------------------------------------ what goes wrong in a window


def loaded_inside(rank, folder):
    """A checkpoint that is loaded inside a window."""
    engines.set_up(rank)
    with engine_of(config_of(stage=1, steps=2)) as engine:
        run(engine, batches_of(2, rank))
        engine.save_checkpoint(folder)
        step(engine, batches_of(1, rank)[0])
        before = engines.weights_of(engine)
        with pytest.raises(RuntimeError, match="after 1 of 2 micro-batches"):
            engine.load_checkpoint(folder)
        same = torch.equal(before, engines.weights_of(engine))
        step(engine, batches_of(1, rank)[0])
        engine.load_checkpoint(folder)
        return same, engine.noise_aware.num_updates


def saved_inside(rank, folder):
    """Checkpoints that are saved inside a window: what is warned of."""
    engines.set_up(rank)
    with engines.Warnings() as warned, engine_of(config_of(stage=1, steps=4)) as engine:
        step(engine, batches_of(1, rank)[0])
        engine.save_checkpoint(folder)
        step(engine, batches_of(1, rank)[0])
        engine.save_checkpoint(folder)
    return [text for text in warned if "inside a window" in text]


def observed(rank):
    """An observer that raises on one rank, in a loop that goes on."""
    engines.set_up(rank)
    with engine_of(config_of(steps=2)) as engine:
        raised = []

        def fail(decision):
            if rank == 0 and decision.num_updates == 1:
                raise OSError("disk full")

        engine.noise_aware.add_observer(fail)
        applied = []
        for batch in batches_of(8, rank):
            try:
                step(engine, batch)
            except OSError as error:
                raised.append(str(error))
            applied.append(engine.was_step_applied())
        return raised, applied, engines.weights_of(engine)


def unfrozen(rank):
    """A layer that is unfrozen later, without ZeRO; and one that never was frozen."""
    engines.set_up(rank)
    seen = []
    for freeze in (True, False):
        net = engines.build(torch.float32)
        params = [{"params": [p]} for p in net.parameters()]
        net[0].requires_grad_(not freeze)
        optimizer = torch.optim.AdamW(params, lr=1e-9)
        with engine_of(config_of(optimizer=None), net, optimizer) as engine:
            run(engine, batches_of(1, rank))
            net[0].requires_grad_(True)
            run(engine, batches_of(2, rank)[1:])
            seen.append([w.norms.small_sq for w in facts(engine)["windows"]])
    return seen


def direct_only(rank):
    """A loop that never calls engine.backward."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config_of(stage=2)) as engine:
        for batch in batches_of(3, rank):
            loss_of(engine, batch).backward()
            engine.step()
        return engine.global_steps, engine.noise_aware.decisions, texts


def own_sizes(rank):
    """A user who sets the batch, which is decided, or the micro-batch, which is counted."""
    engines.set_up(rank)
    with engine_of(config_of()) as engine:
        with pytest.raises(RuntimeError, match="max_accumulation_steps"):
            engine.set_train_batch_size(16)
        with pytest.raises(RuntimeError, match=r"4\.0 samples.*set_samples"):
            engine.set_train_micro_batch_size(8)
        engine.noise_aware.set_samples(8)
        engine.set_train_micro_batch_size(8)
        return engine.train_batch_size()


class Counting:
    """A scheduler of Megatron's kind, which is told by how many samples to advance."""

    def __init__(self):
        self.told = []

    def step(self, increment):
        self.told.append(increment)


def told_samples(rank):
    engines.set_up(rank)
    with engine_of(config_of(steps=2), lr_scheduler=Counting()) as engine:
        run(engine, batches_of(9, rank), (3, 4))
        return engine.lr_scheduler.told


# ------------------------------------------------------------------ events


def monitored(rank, folder):
    """Decisions go to the writers that the config opens."""
    engines.set_up(rank)
    writer = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    with engine_of(config_of(csv_monitor=writer)) as engine:
        run(engine, batches_of(4, rank), (2,))
        return engine.noise_aware.metrics(), engine.global_samples


def drawn(rank, folder):
    """The same to TensorBoard."""
    engines.set_up(rank)
    writer = {"enabled": True, "output_path": folder, "job_name": "job"}
    with engine_of(config_of(tensorboard=writer)) as engine:
        run(engine, batches_of(4, rank), (2,))
        return engine.noise_aware.metrics(), engine.global_samples


def logged(rank, folder):
    """The same to the wandb run that the config opens."""
    engines.set_up(rank)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
    Path(folder).mkdir(exist_ok=True)
    with engine_of(config_of(wandb={"enabled": True, "project": "p"})) as engine:
        run(engine, batches_of(4, rank), (2,))
        if rank == 0:
            import wandb

            wandb.finish()
        return engine.noise_aware.metrics(), engine.global_samples


WAYS = {"boundary": STAGES, "unmanaged": STAGES, "no_sync": (0,), "coalesce": (1, 2, 3)}
CASES = {
    **{f"resumed {s}": (resumed_run, {"stage": s}) for s in STAGES},
    **{f"resumed {s} bf16": (resumed_run, {"stage": s, "bf16": True}) for s in STAGES},
    "resumed 0 late": (resumed_run, {"stage": 0, "late": True}),
    "resumed 1 fp32 sums late": (
        resumed_run,
        {"stage": 1, "bf16": True, "late": True, **FP32_SUMS},
    ),
    "resumed 2 fp32 sums": (resumed_run, {"stage": 2, "bf16": True, **FP32_SUMS}),
    **{f"resumed {s} fp16": (resumed_run, {"stage": s, "fp16": DYNAMIC}) for s in (1, 2, 3)},
    **{f"resumed {s} offload": (resumed_run, {"stage": s, "client": True}) for s in (2, 3)},
    "other loads": (other_loads, {}),
    **{f"plain load {s}": (plain_load, {"stage": s}) for s in STAGES},
    **{f"others {s}": (loaded_by_others, {"stage": s}) for s in STAGES},
    "others 2 bf16": (loaded_by_others, {"stage": 2, "bf16": True}),
    "others 1 fp32 sums": (loaded_by_others, {"stage": 1, "bf16": True, **FP32_SUMS}),
    **{f"schedule {word}": (scheduled_run, {"schedule": word}) for word in ("samples", "updates")},
    **{f"boundary {s}": (owned_run, {"way": "boundary", "stage": s}) for s in STAGES},
    **{f"unmanaged {s}": (owned_run, {"way": "unmanaged", "stage": s}) for s in STAGES},
    **{f"no_sync {s}": (owned_run, {"way": "no_sync", "stage": s}) for s in (0,)},
    **{f"coalesce {s}": (owned_run, {"way": "coalesce", "stage": s}) for s in (1, 2, 3)},
    **{
        f"norms, {way} {s}": (owned_norms, {"way": way, "stage": s})
        for way, stages in WAYS.items()
        for s in stages
    },
    "late owner": (late_owner, {}),
    **{f"twice {s}": (twice_backward, {"stage": s}) for s in STAGES},
    **{f"direct {s}": (direct_backward, {"stage": s}) for s in (1, 2, 3)},
    **{f"used twice {s}": (used_twice, {"stage": s}) for s in (0, 1)},
    **{
        f"clearing {s} {clears}": (clearing_run, {"stage": s, "clears": clears})
        for s in (0, 1, 3)
        for clears in ("never", "engine", "optimizer")
    },
    "thrown away": (thrown_away, {"stage": 0}),
    "counted": (counted, {}),
    "differing": (differing, {}),
    "differing betas": (differing_betas, {}),
    **{f"advised {s}": (advised, {"stage": s}) for s in STAGES},
    **{f"advised {s} bf16": (advised, {"stage": s, "bf16": True}) for s in STAGES},
    **{f"advised {loop}": (advised, {"stage": 0, "loop": loop}) for loop in LOOPS},
    "advised own batches": (advised, {"stage": 2, "loop": "with own batches"}),
    "loaded inside": (loaded_inside, {}),
    "saved inside": (saved_inside, {}),
    "observed": (observed, {}),
    "unfrozen": (unfrozen, {}),
    "direct only": (direct_only, {}),
    "own sizes": (own_sizes, {}),
    "told samples": (told_samples, {}),
    "monitored": (monitored, {}),
    "drawn": (drawn, {}),
    "logged": (logged, {}),
}
OWNED = [name for name, (case, _) in CASES.items() if case is owned_run]
IN_FOLDERS = (resumed_run, loaded_inside, saved_inside, other_loads, plain_load)
IN_FOLDERS += (loaded_by_others, monitored, drawn, logged)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module")
def ranks(folders, tmp_path_factory):
    cases = {
        name: functools.partial(
            case, **settings, **({"folder": str(folders / name)} if case in IN_FOLDERS else {})
        )
        for name, (case, settings) in CASES.items()
    }
    return run_on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("resumed")])
def test_a_resumed_run_decides_and_ends_as_one_that_never_stopped(ranks, name):
    for run_ in result(ranks, name):
        whole, ended = run_["whole"], run_["ended"]
        assert run_["found"]
        assert run_["state"] == {"mine": 3} | {
            k: v for k, v in run_["state"].items() if k != "mine"
        }
        assert "noise_aware" not in run_["state"]
        for key in ("steps", "batch", "clip", "since_tick"):
            assert run_["loaded"][key] == run_["saved"][key]
            assert ended[key] == whole[key]
        after = ended["decisions"]
        assert len(after) > 5
        # The first decision rests on windows from before the checkpoint too.
        assert strip(whole["decisions"][-len(after) :]) == strip(after)
        assert max(d.accumulation_steps for d in after) > 1
        if "late" in name:
            assert run_["saved"]["since_tick"] > 0
            assert run_["saved"]["clip"][0] < ADAPTIVE["gradient_clipping"] / 2
        torch.testing.assert_close(ended["weights"], whole["weights"], rtol=0, atol=0)


def strip(decisions):
    return [str(decision).split(", windows=")[0] for decision in decisions]


def test_without_the_optimizers_state_measuring_starts_anew(ranks):
    for fresh, plain, from_plain, went_on in result(ranks, "other loads"):
        assert fresh == (0, 1)
        assert plain
        assert (from_plain, went_on > 0) == (0, True)


@pytest.mark.parametrize("stage", STAGES)
def test_adams_updates_before_the_section_was_switched_on_are_counted(ranks, stage):
    for loaded, went_on in result(ranks, f"plain load {stage}"):
        assert loaded == [5, 5]
        assert went_on == [6, 6]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("others")])
def test_a_learned_clipping_threshold_does_not_reach_engines_without_the_section(ranks, name):
    for before, after, built, loaded in result(ranks, name):
        assert before[0] == 0.5
        assert after == before
        assert built[0] == ADAPTIVE["gradient_clipping"]
        assert loaded == built


def test_a_schedule_follows_the_samples(ranks):
    one, _ = result(ranks, "schedule samples")
    assert one["lengths"] == [2, 4, 1, 1, 4, 3, 6]
    assert one["ticks"] == sum(one["lengths"]) // 2
    assert not one["texts"]
    assert one["rates"] == sorted(one["rates"])


def test_a_schedule_that_counts_updates_is_warned_of(ranks):
    one, other = result(ranks, "schedule updates")
    assert one["ticks"] == len(one["lengths"])
    assert sum("it stretches" in text for text in one["texts"]) == 1
    assert not other["texts"]


@pytest.mark.parametrize("name", OWNED)
def test_a_loop_that_ends_windows_itself_keeps_them(ranks, name):
    one, other = result(ranks, name)
    assert repr(one["decisions"]) == repr(other["decisions"])
    assert one["updates"] == one["ticks"] == 30
    assert all(window.micro_batches == 3 for window in one["windows"])
    assert all(decision.accumulation_steps == 3 for decision in one["decisions"])
    assert all(decision.rates == Rates() for decision in one["decisions"])
    assert one["decisions"][-1].noise is not None
    assert sum("leaves them as they are" in text for text in one["texts"]) == 1


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("norms, ")])
def test_norms_of_windows_that_a_loop_ends_are_those_of_plain_pytorch(ranks, name):
    streams = [batches_of(sum(OWN_LENGTHS), rank) for rank in range(2)]
    still = functools.partial(torch.optim.SGD, lr=0.0)
    norms, _ = engines.plain_run(OWN_LENGTHS, streams, wide(), torch.float32, still)
    if name.startswith(("norms, no_sync", "norms, coalesce")):  # whose update takes the sum
        norms = [
            tuple([length**2 * number for number in each] for each in window)
            for length, window in zip(OWN_LENGTHS, norms, strict=True)
        ]
    for windows in result(ranks, name):
        assert [window.micro_batches for window in windows] == [*OWN_LENGTHS]
        assert worst_norm(windows, norms) < 1e-6


def test_windows_are_not_left_to_the_loop_once_they_have_changed(ranks):
    result(ranks, "late owner")


@pytest.mark.parametrize("stage", STAGES)
def test_two_backwards_in_a_step_are_refused_where_one_is_lost(ranks, stage):
    one, _ = result(ranks, f"twice {stage}")
    if stage in (0, 3):
        (first, second), texts = one
        assert first.applied
        assert not first.norms.finite
        assert second.norms.finite
        assert sum("2 backward passes in 1 calls" in text for text in texts) == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_backward_that_was_not_seen_is_not_measured(ranks, stage):
    (first, second), texts = result(ranks, f"direct {stage}")[0]
    assert not first.norms.finite
    assert second.norms.finite
    assert sum("outside of engine.backward" in text for text in texts) == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_in_two_parts_is_not_measured(ranks, stage):
    for windows, texts in result(ranks, f"used twice {stage}"):
        assert len(windows) == 3
        assert sum("came in parts" in text for text in texts) == 1
        assert all(window.applied for window in windows)
        assert not any(window.norms and window.norms.finite for window in windows)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("clears", ["engine", "optimizer"])
def test_gradients_that_are_cleared_inside_a_window_are_kept(ranks, stage, clears):
    for (kept, _, _), (seen, texts, taken) in zip(
        result(ranks, f"clearing {stage} never"),
        result(ranks, f"clearing {stage} {clears}"),
        strict=True,
    ):
        torch.testing.assert_close(seen["weights"], kept["weights"], rtol=0, atol=0)
        assert seen["decisions"] == kept["decisions"]
        assert taken == 1
        assert sum("zero_grad" in text for text in texts) <= 1
    told = result(ranks, f"clearing {stage} {clears}")[0][1]
    assert "throw away the window's earlier micro-batches" in told[0]


def test_a_gradient_may_be_thrown_away_before_its_step(ranks):
    for gone, texts in result(ranks, "thrown away"):
        assert gone
        assert not any("zero_grad" in text for text in texts)


def test_samples_may_be_told(ranks):
    for windows in result(ranks, "counted"):
        assert [window.norms.samples for window in windows] == [12, 10]


def test_ranks_with_other_settings_stop(ranks):
    result(ranks, "differing")
    for message in result(ranks, "differing betas"):
        assert "betas of group 0: [(0.9, 0.99), (0.9, 0.995)]" in message


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("advised")])
def test_watching_changes_no_bit(ranks, name):
    for same_weights, same_rest, updates in result(ranks, name):
        assert same_weights
        assert same_rest
        assert updates > 2


def test_a_checkpoint_is_not_loaded_into_an_open_window(ranks):
    assert result(ranks, "loaded inside") == [(True, 1), (True, 1)]


def test_a_checkpoint_saved_inside_a_window_is_warned_of_once(ranks):
    first, second = result(ranks, "saved inside")
    assert len(first) == 1
    assert "after 1 of 4 micro-batches" in first[0]
    assert second == []


def test_an_observer_that_raises_leaves_the_windows_as_they_are(ranks):
    one, other = result(ranks, "observed")
    assert one[0] == ["disk full"]
    assert other[0] == []
    assert one[1] == other[1] == [False, True] * 4
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=0)


def test_a_parameter_that_is_unfrozen_is_measured_from_then_on(ranks):
    for frozen_first, never_frozen in result(ranks, "unfrozen"):
        assert frozen_first[0][:2] == (0.0, 0.0)
        assert frozen_first[1] == pytest.approx(never_frozen[1], rel=1e-6)


def test_a_loop_that_never_calls_the_engines_backward_is_told(ranks):
    (updates, decisions, texts), _ = result(ranks, "direct only")
    assert (updates, decisions) == (3, ())
    assert sum("outside of engine.backward" in text for text in texts) == 1


def test_the_users_own_sizes_are_refused_where_they_would_be_overruled(ranks):
    assert result(ranks, "own sizes") == [16, 16]


def test_a_scheduler_that_counts_samples_is_told_them(ranks):
    assert result(ranks, "told samples") == [[16, 24, 32]] * 2


def test_decisions_go_to_the_engines_monitor(ranks, folders):
    (metrics, samples), _ = result(ranks, "monitored")
    for name, value in metrics.items():
        path = folders / "monitored" / "job" / f"{name.replace('/', '_')}.csv"
        rows = list(csv.reader(path.read_text().splitlines()))
        assert rows[0] == ["step", name.split("/")[-1]]
        assert (int(rows[-1][0]), float(rows[-1][1])) == (samples, pytest.approx(value))


def test_decisions_go_to_tensorboard(ranks, folders):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (metrics, samples), _ = result(ranks, "drawn")
    events = EventAccumulator(str(folders / "drawn" / "job")).Reload()
    for name, value in metrics.items():
        last = events.Scalars(name)[-1]
        assert (last.step, last.value) == (samples, pytest.approx(value, nan_ok=True))


def test_decisions_go_to_the_wandb_run_that_the_config_opens(ranks, folders):
    (metrics, samples), _ = result(ranks, "logged")
    row = Written(folders / "logged").rows[-1]
    assert row["_step"] == samples
    assert row["Train/Samples/lr"] == 1e-3
    assert {name: row[name] for name in metrics} == pytest.approx(metrics)
