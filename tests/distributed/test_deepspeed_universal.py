"""DeepSpeed's universal checkpoints: what was measured and decided goes on with other ranks."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from noiseopt.control.clipping import MIN_COUNT
from tests.distributed import engines
from tests.distributed.engines import batches_of, config_of, engine_of, run
from tests.distributed.ranks import RANKS, result, run_on_ranks
from tests.distributed.test_deepspeed_loops import since_tick
from tests.optim.helpers import GROWING

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PLAIN = 0  # whose checkpoints are whole by themselves
CASES = {str(stage): {"stage": stage} for stage in (PLAIN, 1, 3)}
# Saved after the clipping threshold was learned, and inside a tick of a schedule.
CASES |= {"2, late": {"stage": 2, "late": True}, "1, bf16": {"stage": 1, "bf16": True}}
NOISE = GROWING | {"decision_interval": 2, "max_accumulation_steps": 16}
BATCHES = 2 * MIN_COUNT + 60
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
        "since_tick": since_tick(engine),
    }


def settings_of(late, settings):
    """The config's; on half the ranks windows may be twice as long."""
    if not late:
        return ADAPTIVE | settings
    longest = 3 * RANKS // dist.get_world_size()
    noise = {"dwell_updates": MIN_COUNT, "max_accumulation_steps": longest}
    return ADAPTIVE | settings | {"steps": 2, "noise": NOISE | noise}


def saved(rank, folder, late=False, **settings):
    engines.set_up(rank)
    with engine_of(config_of(**settings_of(late, settings))) as engine:
        batches = iter(batches_of(BATCHES, rank))
        while not (engine.was_step_applied() and due(engine, late)):
            run(engine, [next(batches)])
        engine.save_checkpoint(folder)
        return facts(engine)


def due(engine, late):
    """Whether a run is to be saved here."""
    if late:
        return engine.noise_aware.num_updates > MIN_COUNT + 4 and since_tick(engine) > 0
    return engine.global_samples >= 60 * RANKS * engines.MICRO_BATCH


def mismatched(rank, folder, **settings):
    """The two ranks' checkpoint on one, as it is."""
    engines.set_up(rank)
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    with engine_of(config_of(**settings_of(False, settings))) as engine:
        remedy = pytest.raises(ZeRORuntimeException, match=r"world size of 2.*ds_to_universal")
        with remedy:
            engine.load_checkpoint(folder)
        return engine.noise_aware.num_updates


def loaded(rank, folder, late=False, **settings):
    engines.set_up(rank)
    config = config_of(**settings_of(late, settings))
    config |= {"checkpoint": {"load_universal": settings["stage"] != PLAIN}}
    with engine_of(config) as engine:
        engine.load_checkpoint(folder)
        here = facts(engine)
        lengths = run(engine, batches_of(60, rank))
        return here | {"lengths": lengths, "then": facts(engine)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two ranks have saved, and what one has loaded of it."""
    folder = tmp_path_factory.mktemp("universal")
    where = {name: case | {"folder": str(folder / name)} for name, case in CASES.items()}
    two = run_on_ranks(bound(saved, where), tmp_path_factory.mktemp("two"))
    for name in CASES:
        if name != str(PLAIN):
            convert(folder / name)
    cases = bound(loaded, where) | {"mismatched": functools.partial(mismatched, **where["1"])}
    return two, run_on_ranks(cases, tmp_path_factory.mktemp("one"), ranks=1)


def convert(folder):
    tag = (folder / "latest").read_text().strip()
    source, target = folder / tag, folder / f"{tag}_universal"
    subprocess.run(
        [*CONVERT, "--input_folder", source, "--output_folder", target],
        check=True,
        capture_output=True,
    )


def bound(case, where):
    return {name: functools.partial(case, **settings) for name, settings in where.items()}


@pytest.mark.parametrize("name", CASES)
def test_one_rank_goes_on_where_two_stopped(runs, name):
    two, one = runs
    before, (after,) = result(two, name)[0], result(one, name)
    torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0)
    for key in ("updates", "samples", "batch", "clip", "since_tick"):
        assert after[key] == before[key]
    assert before["batch"] > 2 * engines.MICRO_BATCH
    assert after["lengths"][0] == before["batch"] // engines.MICRO_BATCH
    assert after["then"]["updates"] == before["updates"] + len(after["lengths"])
    if "late" in name:
        assert before["clip"] < ADAPTIVE["gradient_clipping"] / 2
        assert before["since_tick"] > 0


def test_a_checkpoint_of_other_ranks_that_was_not_converted_says_how(runs):
    assert result(runs[1], "mismatched") == [0]
