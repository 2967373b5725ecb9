"""Tests of ground truth from COCO and LVIS files and from rows, of label subsets, and of tables of data sets."""

import json

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.checks import check_dataset
from gdino_hf.data.coco import read_coco
from gdino_hf.evaluation.ground_truth import coco_ground_truth, rows_ground_truth
from gdino_hf.evaluation.table import average_row, read_table


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a COCO file with some parts replaced."""

    def write(**parts):
        content = {
            "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
            "categories": [{"id": 30, "name": "dog"}, {"id": 10, "name": "cat"}],
            "annotations": [
                {"image_id": 9, "category_id": 30, "bbox": [-1.5, 2, 10, 20], "area": 77.5, "iscrowd": 0},
                {"image_id": 9, "category_id": 10, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            ],
        }
        path = tmp_path / "val.json"
        path.write_text(json.dumps({**content, **parts}))
        return path

    return write


def test_boxes_are_not_clipped_or_rounded_and_areas_are_as_annotated(write):
    truth = coco_ground_truth(write())
    assert truth.labels == ["cat", "dog"]
    reference = truth.references[9]
    assert reference["boxes"].tolist() == [[-1.5, 2, 8.5, 22], [0, 0, 5, 5]]
    assert reference["labels"].tolist() == [1, 0]
    assert reference["area"].tolist() == [77.5, 25.0]
    assert reference["crowd"].tolist() == [False, True]
    assert truth.references[4]["boxes"].shape == (0, 4)
    assert [row["image_id"] for row in truth.rows] == [9, 4]
    assert not truth.is_federated


def test_lvis_lists_the_labels_annotated_in_each_image(write):
    path = write(
        images=[
            {
                "id": 9,
                "coco_url": "http://images.cocodataset.org/train2017/000000000009.jpg",
                "neg_category_ids": [30],
                "not_exhaustive_category_ids": [10],
            }
        ],
        categories=[{"id": 10, "name": "cat", "frequency": "r"}, {"id": 30, "name": "dog", "frequency": "f"}],
    )
    truth = coco_ground_truth(path)
    assert truth.is_federated
    assert truth.references[9]["negative_labels"] == [1]
    assert truth.references[9]["not_exhaustive_labels"] == [0]
    assert truth.frequencies == ["r", "f"]
    assert truth.rows[0]["image"].endswith("000000000009.jpg")
    only = truth.restricted_to(["dog"])
    assert (only.references[9]["negative_labels"], only.frequencies) == ([0], ["f"])


def test_a_subset_of_labels_is_renumbered(write):
    truth = coco_ground_truth(write()).restricted_to(["zebra", " DOG "])
    assert truth.references[9]["labels"].tolist() == [1]
    assert truth.references[9]["boxes"].tolist() == [[-1.5, 2, 8.5, 22]]


def test_predictions_and_references_are_paired_in_the_order_of_image_ids(write):
    truth = coco_ground_truth(write())
    found, meant = truth.paired_with([{"image_id": 9, "boxes": "nine"}, {"image_id": 4, "boxes": "four"}])
    assert [item["boxes"] for item in found] == ["four", "nine"]
    assert [len(item["boxes"]) for item in meant] == [0, 2]
    assert len(truth.paired_with([{"image_id": 4}])[1]) == 1
    with pytest.raises(ValueError, match="image 5, which the data set does not have"):
        truth.paired_with([{"image_id": 5}])


def test_image_ids_may_be_text(write):
    truth = coco_ground_truth(
        write(images=[{"id": "b", "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}], annotations=[])
    )
    assert [row["image_id"] for row in truth.rows] == ["b", 4]
    found, _ = truth.paired_with([{"image_id": "b"}, {"image_id": 4}])
    assert [item["image_id"] for item in found] == [4, "b"]


@pytest.mark.parametrize(
    ("image", "stored", "folder"),
    [
        ({"file_name": "a.jpg"}, "images/a.jpg", None),
        ({"file_name": "a.jpg"}, "a.jpg", None),
        ({"file_name": "images/a.jpg"}, "images/a.jpg", None),
        ({"file_name": "val2017/a.jpg"}, "coco/val2017/a.jpg", "coco"),
        ({"coco_url": "http://images.cocodataset.org/val2017/a.jpg"}, "coco/val2017/a.jpg", "coco"),
        ({"coco_url": "http://images.cocodataset.org/val2017/a.jpg"}, "coco/val2017/a.jpg", "coco/val2017"),
        ({"coco_url": "http://images.cocodataset.org/val2017/a.jpg"}, "coco/a.jpg", "coco"),
    ],
)
def test_images_are_found_where_training_finds_them(write, tmp_path, image, stored, folder):
    path = write(images=[{"id": 9, "width": 8, "height": 6, **image}], annotations=[])
    (tmp_path / stored).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(tmp_path / stored)
    images = None if folder is None else tmp_path / folder
    assert coco_ground_truth(path, images).rows[0]["image"] == str(tmp_path / stored)
    assert read_coco(path, images)[0]["image"].size == (8, 6)
    assert check_dataset(path, images).errors == []


def test_rows_of_the_readers_become_ground_truth():
    rows = [
        {"image_id": 3, "boxes": [[0, 0, 4, 5], [1, 1, 2, 2]], "names": ["Cat", "unicorn"], "crowd": [True, False]},
        {"boxes": [], "names": []},
    ]
    truth = rows_ground_truth(rows, ["dog", "cat"])
    assert truth.references[3]["labels"].tolist() == [1]
    assert truth.references[3]["crowd"].tolist() == [True]
    assert truth.references[3]["area"].tolist() == [20.0]
    assert truth.references[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"images": None}, "is not a COCO detection file"),
        ({"annotations": [{"image_id": 9, "category_id": 99, "bbox": [0, 0, 1, 1]}]}, "category_id 99"),
        ({"annotations": [{"image_id": 9, "category_id": 10}]}, "the box None is not four finite numbers"),
        ({"annotations": [{"image_id": 9, "category_id": 10, "bbox": [0, 0, 1]}]}, "is not four finite numbers"),
        ({"annotations": [{"image_id": 9, "category_id": 10, "bbox": [0, 0, 1, 1], "area": "x"}]}, "the area 'x'"),
        ({"images": [{"id": [9], "file_name": "b.jpg"}]}, r"its id is \[9\]"),
        ({"images": [{"id": 9}]}, "its file_name"),
        ({"categories": [{"id": 10}]}, "its name"),
    ],
)
def test_an_invalid_coco_file_gives_a_one_line_error(write, parts, message):
    with pytest.raises(ValueError, match=message) as caught:
        coco_ground_truth(write(**parts))
    assert "val.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_is_a_list_of_data_sets_relative_to_its_file(tmp_path):
    path = tmp_path / "sets.yaml"
    path.write_text(
        "- name: pets\n  annotations: pets/val.json\n  images: pictures\n  prompts: {cat: a furry cat}\n"
        "- name: cars\n  annotations: cars.json\n  labels: [car]\n"
    )
    pets, cars = read_table(path)
    assert (pets.annotations, pets.images) == (tmp_path / "pets" / "val.json", tmp_path / "pictures")
    assert pets.prompts_of(["dog", "Cat"]) == ["dog", "a furry cat"]
    assert (cars.images, cars.labels, cars.prompts_of(["car"])) == (None, ["car"], ["car"])
    with pytest.raises(ValueError, match="prompt for 'cat'"):
        pets.prompts_of(["dog"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a list"),
        ("name: pets", "must hold a list"),
        ("- pets", "Data set 1 of .* is 'pets'"),
        ("- {name: pets}", "has no annotations"),
        ("- {name: a/b, annotations: x.json}", "cannot be the name of a folder"),
        ("- {name: pets, annotations: x.json, prompt: {}}", "has the unknown key 'prompt'"),
        ("- {name: pets, annotations: x.json, prompts: [cat]}", "prompts that are not a mapping"),
        ("- {name: pets, annotations: x.json, labels: cat}", "give a list of names"),
        ("- {name: pets, annotations: x.json}\n- {name: pets, annotations: y.json}", "two data sets named 'pets'"),
        ("- {name: [", "cannot be read as YAML"),
    ],
)
def test_a_malformed_table_is_rejected(tmp_path, text, message):
    path = tmp_path / "sets.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_every_data_set_has_the_same_weight_in_the_average():
    rows = [{"AP": 0.2, "APs": -1.0}, {"AP": 0.4, "APs": 0.5}]
    average = average_row(rows, ("AP", "APs"))
    assert average == {"AP": pytest.approx(0.3), "APs": 0.5}
    assert average_row([], ("AP",)) == {"AP": -1.0}
    assert np.isfinite(list(average.values())).all()
