"""An actor of a Ray Data pipeline labels pictures in every form that a column may hold."""

import os
import signal
import tempfile

import pytest

from gdino_hf import Vocabulary
from gdino_hf.labeling.death_journal import DeathJournal, journal_folder
from gdino_hf.labeling.label_settings import LabelJob
from gdino_hf.labeling.ray_pipeline import RowLabeler
from gdino_hf.labeling.ray_workers import own_variables
from label_command import LABELS, PACKAGE, label_rows_dying, make_deadly_site, make_pictures

JOB = {"device": "cpu", "batch_size": 2, "shard_size": 4, "options": {"threshold": 0.005}}


def test_rows_are_paths_bytes_structs_or_arrays(label_model, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "notes"))
    path = next(make_pictures(tmp_path, 2).rglob("*.png"))
    pixels = np.array(Image.open(path).convert("RGB"))
    labeler = RowLabeler(
        LabelJob(str(label_model), **JOB), Vocabulary(LABELS), ("image", "id"), 1, own_variables(), "test"
    )
    content = path.read_bytes()
    pictures = [str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, pixels, None]
    table = labeler({"id": np.arange(6), "image": pictures}).to_pylist()
    assert [row["source"] for row in table] == ["0", "1", "2", "3", "4", "5"]
    assert len(table[0]["boxes"]) > 0
    # Pictures share forward passes, which changes rounding on some processors.
    for row in table[1:5]:
        np.testing.assert_allclose(row["boxes"], table[0]["boxes"], atol=1e-3)
        np.testing.assert_allclose(row["scores"], table[0]["scores"], atol=1e-5)
    assert (table[5]["status"], table[5]["error"]) == ("failed", "the row has no picture")


def test_a_picture_that_actors_die_of_is_a_failure_after_three_times(label_model, tmp_path, monkeypatch, context):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "notes"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "notes"))
    (tmp_path / "notes").mkdir()
    pictures = sorted(map(str, make_pictures(tmp_path / "photos", 8).rglob("*.*")))
    codes, results = [], context.Queue()
    while not codes or codes[-1] != 0:
        assert len(codes) < 6
        process = context.Process(target=label_rows_dying, args=(label_model, pictures, pictures[5], results))
        process.start()
        process.join()
        codes.append(process.exitcode)
    # Three times with the others, and once alone.
    assert codes == [-signal.SIGKILL] * 4 + [0]
    rows = results.get()
    assert [row["source"] for row in rows] == pictures
    failed = [row["source"] for row in rows if row["status"] == "failed"]
    assert failed == [pictures[5]]
    assert list((tmp_path / "notes").glob("gdino-labels-*")) == []


def test_notes_lie_in_a_folder_that_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = journal_folder("a")
    assert made.stat().st_mode & 0o777 == 0o700
    assert journal_folder("a") == made
    # What others could write into, or put there, is not used.
    made.chmod(0o770)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "gdino-labels-b").symlink_to(tmp_path / "elsewhere")
    assert [journal_folder("a"), journal_folder("b")] == [None, None]
    journal = DeathJournal(None, ["a"])
    assert [journal.begin() for _ in range(4)] == [False] * 4
    journal.end()


def test_notes_tell_when_to_look_at_pictures_alone_and_which_is_deadly(tmp_path):
    journal = DeathJournal(tmp_path, ["a", "b"])
    assert [journal.begin() for _ in range(4)] == [False, False, False, True]
    with journal.alone(0):
        pass
    next(journal.alone(1).gen)
    assert [journal.is_deadly(0), journal.is_deadly(1)] == [False, True]
    assert not DeathJournal(tmp_path, ["a", "c"]).begin()
    journal.end()
    assert not journal.begin()


@pytest.mark.soak
def test_a_pipeline_leaves_out_what_its_actors_die_of(label_model, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from gdino_hf.labeling import ray_data

    site = make_deadly_site(tmp_path / "site")
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([PACKAGE, str(site), os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
    pictures = sorted(map(str, make_pictures(tmp_path / "photos", 8).rglob("*.*")))
    pictures[5] = "deadly://picture.png"
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        made = ray.data.from_items([{"path": path} for path in pictures])
        rows = ray_data(made, LABELS, job=LabelJob(str(label_model), **JOB), concurrency=1, rows=8).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["source"] for row in rows) == sorted(pictures)
    failed = {row["source"]: row["error"] for row in rows if row["status"] == "failed"}
    assert "a process that worked on it died" in failed["deadly://picture.png"]
    assert len(failed) == 1
