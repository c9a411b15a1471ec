"""DeepSpeed on two real ranks: what is measured, how windows change, and what the weights become.

The oracle is plain PyTorch in one process, which takes all ranks' micro-batches.
"""

import functools
import math
from unittest.mock import patch

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from noiseopt.control.clipping import MIN_COUNT
from tests.distributed import engines
from tests.distributed.engines import batches_of, config_of, engine_of, merged, run
from tests.distributed.ranks import RANKS, assert_rarely_measured, result, run_on_ranks
from tests.optim.helpers import GROWING, build, loss_of

pytestmark = pytest.mark.distributed

FIRST, PLAN = 2, (3, 1, 4, 2)
LENGTHS = [FIRST, *PLAN]
STAGES = (0, 1, 2, 3)
OLD_TORCH = Version(torch.__version__) < Version("2.7")  # which loses a hook in checkpoints
CONSTANT = 1e-9  # a rate that leaves the weights where they are
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 1000, "warmup_type": "linear"}}
LENT = ("lr", "betas", "weight_decay")
NAN_AT, ADAPTIVE = 4, 440
CEILING = 10.0
TO_CPU = {"device": "cpu"}
OFFLOAD = {"zero_optimization": {"offload_optimizer": TO_CPU}, "zero_force_ds_cpu_optimizer": False}


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))


class Tied(nn.Module):
    """Two layers that share a weight, a frozen one, and one that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.frozen, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.second(torch.tanh(self.frozen(self.first(x)))))


class Checkpointed(nn.Module):
    """A model whose first layers are computed again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers, self.reentrant = wide(), reentrant

    def forward(self, x):
        hidden = checkpoint(self.layers[:2], x.requires_grad_(), use_reentrant=self.reentrant)
        return self.layers[2](hidden)


class UsedTwice(Checkpointed):
    """A layer that is used inside and outside of a checkpoint."""

    def forward(self, x):
        return super().forward(x) + self.layers(x)


class Words(nn.Module):
    """A table of words, whose gradients may be sparse."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(12, 6, sparse=sparse), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.words((x[:, 0].abs() * 12).long() % 12))


MODELS = {
    "wide": wide,
    "tied": Tied,
    "checkpointed": functools.partial(Checkpointed, False),
    "reentrant": functools.partial(Checkpointed, True),
}


def windows_of(engine):
    return [window for decision in engine.noise_aware.decisions for window in decision.windows]


def seen(engine, lengths):
    return {
        "lengths": lengths,
        "windows": windows_of(engine),
        "decisions": engine.noise_aware.decisions,
        "weights": engines.weights_of(engine),
        "wrapper": type(engine.optimizer).__name__,
        "batch": engine.train_batch_size(),
    }


def measured_run(rank, model="wide", client=False, scale=None, plan=PLAN, **settings):
    engines.set_up(rank)
    net, optimizer = MODELS[model](), None
    config = config_of(steps=FIRST, **settings)
    if client:
        optimizer = AdamW(engines.groups_of(net), lr=config["optimizer"]["params"]["lr"])
        config = merged(config, {"optimizer": None, **OFFLOAD})
    with engine_of(config, net, optimizer) as engine:
        if scale:
            engine.optimizer.override_loss_scale(scale)
        return seen(engine, run(engine, batches_of(sum(LENGTHS), rank), plan))


def words_run(rank, sparse):
    engines.set_up(rank)
    net = Words(sparse)
    config = config_of(0, steps=FIRST, **SGD | {"optimizer": None, "gradient_clipping": 0.0})
    with engine_of(config, net, torch.optim.SGD(net.parameters(), lr=0.1)) as engine:
        return seen(engine, run(engine, batches_of(sum(LENGTHS), rank), PLAN))


def rarely_measured(rank, every, stage):
    """Many windows, not all of which are measured."""
    engines.set_up(rank)
    noise = engines.MEASURED | {"measure_interval": every, "grow_by_noise": False}
    with engine_of(config_of(stage=stage, steps=FIRST, noise=noise)) as engine:
        return seen(engine, run(engine, batches_of(FIRST * 72, rank)))


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self):
        super().__init__()
        self.layers = wide()

    def forward(self, x, y):
        return (self.layers(x) - y).square().mean()


def own_loss_run(rank, **settings):
    """The engine's own output, which DeepSpeed divides though told not to at some stages."""
    engines.set_up(rank)
    with engine_of(config_of(steps=FIRST, **settings), WithLoss()) as engine:
        for batch in batches_of(2 * FIRST, rank):
            loss = engine(*(part.to(engines.dtype_of(engine)) for part in batch))
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
        return windows_of(engine)


