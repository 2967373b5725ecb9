"""Tests of the data set report: every fault is found, counted, and classified as error or warning."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.checks import check_dataset
from gdino_hf.data.faults import ERRORS, WARNINGS, sentence
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.ground_truth import coco_ground_truth


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a valid COCO file of one image with the given additions."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / name)

    def write(images=(), categories=(), annotations=()):
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}, *images],
            "categories": [{"id": 1, "name": "cat"}, *categories],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}, *annotations],
        }
        path = tmp_path / "train.json"
        path.write_text(json.dumps(content))
        return path

    return write


def box(image=1, category=1, bbox=(1, 1, 5, 5), number=2):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox)}


def image(name="b.png", number=2, width=20, height=10):
    return {"id": number, "file_name": name, "width": width, "height": height}


def found(report):
    return {finding.kind: finding.count for finding in report.findings}


def test_a_valid_file_has_no_findings(write):
    report = check_dataset(write())
    assert (report.num_images, report.num_boxes, report.boxes_per_name) == (1, 1, {"cat": 1})
    assert report.findings == []
    assert "nothing is wrong" in str(report)
    report.raise_for_errors()


@pytest.mark.parametrize(
    ("change", "kind", "is_error"),
    [
        ({"images": [image("gone.png")], "annotations": [box(2)]}, "missing files", True),
        ({"images": [image(width=21)], "annotations": [box(2)]}, "wrong sizes", True),
        ({"images": [image(number=1)]}, "repeated image ids", True),
        ({"images": [{"file_name": "b.png"}]}, "broken entries", False),
        ({"annotations": [box(category=7)]}, "unknown classes", True),
        ({"annotations": [box(image=7)]}, "unknown images", True),
        ({"annotations": [box(bbox=(1, float("nan"), 2, 2))]}, "broken boxes", False),
        ({"annotations": [box(bbox=(1, 2, 3))]}, "broken boxes", False),
        ({"annotations": [box(bbox=("one", 2, 3, 4))]}, "broken boxes", False),
        ({"categories": [{"id": 2, "name": " "}]}, "broken names", True),
        ({"annotations": [box(bbox=(15, 1, 9, 5))]}, "boxes outside", False),
        ({"annotations": [box(bbox=(30, 1, 5, 5))]}, "boxes outside", False),
        ({"annotations": [box(bbox=(1, 1, 0, 5))]}, "boxes without area", False),
        ({"annotations": [box(bbox=(9, 9, -2, 5))]}, "boxes without area", False),
        ({"categories": [{"id": 2, "name": "dog"}]}, "empty classes", False),
        (
            {"categories": [{"id": 2, "name": "Cat "}], "annotations": [box(category=2)]},
            "alike names",
            False,
        ),
        ({"categories": [{"id": 2, "name": "cat"}], "annotations": [box(category=2)]}, "repeated names", False),
        (
            {"categories": [{"id": 2, "name": "St. Bernard"}], "annotations": [box(category=2)]},
            "names with marks",
            False,
        ),
        ({"images": [image("a.png")], "annotations": [box(2)]}, "repeated files", False),
        ({"images": [image()]}, "images without boxes", False),
    ],
)
def test_one_fault_is_one_finding(write, change, kind, is_error):
    report = check_dataset(write(**change))
    assert found(report) == {kind: 1}
    assert [finding.is_error for finding in report.findings] == [is_error]
    assert kind in str(report)
    if is_error:
        with pytest.raises(ValueError, match=kind):
            report.raise_for_errors()
    else:
        report.raise_for_errors()
        assert len(open_dataset(report.path)[0]) == report.num_images - (kind == "broken entries")


def test_a_category_id_with_two_names_is_an_error(write):
    report = check_dataset(write(categories=[{"id": 1, "name": "dog"}]))
    assert found(report) == {"repeated category ids": 1}
    with pytest.raises(ValueError, match="repeated category ids"):
        report.raise_for_errors()


def test_a_box_outside_by_a_rounding_error_is_accepted(write):
    assert found(check_dataset(write(annotations=[box(bbox=(10, 5, 10.9, 5.4))]))) == {}


def test_an_image_rotated_by_exif_is_compared_upright(write, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "c.jpg", exif=exif)
    report = check_dataset(write(images=[image("c.jpg")], annotations=[box(2)]))
    assert found(report) == {"boxes turned": 1}
    assert "'c.jpg': orientation 6" in str(report)
    wrong = check_dataset(write(images=[image("c.jpg", width=20, height=11)], annotations=[box(2)]))
    assert found(wrong) == {"wrong sizes": 1}
    assert "10x20, turned by its EXIF orientation, not 20x11" in str(wrong)
    upright = check_dataset(write(images=[image("c.jpg", width=10, height=20)], annotations=[box(2)]))
    assert found(upright) == {}


def test_a_file_that_is_not_an_image_is_reported(write, tmp_path):
    (tmp_path / "images" / "c.png").write_text("no picture")
    assert found(check_dataset(write(images=[image("c.png")], annotations=[box(2)]))) == {"unreadable files": 1}


def test_a_damaged_image_is_found_by_decoding(write, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (10, 20, 3), dtype=np.uint8)
    path = tmp_path / "images" / "c.png"
    Image.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    # The first pixels, in the middle of a file whose end is in place.
    content[60:90] = bytes(30)
    path.write_bytes(content)
    file = write(images=[image("c.png")], annotations=[box(2)])
    assert found(check_dataset(file)) == {}
    assert found(check_dataset(file, decode=True)) == {"unreadable files": 1}


def test_examples_are_limited_and_all_faults_are_counted(write):
    report = check_dataset(write(annotations=[box(category=9, number=n) for n in range(10)]))
    assert found(report) == {"unknown classes": 10}
    assert len(report.findings[0].examples) == 3
    assert json.dumps(report.as_dict())
    assert len(check_dataset(report.path, max_examples=5).findings[0].examples) == 5


def test_faults_of_an_odvg_file_are_found(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    regions = [
        {"bbox": [1, 1, 5, 5], "phrase": "cat", "tokens_positive": [[2, 5]]},
        {"bbox": [1, 1, 50, 5], "phrase": "dog", "tokens_positive": [[2, 50]]},
        {"bbox": [1, 1, None, 5], "phrase": "cat"},
    ]
    grounding = {"caption": "a cat", "regions": regions}
    lines = [
        {"filename": "a.png", "width": 20, "height": 10, "grounding": grounding},
        {"filename": "b.png", "width": 20, "height": 10, "grounding": {**grounding, "regions": []}},
        {"filename": "a.png", "width": 20, "height": 10},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{")
    assert found(check_dataset(path)) == {
        "broken entries": 2,
        "missing files": 1,
        "broken phrases": 1,
        "broken boxes": 1,
        "boxes outside": 1,
        "repeated files": 1,
        "images without boxes": 1,
    }


def test_the_shared_data_sets_have_no_errors(shared):
    for name in ("bccd/train.json", "everyday/val.json"):
        assert check_dataset(shared / "data" / name).errors == []


def test_a_file_without_images_is_an_error(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert found(check_dataset(path)) == {"no usable entries": 1}


def test_a_class_of_the_train_split_may_be_without_boxes_in_the_others(write, tmp_path):
    full = write(categories=[{"id": 2, "name": "dog"}], annotations=[box(category=2)])
    full.rename(tmp_path / "other.json")
    empty = write(categories=[{"id": 2, "name": "Dog"}]).rename(tmp_path / "valid.json")
    assert "empty classes" in found(check_dataset(empty))
    train = (tmp_path / "other.json").rename(tmp_path / "train.json")
    assert "empty classes" not in found(check_dataset(empty))
    # A class that has no box to train on is a fault, whatever the other splits have.
    train.rename(tmp_path / "spare")
    empty.rename(train)
    (tmp_path / "spare").rename(empty)
    assert "empty classes" in found(check_dataset(train))


def named(*names):
    """Categories 2, 3, ... of these names, and a box of each."""
    return {
        "categories": [{"id": place, "name": name} for place, name in enumerate(names, 2)],
        "annotations": [box(category=place, number=place) for place, _ in enumerate(names, 2)],
    }


@pytest.mark.parametrize("name", ["dog, brown", "red. blue", "sign\nboard", "安全帽、黄", "a,b", "cup."])
def test_names_that_typed_label_text_would_split_are_named(write, name):
    kinds = found(check_dataset(write(**named(name))))
    assert kinds.pop("names with separators" if name != "cup." else "names with marks") == 1
    assert kinds.keys() <= {"repeated boxes", "half-known names"}


@pytest.mark.parametrize("name", ["St. Bernard", "3.5 mm jack", "U.S. flag", "left-hand glove", "Dog  Brown"])
def test_names_that_stay_whole_are_not_said_to_be_split(write, name):
    assert "names with separators" not in found(check_dataset(write(**named(name))))


@pytest.mark.parametrize(
    ("given", "is_crowd", "is_odd"),
    [
        *((value, True, False) for value in (1, 1.0, "1", " 1 ", True, "true", "True")),
        *((value, False, False) for value in (0, 0.0, "0", False, "false", "", None)),
        *((value, True, True) for value in ("yes", "YES ", "y", "t")),
        *((value, False, True) for value in ("no", "n", "crowd", 2, -1, 0.5, [1], {"a": 1}, float("nan"))),
    ],
)
def test_an_unusual_iscrowd_is_named_and_read_alike_everywhere(write, caplog, given, is_crowd, is_odd):
    path = write(annotations=[{**box(bbox=(2, 2, 6, 6)), "iscrowd": given}])
    report = check_dataset(path)
    assert found(report) == ({"odd crowd marks": 1} if is_odd else {})
    assert report.boxes_per_name == {"cat": 2 - is_crowd}
    assert open_dataset(path)[0][0]["crowd"] == [False, is_crowd]
    assert ("odd crowd marks" in caplog.text) == is_odd
    assert coco_ground_truth(path).references[1]["crowd"].tolist() == [False, is_crowd]


@pytest.mark.parametrize(
    ("bbox", "is_thin"),
    [
        ((5, 5, 1e-4, 4), True),
        ((5, 5, 4, 0.4), True),
        ((-3, 2, 3.2, 4), True),
        ((19.8, 2, 1, 4), True),
        ((5, 5, 0.5, 0.5), False),
        ((5, 5, 1, 1), False),
    ],
)
def test_boxes_in_which_nothing_can_be_seen_are_named(write, bbox, is_thin):
    assert (found(check_dataset(write(annotations=[box(bbox=bbox)]))).get("thin boxes", 0) == 1) == is_thin


def test_boxes_of_an_odvg_file_in_which_nothing_can_be_seen_are_named(write, tmp_path):
    write()
    instances = [{"bbox": [1, 1, 1.0001, 5], "category": "cat"}, {"bbox": [1, 1, 5, 5], "category": "cat, black"}]
    line = {"filename": "a.png", "width": 20, "height": 10, "detection": {"instances": instances}}
    path = tmp_path / "odvg.jsonl"
    path.write_text(json.dumps(line))
    assert found(check_dataset(path)) == {"thin boxes": 1, "names with separators": 1}


def test_thin_boxes_are_not_named_beside_their_cause(write):
    report = check_dataset(write(annotations=[box(bbox=(0.1, 0.1, 0.2, 0.2)) for _ in range(3)]))
    assert "thin boxes" in found(report)
    path = write()
    content = json.loads(path.read_text())
    content["annotations"] = [box(bbox=(0.1, 0.1, 0.2, 0.2))]
    path.write_text(json.dumps(content))
    assert found(check_dataset(path)) == {"normalized boxes": 1}


@pytest.mark.parametrize("unknown", ["zzz", "2.5", "", "0001", "b.png"])
def test_text_image_ids_that_no_image_has_are_named(write, unknown):
    path = write(images=[image(number="b")], annotations=[box("b"), box(unknown, number=3)])
    report = check_dataset(path)
    assert found(report) == {"unknown images": 1}
    assert repr(unknown) in str(report)


def test_an_annotation_without_an_image_id_does_not_belong_to_an_image_without_an_id(write):
    path = write(images=[{"file_name": "b.png"}], annotations=[{"id": 2, "category_id": 1, "bbox": [1, 1, 5, 5]}])
    assert found(check_dataset(path)) == {"broken entries": 1, "unknown images": 1}


def test_a_few_annotations_of_unknown_images_are_left_out_with_a_line(write, caplog):
    others = [box(bbox=(n % 15, n // 15 / 3, 3, 3), number=n) for n in range(2, 200)]
    path = write(annotations=[*others, box("zzz", number=999)])
    assert found(check_dataset(path)) == {"few unknown images": 1}
    open_dataset(path)
    assert "few unknown images: 1 annotation refers to an image that the file does not list, and is left out" in (
        caplog.text
    )


@pytest.mark.parametrize("kind", [*ERRORS, *WARNINGS])
def test_the_sentence_of_every_kind_agrees_with_its_count(kind):
    one, many = sentence(kind, 1), sentence(kind, 2)
    for text in (one, many):
        assert not set("#[]|") & set(text)
        assert not text.endswith(".")
    if "#" not in {**ERRORS, **WARNINGS}[kind]:
        assert one == many
        return
    assert re.search(r"\b1 (\w+ )?[a-z]+\b", one)
    words = one.split()
    noun = words[words.index("1") + 1]
    assert not noun.endswith("s") or noun.endswith("ss")
    # A plural verb beside one thing, or a singular one beside two, are what reads oddly.
    rest = " ".join(words[words.index("1") + 2 :]).split(";")[0]
    assert not re.match(r"(are|have|lead|differ|refer|extend|stand|contain|provide)\b", rest), one
    plural = many.split()
    rest = " ".join(plural[plural.index("2") + 2 :])
    assert plural[plural.index("2") + 1].rstrip(",").endswith("s"), many
    assert not re.match(r"(is|has|leads|differs|refers|extends|stands|contains|provides)\b", rest), many


def test_a_report_counts_in_words_that_agree(write):
    assert str(check_dataset(write())).splitlines()[0].endswith("train.json: 1 image, 1 box, 1 name")
    report = check_dataset(write(images=[image()], annotations=[box(2)], categories=[{"id": 2, "name": "dog"}]))
    lines = str(report).splitlines()
    assert lines[0].endswith("2 images, 2 boxes, 2 names")
    assert lines[1:] == ["  warning: empty classes: 1 class has no box ('dog')"]


def test_a_spelling_without_boxes_of_a_class_that_has_some_is_not_empty(write):
    path = write(categories=[{"id": 2, "name": " Cat"}, {"id": 3, "name": "dog"}])
    assert found(check_dataset(path)) == {"alike names": 1, "empty classes": 1}
    assert "empty classes: 1 class has no box ('dog')" in str(check_dataset(path))


@pytest.mark.parametrize("number", [True, [1], {"a": 1}, 1.5])
def test_annotations_of_an_image_whose_id_is_none_are_named(write, number):
    path = write(images=[image(number=number)], annotations=[box(number)])
    assert found(check_dataset(path)) == {"broken entries": 1, "unknown images": 1}
