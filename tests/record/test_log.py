"""The log writes whole lines, resumes without duplicates, stays bounded and never stops a run."""

import os
import resource
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noiseopt.record import DecisionLog, read, replay
from noiseopt.record.parts import parts
from tests.record.simulated import Simulated


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "decisions.jsonl"


def recorded(path, updates, **arguments):
    """A run with a log, so far."""
    simulated = Simulated()
    simulated.add_observer(DecisionLog(path, **arguments))
    simulated.run(updates)
    return simulated


def assert_replays(record):
    assert all(replayed.same for replayed in replay(record))


def numbers(record):
    return [decision.num_windows for decision in record.decisions]


def test_lines_can_be_read_while_the_run_goes_on(path):
    simulated = recorded(path, 10)
    assert read(path).decisions == tuple(simulated.decisions)
    simulated.run(30)
    assert read(path).decisions == tuple(simulated.decisions)
    assert numbers(read(path)) == [10, 20, 30, 40]


def test_no_file_is_made_before_the_first_decision(path):
    recorded(path, 9)
    assert not path.parent.exists()


def test_a_record_is_never_overwritten(path):
    recorded(path, 20)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        DecisionLog(path)
    assert path.read_bytes() == before


def test_of_two_that_begin_at_once_one_writes_and_the_other_says_so(path):
    first, second = Simulated(), Simulated()
    first.add_observer(DecisionLog(path))
    second.add_observer(DecisionLog(path))
    first.run(20)
    with pytest.warns(RuntimeWarning, match="not recorded"):
        second.run(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.run(20)
        first.run(20)
    assert numbers(read(path)) == [10, 20, 30, 40]


BEGINS_ANEW = "ignore:a run begins where"


@pytest.mark.filterwarnings(BEGINS_ANEW)
@pytest.mark.parametrize("saved_at", [0, 30, 57, 100])
def test_a_resumed_run_goes_on_without_duplicates(path, saved_at):
    """The run is lost at 100, and goes on from a checkpoint."""
    killed = Simulated()
    killed.add_observer(DecisionLog(path))
    killed.run(saved_at)
    state = killed.controller.state
    lost = killed.run(100 - saved_at)[saved_at // 10 :]

    resumed = Simulated()
    resumed.add_observer(DecisionLog(path, resume=True))
    resumed.load(state)
    resumed.run(60)

    record = read(path)
    last = saved_at + 60
    assert numbers(record) == list(range(10, last + 1, 10))
    assert_replays(record)
    superseded = path.with_name("decisions.superseded.jsonl")
    assert superseded.exists() == bool(lost)
    if lost:
        assert superseded.read_text().count('"kind": "decision"') == len(lost)


def test_a_state_loaded_inside_a_run_supersedes_what_came_after_it(path):
    simulated = recorded(path, 33)
    state = simulated.controller.state
    simulated.run(67)
    simulated.load(state)
    simulated.run(27)
    record = read(path)
    assert numbers(record) == [10, 20, 30, 40, 50, 60]
    assert [len(stretch.decisions) for stretch in record.stretches] == [3, 3]
    assert_replays(record)


def test_a_log_added_inside_a_run_begins_with_the_state_of_the_latest_decision(path):
    simulated = Simulated()
    simulated.run(37)
    log = DecisionLog(path)
    simulated.add_observer(log)
    simulated.run(33)
    assert numbers(read(path)) == [40, 50, 60, 70]
    assert read(path).stretches[0].start.state.num_windows == 30
    assert_replays(read(path))


def test_a_full_file_is_followed_by_another_and_the_oldest_goes(path):
    simulated = recorded(path, 600, max_bytes=20_000, keep=2)
    files = parts(path)
    assert [file.name for file in files] == [
        "decisions.part2.jsonl",
        "decisions.part1.jsonl",
        "decisions.jsonl",
    ]
    assert all(file.stat().st_size < 30_000 for file in files)
    record = read(path)
    decisions = tuple(simulated.decisions)
    assert record.decisions == decisions[-len(record.decisions) :]
    assert 10 < len(record.decisions) < len(decisions)
    assert_replays(record)


def test_a_full_file_may_be_kept_alone(path):
    simulated = recorded(path, 600, max_bytes=20_000, keep=0)
    assert parts(path) == [path]
    assert read(path).decisions == tuple(simulated.decisions)[-len(read(path).decisions) :]


def test_a_run_resumes_across_full_files(path):
    simulated = recorded(path, 100, max_bytes=20_000, keep=9)
    state = simulated.controller.state
    simulated.run(500)
    assert len(parts(path)) > 3
    resumed = Simulated()
    resumed.load(state)
    resumed.add_observer(DecisionLog(path, resume=True, max_bytes=20_000, keep=9))
    resumed.run(500)
    record = read(path)
    assert record.decisions == tuple(simulated.decisions)
    assert_replays(record)


def test_other_files_of_the_folder_are_left_alone(path):
    path.parent.mkdir()
    names = ("decisions.txt", "decisions.a.jsonl", "decisions.1.jsonl", "x.part1.jsonl")
    others = [path.with_name(name) for name in names]
    for other in others:
        other.write_text("mine")
    recorded(path, 600, max_bytes=20_000, keep=1)
    assert [other.read_text() for other in others] == ["mine"] * 4


@pytest.mark.filterwarnings(BEGINS_ANEW)
@given(cut=st.integers(1, 4000), saved_at=st.integers(0, 100))
def test_a_run_killed_while_it_writes_resumes(tmp_path_factory, cut, saved_at):
    path = tmp_path_factory.mktemp("run") / "decisions.jsonl"
    killed = Simulated()
    killed.add_observer(DecisionLog(path))
    killed.run(saved_at)
    state = killed.controller.state
    killed.run(100 - saved_at)
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - cut, 0)])

    resumed = Simulated()
    resumed.add_observer(DecisionLog(path, resume=True))
    resumed.load(state)
    resumed.run(50)
    record = read(path)
    assert_replays(record)
    assert len(set(numbers(record))) == len(numbers(record))
    assert numbers(record) == sorted(numbers(record))
    assert not record.cut


