"""What a user may get wrong: the type of the error, and that its message names the value."""

import copy
import math

import pytest
import torch
from torch import nn

from noiseopt import NoiseAwareAdamW, NoiseAwareSGD, NoiseConfig, noise_aware
from tests.optim.helpers import (
    advise,
    build,
    draw,
    fixed,
    growing,
    loss_of,
    params_of,
    same_bits,
    state_tensors,
    train,
)


@pytest.mark.parametrize(
    ("noise", "error", "words"),
    [
        ("always", ValueError, r"mode is 'always'.*'auto', 'advise', 'off'"),
        (None, TypeError, "mode is None"),
        (3, TypeError, "mode is 3"),
    ],
)
def test_an_unknown_mode_is_refused(noise, error, words):
    with pytest.raises(error, match=words):
        NoiseAwareAdamW(build().parameters(), noise=noise)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accumulation_steps": 0}, r"accumulation_steps is 0.*at least 1"),
        ({"accumulation_steps": 64}, "accumulation_steps is 64.*max_accumulation_steps = 32"),
        ({"min_accumulation_steps": 4}, "accumulation_steps is 1.*min_accumulation_steps = 4"),
        ({"max_norm": math.nan}, "max_norm is nan"),
        ({"max_norm": 0.0}, r"max_norm is 0.0.*positive"),
        ({"samples_per_micro_batch": 0.0}, r"samples_per_micro_batch is 0.0.*positive"),
        ({"accumulation": "mine"}, r"accumulation is 'mine'.*'internal', 'external'"),
        ({"decision_interval": 0}, "decision_interval is 0"),
        ({"probe_interval": 1}, r"probe_interval is 1.*at least 2"),
    ],
    ids=str,
)
def test_contradictory_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        NoiseConfig(**settings)


@pytest.mark.parametrize("noise", ["off", "advise", "auto"])
@pytest.mark.parametrize(
    "kwargs", [{"lr": math.nan}, {"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}], ids=str
)
def test_torchs_own_arguments_are_refused_in_torchs_words(kwargs, noise):
    errors = []
    for make in (torch.optim.AdamW, lambda p, **kw: NoiseAwareAdamW(p, noise=noise, **kw)):
        with pytest.raises(ValueError, match="Invalid") as error:
            make(build().parameters(), **kwargs)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_rates_of_a_group_are_checked_as_those_of_all(name, value):
    """torch looks at the defaults alone."""
    words = f"{name}={value!r}: it must be finite and not negative"
    groups = [{"params": build().parameters(), name: value}]
    with pytest.raises(ValueError, match=words):
        NoiseAwareAdamW(groups)
    optimizer = NoiseAwareAdamW(build().parameters())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": build().parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_a_rate_that_becomes_nan_is_refused_before_it_reaches_the_weights():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(1))
    train(model, optimizer, draw(3))
    before = params_of(model)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(RuntimeError, match="the learning rate of group 0 is nan"):
        train(model, optimizer, draw(1))
    assert same_bits(params_of(model), before)
    assert optimizer.num_updates == 3


@pytest.mark.parametrize("noise", ["off", "advise", "auto"])
def test_no_parameters_are_refused_in_torchs_words(noise):
    with pytest.raises(ValueError, match="empty parameter list"):
        NoiseAwareAdamW([], noise=noise)


def test_ours_are_not_taken_by_position():
    with pytest.raises(TypeError):
        NoiseAwareSGD(build().parameters(), 0.1, 0.9, 0, 0, False, "auto")


# ---------------------------------------------------------------------- step()


@pytest.mark.parametrize("config", [advise(1), advise(3), fixed(1), fixed(3)], ids=str)
def test_a_step_without_gradients_is_refused_and_loses_nothing(config):
    model, other = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    for batch in draw(6):
        with pytest.raises(RuntimeError, match=r"no gradient on any of 4 parameters.*backward"):
            optimizer.step()
        train(model, optimizer, [batch])
    train(other, reference := NoiseAwareAdamW(other.parameters(), noise=config), draw(6))
    assert same_bits(params_of(model), params_of(other))
    assert optimizer.num_updates == reference.num_updates


def test_a_closure_that_raises_leaves_the_window_as_it_was():
    model, other = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(3))

    def fail():
        raise KeyError("a missing batch")

    for batch in draw(6):
        with pytest.raises(KeyError, match="a missing batch"):
            optimizer.step(fail)
        train(model, optimizer, [batch])
    train(other, NoiseAwareAdamW(other.parameters(), noise=advise(3)), draw(6))
    assert same_bits(params_of(model), params_of(other))


# ---------------------------------------------------------------------- loading


def numbers_of(state):
    return state["param_groups"][0]["noise"]


def older(state):
    numbers_of(state)["version"] = 0


def short(state):
    del numbers_of(state)["estimator.average.trace"]


def of_another_model(state):
    state["state"][2]["exp_avg"] = torch.zeros(7, 8, dtype=torch.float64)


def without_numbers(state):
    state["param_groups"][0]["noise"] = None


def of_another_optimizer(state):
    del state["param_groups"][0]["betas"], state["param_groups"][0]["eps"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (older, "version 0, this is version"),
        (short, "lacks 'estimator.average.trace'"),
        (of_another_model, r"exp_avg of parameter 2 of group 0 has shape \(7, 8\) .*\(3, 8\)"),
        (without_numbers, "group 0 of the state has noise=None"),
        (of_another_optimizer, "group 0 of the state has no betas, eps: it is not of NoiseAware"),
    ],
    ids=["version", "numbers", "model", "none", "optimizer"],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil, words):
    """Neither weights nor moments nor numbers, and the run goes on as if it had not been tried."""
    model, other = build(), build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=growing())
    reference = NoiseAwareAdamW(other.parameters(), noise=growing())
    train(model, optimizer, draw(30))
    train(other, reference, draw(30))
    third = build()
    source = NoiseAwareAdamW(third.parameters(), lr=0.5, noise=growing())
    train(third, source, draw(30, seed=3))
    spoilt = copy.deepcopy(source.state_dict())
    spoil(spoilt)
    moments = [tensor.clone() for tensor in state_tensors(optimizer)]
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(spoilt)
    assert same_bits(moments, state_tensors(optimizer))
    assert [group["noise"] for group in optimizer.param_groups] == [g["noise"] for g in groups]
    assert optimizer.param_groups[0]["lr"] == groups[0]["lr"]
    train(model, optimizer, draw(30, seed=2))
    train(other, reference, draw(30, seed=2))
    assert same_bits(params_of(model), params_of(other))
    assert optimizer.decisions == reference.decisions


