"""Runs that are killed, stopped, or meet a full disk: no picture is lost or doubled, and no byte differs."""

import os
import random
import signal
import time
from contextlib import contextmanager

import pytest

from gdino_hf.labeling.label_store import LabelStore
from label_command import (
    HANGS,
    PACKAGE,
    ForkedLabel,
    arguments,
    digests,
    errors,
    label_all,
    label_apart,
    make_deadly_site,
    make_pictures,
    rows,
    run_label,
    start_label,
)


@pytest.fixture
def folder(tmp_path):
    """Forty pictures, of which two are damaged."""
    folder = make_pictures(tmp_path / "photos", 40)
    for number in (7, 31):
        file = next(folder.rglob(f"{number:05d}.*"))
        file.write_bytes(file.read_bytes()[:80])
    return folder


def kill_at(context, shards, model, folder, out, moment):
    """Run in another process and kill it a moment after so many shards are there; returns whether it was at work."""
    process = context.Process(target=label_all, args=(model, folder, out))
    process.start()
    while process.is_alive() and len(LabelStore(out).names("shards")) < shards:
        time.sleep(0.005)
    time.sleep(moment)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    return was_alive


def test_a_run_killed_again_and_again_gives_the_bytes_of_an_unbroken_one(label_model, folder, tmp_path, context):
    label_apart(context, label_model, folder, tmp_path / "whole")
    chance = random.Random(0)
    out = tmp_path / "killed"
    killed = sum(kill_at(context, shards, label_model, folder, out, chance.uniform(0, 0.05)) for shards in (0, 2, 4, 7))
    assert killed >= 3
    assert not (out / "coco.json").exists() or killed < 4
    label_apart(context, label_model, folder, out)
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(row["source"] for row in rows(out)) == sorted(map(str, folder.rglob("*.*")))
    assert len(errors(out)) == 2


def test_a_picture_that_vanishes_midway_is_named_and_the_others_stay_where_they_were(
    label_model, folder, tmp_path, context
):
    label_apart(context, label_model, folder, tmp_path / "whole")
    out = tmp_path / "out"
    assert kill_at(context, 3, label_model, folder, out, 0)
    last = sorted(folder.rglob("*.*"))[-1]
    last.unlink()
    (folder / "00000-new.png").write_bytes(b"")
    label_apart(context, label_model, folder, out)
    assert "it is missing" in errors(out)[str(last)].lower()
    assert len(errors(out)) == 3
    whole = rows(tmp_path / "whole")
    assert rows(out)[:-1] == whole[:-1]
    assert [row["source"] for row in rows(out)] == [row["source"] for row in whole]


def test_other_settings_are_refused_in_a_sentence(label_model, folder, tmp_path):
    out = tmp_path / "out"
    assert run_label(label_model, out, folder)[0] == 1
    before = digests(out)
    for option, message in (
        (("--threshold", "0.1"), "another threshold (0.005 then, 0.1 now)"),
        (("--labels", "cat"), "another vocabulary ('cat, remote control, dog' then, 'cat' now)"),
        (("--shard", "9"), "another shard size (8 then, 9 now)"),
        (("--model", "nano"), "another fingerprint"),
    ):
        status, _, said = run_label(label_model, out, folder, *option)
        assert status == 2
        assert message in said
        assert said.count("\n") == 1
    assert run_label(label_model, out, folder / "sub")[0] == 2
    assert digests(out) == before


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_blocks_nobody(label_model, folder, tmp_path, context):
    out = tmp_path / "out"
    process = context.Process(target=label_all, args=(label_model, folder, out))
    process.start()
    while not LabelStore(out).names("shards"):
        time.sleep(0.005)
    with pytest.raises(ValueError, match="Another run is at work in"):
        label_all(label_model, folder, out)
    process.kill()
    process.join()
    assert label_all(label_model, folder, out).pictures == 40