class WithStranger(nn.Module):
    """A model with a parameter that the optimizer does not have."""

    def __init__(self):
        super().__init__()
        self.layers, self.stranger = wide(), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layers(x) * self.stranger


# What DeepSpeed reads the mean's norm with at each stage: a class, and its method.
ZERO = "deepspeed.runtime.zero"
READERS = {
    0: ("deepspeed.DeepSpeedEngine", "clip_fp32_gradients"),
    1: (f"{ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer", "scaled_global_norm"),
    3: (f"{ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3", "_get_norm_groups"),
}
READERS[2] = READERS[1]


def norms_run(rank, stage, mode="auto", stranger=False, scale=None, **settings):
    """How often DeepSpeed reads the mean's norm for itself, and what it holds it for."""
    engines.set_up(rank)
    net = WithStranger() if stranger else wide()
    noise, norms = engines.MEASURED | {"mode": mode}, []
    optimizer = AdamW(engines.groups_of(net.layers if stranger else net), lr=1e-3)
    config = merged(config_of(stage, noise=noise, **settings), {"optimizer": None})
    owner, name = READERS[stage]
    with engine_of(config, net, optimizer) as engine:
        if scale:
            engine.optimizer.override_loss_scale(scale)
        read = getattr(engine if stage == 0 else engine.optimizer, name).__func__
        with patch(f"{owner}.{name}", autospec=True, side_effect=read) as reader:
            for batch in batches_of(6, rank):
                run(engine, [batch])
                norms.append(float(engine.get_global_grad_norm() or 0.0))
        left = {*vars(engine), *vars(engine.optimizer)} & {name for _, name in READERS.values()}
        return seen(engine, []) | {"calls": reader.call_count, "norms": norms, "left": left}


def zero_init_run(rank):
    deepspeed = engines.set_up(rank)
    config = config_of(stage=3, steps=FIRST)
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = wide()
    with engine_of(config, net) as engine:
        return seen(engine, run(engine, batches_of(sum(LENGTHS), rank), PLAN))


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
FP32 = {f"stage {stage} fp32": {"stage": stage} for stage in STAGES}
FP32 |= {f"stage {stage} tied": {"stage": stage, "model": "tied"} for stage in STAGES}
FP32 |= {f"stage {stage} offload": {"stage": stage, "client": True} for stage in (1, 2, 3)}
FP32 |= {
    f"stage {stage} {name}": {"stage": stage, "zero_optimization": options}
    for stage, name, options in (
        *((stage, "overlap_comm", {"overlap_comm": True}) for stage in (1, 2)),
        *((stage, "not contiguous", {"contiguous_gradients": False}) for stage in (1, 2)),
        *((stage, "no reduce_scatter", {"reduce_scatter": False}) for stage in (1, 2, 3)),
        *((stage, "round robin", {"round_robin_gradients": True}) for stage in (1, 2)),
        *((stage, "small buckets", {"reduce_bucket_size": 300}) for stage in (1, 2, 3)),
        (3, "no overlap_comm", {"overlap_comm": False}),
        (3, "sub-groups", {"sub_group_size": 20}),
        (3, "offload of parameters", {"offload_param": TO_CPU}),
    )
}
# Both of which DeepSpeed refuses at stages 2 and 3.
FP32 |= {f"stage {s} prescaled": {"stage": s, "prescale_gradients": True} for s in (0, 1)}
FP32 |= {f"stage {s} predivided": {"stage": s, "gradient_predivide_factor": 4.0} for s in (0, 1)}
FP32 |= {f"stage {stage} scaled": {"stage": stage, "scale": 64.0} for stage in (1, 2, 3)}
FP32 |= {
    f"stage {stage} {kind}": {"stage": stage, "model": kind}
    for stage in STAGES
    for kind in ("checkpointed", "reentrant")
}
BF16 = {f"stage {stage} bf16": {"stage": stage, "bf16": True} for stage in STAGES}
BF16 |= {f"stage {s} fp32 sums": {"stage": s, "bf16": True, **FP32_SUMS} for s in (1, 2)}
DYNAMIC = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
FP16 = {f"stage {stage} fp16": {"stage": stage, "fp16": DYNAMIC} for stage in (1, 2, 3)}
VARIANTS = FP32 | BF16 | FP16
SGD = {
    "optimizer": {"type": "NoiseAwareSGD", "params": {"lr": 1.0, "weight_decay": 0.0}},
    "zero_allow_untested_optimizer": True,
}
STILL = {f"{name}, still": settings | {"lr": CONSTANT} for name, settings in (BF16 | FP16).items()}
LINEAR = {f"{name}, linear": settings | SGD for name, settings in (BF16 | FP16).items()}
NAN = {
    f"{name}, nan": settings
    for name, settings in VARIANTS.items()
    if name.endswith(("fp32", "bf16", "fp32 sums", "fp16"))
}
CLIPPED = {name: VARIANTS[name] for name in ("stage 0 bf16", "stage 1 fp32 sums")}
CLIPPED["stage 2 fp16"] = {"stage": 2, "fp16": {"enabled": True, "loss_scale": 64}}


