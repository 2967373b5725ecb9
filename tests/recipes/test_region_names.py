"""Names for regions that nobody annotated."""

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import NANO
from gdino_hf.model.box_ops import cxcywh_to_xyxy
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
from gdino_hf.model.processing_gdino import GDinoProcessor
from gdino_hf.recipes import region_names
from gdino_hf.recipes.imagenet_labels import KINDS, NUM_CLASSES, classes_of, imagenet_names
from gdino_hf.recipes.region_names import (
    RegionNames,
    RowsWithRegions,
    asker,
    implied_names,
    look_at_regions,
    names_to_find,
    probability,
    probable_regions,
)
from gdino_hf.recipes.side_by_side import SideBySide
from gdino_hf.recipes.wordings import Wordings

ANNOTATED = ["cat", "couch", "cup", "sofa", "dog", "cell phone", "toy dog", "laptop", "handbag", "backpack"]
WORDINGS = Wordings(ANNOTATED)
# The classifier's class 414 is a backpack, which is a bag.
CLASS_NAMES = [("backpack", "back pack") if label == 414 else (f"thing {label}",) for label in range(1000)]
FULL, LEFT, TOP_LEFT, RIGHT = [0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 0.5, 0.5], [0.5, 0, 1, 1]


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


def regions(*boxes, seen=()):
    return {"boxes": [[name, chance, *box] for name, chance, box in boxes], "seen": list(seen)}


def made(example, names=("lamp", "bus"), seed=0):
    classes = {name: classes_of(name, CLASS_NAMES) for name in names}
    implied = implied_names([*ANNOTATED, *names], classes, CLASS_NAMES, WORDINGS)
    return RegionNames(names, implied, WORDINGS)(example, random.Random(seed))


def test_a_certain_region_is_always_a_box_in_pixels():
    result = made(row(regions=regions(("lamp", 1.0, RIGHT), seen=["lamp"])))
    np.testing.assert_allclose(result["boxes"], [[0, 0, 100, 50], [100, 0, 200, 100]])
    assert (result["names"], result["crowd"]) == (["dog", "lamp"], [False, False])
    assert result["neg_names"] == ["couch", "bus"]


def test_a_doubtful_region_is_a_box_as_often_as_it_is_probable_and_absent_otherwise():
    example = row(regions=regions(("lamp", 0.3, RIGHT), seen=["lamp", "bus"]))
    results = [made(example, seed=seed) for seed in range(1000)]
    boxed = [result for result in results if "lamp" in result["names"]]
    # Five standard deviations around 300.
    assert 228 <= len(boxed) <= 372
    for result in results:
        assert ("lamp" in result["names"]) != ("lamp" in result["neg_names"])
        # A bus may be there, and nobody knows where: then it is not asked.
        assert "bus" not in (*result["names"], *result["neg_names"])


def test_one_box_of_several_is_enough_to_be_there():
    example = row(regions=regions(("lamp", 1.0, RIGHT), ("lamp", 0.0, TOP_LEFT), seen=["lamp"]))
    result = made(example)
    assert result["names"] == ["dog", "lamp"]
    assert "lamp" not in result["neg_names"]


def test_the_annotation_wins():
    looked = regions(("sofa", 1.0, RIGHT), ("puppy", 1.0, LEFT), ("lamp", 1.0, RIGHT), seen=["sofa", "puppy", "lamp"])
    names = ["sofa", "puppy", "lamp", "toy lamp", "toy car"]
    # There is a dog, which a puppy is, and no couch, which a sofa is. What shares a word with a dog is not absent.
    result = made(row(names=["toy dog", "dog"], boxes=[[0, 0, 9, 9]] * 2, crowd=[False] * 2, regions=looked), names)
    assert result["names"] == ["toy dog", "dog", "lamp"]
    assert result["neg_names"] == ["couch"]
    result = made(row(names=["cup"], neg_names=[], regions=looked), names)
    assert result["names"] == ["cup", "sofa", "puppy", "lamp"]
    # Now there is a lamp, which a toy lamp may be.
    assert result["neg_names"] == ["toy car"]


def test_broader_and_narrower_names_of_what_is_there_are_not_absent():
    names = ["bag", "computer", "telephone", "shark", "fish", "lamp"]

    def absent(annotated, *boxes):
        result = made(row(names=annotated, boxes=[[0, 0, 9, 9]] * len(annotated), regions=regions(*boxes)), names)
        return {*result["neg_names"]} - {"couch"}

    everything = {*names}
    assert absent(["dog"]) == everything
    # By class, and where there is none by name.
    assert absent(["backpack"]) == absent(["handbag"]) == everything - {"bag"}
    assert absent(["laptop"]) == everything - {"computer"}
    assert absent(["mobile phone"]) == everything - {"telephone"}
    # So it is for names that regions got, and the other way round.
    assert absent(["dog"], ("shark", 1.0, RIGHT)) == everything - {"shark", "fish"}
    assert absent(["dog"], ("fish", 1.0, RIGHT), ("shark", 0.0, RIGHT)) == everything - {"shark", "fish"}


