"""Accelerate and the transformers Trainer over a noise-aware DeepSpeed engine.

On the CPU neither tells its ranks apart under DeepSpeed, so one rank runs them.
"""

import functools
import math
import os
from contextlib import contextmanager

import pytest
import torch

from noiseopt import NoiseConfig
from noiseopt.control.controller import MEASURED_AT_FIRST
from tests.distributed import engines
from tests.distributed.engines import Warnings, config_of
from tests.distributed.ranks import result, run_on_ranks
from tests.optim.helpers import GROWING, build, loss_of

pytestmark = pytest.mark.slow

STAGES = (0, 2, 3)
SETTINGS = {"noise": GROWING | {"decision_interval": 1}, "lr": 1e-2, "gradient_clipping": 10.0}
EPOCHS, LOADED = 3, 51  # micro-batches in an epoch: the last window of two is cut short


@contextmanager
def accelerator_of(config):
    """An Accelerator over DeepSpeed, with nothing of it left behind."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    from noiseopt.integrations import deepspeed

    deepspeed.enable()
    try:
        yield Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    finally:
        deepspeed.disable()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def accelerated(rank, stage, follow):
    """The loop of Accelerate's documentation."""
    engines.set_up(rank)
    from accelerate.utils import DummyOptim

    from noiseopt.integrations.accelerate import follow_windows

    with accelerator_of(config_of(stage, steps=2, **SETTINGS)) as accelerator:
        with pytest.raises(ValueError, match="no noise-aware engine"):
            follow_windows(accelerator)
        net = build(torch.float32)
        loader = loader_of(LOADED)
        optimizer = DummyOptim(net.parameters(), lr=1e-2, weight_decay=0.1)
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        if follow:
            follow_windows(accelerator)
        for _ in range(EPOCHS):
            for batch in loader:
                with accelerator.accumulate(net):
                    accelerator.backward(loss_of(net, batch))
                    optimizer.step()
                    optimizer.zero_grad()
        seen = facts(net)
        net.destroy()
        return seen


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
    data = torch.randn(4 * batches, 6), torch.randn(4 * batches, 3)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=4)


def facts(engine):
    decisions = engine.noise_aware.decisions
    return {
        "decided": [decision.accumulation_steps for decision in decisions],
        "windows": [window for decision in decisions for window in decision.windows],
        "losses": [decision.loss for decision in decisions],
        "factor": engine.noise_aware.lr_factor,
        "clip": engine.gradient_clipping(),
        "weights": engines.weights_of(engine),
    }


def trained(rank, stage, folder):
    """The transformers Trainer on a config full of "auto", and the same resumed."""
    engines.set_up(rank)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from noiseopt.integrations import deepspeed

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
        tokens = torch.randint(0, 32, (160, 8))
        arguments = TrainingArguments(
            output_dir=folder,
            deepspeed=config,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=30,
            save_steps=20,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model=net, args=arguments, train_dataset=data)
        trainer.train(**resume)
        return facts(trainer.deepspeed) | {"steps": trainer.state.global_step}

    deepspeed.enable()
    try:
        return train(), train(resume_from_checkpoint=f"{folder}/checkpoint-20")
    finally:
        deepspeed.disable()


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
    return run_on_ranks(cases, tmp_path_factory.mktemp("ranks"), ranks=1)


@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_keeps_its_windows_and_the_rest_adapts(ranks, stage):
    (seen,) = result(ranks, f"own {stage}")
    lengths = [window.micro_batches for window in seen["windows"]]
    assert lengths == EPOCHS * ([2] * (LOADED // 2) + [1])
    assert set(seen["decided"]) == {2}
    # The short window at the end of an epoch is measured as what it is: one gradient.
    for at, window in list(enumerate(seen["windows"]))[LOADED // 2 :: LOADED // 2 + 1]:
        measured = at < MEASURED_AT_FIRST or at % NoiseConfig().measure_interval == 0
        assert window.norms.small_sq == (pytest.approx(window.norms.big_sq) if measured else ())
    typical = sum(w.norms.small_sq[0] for w in seen["windows"][:25]) / 25
    assert seen["windows"][25].norms.small_sq[0] > typical / 3


@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_follows_the_decisions_where_it_is_led(ranks, stage):
    (seen,) = result(ranks, f"led {stage}")
    lengths = [window.micro_batches for window in seen["windows"]]
    wanted = [2, *seen["decided"][:-1]]
    cut = [at for at, (got, want) in enumerate(zip(lengths, wanted, strict=True)) if got != want]
    assert max(lengths) == GROWING["max_accumulation_steps"]
    assert sum(lengths) == EPOCHS * LOADED
    ends = [sum(lengths[: at + 1]) for at in cut]
    assert all(end % LOADED == 0 for end in ends)
    assert seen["factor"] > 1.1


def test_a_scheduler_that_accelerate_keeps_is_warned_of(ranks):
    (texts,) = result(ranks, "stretched")
    assert sum("it stretches as windows grow" in text for text in texts) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_transformers_trainer_measures_and_resumes(ranks, stage):
    ((whole, resumed),) = result(ranks, f"trainer {stage}")
    assert whole["steps"] == resumed["steps"] == 30
    assert [window.micro_batches for window in whole["windows"]] == [2] * 30
    # ln 32 by 7 of 8 tokens, of which the Trainer gives each backward a half.
    assert whole["losses"][0] == pytest.approx(math.log(32) * 7 / 8, rel=0.02)
    assert len(resumed["decided"]) == 10
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)
    assert resumed["losses"] == whole["losses"][-10:]
