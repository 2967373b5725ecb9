"""Tests of opening data sets: the format is detected, and an invalid file gives a one-line error."""

import json
import random

import pytest
from PIL import Image

from gdino_hf.data.checks import check_dataset
from gdino_hf.data.formats import annotation_format, open_dataset

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 6}],
    "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 1, 3, 3], "iscrowd": 0}],
}
DETECTION = {
    "filename": "a.png",
    "width": 8,
    "height": 6,
    "detection": {"instances": [{"bbox": [1, 1, 4, 4], "label": 0, "category": "dog"}]},
}
GROUNDING = {
    "filename": "a.png",
    "width": 8,
    "height": 6,
    "grounding": {
        "caption": "a dog",
        "regions": [{"bbox": [1, 1, 4, 4], "phrase": "dog", "tokens_positive": [[2, 5]]}],
    },
}


@pytest.fixture
def folder(tmp_path):
    """A folder with one image in `images`."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "a.png")
    return tmp_path


@pytest.mark.parametrize("indent", [None, 2])
def test_coco_files_are_detected(folder, indent):
    (folder / "boxes.json").write_text(json.dumps(COCO, indent=indent))
    # Another json file beside it, which looks a little like annotations.
    (folder / "config.json").write_text(json.dumps({"model_type": "gdino", "images": 3}, indent=2))
    for path in (folder / "boxes.json", folder, str(folder)):
        rows, labels = open_dataset(path)
        assert labels == ["cat", "dog"]
        assert rows[0]["names"] == ["dog"]
    assert annotation_format(folder / "boxes.json") == "coco"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_odvg_files_are_detected(folder, suffix):
    (folder / f"boxes.{suffix}").write_text("\n" + json.dumps(DETECTION) + "\n")
    (folder / "label_map.json").write_text('{"0": "dog", "1": "cat"}')
    rows, labels = open_dataset(folder)
    assert labels == ["dog", "cat"]
    assert rows[0]["boxes"] == [[1, 1, 4, 4]]


def test_grounding_has_no_labels(folder):
    (folder / "boxes.jsonl").write_text(json.dumps(GROUNDING))
    rows, labels = open_dataset(folder)
    assert labels is None
    assert rows[0]["spans"] == [[[2, 5]]]


def test_streaming_reads_the_same_rows(folder):
    for name, content in (("coco.json", COCO), ("odvg.jsonl", DETECTION)):
        (folder / name).write_text(json.dumps(content))
        rows, labels = open_dataset(folder / name)
        stream, stream_labels = open_dataset(folder / name, streaming=True)
        assert stream_labels == labels
        assert [row["boxes"] for row in stream] == rows["boxes"]
        assert next(iter(stream))["image"].size == (8, 6)


def test_of_several_files_the_training_split_is_used(folder):
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(COCO))
    assert len(open_dataset(folder)[0]) == 1
    (folder / "train.json").rename(folder / "test.json")
    with pytest.raises(ValueError, match=r"test\.json, val\.json"):
        open_dataset(folder)


def test_images_beside_the_annotations_are_found(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(COCO))
    assert open_dataset(tmp_path)[0][0]["image"].size == (8, 6)


@pytest.mark.parametrize("content", ["", "nonsense", "[]", "{}", '{"a": 1}\n{"b": 2}', "[[[" * 9999, "\ufeff{", "null"])
def test_other_files_are_rejected(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    for target in (path, tmp_path):
        with pytest.raises(ValueError, match=r"neither|no annotations"):
            open_dataset(target)
    with pytest.raises(ValueError, match="does not exist"):
        open_dataset(tmp_path / "missing")


NONSENSE = [
    None,
    True,
    -1,
    0,
    1,
    2,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\ud800",
    "x\0",
    [],
    {},
    [1],
    [[]],
]
NONSENSE += [{"a": 1}, "../" * 300, [0, 0, 1, 1], [1, float("nan"), 2, 3], ["1", 2, 3, 4], [[1, 1, 2, 2]], [[0, 1]]]


def spoil(value, rng):
    """Return a copy of the value with one part replaced by nonsense or removed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = spoil(value[key], rng)
        return value
    return rng.choice(NONSENSE)


def outcome(call):
    """Return the result of a call and "", or None and the message of its ValueError."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def read(path, streaming):
    """Open a data set, read all of its rows, and return the sizes of their images."""
    rows, labels = open_dataset(path, streaming=streaming)
    sizes = [row["image"].size for row in rows]
    assert sizes in ([], [(8, 6)])
    assert labels is None or all(isinstance(name, str) for name in labels)
    return sizes


@pytest.mark.parametrize("content", [COCO, DETECTION, GROUNDING], ids=["coco", "detection", "grounding"])
def test_spoilt_files_give_a_one_line_error_that_the_check_predicts(folder, content):
    rng = random.Random(0)
    path = folder / "spoilt.json"
    refused = 0
    for _ in range(150):
        spoilt = content
        for _ in range(rng.randint(1, 2)):
            spoilt = spoil(spoilt, rng)
        path.write_text(json.dumps(spoilt))
        report, complaint = outcome(lambda: check_dataset(path))
        assert report is None or str(report)
        assert "\n" not in complaint
        for streaming in (False, True):
            opened, complaint = outcome(lambda streaming=streaming: read(path, streaming))
            assert "\n" not in complaint
            refused += opened is None and not streaming
            # Whatever cannot be opened was reported by the check.
            assert opened is not None or report is None or report.errors, (spoilt, complaint)
    assert 30 < refused < 150