def test_what_shares_a_word_with_the_meaning_of_a_name_is_not_absent():
    # A puppy is a dog here, and a sofa a couch, whether couches are annotated or not.
    result = made(row(names=["puppy"], neg_names=[]), ["hot dog", "lamp"])
    assert result["neg_names"] == ["lamp"]
    sofa = Wordings(["sofa"])
    assert implied_names(["sofa"], {"couch cover": (), "lamp": ()}, CLASS_NAMES, sofa) == {"couch": {"couch cover"}}


def test_photographs_without_regions_and_side_by_side_ones_stay_as_they_are():
    example = row(regions=None)
    assert made(example) is example
    pictures = [{**row(regions=regions(("lamp", 1.0, FULL))), "image": Image.new("RGB", (200, 100))} for _ in range(3)]
    together = SideBySide(pictures, [1, 2], ["dog", "couch"], 1.0)(pictures[0], random.Random(0))
    assert together["image"] is not pictures[0]["image"]
    assert made(together) is together


def test_rows_hand_on_their_regions():
    rows = RowsWithRegions([{"names": ["cat"]}], [regions()])
    assert len(rows) == 1
    assert rows[0] == {"names": ["cat"], "regions": {"boxes": [], "seen": []}}


def looked(*entries):
    return {"regions": [[name, likely, score, *box] for name, likely, score, box in entries], "seen": ["lamp"]}


def chances(*rows):
    return [[(name, chance, box) for name, chance, *box in row["boxes"]] for row in probable_regions(rows)]


def at(certainty):
    return pytest.approx(1 / (1 + math.exp(9 * (0.45 - certainty))), abs=1e-4)


def test_certainty_is_the_likelihood_times_the_score_beside_the_usual_highest_one(monkeypatch):
    monkeypatch.setattr(region_names, "TOP_PHOTOGRAPHS", 2)
    rows = [
        looked(("lamp", 0.9, 0.30, FULL), ("bus", 0.9, 0.05, FULL)),
        # The best of each photograph counts once, for its own name.
        looked(("lamp", 0.8, 0.10, LEFT), ("lamp", 0.9, 0.05, RIGHT)),
        looked(("lamp", 1.0, 0.02, FULL)),
    ]
    found = chances(*rows)
    # The mean of 0.3 and 0.1 is the usual highest score of lamps; above it, the score does not count.
    assert found[0] == [("lamp", at(0.9), FULL), ("bus", at(0.9), FULL)]
    assert found[1] == [("lamp", at(0.8 * 0.5), LEFT), ("lamp", at(0.9 * 0.25), RIGHT)]
    assert found[2] == [("lamp", at(0.1), FULL)]


def test_the_more_certain_of_two_regions_on_one_thing_stays():
    overlapping = [0.1, 0, 0.6, 1]
    apart = [0.25, 0, 0.75, 1]
    entries = [("lamp", 0.8, 0.5, LEFT), ("lamp", 0.9, 0.5, TOP_LEFT), ("bus", 0.7, 0.5, LEFT)]
    (found,) = chances(looked(*entries))
    # A part and the whole are one thing; another name may stand at the same place.
    assert [(name, box) for name, _, box in found] == [("lamp", TOP_LEFT), ("bus", LEFT)]
    (found,) = chances(looked(entries[0], ("lamp", 0.7, 0.5, overlapping), ("lamp", 0.6, 0.5, apart)))
    assert [box for _, _, box in found] == [LEFT, apart]


def test_a_region_of_little_certainty_is_none_and_leaves_its_name_undecided():
    (found,) = probable_regions([looked(("lamp", 0.9, 0.5, LEFT), ("lamp", 0.9, 0.02, RIGHT))])
    assert [box[2:] for box in found["boxes"]] == [LEFT]
    rows = [looked(("lamp", 0.9, 0.5, LEFT)), looked(("lamp", 0.06, 0.1, RIGHT))]
    assert probable_regions(rows)[1] == {"boxes": [], "seen": ["lamp"]}


# Classes that the classifier below knows.
WHITE, BLACK = 600, 601


def by_brightness(pixels):
    """A classifier that calls white images class 600 and black ones class 601, and is not sure about others."""
    mean = pixels.mean(dim=(1, 2, 3))
    likely = torch.zeros(len(mean), NUM_CLASSES)
    likely[:, WHITE], likely[:, BLACK] = ((mean + 1) / 2).clamp(min=0), ((1 - mean) / 2).clamp(min=0)
    return likely


