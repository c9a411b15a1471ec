"""The ways into a noise-aware DeepSpeed engine, and that nothing else of DeepSpeed is changed.

Real engines in one worker; what does not measure must be DeepSpeed's own training, bit for bit.
"""

import argparse
import base64
import copy
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noiseopt import NoiseAwareAdamW
from tests.distributed.ranks import free_port, result, run_on_ranks
from tests.integrations.test_deepspeed_section import (
    BASE,
    engine_for,
    kind,
    net,
    refusal,
    section,
    start,
    zero,
)

pytestmark = pytest.mark.distributed

REPLACED = ("DeepSpeedEngine", "DeepSpeedHybridEngine", "DualPipeVEngine", "PipelineEngine")
UNTESTED = {"zero_allow_untested_optimizer": True}
TORCH = kind("AdamW", torch_adam=True, weight_decay=0.1)
OURS = kind("NoiseAwareAdamW", weight_decay=0.1)
# pyproject.toml allows torch >= 2.6, and Muon came with 2.9: with that or later it must be tested.
HAS_MUON = torch.__version__ >= "2.9"
PLAIN = {key: value for key, value in BASE.items() if key != "noise_aware"}


def train(engine, micro_batches=8):
    """The weights after some training, on the same data each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        inputs = torch.randn(2, 3, generator=generator)
        engine.backward(torch.nn.functional.mse_loss(engine(inputs), inputs.sum(1, keepdim=True)))
        engine.step()
    return weights(engine)


def weights(engine):
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
        return torch.cat([p.detach().flatten().clone() for p in params])


def original(change):
    """Weights of DeepSpeed's own engine, with whatever may be enabled undone."""
    import deepspeed

    from noiseopt.integrations.deepspeed import disable

    disable()
    engine, *_ = deepspeed.initialize(
        model=(model := net()), model_parameters=model.parameters(), config=copy.deepcopy(change)
    )
    assert type(engine) is deepspeed.DeepSpeedEngine
    assert type(engine).__module__.startswith("deepspeed.")
    return train(engine)


def ours(change, initialize=None, **kwargs):
    import noiseopt.integrations.deepspeed as noisy

    engine = engine_for(initialize or noisy.initialize, change, **kwargs)
    return engine.noise_aware is not None, train(engine)


def parity(rank):
    """The weights of pairs that must be equal, and whether the second was measured."""
    start(rank)
    decay, sgd = {"weight_decay": 0.1}, {"weight_decay": 0.1, "momentum": 0.9}
    stage_1 = zero(1) | UNTESTED
    pairs = {
        **{f"AdamW at stage {n}": (TORCH | zero(n), OURS | zero(n)) for n in range(4)},
        "AdamW by its own name": (TORCH, TORCH),
        "a name in small letters": (TORCH, kind("noiseawareadamw", weight_decay=0.1)),
        "Adam": (
            kind("Adam", torch_adam=True, adam_w_mode=False, **decay),
            kind("NoiseAwareAdam", **decay),
        ),
        "SGD": (kind("SGD", **sgd), kind("NoiseAwareSGD", **sgd)),
        "SGD at stage 1": (kind("SGD", **sgd) | stage_1, kind("NoiseAwareSGD", **sgd) | stage_1),
        "enabled false": (TORCH, OURS | section(enabled=False, mode="auto")),
        "mode off": (TORCH, OURS | section(mode="off")),
        "mode off with an own name": (TORCH | zero(2), TORCH | zero(2) | section(mode="off")),
    }
    seen = {name: (original(PLAIN | a), *ours(b)) for name, (a, b) in pairs.items()}
    for name, change in {"no section": TORCH, "no section at stage 2": TORCH | zero(2)}.items():
        seen[name] = (original(PLAIN | change), *enabled_without_section(change))
    seen["the name alone"] = (None, *enabled_without_section(OURS))
    return seen


def enabled_without_section(change):
    import deepspeed

    from noiseopt.integrations.deepspeed import disable, enable

    enable()
    engine, *_ = deepspeed.initialize(
        model=(model := net()), model_parameters=model.parameters(), config=PLAIN | change
    )
    disable()
    return engine.noise_aware is not None, train(engine)


def configs(rank, folder):
    """The settings from each form of a config."""
    start(rank)
    from noiseopt.integrations.deepspeed import initialize

    config = copy.deepcopy(BASE) | section(max_accumulation_steps=16)
    text = json.dumps(config)
    path = Path(folder) / "config.json"
    path.write_text(text)
    args = argparse.Namespace(deepspeed_config=str(path), local_rank=0)
    ways = {
        "dict": {"config": config},
        "path": {"config": str(path)},
        "base64": {"config": base64.urlsafe_b64encode(text.encode()).decode()},
        "args": {"args": args},
        "config_params": {"config_params": config},
    }
    seen = {}
    for name, way in ways.items():
        engine, *_ = initialize(model=(model := net()), model_parameters=model.parameters(), **way)
        seen[name] = engine.noise_aware.config.max_accumulation_steps
    positional, *_ = initialize(args, model := net(), None, model.parameters())
    seen["positional"] = positional.noise_aware.config.max_accumulation_steps
    return seen, json.dumps(config) == text


