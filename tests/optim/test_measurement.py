"""What is measured is what is applied, and equals the same gradients made one by one.

The brute force is a float64 gradient for each micro-batch, or for each sample by `torch.func`, and
textbook formulas for the variance. Weights stand still where their drift would enter: a learning
rate of 1e-30 leaves weights as they are (but those of 0), and is no zero.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig
from noiseopt.capture import scale_all, squared_norms
from tests.optim.helpers import advise, build, difference, draw, fixed, loss_of, train

STILL = 1e-30


def gradients(model, batches, loss=loss_of):
    """Of each batch, one flat float64 vector for each parameter."""
    exact = copy.deepcopy(model).double()
    params = list(exact.parameters())
    return [
        [g.flatten() for g in torch.autograd.grad(loss(exact, [t.double() for t in b]), params)]
        for b in batches
    ]


def square(parts):
    return sum(part.square().sum() for part in parts).item()


def window_of(optimizer):
    """The one window of the latest decision, if there is a decision for each."""
    (window,) = optimizer.decision.windows
    return window


def every(steps, mode=advise, **settings):
    return mode(steps, decision_interval=1, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 5, 2], [3]], ids=str)
@pytest.mark.parametrize("mode", [advise, fixed])
def test_every_window_equals_the_gradients_made_one_by_one(mode, sizes, fused, dtype):
    """While the weights move: sums of norms by group, effective batches, counts and samples."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    model = build(dtype)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    steps, total = len(sizes), sum(sizes)
    optimizer = NoiseAwareAdamW(groups, lr=1e-2, fused=fused, noise=every(steps, mode))
    batches = draw(steps * 8, sizes * 8, dtype)
    for at in range(0, len(batches), steps):
        micro = gradients(model, batches[at : at + steps])
        for batch in batches[at : at + steps]:
            loss_of(model, batch).backward()
            optimizer.set_samples(len(batch[0]))
            optimizer.step()
            optimizer.zero_grad()
        weights = [n / total for n in sizes]
        mean = [
            sum(w * g for w, g in zip(weights, gs, strict=True)) for gs in zip(*micro, strict=True)
        ]
        norms = window_of(optimizer).norms
        for index, part in enumerate((slice(0, 2), slice(2, 4))):
            small = sum(w * square(g[part]) for w, g in zip(weights, micro, strict=True))
            assert norms.small_sq[index] == pytest.approx(small, rel=tolerance)
            assert norms.big_sq[index] == pytest.approx(square(mean[part]), rel=tolerance)
        assert norms.small_batch == pytest.approx(total / len(sizes))
        assert norms.big_batch == pytest.approx(total)
        assert (norms.count, norms.samples) == (len(sizes), total)


def test_unequal_micro_batches_give_the_analysis_of_variance():
    """tr(Sigma) = sum n_i |g_i - g|^2 / (K - 1)."""
    sizes = [2, 7, 1, 3, 5]
    model, batches = build(), draw(5, sizes)
    micro = [torch.cat(parts) for parts in gradients(model, batches)]
    mean = sum(n * g for n, g in zip(sizes, micro, strict=True)) / sum(sizes)
    trace = sum(n * (g - mean).square().sum() for n, g in zip(sizes, micro, strict=True)) / 4
    optimizer = NoiseAwareAdamW(model.parameters(), lr=STILL, noise=every(5))
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.set_samples(len(batch[0]))
        optimizer.step()
    (sample,) = window_of(optimizer).norms.noise()
    assert sample.trace == pytest.approx(trace.item(), rel=1e-10)
    assert sample.signal == pytest.approx((mean.square().sum() - trace / 18).item(), rel=1e-10)


def test_samples_per_micro_batch_says_the_same_as_telling_each():
    batches, estimates = draw(12, 5), []
    for told in (False, True):
        model = build()
        config = every(3) if told else every(3, samples_per_micro_batch=5)
        optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
        for batch in batches:
            loss_of(model, batch).backward()
            if told:
                optimizer.set_samples(5)
            optimizer.step()
            optimizer.zero_grad()
        estimates.append(optimizer.noise)
    assert estimates[0] == estimates[1]
    assert estimates[0].unit == "samples"
    assert estimates[0].samples_seen == 60


