"""A run that was saved and loaded between windows goes on bit for bit: weights and decisions.

The straight run saves, through torch.save and weights_only, after every update; then one run is
resumed from each of these files. What is compared is every later decision and the last weights.
"""

import copy
import io
import math
import warnings
from dataclasses import replace

import pytest
import torch

from noiseopt import NoiseAwareAdam, NoiseAwareAdamW, NoiseAwareSGD
from tests.optim.helpers import (
    advise,
    build,
    difference,
    draw,
    fixed,
    growing,
    loss_of,
    params_of,
    same_bits,
    train,
)

OPTIMIZERS = {
    "AdamW": (NoiseAwareAdamW, {"lr": 3e-3, "betas": (0.9, 0.95)}),
    "AdamW, fused": (NoiseAwareAdamW, {"lr": 3e-3, "betas": (0.9, 0.95), "fused": True}),
    "Adam": (NoiseAwareAdam, {"lr": 3e-3, "amsgrad": True}),
    "SGD": (NoiseAwareSGD, {"lr": 0.02, "momentum": 0.9}),
}
GROWS = growing(max_norm=1.0, verify=True, dwell_updates=15, min_count=3.0)
LEARNS_TO_CLIP = growing(clip_z=0.5, min_count=3.0)


class Run:
    """A model, its optimizer, and how many micro-batches they have seen."""

    def __init__(self, name, config, dtype=torch.float32):
        make, kwargs = OPTIMIZERS[name]
        self.model = build(dtype)
        self.optimizer = make(self.model.parameters(), noise=config, **kwargs)
        self.decisions, self.seen, self.num_updates = [], 0, 0
        self.optimizer.add_observer(self.decisions.append)

    def step(self, batches):
        loss = loss_of(self.model, batches[self.seen])
        loss.backward()
        self.optimizer.report_loss(loss)
        self.optimizer.set_samples(len(batches[self.seen][0]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += 1
        self.num_updates += self.optimizer.applied

    def until(self, num_updates, batches):
        while self.num_updates < num_updates:
            self.step(batches)
        return self

    def save(self):
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), self.seen], file)
        return file

    def load(self, file):
        file.seek(0)
        model, optimizer, self.seen = torch.load(file, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.num_updates = self.optimizer.num_updates
        return self


def without_windows(decisions):
    return [replace(decision, windows=()) for decision in decisions]


def parts(file):
    """Every tensor and every number of a saved run."""
    file.seek(0)
    model, optimizer, seen = torch.load(file, weights_only=True)
    moments = [
        tensor for state in optimizer["state"].values() for _, tensor in sorted(state.items())
    ]
    numbers = [group["noise"] for group in optimizer["param_groups"]]
    return [*model.values(), *moments], [*numbers, seen]


def assert_same_state(one, other):
    (tensors, numbers), (other_tensors, other_numbers) = parts(one), parts(other)
    assert numbers == other_numbers
    assert same_bits(tensors, other_tensors)


def assert_same_decisions(resumed, straight):
    """The record of the first decision after a load lacks the windows from before it."""
    at = next(i for i, d in enumerate(straight) if d.num_updates == resumed[0].num_updates)
    expected = straight[at : at + len(resumed)]
    assert without_windows(resumed) == without_windows(expected)
    assert resumed[1:] == expected[1:]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bitwise_from_every_window_boundary(name):
    """60 updates with growth, clipping, probes, unequal samples and a reported loss.

    Each resumed run makes eleven updates, of which two or three end in a decision: where its whole
    state is then that of the straight run, all that follows is too.
    """
    batches = draw(300, [4, 3, 5] * 100, torch.float32)
    straight = Run(name, GROWS)
    files = [straight.until(num_updates, batches).save() for num_updates in range(1, 61)]
    actions = [decision.action for decision in straight.decisions]
    assert "grow" in actions
    assert straight.optimizer.accumulation_steps > 2
    assert 0 < straight.decisions[-1].total_clipped < 60
    # Every boundary for one optimizer; for the others every third, to save time.
    for num_updates, file in list(enumerate(files[:-11], 1))[:: 1 if name == "AdamW" else 3]:
        resumed = Run(name, GROWS).load(file).until(num_updates + 11, batches)
        assert_same_state(resumed.save(), files[num_updates + 10])
        assert_same_decisions(resumed.decisions, straight.decisions)


def test_learnt_thresholds_resume_bitwise_too():
    """Clipping begins after 100 updates; saves before, at and after that."""
    batches = draw(600, dtype=torch.float32)
    straight = Run("AdamW", LEARNS_TO_CLIP)
    files = [straight.until(num_updates, batches).save() for num_updates in range(92, 132, 3)]
    clipped = [decision.total_clipped for decision in straight.decisions]
    assert clipped[0] == 0 < clipped[-1]
    for file in files[:-2]:
        resumed = Run("AdamW", LEARNS_TO_CLIP).load(file).until(131, batches)
        assert_same_state(resumed.save(), straight.save())
        assert_same_decisions(resumed.decisions, straight.decisions)


def test_a_ceiling_given_as_a_whole_number_resumes_too():
    whole, batches = Run("AdamW", growing(clip_z=0.5, min_count=3.0, max_norm=100)), draw(400)
    whole.until(110, [tuple(part.float() for part in batch) for batch in batches])
    learnt = whole.optimizer.decision.max_norm
    resumed = Run("AdamW", growing(clip_z=0.5, min_count=3.0, max_norm=100))
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    assert learnt % 1 != 0
    assert resumed.optimizer._adaptation.max_norm == learnt


@pytest.mark.parametrize(("adapts", "ceiling", "wanted"), [(True, 0.01, 0.01), (False, 7.0, 7.0)])
def test_the_ceiling_is_that_of_the_run_that_goes_on(adapts, ceiling, wanted):
    whole = Run("AdamW", growing(clip_z=0.5, min_count=3.0))
    whole.until(110, [tuple(part.float() for part in batch) for batch in draw(400)])
    resumed = Run("AdamW", growing(clip_z=0.5, adapt_clip=adapts, max_norm=ceiling))
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    assert whole.optimizer.decision.max_norm not in (0.01, 7.0, math.inf)
    assert resumed.optimizer._adaptation.max_norm == wanted


def test_saving_again_and_again_resumes_bitwise():
    """A chain: every process makes one update and saves."""
    batches = draw(300, dtype=torch.float32)
    straight, chain = Run("AdamW", GROWS), Run("AdamW", GROWS)
    straight.until(40, batches)
    decisions = []
    for num_updates in range(1, 41):
        file = chain.until(num_updates, batches).save()
        decisions += chain.decisions
        chain = Run("AdamW", GROWS).load(file)
    assert without_windows(decisions) == without_windows(straight.decisions)
    assert same_bits(params_of(straight.model), params_of(chain.model))


@pytest.mark.parametrize("period", [1, 3, 7])
def test_taking_the_state_changes_nothing(period):
    """Between windows and inside them, by state_dict and by copying."""
    batches = draw(300, dtype=torch.float32)
    plain, watched = Run("AdamW", GROWS), Run("AdamW", GROWS)
    plain.until(60, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        while watched.num_updates < 60:
            watched.step(batches)
            if watched.seen % period == 0:
                watched.optimizer.state_dict()
                copy.deepcopy(watched.optimizer)
                repr(watched.optimizer)
                watched.optimizer.metrics()
                assert watched.optimizer.num_updates == watched.num_updates
    assert watched.decisions == plain.decisions
    assert same_bits(params_of(plain.model), params_of(watched.model))


def test_a_state_that_is_held_is_not_moved_by_later_steps():
    """The numbers of a state_dict are those of its moment, as torch's own group values are."""
    batches = draw(40, dtype=torch.float32)
    run = Run("AdamW", GROWS)
    run.until(8, batches)
    state = run.optimizer.state_dict()
    before = copy.deepcopy(state["param_groups"])
    run.until(16, batches)
    run.optimizer.state_dict()
    assert state["param_groups"] == before


def test_loading_into_a_running_optimizer_takes_it_back():
    batches = draw(300, dtype=torch.float32)
    run = Run("AdamW", GROWS).until(20, batches)
    file = run.save()
    ahead, decisions = run.until(40, batches).save(), list(run.decisions)
    run.decisions.clear()
    assert_same_state(run.load(file).until(40, batches).save(), ahead)
    assert_same_decisions(run.decisions, decisions)


# ---------------------------------------------------------------------- inside a window


def test_saved_inside_a_window_the_window_starts_again_and_says_so_once():
    """The state before the window, one warning, and the lost micro-batches in the record."""
    batches = draw(40)
    config = advise(4, decision_interval=1)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    train(model, optimizer, batches[:10])
    with pytest.warns(UserWarning, match="after 2 of 4 micro-batches") as caught:
        state = copy.deepcopy(optimizer.state_dict())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    optimizer.state_dict()
    other = build()
    other.load_state_dict(model.state_dict())
    resumed = NoiseAwareAdamW(other.parameters(), noise=config)
    resumed.load_state_dict(state)
    assert resumed.num_updates == 2
    train(other, resumed, batches[8:12])
    train(model, optimizer, batches[10:12])
    assert same_bits(params_of(model), params_of(other))
    assert (resumed.decision.total_dropped, optimizer.decision.total_dropped) == (2, 0)


def test_a_load_forgets_the_open_window():
    batches = draw(16)
    model, other = build(), build()
    state = NoiseAwareAdamW(other.parameters(), noise=advise(4)).state_dict()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(4))
    train(model, optimizer, batches[:3])
    with pytest.warns(UserWarning, match="the 3 micro-batches of 4 that it has had are left out"):
        optimizer.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, batches[4:8])
    assert optimizer.num_updates == 1
    fresh = NoiseAwareAdamW(other.parameters(), noise=advise(4))
    train(other, fresh, batches[4:8])
    assert same_bits(params_of(model), params_of(other))


