"""Loops that leave something out or over, on two real ranks: what must stay right all the same."""

import functools
from dataclasses import replace

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import MEASURED, Warnings, batches_of, config_of, engine_of, run
from tests.distributed.ranks import result, run_on_ranks
from tests.optim.helpers import loss_of

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
            seen[mode] = loaded, engine.gradient_accumulation_steps(), decision.batch
    return seen


def no_optimizer(rank, stage):
    engines.set_up(rank)
    from noiseopt.integrations.deepspeed import initialize
    from tests.optim.helpers import build

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
    "clipped by the loop": functools.partial(clipped_by, way="the loop"),
    "clipped by the engine": functools.partial(clipped_by, way="the engine"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    resumed = functools.partial(resumed_by_the_loop, folder=str(folder / "saved"))
    return run_on_ranks(CASES | {"resumed": resumed}, folder)


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


def test_what_one_ranks_loop_does_is_told_there(ranks):
    (first, measured), (second, also) = result(ranks, "extra")
    assert measured == also == [False]
    assert not first
    (text,) = second
    assert text.startswith("rank 1: 3 backward passes in 2 calls of engine.step()")
