"""`check_dataset` on real photographs: no false alarm, and none of many seeded mistakes is missed."""

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gdino_hf.data.checks import check_dataset

SETS = ("wild/train", "wild/val", "bccd/train", "bccd/val", "bccd/test", "everyday/train", "everyday/val")


@pytest.mark.parametrize("name", SETS)
def test_real_data_gives_no_false_alarm(shared, name):
    report = check_dataset(shared / "data" / f"{name}.json")
    assert report.findings == [], str(report)


class Spoiler:
    """A data set of 40 photographs, of which one thing is spoilt.

    Attributes:
        folder: Its folder.
        content: Its COCO content, written by `check`.
        rng: Random choices of what to spoil.
    """

    def __init__(self, folder: Path, source: Path, seed: int = 0) -> None:
        self.folder, self.source, self.rng = folder, source, random.Random(seed)
        content = json.loads((source / "val.json").read_text())
        self.content = self.subset(content, content["images"][:40])
        used = {box["category_id"] for box in self.content["annotations"]}
        self.content["categories"] = [entry for entry in content["categories"] if entry["id"] in used]

    def subset(self, content, images):
        """Copy photographs, and return the content with only these."""
        ids = {image["id"] for image in images}
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        for image in images:
            shutil.copy(self.source / "images" / image["file_name"], self.folder / "images")
        boxes = [box for box in content["annotations"] if box["image_id"] in ids]
        return {**content, "images": images, "annotations": boxes}

    @property
    def image(self):
        # One that is not square, so that swapped sides show.
        return self.rng.choice([image for image in self.content["images"] if image["width"] != image["height"]])

    @property
    def box(self):
        return self.rng.choice(self.content["annotations"])

    def path(self, image):
        return self.folder / "images" / image["file_name"]

    def check(self, name="val.json"):
        (self.folder / name).write_text(json.dumps(self.content))
        return check_dataset(self.folder / name)


def flipped_sizes(data):
    image = data.image
    image["width"], image["height"] = image["height"], image["width"]


def wrong_size(data):
    data.image["width"] += 7


def scaled_size(data):
    image = data.image
    image["width"], image["height"] = 2 * image["width"], 2 * image["height"]


def corners(data):
    for box in data.content["annotations"]:
        x, y, width, height = box["bbox"]
        box["bbox"] = [x, y, x + width, y + height]


def normalized(data):
    sizes = {image["id"]: (image["width"], image["height"]) for image in data.content["images"]}
    for box in data.content["annotations"]:
        width, height = sizes[box["image_id"]]
        box["bbox"] = [value / side for value, side in zip(box["bbox"], (width, height) * 2, strict=True)]


def repeated_image_id(data):
    first, second = data.rng.sample(data.content["images"], 2)
    second["id"] = first["id"]


def repeated_annotation_id(data):
    first, second = data.rng.sample(data.content["annotations"], 2)
    second["id"] = first["id"]


def repeated_category_id(data):
    first, second = data.rng.sample(data.content["categories"], 2)
    second["id"] = first["id"]


def unknown_class(data):
    data.box["category_id"] = 9999


def unknown_image(data):
    data.box["image_id"] = 10**6


def only_crowds(data):
    for box in data.content["annotations"]:
        box["iscrowd"] = 1


def a_picture_of_crowds(data):
    image = data.box["image_id"]
    for box in data.content["annotations"]:
        box["iscrowd"] = int(box["image_id"] == image)


def missing_file(data):
    data.path(data.image).unlink()


def broken_file(data):
    path = data.path(data.image)
    path.write_bytes(path.read_bytes()[:2000])


def no_picture(data):
    data.path(data.image).write_text("<html>404</html>")


