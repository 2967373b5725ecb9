"""Names for regions that nobody annotated."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
from gdino_hf.recipes import region_names
from gdino_hf.recipes.imagenet_labels import KINDS, imagenet_names
from gdino_hf.recipes.region_names import (
    RegionNames,
    RowsWithRegions,
    common_labels,
    likeliest,
    look_at_regions,
    named_regions,
    seen_labels,
    with_kinds,
)
from gdino_hf.recipes.side_by_side import SideBySide
from gdino_hf.recipes.wordings import Wordings

WORDINGS = Wordings(["cat", "couch", "cup", "sofa", "dog", "cell phone"])
# The first labels are of kinds.
NAMES = [()] * 600 + [
    ("tabby",),
    (),
    ("lampshade",),
    ("cup",),
    ("pillow",),
    ("sports cup",),
    ("sofa",),
    ("Persian cat",),
]
TABBY, NAMELESS, LAMPSHADE, CUP, PILLOW, SPORTS_CUP, SOFA, PERSIAN_CAT = range(600, 608)
# ImageNet's class 200 is a dog, whatever its name.
BREED = 200
# Classes of no kind.
WHITE, BLACK = 600, 601


def row(**more):
    return {
        "width": 200,
        "height": 100,
        "boxes": [[0, 0, 100, 50]],
        "names": ["dog"],
        "crowd": [False],
        "neg_names": ["couch"],
        "regions": {"boxes": [], "seen": []},
        **more,
    }


def looked(*boxes, seen=()):
    return {"boxes": [list(box) for box in boxes], "seen": list(seen)}


def made(example, names=NAMES, seed=0, decided=(), common=()):
    return RegionNames(names, WORDINGS, decided, common)(example, random.Random(seed))


def test_regions_become_boxes_in_pixels():
    result = made(row(regions=looked((LAMPSHADE, 0.5, 0.5, 1.0, 1.0), seen=[LAMPSHADE])))
    np.testing.assert_allclose(result["boxes"], [[0, 0, 100, 50], [100, 50, 200, 100]])
    assert (result["names"], result["crowd"]) == (["dog", "lampshade"], [False, False])


def test_names_that_the_annotation_uses_or_denies_are_not_added():
    regions = looked((CUP, 0, 0, 1, 1), (SOFA, 0, 0, 1, 1), (NAMELESS, 0, 0, 1, 1), seen=[CUP, SOFA])
    # A sofa is a couch, and there is none; a class without a name has none to give.
    assert made(row(names=["cup"], regions=regions))["names"] == ["cup"]
    assert made(row(regions=regions))["names"] == ["dog", "cup"]
    # A Persian cat is a cat, by its last word.
    persian = looked((PERSIAN_CAT, 0, 0, 1, 1), seen=[PERSIAN_CAT])
    assert made(row(regions=persian))["names"] == ["dog", "Persian cat"]
    assert made(row(regions=persian, neg_names=["cat"]))["names"] == ["dog"]
    # A beagle is a dog, by its class.
    breeds = [("beagle",)] * (BREED + 1)
    beagle = looked((BREED, 0, 0, 1, 1), seen=range(BREED + 1))
    assert made(row(names=["cat"], regions=beagle), breeds)["names"] == ["cat", "beagle"]
    assert made(row(names=["cat"], neg_names=["dog"], regions=beagle), breeds)["names"] == ["cat"]


def test_absent_names_are_unseen_and_mean_nothing_that_is_there():
    regions = looked((CUP, 0, 0, 1, 1), seen=[CUP, PILLOW])
    # "sports cup" has a word of "cup", a pillow may be there, "sofa" is what the absent "couch" means.
    assert sorted(made(row(regions=regions))["neg_names"]) == ["Persian cat", "couch", "lampshade", "tabby"]
    # What a couch is called elsewhere is not absent where there is a couch, and neither is a kind of cat beside a cat.
    result = made(row(names=["couch", "cat"], boxes=[[0, 0, 9, 9]] * 2, crowd=[False] * 2, neg_names=[]))
    assert sorted(result["neg_names"]) == ["cup", "lampshade", "pillow", "sports cup", "tabby"]
    result = made(row(names=["cell phone"], neg_names=[]), [()] * 600 + [("mobile phone",), ("pillow",)])
    assert result["neg_names"] == ["pillow"]


def test_a_name_of_several_labels_is_absent_only_if_none_of_them_is_seen():
    names = [()] * 600 + [("hound",), ("hound",), ("pillow",), ("hound",)]
    # Three labels have one name; it is one name to choose, not three.
    assert made(row(names=["cup"], neg_names=[]), names)["neg_names"] in (["hound", "pillow"], ["pillow", "hound"])
    for seen in (600, 603):
        assert made(row(names=["cup"], neg_names=[], regions=looked(seen=[seen])), names)["neg_names"] == ["pillow"]


# As in the package's file: a class has a name of its own and that of its kind.
WITH_KINDS = [(f"thing {label}",) for label in range(1000)] + [(kind,) for kind in KINDS]
for _label in KINDS["dog"]:
    WITH_KINDS[_label] = (f"breed {_label}", "dog")
DOG, CAR = (1000 + list(KINDS).index(kind) for kind in ("dog", "car"))


def absent_names(seeds=40, **more):
    """All names that are absent in one of many draws."""
    example = row(**{"names": ["cup"], "neg_names": [], **more})
    return {name for seed in range(seeds) for name in made(example, WITH_KINDS, seed)["neg_names"]}


@pytest.mark.parametrize("drawn", [BREED, BREED + 1])
def test_whether_a_kind_is_absent_depends_on_the_kind_and_not_on_who_drew_its_name(drawn):
    # The kind is likely enough, whatever its breeds are: then nothing called "dog" is absent.
    assert "dog" not in absent_names(regions=looked(seen=[DOG]))
    # A breed may be there, but the kind is too unlikely: the breed is not absent, and the kind is.
    names = absent_names(regions=looked(seen=[drawn]))
    assert "dog" in names
    assert f"breed {drawn}" not in names


def test_kinds_of_annotated_things_and_of_named_regions_are_not_absent():
    assert "bag" not in absent_names(names=["handbag"])
    assert "telephone" not in absent_names(names=["mobile phone"])
    assert {"bag", "telephone"} <= absent_names()
    region = looked((BREED, 0, 0, 1, 1), seen=[BREED])
    assert "dog" not in absent_names(regions=region)


def test_names_that_the_annotation_decides_about_are_never_added_as_absent():
    example = row(names=["cup"], neg_names=[])
    decided = [{*made(example, WITH_KINDS, seed, decided=["puppy", "car"])["neg_names"]} for seed in range(40)]
    assert not {"car"} & set.union(*decided)
    assert "car" in absent_names()


def test_a_class_with_several_names_gets_one_of_them_for_all_its_boxes():
    regions = looked((0, 0, 0, 0.5, 1), (0, 0.5, 0, 1, 1), seen=[0])
    drawn = {tuple(made(row(regions=regions), [("radio", "wireless set")], seed)["names"]) for seed in range(20)}
    assert drawn == {("dog", "radio", "radio"), ("dog", "wireless set", "wireless set")}


def test_only_some_absent_names_are_added(monkeypatch):
    monkeypatch.setattr(region_names, "MOST_ABSENT", 4)
    drawn = {tuple(made(row(), seed=seed)["neg_names"][1:]) for seed in range(20)}
    assert {len(names) for names in drawn} == {2}
    assert len(drawn) > 1


def test_photographs_without_regions_and_side_by_side_ones_stay_as_they_are():
    example = row(regions=None)
    assert made(example) is example
    pictures = [{**row(regions=looked((CUP, 0, 0, 1, 1))), "image": Image.new("RGB", (200, 100))} for _ in range(3)]
    together = SideBySide(pictures, [1, 2], ["dog", "couch"], 1.0)(pictures[0], random.Random(0))
    assert together["image"] is not pictures[0]["image"]
    assert made(together) is together


def test_rows_hand_on_their_regions():
    rows = RowsWithRegions([{"names": ["cat"]}], ["its regions"])
    assert len(rows) == 1
    assert rows[0] == {"names": ["cat"], "regions": "its regions"}


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
    """A classifier that calls white images class 600 and black ones class 601, and is not sure about others."""
    mean = pixels.mean(dim=(1, 2, 3))
    likely = torch.zeros(len(mean), 1000)
    likely[:, WHITE], likely[:, BLACK] = ((mean + 1) / 2).clamp(min=0), ((1 - mean) / 2).clamp(min=0)
    return likely


def test_regions_are_where_the_detector_sees_something_that_is_not_annotated():
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[:, 100:] = 255
    picture = {"image": Image.fromarray(pixels), "width": 200, "height": 100, "boxes": [[0, 0, 100, 100]], "crowd": [0]}
    detector = Detector()
    processor = GDinoImageProcessor(size={"height": 32, "width": 32})

    def found(**more):
        (entry,) = look_at_regions(
            [{**picture, **more}], detector, detector.teach, processor, by_brightness, WITH_KINDS
        )
        return entry

    # The left half is annotated, the copy overlaps the better box, and the last one is too small.
    assert found() == {"boxes": [[WHITE, 0.5, 0.0, 1.0, 1.0]], "seen": [WHITE, BLACK]}
    # Without the annotation, the left half is a region, too; the likelier comes first.
    assert found(boxes=[], crowd=[])["boxes"] == [[BLACK, 0.0, 0.0, 0.5, 1.0], [WHITE, 0.5, 0.0, 1.0, 1.0]]
    # The annotated box at the top right got the class of the right half: there, others of its kind may have no box.
    assert found(boxes=[[130, 0, 190, 50]])["boxes"] == [[BLACK, 0.0, 0.0, 0.5, 1.0]]


def test_a_region_in_the_place_of_an_annotated_box_or_in_a_crowd_is_no_new_one():
    regions = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]])
    # The first one covers 0.6 of the first box and lies by half outside of it; the crowd is 16 times as large.
    in_place, crowd = [0.05, 0.0, 0.25, 0.2], [0.0, 0.0, 0.8, 0.8]
    free = region_names._elsewhere(regions, torch.tensor([in_place, crowd]), [False, True])
    assert free.tolist() == [False, True]
    assert region_names._elsewhere(regions, torch.tensor([in_place]), [False]).tolist() == [False, True]
    assert region_names._elsewhere(regions, torch.tensor([crowd]), [True]).tolist() == [False, True]
    assert region_names._elsewhere(regions, torch.tensor([crowd]), [False]).tolist() == [True, True]


def test_looking_can_begin_at_a_later_photograph():
    detector, processor = Detector(), GDinoImageProcessor(size={"height": 32, "width": 32})
    rows = [
        {"image": Image.new("RGB", (64, 32), (shade,) * 3), "width": 64, "height": 32, "boxes": [], "crowd": []}
        for shade in (255, 128, 0)
    ]

    def look(first):
        return list(look_at_regions(rows, detector, detector.teach, processor, by_brightness, WITH_KINDS, first))

    everything = look(0)
    assert [entry["seen"] for entry in everything] == [[WHITE], [WHITE, BLACK], [BLACK]]
    assert look(1) == everything[1:]


def test_a_kind_names_what_no_class_is_sure_of():
    likely = torch.zeros(4, 1000)
    # Five breeds at 0.16 each; one sure breed among them; a class of no kind; a breed that is sure by itself.
    likely[0, [151, 160, 200, 230, 268]] = 0.16
    likely[1, 200], likely[1, 160], likely[1, 281] = 0.5, 0.3, 0.15
    likely[2, WHITE], likely[2, 282] = 0.29, 0.25
    likely[3, 200], likely[3, BLACK] = 0.4, 0.1
    probability, labels = likeliest(with_kinds(likely))
    assert labels == [DOG, 200, WHITE, 200]
    # 117 breeds, each less 0.004, or the likeliest one.
    torch.testing.assert_close(probability, torch.tensor([0.8 - 0.468, 0.5, 0.29, 0.4]))


def test_what_is_below_chance_does_not_count_for_a_kind():
    likely = torch.zeros(1, 1000)
    likely[0, list(KINDS["dog"])] = 0.0039
    assert with_kinds(likely)[0, DOG].item() == pytest.approx(0.0039)
    likely[0, list(KINDS["dog"])] = 0.008
    assert with_kinds(likely)[0, DOG].item() == pytest.approx(118 * 0.008 - 117 * 0.004)


def test_a_kind_may_be_there_only_if_it_is_likelier_than_chance():
    likely = torch.zeros(2, 1000)
    likely[0, WHITE], likely[1, BLACK] = 0.004, 0.006
    # Breeds at 0.488 together are chance, one taxicab (of the kind "car") at 0.08 is not.
    likely[0, list(KINDS["dog"])[:61]], likely[1, 468] = 0.008, 0.08
    seen = seen_labels(with_kinds(likely))
    assert {BLACK, 468, CAR, DOG, *list(KINDS["dog"])[:61]} == set(seen)
    likely[0, list(KINDS["dog"])[:61]] = 0.007
    assert DOG not in seen_labels(with_kinds(likely))


NO_THING = 970
WITH_KINDS_BUT_ONE = [() if label == NO_THING else own for label, own in enumerate(WITH_KINDS)]


def named(boxes, scores, labels, probabilities, annotated=(), taken=()):
    likely = torch.zeros(len(boxes), 1000)
    likely[range(len(boxes)), labels] = torch.tensor(probabilities)
    annotated = torch.tensor(annotated, dtype=torch.float32).reshape(-1, 4)
    return [
        box[0]
        for box in named_regions(
            torch.tensor(boxes), torch.tensor(scores), with_kinds(likely), annotated, WITH_KINDS_BUT_ONE, taken
        )
    ]


LEFT, RIGHT, TOP_LEFT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]


def test_detector_and_classifier_must_both_be_sure():
    assert named([LEFT, RIGHT], [0.2, 0.9], [WHITE, BLACK], [0.6, 0.4]) == [BLACK, WHITE]
    assert named([LEFT, RIGHT], [0.2, 0.9], [WHITE, BLACK], [0.49, 0.29]) == []


def test_the_best_of_overlapping_regions_stays():
    # Half of a bus is called a bus, too, or a minivan.
    bus, school_bus, minivan = 654, 779, 656
    assert named([LEFT, TOP_LEFT], [0.9, 0.8], [bus, bus], [0.9, 0.9]) == [bus]
    assert named([LEFT, TOP_LEFT], [0.8, 0.9], [bus, school_bus], [0.9, 0.9]) == [school_bus]
    assert named([LEFT, TOP_LEFT], [0.9, 0.8], [bus, minivan], [0.9, 0.9]) == [bus]
    mostly_left = [0.15, 0.0, 0.65, 1.0]
    assert named([LEFT, mostly_left], [0.9, 0.8], [bus, bus], [0.9, 0.9]) == [bus]
    assert named([LEFT, mostly_left], [0.9, 0.8], [bus, WHITE], [0.9, 0.9]) == [bus, WHITE]
    # Something small may stand before it, and a place is no thing that hides what is in it.
    lamp = [0.1, 0.2, 0.3, 0.5]
    assert named([LEFT, lamp], [0.9, 0.8], [bus, WHITE], [0.9, 0.9]) == [bus, WHITE]
    assert named([LEFT, lamp], [0.9, 0.8], [bus, bus], [0.9, 0.9]) == [bus]
    assert named([LEFT, TOP_LEFT], [0.9, 0.8], [NO_THING, WHITE], [0.9, 0.9]) == [WHITE]


def test_parts_of_annotated_boxes_and_taken_kinds_get_no_name():
    person = [0.0, 0.0, 0.5, 1.0]
    hat, torso = [0.1, 0.0, 0.3, 0.2], [0.0, 0.3, 0.5, 0.9]
    # What is less than a fifth of a box may be a thing of its own.
    assert named([hat, torso], [0.9, 0.9], [WHITE, BLACK], [0.9, 0.9], annotated=[person]) == [WHITE]
    assert named([hat, torso], [0.9, 0.9], [654, BLACK], [0.9, 0.9], taken=[779]) == [BLACK]


def test_labels_of_many_photographs_are_common(monkeypatch):
    monkeypatch.setattr(region_names, "COMMON", 2)
    dogs = looked((DOG, 0, 0, 1, 1), (DOG, 0, 0, 1, 1), (NAMELESS, 0, 0, 1, 1))
    rows = [looked((200, 0, 0, 1, 1), (CUP, 0, 0, 1, 1)), dogs, looked((CUP, 0, 0, 1, 1), (NAMELESS, 0, 0, 1, 1))]
    names = [("hound",) if label == 200 else own for label, own in enumerate(NAMES)]
    names += [()] * (1000 - len(names)) + [(kind,) for kind in KINDS]
    # A breed is a dog; two dogs in one photograph are one photograph.
    assert common_labels([*rows, looked()], names) == [[CUP, DOG], [DOG], [CUP], []]


def test_half_of_the_absent_names_are_kinds_or_common_classes(monkeypatch):
    monkeypatch.setattr(region_names, "MOST_ABSENT", 200)
    example = row(names=["cup"], neg_names=[], regions=looked(seen=[DOG, CUP]))
    drawn = made(example, WITH_KINDS, common=range(600, 700))["neg_names"]
    common = {*KINDS, *(f"thing {label}" for label in range(600, 700))} - {"dog", f"thing {CUP}"}
    assert len(drawn) == len(set(drawn)) == 200
    assert len(common & set(drawn)) == 100
    assert not {"dog", f"thing {CUP}"} & set(drawn)


def test_names_come_from_the_packages_file(tmp_path):
    path = tmp_path / "imagenet_classes.js"
    lines = [f"  {index}: 'thing {index}, other'," for index in range(1000)]
    lines[701] = "  701: 'phone, cell, mobile phone, Canis lupus, car phone',"
    lines[702], lines[703], lines[704] = "  702: 'crane',", "  703: 'crane',", "  704: 'seashore, coast',"
    lines[8] = "  8: 'kite, toy kite, pinwheel kite',"
    lines[6], lines[7] = "  6:\n      'jack-o\\'-lantern',", '  7: "potter\'s wheel",'
    path.write_text("exports.IMAGENET_CLASSES = {\n" + "\n".join(lines) + "\n};\n")
    names = imagenet_names(path)
    assert names[6:9] == [
        ("jack-o'-lantern",),
        ("potter's wheel", "bird"),
        ("toy kite", "pinwheel kite", "bird", "bird"),
    ]
    assert names[700:703] == [("thing 700",), ("phone", "mobile phone", "car phone"), ()]
    assert names[703:705] == [(), ()]
    assert names[1000:] == [(kind,) for kind in KINDS]
    path.write_text(json.dumps({"0": "tench"}))
    with pytest.raises(ValueError, match="lists 0 classes, ImageNet has 1000"):
        imagenet_names(path)
