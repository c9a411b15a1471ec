"""Micro-batches that come to nothing, on two real ranks: thrown away, raised in, told and left out.

What is measured, and what the weights become, is as if they had never been.
"""

import functools

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import MEASURED, Warnings, batches_of, config_of, engine_of
from tests.distributed.ranks import result, run_on_ranks
from tests.distributed.test_deepspeed import OFFLOAD
from tests.distributed.test_deepspeed_mistakes import SUMS, backward, windows
from tests.optim.helpers import build, loss_of

pytestmark = pytest.mark.distributed

SGD = {
    "optimizer": {"type": "NoiseAwareSGD", "params": {"lr": 0.01, "weight_decay": None}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}


def config(stage, bf16=False, steps=1, mode="auto", **more):
    noise = MEASURED | {"mode": mode, "min_accumulation_steps": steps}
    noise["max_accumulation_steps"] = steps
    return config_of(stage, bf16, steps, noise, **SGD | more)


def clears(engine, net, by):
    {"engine": engine, "optimizer": engine.optimizer, "model": net}[by].zero_grad()


def made(net, offload=False, **of):
    if not offload:
        return engine_of(config(**of), net)
    whole = engines.merged(config(**of), {"optimizer": None, **OFFLOAD})
    return engine_of(whole, net, torch.optim.SGD(engines.groups_of(net), lr=0.01))


def facts(engine):
    return engines.weights_of(engine), repr(list(engine.noise_aware.decisions))


def thrown_away(rank, by, ran, factor=1000.0, told=False, looks=False, **of):
    """Micro-batches that are thrown away after their backward, two in turn and one, or never ran.

    In windows of two they come before the first that stays.
    """
    engines.set_up(rank)
    net = build(torch.float32)
    with Warnings() as texts, made(net, **of) as engine:
        for index, batch in enumerate(batches_of(9, rank)):
            bad = index in (2, 3, 6)
            if told and (ran or not bad):
                engine.noise_aware.set_samples(index + 1)
            if not bad:
                backward(engine, batch)
                engine.step()
            elif ran:
                backward(engine, batch, factor)
                if looks:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
                clears(engine, net, by)
        if ran:
            backward(engine, batch)
            clears(engine, net, by)
        found = facts(engine)
    return *found, list(texts)


def both(rank, **of):
    return [thrown_away(rank, ran=ran, **of) for ran in (True, False)]


def kept_by_deepspeed(rank, stage, by, at, steps, **more):
    """A micro-batch that DeepSpeed keeps in its sums when it is cleared."""
    engines.set_up(rank)
    net = build(torch.float32)
    with Warnings() as texts, made(net, stage=stage, steps=steps, **more) as engine:
        for index, batch in enumerate(batches_of(5, rank)):
            backward(engine, batch)
            if index == at:
                clears(engine, net, by)
                continue
            try:
                engine.step()
            except RuntimeError as error:
                return [str(error)], None
        return texts, [window.norms.finite for window in windows(engine)]


def stepped_all_the_same(rank, stage):
    """Cleared after its backward, and its step taken: with ZeRO DeepSpeed applies it."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config(stage)) as engine:
        before = engines.weights_of(engine)
        backward(engine, batches_of(1, rank)[0])
        engine.zero_grad()
        engine.step()
        moved = not torch.equal(before, engines.weights_of(engine))
        return moved, [window.norms.finite for window in windows(engine)], texts


def went_back(rank, folder, by, bad, at=3, **of):
    """After a bad backward, which is cleared, the loop goes back to its checkpoint."""
    engines.set_up(rank)
    net = build(torch.float32)
    with Warnings() as texts, made(net, **of) as engine:
        batches = batches_of(8, rank)
        for index, batch in enumerate(batches[:at]):
            backward(engine, batch)
            engine.step()
            if index == 1:
                engine.save_checkpoint(folder)
        if bad:
            backward(engine, batches[at], 1000.0)
            clears(engine, net, by)
        engine.load_checkpoint(folder)
        for batch in batches[4:]:
            backward(engine, batch)
            engine.step()
        found = facts(engine)
    return *found, list(texts)


def back_and_not(rank, folder, at=2, **of):
    return [
        went_back(rank, f"{folder} {bad}", bad=bad, at=at if bad else 2, **of)
        for bad in (True, False)
    ]


def may_not_go_back(rank, folder, stage, by, at, steps):
    engines.set_up(rank)
    with pytest.raises(RuntimeError, match=r"load_checkpoint\(\) after . of . micro-batches"):
        went_back(rank, folder, by, True, at, stage=stage, steps=steps)


# ------------------------------------------------------------------ backwards that raise


def raised(rank, stage, steps, clearing, ran=True):
    """The third of seven backwards raises half-way, or never ran; its gradients stay or not."""
    engines.set_up(rank)
    net, due = build(torch.float32), [False]

    def fail(*_):
        if due[0]:
            raise MemoryError

    net[1].register_full_backward_hook(fail)
    with Warnings() as texts, engine_of(config(stage, steps=steps), net) as engine:
        for index, batch in enumerate(batches_of(7, rank)):
            due[0] = index == 2
            if due[0] and not ran:
                continue
            try:
                backward(engine, batch)
            except MemoryError:
                if clearing:
                    engine.zero_grad()
                continue
            engine.step()
        return texts, [window.norms.finite for window in windows(engine)], facts(engine)


def raised_or_not(rank, **of):
    return [raised(rank, ran=ran, **of) for ran in (True, False)]


def came_with_gradients(rank, value):
    """A model that holds gradients before its engine is made."""
    engines.set_up(rank)
    net = build(torch.float32)
    for param in net.parameters():
        param.grad = torch.full_like(param, value)
    with Warnings() as texts, engine_of(config(0), net) as engine:
        backward(engine, batches_of(1, rank)[0])
        engine.step()
        return texts, [window.norms.finite for window in windows(engine)]


# ------------------------------------------------------------------ counts and losses


def told(rank, steps, backwards, late=False):
    """Counts that are told before each micro-batch, or late, of which some have no backward.

    Args:
        backwards: for each micro-batch whether it has a backward, and whether a step; one with a
            backward alone is thrown away.
        late: whether counts are told between backward and step.
    """
    engines.set_up(rank)
    with engine_of(config(1, steps=steps)) as engine:
        batches = batches_of(len(backwards), rank)
        for index, (batch, (runs, steps)) in enumerate(zip(batches, backwards, strict=True)):
            if not late:
                engine.noise_aware.set_samples(index + 1)
            if runs:
                backward(engine, batch)
            if late:
                engine.noise_aware.set_samples(index + 1)
            if steps:
                engine.step()
            elif runs:
                engine.zero_grad()
        return [window.norms.samples for window in windows(engine)]


def told_ahead(rank, ahead):
    """Counts of 1, 2, ... that are told as batches are fetched, some before it is their turn."""
    engines.set_up(rank)
    with Warnings() as texts, engine_of(config(1, steps=2)) as engine:
        fetched = 0
        for index, batch in enumerate(batches_of(4, rank)):
            while fetched < {"windows": index // 2 * 2 + 2, "one": index + 2}[ahead]:
                fetched += 1
                engine.noise_aware.set_samples(fetched)
            backward(engine, batch)
            engine.step()
        return [window.norms.samples for window in windows(engine)], texts


def left_out(rank):
    """One rank leaves the fifth backward out, and calls step()."""
    runs = [(not (rank == 0 and index == 4), True) for index in range(6)]
    return told(rank, 3, runs)


def shaped_losses(rank, stage, shape):
    engines.set_up(rank)
    with engine_of(config(stage, steps=2)) as engine:
        for batch in batches_of(4, rank):
            engine.backward(loss_of(engine, batch).reshape(shape))
            engine.step()
        return facts(engine)[1]


# ------------------------------------------------------------------ cases

ANY = ("engine", "optimizer", "model")
RIGHT = {
    **{f"0 {by} {n}": {"stage": 0, "by": by, "steps": n} for by in ANY for n in (1, 2)},
    **{f"1 {by} {n}": {"stage": 1, "by": by, "steps": n} for by in ANY for n in (1, 2)},
    **{f"2 {by} 1": {"stage": 2, "by": by, "steps": 1} for by in ANY},
    **{f"3 optimizer {n}": {"stage": 3, "by": "optimizer", "steps": n} for n in (1, 2)},
    "1 bf16": {"stage": 1, "by": "engine", "steps": 2, "bf16": True},
    "2 bf16": {"stage": 2, "by": "engine", "bf16": True},
    "1 sums": {"stage": 1, "by": "optimizer", "steps": 2, "bf16": True, **SUMS},
    "3 offload": {"stage": 3, "by": "optimizer", "steps": 2, "offload": True},
    "1 advise": {"stage": 1, "by": "engine", "steps": 2, "mode": "advise"},
    "2 advise": {"stage": 2, "by": "engine", "mode": "advise"},
    **{f"{s} nan": {"stage": s, "by": "optimizer", "factor": float("nan")} for s in range(4)},
    "2 fp16": {"stage": 2, "by": "engine", "factor": float("inf"), **FP16},
    **{f"{s} told": {"stage": s, "by": "optimizer", "told": True} for s in range(4)},
    "0 looked at": {"stage": 0, "by": "engine", "steps": 2, "looks": True},
}
KEPT = {  # whether it is refused; if not, the window is not measured, and that is told
    "0 second": (False, {"stage": 0, "by": "engine", "at": 3, "steps": 2}),
    "1 second": (True, {"stage": 1, "by": "engine", "at": 3, "steps": 2}),
    "2 first": (True, {"stage": 2, "by": "optimizer", "at": 2, "steps": 2}),
    "3 engine": (False, {"stage": 3, "by": "engine", "at": 2, "steps": 1}),
    "1 sums": (True, {"stage": 1, "by": "engine", "at": 2, "steps": 1, "bf16": True, **SUMS}),
    "2 sums": (True, {"stage": 2, "by": "optimizer", "at": 2, "steps": 1, "bf16": True, **SUMS}),
    "2 offload": (True, {"stage": 2, "by": "engine", "at": 2, "steps": 1, "offload": True}),
}
BACK = {
    **{f"{s} once": {"stage": s, "by": "engine"} for s in range(3)},
    **{f"{s} second": {"stage": s, "by": "engine", "at": 3, "steps": 2} for s in (0, 1)},
    "1 first": {"stage": 1, "by": "model", "steps": 2},
    "3 once": {"stage": 3, "by": "optimizer"},
    "3 second": {"stage": 3, "by": "optimizer", "at": 3, "steps": 2},
}
NOT_BACK = {
    "2 longer": {"stage": 2, "by": "optimizer", "at": 2, "steps": 2},
    "3 engine": {"stage": 3, "by": "engine", "at": 2, "steps": 1},
}
CASES = {
    **{f"thrown away {name}": functools.partial(both, **of) for name, of in RIGHT.items()},
    **{f"kept {n}": functools.partial(kept_by_deepspeed, **of) for n, (_, of) in KEPT.items()},
    **{f"stepped {s}": functools.partial(stepped_all_the_same, stage=s) for s in range(4)},
    **{
        f"raised {stage} {steps} {clearing}": functools.partial(
            raised_or_not, stage=stage, steps=steps, clearing=clearing
        )
        for stage in (0, 1)
        for steps in (1, 2)
        for clearing in (False, True)
    },
    **{f"came with {each}": functools.partial(came_with_gradients, value=each) for each in (0, 1)},
    "left out": left_out,
    **{f"ahead by {by}": functools.partial(told_ahead, ahead=by) for by in ("windows", "one")},
    "failed": functools.partial(
        told, steps=2, backwards=[(True, True)] * 3 + [(False, False), (True, True)]
    ),
    "late": functools.partial(
        told, steps=2, late=True, backwards=[(True, False)] + [(True, True)] * 4
    ),
    **{
        f"shape {stage} {len(shape)}": functools.partial(shaped_losses, stage=stage, shape=shape)
        for stage in (0, 1)
        for shape in ((), (1,), (1, 1))
    },
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    back = {
        f"{what} {name}": functools.partial(case, folder=str(folder / f"{what} {name}"), **of)
        for what, case, cases in (
            ("back", back_and_not, BACK),
            ("not back", may_not_go_back, NOT_BACK),
        )
        for name, of in cases.items()
    }
    return run_on_ranks(CASES | back, folder)


@pytest.mark.parametrize("name", RIGHT)
def test_a_micro_batch_that_is_thrown_away_is_as_one_that_never_ran(ranks, name):
    for (weights, decisions, texts), (same, also, _) in result(ranks, f"thrown away {name}"):
        torch.testing.assert_close(weights, same, rtol=0, atol=1e-7)
        assert decisions == also
        assert not texts


@pytest.mark.parametrize("name", KEPT)
def test_a_micro_batch_that_deepspeed_keeps_is_refused_or_told(ranks, name):
    for (text, *more), measured in result(ranks, f"kept {name}"):
        assert not more
        if KEPT[name][0]:
            assert "DeepSpeed keeps only the last gradient" in text
        else:
            assert False in measured


@pytest.mark.parametrize("stage", range(4))
def test_a_micro_batch_that_was_cleared_and_stepped_is_measured_as_it_is_applied(ranks, stage):
    for moved, measured, texts in result(ranks, f"stepped {stage}"):
        assert moved == (stage > 0)
        assert measured == [stage > 0]
        assert len(texts) == (stage == 0)


@pytest.mark.parametrize("name", BACK)
def test_a_loop_may_go_back_once_it_has_thrown_a_window_away(ranks, name):
    for (weights, decisions, texts), (same, also, _) in result(ranks, f"back {name}"):
        assert torch.equal(weights, same)
        assert decisions == also
        assert not texts


@pytest.mark.parametrize("name", NOT_BACK)
def test_a_loop_may_not_go_back_where_deepspeed_keeps_the_gradients(ranks, name):
    result(ranks, f"not back {name}")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("raised")])
def test_what_a_backward_that_raised_has_left_is_told(ranks, name):
    steps, clearing = int(name.split()[2]), name.endswith("True")
    for rank, (run, reference) in enumerate(result(ranks, name)):
        (texts, measured, found), bad = run, 2 // steps
        if clearing:
            assert torch.equal(found[0], reference[2][0])
            assert found[1] == reference[2][1]
        assert measured == [clearing or index != bad for index in range(6 // steps)]
        assert len(texts) == (not clearing)
        assert all(text.startswith(f"rank {rank}: there were gradients before") for text in texts)


@pytest.mark.parametrize("value", [0, 1])
def test_gradients_that_an_engine_is_made_with_are_told_unless_they_are_zero(ranks, value):
    for texts, measured in result(ranks, f"came with {value}"):
        assert measured == [not value]
        assert len(texts) == value


def test_a_count_without_a_backward_is_of_no_micro_batch(ranks):
    for first, second in result(ranks, "left out"):
        assert first == 2 * (1 + 2 + 3)
        assert second == 4 + 6 + (4 + 5 + 6)
    for seen in result(ranks, "failed"):
        assert seen == [2 * (1 + 2), 2 * (3 + 5)]


def test_the_counts_of_a_window_may_come_before_it(ranks):
    for seen, texts in result(ranks, "ahead by windows"):
        assert seen == [2 * (1 + 2), 2 * (3 + 4)]
        assert not texts


def test_more_counts_than_micro_batches_are_told(ranks):
    for _, texts in result(ranks, "ahead by one"):
        (text,) = texts
        assert "set_samples() was called 3 times in a window of 2 micro-batches" in text


def test_a_count_may_come_between_backward_and_step(ranks):
    for seen in result(ranks, "late"):
        assert seen == [2 * (2 + 3), 2 * (4 + 5)]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_may_be_a_tensor_of_one_element(ranks, stage):
    usual = result(ranks, f"shape {stage} 0")
    assert usual == result(ranks, f"shape {stage} 1") == result(ranks, f"shape {stage} 2")