def find(images):
    """Finds boxes for two names in each image: right, left, a worse copy of the first, a small and a faint one."""
    boxes = [
        *([0.75, 0.5, 0.5, 1.2], [0.25, 0.5, 0.5, 1.0], [0.74, 0.5, 0.5, 1.0], [0.5, 0.5, 0.05, 0.05]),
        [0.5, 0.75, 1.0, 0.5],
    ]
    scores = [[0.6, 0.1], [0.1, 0.7], [0.3, 0.0], [0.9, 0.9], [0.009, 0.0]]
    return torch.tensor([scores] * len(images)), torch.tensor([boxes] * len(images))


CLASSES = {"snow": (WHITE,), "soot": (BLACK,), "sand": (500,)}


def half_white(**more):
    """A photograph whose right half is white."""
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[:, 100:] = 255
    return {"image": Image.fromarray(pixels), "width": 200, "height": 100, "boxes": [], "crowd": [], **more}


def seen_in(picture, finder=find):
    (entry,) = look_at_regions([picture], finder, by_brightness, CLASSES)
    return entry


# A crop has a margin of 15 of 100 pixels to the side where the photograph goes on.
MOSTLY = pytest.approx(100 / 115, abs=0.01)
HARDLY = pytest.approx(15 / 115, abs=0.01)


def test_regions_are_where_the_model_sees_something_that_is_not_annotated():
    # The left half is annotated, the copy overlaps the better box, one box is too small and the last one too faint. The
    # right box reaches beyond the photograph.
    assert seen_in(half_white(boxes=[[0, 0, 100, 100]], crowd=[0])) == {
        "regions": [["snow", MOSTLY, 0.6, *RIGHT], ["soot", HARDLY, 0.1, *RIGHT]],
        "seen": ["snow", "soot"],
    }
    # Without the annotation, the left half is a region, too; the best score of any name decides which comes first.
    assert seen_in(half_white())["regions"] == [
        ["snow", HARDLY, 0.1, *LEFT],
        ["snow", MOSTLY, 0.6, *RIGHT],
        ["soot", MOSTLY, 0.7, *LEFT],
        ["soot", HARDLY, 0.1, *RIGHT],
    ]


def test_only_the_best_regions_are_looked_at(monkeypatch):
    monkeypatch.setattr(region_names, "MOST_REGIONS", 1)
    assert [entry[3:] for entry in seen_in(half_white())["regions"]] == [LEFT, LEFT]


def test_the_whole_photograph_is_looked_at_too_and_low_scores_keep_their_digits():
    def faint(images):
        scores, boxes = find(images)
        return scores / 1000, boxes

    assert seen_in(half_white(), faint) == {"regions": [], "seen": ["snow", "soot"]}

    def one_name_faint(images):
        scores, boxes = find(images)
        return torch.stack((scores[..., 0], scores[..., 1] * 1e-5), dim=-1), boxes

    assert ["soot", HARDLY, 1e-6, *RIGHT] in seen_in(half_white(), one_name_faint)["regions"]


def test_gradients_stay_as_they_were_while_photographs_are_looked_at():
    enabled = []

    def watched(images):
        enabled.append(torch.is_grad_enabled())
        return find(images)

    looking = look_at_regions([half_white()] * 2, watched, by_brightness, CLASSES)
    next(looking)
    assert torch.is_grad_enabled()
    assert enabled == [False]


def test_a_region_in_the_place_of_an_annotated_box_or_in_a_crowd_is_no_new_one():
    found = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]])
    # The first one covers 0.6 of the first box and lies by half outside of it; the crowd is 16 times as large.
    in_place, crowd = [0.05, 0.0, 0.25, 0.2], [0.0, 0.0, 0.8, 0.8]
    free = region_names._elsewhere(found, torch.tensor([in_place, crowd]), [False, True])
    assert free.tolist() == [False, True]
    assert region_names._elsewhere(found, torch.tensor([in_place]), [False]).tolist() == [False, True]
    assert region_names._elsewhere(found, torch.tensor([crowd]), [True]).tolist() == [False, True]
    assert region_names._elsewhere(found, torch.tensor([crowd]), [False]).tolist() == [True, True]


def test_looking_can_begin_at_a_later_photograph(monkeypatch):
    monkeypatch.setattr(region_names, "BATCH_SIZE", 2)
    rows = [
        {"image": Image.new("RGB", (64, 32), (shade,) * 3), "width": 64, "height": 32, "boxes": [], "crowd": []}
        for shade in (255, 128, 0)
    ]

    def look(first):
        return list(look_at_regions(rows, find, by_brightness, CLASSES, first))

    everything = look(0)
    assert [entry["seen"] for entry in everything] == [["snow"], ["snow", "soot"], ["soot"]]
    assert look(1) == everything[1:]


