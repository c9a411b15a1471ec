import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import deepspeed as bench
from benchmarks import ranks, recording

TINY = replace(bench.SIZES["tiny"], steps={ranks.WINDOW: 2})
PLAN = bench.Plan((TINY,), together=True)


@pytest.fixture(scope="module")
def results():
    return [record for records in bench.run(PLAN) for record in records]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_stage_has_every_arm_and_its_control(results):
    found = [(c.wrapping, c.window, c.ranks, c.arm) for c in results]
    assert found == [
        (f"ZeRO {stage}", ranks.WINDOW, bench.RANKS, arm)
        for stage in (0, 1, 2, 3)
        for arm in ("plain", "plain, again", "ours")
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_arm_is_compared_with_the_plain_engine(results):
    for c in results:
        for ratio in (c.wall, c.cpu):
            assert 0 < ratio[0] <= ratio[1] <= ratio[2]
            assert ratio == (1, 1, 1) or c.arm != bench.REFERENCE
        assert c.target == (ranks.TARGET if c.arm == bench.OURS else None)
        assert c.holds == (c.target and "too few rounds")


@pytest.mark.slow
@pytest.mark.distributed
def test_records_are_added_to_a_file_of_their_own(results, tmp_path):
    recording.append(results[:2], bench.origin_of(["--quick"]), tmp_path / bench.NAME)
    records = json.loads((tmp_path / "deepspeed.json").read_text())
    assert [record["arm"] for record in records] == ["plain", "plain, again"]
    for record in records:
        assert record["command"] == "python benchmarks/deepspeed.py --quick"
        assert "deepspeed" in record["versions"]


@pytest.mark.parametrize("stage", bench.STAGES)
def test_arms_differ_by_the_section_alone(stage):
    plain = bench.config(stage, TINY, 4)
    assert plain["zero_optimization"] == {"stage": stage}
    assert plain["gradient_clipping"] == ranks.CLIP
    assert not plain.keys() & bench.section(TINY, 4).keys()


def test_a_script_of_the_name_of_the_package_finds_the_package():
    script = Path(bench.__file__)
    done = subprocess.run(
        (sys.executable, str(script), "--help"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--stages" in done.stdout
