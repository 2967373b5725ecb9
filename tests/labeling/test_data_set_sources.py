"""Data sets of every form are sources: their pictures, each once, and a line that says which form was recognized."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from form_cases import FORMS, SIZES, picture, write_pictures
from gdino_hf.labeling.shard_labels import PictureReader
from gdino_hf.labeling.sources import Sources

TITLES = {
    "coco": "is COCO json (train.json), which lists 3 pictures",
    "odvg": "is ODVG json lines (train.jsonl), which lists 3 pictures",
    "yolo": "is a YOLO folder with data.yaml",
    "yolo_roboflow": "is a YOLO folder with data.yaml (train), which lists 3 pictures",
    "voc": "is a Pascal VOC folder, which lists 3 pictures",
    "voc_flat": "is a Pascal VOC folder, which lists 3 pictures",
    "createml": "is CreateML json (_annotations.createml.json), which lists 3 pictures",
    "label_studio": "is Label Studio json (train.json), which lists 3 pictures",
    "labelme": "is a LabelMe folder, which lists 3 pictures",
    "imagefolder": "is a folder with metadata.jsonl (metadata.jsonl), which lists 3 pictures",
    "hub_saved": "is a Hugging Face data set (train), which lists 3",
    "hub_parquet": "is a Hugging Face data set: all pictures in it",
    "webdataset": None,
    "webdataset_yolo": "is WebDataset tars: all pictures in it are labelled",
}


def found(*arguments, exclude=None):
    """The sources with what was listed, and their pixels in order."""
    sources = Sources([str(argument) for argument in arguments], exclude)
    sources.check()
    items = [item for _, item in sources.items()]
    return sources, items


def pixels(items):
    read = PictureReader()
    contents = [read(item) for item in items]
    files = [io.BytesIO(content) if isinstance(content, bytes) else content for content in contents]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.mark.parametrize("form", FORMS)
def test_the_pictures_of_every_form_are_listed_once_and_in_order(form, tmp_path):
    place = FORMS[form](tmp_path)
    sources, items = found(place)
    wanted = [np.asarray(picture(number, size)) for number, size in enumerate(SIZES.values())]
    assert [pixel.tolist() for pixel in pixels(items)] == [pixel.tolist() for pixel in wanted]
    assert len({item.source for item in items}) == 3
    if TITLES[form] is not None:
        assert TITLES[form] in sources.remarks[0]
    # A folder says the same as the file in it.
    if Path(place).is_file():
        again, same = found(tmp_path)
        assert same == items
        assert sources.remarks[0].partition(" is ")[2] == again.remarks[0].partition(" is ")[2]


@pytest.mark.parametrize("form", FORMS)
def test_listing_goes_on_behind_any_picture_of_a_data_set(form, tmp_path):
    place = str(FORMS[form](tmp_path))
    pairs = list(Sources([place]).items())
    assert [key for key, _ in pairs] == sorted(key for key, _ in pairs)
    for number, (key, _) in enumerate(pairs):
        assert list(Sources([place]).items(key)) == pairs[number + 1 :]


def test_a_plain_folder_stays_a_plain_folder(tmp_path):
    write_pictures(tmp_path / "sub")
    (tmp_path / "settings.json").write_text('{"images": 3}')
    (tmp_path / "notes.txt").write_text("1 2 3\n")
    (tmp_path / "config.yaml").write_text("names: [a]\n")
    (tmp_path / "about.xml").write_text("<about/>")
    sources, items = found(tmp_path)
    assert [Path(item.source).name for item in items] == list(SIZES)
    assert sources.remarks == [f"{tmp_path}: 4 files left out: 4 are not pictures"]


def test_pictures_that_a_data_set_does_not_list_are_counted_and_a_pattern_labels_them(tmp_path):
    FORMS["labelme"](tmp_path)
    write_pictures(tmp_path / "masks")
    sources, items = found(tmp_path)
    assert [Path(item.source).name for item in items] == list(SIZES)
    assert sources.remarks == [
        f"{tmp_path} is a LabelMe folder, which lists 3 pictures; 3 more in the folder are left out, and "
        f"'{tmp_path}/**' labels all"
    ]
    assert len(found(tmp_path / "**")[1]) == 6


def test_all_splits_are_labelled_unless_one_is_named(tmp_path):
    for split in ("train", "valid"):
        write_pictures(tmp_path / split / "images")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]\n")
    sources, items = found(tmp_path)
    assert [Path(item.source).parts[-3] for item in items] == ["train"] * 3 + ["valid"] * 3
    assert "(train, val), which lists 6 pictures" in sources.remarks[0]
    assert len(found(f"{tmp_path}/data.yaml:val")[1]) == 3
    assert len(found(f"{tmp_path}:val")[1]) == 3
    with pytest.raises(ValueError, match="has no split test; it has train, val"):
        found(f"{tmp_path}:test")


def test_several_files_of_one_split_name_each_picture_once(tmp_path):
    FORMS["coco"](tmp_path)
    (tmp_path / "annotations").mkdir()
    content = json.loads((tmp_path / "train.json").read_text())
    for name in ("instances_train2017.json", "person_keypoints_train2017.json"):
        (tmp_path / "annotations" / name).write_text(json.dumps(content))
    assert len(found(tmp_path)[1]) == 3


def test_what_a_data_set_cannot_name_is_told(tmp_path):
    place = FORMS["coco"](tmp_path)
    content = json.loads(place.read_text())
    content["images"][0]["file_name"] = "/etc/a.png"
    del content["images"][1]["file_name"]
    place.write_text(json.dumps(content))
    sources, items = found(place)
    assert [Path(item.source).name for item in items] == ["c.png"]
    assert (
        "1 entry outside of the data set's folder left out, such as image 0: its path '/etc/a.png'"
        in (sources.remarks[1])
    )
    assert "1 entry that cannot be read left out, such as image 1: its file_name is None" in sources.remarks[2]


def test_a_data_set_that_cannot_be_read_is_one_sentence(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "data.yaml").write_text("train: nowhere/images\nnames: [cat]\n")
    with pytest.raises(ValueError, match=r"cannot be listed .*names 'nowhere/images', which does not exist"):
        found(tmp_path)


def test_annotation_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for split in ("train", "valid"):
        place = FORMS["coco"](tmp_path / "set" / split)
        place.rename(place.with_name("_annotations.coco.json"))
    sources, items = found(tmp_path / "set")
    assert len(items) == 6
    assert "(train/_annotations.coco.json, valid/_annotations.coco.json), which lists 6 pictures" in sources.remarks[0]
