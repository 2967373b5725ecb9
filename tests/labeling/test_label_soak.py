"""Runs that are killed at random moments, among damaged pictures and odd names: every picture once, and equal bytes."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from gdino_hf.labeling.label_store import LabelStore
from label_command import (
    ForkedLabel,
    arguments,
    digests,
    errors,
    label_apart,
    make_pictures,
    rows,
    run_label,
    start_label,
)

FORMATS = ("--format", "coco", "yolo", "parquet", "--batch", "4")


def odd_pictures(folder, number):
    """Pictures of which 5 % are damaged, in folders with equal names, names of many scripts and names of 250 bytes."""
    chance = random.Random(number)
    made = make_pictures(folder / "made", number)
    for place, path in enumerate(sorted(made.rglob("*.*"))):
        # Two neighbours have one name, in two folders.
        number_of_name = place // 2
        stems = (f"{number_of_name:04d}", f"картинка 图片 🙂 é {number_of_name}", f"{number_of_name:0246d}")
        new = folder / "ab"[place % 2] / f"{stems[number_of_name % 3]}.png"
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
    shutil.rmtree(made)
    paths = sorted(folder.rglob("*.*"))
    damaged = chance.sample(paths, number // 20)
    for path in damaged:
        path.write_bytes(path.read_bytes()[: chance.choice((0, 10, 80))])
    assert len(paths) == number
    return damaged


def kill(process):
    """Kill a run with its workers, and return whether it was still at work."""
    was_alive = process.poll() is None
    if was_alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return was_alive


def soak(model, tmp_path, pictures, kills, shard, start):
    """Kill a run, finish it and compare it with an unbroken one; returns how many shards each killed run made.

    Every fourth run is killed within its first `start` seconds.
    """
    folder = tmp_path / "photos"
    damaged = odd_pictures(folder, pictures)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    start_label(model, whole, folder, *FORMATS, shard=shard).communicate()
    chance, killed, shards = random.Random(0), [], -(-pictures // shard)
    for number in range(kills):
        before = len(LabelStore(out).names("shards"))
        process = start_label(model, out, folder, *FORMATS, "--workers", str(1 + number % 2), shard=shard)
        # Some die while they load the model or list the pictures, and most while they work.
        more = 1 + chance.randrange(shards // (kills + 1)) if number % 4 else 0
        while more and process.poll() is None and len(LabelStore(out).names("shards")) < before + more:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05 if more else start))
        if not kill(process):
            break
        killed.append(len(LabelStore(out).names("shards")) - before)
    process = start_label(model, out, folder, *FORMATS, "--workers", "2", shard=shard)
    _, said = process.communicate()
    assert process.returncode == 1, said
    print(f"shards made before each kill: {killed}, of {shards}")
    assert digests(out) == digests(whole)
    assert sorted(row["source"] for row in rows(out)) == sorted(map(str, folder.rglob("*.*")))
    assert set(errors(out)) == set(map(str, damaged))
    return killed


@pytest.mark.soak
def test_two_thousand_pictures_and_twenty_kills(label_model, tmp_path):
    killed = soak(label_model, tmp_path, 2000, 20, 25, 8)
    assert len(killed) == 20
    assert sum(number > 0 for number in killed) >= 10


@pytest.mark.soak  # test_label_kills has a shorter one
def test_sixty_pictures_and_three_kills(label_model, tmp_path):
    killed = soak(label_model, tmp_path, 60, 3, 4, 1)
    assert len(killed) == 3
    assert sum(killed) > 0


def test_a_folder_that_vanishes_midway_leaves_a_failure_for_each_of_its_pictures(label_model, tmp_path, context):
    folder = make_pictures(tmp_path / "photos", 40)
    label_apart(context, label_model, folder, tmp_path / "whole")
    command = arguments(label_model, tmp_path / "out", folder, "--batch", "2", "--format", "coco", shard=4)
    process = ForkedLabel(context, tmp_path / "said", command)
    while len(LabelStore(tmp_path / "out").names("shards")) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    shutil.rmtree(folder)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == 1, said
    assert "Traceback" not in said
    whole, found = rows(tmp_path / "whole"), rows(tmp_path / "out")
    assert [row["source"] for row in found] == [row["source"] for row in whole]
    assert found[:8] == whole[:8]
    lost = [row for row in found if row["status"] == "failed"]
    assert len(lost) > 20
    assert all("it is missing" in row["error"].lower() for row in lost)
    assert len(errors(tmp_path / "out")) == len(lost)


@pytest.mark.soak
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_file_system_is_a_sentence_and_room_lets_the_run_go_on(label_model, tmp_path, workers):
    folder = make_pictures(tmp_path / "photos", 200)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        out = small / "out"
        process = start_label(label_model, out, folder, *FORMATS, "--workers", workers, shard=4)
        _, said = process.communicate()
        assert process.returncode == 1
        assert sum("error:" in line for line in said.splitlines()) == 1
        assert said.endswith("make room and repeat the command, which goes on where it stopped\n")
        shards = len(LabelStore(out).names("shards"))
        assert 0 < shards < 50
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        assert run_label(label_model, out, folder, *FORMATS, shard=4)[0] == 0
        run_label(label_model, tmp_path / "whole", folder, *FORMATS, shard=4)
        assert digests(out) == digests(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=False)