def test_a_hook_may_make_a_state_fit():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(1))
    train(model, optimizer, draw(3))
    state = copy.deepcopy(optimizer.state_dict())
    right = state["state"][2]["exp_avg"]

    def mend(optimizer, state_dict):
        state_dict["state"][2]["exp_avg"] = right
        return state_dict

    of_another_model(state)
    optimizer.register_load_state_dict_pre_hook(mend)
    optimizer.load_state_dict(state)
    assert same_bits([optimizer.state[model[2].weight]["exp_avg"]], [right])


def test_a_state_of_another_number_of_groups_is_refused_in_torchs_words():
    model = build()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    state = NoiseAwareAdamW(groups).state_dict()
    optimizer = NoiseAwareAdamW(build().parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


# ---------------------------------------------------------------------- what the loop tells


@pytest.mark.parametrize("samples", [0, -3, math.nan, math.inf])
def test_a_sample_count_must_be_positive_and_finite(samples):
    optimizer = NoiseAwareAdamW(build().parameters(), noise=advise(2))
    with pytest.raises(ValueError, match=f"samples is {samples}"):
        optimizer.set_samples(samples)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_sample_counts_that_begin_late_are_refused(calls):
    """Inside the first window, or after it."""
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(2))
    train(model, optimizer, draw(calls))
    with pytest.raises(RuntimeError, match="call it before every micro-batch from the first"):
        optimizer.set_samples(4)


def test_sample_counts_that_cease_are_refused():
    model, batches = build(), draw(2)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(2))
    optimizer.set_samples(4)
    train(model, optimizer, batches[:1])
    loss_of(model, batches[1]).backward()
    with pytest.raises(RuntimeError, match="not for this one"):
        optimizer.step()
    optimizer.set_samples(4)
    optimizer.step()
    assert optimizer.applied


