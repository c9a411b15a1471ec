"""The demo's data is the same everywhere and its held-out part unseen; its model sees no future."""

import math
import random

import pytest
import torch

from noiseopt.demo.gpt import GPT, Shape
from noiseopt.demo.text import fixed_excerpts, load, micro_batches

LINE = 40


def write_library(folder, names):
    """Write files whose every line begins with their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = f"# {name} ".ljust(LINE - 1, ".") + "\n"
        path.write_text(line * 1000)
    return folder


def names_in(data):
    lines = bytes(data.tolist()).decode().splitlines()
    return {line.split()[1] for line in lines}


NAMES = [f"package{n % 7}/module{n}.py" for n in range(150)]


def test_files_are_held_out_whole_and_by_their_names_alone(tmp_path):
    corpus = load(write_library(tmp_path / "a", NAMES))
    held_out, trained_on = names_in(corpus.validation), names_in(corpus.train)
    assert held_out | trained_on == set(NAMES)
    assert not held_out & trained_on
    assert 2 < len(held_out) < 25

    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    more = [*shuffled, "extra.py", "test/test_nothing.py", "site-packages/other/module.py"]
    other = load(write_library(tmp_path / "b", more))
    assert names_in(other.validation) - {"extra.py"} == held_out
    assert names_in(other.train) - {"extra.py"} == trained_on


def test_the_budget_holds(tmp_path):
    root = write_library(tmp_path, NAMES)
    corpus = load(root, budget=3_000_000)
    assert len(corpus.train) + len(corpus.validation) == 3_000_000


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="too little Python source"):
        load(write_library(tmp_path, NAMES[:3]))


def test_the_standard_library_is_read_the_same_twice():
    first, second = load(), load()
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    assert len(first.train) > 5_000_000


def test_micro_batches_are_those_of_their_seed():
    data = torch.arange(256, dtype=torch.uint8).repeat(5)
    first = list(micro_batches(data, 9, batch_size=4, context=16, seed=1))
    assert all(map(torch.equal, first, micro_batches(data, 9, 4, 16, seed=1)))
    assert not torch.equal(first[0], next(micro_batches(data, 9, 4, 16, seed=2)))
    assert all(batch.shape == (4, 17) for batch in first)
    assert all(((batch[:, 1:] - batch[:, :-1]) % 256 == 1).all() for batch in first)


def test_fixed_excerpts_span_the_data():
    data = torch.arange(200, dtype=torch.uint8)
    excerpts = fixed_excerpts(data, number=5, context=9)
    assert excerpts.shape == (5, 10)
    assert (excerpts[0, 0], excerpts[-1, -1]) == (0, 199)


def model():
    torch.manual_seed(0)
    return GPT(Shape(layers=2, width=32, heads=2, context=24)).double()


def test_a_new_model_knows_nothing():
    tokens = torch.randint(256, (64, 25))
    assert abs(model()(tokens).item() - math.log(256)) < 0.1


def test_a_prediction_depends_on_nothing_later():
    gpt = model()
    tokens = torch.randint(256, (1, 25))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256

    def losses(text):  # of each position, from the means over ever longer beginnings
        sums = torch.stack([length * gpt(text[:, : length + 1]) for length in range(1, 25)])
        return sums.diff(prepend=sums.new_zeros(1))

    before, after = losses(tokens), losses(changed)
    torch.testing.assert_close(before[:19], after[:19], rtol=0, atol=1e-12)
    assert (before[19:] - after[19:]).abs().max() > 1e-3


def test_the_demo_trains_a_quarter_of_a_million_parameters():
    assert 700_000 < sum(p.numel() for p in GPT(Shape()).parameters()) < 1_000_000
