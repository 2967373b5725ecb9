"""Splits are found as files in one folder, or as a folder each, the way some tools export them."""

import json
import shutil

import pytest

from gdino_hf.data.annotation_files import find_split
from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.training.arguments import DataArguments
from gdino_hf.training.fine_tuning import read_data
from gdino_hf.training.splits import read_split, split_file


@pytest.fixture
def exported(drawn, tmp_path):
    """Data set in Roboflow's layout: train/, valid/ and test/, each with annotations beside the images."""
    for folder, split in (("train", "train"), ("valid", "val"), ("test", "val")):
        place = tmp_path / "export" / folder
        place.mkdir(parents=True)
        for image in json.loads((drawn / f"{split}.json").read_text())["images"]:
            shutil.copy(drawn / "images" / image["file_name"], place)
        shutil.copy(drawn / f"{split}.json", place / "_annotations.coco.json")
    return tmp_path / "export"


def test_splits_in_folders_of_their_own_are_found(exported):
    train = exported / "train" / "_annotations.coco.json"
    for place in (exported, train):
        sets = read_data(DataArguments(data=str(place)))
        found = [split.path.parent.name for split in sets]
        assert found == ["train", "valid", "test"]
        assert [len(split.rows) for split in sets] == [12, 4, 4]


def test_a_file_wins_over_a_folder_and_a_folder_of_images_is_no_split(exported):
    (exported / "val").mkdir()
    (exported / "val" / "a.png").write_bytes(b"")
    assert find_split(exported, "val") is None
    shutil.copy(exported / "valid" / "_annotations.coco.json", exported / "val.json")
    assert find_split(exported, "val") == exported / "val.json"
    with pytest.raises(ValueError, match="no test split"):
        split_file(exported / "valid", "test", "--test")


def test_data_sets_beside_an_ordinary_folder_are_not_taken_for_splits(exported):
    (exported / "train").rename(exported / "mine")
    assert find_split(exported / "mine" / "_annotations.coco.json", "val") is None


def test_a_damaged_image_is_only_a_remark_if_such_images_are_skipped(drawn):
    (drawn / "images" / "train5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"unreadable files.*train5\.png"):
        read_split(drawn / "train.json")
    split = read_split(drawn / "train.json", options=AnnotationOptions(unreadable="skip"))
    assert len(split.rows) == 11
    assert "train5.png" in split.remarks[0]
    # Wrong annotations are still refused.
    content = json.loads((drawn / "train.json").read_text())
    content["annotations"][0]["category_id"] = 99
    (drawn / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unknown classes"):
        read_split(drawn / "train.json", options=AnnotationOptions(unreadable="skip"))


def test_a_folder_of_one_split_means_that_split(exported):
    sets = read_data(DataArguments(data=str(exported / "train")))
    assert [split.path.parent.name for split in sets] == ["train", "valid", "test"]


def test_a_split_that_was_found_and_cannot_be_used_does_not_stop_training(exported):
    for image in (exported / "test").glob("*.png"):
        image.unlink()
    sets = read_data(DataArguments(data=str(exported)))
    assert (sets.test, len(sets.remarks)) == (None, 1)
    assert "missing files" in sets.remarks[0]
    assert "--test none" in sets.remarks[0]
    with pytest.raises(ValueError, match="missing files"):
        read_data(DataArguments(data=str(exported), test=str(exported / "test")))
    none = read_data(DataArguments(data=str(exported), val="none", test="none"))
    assert (none.val, none.test, none.remarks) == (None, None, [])


def test_missing_photographs_can_be_skipped(exported):
    next((exported / "train").glob("*.png")).unlink()
    assert len(read_data(DataArguments(data=str(exported), unreadable="skip")).train.rows) == 11
