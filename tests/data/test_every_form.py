"""Tests of the forms of data sets: equal rows from equal content in every form, whole and as a stream."""

import pytest

from form_cases import FORMS, NAMES, ROWS, SIZES
from gdino_hf.data.annotation_files import annotation_file, annotation_format
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.dataset_pictures import dataset_pictures
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.open_ground_truth import open_ground_truth


@pytest.fixture(params=FORMS)
def place(request, tmp_path):
    return FORMS[request.param](tmp_path)


def columns(rows):
    """Return the columns that every form has, as plain values."""
    return [{name: row[name] for name in ROWS[0]} for row in rows]


def test_equal_rows_from_equal_content_in_every_form(place):
    rows, labels = open_dataset(place)
    assert labels == NAMES
    assert columns(rows) == ROWS
    assert [row["image_id"] for row in rows] == [0, 1, 2]
    assert [row["image"].size for row in rows] == list(SIZES.values())
    assert [row["image"].convert("RGB").getpixel((0, 0))[0] for row in rows] == [0, 40, 80]


def test_a_stream_has_the_same_rows(place):
    rows, labels = open_dataset(place, streaming=True)
    rows = list(rows)
    assert labels == NAMES
    assert columns(rows) == ROWS
    assert [row["image"].size for row in rows] == list(SIZES.values())


def test_the_ground_truth_is_the_same(place):
    truth = open_ground_truth(place)
    assert truth.labels == NAMES
    for reference, row in zip(truth.references.values(), ROWS, strict=True):
        assert reference["boxes"].tolist() == row["boxes"]
        assert [NAMES[label] for label in reference["labels"]] == row["names"]
        assert reference["area"].tolist() == [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in row["boxes"]]


def test_the_check_finds_nothing_but_the_picture_without_boxes(place):
    report = check_dataset(place)
    assert {finding.kind for finding in report.findings} <= {"images without boxes"}
    assert report.boxes_per_name == dict.fromkeys(NAMES, 1)
    assert (report.num_images, report.num_boxes) == (3, 3)
    assert report.format == annotation_format(annotation_file(place))


def test_pictures_with_their_boxes_are_yielded_for_labelling(place):
    found = list(dataset_pictures(place))
    assert columns([each.row for each in found]) == ROWS
    assert [each.open().size for each in found] == list(SIZES.values())
    assert all(name in each.name for name, each in zip(SIZES, found, strict=True))
