"""Tests of reading ODVG json lines."""

import json
import logging

import pytest
from PIL import Image

from gdino_hf.data.odvg import locate_phrase, odvg_names, read_odvg

DETECTION = [
    {
        "filename": "a.png",
        "height": 10,
        "width": 20,
        "detection": {
            "instances": [
                {"bbox": [1, 2, 4, 6], "label": 1, "category": "dog"},
                {"bbox": [15, 5, 99, 8], "label": 0, "category": "cat"},
                {"bbox": [3, 3, 3, 9], "label": 0, "category": "cat"},
            ]
        },
    },
    {"filename": "b.png", "height": 30, "width": 40, "detection": {"instances": []}},
]
CAPTION = "Cattle near a cat and a second cat."
GROUNDING = [
    {
        "filename": "a.png",
        "height": 10,
        "width": 20,
        "grounding": {
            "caption": CAPTION,
            "regions": [
                {"bbox": [1, 2, 4, 6], "phrase": "cat", "tokens_positive": [[14, 17]]},
                {"bbox": [[0, 0, 5, 5], [5, 5, 9, 9]], "phrase": "cattle"},
                {"bbox": [0, 0, 9, 9], "phrase": "cats", "tokens_positive": [[14, 17], [31, 34]]},
            ],
        },
    }
]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes json lines with their images and, optionally, a label map."""

    def write(lines, label_map=None, skip=()):
        (tmp_path / "images").mkdir(exist_ok=True)
        for line in lines:
            if line["filename"] not in skip:
                size = (line["width"], line["height"])
                Image.new("RGB", size).save(tmp_path / "images" / line["filename"])
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if label_map is not None:
            (tmp_path / "label_map.json").write_text(json.dumps(label_map))
        return path

    return write


def test_detection_lines_become_rows(write):
    path = write(DETECTION)
    rows = read_odvg(path)
    assert rows["image_id"] == [0, 1]
    assert rows[0]["boxes"] == [[1, 2, 4, 6], [15, 5, 20, 8]]
    assert rows[0]["names"] == ["dog", "cat"]
    assert rows[0]["image"].size == (20, 10)
    assert rows[1]["boxes"] == []
    assert "caption" not in rows.column_names
    assert odvg_names(path) == ["cat", "dog"]


def test_the_label_map_names_the_label_numbers(write):
    lines = json.loads(json.dumps(DETECTION))
    for instance in lines[0]["detection"]["instances"]:
        del instance["category"]
    path = write(lines, {"1": "big dog", "0": "small cat", "10": "cup", "2": "tree"})
    assert read_odvg(path)[0]["names"] == ["big dog", "small cat"]
    assert odvg_names(path) == ["small cat", "big dog", "tree", "cup"]
    assert read_odvg(path, label_map={0: "x", 1: "y"})[0]["names"] == ["y", "x"]
    with pytest.raises(ValueError, match="label 1 is not in the label map"):
        read_odvg(path, label_map={"0": "x"})


def test_grounding_rows_have_captions_and_spans(write):
    rows = read_odvg(write(GROUNDING))
    row = rows[0]
    assert row["caption"] == CAPTION
    assert row["names"] == ["cat", "cattle", "cattle", "cats"]
    assert row["spans"] == [[[14, 17]], [[0, 6]], [[0, 6]], [[14, 17], [31, 34]]]
    assert row["boxes"][1:3] == [[0, 0, 5, 5], [5, 5, 9, 9]]
    assert odvg_names(write(GROUNDING)) is None


def test_a_phrase_in_several_pieces_is_one_phrase(write):
    regions = [
        {"bbox": [1, 2, 4, 6], "phrase": ["Cattle", "second cat"], "tokens_positive": [[0, 6], [24, 34]]},
        {"bbox": [1, 2, 4, 6], "phrase": ["cattle", "second"]},
    ]
    lines = [{**GROUNDING[0], "grounding": {"caption": CAPTION, "regions": regions}}]
    row = read_odvg(write(lines))[0]
    assert row["names"] == ["Cattle second cat", "cattle second"]
    assert row["spans"] == [[[0, 6], [24, 34]], [[0, 6], [24, 30]]]


def test_file_names_with_the_image_folder_are_found(write):
    path = write(DETECTION[:1])
    path.write_text(path.read_text().replace("a.png", "images/a.png"))
    assert read_odvg(path)[0]["image"].size == (20, 10)


def test_a_streamed_file_has_the_same_rows(write):
    for lines in (DETECTION * 40, GROUNDING * 3):
        path = write(lines)
        whole, stream = read_odvg(path), read_odvg(path, streaming=True)
        assert [{**row, "image": row["image"].size} for row in stream] == [
            {**row, "image": row["image"].size} for row in whole
        ]
    assert read_odvg(write(DETECTION * 40), streaming=True).num_shards > 10


def test_a_stream_logs_an_invalid_line_and_continues(write, caplog):
    path = write([DETECTION[0], {**DETECTION[1], "filename": "gone.png"}, DETECTION[1]], skip=("gone.png",))
    path.write_text(path.read_text() + "no json\n")
    with caplog.at_level(logging.WARNING):
        assert [row["image_id"] for row in read_odvg(path, streaming=True)] == [0, 2]
    assert "Line 2" in caplog.text
    assert "gone.png" in caplog.text
    assert "Line 4" in caplog.text
    with pytest.raises(ValueError, match=r"Line 2 .*gone\.png"):
        read_odvg(path)


def test_phrases_are_located_as_whole_words():
    assert locate_phrase("cattle near a Cat.", "cat") == [14, 17]
    assert locate_phrase("a cat_toy", "cat") == [2, 5]
    for caption in ("cattle", "a cat and a cat", "concat", "dog", "cat2"):
        with pytest.raises(ValueError, match="times in the caption"):
            locate_phrase(caption, "cat")
    # Characters with a meaning in regular expressions are taken literally.
    assert locate_phrase("is it (a cat)?", "(a cat)") == [6, 13]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens_positive": [[14, 99]]}, "tokens_positive"),
        ({"tokens_positive": [[17, 14]]}, "tokens_positive"),
        ({"tokens_positive": 3}, "tokens_positive"),
        ({"tokens_positive": []}, "stands 2 times"),
        ({"phrase": " "}, "a phrase"),
        ({"phrase": []}, "a phrase"),
        ({"phrase": ["cat", 3]}, "a phrase"),
    ],
)
def test_an_invalid_region_gives_a_one_line_error(write, change, what):
    lines = json.loads(json.dumps(GROUNDING))
    lines[0]["grounding"]["regions"][0].update(change)
    with pytest.raises(ValueError, match=rf"^Line 1 of .*{what}.*; repair it\.$"):
        read_odvg(write(lines))


def test_a_grounding_line_in_a_detection_file_is_rejected(write):
    with pytest.raises(ValueError, match=r"Line 3 .*two files"):
        read_odvg(write([*DETECTION, *GROUNDING]))


def test_a_detection_line_in_a_grounding_file_has_no_caption(write):
    rows = read_odvg(write([*GROUNDING, *DETECTION]))
    assert rows["caption"] == [CAPTION, None, None]
    assert rows[1]["names"] == ["dog", "cat"]


@pytest.mark.parametrize("label_map", [[1], {"x": "cat"}, {"0": ""}, {"0": 3}])
def test_an_invalid_label_map_is_rejected(write, label_map):
    with pytest.raises(ValueError, match="label map"):
        read_odvg(write(DETECTION, label_map))


@pytest.mark.parametrize("bbox", [[1, 2, 3], [1, 2, float("nan"), 3]])
def test_a_broken_box_is_left_out_with_a_count(write, caplog, bbox):
    lines = json.loads(json.dumps(GROUNDING))
    before = len(read_odvg(write(lines))[0]["boxes"])
    lines[0]["grounding"]["regions"][0]["bbox"] = bbox
    rows = read_odvg(write(lines))
    assert len(rows[0]["boxes"]) < before
    assert "broken boxes: 1 " in caplog.text
