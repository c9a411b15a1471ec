"""The DeepSpeed example as a user starts it: by either launcher, and once more to go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noiseopt.record import read, replay
from tests.distributed.ranks import RANKS, free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepspeed"
INTERVAL = 10  # updates between decisions, which is the default
STEPS = 3 * INTERVAL + 2
MICRO_BATCH = 4  # samples on each rank, in every zero*.json
SMALL = ("--layers", 1, "--width", 16, "--context", 4, "--save-every", 2 * INTERVAL)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", RANKS)
DEEPSPEED = ("deepspeed.launcher.runner", "--num_accelerators", RANKS, "--master_port")

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def start(launcher, stage, *arguments, **environment):
    script = (EXAMPLE / "train.py", "--deepspeed_config", EXAMPLE / f"zero{stage}.json")
    done = subprocess.run(
        list(map(str, (sys.executable, "-m", *launcher, *script, *SMALL, *arguments))),
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A little text, so that reading it takes no time."""
    folder, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    for index in range(64):
        content = torch.randint(256, (50_000,), generator=generator, dtype=torch.uint8)
        (folder / f"{index}.py").write_bytes(bytes(content.tolist()))
    return folder


def updates(record):
    return [decision.num_updates for decision in record.decisions]


def without_compiler(folder):
    """No compiler, and what a build that was killed has left, for which the next would wait."""
    lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return {"PATH": "", "TORCH_EXTENSIONS_DIR": str(lock.parents[1])}


def test_started_by_torchrun_and_again_it_goes_on(noise, tmp_path):
    arguments = ("--text", noise, "--checkpoint", tmp_path, "--steps")
    output = start(TORCHRUN, 3, *arguments, STEPS, **without_compiler(tmp_path))
    first = read(tmp_path / "decisions.jsonl")
    assert updates(first) == [INTERVAL, 2 * INTERVAL, 3 * INTERVAL]
    assert {decision.ranks for decision in first.decisions} == {RANKS}
    assert "Decisions, from" in output
    assert first.decisions[-1].noise.unit == "samples"
    assert {path.name for path in tmp_path.glob("global_step*")} == {
        f"global_step{2 * INTERVAL}",
        f"global_step{STEPS}",
    }

    start(TORCHRUN, 3, *arguments, 2 * STEPS)
    both = read(tmp_path / "decisions.jsonl")
    assert both.decisions[: len(first.decisions)] == first.decisions
    last, budget = both.decisions[-1], 2 * STEPS * MICRO_BATCH * RANKS
    assert last.samples_seen <= budget
    assert budget - last.samples_seen < INTERVAL * last.batch, "a decision is missing"
    assert updates(both) == [INTERVAL * (1 + index) for index in range(len(both.decisions))]
    assert both.stretches[1].start.config == both.stretches[0].start.config
    before, after = both.stretches[0].decisions[-1], both.stretches[1].decisions[0]
    assert after.samples_seen > before.samples_seen
    assert after.noise.count > before.noise.count
    assert all(replayed.same for replayed in replay(both))


@pytest.mark.parametrize("stage", [0, 2])
def test_every_config_starts(noise, tmp_path, stage):
    arguments = ("--text", noise, "--checkpoint", tmp_path, "--steps", 2)
    assert "Decisions, from" not in start(TORCHRUN, stage, *arguments)  # none was due
    assert (tmp_path / "latest").read_text() == "global_step2"


def test_started_by_deepspeed_it_writes_the_record_where_it_is_told(noise, tmp_path):
    record = tmp_path / "elsewhere" / "run.jsonl"
    arguments = ("--text", noise, "--checkpoint", tmp_path / "run", "--record", record)
    output = start((*DEEPSPEED, free_port()), 1, *arguments, "--steps", STEPS)
    assert updates(read(record)) == [INTERVAL, 2 * INTERVAL, 3 * INTERVAL]
    assert "Decisions, from" in output
    assert (tmp_path / "run" / "latest").read_text() == f"global_step{STEPS}"