def turned_by_exif(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = data.path(data.image)
    Image.open(path).save(path, exif=exif)


def mirrored_by_exif(data):
    exif = Image.Exif()
    exif[0x0112] = 2
    path = data.path(data.image)
    Image.open(path).save(path, exif=exif)


def box_without_area(data):
    data.box["bbox"][2] = 0


def negative_side(data):
    data.box["bbox"][3] *= -1


def box_outside(data):
    data.box["bbox"][0] += 5000


def non_finite(data):
    data.box["bbox"][1] = float("nan")


def missing_number(data):
    data.box["bbox"][1] = None


def three_numbers(data):
    data.box["bbox"].pop()


def huge_number(data):
    data.box["bbox"][2] = 1e300


def too_many_boxes(data):
    box = data.box
    data.content["annotations"] += [{**box, "id": 10**6 + n, "bbox": [n % 50, n // 50, 9, 9]} for n in range(901)]


def name_twice(data):
    data.content["categories"].append({"id": 5000, "name": data.content["categories"][0]["name"]})


def name_in_another_case(data):
    data.content["categories"].append({"id": 5000, "name": f" {data.content['categories'][0]['name'].upper()} "})


def empty_name(data):
    data.rng.choice(data.content["categories"])["name"] = "  "


def name_is_a_number(data):
    data.rng.choice(data.content["categories"])["name"] = 7


def name_with_a_mark(data):
    data.rng.choice(data.content["categories"])["name"] += "?"


def name_without_a_known_word(data):
    data.rng.choice(data.content["categories"])["name"] = "\u2766\u2767"


def names_of_equal_tokens(data):
    first, second = data.rng.sample(data.content["categories"], 2)
    first["name"], second["name"] = "安全帽", "安全帶"


def grouping_class(data):
    data.content["categories"].append({"id": 5000, "name": "things", "supercategory": "none"})
    for entry in data.content["categories"][:-1]:
        entry["supercategory"] = "things"


def class_without_boxes(data):
    data.content["categories"].append({"id": 5000, "name": "unicorn"})


def entry_without_a_file_name(data):
    del data.image["file_name"]


def unusable_size(data):
    data.image["width"] = "wide"


def unusable_area(data):
    data.box["area"] = "large"


def path_that_leaves(data):
    data.image["file_name"] = "../../secret.jpg"


def photograph_listed_twice(data):
    data.content["images"].append({**data.image, "id": 10**6})


def photograph_under_two_names(data):
    image = data.image
    shutil.copy(data.path(image), data.folder / "images" / "copy.jpg")
    data.content["images"].append({**image, "id": 10**6, "file_name": "copy.jpg"})


def photograph_in_two_splits(data):
    shutil.copy(data.path(data.image), data.folder / "images" / "other.jpg")
    other = {"id": 1, "file_name": "other.jpg", "width": 1, "height": 1}
    train = {"images": [other], "annotations": [], "categories": data.content["categories"]}
    (data.folder / "train.json").write_text(json.dumps(train))


def copies_of_a_photograph_in_two_splits(data):
    image = data.image
    Image.open(data.path(image)).save(data.folder / "images" / "street_jpg.rf.1a2b.jpg", quality=50)
    data.path(image).rename(data.folder / "images" / "street_jpg.rf.3c4d.jpg")
    image["file_name"] = "street_jpg.rf.3c4d.jpg"
    other = {"id": 1, "file_name": "street_jpg.rf.1a2b.jpg", "width": 1, "height": 1}
    train = {"images": [other], "annotations": [], "categories": data.content["categories"]}
    (data.folder / "train.json").write_text(json.dumps(train))


def box_marked_twice(data):
    data.content["annotations"].append({**data.box, "id": 10**6})


def picture_without_boxes(data):
    image = data.image
    data.content["annotations"] = [box for box in data.content["annotations"] if box["image_id"] != image["id"]]


def name_with_a_comma(data):
    data.rng.choice(data.content["categories"])["name"] += ", small"


def crowd_in_words(data):
    data.box["iscrowd"] = "yes"


def box_of_fractions(data):
    data.box["bbox"][2] = 1e-4


def absent_names_under_another_key(data):
    data.image["negative_names"] = ["cat"]


def absent_name_that_has_a_box(data):
    box = data.box
    names = {entry["id"]: entry["name"] for entry in data.content["categories"]}
    image = next(image for image in data.content["images"] if image["id"] == box["image_id"])
    image["neg_names"] = [names[box["category_id"]]]


# Each mistake and the kind of finding that names it.
MISTAKES = {
    flipped_sizes: "wrong sizes",
    wrong_size: "wrong sizes",
    scaled_size: "wrong sizes",
    corners: "corner boxes",
    normalized: "normalized boxes",
    repeated_image_id: "repeated image ids",
    repeated_annotation_id: "repeated annotation ids",
    repeated_category_id: "repeated category ids",
    unknown_class: "few unknown classes",
    unknown_image: "few unknown images",
    only_crowds: "only crowds",
    a_picture_of_crowds: "images of crowds",
    missing_file: "missing files",
    broken_file: "unreadable files",
    no_picture: "unreadable files",
    turned_by_exif: "boxes turned",
    mirrored_by_exif: "unclear orientations",
    box_without_area: "boxes without area",
    negative_side: "boxes without area",
    box_outside: "boxes outside",
    non_finite: "broken boxes",
    missing_number: "broken boxes",
    three_numbers: "broken boxes",
    huge_number: "broken boxes",
    too_many_boxes: "more boxes than queries",
    name_twice: "repeated names",
    name_in_another_case: "alike names",
    empty_name: "broken names",
    name_is_a_number: "broken names",
    name_with_a_mark: "names with marks",
    name_without_a_known_word: "unknown names",
    names_of_equal_tokens: "names of equal tokens",
    grouping_class: "grouping classes",
    class_without_boxes: "empty classes",
    entry_without_a_file_name: "broken entries",
    unusable_size: "broken sizes",
    unusable_area: "broken areas",
    path_that_leaves: "paths outside",
    photograph_listed_twice: "repeated files",
    photograph_under_two_names: "repeated photographs",
    photograph_in_two_splits: "shared photographs",
    copies_of_a_photograph_in_two_splits: "shared photographs",
    box_marked_twice: "repeated boxes",
    picture_without_boxes: "images without boxes",
    name_with_a_comma: "names with separators",
    crowd_in_words: "odd crowd marks",
    box_of_fractions: "thin boxes",
    absent_names_under_another_key: "unread absent names",
    absent_name_that_has_a_box: "contradicting absent names",
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_no_seeded_mistake_is_missed(shared, tmp_path, mistake, seed):
    data = Spoiler(tmp_path / "set", shared / "data" / ("wild", "everyday")[seed], seed)
    assert data.check().findings == []
    mistake(data)
    report = data.check()
    assert MISTAKES[mistake] in {finding.kind for finding in report.findings}, str(report)