def test_without_sample_counts_noise_is_counted_in_micro_batches():
    """The scale is then smaller by the samples of one."""
    batches, estimates = draw(12, 5), []
    for samples in (None, 5):
        model = build()
        config = every(3, samples_per_micro_batch=samples)
        train(model, optimizer := NoiseAwareAdamW(model.parameters(), noise=config), batches)
        estimates.append(optimizer.noise)
    assert estimates[0].unit == "micro-batches"
    assert estimates[0].scale * 5 == pytest.approx(estimates[1].scale, rel=1e-9)
    assert estimates[0].signal == pytest.approx(estimates[1].signal, rel=1e-9)


@pytest.mark.parametrize("factor", [1 / 64, 3.0, 1024.0])
def test_the_scale_does_not_depend_on_the_loss_scale(factor):
    """A loss that is a sum in place of a mean multiplies trace and signal by the square."""
    batches, estimates = draw(30), []
    for scale in (1.0, factor):
        model = build()
        optimizer = NoiseAwareAdamW(model.parameters(), lr=STILL, noise=every(3))
        train(model, optimizer, batches, lambda m, b, scale=scale: scale * loss_of(m, b))
        estimates.append(optimizer.noise)
    one, other = estimates
    assert other.scale == pytest.approx(one.scale, rel=1e-9)
    assert other.trace == pytest.approx(one.trace * factor**2, rel=1e-9)
    assert other.signal == pytest.approx(one.signal * factor**2, rel=1e-9)


# ---------------------------------------------------------------------- per sample


class Transformer(nn.Module):
    """One block of causal attention and a feed-forward layer over tokens."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.feed = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        query, key, value = self.mix(self.norm(hidden)).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        hidden = hidden + scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return self.head(hidden + self.feed(hidden))


def tokens_loss(model, tokens):
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def per_sample(model, tokens):
    """Every sample's gradient by `vmap(grad)` in float64: for each parameter one row a sample."""
    exact = copy.deepcopy(model).double()
    params = dict(exact.named_parameters())

    def one(params, sample):
        logits = functional_call(exact, params, (sample[None, :-1],))
        return nn.functional.cross_entropy(logits[0], sample[1:])

    found = vmap(grad(one), (None, 0))(params, tokens)
    return {name: value.flatten(1) for name, value in found.items()}


def trace_and_signal(grads):
    """The unbiased sample variance, and the squared mean less what noise adds to it."""
    number = len(grads)
    mean = grads.mean(0)
    trace = (grads - mean).square().sum() / (number - 1)
    return trace.item(), (mean.square().sum() - trace / number).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer_class", [NoiseAwareAdamW, NoiseAwareSGD])
