"""Folders of splits: read by supervision and by this package, and by the rules of Ultralytics and RF-DETR."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from form_cases import FORMS, NAMES, coco
from gdino_hf.data.formats import open_dataset
from gdino_hf.labeling.label_store import LabelStore
from gdino_hf.labeling.split_folders import split_dataset, split_labels, write_splits
from label_command import make_pictures, run_label

NUMBER = 20
SHARES = ("0.6", "0.2", "0.2")


@pytest.fixture(scope="module")
def labelled(label_model, tmp_path_factory):
    """A run over twenty pictures, one stored turned and one in a format that few read, with both folders of splits."""
    root = tmp_path_factory.mktemp("labelled")
    folder = make_pictures(root / "photos", NUMBER)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60), "red").save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (30, 20), "blue").save(folder / "odd.ppm")
    status, printed, said = run_label(
        label_model, root / "out", folder, "--format", "yolo", "coco", "--split", *SHARES, shard=8
    )
    assert status == 0, said
    assert printed.count("split: ") == 2
    return root / "out"


def total(paths):
    return sum(1 for _ in paths)


def test_ultralytics_rules_hold(labelled):
    """data.yaml has path, train, val, test and names; each picture has labels/ in place of images/ and .txt."""
    folder = labelled / "split" / "yolo"
    content = yaml.safe_load((folder / "data.yaml").read_text())
    assert Path(content["path"]) == folder
    assert list(content["names"]) == list(range(content["nc"])) == [0, 1, 2]
    counts = []
    for split in ("train", "val", "test"):
        pictures = sorted((Path(content["path"]) / content[split]).iterdir())
        counts.append(len(pictures))
        for picture in pictures:
            parts = ["labels" if part == "images" else part for part in picture.parts]
            lines = Path(*parts).with_suffix(".txt").read_text().splitlines()
            numbers = [[float(number) for number in line.split()] for line in lines]
            assert all(len(row) == 5 and row[0] in content["names"] for row in numbers)
            assert all(0 <= side <= 1 for row in numbers for side in row[1:])
    assert counts == [14, 4, 4]


def test_rf_detr_rules_hold(labelled):
    """Folders train, valid and test, each with its pictures and _annotations.coco.json; supercategories are there."""
    folder = labelled / "split" / "coco"
    for split, count in (("train", 14), ("valid", 4), ("test", 4)):
        content = json.loads((folder / split / "_annotations.coco.json").read_text())
        files = {path.name for path in (folder / split).iterdir()} - {"_annotations.coco.json"}
        assert {image["file_name"] for image in content["images"]} == files
        assert len(files) == count
        assert [(row["id"], row["supercategory"]) for row in content["categories"]] == [
            (1, "object"),
            (2, "object"),
            (3, "object"),
        ]
        ids = {image["id"] for image in content["images"]}
        assert all(row["image_id"] in ids and row["category_id"] in (1, 2, 3) for row in content["annotations"])
        assert {"area", "bbox", "iscrowd", "segmentation"} <= set(content["annotations"][0])


def test_supervision_reads_both_with_equal_boxes(labelled):
    sv = pytest.importorskip("supervision")
    folder = labelled / "split"
    for split, other in (("train", "train"), ("val", "valid"), ("test", "test")):
        yolo = sv.DetectionDataset.from_yolo(
            str(folder / "yolo" / "images" / split),
            str(folder / "yolo" / "labels" / split),
            str(folder / "yolo" / "data.yaml"),
        )
        coco = sv.DetectionDataset.from_coco(
            str(folder / "coco" / other), str(folder / "coco" / other / "_annotations.coco.json")
        )
        assert yolo.classes == coco.classes == ["cat", "remote control", "dog"]
        boxes = [{Path(path).name: found.xyxy for path, _, found in each if len(found)} for each in (yolo, coco)]
        assert boxes[0].keys() == boxes[1].keys()
        assert sum(map(len, boxes[0].values())) > 10
        for name, found in boxes[0].items():
            assert found == pytest.approx(boxes[1][name], abs=0.02)


def test_this_package_reads_both_and_each_picture_is_in_one_split(labelled):
    folder = labelled / "split"
    ends = {"yolo": ("data.yaml:{}", ("train", "val", "test")), "coco": ("{}", ("train", "valid", "test"))}
    for layout, (place, splits) in ends.items():
        names = [
            Path(row["path"]).stem
            for split in splits
            for row in open_dataset(str(folder / layout / place.format(split)))[0]
            .cast_column("image", __import__("datasets").Image(decode=False))
            .to_dict()["image"]
        ]
        assert len(names) == len(set(names)) == NUMBER + 2


def test_turned_pictures_are_written_upright_and_odd_formats_as_png(labelled):
    (turned,) = labelled.glob("split/yolo/images/*/turned.*")
    with Image.open(turned) as picture:
        assert (picture.size, picture.getexif().get(0x0112)) == ((60, 90), None)
    (odd,) = labelled.glob("split/coco/*/odd.*")
    assert odd.suffix == ".png"
    source = next((labelled.parent / "photos").rglob("00002.jpg"))
    (copied,) = labelled.glob("split/yolo/images/*/00002.jpg")
    assert copied.read_bytes() == source.read_bytes()


def test_the_seed_decides_and_repeating_changes_no_byte(labelled, tmp_path):
    store = LabelStore(labelled)
    content = [
        {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
        if split_labels(store, tmp_path / name, "coco", (0.5, 0.3, 0.2), seed=seed)
    ]
    assert content[0] == content[1] != content[2]


@pytest.mark.parametrize("form", FORMS)
def test_a_data_set_of_any_form_is_divided(form, tmp_path):
    (tmp_path / "set").mkdir()
    place = FORMS[form](tmp_path / "set")
    made = split_dataset(place, tmp_path / "out", "yolo", (0.4, 0.3, 0.3))
    assert (made.pictures, made.left_out) == ({"train": 1, "val": 1, "test": 1}, {})
    assert sum(made.boxes.values()) == 3
    content = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert list(content["names"].values()) == NAMES
    assert total((tmp_path / "out").rglob("labels/*/*.txt")) == 3


@pytest.mark.parametrize(
    ("layout", "shares", "message"),
    [
        ("voc", (0.8, 0.1, 0.1), "There is no layout 'voc'; choose from yolo, coco"),
        ("yolo", (0.8, 0.1, 0.2), "add up to 1"),
        ("yolo", (0.0, 0.5, 0.5), "share for training is 0"),
    ],
)
def test_what_cannot_be_divided_is_one_sentence(tmp_path, layout, shares, message):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=message):
        split_dataset(coco(tmp_path / "set"), tmp_path / "out", layout, shares)
    with pytest.raises(ValueError, match="There are 0 pictures for 3 splits"):
        write_splits(list, NAMES, tmp_path / "out", "yolo")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--split", "0.8", "0.1", "0.1"), "name one of them in --format"),
        (("--format", "yolo", "--split", "0.8", "0.1", "0.2"), "does not add up to 1"),
    ],
)
def test_the_command_refuses_before_the_work(label_model, tmp_path, options, message):
    status, _, said = run_label(label_model, tmp_path / "out", tmp_path, *options)
    assert (status, message in said) == (2, True)
    assert not (tmp_path / "out").exists()
