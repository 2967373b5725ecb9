"""Where the splits of a data set are found: files in one folder, or a folder for each, as some tools write them."""

import json
import shutil

import pytest

from gdino_hf.training.arguments import DataArguments
from gdino_hf.training.fine_tuning import read_data
from gdino_hf.training.splits import find_split, read_split, split_file


@pytest.fixture
def exported(drawn, tmp_path):
    """Roboflow's layout: train/, valid/ and test/, each with its annotations among its pictures."""
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


def test_a_file_comes_before_a_folder_and_pictures_are_no_split(exported):
    (exported / "val").mkdir()
    (exported / "val" / "a.png").write_bytes(b"")
    assert find_split(exported, "val") is None
    shutil.copy(exported / "valid" / "_annotations.coco.json", exported / "val.json")
    assert find_split(exported, "val") == exported / "val.json"
    with pytest.raises(ValueError, match="no test split"):
        split_file(exported / "valid", "test", "--test")


def test_other_data_sets_beside_a_folder_are_no_splits_of_it(exported):
    (exported / "train").rename(exported / "mine")
    assert find_split(exported / "mine" / "_annotations.coco.json", "val") is None


def test_a_picture_damaged_from_the_start_is_a_remark_where_such_are_passed_over(drawn):
    (drawn / "images" / "train5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"unreadable files.*train5\.png"):
        read_split(drawn / "train.json")
    split = read_split(drawn / "train.json", unreadable="skip")
    assert len(split.rows) == 12
    assert "train5.png" in split.remarks[0]
    # What the annotations say of sizes and boxes still has to be right.
    content = json.loads((drawn / "train.json").read_text())
    content["annotations"][0]["category_id"] = 99
    (drawn / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unknown classes"):
        read_split(drawn / "train.json", unreadable="skip")
