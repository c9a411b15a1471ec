"""The "noise_aware" section of a DeepSpeed config: what is refused, and that nothing else is.

Every case is a real `initialize` in one worker of its own, since importing deepspeed warns.
"""

import copy
import math
import os

import pytest
import torch

from tests.distributed.ranks import result, run_on_ranks

pytestmark = pytest.mark.distributed

BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "NoiseAwareAdamW", "params": {"lr": 0.01}},
    "noise_aware": {"mode": "advise"},
}


def zero(stage=2, **items):
    return {"zero_optimization": {"stage": stage, **items}}


def kind(name, **params):
    return {"optimizer": {"type": name, "params": {"lr": 0.01, **params}}}


def section(**items):
    return {"noise_aware": items}


# The changed part of the config, and what the error must say: the key, then the remedy.
CONTRADICTIONS = {
    "zenflow": (
        zero(offload_optimizer={"device": "cpu"}, zenflow={"topk_ratio": 0.1}),
        ["zero_optimization.zenflow", "leave one"],
    ),
    "zenflow by default": (zero(zenflow={}), ["zero_optimization.zenflow", "leave one"]),
    "super_offload": (
        zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
        ["zero_optimization.offload_optimizer.super_offload", "set it to false"],
    ),
    "compute_grad_norm": (
        zero(1, compute_grad_norm=False),
        ["zero_optimization.compute_grad_norm", "set it to true"],
    ),
    "zero_quantized_gradients": (
        zero(3, zero_quantized_gradients=True),
        ["zero_optimization.zero_quantized_gradients", "set it to false"],
    ),
    "elastic checkpoint": (
        zero(2, elastic_checkpoint=True),
        ["zero_optimization.elastic_checkpoint", "set it to false"],
    ),
    "nvme": (
        zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/nowhere"}),
        ["zero_optimization.offload_optimizer.device", "nvme", "leave one"],
    ),
    "nvme for parameters": (
        zero(3, offload_param={"device": "nvme", "nvme_path": "/nowhere"}),
        ["zero_optimization.offload_param.device", "nvme", "leave one"],
    ),
    "part of the offload": (
        zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        ["zero_optimization.offload_optimizer.ratio", "set it to 1.0"],
    ),
    "OneBitAdam": (kind("OneBitAdam"), ["optimizer.type", "use AdamW"]),
    "ZeroOneAdam": (kind("ZeroOneAdam"), ["optimizer.type", "use AdamW"]),
    "OneBitLamb": (kind("OneBitLamb"), ["optimizer.type", "use AdamW"]),
    "Muon": (kind("Muon"), ["optimizer.type", "use AdamW"]),
    "NoiseAwareMuon": (kind("NoiseAwareMuon"), ["optimizer.type", "use AdamW"]),
    "Adagrad": (kind("Adagrad") | zero(1), ["optimizer.type", "use AdamW, or ZeRO stage 0"]),
    "sum over ranks": ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", '"mean"']),
    "bf16 for fp32": (
        {"communication_data_type": "bf16"},
        ["communication_data_type", "leave it out"],
    ),
    "fp16 for bf16": (
        {"communication_data_type": "fp16", "bf16": {"enabled": True}},
        ["communication_data_type", "leave it out"],
    ),
    "bf16 overflow": (
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
        ["bf16.check_grad_overflow", "set it to true"],
    ),
    "fp16 without ZeRO": ({"fp16": {"enabled": True}}, ['"fp16"', "ZeRO stage 1"]),
    "autocast to fp16": (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
        ["torch_autocast.dtype", '"bfloat16"'],
    ),
    "data sampling": (
        {
            "data_efficiency": {
                "enabled": True,
                # Where these are left out, DeepSpeed writes them into the user's config.
                "data_routing": {},
                "data_sampling": {"enabled": True, "curriculum_learning": {"enabled": False}},
            }
        },
        ["data_efficiency.data_sampling", "leave one"],
    ),
    "dropped tokens": (
        {
            "data_efficiency": {
                "enabled": True,
                "data_routing": {"enabled": True, "random_ltd": {"enabled": True}},
                "data_sampling": {"curriculum_learning": {}},
            }
        },
        ["data_efficiency.data_routing.random_ltd", "leave one"],
    ),
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine", "leave one"]),
    "deepcompile": ({"compile": {"deepcompile": True}}, ["compile.deepcompile", "leave one"]),
    "autotp": ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size", "leave"]),
    "sequence parallel": ({"sequence_parallel_size": 2}, ["sequence_parallel_size", "leave one"]),
    "expert parallel": (
        {"expert_parallel": {"enabled": True}},
        ["expert_parallel", "leave one"],
    ),
}
MISTAKES = {
    "typo": (section(mdoe="auto"), ["noise_aware.mdoe", '"mode"']),
    "half a name": (section(max_accumulation=8), ["noise_aware", '"max_accumulation_steps"']),
    "switched off": (section(mode="off", bogus=1), ["noise_aware.bogus", "known are"]),
    "not enabled": (section(enabled=False, modes="auto"), ["noise_aware.modes", '"mode"']),
    "nothing near": (section(zzz=1), ["noise_aware.zzz", "known are", "max_accumulation_steps"]),
    "no string": ({"noise_aware": {7: 1}}, ["noise_aware.7", "known are"]),
    "accumulation": (section(accumulation="external"), ["noise_aware.accumulation", "leave it"]),
    "steps": (section(accumulation_steps=4), ["accumulation_steps", "gradient_accumulation_steps"]),
    "gradients": (section(gradients="local"), ["noise_aware.gradients", "leave it out"]),
    "loss": (section(loss_reduction="sum"), ["noise_aware.loss_reduction", "leave it out"]),
    "max_norm": (section(max_norm=1.0), ["noise_aware.max_norm", "gradient_clipping"]),
    "skip": (section(skip_nonfinite=False), ["noise_aware.skip_nonfinite", "leave it out"]),
    "mode": (section(mode="on"), ["noise_aware.mode", "'on'", "'auto'"]),
    "negative": (section(max_accumulation_steps=-4), ["noise_aware.max_accumulation_steps is -4"]),
    "share": (section(confidence=1.5), ["noise_aware.confidence is 1.5", "between 0 and 1"]),
    "interval": (section(probe_interval=1), ["noise_aware.probe_interval is 1", "at least 2"]),
    "rule": (section(rate_rule="adamw"), ["noise_aware.rate_rule", "'adamw'", "'adam'"]),
    "rules": (section(rate_rule=["adam"]), ["noise_aware.rate_rule", "['adam']"]),
    "schedule": (section(schedule="steps"), ["noise_aware.schedule", "'steps'", "'samples'"]),
    "window too long": (
        {"gradient_accumulation_steps": 8, **section(max_accumulation_steps=4)},
        ['"gradient_accumulation_steps" is 8', "noise_aware.max_accumulation_steps = 4"],
    ),
    "window too short": (
        section(min_accumulation_steps=4),
        ['"gradient_accumulation_steps" is 2', "noise_aware.min_accumulation_steps = 4"],
    ),
    "hyphen": ({"noise-aware": {"mode": "auto"}}, ['"noise-aware"', '"noise_aware"']),
    "one word": ({"noiseaware": {"mode": "auto"}}, ['"noiseaware"', '"noise_aware"']),
    "capitals": ({"NoiseAware": {"mode": "auto"}}, ['"NoiseAware"', '"noise_aware"']),
    "letters": ({"noise_awrae": {"mode": "auto"}}, ['"noise_awrae"', '"noise_aware"']),
    "type": (kind("NoiseAwareAdamX"), ["optimizer.type", "'NoiseAwareAdamX'", "NoiseAwareAdamW"]),
    "noise": (kind("NoiseAwareAdamW", noise="auto"), ["optimizer.params.noise", "noise_aware"]),
}
WRONG_TYPES = {
    "list": ({"noise_aware": ["auto"]}, ["noise_aware", "['auto']", "must be an object"]),
    "bool": ({"noise_aware": True}, ["noise_aware", "True", "must be an object"]),
    "null": ({"noise_aware": None}, ["noise_aware", "None", "must be an object"]),
    "word": ({"noise_aware": "auto"}, ["noise_aware", "'auto'", "must be an object"]),
    "enabled": (section(enabled="no"), ["noise_aware.enabled", "'no'", "true or false"]),
    "mode": (section(mode=True), ["noise_aware.mode is True", "type str"]),
    "text": (section(max_accumulation_steps="8"), ["noise_aware.max_accumulation_steps is '8'"]),
    "fraction": (section(max_accumulation_steps=8.5), ["max_accumulation_steps is 8.5", "int"]),
    "flag": (section(adapt_lr=1), ["noise_aware.adapt_lr is 1", "type bool"]),
    "clipping": ({"gradient_clipping": "auto"}, ["gradient_clipping", "'auto'", "0 for none"]),
    "no clipping": ({"gradient_clipping": None}, ["gradient_clipping", "None", "0 for none"]),
}
# DeepSpeed's own refusals, which come before ours: the same mistake is an error either way.
ITS_OWN = {
    "elasticity": {
        "elasticity": {
            "enabled": True,
            "max_train_batch_size": 64,
            "micro_batch_sizes": [2],
            "min_gpus": 1,
            "max_gpus": 4,
            "version": 0.1,
        }
    },
    "sparse gradients": {"sparse_gradients": True},
    "stage 3 without the norm": zero(3, compute_grad_norm=False),
    "no window": {"gradient_accumulation_steps": -2},
}
OWN_WORDS = {"elasticity": ["elasticity", "Set train_batch_size"]}
# What looks like the above, and is switched off.
ACCEPTED = {
    "zero": zero(
        compute_grad_norm=True,
        zero_quantized_gradients=False,
        elastic_checkpoint=False,
        zenflow=None,
        offload_optimizer={"device": "none", "super_offload": False, "ratio": 1.0},
    ),
    "deprecated zero": {"zero_optimization": True},
    "hybrid engine": {"hybrid_engine": {"max_out_tokens": 64}},
    "data sampling": {"data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}}},
    "data routing": {"data_efficiency": {"enabled": True, "data_sampling": {}}},
    "random ltd": {"data_efficiency": {"data_routing": {"random_ltd": {"enabled": False}}}},
    "expert parallel": {"expert_parallel": {"enabled": False}},
    "bf16": {"bf16": {"enabled": False, "check_grad_overflow": False}},
    "autocast": {"torch_autocast": {"enabled": False, "dtype": "fp16"}},
    "autotp": {"tensor_parallel": {"autotp_size": 1}},
    "derived window": {
        "gradient_accumulation_steps": None,
        "train_batch_size": 6,
        "sequence_parallel_size": 1,
    },
    "compile": {"compile": {"deepcompile": False}},
    "communication": {"communication_data_type": "fp32"},
    "wider communication": {"communication_data_type": "fp32", "bf16": {"enabled": True}},
    "communication in bf16": {"communication_data_type": "bf16", "bf16": {"enabled": True}},
    "Adagrad without ZeRO": kind("Adagrad"),
    "all keys": section(enabled=True, rate_rule="sgd", schedule="updates", half_life_windows=16),
    "a key of one's own": {"noise_level": 3, "my_section": {}},
    "clipping by default": {},
    "no clipping": {"gradient_clipping": 0.0},
    "clipping": {"gradient_clipping": 0.25},
}


def start(rank):
    """What DeepSpeed needs where nothing has launched it, and no kernel compiled."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "1"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def engine_for(initialize, change, **kwargs):
    model = kwargs.pop("model", None) or net()
    config = copy.deepcopy(BASE) | change
    return initialize(model=model, model_parameters=model.parameters(), config=config, **kwargs)[0]


def refusal(deepspeed, initialize, change):
    """How an error reads, and what it left changed."""
    before = {name: value for name, value in vars(deepspeed).items() if name != "dist"}
    config, same = (copy.deepcopy(BASE | change) for _ in range(2))
    model = net()
    try:
        initialize(model=model, config=config, model_parameters=model.parameters())
    except Exception as error:
        changed = [name for name, was in before.items() if getattr(deepspeed, name) is not was]
        hooks = [p for p in model.parameters() if p._backward_hooks]
        return type(error).__name__, str(error), changed, config == same, len(hooks)
    return None


def all_refusals(rank):
    deepspeed = start(rank)
    from noiseopt.integrations.deepspeed import initialize

    tables = {"contradiction": CONTRADICTIONS, "mistake": MISTAKES, "type": WRONG_TYPES}
    seen = {
        (table, name): refusal(deepspeed, initialize, change)
        for table, cases in tables.items()
        for name, (change, _) in cases.items()
    }
    own = {name: refusal(deepspeed, initialize, change) for name, change in ITS_OWN.items()}
    return seen | {("its own", name): outcome for name, outcome in own.items()}


def all_accepted(rank):
    start(rank)
    from noiseopt.integrations.deepspeed import initialize

    seen = {}
    for name, change in ACCEPTED.items():
        noise = engine_for(initialize, change).noise_aware
        seen[name] = noise.config, noise.max_norm, noise._adaptation.rule
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = {"accepted": all_accepted, "refused": all_refusals}
    return run_on_ranks(cases, tmp_path_factory.mktemp("section"), ranks=1)


def assert_refused(ranks, table, name, kinds, words):
    (seen,) = result(ranks, "refused")
    assert seen[table, name] is not None, "it was not refused"
    error, text, changed, same_config, hooks = seen[table, name]
    assert error in kinds, text
    assert not [word for word in words if word not in text], text
    assert (changed, same_config, hooks) == ([], True, 0)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_names_the_key_and_the_remedy(ranks, name):
    assert_refused(ranks, "contradiction", name, ["ValueError"], CONTRADICTIONS[name][1])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_key_as_it_was_written(ranks, name):
    assert_refused(ranks, "mistake", name, ["ValueError"], MISTAKES[name][1])


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_type_is_told(ranks, name):
    assert_refused(ranks, "type", name, ["TypeError"], WRONG_TYPES[name][1])


@pytest.mark.parametrize("name", ITS_OWN)
def test_what_deepspeed_refuses_itself_leaves_nothing_enabled(ranks, name):
    own = ["DeepSpeedConfigError", "ValidationError", "AssertionError"]
    assert_refused(ranks, "its own", name, own, OWN_WORDS.get(name, []))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_switched_off_is_no_contradiction(ranks, name):
    (seen,) = result(ranks, "accepted")
    config, max_norm, _ = seen[name]
    assert config.accumulation_steps == (3 if name == "derived window" else 2)
    assert config.samples_per_micro_batch == 2
    assert max_norm == config.max_norm


def test_clipping_is_the_ceiling(ranks):
    """What the config leaves out is DeepSpeed's own 1.0."""
    (seen,) = result(ranks, "accepted")
    names = ("clipping by default", "no clipping", "clipping")
    assert [seen[name][0].max_norm for name in names] == [1.0, math.inf, 0.25]


def test_the_section_is_heeded(ranks):
    (seen,) = result(ranks, "accepted")
    config, _, rule = seen["all keys"]
    assert (config.half_life_windows, rule) == (16, "sgd")
    assert seen["compile"][0].mode == "advise"
    assert seen["compile"][2] == "adam"
