"""The stages of `gdino detect`: batches, bad images among them, an interruption, and order whatever is slow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detect_command import EVERYTHING
from gdino_hf.cli import detect_stages
from gdino_hf.cli.errors import INTERRUPTED
from gdino_hf.detection import prepared_pictures
from gdino_hf.detection.search import Search

# Rounding of float32 sums in another order, and of the report's two digits.
PIXELS, SCORES = 0.02, 0.0002


@pytest.fixture
def folder(tmp_path):
    """Six pictures of three shapes, two of which are no pictures."""
    chance = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index, size in enumerate([(90, 60), (90, 60), (60, 90), (60, 90), (60, 88), (200, 60)]):
        pixels = chance.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(tmp_path / "photos" / f"{index}.png")
    for index in (1, 4):
        (tmp_path / "photos" / f"{index}.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def names(entries):
    return [Path(entry["image"]).name for entry in entries]


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that the model gets."""
    sizes, detect = [], Search.__call__

    def counted(self, pictures):
        sizes.append(len(pictures))
        return detect(self, pictures)

    monkeypatch.setattr(Search, "__call__", counted)
    return sizes


def test_batches_of_like_sizes_give_what_single_images_give(detect, folder, batches):
    _, single, _, _ = detect(folder, *EVERYTHING, "--batch", "1")
    assert batches == [1, 1, 1, 1]
    batches.clear()
    status, together, _, _ = detect(folder, *EVERYTHING, "--batch", "8")
    assert status == 1
    # The landscape, the two portraits and the panorama do not share a batch.
    assert batches == [1, 2, 1]
    assert names(together["images"]) == names(single["images"]) == ["0.png", "2.png", "3.png", "5.png"]
    assert names(together["failed"]) == ["1.png", "4.png"]
    for one, other in zip(single["images"], together["images"], strict=True):
        assert [item["label"] for item in one["detections"]] == [item["label"] for item in other["detections"]]
        for name, tolerance in (("box", PIXELS), ("score", SCORES)):
            values = [[item[name] for item in image["detections"]] for image in (one, other)]
            np.testing.assert_allclose(*values, atol=tolerance)


def test_by_default_only_small_pictures_of_one_size_share_a_forward_on_a_cpu(detect, tmp_path, batches, monkeypatch):
    """They are never padded, because padding changes the results of published models."""
    (tmp_path / "photos").mkdir()
    for index, size in enumerate([(90, 60)] * 6 + [(88, 60), (90, 60), (90, 60)]):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(tmp_path / "photos" / f"{index}.png")
    _, together, _, _ = detect(tmp_path / "photos", *EVERYTHING, "--device", "cpu")
    assert batches == [4, 2, 1, 2]
    batches.clear()
    _, single, _, _ = detect(tmp_path / "photos", *EVERYTHING, "--batch", "1")
    assert batches == [1] * 9
    for one, other in zip(single["images"], together["images"], strict=True):
        scores = [[item["score"] for item in image["detections"]] for image in (one, other)]
        np.testing.assert_allclose(*scores, atol=SCORES)
    batches.clear()
    monkeypatch.setattr(prepared_pictures, "_SMALL_PIXELS", 100)
    detect(tmp_path / "photos", *EVERYTHING, "--restart")
    assert batches == [1] * 9


def test_a_batch_that_the_model_refuses_is_run_image_by_image(detect, folder, monkeypatch):
    run = Search.__call__

    def too_large(self, pictures):
        if len(pictures) > 1:
            raise RuntimeError("out of memory")
        return run(self, pictures)

    monkeypatch.setattr(Search, "__call__", too_large)
    _, report, _, _ = detect(folder, *EVERYTHING, "--batch", "2")
    assert names(report["images"]) == ["0.png", "2.png", "3.png", "5.png"]


def test_an_image_that_the_model_refuses_does_not_stop_the_others(detect, folder, monkeypatch):
    run, calls = Search.__call__, []

    def fails_once(self, pictures):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a strange picture")
        return run(self, pictures)

    monkeypatch.setattr(Search, "__call__", fails_once)
    status, report, _, said = detect(folder, *EVERYTHING, "--batch", "1")
    assert status == 1
    assert names(report["images"]) == ["0.png", "3.png", "5.png"]
    assert names(report["failed"]) == ["1.png", "2.png", "4.png"]
    assert "2.png: a strange picture" in said


def test_an_interruption_keeps_every_image_that_the_model_has_seen(detect, folder, monkeypatch):
    run, calls = Search.__call__, []

    def interrupted(self, pictures):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, pictures)

    monkeypatch.setattr(Search, "__call__", interrupted)
    status, report, _, said = detect(folder, *EVERYTHING, "--batch", "1")
    assert status == INTERRUPTED
    assert report["finished"] is False
    assert names(report["images"]) == ["0.png", "2.png"]
    assert "the same command goes on from there" in said
    monkeypatch.setattr(Search, "__call__", run)
    _, report, _, said = detect(folder, *EVERYTHING, "--batch", "1")
    assert "an unfinished run goes on, 2 of 6 images are done" in said
    assert names(report["images"]) == ["0.png", "2.png", "3.png", "5.png"]


def test_few_pictures_are_in_memory_at_once(detect, folder, monkeypatch):
    alive, most, read = set(), [], detect_stages._read

    class Counted:
        def __init__(self, picture):
            self.picture = picture
            alive.add(id(self))

        def __getattr__(self, name):
            return getattr(self.picture, name)

        def __del__(self):
            alive.discard(id(self))

    def counted(*arguments):
        work = read(*arguments)
        if work.picture is not None:
            work.marker = Counted(work.picture)
        most.append(len(alive))
        return work

    for index in range(6, 26):
        Image.new("RGB", (60, 60)).save(folder / f"{index}.png")
    monkeypatch.setattr(detect_stages, "_read", counted)
    _, report, _, _ = detect(folder, "--threshold", "1", "--batch", "1")
    assert len(report["images"]) == 24
    # Two ahead, one at the model, those that wait, one that is written, and one that was just read.
    assert max(most) <= 2 + 1 + detect_stages._WAITING + 1 + 1