class FullDisk:
    """No file may grow beyond a size, as on a disk that is full."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_is_warned_of_once_and_recording_goes_on_when_there_is_room(path):
    simulated = recorded(path, 50)
    room = 700  # part of a line
    with FullDisk(path.stat().st_size + room), pytest.warns(RuntimeWarning) as caught:
        simulated.run(50)
    assert len(caught) == 1
    assert "training goes on" in str(caught[0].message)
    assert numbers(read(path)) == [10, 20, 30, 40, 50]
    simulated.run(50)
    record = read(path)
    # The decision at 110 says what it follows; the first that rests on whole evidence is the next.
    assert numbers(record) == [10, 20, 30, 40, 50, 120, 130, 140, 150]
    assert_replays(record)


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    tmp_path.chmod(0o755)
    simulated = Simulated()
    simulated.add_observer(DecisionLog(folder / "decisions.jsonl"))
    user = os.geteuid()
    parents = [parent for parent in tmp_path.parents if not parent.stat().st_mode & 0o001]
    for parent in parents:
        parent.chmod(0o755)
    os.seteuid(65534 if user == 0 else user)  # root may write anywhere
    try:
        with pytest.warns(RuntimeWarning, match="Permission denied") as caught:
            simulated.run(100)
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert len(caught) == 1
    assert not list(folder.iterdir())


def test_a_damaged_record_is_not_touched(path):
    recorded(path, 50)
    damaged = path.read_bytes().replace(b'"num_windows": 40', b'"num_windows": 4z', 1)
    path.write_bytes(damaged)
    resumed = Simulated()
    resumed.add_observer(DecisionLog(path, resume=True))
    with pytest.warns(RuntimeWarning, match="not recorded"):
        resumed.run(50)
    assert path.read_bytes() == damaged


def test_a_run_from_scratch_over_another_says_where_that_went(path):
    recorded(path, 50)
    again = Simulated()
    again.add_observer(DecisionLog(path, resume=True))
    with pytest.warns(RuntimeWarning, match=r"its 6 lines are now in .*superseded\.jsonl"):
        again.run(20)
    assert numbers(read(path)) == [10, 20]


def test_a_file_that_was_deleted_is_begun_anew_with_a_warning(path):
    simulated = recorded(path, 50)
    path.unlink()
    with pytest.warns(RuntimeWarning, match="not recorded"):
        simulated.run(10)
    simulated.run(40)
    assert numbers(read(path)) == [80, 90, 100]
    assert_replays(read(path))


def test_a_change_of_the_working_directory_moves_nothing(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent)
    simulated = Simulated()
    simulated.add_observer(DecisionLog("run/decisions.jsonl"))
    simulated.run(20)
    monkeypatch.chdir("/")
    simulated.run(20)
    assert numbers(read(path)) == [10, 20, 30, 40]


def test_a_log_serves_one_optimizer(path):
    log = DecisionLog(path)
    Simulated().add_observer(log)
    with pytest.raises(RuntimeError, match="is the record of another optimizer"):
        Simulated().add_observer(log)


@pytest.mark.parametrize("last", ['{"schema": 2}', '{"schema": 2, "kind": "start", "time": 1}'])
def test_a_last_line_that_says_too_little_stops_no_training(path, last):
    recorded(path, 50)
    with path.open("a") as file:
        file.write(f"{last}\n")
    before = path.read_bytes()
    resumed = Simulated()
    resumed.add_observer(DecisionLog(path, resume=True))
    with pytest.warns(RuntimeWarning, match="not recorded"):
        resumed.run(50)
    assert path.read_bytes() == before


def test_a_folder_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        DecisionLog(tmp_path, resume=True)


def test_a_file_that_is_no_record_is_refused_at_once(path):
    path.parent.mkdir()
    path.write_text('{"schema": 1}\n')
    with pytest.raises(
        ValueError, match=r"decisions.jsonl cannot be gone on with: its schema is 1"
    ):
        DecisionLog(path, resume=True)


def test_a_log_that_observes_nothing_says_what_to_do(path):
    decision = Simulated().run(10)[0]
    with pytest.raises(RuntimeError, match="add_observer"):
        DecisionLog(path)(decision)


@pytest.mark.parametrize("arguments", [{"max_bytes": 0}, {"keep": -1}])
def test_bad_numbers_are_refused(path, arguments):
    with pytest.raises(ValueError, match="they must be at least 1 and 0"):
        DecisionLog(path, **arguments)
