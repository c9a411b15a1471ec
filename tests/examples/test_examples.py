"""The examples as a user starts them: by torchrun, on two ranks, killed and started again."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from noiseopt.record import from_line, read, replay
from tests.distributed.ranks import NEEDS_FSDP2, RANKS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KILLED = Path(__file__).with_name("killed.py")

STEPS = 189  # micro-batches on each rank: windows of 2 to 8, of which the last is cut short
SAVE_EVERY = 33  # updates, so that checkpoints lie between decisions
KILL_AT = 165  # calls of step(), after a decision that no checkpoint holds and before the end
SMALL = (
    *("--layers", 1, "--width", 16, "--context", 4, "--batch-size", 1, "--window", 2),
    *("--lr", 1e-2, "--save-every", SAVE_EVERY),
)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "KILL_AT": str(KILL_AT),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as the examples say
}

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def torchrun(*command, ranks=RANKS, restarts=0, fails=False):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    options = ("--nproc-per-node", ranks, "--max-restarts", restarts)
    done = subprocess.run(
        list(map(str, (*launcher, *options, *command))),
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Text from which there is nothing to learn, so that all gradients are noise: windows grow."""
    folder, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    for index in range(64):
        content = torch.randint(256, (50_000,), generator=generator, dtype=torch.uint8)
        (folder / f"{index}.py").write_bytes(bytes(content.tolist()))
    return folder


class Runs:
    """One run of an example at one go, and one that was killed and goes on by itself."""

    def __init__(self, script, folder, *arguments):
        self.command = (EXAMPLES / script, *SMALL, *arguments)
        self.straight, self.killed = folder / "straight", folder / "killed"
        self.output = torchrun(*self.command, "--folder", self.straight)

    def restart(self):
        """As torchrun does."""
        torchrun(KILLED, *self.command, "--folder", self.killed, restarts=1)
        return self

    def start_again(self):
        """As a person does."""
        torchrun(KILLED, *self.command, "--folder", self.killed, fails=True)
        torchrun(*self.command, "--folder", self.killed)
        return self


@pytest.fixture(scope="module")
def ddp(noise, tmp_path_factory):
    arguments = ("--steps", STEPS, "--text", noise)
    return Runs("train_ddp.py", tmp_path_factory.mktemp("ddp"), *arguments).restart()


@pytest.fixture(scope="module")
def fsdp2(noise, tmp_path_factory):
    arguments = ("--steps", STEPS * RANKS, "--text", noise)
    return Runs("train_fsdp2.py", tmp_path_factory.mktemp("fsdp2"), *arguments).start_again()


def record(folder):
    return read(folder / "decisions.jsonl")


def assert_goes_on_as_if_never_killed(runs):
    """What was lost is done again, and recorded once; what is replaced is kept apart."""
    straight, killed = record(runs.straight).decisions, record(runs.killed)
    first, second = killed.stretches
    assert all(replayed.same for replayed in replay(killed))
    assert first.decisions == straight[: len(first.decisions)]
    # The first decision after a start tells the windows since the checkpoint.
    again = second.decisions[0]
    whole = (*first.decisions, replace(again, windows=straight[len(first.decisions)].windows))
    assert whole + second.decisions[1:] == straight
    lost = (runs.killed / "decisions.superseded.jsonl").read_text().splitlines()
    assert from_line(lost[0])[0] == straight[len(first.decisions)]
    assert SAVE_EVERY < again.num_updates < straight[-1].num_updates


def assert_same_bits(one, other):
    """Every tensor and every number of two checkpoints."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same_bits(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def whole(folder, tmp_path):
    """A checkpoint of torch.distributed.checkpoint, all shards in one."""
    latest = max(folder.glob("checkpoint-*"))
    dcp_to_torch_save(latest, tmp_path / f"{folder.name}.pt")
    state = torch.load(tmp_path / f"{folder.name}.pt", weights_only=True)
    random = {file.name: torch.load(file) for file in sorted(latest.glob("random-*"))}
    assert len(random) == RANKS
    return state | random


def assert_adapts(runs):
    found = record(runs.straight)
    assert not found.cut
    assert {d.ranks for d in found.decisions} == {RANKS}
    changes = [d for d in found.decisions if d.action != "hold"]
    assert changes
    assert all(f"{d.num_updates} {d.action} {d.reason}" in runs.output for d in changes)


def test_ddp_trains_and_records_what_it_changes(ddp):
    assert_adapts(ddp)


def test_ddp_killed_inside_a_window_ends_bitwise_where_it_would_have(ddp):
    assert_goes_on_as_if_never_killed(ddp)
    ends = [
        torch.load(folder / "checkpoint.pt", weights_only=True)
        for folder in (ddp.straight, ddp.killed)
    ]
    assert ends[0]["position"] == STEPS
    assert_same_bits(*ends)


@NEEDS_FSDP2
def test_fsdp2_trains_and_records_what_it_changes(fsdp2):
    assert_adapts(fsdp2)


@NEEDS_FSDP2
def test_fsdp2_killed_inside_a_window_ends_bitwise_where_it_would_have(fsdp2, tmp_path):
    assert_goes_on_as_if_never_killed(fsdp2)
    assert_same_bits(*(whole(folder, tmp_path) for folder in (fsdp2.straight, fsdp2.killed)))


@NEEDS_FSDP2
def test_fsdp2_goes_on_on_one_rank_with_its_estimate_and_its_batch(fsdp2, tmp_path):
    """Windows of twice as many micro-batches bring the same samples and gradients to an update."""
    saved = min(fsdp2.straight.glob("checkpoint-*"))
    shutil.copytree(saved, tmp_path / saved.name)
    torchrun(*fsdp2.command, "--bf16", "--folder", tmp_path, ranks=1)
    found = record(tmp_path).decisions
    first = found[0]
    (before,) = (d for d in record(fsdp2.straight).decisions if d.num_updates == first.num_updates)
    assert first.num_updates == 40
    assert {d.ranks for d in found} == {1}
    assert first.accumulation_steps == RANKS * before.accumulation_steps
    assert first.batch == before.batch
    assert first.samples_seen == before.samples_seen
    assert first.lr == pytest.approx(before.lr, rel=1e-2)
    assert first.noise.count == pytest.approx(before.noise.count, rel=1e-6)
    assert max(tmp_path.glob("checkpoint-*")).name == f"checkpoint-{STEPS * RANKS:09}"
