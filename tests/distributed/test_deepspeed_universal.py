"""DeepSpeed's universal checkpoints: what was measured and decided goes on with other ranks."""

import functools
import subprocess
import sys

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import batches_of, config_of, engine_of, run
from tests.distributed.ranks import result, run_on_ranks
from tests.optim.helpers import GROWING

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = (1, 2, 3)
PLAIN = 0  # whose checkpoints are whole by themselves
NOISE = GROWING | {"decision_interval": 2, "max_accumulation_steps": 16}
ADAPTIVE = {"noise": NOISE, "lr": 1e-2, "gradient_clipping": 10.0}
CONVERT = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal"]
CONVERT += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]


def facts(engine):
    noise = engine.noise_aware
    return {
        "weights": engines.weights_of(engine),
        "updates": noise.num_updates,
        "samples": noise.state_dict()["numbers"]["estimator.samples_seen"],
        "batch": engine.train_batch_size(),
        "clip": engine.gradient_clipping(),
    }


def saved(rank, folder, stage):
    engines.set_up(rank)
    with engine_of(config_of(stage, **ADAPTIVE)) as engine:
        run(engine, batches_of(60, rank))
        engine.save_checkpoint(folder)
        return facts(engine)


def loaded(rank, folder, stage):
    engines.set_up(rank)
    universal = {"load_universal": stage != PLAIN}
    with engine_of(config_of(stage, checkpoint=universal, **ADAPTIVE)) as engine:
        engine.load_checkpoint(folder)
        here = facts(engine)
        lengths = run(engine, batches_of(60, rank))
        return here | {"lengths": lengths, "then": facts(engine)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two ranks have saved, and what one has loaded of it."""
    folder = tmp_path_factory.mktemp("universal")
    where = {
        str(stage): {"folder": str(folder / str(stage)), "stage": stage}
        for stage in (PLAIN, *STAGES)
    }
    two = run_on_ranks(bound(saved, where), tmp_path_factory.mktemp("two"))
    for name in map(str, STAGES):
        tag = (folder / name / "latest").read_text().strip()
        source, target = folder / name / tag, folder / name / f"{tag}_universal"
        subprocess.run(
            [*CONVERT, "--input_folder", source, "--output_folder", target],
            check=True,
            capture_output=True,
        )
    return two, run_on_ranks(bound(loaded, where), tmp_path_factory.mktemp("one"), ranks=1)


def bound(case, where):
    return {name: functools.partial(case, **settings) for name, settings in where.items()}


@pytest.mark.parametrize("stage", [PLAIN, *STAGES])
def test_one_rank_goes_on_where_two_stopped(runs, stage):
    two, one = runs
    before, (after,) = result(two, str(stage))[0], result(one, str(stage))
    torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0)
    for key in ("updates", "samples", "batch", "clip"):
        assert after[key] == before[key]
    assert before["batch"] > 2 * engines.MICRO_BATCH
    assert after["lengths"][0] == before["batch"] // engines.MICRO_BATCH
    assert after["then"]["updates"] == before["updates"] + len(after["lengths"])
