"""Accelerate and the transformers Trainer over a noise-aware engine, on two real ranks."""

import functools
import math
import os
from contextlib import contextmanager
from statistics import fmean

import pytest
import torch

from noiseopt import NoiseConfig
from noiseopt.control.clipping import MIN_COUNT
from noiseopt.control.controller import MEASURED_AT_FIRST
from tests.distributed import engines
from tests.distributed.engines import Warnings, config_of
from tests.distributed.ranks import RANKS, result, run_on_ranks
from tests.optim.helpers import GROWING, build, loss_of

pytestmark = pytest.mark.distributed

STAGES = (0, 2, 3)
SETTINGS = {"noise": GROWING | {"decision_interval": 1}, "lr": 1e-2, "gradient_clipping": 10.0}
EPOCHS, LOADED = 4, 51  # a rank's micro-batches in an epoch: the last window of two is cut short
UPDATES = 30  # of the Trainer, in three epochs, of which each ends in a window of one
LEARNED = MIN_COUNT + 10  # updates by which the clipping threshold is known


@contextmanager
def enabled():
    """DeepSpeed as Accelerate finds it on these ranks, with nothing of it left behind.

    Accelerate chooses a backend by the accelerator: on a CPU it has to be told one, or it takes
    each rank to be alone.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    from noiseopt.integrations import deepspeed

    deepspeed.enable()
    try:
        assert PartialState(backend="gloo").num_processes == RANKS
        yield
    finally:
        deepspeed.disable()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


@contextmanager
def accelerator_of(config):
    """An Accelerator over DeepSpeed."""
    with enabled():
        from accelerate import Accelerator, DeepSpeedPlugin

        yield Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def accelerated(rank, stage, follow):
    """The loop of Accelerate's documentation."""
    engines.set_up(rank)
    from accelerate.utils import DummyOptim

    from noiseopt.integrations.accelerate import follow_windows

    config = config_of(stage, steps=2, **SETTINGS)
    with Warnings() as texts, accelerator_of(config) as accelerator:
        with pytest.raises(ValueError, match="no noise-aware engine"):
            follow_windows(accelerator)
        net = build(torch.float32)
        loader = loader_of(LOADED)
        optimizer = DummyOptim(net.parameters(), lr=1e-2, weight_decay=0.1)
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        if follow:
            follow_windows(accelerator)
        ends = []
        for _ in range(EPOCHS):
            for at, batch in enumerate(loader, start=1):
                if at == LOADED:
                    ends.append(gradient(net, batch))
                with accelerator.accumulate(net):
                    accelerator.backward(loss_of(net, batch))
                    optimizer.step()
                    optimizer.zero_grad()
        seen = facts(net) | {"ends": ends, "texts": texts}
        net.destroy()
        return seen