# ---------------------------------------------------------------------- other settings and classes


def test_a_state_outside_new_limits_is_brought_inside():
    batches = draw(300, dtype=torch.float32)
    run = Run("AdamW", GROWS).until(60, batches)
    assert run.optimizer.accumulation_steps == 4
    file = run.save()
    narrower = Run("AdamW", replace(GROWS, max_accumulation_steps=2)).load(file)
    assert narrower.optimizer.accumulation_steps == 2
    wider = replace(
        GROWS, max_accumulation_steps=32, min_accumulation_steps=8, accumulation_steps=8
    )
    assert Run("AdamW", wider).load(file).optimizer.accumulation_steps == 8


def test_a_run_goes_on_in_micro_batches_of_another_size():
    """Its windows hold as many samples, its rates and updates are the same."""
    batches = draw(240)
    config = growing(samples_per_micro_batch=4)
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    train(model, optimizer, batches[:200])
    while not optimizer.applied:
        train(model, optimizer, batches[-1:])
    steps = optimizer.accumulation_steps
    rates = optimizer._adaptation.rates(steps)
    assert steps > 1
    assert rates.lr > 1
    other = build()
    other.load_state_dict(model.state_dict())
    most = 4 * config.max_accumulation_steps
    config = replace(config, samples_per_micro_batch=1, max_accumulation_steps=most)
    resumed = NoiseAwareAdamW(other.parameters(), noise=config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.accumulation_steps == 4 * steps
    assert resumed._adaptation.rates(4 * steps) == rates
    assert resumed._adaptation.state.estimator == optimizer._adaptation.state.estimator
    window = batches[200 : 200 + steps]
    train(model, optimizer, window)
    singles = [
        (x[None], y[None])
        for inputs, targets in window
        for x, y in zip(inputs, targets, strict=True)
    ]
    train(other, resumed, singles)
    assert resumed.applied
    assert difference(model, other) <= 1e-12


def test_a_state_that_counts_micro_batches_is_not_taken_for_one_of_samples():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing())
    train(model, optimizer, draw(20))
    while not optimizer.applied:
        train(model, optimizer, draw(1))
    state = copy.deepcopy(optimizer.state_dict())
    other = NoiseAwareAdamW(model.parameters(), noise=growing(samples_per_micro_batch=4))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="counts micro-batches, and samples_per_micro_batch is 4"):
        other.load_state_dict(state)
    assert other.state_dict() == before
    fresh = NoiseAwareAdamW(model.parameters(), noise=growing()).state_dict()
    other.load_state_dict(fresh)
    train(model, other, draw(40))
    assert other.decision.unit == "samples"


