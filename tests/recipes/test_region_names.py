"""Names for regions that nobody annotated."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
from gdino_hf.recipes import region_names
from gdino_hf.recipes.region_names import RegionNames, RowsWithRegions, imagenet_names, look_at_regions
from gdino_hf.recipes.wordings import Wordings

WORDINGS = Wordings(["cat", "couch", "cup", "sofa"])
NAMES = [("tabby",), (), ("lampshade",), ("cup",), ("pillow",), ("sports cup",), ("sofa",)]
TABBY, NAMELESS, LAMPSHADE, CUP, PILLOW, SPORTS_CUP, SOFA = range(7)


def row(**more):
    return {
        "width": 200,
        "height": 100,
        "boxes": [[0, 0, 100, 50]],
        "names": ["cat"],
        "crowd": [False],
        "neg_names": ["couch"],
        "regions": {"boxes": [], "annotated": [], "seen": []},
        **more,
    }


def looked(*boxes, annotated=(), seen=()):
    return {"boxes": [list(box) for box in boxes], "annotated": [list(x) for x in annotated], "seen": list(seen)}


def test_regions_become_boxes_in_pixels():
    regions = looked((LAMPSHADE, 0.9, 0.5, 0.5, 1.0, 1.0), seen=[LAMPSHADE])
    made = RegionNames(NAMES, WORDINGS)(row(regions=regions), random.Random(0))
    np.testing.assert_allclose(made["boxes"], [[0, 0, 100, 50], [100, 50, 200, 100]])
    assert (made["names"], made["crowd"]) == (["cat", "lampshade"], [False, False])


def test_names_that_the_annotation_uses_or_denies_are_not_added():
    regions = looked((CUP, 0.9, 0, 0, 1, 1), (SOFA, 0.9, 0, 0, 1, 1), (NAMELESS, 0.9, 0, 0, 1, 1), seen=[CUP, SOFA])
    # A sofa is a couch, and there is none; a class without a name has none to give.
    made = RegionNames(NAMES, WORDINGS)(row(names=["cup"], regions=regions), random.Random(0))
    assert made["names"] == ["cup"]
    made = RegionNames(NAMES, WORDINGS)(row(regions=regions), random.Random(0))
    assert made["names"] == ["cat", "cup"]


def test_absent_names_are_unseen_and_share_no_word_with_what_is_there():
    regions = looked((CUP, 0.9, 0, 0, 1, 1), seen=[CUP, PILLOW])
    made = RegionNames(NAMES, WORDINGS)(row(regions=regions), random.Random(0))
    # "sports cup" has a word of "cup", a pillow may be there, "sofa" is what the absent "couch" means.
    assert sorted(made["neg_names"]) == ["couch", "lampshade", "tabby"]


def test_a_class_with_several_names_gets_one_of_them_for_all_its_boxes():
    regions = looked((0, 0.9, 0, 0, 0.5, 1), (0, 0.9, 0.5, 0, 1, 1), seen=[0])
    transform = RegionNames([("phone", "mobile phone")], WORDINGS)
    drawn = {tuple(transform(row(regions=regions), random.Random(seed))["names"]) for seed in range(20)}
    assert drawn == {("cat", "phone", "phone"), ("cat", "mobile phone", "mobile phone")}


def test_only_some_absent_names_are_added(monkeypatch):
    monkeypatch.setattr(region_names, "MOST_ABSENT", 2)
    drawn = {tuple(RegionNames(NAMES, WORDINGS)(row(), random.Random(seed))["neg_names"][1:]) for seed in range(20)}
    assert {len(names) for names in drawn} == {2}
    assert len(drawn) > 1


def test_a_single_box_may_be_asked_for_by_the_classifiers_name():
    regions = looked(annotated=[(0, TABBY, 0.8)], seen=[TABBY])
    turns = [
        RegionNames(NAMES, WORDINGS, renamed=0.5)(row(regions=regions), random.Random(n))["names"] for n in range(40)
    ]
    assert {tuple(names) for names in turns} == {("cat",), ("tabby",)}
    # The classifier saw one of two cats.
    two = row(names=["cat", "cat"], boxes=[[0, 0, 9, 9]] * 2, crowd=[False] * 2, regions=regions)
    assert RegionNames(NAMES, WORDINGS, renamed=1.0)(two, random.Random(0))["names"] == ["cat", "cat"]


def test_photographs_without_regions_and_side_by_side_ones_stay_as_they_are():
    example = row(regions=None)
    assert RegionNames(NAMES, WORDINGS)(example, random.Random(0)) is example


def test_rows_hand_on_their_regions():
    rows = RowsWithRegions([{"names": ["cat"]}], ["its regions"])
    assert len(rows) == 1
    assert rows[0] == {"names": ["cat"], "regions": "its regions"}
    with pytest.raises(ValueError, match="of 2 photographs, but there are 1"):
        RowsWithRegions([{}], [None, None])


class Detector:
    """Sees a box of class 0 at the right, one of class 1 on the left half, and a worse copy of the first."""

    def __call__(self, pixels):
        self.pixels = pixels
        return self

    feature_maps = ()

    def teach(self, maps):
        boxes = [[0.75, 0.5, 0.5, 1.0], [0.25, 0.5, 0.5, 1.0], [0.74, 0.5, 0.5, 1.0], [0.5, 0.5, 0.05, 0.05]]
        scores = [[0.6, 0.1], [0.1, 0.7], [0.3, 0.0], [0.9, 0.9]]
        return torch.tensor([scores]), torch.tensor([boxes])


def by_brightness(pixels):
    """A classifier that calls white images class 0, black ones class 1, and is not sure about others."""
    mean = pixels.mean(dim=(1, 2, 3))
    return torch.stack(((mean + 1) / 2, (1 - mean) / 2, torch.zeros(len(mean))), dim=1).clamp(min=0)


def test_regions_are_where_the_detector_sees_something_that_is_not_annotated():
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[:, 100:] = 255
    picture = {"image": Image.fromarray(pixels), "width": 200, "height": 100, "boxes": [[0, 0, 100, 100]]}
    detector = Detector()
    processor = GDinoImageProcessor(size={"height": 32, "width": 32})
    (found,) = look_at_regions([picture], detector, detector.teach, processor, by_brightness)
    # The left half is annotated, the copy overlaps the better box, and the last one is too small.
    (box,) = found["boxes"]
    assert box[0] == 0
    assert box[1] > 0.8
    assert box[2:] == [0.5, 0, 1, 1]
    ((place, label, _),) = found["annotated"]
    assert (place, label) == (0, 1)
    assert found["seen"] == [0, 1]
    empty = {**picture, "boxes": []}
    assert [
        label for label, *_ in look_at_regions([empty], detector, detector.teach, processor, by_brightness)[0]["boxes"]
    ] == [1, 0]


def test_names_come_from_the_packages_file(tmp_path):
    path = tmp_path / "imagenet_classes.js"
    lines = [f"  {index}: 'thing {index}, other'," for index in range(1000)]
    lines[2] = "  2: 'phone, cell, mobile phone, Canis lupus, car phone',"
    lines[3], lines[4], lines[5] = "  3: 'crane',", "  4: 'crane',", "  5: 'seashore, coast',"
    lines[6], lines[7] = "  6:\n      'jack-o\\'-lantern',", '  7: "potter\'s wheel",'
    path.write_text("exports.IMAGENET_CLASSES = {\n" + "\n".join(lines) + "\n};\n")
    names = imagenet_names(path)
    assert len(names) == 1000
    assert names[:3] == [("thing 0",), ("thing 1",), ("phone", "mobile phone", "car phone")]
    assert names[3:9] == [(), (), (), ("jack-o'-lantern",), ("potter's wheel",), ("thing 8",)]
    path.write_text(json.dumps({"0": "tench"}))
    with pytest.raises(ValueError, match="lists 0 classes, ImageNet has 1000"):
        imagenet_names(path)