def nan_run(rank, **settings):
    """One rank's micro-batch has a nan in the middle of a window."""
    engines.set_up(rank)
    with engine_of(config_of(steps=2, **settings), wide()) as engine:
        batches = batches_of(10, rank)
        if rank == 1:
            batches[NAN_AT][0][0, 0] = math.nan
        before, lengths = None, []
        for index, batch in enumerate(batches):
            if index == NAN_AT:
                before = engines.weights_of(engine)
            lengths += run(engine, [batch])
            if index == NAN_AT + 1:
                after = engines.weights_of(engine)
        return seen(engine, lengths) | {
            "same": torch.equal(before, after),
            "skipped": engine.skipped_steps,
            "updates": engine.noise_aware.num_updates,
        }


def overflow_run(rank, **settings):
    """A loss scale that is too large at first: DeepSpeed skips updates until it is not."""
    engines.set_up(rank)
    fp16 = DYNAMIC | {"initial_scale_power": 22}
    with engine_of(config_of(steps=2, fp16=fp16, scheduler=WARMUP, **settings), wide()) as engine:
        lengths = run(engine, batches_of(40, rank))
        return seen(engine, lengths) | {
            "skipped": engine.skipped_steps,
            "updates": engine.noise_aware.num_updates,
            "ticks": engine.lr_scheduler.last_batch_iteration + 1,
            "scale": engine.optimizer.loss_scale,
        }


def adaptive_run(rank, **settings):
    """Everything decided and carried out; the rates as the optimizer sees them in each update."""
    engines.set_up(rank)
    used = []
    with engine_of(
        config_of(noise=GROWING, lr=1e-2, gradient_clipping=100.0, **settings)
    ) as engine:
        basic = engine.basic_optimizer

        def note(optimizer, args, kwargs):
            values = [{name: group[name] for name in LENT} for group in optimizer.param_groups]
            used.append((engine.gradient_clipping(), values))

        basic.register_step_pre_hook(note)
        lengths = run(engine, batches_of(ADAPTIVE, rank))
        return seen(engine, lengths) | {
            "used": used,
            "left": [
                {k: g[k] for k in ("lr", "betas", "weight_decay")} for g in basic.param_groups
            ],
            "clip": engine.gradient_clipping(),
            "own clip": getattr(engine.optimizer, "clip_grad", engine.gradient_clipping()),
            "decided": engine.noise_aware.max_norm,
            "metrics": engine.noise_aware.metrics(),
        }


def clipped_run(rank, **settings):
    """After the threshold was learned, at weights that stay, an update by a far larger gradient."""
    engines.set_up(rank)
    noise = engines.MEASURED | {"adapt_clip": True, "max_accumulation_steps": 1}
    settings |= SGD | {"noise": noise, "gradient_clipping": CEILING}
    with engine_of(config_of(**settings), wide()) as engine:
        rates = engine.basic_optimizer.param_groups
        for group in rates:
            group["lr"] = CONSTANT
        run(engine, batches_of(MIN_COUNT + 4, rank))
        for group in rates:
            group["lr"] = 1.0
        before, limit = engines.weights_of(engine), engine.noise_aware.max_norm
        run(engine, batches_of(1, rank), loss=lambda *args: 16 * loss_of(*args))
        update = engines.weights_of(engine) - before
        return {"update": float(update.norm()), "limit": limit}