def test_a_torch_checkpoint_starts_measuring_anew():
    batches = draw(60, dtype=torch.float32)
    model = build(torch.float32)
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, batches[:20])
    run = Run("AdamW", GROWS)
    run.until(10, batches)
    run.optimizer.load_state_dict(plain.state_dict())
    assert run.optimizer.num_updates == 0
    assert run.optimizer.decision is None
    noise = run.optimizer.param_groups[0]["noise"]
    assert noise["second_moment_updates"] == 20


def test_ours_loads_into_torch_and_trains_there():
    batches = draw(60, dtype=torch.float32)
    run = Run("AdamW", fixed(1, probe_interval=0)).until(20, batches)
    model = build(torch.float32)
    model.load_state_dict(run.model.state_dict())
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    train(model, plain, batches[20:40])
    run.until(40, batches)
    assert same_bits(params_of(model), params_of(run.model))


def test_updates_that_torch_made_between_count():
    """torch carries our numbers along, and makes its own updates meanwhile."""
    batches = draw(60, dtype=torch.float32)
    run = Run("AdamW", fixed(1, probe_interval=0)).until(20, batches)
    model = build(torch.float32)
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    train(model, plain, batches[20:50])
    run.optimizer.load_state_dict(plain.state_dict())
    assert run.optimizer.param_groups[0]["noise"]["second_moment_updates"] == 50


@pytest.mark.parametrize(("first", "second"), [("off", GROWS), (GROWS, "off"), ("advise", GROWS)])
def test_a_state_moves_between_modes(first, second):
    """ "off" ignores the numbers and keeps them for a later run."""
    batches = draw(60, dtype=torch.float32)
    run = Run("AdamW", first)
    for _ in range(10):
        run.step(batches)
    file = run.save()
    other = Run("AdamW", second).load(file)
    for _ in range(10):
        other.step(batches)
    numbers = other.optimizer.state_dict()["param_groups"][0].get("noise", {})
    if second == "off":
        assert numbers["num_updates"] == run.optimizer.num_updates
    else:
        assert numbers["num_updates"] == (7 if first == "off" else 17)
