"""Two runs for one place: the second is refused while the first shows signs of life, and goes on once it is dead."""

import json
import multiprocessing
import os
from types import SimpleNamespace

import fsspec
import pytest

from gdino_hf.labeling import run_lease
from gdino_hf.labeling.label_workers import WorkerError
from gdino_hf.labeling.run_lease import LEASE, LeaseWatch, RunLease, lease
from gdino_hf.whole_files import machine_name
from label_command import label_all, make_pictures, run_label


class Clock:
    """A clock that sleeping puts forward; meanwhile something may happen."""

    def __init__(self):
        self.now, self.happens = 1000.0, lambda: None

    def sleep(self, seconds):
        self.now += seconds
        self.happens()


@pytest.fixture
def clock(monkeypatch):
    """The clock of leases."""
    made = Clock()
    monkeypatch.setattr(run_lease, "time", SimpleNamespace(sleep=made.sleep, monotonic=lambda: made.now))
    return made


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    """A file system, and the path of a lease in it."""
    system = fsspec.filesystem(request.param)
    path = f"{tmp_path}/{LEASE}"
    yield system, path
    if system.exists(path):
        system.rm_file(path)


def owned(number=1, machine="0" * 8, process=1):
    """The file of a run on another machine."""
    return json.dumps(
        {"token": "other", "host": "elsewhere", "machine": machine, "process": process, "number": number}
    ).encode()


def dead_process():
    """The number of a process that has ended."""
    process = multiprocessing.get_context("fork").Process(target=os.getpid)
    process.start()
    process.join()
    return process.pid


def test_a_run_that_gives_signs_of_life_on_another_machine_keeps_its_place(place, clock):
    system, path = place
    system.pipe_file(path, owned())
    clock.happens = lambda: system.pipe_file(path, owned(number=int(clock.now)))
    said = []
    with pytest.raises(
        ValueError, match=r"^Another run on elsewhere is at work in s3://b; wait for it, or choose"
    ) as no:
        RunLease(system, path, "s3://b").take(said.append)
    assert str(no.value).count(".") == 1
    assert said == ["a run on elsewhere has s3://b; waiting up to 90 s for a sign of life from it"]
    assert clock.now < 1005
    assert json.loads(system.cat_file(path))["token"] == "other"


def test_a_run_that_is_silent_on_another_machine_loses_its_place_and_one_that_died_here_does_so_at_once(place, clock):
    system, path = place
    system.pipe_file(path, owned())
    with lease(system, path, "place", print):
        assert 1090 <= clock.now < 1100
        assert json.loads(system.cat_file(path))["process"] == os.getpid()
    assert not system.exists(path)
    before = clock.now
    system.pipe_file(path, owned(machine=machine_name(), process=dead_process()))
    with lease(system, path, "place", pytest.fail):
        assert clock.now - before < 5
    # The number of the dead process may be another's by now.
    system.pipe_file(path, owned(machine=machine_name(), process=os.getpid()))
    with lease(system, path, "place", print):
        assert clock.now - before > 90


def test_a_file_that_was_not_written_whole_blocks_nobody_for_ever(place, clock):
    system, path = place
    system.pipe_file(path, b"")
    with lease(system, path, "place", print):
        assert clock.now > 1090


def test_of_two_runs_that_begin_at_one_moment_in_a_store_one_is_refused(clock):
    system, path = fsspec.filesystem("memory"), f"/two/{LEASE}"
    clock.happens = lambda: system.pipe_file(path, owned())
    first = RunLease(system, path, "memory://two")
    with pytest.raises(ValueError, match="is at work in memory://two"):
        first.take(print)
    first.give_back()
    assert json.loads(system.cat_file(path))["token"] == "other"
    system.rm_file(path)


def test_a_run_whose_place_was_taken_is_told_so(place, clock, monkeypatch):
    monkeypatch.setattr(run_lease, "_BEAT", 0)
    system, path = place
    held = RunLease(system, path, "place")
    held._write()
    held.check()
    system.pipe_file(path, owned())
    held._beat()
    with pytest.raises(WorkerError, match=r"another run went on in place, because this one gave no sign of life"):
        held.check()
    held.give_back()
    assert json.loads(system.cat_file(path))["token"] == "other"


def test_signs_of_life_change_the_file(place, clock, monkeypatch):
    monkeypatch.setattr(run_lease, "_BEAT", 0.001)
    system, path = place
    watch = LeaseWatch()
    with lease(system, path, "place", print):
        seen = system.cat_file(path)
        assert watch.is_alive(seen)
        while system.cat_file(path) == seen:
            pass
    clock.now += 100
    assert watch.is_alive(owned())
    clock.now += 100
    assert not watch.is_alive(owned())


def test_a_folder_that_another_machine_works_in_is_refused_in_a_sentence(label_model, tmp_path, clock):
    folder, out = make_pictures(tmp_path / "photos", 6), tmp_path / "out"
    out.mkdir()
    clock.happens = lambda: (out / LEASE).write_bytes(owned(number=int(clock.now)))
    clock.happens()
    status, _, said = run_label(label_model, out, folder)
    assert status == 2
    lines = said.splitlines()
    assert lines[0].endswith("waiting up to 90 s for a sign of life from it")
    assert lines[1:] == [
        f"gdino label: error: Another run on elsewhere is at work in {out}; wait for it, or choose another place"
    ]
    assert sorted(path.name for path in out.iterdir()) == [".lock", LEASE]
    clock.happens = lambda: None
    assert label_all(label_model, folder, out).pictures == 6
    assert not (out / LEASE).exists()
