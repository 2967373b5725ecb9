"""Exports of Label Studio: regions of every kind, tasks that were skipped, addresses of pictures, and faults."""

import json

import pytest
from PIL import Image

from gdino_hf.data.checks import check_dataset
from gdino_hf.data.formats import open_dataset
from gdino_hf.detection.annotation_tools import label_studio_prediction
from gdino_hf.detection.detections import Detections

WIDTH, HEIGHT = 200, 100


def region(kind, labels, **value):
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {**size, "type": kind, "value": {**value, kind: labels}}


def write(folder, results, address="cat.png"):
    """An export of tasks with these results, None for one that was not annotated; all of one picture."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "cat.png")
    tasks = [
        {
            "id": number,
            "data": {"image": address},
            "annotations": [] if result is None else [{"was_cancelled": False, "result": result}],
        }
        for number, result in enumerate(results)
    ]
    (folder / "train.json").write_text(json.dumps(tasks))
    return folder / "train.json"


@pytest.mark.parametrize(
    ("given", "box"),
    [
        (region("rectanglelabels", ["cat"], x=10, y=20, width=30, height=40, rotation=0), [20, 20, 80, 60]),
        # A quarter turn about the first corner: the width runs down, the height to the left.
        (region("rectanglelabels", ["cat"], x=50, y=20, width=30, height=40, rotation=90), [60, 20, 100, 80]),
        (region("ellipselabels", ["cat"], x=50, y=50, radiusX=10, radiusY=20), [80, 30, 120, 70]),
        (region("polygonlabels", ["cat"], points=[[10, 10], [50, 20], [20, 90]]), [20, 10, 100, 90]),
    ],
    ids=["rectangle", "turned", "ellipse", "polygon"],
)
def test_regions_become_boxes_in_pixels(tmp_path, given, box):
    rows, names = open_dataset(write(tmp_path, [[given]]))
    assert names == ["cat"]
    assert rows[0]["boxes"][0] == pytest.approx(box, abs=1e-4)


@pytest.mark.parametrize(
    "address",
    [
        "/data/local-files/?d=cat.png",
        "/data/local-files/?d=photos%2Fcat.png",
        "/data/upload/7/0a1b2c3d-cat.png",
        "https://example.org/photos/cat.png?token=1",
        "s3://bucket/photos/cat.png",
    ],
)
def test_pictures_are_found_by_every_kind_of_address(tmp_path, address):
    rows, _ = open_dataset(write(tmp_path, [[]], address))
    assert rows[0]["image"].size == (WIDTH, HEIGHT)


def test_what_was_not_annotated_is_left_out_and_counted(tmp_path, caplog):
    box = region("rectanglelabels", ["cat"], x=0, y=0, width=50, height=50)
    file = write(tmp_path, [None, [box], None])
    tasks = json.loads(file.read_text())
    tasks[2]["annotations"] = [{"was_cancelled": True, "result": [box]}]
    file.write_text(json.dumps(tasks[1:] + tasks[:1]))
    rows, _ = open_dataset(file)
    assert len(rows) == 1
    assert "2 tasks are not annotated, or skipped, and left out" in caplog.text


def test_regions_that_have_no_box_are_counted(tmp_path, caplog):
    box = region("rectanglelabels", ["cat"], x=0, y=0, width=50, height=50)
    wrong = [
        region("rectanglelabels", [], x=0, y=0, width=50, height=50),
        region("rectanglelabels", ["cat"], x="a", y=0, width=50, height=50),
        region("keypointlabels", ["cat"], x=5, y=5),
        "nothing",
    ]
    rows, _ = open_dataset(write(tmp_path, [[box, {"type": "choices", "value": {}}, *wrong]]))
    assert len(rows[0]["boxes"]) == 1
    assert "4 boxes are neither" in caplog.text


def test_a_region_with_two_labels_is_a_box_of_each(tmp_path):
    rows, _ = open_dataset(
        write(tmp_path, [[region("rectanglelabels", ["dog", "cat"], x=0, y=0, width=50, height=50)]])
    )
    assert sorted(rows[0]["names"]) == ["cat", "dog"]
    assert rows[0]["boxes"][0] == rows[0]["boxes"][1]


def test_an_export_without_annotations_is_one_sentence(tmp_path):
    file = write(tmp_path, [[region("rectanglelabels", ["cat"], x=0, y=0, width=50, height=50)], None])
    tasks = json.loads(file.read_text())
    tasks[0]["annotations"][0]["was_cancelled"] = True
    file.write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match="none of the entries can be used"):
        open_dataset(file)


def test_predictions_that_a_person_accepts_are_the_boxes_that_were_found(tmp_path):
    """What is written as predictions and comes back as annotations is the same to a hundredth of a pixel."""
    found = Detections([[10.5, 20.25, 60, 70], [0, 0, 5, 5]], [0.9, 0.4], [1, 0], ("cat", "dog"), (WIDTH, HEIGHT))
    result = label_studio_prediction(found, "label", "image", None)["result"]
    rows, names = open_dataset(write(tmp_path, [result]))
    assert names == ["cat", "dog"]
    assert rows[0]["names"] == ["dog", "cat"]
    for box, other in zip(rows[0]["boxes"], found.boxes.tolist(), strict=True):
        assert box == pytest.approx(other, abs=0.01)
    assert check_dataset(tmp_path / "train.json").format == "labelstudio"