def test_a_model_is_asked_for_all_names_at_once():
    model, processor = GDinoForObjectDetection.from_pretrained(NANO).eval(), GDinoProcessor.from_pretrained(NANO)
    names = ["traffic light", "cat", "hot air balloon"]
    images = [Image.new("RGB", (80, 60), colour) for colour in ("red", "white")]
    with torch.no_grad():
        scores, boxes = asker(model, processor, names)(images)
    assert scores.shape == (2, model.config.num_queries, 3)
    assert boxes.shape == (2, model.config.num_queries, 4)
    inputs = processor(images=images, text=[names] * 2)
    with torch.no_grad():
        outputs = model(**inputs)
    found = processor.post_process_grounded_object_detection(
        outputs, inputs, threshold=0.0, text_threshold=0.0, nms_threshold=1.0, score="mean", multi_label=True
    )
    for own, places, result in zip(scores, boxes, found, strict=True):
        for label in range(3):
            mine = result["labels"] == label
            torch.testing.assert_close(own[:, label].sort(descending=True).values, result["scores"][mine])
            best = places[own[:, label].argmax()]
            torch.testing.assert_close(cxcywh_to_xyxy(best), result["boxes"][mine][0])
    with pytest.raises(ValueError, match="400 names do not fit in one prompt; look for fewer"):
        asker(model, processor, [f"name {index}" for index in range(400)])(images)


def test_a_name_of_several_classes_is_as_likely_as_its_best_one_or_all_beyond_chance():
    likely = torch.zeros(3, NUM_CLASSES)
    # Five breeds at 0.16 each; one sure breed; breeds that are below chance.
    likely[0, [151, 160, 200, 230, 268]] = 0.16
    likely[1, 200], likely[1, 160] = 0.7, 0.1
    likely[2, list(KINDS["dog"])] = 0.0039
    # 117 breeds, each less 0.004, or the likeliest one.
    expected = torch.tensor([0.8 - 0.468, 0.7, 0.0039])
    torch.testing.assert_close(probability(likely, KINDS["dog"]), expected)
    likely[2, list(KINDS["dog"])] = 0.008
    assert probability(likely, KINDS["dog"])[2].item() == pytest.approx(118 * 0.008 - 117 * 0.004)
    torch.testing.assert_close(probability(likely, (200,)), likely[:, 200])


def test_names_to_find_are_those_left_out_or_kinds_that_nobody_annotated():
    annotated = ["dog", "couch", "cup"]
    # Names are left out with everything that means the same.
    assert names_to_find(["puppy", "cup", "Dog"], annotated, Wordings(annotated)) == ["dog", "cup"]
    kinds = names_to_find([], annotated, Wordings(annotated))
    assert set(KINDS) - set(kinds) == {"dog", "couch"}


def test_a_name_stands_for_the_classes_of_its_kind_or_those_called_so():
    names = [()] * 600 + [("studio couch", "day bed"), ("pizza", "pizza pie"), ("pizza pie",)]
    assert classes_of("couch", names) == KINDS["couch"]
    assert classes_of("sports ball", names) == KINDS["ball"]
    assert classes_of("pizza pie", names) == (601, 602)
    assert classes_of("fork", names) == ()
    # A tv is called a television there.
    assert classes_of("tv", [("television", "television system")]) == (0,)


def test_names_come_from_the_packages_file(tmp_path):
    path = tmp_path / "imagenet_classes.js"
    lines = [f"  {index}: 'thing {index}, other'," for index in range(1000)]
    lines[701] = "  701: 'phone, cell, mobile phone, Canis lupus, car phone, phone',"
    lines[702], lines[703], lines[704] = "  702: 'crane',", "  703: 'crane',", "  704: 'seashore, coast',"
    lines[8] = "  8: 'kite, toy kite, pinwheel kite',"
    lines[6], lines[7] = "  6:\n      'jack-o\\'-lantern',", '  7: "potter\'s wheel",'
    path.write_text("exports.IMAGENET_CLASSES = {\n" + "\n".join(lines) + "\n};\n")
    names = imagenet_names(path)
    assert len(names) == NUM_CLASSES
    assert names[6:9] == [("jack-o'-lantern",), ("potter's wheel",), ("toy kite", "pinwheel kite")]
    assert names[700:705] == [("thing 700",), ("phone", "mobile phone", "car phone"), (), (), ()]
    path.write_text(json.dumps({"0": "tench"}))
    with pytest.raises(ValueError, match="lists 0 classes, ImageNet has 1000"):
        imagenet_names(path)
