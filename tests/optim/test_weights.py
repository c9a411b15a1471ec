"""Micro-batches of unequal weight: by samples, by another weight, or as sums to be divided."""

import math

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from noiseopt import NoiseConfig
from noiseopt.optim import NoiseAwareAdamW, NoiseAwareSGD
from tests.optim.helpers import (
    PAIRS,
    advise,
    build,
    difference,
    draw,
    fixed,
    joined,
    loss_of,
    params_of,
    train,
)

SIZES = [3, 1, 5, 2, 7, 4]


def summed(model, batch):
    return loss_of(model, batch) * len(batch[0])


def run(model, optimizer, batches, loss, weight=None):
    for batch in batches:
        optimizer.set_samples(len(batch[0]), weight and weight(batch))
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def pieces(steps):
    """Batches of unequal size, and the same joined by windows."""
    batches = draw(len(SIZES), SIZES)
    return batches, joined(batches, steps)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_sums_are_divided_by_all_samples(name, steps):
    """The weights are those of torch's optimizer on the mean over the joined batch."""
    ours, theirs, kwargs = PAIRS[name]
    model, reference = build(), build()
    batches, whole = pieces(steps)
    run(model, ours(model.parameters(), noise=sums(steps), **kwargs), batches, summed)
    train(reference, theirs(reference.parameters(), **kwargs), whole)
    assert difference(model, reference) < 1e-12


def sums(steps, **settings):
    return advise(steps, decision_interval=1, loss_reduction="sum", **settings)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sums_are_measured_as_means_are(steps):
    """The same statistics as of mean losses weighted by their samples."""
    batches, _ = pieces(steps)
    found = []
    for config, loss in ((sums(steps), summed), (advise(steps, decision_interval=1), loss_of)):
        model = build()
        optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
        run(model, optimizer, batches, loss)
        found.append([w.norms for d in optimizer.decisions for w in d.windows])
    for ours, theirs in zip(*found, strict=True):
        assert ours.small_sq == pytest.approx(theirs.small_sq)
        assert ours.big_sq == pytest.approx(theirs.big_sq)
        assert ours.small_batch == pytest.approx(theirs.small_batch)
        assert ours.big_batch == pytest.approx(theirs.big_batch)
        assert (ours.count, ours.samples) == (theirs.count, theirs.samples)


def test_sums_are_clipped_as_means():
    """The ceiling is on the norm of what is applied, not of the sum."""
    batches, whole = pieces(3)
    model, reference = build(), build()
    config = fixed(3, loss_reduction="sum", max_norm=0.3)
    run(model, NoiseAwareSGD(model.parameters(), lr=0.1, noise=config), batches, summed)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in whole:
        loss_of(reference, batch).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert difference(model, reference) < 1e-6


@pytest.mark.parametrize("steps", [1, 3])
def test_sums_in_narrow_types(steps):
    """Added up in fp32, divided, and rounded once."""
    batches, whole = pieces(steps)
    model = build(torch.bfloat16)
    optimizer = NoiseAwareSGD(model.parameters(), lr=0.0, noise=sums(steps))
    narrow = [tuple(part.bfloat16() for part in batch) for batch in batches[:steps]]
    for batch in narrow:
        optimizer.set_samples(len(batch[0]))
        summed(model, batch).backward()
        optimizer.step()
        held = [param.grad.clone() for param in model.parameters()]
        optimizer.zero_grad()
    assert optimizer.applied
    reference = build()
    loss_of(reference, whole[0]).backward()
    for grad, param in zip(held, reference.parameters(), strict=True):
        assert (grad.double() - param.grad).norm() < 0.02 * param.grad.norm()


def test_a_sum_under_a_grad_scaler():
    batches, whole = pieces(2)
    model, reference = build(torch.float32), build(torch.float32)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=sums(2))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for batch in batches:
        batch = tuple(part.float() for part in batch)
        optimizer.set_samples(len(batch[0]))
        scaler.scale(summed(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    train(reference, plain, [tuple(part.float() for part in batch) for batch in whole])
    assert difference(model, reference) < 1e-6


def test_a_bad_micro_batch_of_a_sum_takes_its_weight_with_it():
    batches, _ = pieces(3)
    spoilt = (batches[1][0] * math.nan, batches[1][1])
    model, reference = build(), build()
    config = fixed(3, loss_reduction="sum")
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    run(model, optimizer, [batches[0], spoilt, batches[2]], summed)
    left = [tuple(torch.cat(parts) for parts in zip(batches[0], batches[2], strict=True))]
    train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2), left)
    assert difference(model, reference) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_that_is_not_the_number_of_samples(reduction):
    """Tokens weigh, sequences are counted: the mean over tokens, the noise in sequences."""

    def tokens(batch):
        return 2.0 * len(batch[0]) + 1

    def loss(model, batch):
        return loss_of(model, batch) * (tokens(batch) if reduction == "sum" else 1)

    batches = draw(3, [2, 5, 3])
    model, reference = build(), build()
    config = advise(3, decision_interval=1, loss_reduction=reduction)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=config)
    run(model, optimizer, batches, loss, tokens)
    total = sum(map(tokens, batches))
    for batch in batches:
        (loss_of(reference, batch) * tokens(batch) / total).backward()
    torch.optim.AdamW(reference.parameters(), lr=1e-2).step()
    assert difference(model, reference) < 1e-12
    (window,) = optimizer.decision.windows
    weights = [tokens(batch) / total for batch in batches]
    sizes = [2, 5, 3]
    assert window.norms.samples == 10
    assert 1 / window.norms.small_batch == pytest.approx(
        sum(w / n for w, n in zip(weights, sizes, strict=True))
    )
    assert 1 / window.norms.big_batch == pytest.approx(
        sum(w * w / n for w, n in zip(weights, sizes, strict=True))
    )


def test_sums_without_counts_are_refused_before_anything_changes():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=sums(2))
    before = params_of(model)
    loss_of(model, draw(1)[0]).backward()
    with pytest.raises(RuntimeError, match="never, and loss_reduction is 'sum'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradients": "local"}, "the loop averages them"),
        ({"loss_reduction": "sum"}, "the loop divides"),
    ],
)
def test_what_the_loop_itself_does_in_external_mode_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        NoiseConfig(accumulation="external", **settings)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_must_be_positive_and_finite(weight):
    optimizer = NoiseAwareAdamW(build().parameters())
    with pytest.raises(ValueError, match="weight is"):
        optimizer.set_samples(4, weight)


def test_local_gradients_on_one_rank_are_simply_its_own():
    model, reference = build(), build()
    batches = draw(6)
    local = NoiseAwareAdamW(model.parameters(), lr=1e-2, noise=advise(2, gradients="local"))
    with local.accumulate(model):
        train(model, local, batches)
    assert not local.flush()
    train(reference, NoiseAwareAdamW(reference.parameters(), lr=1e-2, noise=advise(2)), batches)
    assert difference(model, reference) == 0
