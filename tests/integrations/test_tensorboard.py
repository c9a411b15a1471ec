"""The TensorBoard observer against real event files, read back by TensorBoard itself."""

import shutil
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from noiseopt.control import metrics
from noiseopt.integrations.tensorboard import TensorBoardObserver
from tests.record.simulated import Simulated


@pytest.fixture
def simulated():
    return Simulated(groups=("decayed", "rest"), updates=300)


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def texts(events, name):
    return [
        event.tensor_proto.string_val[0].decode()
        for event in events.Tensors(f"{name}/text_summary")
    ]


def test_what_is_logged_is_read_back(tmp_path, simulated):
    with SummaryWriter(tmp_path) as writer:
        simulated.add_observer(TensorBoardObserver(writer))
        decisions = simulated.run()
    events = read(tmp_path)
    for decision in decisions:
        for name, value in metrics(decision, simulated.groups).items():
            found = {event.step: event.value for event in events.Scalars(name)}
            assert found[int(decision.samples_seen)] == pytest.approx(value, rel=1e-6)
    changes = [decision for decision in decisions if decision.action != "hold"]
    assert changes
    for change, text in zip(changes, texts(events, "decide/changes"), strict=True):
        assert text == f"{change.action} to {change.accumulation_steps}: {change.reason}"
    assert '"max_accumulation_steps": 32' in texts(events, "decide/config")[0]
    assert "group/rest/scale" in events.Tags()["scalars"]


def test_two_optimizers_share_a_writer(tmp_path, simulated):
    with SummaryWriter(tmp_path) as writer:
        simulated.add_observer(TensorBoardObserver(writer))
        simulated.add_observer(TensorBoardObserver(writer, prefix="critic/"))
        simulated.run(100)
    names = read(tmp_path).Tags()["scalars"]
    assert {"noise/scale", "critic/noise/scale"} <= set(names)


def test_a_writer_that_fails_is_warned_of_once(tmp_path, simulated):
    """It was closed before training ended, and cannot open another file."""
    writer = SummaryWriter(tmp_path / "run")
    simulated.add_observer(TensorBoardObserver(writer))
    simulated.run(10)
    writer.close()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with pytest.warns(RuntimeWarning, match="nothing more to TensorBoard") as caught:
        simulated.run(10)
    simulated.run(100)
    assert len(caught) == 1


def test_importing_it_does_not_import_tensorboard():
    program = "import sys, noiseopt.integrations.tensorboard; print('tensorboard' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
