"""The record is lossless and strict, survives a killed run, and decides again what was decided."""

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import noiseopt
from noiseopt.control import RATE_RULES, Controller, NoiseConfig, Window
from noiseopt.estimate import WindowNorms
from noiseopt.record import DecisionLog, from_line, read, replay, to_line


def run(config, rule="adam", num_groups=1, updates=600, seed=0):
    """Yield the decisions of a simulated run whose gradients are mostly noise."""
    draw = random.Random(seed)
    controller = Controller.create(config, RATE_RULES[rule], num_groups)
    windows = []
    for update in range(updates):
        steps = controller.window_steps(update)
        batch = 4.0 * steps
        trace, signal = 900.0, 1.0
        big = signal + trace / batch * draw.gammavariate(50, 1 / 50)
        small = signal + trace / 4 * draw.gammavariate(50 * steps, 1 / 50 / steps)
        spiked = update == updates // 2
        norms = WindowNorms(
            small_sq=(small / num_groups,) * num_groups,
            big_sq=(big / num_groups,) * num_groups,
            small_batch=4.0,
            big_batch=batch,
            count=steps,
            samples=batch,
        )
        loss = 3.0 + 1 / (1 + update) + 0.05 * draw.gauss(0, 1)
        window = Window(
            None if spiked else norms, steps, steps * spiked, not spiked, False, loss * steps, steps
        )
        windows.append(window)
        if len(windows) == config.decision_interval:
            for window in windows:
                controller = controller.learn(window)
            lr = 1e-3 * (1 - update / updates) + 1e-4
            controller, decision = controller.decide(lr, tuple(windows))
            yield decision
            windows = []


CONFIG = NoiseConfig(samples_per_micro_batch=4, dwell_updates=20, min_count=5)


def write(path, config=CONFIG, rule="adam", num_groups=1, **arguments):
    decisions = tuple(run(config, rule, num_groups, **arguments))
    with DecisionLog(path, config, rule, num_groups) as log:
        for decision in decisions:
            log(decision)
    return decisions


@pytest.mark.parametrize(
    ("config", "rule", "num_groups"),
    [
        (CONFIG, "adam", 1),
        (CONFIG, "sgd", 3),
        (replace(CONFIG, mode="advise", accumulation_steps=4), "adam", 2),
        (NoiseConfig(max_norm=1.0, verify=False), "adam", 1),
    ],
)
def test_what_was_written_is_read_and_decided_again(tmp_path, config, rule, num_groups):
    path = tmp_path / "run" / "decisions.jsonl"
    decisions = write(path, config, rule, num_groups)
    record = read(path)
    assert record.header.config == config
    assert (record.header.rule, record.header.num_groups) == (rule, num_groups)
    assert record.header.version == noiseopt.__version__
    assert record.decisions == decisions
    assert not record.cut
    assert replay(path) == decisions


def test_the_simulated_run_covers_what_a_record_must_hold():
    decisions = tuple(run(CONFIG))
    assert {"hold", "grow"} <= {decision.action for decision in decisions}
    assert decisions[0].noise is None
    assert math.isinf(decisions[0].max_norm)
    assert any(math.isinf(d.noise.scale_interval[1]) for d in decisions if d.noise)
    assert any(window.norms is None for d in decisions for window in d.windows)


def test_a_replay_under_other_rules_differs(tmp_path):
    path = tmp_path / "decisions.jsonl"
    decisions = write(path)
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    header["config"]["noise_margin"] = 1e-6
    header["config"]["grow_in_decay"] = False
    path.write_text("\n".join([json.dumps(header), *lines[1:], ""]))
    assert [d.action for d in replay(path)] == ["hold"] * len(decisions)


def test_lines_are_strict_json(tmp_path):
    path = tmp_path / "decisions.jsonl"
    write(path, NoiseConfig(samples_per_micro_batch=4))

    def refuse(constant):
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["schema"] == 1


@given(value=st.floats())
def test_every_float_is_kept(value):
    decision = replace(next(run(CONFIG)), samples_seen=value, loss=value)
    found = from_line(to_line(decision))
    assert repr(found.samples_seen) == repr(found.loss) == repr(value)
    assert type(found.loss) is float


@given(reason=st.text())
def test_every_reason_is_kept_on_one_line(reason):
    line = to_line(replace(next(run(CONFIG)), reason=reason))
    assert line.isascii()
    assert "\n" not in line
    assert from_line(line).reason == reason


def test_a_killed_run_loses_its_last_line_only(tmp_path):
    path = tmp_path / "decisions.jsonl"
    decisions = write(path, updates=50)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, (last + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        record = read(path)
        assert record.cut
        assert record.decisions == decisions[:-1]
        assert replay(path) == decisions[:-1]


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl", CONFIG, "adam")
    assert read(log.path).decisions == ()
    first, second, *_ = run(CONFIG)
    log(first)
    assert read(log.path).decisions == (first,)
    log(second)
    assert read(log.path).decisions == (first, second)
    log.close()


def test_a_record_is_never_overwritten(tmp_path):
    path = tmp_path / "decisions.jsonl"
    decisions = write(path, updates=20)
    with pytest.raises(FileExistsError, match="never overwritten"):
        DecisionLog(path, CONFIG, "adam")
    assert read(path).decisions == decisions


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], "no header"),
        (lambda lines: ["not json", *lines], "line 1: "),
        (lambda lines: lines[1:], "line 1: Header lacks config"),
        (lambda lines: [lines[0].replace('"schema": 1', '"schema": 2')], "line 1: its schema is 2"),
        (lambda lines: ['{"loss": 1}', *lines], "line 1: .* does not say its schema"),
        (lambda lines: [lines[0], lines[1][:99], *lines[2:]], "line 2: "),
        (lambda lines: [*lines[:2], '{"schema": 1}'], "line 3: Decision lacks accumulation_steps"),
        (lambda lines: [lines[0].replace('"auto"', '"maybe"')], "mode is 'maybe'"),
        (lambda lines: [lines[0], lines[1].replace('"hold"', "7")], "Decision.action is 7"),
        (lambda lines: [lines[0], lines[1].replace('"rates": {', '"rates": 3, "x": {')], "rates"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, damage, message):
    path = tmp_path / "decisions.jsonl"
    write(path, updates=30)
    lines = damage(path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        read(path)


def test_an_unknown_rule_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ValueError, match="rule is 'lamb': it must be one of"):
        DecisionLog(tmp_path / "decisions.jsonl", CONFIG, "lamb")
    assert not list(tmp_path.iterdir())