def values(rank):
    """The four values that are returned, with everything that DeepSpeed may build."""
    start(rank)
    from noiseopt.integrations.deepspeed import initialize

    model, data = net(), torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}
    engine, optimizer, loader, scheduler = initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=data,
        config=copy.deepcopy(BASE) | schedule,
    )
    assert optimizer is engine.optimizer
    assert loader is engine.training_dataloader
    assert scheduler is engine.lr_scheduler
    return type(optimizer).__name__, len(loader), type(scheduler).__name__


def switching(rank):
    """What deepspeed holds after each way of switching."""
    deepspeed = start(rank)
    early = deepspeed.initialize
    import noiseopt.integrations.deepspeed as noisy

    before = {name: getattr(deepspeed, name) for name in REPLACED}

    def changed():
        assert deepspeed.initialize is early
        return [name for name in REPLACED if getattr(deepspeed, name) is not before[name]]

    seen = {"at first": changed()}
    noisy.disable()
    seen["disabled first"] = changed()
    noisy.enable()
    seen["enabled"] = changed()
    once = deepspeed.DeepSpeedEngine
    noisy.enable()
    assert deepspeed.DeepSpeedEngine is once
    seen["measured through an early import"], _ = ours({}, early)
    ours({})
    seen["enabled after initialize"] = changed()
    assert refusal(deepspeed, noisy.initialize, section(x=1))
    seen["enabled after a refusal"] = changed()
    engine = engine_for(early, {})
    noisy.disable()
    seen["disabled"] = changed()
    train(engine)
    seen["goes on"] = engine.noise_aware.num_updates
    plain = engine_for(deepspeed.initialize, TORCH)
    seen["disabled again"] = hasattr(plain, "noise_aware")
    ours({})
    seen["after initialize"] = changed()
    return seen


def clients(rank):
    """An optimizer of the user's own: weights, or how it is refused."""
    deepspeed = start(rank)
    from noiseopt.integrations.deepspeed import initialize

    make = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    no_type = {"optimizer": {}}
    seen = {}
    for name, change in {"": no_type, " at stage 2": no_type | zero(2)}.items():
        seen[f"reference{name}"] = original(PLAIN | TORCH | zero(2 if name else 0))
        seen[f"instance{name}"] = ours(change, model=(m := net()), optimizer=make(m.parameters()))
        seen[f"callable{name}"] = ours(change, optimizer=make)
    model = net()
    off = NoiseAwareAdamW(model.parameters(), lr=0.01, weight_decay=0.1, noise="off")
    seen["switched off"] = ours(no_type, model=model, optimizer=off)
    measuring = functools.partial(NoiseAwareAdamW, lr=0.01)
    refused = {"measuring": measuring(net().parameters()), "measuring callable": measuring}
    refused["1-bit"] = OnebitAdam(net().parameters())
    refused["1-bit callable"] = OnebitAdam
    if HAS_MUON:
        refused["muon"] = torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))])
    for name, optimizer in refused.items():
        give = functools.partial(initialize, optimizer=optimizer)
        seen[name] = refusal(deepspeed, give, no_type)
    rebuilt = functools.partial(torch.optim.Adagrad, lr=0.01)
    for stage in (0, 1, 3):
        for name, optimizer in (("", rebuilt(net().parameters())), (" callable", rebuilt)):
            give = functools.partial(initialize, optimizer=optimizer)
            seen[f"Adagrad{name} {stage}"] = refusal(deepspeed, give, no_type | zero(stage))
    return seen


class OnebitAdam(torch.optim.Adam):
    """By its name one that compresses, as DeepSpeed's own was called."""


class Megatron:
    """What Megatron calls an mpu: the model is spread over two ranks."""

    def get_model_parallel_world_size(self):
        return 2

    def get_data_parallel_world_size(self):
        return 1


def spread(rank):
    """How a model that is spread over ranks, and one with experts, are refused."""
    deepspeed = start(rank)
    from deepspeed.moe.layer import MoE

    from noiseopt.integrations.deepspeed import initialize

    def with_experts(model, model_parameters, **rest):
        model = torch.nn.Sequential(*net()[:2], First(MoE(4, torch.nn.Linear(4, 4))), net()[2])
        return initialize(model=model, model_parameters=model.parameters(), **rest)

    megatron = functools.partial(initialize, mpu=Megatron())
    return refusal(deepspeed, megatron, {}), refusal(deepspeed, with_experts, {})