def test_the_estimate_is_that_of_per_sample_gradients_of_a_transformer(optimizer_class, dtype):
    """32 micro-batches of one sequence, each in five windows: trace, signal and scale, by group."""
    model = Transformer().to(dtype)
    tokens = torch.randint(11, (32, 9), generator=torch.Generator().manual_seed(0))
    grads = per_sample(model, tokens)
    trace, signal = trace_and_signal(torch.cat(list(grads.values()), 1))
    head = [p for name, p in model.named_parameters() if name.startswith("head")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    before = copy.deepcopy(model)
    config = advise(32, decision_interval=5, samples_per_micro_batch=1)
    optimizer = optimizer_class([{"params": head}, {"params": rest}], lr=STILL, noise=config)
    for _ in range(5):
        train(model, optimizer, tokens.split(1), tokens_loss)
    assert difference(before, model) < 1e-26
    noise, tolerance = optimizer.noise, 1e-5 if dtype == torch.float32 else 1e-10
    assert noise.trace == pytest.approx(trace, rel=tolerance)
    assert noise.signal == pytest.approx(signal, rel=tolerance)
    assert noise.scale == pytest.approx(trace / signal, rel=tolerance)
    assert noise.fraction == pytest.approx(trace / 32 / (signal + trace / 32), rel=tolerance)
    parts = [
        torch.cat([g for name, g in grads.items() if name.startswith("head") == inside], 1)
        for inside in (True, False)
    ]
    for group, part in zip(noise.groups, parts, strict=True):
        assert (group.trace, group.signal) == pytest.approx(trace_and_signal(part), rel=tolerance)
    assert sum(group.trace for group in noise.groups) == pytest.approx(noise.trace, rel=1e-12)


def test_micro_batches_of_several_samples_estimate_the_same_trace():
    """Windows of 8 x 4 samples in 30 random orders: the mean estimate is the per-sample one."""
    model = Transformer().double()
    tokens = torch.randint(11, (32, 9), generator=torch.Generator().manual_seed(0))
    trace, _ = trace_and_signal(torch.cat(list(per_sample(model, tokens).values()), 1))
    config = every(8, samples_per_micro_batch=4)
    optimizer = NoiseAwareSGD(model.parameters(), lr=STILL, noise=config)
    samples = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        order = torch.randperm(32, generator=generator)
        train(model, optimizer, tokens[order].split(4), tokens_loss)
        samples.append(window_of(optimizer).norms.noise()[0].trace)
    found = torch.tensor(samples, dtype=torch.float64)
    assert abs(found.mean() - trace) < 4 * found.std() / math.sqrt(30)
    assert found.std() < 0.2 * trace


# ---------------------------------------------------------------------- precision, kinds, edits


def test_norms_of_bf16_gradients_are_taken_in_fp32():
    """Torch's own total norm has bf16's three digits; here the signal needs six."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(6, 4096, generator=generator).mul(0.01).add(1.0).to(torch.bfloat16)
    param = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = NoiseAwareSGD([param], lr=STILL, noise=every(6))
    for one in grads:
        param.grad = one.clone()
        optimizer.step()
    norms = window_of(optimizer).norms
    exact = grads.double().square().sum(1).mean().item()
    assert norms.small_sq[0] == pytest.approx(exact, rel=1e-6)
    assert norms.big_sq[0] == pytest.approx(param.grad.double().square().sum().item(), rel=1e-6)
    narrow = torch.nn.utils.get_total_norm([grads[0]]).double().square()
    assert abs(narrow / grads[0].double().square().sum() - 1) > 1e-4


@pytest.mark.parametrize("size", [1, 100, 4096, 49152, 2**16, 2**16 + 1, 2**17, 2**18 + 1])
@pytest.mark.parametrize(
    ("make", "rel"),
    [
        (lambda n: torch.randn(n), 1e-5),
        (lambda n: torch.randn(n) ** 5, 1e-5),
        (lambda n: torch.full((n,), 1 / 3), 1e-4),
    ],
    ids=["normal", "heavy tails", "all alike"],
)
def test_squares_are_summed_as_exactly_as_is_said(make, size, rel):
    torch.manual_seed(0)
    values = make(size)
    found = squared_norms([[values]], values.device).item()
    assert found == pytest.approx(values.double().square().sum().item(), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_many_values_keep_fp32s_accuracy(dtype):
    """One fp32 sum of 4 million squares, by torch's norm, is off by 1e-4 and more."""
    values = torch.rand(2**22, generator=torch.Generator().manual_seed(0)).to(dtype)
    param = nn.Parameter(torch.zeros(2**22, dtype=dtype))
    optimizer = NoiseAwareSGD([param], lr=STILL, noise=every(1))
    param.grad = values.clone()
    optimizer.step()
    exact = values.double().square().sum().item()
    assert window_of(optimizer).norms.small_sq[0] == pytest.approx(exact, rel=1e-5)
    torchs = torch.linalg.vector_norm(values, dtype=torch.float32).double().square().item()
    assert abs(torchs / exact - 1) > 1e-4


def test_parameters_of_several_precisions_are_summed():
    params = [
        nn.Parameter(torch.zeros(4, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    ]
    optimizer = NoiseAwareSGD(params, lr=STILL, noise=every(2))
    for value in (1.0, 3.0):
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()
    norms = window_of(optimizer).norms
    assert norms.small_sq[0] == pytest.approx(4 * 4 * 5)
    assert norms.big_sq[0] == pytest.approx(4 * 4 * 4)


def test_rows_that_come_twice_in_a_sparse_gradient_are_added_before_squaring():
    model = nn.Embedding(5, 3, sparse=True).double()
    optimizer = NoiseAwareSGD(model.parameters(), lr=STILL, noise=every(2))
    rows = [torch.tensor([1, 1, 4]), torch.tensor([2, 1, 2])]
    dense = []
    for one in rows:
        optimizer.zero_grad()
        model(one).square().sum().backward()
        dense.append(model.weight.grad.to_dense())
        optimizer.step()
    norms = window_of(optimizer).norms
    assert norms.small_sq[0] == pytest.approx(sum(g.square().sum() for g in dense).item() / 2)
    assert norms.big_sq[0] == pytest.approx((sum(dense) / 2).square().sum().item())


def test_complex_gradients_count_both_parts():
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    optimizer = NoiseAwareSGD([param], lr=STILL, noise=every(2))
    for value in (3 + 4j, -3 + 4j):
        param.grad = torch.tensor([value, 2j], dtype=torch.complex128)
        optimizer.step()
    norms = window_of(optimizer).norms
    assert norms.small_sq[0] == pytest.approx(29)
    assert norms.big_sq[0] == pytest.approx(20)


@pytest.mark.parametrize("accumulation", ["internal", "external"])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_that_are_conjugated_only_when_read(accumulation, steps):
    """As autograd brings them of a loss of `param.conj()`."""
    values = torch.tensor([3 + 4j, 1 - 2j, 2j])
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    noise = every(steps, fixed, accumulation=accumulation, max_norm=math.inf)
    optimizer = NoiseAwareSGD([param], lr=0.5, noise=noise)
    external = accumulation == "external"
    for factor in (1.0, 3.0)[:steps]:
        loss = (param.conj() * values * factor).real.sum()
        (loss / steps if external else loss).backward()
        assert param.grad.is_conj()
        if not external:
            optimizer.step()
            optimizer.zero_grad()
    if external:
        optimizer.step()
    mean = (1.0, 2.0)[steps - 1]
    torch.testing.assert_close(param.detach(), -0.5 * mean * values)
    norms = window_of(optimizer).norms
    assert norms.big_sq[0] == pytest.approx(34 * mean**2)
    assert norms.small_sq[0] == pytest.approx(34 * (1.0, 5.0)[steps - 1])


def test_conjugated_tensors_are_scaled_in_place():
    values = torch.tensor([3 + 4j, 1 - 2j])
    scaled = values.clone().conj()
    scale_all([scaled], 0.5)
    torch.testing.assert_close(scaled, 0.5 * values.conj())


def test_reentrant_checkpointing_measures_the_same():
    """Norms are read at step(), whatever the backward did to its hooks."""
    windows = []
    for wrap in (False, True):
        model = build()
        optimizer = NoiseAwareAdamW(model.parameters(), noise=every(2))
        for inputs, targets in draw(2):
            inputs.requires_grad_()
            hidden = model[:2]
            found = checkpoint(hidden, inputs, use_reentrant=True) if wrap else hidden(inputs)
            (model[2](found) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        windows.append(window_of(optimizer))
    assert windows[0] == windows[1]


def test_what_a_loop_clips_is_measured_clipped_on_both_sides():
    """Small and big norms come from the same vectors, so that the estimate is that pipeline's."""
    model, batches = build(), draw(4)
    optimizer = NoiseAwareAdamW(model.parameters(), lr=STILL, noise=every(4))
    clipped = []
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        clipped.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    norms = window_of(optimizer).norms
    assert norms.small_sq[0] == pytest.approx(0.25, rel=1e-5)
    assert norms.big_sq[0] == pytest.approx((sum(clipped) / 4).square().sum().item(), rel=1e-12)


def test_its_own_clipping_is_measured_before_it():
    """A threshold that bites changes the update and not the estimate."""
    estimates = []
    for max_norm in (1e-3, math.inf):
        model = build()
        optimizer = NoiseAwareSGD(
            model.parameters(), lr=STILL, noise=every(3, fixed, max_norm=max_norm)
        )
        train(model, optimizer, draw(30))
        estimates.append(optimizer.noise)
    assert estimates[0] == estimates[1]


def test_a_window_of_one_shows_no_noise_and_probes_do():
    """In "advise" nothing is probed; in "auto" every fourth window at first has two."""
    batches = draw(60)
    measured = {}
    for mode in ("advise", "auto"):
        model = build()
        config = NoiseConfig(mode=mode, decision_interval=5, probe_interval=16, min_count=1000.0)
        optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
        train(model, optimizer, batches)
        measured[mode] = optimizer
    assert measured["advise"].noise is None
    assert "nothing is probed" in measured["advise"].decision.reason
    assert measured["auto"].noise.scale > 0
    steps = [w.micro_batches for d in measured["auto"].decisions for w in d.windows]
    assert steps == [2 if (at + 1) % 4 == 0 else 1 for at in range(len(steps))]