@contextmanager
def files_of_at_most(number):
    """Let this process, and those that it starts, write files of so many bytes: more is an error, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(label_model, folder, tmp_path):
    out = tmp_path / "out"
    # No shard is so small, but manifest, vocabulary and plan are not so large.
    with files_of_at_most(4000):
        status, _, said = run_label(label_model, out, folder, shard=40)
    assert status == 1
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].endswith("make room and repeat the command, which goes on where it stopped")
    assert [path for path in out.rglob("*") if "unfinished" in path.name] == []
    assert run_label(label_model, out, folder, shard=40)[0] == 1
    run_label(label_model, tmp_path / "whole", folder, shard=40)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_full_disk_under_two_workers_is_one_sentence_and_the_run_goes_on(label_model, folder, tmp_path):
    out = tmp_path / "out"
    # The shard of eight damaged pictures is small enough, and no other.
    for path in sorted(folder.rglob("*.*"))[:8]:
        path.write_bytes(b"no picture")
    with files_of_at_most(4000):
        process = start_label(label_model, out, folder, "--workers", "2", "--format", "coco")
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "the results cannot be written" in lines[0]
    assert lines[0].endswith("make room and repeat the command, which goes on where it stopped")
    assert set(LabelStore(out).names("shards")) <= {"00000000.parquet"}
    assert [path for path in out.rglob("*") if "unfinished" in path.name] == []
    status, _, said = run_label(label_model, out, folder, "--format", "coco")
    assert status == 1, said
    run_label(label_model, tmp_path / "whole", folder, "--format", "coco")
    assert digests(out) == digests(tmp_path / "whole")


def test_a_worker_that_is_killed_is_replaced(label_model, folder, tmp_path, context):
    command = arguments(label_model, tmp_path / "out", folder, "--workers", "2", shard=4)
    process = ForkedLabel(context, tmp_path / "said", command)
    import psutil

    main = psutil.Process(process.pid)
    while not LabelStore(tmp_path / "out").names("shards"):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [child for child in main.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    ends = ("; its shard of 4 pictures is done again", " between two shards; nothing is lost")
    assert any(f"a worker process was killed by SIGKILL{end}" in said for end in ends)
    run_label(label_model, tmp_path / "whole", folder, shard=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_picture_that_workers_die_of_is_named_and_those_that_wait_beside_it_are_labelled(
    label_model, folder, tmp_path
):
    site = make_deadly_site(tmp_path / "site")
    pictures = sorted(map(str, folder.rglob("*.*")))[:12]
    pictures[6] = "deadly://picture.png"
    (tmp_path / "list.txt").write_text("\n".join(pictures))
    path = {"PYTHONPATH": os.pathsep.join([PACKAGE, str(site), os.environ.get("PYTHONPATH", "")])}
    # All pictures of a shard are read, and wait for partners of their size, before the first is labelled.
    options = ("--workers", "2", "--batch", "4")
    process = start_label(label_model, tmp_path / "out", tmp_path / "list.txt", *options, environment=path, shard=4)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    assert "worker processes died 3 times; " in said
    assert "while it looked at deadly://picture.png alone, which is left out" in said
    assert said.count("alone, which is left out") == 1
    failed = errors(tmp_path / "out")
    assert "a process that worked on it died" in failed.pop("deadly://picture.png")
    assert [row["source"] for row in rows(tmp_path / "out")] == pictures
    # One of the damaged pictures is among the twelve; nothing else is lost.
    assert len(failed) == 1


def test_workers_end_when_the_main_process_is_killed(label_model, folder, tmp_path, context):
    import psutil

    command = arguments(label_model, tmp_path / "out", folder, "--workers", "2", shard=4)
    process = ForkedLabel(context, tmp_path / "said", command)
    main = psutil.Process(process.pid)
    while len(workers := [c for c in main.children() if "spawn_main" in " ".join(c.cmdline())]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=HANGS)
    assert alive == []
    assert run_label(label_model, tmp_path / "out", folder, shard=4)[0] == 1


def test_ctrl_c_keeps_the_shards_and_says_so(label_model, folder, tmp_path, context):
    process = ForkedLabel(context, tmp_path / "said", arguments(label_model, tmp_path / "out", folder, shard=4))
    while not LabelStore(tmp_path / "out").names("shards"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert said.endswith("stopped; the shards so far are written, and the same command goes on from there\n")
    assert "Traceback" not in said