class First(torch.nn.Module):
    """The first output of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        return self.module(inputs)[0]


def pipelines(rank):
    deepspeed = start(rank)
    from noiseopt.integrations.deepspeed import disable, enable, initialize

    def module():
        loss = torch.nn.functional.mse_loss
        return deepspeed.PipelineModule(list(net()), num_stages=1, loss_fn=loss)

    def attempt(change):
        give = lambda model, **rest: initialize(model=module(), **rest)  # noqa: E731
        return refusal(deepspeed, give, change)

    data = itertools.repeat((torch.ones(2, 3), torch.ones(2, 1)))

    def trained():
        engine = engine_for(deepspeed.initialize, TORCH | section(enabled=False), model=module())
        return isinstance(engine, deepspeed.PipelineEngine), float(engine.train_batch(iter(data)))

    plain = trained()
    enable()
    enabled = trained()
    disable()
    return attempt({}), attempt(TORCH), attempt(section(x=1)), plain, enabled


def untested(rank):
    """SGD at stage 1, of which DeepSpeed wants to be told that it is meant."""
    deepspeed = start(rank)
    from noiseopt.integrations.deepspeed import initialize

    return refusal(deepspeed, initialize, kind("NoiseAwareSGD") | zero(1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry")
    cases = {
        "switching": switching,
        "parity": parity,
        "configs": functools.partial(configs, folder=str(folder)),
        "values": values,
        "clients": clients,
        "pipelines": pipelines,
        "untested": untested,
        "spread": spread,
    }
    return run_on_ranks(cases, folder, ranks=1)


MEASURED = [f"AdamW at stage {n}" for n in range(4)]
MEASURED += ["AdamW by its own name", "a name in small letters", "Adam", "SGD", "SGD at stage 1"]
LEFT_ALONE = ["enabled false", "mode off", "mode off with an own name"]
LEFT_ALONE += ["no section", "no section at stage 2"]


@pytest.mark.parametrize("name", MEASURED)
def test_advice_changes_no_bit(ranks, name):
    (seen,) = result(ranks, "parity")
    expected, measured, weights = seen[name]
    assert measured
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_without_the_section_nothing_is_measured_nor_changed(ranks, name):
    (seen,) = result(ranks, "parity")
    expected, measured, weights = seen[name]
    assert not measured
    assert torch.equal(weights, expected)


def test_the_pairs_differ_from_each_other(ranks):
    """Else equality would say nothing: of decay decoupled or not, and of the weights drawn."""
    (seen,) = result(ranks, "parity")
    kinds = [seen[name][2] for name in ("AdamW at stage 0", "Adam", "SGD")]
    for a, b in itertools.combinations([*kinds, weights_at_start()], 2):
        assert not torch.equal(a, b)


def weights_at_start():
    return torch.cat([p.detach().flatten() for p in net().parameters()])


def test_the_name_alone_is_enough(ranks):
    (seen,) = result(ranks, "parity")
    assert seen["the name alone"][1]


def test_every_form_of_a_config_is_read(ranks):
    ((seen, unchanged),) = result(ranks, "configs")
    names = ("dict", "path", "base64", "args", "config_params", "positional")
    assert seen == dict.fromkeys(names, 16)
    assert unchanged


def test_the_four_values_are_deepspeeds(ranks):
    assert result(ranks, "values") == [("AdamW", 4, "WarmupLR")]


def test_nothing_is_replaced_before_it_is_asked_for_nor_after_it_is_undone(ranks):
    (seen,) = result(ranks, "switching")
    nothing = ("at first", "disabled first", "disabled", "after initialize")
    assert {name: seen[name] for name in nothing} == {name: [] for name in nothing}
    enabled = ("enabled", "enabled after initialize", "enabled after a refusal")
    assert {name: seen[name] for name in enabled} == {name: [*REPLACED] for name in enabled}


def test_an_early_import_of_initialize_is_reached(ranks):
    (seen,) = result(ranks, "switching")
    assert seen["measured through an early import"]


def test_engines_outlive_the_switch(ranks):
    (seen,) = result(ranks, "switching")
    assert seen["goes on"] == 4
    assert not seen["disabled again"]


@pytest.mark.parametrize("way", ["instance", "callable"])
@pytest.mark.parametrize("stage", ["", " at stage 2"])
def test_an_optimizer_of_ones_own_is_measured(ranks, way, stage):
    (seen,) = result(ranks, "clients")
    measured, weights = seen[way + stage]
    assert measured
    assert torch.equal(weights, seen[f"reference{stage}"])


def test_ours_switched_off_is_as_good_as_torchs(ranks):
    (seen,) = result(ranks, "clients")
    measured, weights = seen["switched off"]
    assert measured
    assert torch.equal(weights, seen["reference"])


@pytest.mark.parametrize(
    "way",
    [
        "measuring",
        "measuring callable",
    ],
)
def test_an_optimizer_that_measures_itself_is_refused(ranks, way):
    (seen,) = result(ranks, "clients")
    assert seen[way] is not None, "it was not refused"
    error, text, changed, same_config, _ = seen[way]
    assert (error, changed, same_config) == ("TypeError", [], True)
    assert "NoiseAwareAdamW" in text
    assert "noise='off'" in text


# pyproject.toml allows torch >= 2.6, and Muon came with 2.9: with that or later it must be tested.
@pytest.mark.skipif(not HAS_MUON, reason="torch before 2.9 has no Muon")
def test_a_muon_of_ones_own_is_refused(ranks):
    (seen,) = result(ranks, "clients")
    error, text, changed, same_config, hooks = seen["muon"]
    assert (error, changed, same_config, hooks) == ("TypeError", [], True, 0)
    assert "Muon" in text


@pytest.mark.parametrize("way", ["1-bit", "1-bit callable"])
def test_an_optimizer_that_compresses_is_refused(ranks, way):
    (seen,) = result(ranks, "clients")
    assert seen[way] is not None, "it was not refused"
    error, text, changed, same_config, _ = seen[way]
    assert (error, changed, same_config) == ("TypeError", [], True)
    assert "OnebitAdam" in text
    assert "use AdamW" in text


@pytest.mark.parametrize(("index", "word"), [(0, "mpu="), (1, "experts")])
def test_a_model_that_is_spread_over_ranks_is_refused(ranks, index, word):
    (seen,) = result(ranks, "spread")
    assert seen[index] is not None, "it was not refused"
    error, text, changed, same_config, _ = seen[index]
    assert (error, changed, same_config) == ("ValueError", [], True)
    assert word in text
    assert "leave out one of the two" in text


@pytest.mark.parametrize("way", ["Adagrad", "Adagrad callable"])
def test_an_adagrad_that_deepspeed_replaces_is_refused(ranks, way):
    (seen,) = result(ranks, "clients")
    assert seen[f"{way} 0"] is None
    for stage in (1, 3):
        assert seen[f"{way} {stage}"] is not None, "it was not refused"
        error, text, changed, same_config, _ = seen[f"{way} {stage}"]
        assert (error, changed, same_config) == ("TypeError", [], True)
        assert "use AdamW, or ZeRO stage 0" in text


def test_a_pipeline_is_refused_only_with_the_section(ranks):
    ((name_only, section_only, mistake, plain, enabled),) = result(ranks, "pipelines")
    for error, text, changed, same_config, _ in (name_only, section_only):
        assert (error, changed, same_config) == ("ValueError", [], True)
        assert "PipelineEngine" in text
        assert "leave the section out" in text
    assert "noise_aware.x" in mistake[1]
    assert plain == enabled
    assert plain[0]


def test_an_optimizer_that_deepspeed_has_not_tested_is_for_it_to_refuse(ranks):
    ((error, text, changed, _, _),) = result(ranks, "untested")
    assert (error, changed) == ("AssertionError", [])
    assert "zero_allow_untested_optimizer" in text


IMPORTS = """
import sys
import noiseopt, noiseopt.integrations
assert "deepspeed" not in sys.modules, "importing noiseopt imports deepspeed"
import deepspeed, torch
from deepspeed.runtime.engine import DeepSpeedEngine
places = [deepspeed, deepspeed.runtime.engine, DeepSpeedEngine, torch.optim]
before = [dict(vars(place)) for place in places]
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as known
count = len(known)
import noiseopt.integrations.deepspeed
for place, was in zip(places, before):
    now = dict(vars(place))
    assert now.keys() == was.keys(), (place, now.keys() ^ was.keys())
    assert all(now[name] is was[name] for name in was), place
assert len(known) == count
"""


def test_importing_changes_nothing():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


WITHOUT_A_COMPILER = """
import sys
from tests.integrations.test_deepspeed_section import engine_for, start, zero
import deepspeed
from noiseopt.integrations.deepspeed import initialize

change = {}
if sys.argv[1] == "cpu_adam":
    start(0)
    change = zero(2, offload_optimizer={"device": "cpu"})
try:
    engine_for(initialize, change)
except RuntimeError as error:
    print("REFUSED", error)
"""


@pytest.mark.parametrize(
    ("extension", "remedy"),
    [
        ("shm_comm", '__compatible_ops__["deepspeed_shm_comm"] to False'),
        ("cpu_adam", "leave out the offload of the optimizer"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_with_the_remedy(extension, remedy, tmp_path):
    root = Path(__file__).parents[2]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    nothing = {"PATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER, extension],
        cwd=root,
        env=alone | nothing | {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert extension in line
    assert "install ninja and a C++ compiler" in line
    assert remedy in line