def gradient(engine, batch):
    """That of one micro-batch in one vector, by plain autograd on a model with the same weights."""
    twin = build(torch.float32)
    torch.nn.utils.vector_to_parameters(engines.weights_of(engine), twin.parameters())
    grads = torch.autograd.grad(loss_of(twin, batch), list(twin.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def stretched(rank):
    """A torch scheduler, which Accelerate keeps to itself."""
    engines.set_up(rank)
    from noiseopt.integrations.accelerate import follow_windows

    with accelerator_of(config_of(0, **SETTINGS, optimizer=None)) as accelerator:
        net = build(torch.float32)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        net, *_ = accelerator.prepare(net, optimizer, schedule, loader_of(1))
        with Warnings() as texts:
            follow_windows(accelerator)
        net.destroy()
        return texts


def loader_of(batches):
    """So many micro-batches for each rank, among which Accelerate divides them."""
    samples = RANKS * engines.MICRO_BATCH * batches
    data = torch.utils.data.TensorDataset(torch.randn(samples, 6), torch.randn(samples, 3))
    return torch.utils.data.DataLoader(data, batch_size=engines.MICRO_BATCH)


def facts(engine):
    decisions = engine.noise_aware.decisions
    return {
        "decisions": decisions,
        "decided": [decision.accumulation_steps for decision in decisions],
        "windows": [window for decision in decisions for window in decision.windows],
        "losses": [decision.loss for decision in decisions],
        "factor": engine.noise_aware.lr_factor,
        "clip": engine.gradient_clipping(),
        "weights": engines.weights_of(engine),
    }


def trained(rank, stage, folder, updates=UPDATES):
    """The transformers Trainer on a config full of "auto", and the same resumed."""
    engines.set_up(rank)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    config = config_of(stage, lr="auto", gradient_clipping="auto", noise=SETTINGS["noise"])
    config["optimizer"]["params"]["weight_decay"] = "auto"
    config |= {"gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto"}
    config = {name: value for name, value in config.items() if name != "steps_per_print"}

    def train(**resume):
        torch.manual_seed(0)
        shape = GPT2Config(
            vocab_size=32,
            n_positions=8,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        net = GPT2LMHeadModel(shape)
        tokens = torch.randint(0, 32, (76, 8))
        arguments = TrainingArguments(
            output_dir=folder,
            deepspeed=config,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=updates,
            save_steps=UPDATES // 2,
            learning_rate=1e-2,
            max_grad_norm=SETTINGS["gradient_clipping"],
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model=net, args=arguments, train_dataset=data)
        with Warnings() as texts:
            trainer.train(**resume)
        steps = trainer.state.global_step
        return facts(trainer.deepspeed) | {"steps": steps, "texts": texts}

    with enabled():
        whole = train()
        if updates > UPDATES:
            return whole
        return whole, train(resume_from_checkpoint=f"{folder}/checkpoint-{UPDATES // 2}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = {
        f"{'led' if follow else 'own'} {stage}": functools.partial(
            accelerated, stage=stage, follow=follow
        )
        for stage in STAGES
        for follow in (False, True)
    }
    cases["stretched"] = stretched
    for stage in STAGES:
        folder = str(tmp_path_factory.mktemp("trainer"))
        cases[f"trainer {stage}"] = functools.partial(trained, stage=stage, folder=folder)
    long = str(tmp_path_factory.mktemp("long"))
    cases["long trainer"] = functools.partial(trained, stage=0, folder=long, updates=LEARNED)
    return run_on_ranks(cases, tmp_path_factory.mktemp("ranks"))


def alike(ranks, name):
    """What both ranks saw; fails where they do not agree."""
    first, second = result(ranks, name)
    assert first["decisions"] == second["decisions"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert all(window.norms.count == RANKS * window.micro_batches for window in first["windows"])
    return first


@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_keeps_its_windows_and_the_rest_adapts(ranks, stage):
    seen = alike(ranks, f"own {stage}")
    lengths = [window.micro_batches for window in seen["windows"]]
    assert lengths == EPOCHS * ([2] * (LOADED // 2) + [1])
    assert set(seen["decided"]) == {2}


@pytest.mark.parametrize("name", [*(f"own {stage}" for stage in STAGES), "long trainer"])
def test_clipping_adapts_where_windows_do_not_and_that_is_told_once(ranks, name):
    seen = alike(ranks, name)
    assert seen["clip"] == seen["decisions"][-1].max_norm < SETTINGS["gradient_clipping"] / 2
    assert seen["factor"] == 1.0
    told, silent = (run["texts"] for run in result(ranks, name))
    assert sum("the loop says where windows end" in text for text in told) == 1
    assert not silent


@pytest.mark.parametrize("stage", STAGES)
def test_the_short_window_at_the_end_of_an_epoch_is_measured_as_what_it_is(ranks, stage):
    windows = alike(ranks, f"own {stage}")["windows"]
    ends = zip(*(seen["ends"] for seen in result(ranks, f"own {stage}")), strict=True)
    for epoch, expected in enumerate(ends, start=1):
        at = epoch * (LOADED // 2 + 1) - 1
        measured = at < MEASURED_AT_FIRST or at % NoiseConfig().measure_interval == 0
        small = fmean(grad.square().sum().item() for grad in expected)
        big = (sum(expected) / RANKS).square().sum().item()
        assert windows[at].norms.small_sq == ((pytest.approx(small, rel=1e-5),) if measured else ())
        assert windows[at].norms.big_sq == (pytest.approx(big, rel=1e-5),)


@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_follows_the_decisions_where_it_is_led(ranks, stage):
    seen = alike(ranks, f"led {stage}")
    lengths = [window.micro_batches for window in seen["windows"]]
    wanted = [2, *seen["decided"][:-1]]
    cut = [at for at, (got, want) in enumerate(zip(lengths, wanted, strict=True)) if got != want]
    assert max(lengths) == GROWING["max_accumulation_steps"]
    assert sum(lengths) == EPOCHS * LOADED
    ends = [sum(lengths[: at + 1]) for at in cut]
    assert all(end % LOADED == 0 for end in ends)
    assert seen["factor"] > 1.1


def test_a_scheduler_that_accelerate_keeps_is_warned_of(ranks):
    told, silent = result(ranks, "stretched")
    assert sum("it stretches as windows grow" in text for text in told) == 1
    assert not any("it stretches" in text for text in silent)


@pytest.mark.parametrize("stage", STAGES)
def test_the_transformers_trainer_measures_and_resumes(ranks, stage):
    (whole, resumed), (_, elsewhere) = result(ranks, f"trainer {stage}")
    assert whole["steps"] == resumed["steps"] == UPDATES
    lengths = [window.micro_batches for window in whole["windows"]]
    assert lengths == UPDATES // 10 * ([2] * 9 + [1])
    assert all(window.norms.count == RANKS * window.micro_batches for window in whole["windows"])
    # ln 32 by 7 of 8 tokens, of which the Trainer gives each backward a half.
    assert whole["losses"][0] == pytest.approx(math.log(32) * 7 / 8, rel=0.02)
    assert whole["losses"][9] == pytest.approx(whole["losses"][8], rel=0.2)
    assert len(resumed["decided"]) == UPDATES // 2
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)
    assert resumed["losses"] == whole["losses"][-UPDATES // 2 :]
    assert resumed["decisions"] == elsewhere["decisions"]
