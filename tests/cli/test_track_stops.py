"""gdino track ended by signals at moments that no one chose: what is there plays, and nothing that was told is lost."""

import json
import os
import random
import signal
import time

import pytest
from PIL import Image

from fresh_python import COMMAND
from gdino_hf.video.decoding import VideoFile
from tracking_figures import photographs
from video_clips import write_clip

FRAMES = 240
# A killed process loses the fragment that was being written, and what encoder and queue held.
MOST_LOST = 40


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    cat = photographs()[0].resize((240, 160))
    pictures = []
    for number in range(FRAMES):
        picture = Image.new("RGB", (320, 200), (120, 140, 120))
        picture.paste(cat, (number % 80, 10))
        pictures.append(picture)
    return write_clip(tmp_path_factory.mktemp("clip") / "cat.mp4", pictures, sound=True)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_ended_at_any_moment_leaves_a_video_that_plays(number, seed, clip, tmp_path, fresh_python):
    process = fresh_python.start(
        COMMAND, "track", clip, "--labels", "cat", "--every", "2", "--device", "cpu", "--out", tmp_path
    )
    lines, told = tmp_path / "frames.jsonl", 0
    least = random.Random(f"{number}, {seed}").randrange(FRAMES // 2)
    while process.runs() and told <= least:
        time.sleep(0.01)
        told = lines.read_bytes().count(b"\n") if lines.exists() else 0
    assert process.runs(), "the run was over before it could be ended"
    os.kill(process.number, number)
    done = process.wait()
    rows = [json.loads(line) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert len(rows) >= told
    if number == signal.SIGKILL:
        if len(rows) > MOST_LOST:
            assert len(list(VideoFile(tmp_path / "annotated.mp4"))) >= len(rows) - MOST_LOST
        return
    assert done.returncode == 130, done.stderr
    assert len(list(VideoFile(tmp_path / "annotated.mp4"))) == len(rows) < FRAMES
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