def ddp_run(rank, **settings):
    """The same under DDP with `NoiseAwareAdamW`."""
    from torch.nn.parallel import DistributedDataParallel

    from noiseopt import NoiseAwareAdamW, NoiseConfig

    net = build(torch.float32)
    noise = NoiseConfig(**GROWING, max_norm=100.0, samples_per_micro_batch=engines.MICRO_BATCH)
    optimizer = NoiseAwareAdamW(engines.groups_of(net), lr=1e-2, noise=noise)
    model = DistributedDataParallel(net)
    for batch in batches_of(ADAPTIVE, rank):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {"decisions": optimizer.decisions, "weights": weights}


CASES = {
    name: functools.partial(measured_run, **settings)
    for name, settings in (VARIANTS | STILL | LINEAR).items()
}
CASES |= {name: functools.partial(nan_run, **settings) for name, settings in NAN.items()}
CASES |= {
    f"stage {stage} adaptive": functools.partial(adaptive_run, stage=stage) for stage in STAGES
}
CASES |= {
    f"{name}, clipped": functools.partial(clipped_run, **settings)
    for name, settings in CLIPPED.items()
}
OWN_LOSS = {
    "stage 0": {"stage": 0},
    "stage 2": {"stage": 2},
    "fp32 sums": BF16["stage 1 fp32 sums"],
}
CASES |= {f"stage {s} overflow": functools.partial(overflow_run, stage=s) for s in (1, 2, 3)}
CASES |= {f"own loss, {n}": functools.partial(own_loss_run, **s) for n, s in OWN_LOSS.items()}
CASES |= {
    f"stage {stage}, every {every}": functools.partial(rarely_measured, every=every, stage=stage)
    for stage in STAGES
    for every in (1, 4)
}
CASES |= {"zero.Init": zero_init_run, "ddp": ddp_run}
CASES |= {
    f"words {sparse}": functools.partial(words_run, sparse=sparse) for sparse in (False, True)
}
NORMS = {f"stage {stage}": {"stage": stage} for stage in READERS}
NORMS |= {f"stage {stage} scaled": {"stage": stage, "scale": 64.0} for stage in (1, 2, 3)}
CASES |= {
    f"norms, {name}, {mode}": functools.partial(norms_run, mode=mode, **settings)
    for name, settings in (NORMS | {"stranger": {"stage": 0, "stranger": True}}).items()
    for mode in ("auto", "advise")
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    cases = {stage: functools.partial(measured_run, stage=stage) for stage in STAGES}
    return run_on_ranks(cases, tmp_path_factory.mktemp("four"), ranks=4)


@functools.cache
def oracle(model="wide", dtype=torch.float32, lr=1e-3, ranks=RANKS):
    batches = [batches_of(sum(LENGTHS), rank) for rank in range(ranks)]
    net = Tied() if model == "tied" else wide()
    return engines.plain_run(LENGTHS, batches, net, dtype, functools.partial(AdamW, lr=lr))


def worst_norm(windows, norms):
    """The largest relative error of a group's squared norm."""
    return max(
        abs(got / wanted - 1)
        for window, (small, big) in zip(windows, norms, strict=True)
        for got, wanted in zip(
            (*window.norms.small_sq, *window.norms.big_sq), (*small, *big), strict=True
        )
    )


def assert_same(one, other):
    """Two ranks have seen, decided and done the same."""
    assert repr(one["decisions"]) == repr(other["decisions"])  # which may hold a nan
    assert one["lengths"] == other["lengths"]
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)


def decay_once(net):
    """What DeepSpeed does to SGD's weights here: it takes a step without gradients when built."""
    for group in engines.groups_of(net):
        for param in group["params"]:
            param.data.mul_(1 - group["weight_decay"])


