"""SAHI's sliced prediction runs on our models by path and by object, inside drop_in()."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

import gdino_hf

pytest.importorskip("sahi", reason="SAHI brings opencv-python, which needs the system's libGL")
from sahi import AutoDetectionModel
from sahi.predict import get_prediction, get_sliced_prediction

LABELS = ["a cat", "a remote control"]
BOX_TOLERANCE = 4  # pixels; the checkpoints have learned the boxes to about 2
OPTIONS = {"text_labels": LABELS, "confidence_threshold": 0.5, "device": "cpu"}


@pytest.fixture
def mosaic(tmp_path):
    """File of a picture of 2 x 2 times the one the checkpoints have learned, and the boxes of its eight objects."""
    from trained_checkpoint import BOXES, picture

    part = picture()
    whole = Image.new("RGB", (2 * part.width, 2 * part.height))
    boxes = []
    for column in range(2):
        for row in range(2):
            left, top = column * part.width, row * part.height
            whole.paste(part, (left, top))
            boxes += [(label, [x + left, y + top, x + left + w, y + top + h]) for label, (x, y, w, h) in BOXES.items()]
    path = tmp_path / "mosaic.png"
    whole.save(path)
    return path, sorted(boxes)


def predictions(result):
    return sorted((found.category.name, found.bbox.to_xyxy()) for found in result.object_prediction_list)


def sliced(path, model, **options):
    return get_sliced_prediction(
        str(path),
        model,
        slice_height=64,
        slice_width=96,
        overlap_height_ratio=0,
        overlap_width_ratio=0,
        perform_standard_pred=False,
        verbose=0,
        **options,
    )


@pytest.mark.parametrize("way", ["path", "object", "mm path"])
def test_slices_find_every_object(way, request, mosaic):
    folder = request.getfixturevalue("their_mm_checkpoint" if way == "mm path" else "their_checkpoint")
    path, expected = mosaic
    with gdino_hf.drop_in():
        if way == "object":
            model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
            processor = AutoProcessor.from_pretrained(folder)
            detector = AutoDetectionModel.from_pretrained("huggingface", model=model, processor=processor, **OPTIONS)
        else:
            detector = AutoDetectionModel.from_pretrained("huggingface", model_path=str(folder), **OPTIONS)
    assert isinstance(detector.model, gdino_hf.GDinoForObjectDetection)
    calls = []
    detector.model.register_forward_hook(lambda *call: calls.append(1))
    found = predictions(sliced(path, detector))
    assert len(calls) == 4
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, box), (_, wanted) in zip(found, expected, strict=True):
        assert box == pytest.approx(wanted, abs=BOX_TOLERANCE)
    assert detector.category_mapping == dict(enumerate(LABELS))


def test_batches_of_slices_and_the_whole_picture(their_checkpoint, mosaic):
    path, _ = mosaic
    with gdino_hf.drop_in():
        detector = AutoDetectionModel.from_pretrained("huggingface", model_path=str(their_checkpoint), **OPTIONS)
    single, batched = predictions(sliced(path, detector)), predictions(sliced(path, detector, batch_size=4))
    assert [name for name, _ in single] == [name for name, _ in batched]
    for (_, box), (_, other) in zip(single, batched, strict=True):
        assert box == pytest.approx(other, abs=1e-3)
    image = Image.open(path).crop((0, 0, 96, 64))
    whole = predictions(get_prediction(image, detector))
    found = gdino_hf.Detector(
        gdino_hf.GDinoForObjectDetection.from_pretrained(their_checkpoint), processor=detector.processor
    )
    ours = found(image, LABELS, threshold=0.5)
    assert [name for name, _ in whole] == sorted(ours.text_labels)
    for name, box in whole:
        assert box == pytest.approx(ours.boxes[ours.text_labels.index(name)].tolist(), abs=1e-2)


def test_gdino_nano_by_path_at_another_size(example_folder):
    with gdino_hf.drop_in():
        detector = AutoDetectionModel.from_pretrained(
            "huggingface",
            model_path=gdino_hf.NANO,
            text_labels=["cat", "cup"],
            confidence_threshold=0.2,
            image_size=320,
        )
    assert detector.processor.image_processor.size == {"shortest_edge": 320}
    with torch.no_grad():
        result = get_sliced_prediction(
            str(example_folder / "cat.jpg"), detector, slice_height=256, slice_width=256, verbose=0
        )
    names = {found.category.name for found in result.object_prediction_list}
    assert "cat" in names
    assert names <= {"cat", "cup"}
    for found in result.object_prediction_list:
        left, top, right, bottom = found.bbox.to_xyxy()
        assert 0 <= left < right <= 451
        assert 0 <= top < bottom <= 300


def test_without_drop_in_sahi_refuses_our_models():
    """SAHI knows a zero-shot model by the name of its class. Should this fail, its page can say that it works now."""
    with pytest.raises(ValueError, match="GDinoConfig"):
        AutoDetectionModel.from_pretrained("huggingface", model_path=gdino_hf.NANO, **OPTIONS)
