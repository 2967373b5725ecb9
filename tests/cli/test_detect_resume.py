"""`gdino detect` that was stopped, killed or met a full disk: nothing is lost, doubled or half written."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detect_command import EVERYTHING
from gdino_hf.cli import main

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")


@pytest.fixture
def folder(tmp_path):
    """Four small pictures."""
    return make_pictures(tmp_path / "photos", 4)


def make_pictures(folder, number):
    folder.mkdir()
    chance = np.random.default_rng(0)
    for index in range(number):
        pixels = chance.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60)).save(folder / f"{index}.png")
    return folder


def names(report):
    return [Path(item["image"]).name for item in report["images"]]


@contextlib.contextmanager
def full_disk_at(name):
    """Let the disk be full when the annotated picture of this name is written."""
    save = Image.Image.save

    def save_there(picture, path, *args, **kwargs):
        return save(picture, "/dev/full" if Path(path).name.startswith(f".{name}.") else path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", save_there)
        yield


@pytest.fixture
def stopped(detect, folder):
    """A run that stopped at the third of four pictures, because its annotated picture met a full disk."""
    with full_disk_at("2"):
        status, report, _, complaint = detect(folder, *EVERYTHING)
    return status, report, complaint


@needs_full
def test_a_full_disk_is_one_sentence_and_leaves_no_half_picture(stopped, tmp_path):
    status, report, complaint = stopped
    assert status == 1
    assert complaint.count("\n") == 1
    assert "the results cannot be written (No space left on device" in complaint
    assert complaint.endswith("make room and repeat the command, which goes on where it stopped\n")
    assert report["finished"] is False
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "1.png"]
    assert list((tmp_path / "out").glob(".*")) == []


@needs_full
def test_the_same_command_goes_on(stopped, detect, folder, tmp_path):
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("0.png", "1.png")}
    status, report, printed, said = detect(folder, *EVERYTHING)
    assert status == 0
    assert "an unfinished run goes on, 2 of 4 images are done; --restart starts from zero" in said
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    assert names(report) == ["0.png", "1.png", "2.png", "3.png"]
    assert "80 detections in 4 images" in printed
    assert not (tmp_path / "out" / "detections.json.progress").exists()
    _, again, _, said = detect(folder, *EVERYTHING)
    assert "unfinished" not in said
    assert again == report


@needs_full
def test_a_line_that_was_cut_is_written_again(stopped, detect, folder, tmp_path):
    path = tmp_path / "out" / "detections.json.progress"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    _, report, _, said = detect(folder, *EVERYTHING)
    assert "1 of 4 images are done" in said
    assert names(report) == ["0.png", "1.png", "2.png", "3.png"]
    assert len({item["annotated"] for item in report["images"]}) == 4


@needs_full
def test_pictures_that_changed_or_whose_results_are_gone_are_done_again(stopped, detect, folder, tmp_path):
    Image.new("RGB", (50, 40)).save(folder / "0.png")
    (tmp_path / "out" / "1.png").unlink()
    _, report, _, said = detect(folder, *EVERYTHING)
    assert "unfinished" not in said
    assert [(item["width"], item["height"]) for item in report["images"]] == [(50, 40), *[(90, 60)] * 3]
    assert (tmp_path / "out" / "1.png").is_file()


@needs_full
def test_results_of_a_model_that_was_replaced_are_not_continued(stopped, detect, folder, tiny_folder):
    config = tiny_folder / "config.json"
    before = config.stat()
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    try:
        _, report, _, said = detect(folder, *EVERYTHING)
    finally:
        os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "an unfinished run with other settings is replaced" in said
    assert names(report) == ["0.png", "1.png", "2.png", "3.png"]


@needs_full
def test_other_settings_and_restart_begin_from_zero(stopped, detect, folder, tmp_path):
    first = (tmp_path / "out" / "0.png").stat().st_mtime_ns
    _, report, _, said = detect(folder, "--threshold", "1")
    assert "an unfinished run with other settings is replaced" in said
    assert len(report["images"]) == 4
    assert all(item["detections"] == [] for item in report["images"])
    second = (tmp_path / "out" / "0.png").stat().st_mtime_ns
    assert second > first


@needs_full
def test_restart_begins_from_zero(stopped, detect, folder, tmp_path):
    before = (tmp_path / "out" / "0.png").stat().st_mtime_ns
    _, report, _, said = detect(folder, *EVERYTHING, "--restart")
    assert "unfinished" not in said
    assert len(report["images"]) == 4
    assert (tmp_path / "out" / "0.png").stat().st_mtime_ns > before


@needs_full
def test_an_old_finished_report_does_not_stand_beside_new_pictures(detect, folder):
    _, report, _, _ = detect(folder, *EVERYTHING)
    assert report["finished"] is True
    with full_disk_at("1"):
        _, report, _, _ = detect(folder, "--threshold", "1")
    assert (report["finished"], report["threshold"]) == (False, 1)


# Runs the command and kills the process in the middle of a line about a picture that it has just written.
KILLED = """
import os, signal, sys
from gdino_hf.cli import main, progress_file