@pytest.mark.parametrize("name", [*FP32, "zero.Init"])
def test_norms_and_weights_are_those_of_plain_pytorch(ranks, name):
    one, other = result(ranks, name)
    norms, weights = oracle(FP32.get(name, {}).get("model", "wide"))
    assert_same(one, other)
    if OLD_TORCH and name.endswith("checkpointed"):
        assert not any(window.norms.finite for window in one["windows"])
        return
    assert worst_norm(one["windows"], norms) < 1e-6
    torch.testing.assert_close(one["weights"], weights, rtol=0, atol=1e-7)
    assert all(window.clipped for window in one["windows"])


def test_sparse_gradients_are_measured_as_dense_ones(ranks):
    dense, sparse = result(ranks, "words False")[0], result(ranks, "words True")[0]
    norms = [(window.norms.small_sq, window.norms.big_sq) for window in dense["windows"]]
    assert worst_norm(sparse["windows"], norms) < 1e-6
    torch.testing.assert_close(sparse["weights"], dense["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks_measure_and_decide_as_one_too(four_ranks, stage):
    first, *others = result(four_ranks, stage)
    norms, weights = oracle(ranks=4)
    for other in others:
        assert_same(first, other)
    assert worst_norm(first["windows"], norms) < 1e-6
    torch.testing.assert_close(first["weights"], weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "divided"), [("stage 0", 1), ("stage 2", 2), ("fp32 sums", 1)])
def test_norms_go_together_whether_or_not_the_loss_was_divided(ranks, name, divided):
    one, _ = result(ranks, f"own loss, {name}")
    norms, _ = oracle(dtype=torch.bfloat16 if name == "fp32 sums" else torch.float32)
    # At stage 2 the loop's word counts: the gradient is the sum of both, and so are the norms.
    small, big = (sum(part) * divided**2 for part in norms[0])
    rel = 5e-3 if name == "fp32 sums" else 1e-6
    assert sum(one[0].norms.small_sq) == pytest.approx(small, rel=rel)
    assert sum(one[0].norms.big_sq) == pytest.approx(big, rel=rel)


@pytest.mark.parametrize("name", NORMS)
def test_deepspeed_is_spared_reading_the_norm_that_was_read(ranks, name):
    one, other = result(ranks, f"norms, {name}, auto")
    advised, _ = result(ranks, f"norms, {name}, advise")
    assert_same(one, other)
    assert (one["calls"], advised["calls"]) == (0, 6)
    assert one["norms"] == pytest.approx(advised["norms"], rel=1e-6)
    assert all(window.clipped for window in one["windows"])
    torch.testing.assert_close(one["weights"], advised["weights"], rtol=0, atol=1e-7)
    assert not one["left"]


def test_what_the_optimizer_does_not_have_is_clipped_with_the_rest(ranks):
    one, other = result(ranks, "norms, stranger, auto")
    advised, _ = result(ranks, "norms, stranger, advise")
    assert_same(one, other)
    assert one["calls"] == advised["calls"] == 6
    assert torch.equal(one["weights"], advised["weights"])


@pytest.mark.parametrize("name", BF16 | FP16)
def test_narrow_norms_are_those_of_plain_pytorch(ranks, name):
    one, other = result(ranks, f"{name}, still")
    norms, _ = oracle(dtype=torch.bfloat16 if name in BF16 else torch.float16, lr=CONSTANT)
    assert_same(one, other)
    assert worst_norm(one["windows"], norms) < 5e-3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_scale_that_overflows_costs_windows_and_nothing_else(ranks, stage):
    one, other = result(ranks, f"stage {stage} overflow")
    assert_same(one, other)
    assert 1 < one["skipped"] < 15
    assert one["updates"] == one["ticks"] == 20 - one["skipped"]
    skipped = [window for window in one["windows"] if not window.applied]
    assert len(skipped) == one["skipped"]
    assert all(window.norms is None for window in skipped)
    assert all(window.norms.finite for window in one["windows"] if window.applied)


@pytest.mark.parametrize("name", BF16 | FP16)
def test_narrow_weights_move_as_those_of_plain_pytorch(ranks, name):
    # With SGD, which does not make much of the least entries.
    one, other = result(ranks, f"{name}, linear")
    batches = [batches_of(sum(LENGTHS), rank) for rank in range(RANKS)]
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    net = wide()
    if name == "stage 0 bf16":
        decay_once(net)
    dtype = torch.bfloat16 if name in BF16 else torch.float16
    _, weights = engines.plain_run(LENGTHS, batches, net, dtype, sgd)
    start = torch.cat([p.detach().flatten() for p in wide().parameters()])
    assert_same(one, other)
    assert (one["weights"] - weights).norm() < 0.05 * (weights - start).norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_windows_are_exactly_as_long_as_decided(ranks, name):
    one, _ = result(ranks, name)
    assert one["lengths"] == LENGTHS
    assert [window.micro_batches for window in one["windows"]] == LENGTHS
    counts = [(window.norms.count, window.norms.samples) for window in one["windows"]]
    assert counts == [(RANKS * k, RANKS * k * engines.MICRO_BATCH) for k in LENGTHS]


@pytest.mark.parametrize("name", NAN)
def test_what_is_not_finite_is_skipped_on_every_rank(ranks, name):
    one, other = result(ranks, name)
    assert_same(one, other)
    assert one["same"]
    assert one["skipped"] == 1
    assert one["updates"] == 4
    assert one["weights"].isfinite().all()
    bad = one["windows"][NAN_AT // 2]
    assert (bad.norms, bad.skipped, bad.applied) == (None, 2, False)


@pytest.mark.parametrize("stage", STAGES)
def test_not_every_window_need_be_measured(ranks, stage):
    one, other = result(ranks, f"stage {stage}, every 4")
    assert_same(one, other)
    everything, _ = result(ranks, f"stage {stage}, every 1")
    assert_rarely_measured(one["windows"], everything["windows"], 4, 1e-6)
    assert torch.equal(one["weights"], everything["weights"])


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_decides_as_our_optimizer_does_under_ddp(ranks, stage):
    one, other = result(ranks, f"stage {stage} adaptive")
    wanted, _ = result(ranks, "ddp")
    assert_same(one, other)
    assert len(one["decisions"]) == len(wanted["decisions"]) > 6
    for got, ddp in zip(one["decisions"], wanted["decisions"], strict=True):
        assert (got.action, got.accumulation_steps, got.num_updates) == (
            ddp.action,
            ddp.accumulation_steps,
            ddp.num_updates,
        )
        assert got.rates.lr == pytest.approx(ddp.rates.lr, rel=1e-4)
        assert got.max_norm == pytest.approx(ddp.max_norm, rel=1e-3)
        assert got.loss == pytest.approx(ddp.loss, rel=1e-5)
    assert max(one["lengths"]) == GROWING["max_accumulation_steps"]
    torch.testing.assert_close(one["weights"], wanted["weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_those_of_plain_pytorch_with_the_rates_that_were_lent(ranks, stage):
    one, _ = result(ranks, f"stage {stage} adaptive")
    used = result(ranks, "stage 0 adaptive")[0]["used"]  # where an update is one step
    batches = [batches_of(ADAPTIVE, rank) for rank in range(RANKS)]
    _, weights = engines.plain_run(
        one["lengths"], batches, build(torch.float32), torch.float32, AdamW, used=used
    )
    assert len({clip for clip, _ in used}) > 2
    torch.testing.assert_close(one["weights"], weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_rates_are_lent_for_the_update_and_taken_back(ranks, stage):
    one, _ = result(ranks, f"stage {stage} adaptive")
    # ZeRO has an update in several steps, of a group each.
    groups = [group for _, groups in one["used"][-2:] for group in groups]
    assert all(group["lr"] > 1.05e-2 for group in groups)
    assert all(group["betas"][1] < 0.999 for group in groups)
    decays = {group["weight_decay"] for group in groups}
    assert len(decays) > 1
    assert not decays & {0.1}
    assert one["left"][0] == {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1}
    assert one["left"][1]["weight_decay"] == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_the_decided_threshold_is_the_engines_own(ranks, stage):
    one, _ = result(ranks, f"stage {stage} adaptive")
    assert one["decided"] == one["decisions"][-1].max_norm < 100.0
    assert one["clip"] == one["own clip"] == one["decided"]


@pytest.mark.parametrize("name", CLIPPED)
def test_narrow_updates_are_clipped_at_the_learned_threshold(ranks, name):
    for one in result(ranks, f"{name}, clipped"):
        assert one["limit"] < CEILING / 2
        assert one["update"] == pytest.approx(one["limit"], rel=0.02)
