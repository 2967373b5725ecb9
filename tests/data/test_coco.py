"""Tests of reading COCO files."""

import json

import pytest
from PIL import Image

from gdino_hf.data.coco import category_names, read_coco

CONTENT = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "a.png", "width": 30, "height": 40},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 3, "category_id": 2, "bbox": [20, 30, 100, 5], "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 2, "bbox": [5, 5, 0, 5]},
    ],
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a COCO file and, by default, its images."""

    def write(content, with_images=True):
        if with_images:
            (tmp_path / "images").mkdir()
            for image in content["images"]:
                Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "images" / image["file_name"])
        path = tmp_path / "train.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_rows_in_file_order_with_clipped_xyxy_boxes(write):
    rows = read_coco(write(CONTENT))
    assert rows["image_id"] == [7, 3]
    assert rows[0]["boxes"] == []
    # The second box is clipped to the image; the third has no area and is dropped.
    assert rows[1]["boxes"] == [[1, 2, 4, 6], [20, 30, 30, 35]]
    assert rows[1]["names"] == ["dog", "cat"]
    assert rows[1]["crowd"] == [False, True]
    assert rows[1]["image"].size == (30, 40)


def test_names_follow_the_order_of_their_ids(write):
    assert category_names(write(CONTENT)) == ["cat", "dog"]


def test_a_missing_image_is_named(write):
    with pytest.raises(ValueError, match=r"b\.png"):
        read_coco(write(CONTENT, with_images=False))


def test_an_unknown_category_is_named(write):
    with pytest.raises(ValueError, match="category_id 9"):
        read_coco(write({**CONTENT, "categories": [{"id": 2, "name": "cat"}]}))


@pytest.mark.parametrize("text", ["no json", "[]", '{"images": []}'])
def test_other_files_are_rejected(tmp_path, text):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"train\.json"):
        read_coco(path)


def test_the_everyday_data_set_matches_its_readme(shared):
    rows = read_coco(shared / "data" / "everyday" / "val.json")
    names = category_names(shared / "data" / "everyday" / "val.json")
    assert len(rows) == 183
    assert (len(names), names[0], names[-1]) == (80, "person", "toothbrush")
    assert max(max(row) for row in zip(rows["width"], rows["height"], strict=True)) <= 448


def test_file_names_with_backslashes_are_found(write):
    path = write(CONTENT)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = "images\\" + image["file_name"]
    path.write_text(json.dumps(content))
    assert [row["image"].size for row in read_coco(path)] == [(20, 10), (30, 40)]