append, calls = progress_file.ProgressFile._append, []


def append_or_die(self, entry):
    calls.append(entry)
    if len(calls) == 4:
        self._file.write(b'{"result": {"ima')
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, entry)


progress_file.ProgressFile._append = append_or_die
main(sys.argv[1:])
"""


@pytest.fixture
def command(tmp_path, tiny_folder):
    """A function that returns the arguments to detect everything in a folder and write it to `killed`."""

    def arguments(folder):
        options = ["--labels", "cat, remote control, dog", "--model", str(tiny_folder), *EVERYTHING]
        return ["detect", str(folder), "--out", str(tmp_path / "killed"), *options]

    return arguments


def assert_whole_pictures(out):
    """Check that an unfinished run says so, and that every picture it wrote can be read."""
    assert json.loads((out / "detections.json").read_text())["finished"] is False
    for path in out.glob("[!.]*.png"):
        with Image.open(path) as picture:
            picture.load()


def assert_goes_on_to_the_results_of(whole, command, folder, out, number, capsys):
    """Repeat the command, which goes on, and compare with the report of a run that was not killed."""
    assert main(command(folder)) == 0
    assert "an unfinished run goes on" in capsys.readouterr().err
    report = json.loads((out / "detections.json").read_text())
    assert [{**item, "annotated": None} for item in report["images"]] == [
        {**item, "annotated": None} for item in whole["images"]
    ]
    assert len({item["annotated"] for item in report["images"]}) == number
    pictures = [f"{index}.png" for index in range(number)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "detections.json"])


@pytest.mark.slow
def test_a_kill_loses_and_doubles_nothing(tmp_path, command, detect, folder, capsys, fresh_python):
    out = tmp_path / "killed"
    done = fresh_python.run(KILLED, *command(folder))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_whole_pictures(out)
    # The third picture is there, but the line that says so is not whole.
    assert sorted(path.name for path in out.glob("[!.]*.png")) == ["0.png", "1.png", "2.png"]
    _, whole, _, _ = detect(folder, *EVERYTHING)
    assert_goes_on_to_the_results_of(whole, command, folder, out, 4, capsys)


@pytest.mark.soak
def test_five_kills_lose_and_double_nothing(tmp_path, command, detect, capsys):
    """Killed from outside, at whatever moment the process has come to."""
    folder, out = make_pictures(tmp_path / "many", 30), tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["gdino_hf"].__file__).parents[1])}
    for kill in range(1, 6):
        arguments = [sys.executable, "-m", "gdino_hf", *command(folder)]
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
        while len(list(out.glob("[!.]*.png"))) < kill * 5 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        assert_whole_pictures(out)
    _, whole, _, _ = detect(folder, *EVERYTHING)
    assert_goes_on_to_the_results_of(whole, command, folder, out, 30, capsys)