def test_sample_counts_may_be_told_where_the_config_has_one():
    """The config's is then the default for micro-batches that are not told."""
    model = build()
    config = advise(2, samples_per_micro_batch=4, decision_interval=1)
    optimizer = NoiseAwareAdamW(model.parameters(), noise=config)
    train(model, optimizer, draw(1))
    optimizer.set_samples(2)
    train(model, optimizer, draw(1, 2))
    assert optimizer.decision.windows[0].norms.samples == 6


@pytest.mark.parametrize("shape", [(2,), (0,), (3, 1)])
def test_a_loss_must_be_one_number(shape):
    optimizer = NoiseAwareAdamW(build().parameters(), noise=advise(2))
    with pytest.raises(ValueError, match=rf"shape \({shape[0]},.*one number"):
        optimizer.report_loss(torch.zeros(shape))


@pytest.mark.parametrize("loss", [1, 1.5, torch.tensor(2.0), torch.tensor([[2.0]])], ids=str)
def test_a_loss_may_be_any_one_number(loss):
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(1, decision_interval=1))
    optimizer.report_loss(loss)
    train(model, optimizer, draw(1))
    assert optimizer.decision.loss == float(loss)


def test_a_loss_that_is_not_finite_is_left_out():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(1, decision_interval=2))
    for loss in (math.nan, 3.0):
        optimizer.report_loss(loss)
        train(model, optimizer, draw(1))
    assert optimizer.decision.loss == 3.0


def test_off_takes_what_the_loop_tells_and_ignores_it():
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise="off")
    optimizer.set_samples(4)
    optimizer.report_loss(1.0)
    optimizer.set_loss_scale(2.0)
    optimizer.add_observer(print)
    train(model, optimizer, draw(3))
    assert optimizer.applied
    assert optimizer.num_updates == 3
    assert optimizer.accumulation_steps == 1
    assert optimizer.decisions == ()
    assert (optimizer.noise, optimizer.decision, optimizer.metrics()) == (None, None, {})


# ---------------------------------------------------------------------- classes and kinds


def takes_two(params, closure):
    return None


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((nn.Linear,), TypeError, "Linear.*is not a torch optimizer class"),
        ((torch.optim.AdamW([torch.zeros(1)]),), TypeError, "is not a torch optimizer class"),
        ((takes_two,), TypeError, "takes_two.*is not a torch optimizer class"),
        ((torch.optim.LBFGS,), TypeError, "LBFGS evaluates its closure several times"),
        ((NoiseAwareAdamW,), TypeError, "NoiseAwareAdamW is noise-aware already"),
        ((torch.optim.SGD, "linear"), ValueError, r"rate_rule is 'linear'.*'adam', 'sgd'"),
    ],
    ids=["module", "instance", "function", "LBFGS", "twice", "rule"],
)
def test_classes_that_cannot_be_made_aware_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        noise_aware(*given)


@pytest.mark.parametrize("mark", ["allreduce", "_fsdp_flattened"])
@pytest.mark.parametrize("late", [False, True], ids=["at the start", "in a later group"])
def test_what_is_averaged_elsewhere_is_refused_and_the_optimizer_stays_whole(late, mark):
    """Experts, as DeepSpeed and Megatron mark them, and parameters of FSDP1."""
    param = nn.Parameter(torch.ones(4))
    setattr(param, mark, mark != "allreduce")
    words = {
        "allreduce": r"1 parameters are marked allreduce=False.*noise='off'",
        "_fsdp_flattened": r"1 parameters belong to FullyShardedDataParallel.*fully_shard",
    }[mark]
    if not late:
        with pytest.raises(ValueError, match=words):
            NoiseAwareAdamW([param])
        NoiseAwareAdamW([param], noise="off")
        return
    model = build()
    optimizer = NoiseAwareAdamW(model.parameters(), noise=advise(2))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [param]})
    train(model, optimizer, draw(2))
    assert len(optimizer.param_groups) == 1
    assert optimizer.applied


def test_a_differentiable_group_is_refused_later_too():
    model = build()
    optimizer = NoiseAwareAdamW(model[0].parameters(), noise=advise(2))
    with pytest.raises(ValueError, match="differentiable=True"):
        optimizer.add_param_group({"params": model[2].parameters(), "differentiable": True})
    assert len(optimizer.param_groups) == 1


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="accumulation_step"):
        _ = NoiseAwareAdamW(build().parameters()).accumulation_step
