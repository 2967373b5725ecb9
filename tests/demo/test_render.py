"""Detections as HTML, JSON, COCO and pictures: escaped, clipped to the picture, and equal in every form."""

import html.parser
import json
from types import SimpleNamespace

import pytest
from gdino_demo import render
from gdino_demo.engine import Detection, Settings
from PIL import Image
from pycocotools.coco import COCO

from gdino_hf.visualize import label_color

HOSTILE = """"><script>alert('1')</script>${alert(1)}{{constructor}}&"""
SIZE = (200, 100)


class Tags(html.parser.HTMLParser):
    """Parser that collects tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def detections():
    return [
        Detection("cat", 0, 0.9, (-5.0, 10.0, 100.0, 60.0)),
        Detection("dog", 1, 0.5, (20.0, 20.0, 40.0, 40.0)),
        Detection("cat", 0, 0.3, (150.0, 50.0, 210.0, 100.0)),
    ]


@pytest.fixture
def outputs():
    return SimpleNamespace(
        name="a.png",
        size=SIZE,
        model="nano",
        labels=("cat", "dog", "bird"),
        negatives=(),
        seconds=0.1234,
        device="CPU",
        backend="C",
        grounding=False,
    )


def test_boxes_are_clipped_in_per_cent_and_labelled(detections):
    tags = [attributes for tag, attributes in Tags(render.boxes(detections, SIZE)).tags if tag == "div"]
    assert [each["aria-label"] for each in tags] == ["cat 0.90", "cat 0.30", "dog 0.50"]  # the smallest on top
    assert all(each["tabindex"] == "0" for each in tags)
    assert tags[0]["style"].startswith("left:0.000%;top:10.000%;width:50.000%;height:50.000%")
    assert tags[1]["style"].startswith("left:75.000%;top:50.000%;width:25.000%;height:50.000%")
    color = "--box:#{:02x}{:02x}{:02x}".format(*label_color("cat"))
    assert [color in each["style"] for each in tags] == [True, True, False]


def test_markup_in_texts_is_escaped(outputs):
    found = [Detection(HOSTILE, 0, 0.5, (1.0, 1.0, 9.0, 9.0))]
    outputs.labels, outputs.model, outputs.grounding = (HOSTILE,), HOSTILE, True
    outputs.best = lambda: found[0]
    pieces = [
        render.boxes(found, SIZE),
        render.table(found),
        render.status(outputs, found, Settings(0.2)),
        render.status(outputs, [], Settings(0.9)),
        render.photograph(Image.new("RGB", SIZE), HOSTILE)["picture"],
    ]
    for piece in pieces:
        parsed = Tags(piece)
        assert "script" not in {tag for tag, _ in parsed.tags}
        assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert HOSTILE in Tags(pieces[1]).text


def test_phrases_without_a_box_are_named(outputs, detections):
    outputs.grounding = True
    text = Tags(render.status(outputs, detections, Settings(0.2))).text
    assert "Phrases: cat · dog · bird" in text
    assert "No box above the threshold: bird" in text


def test_large_pictures_are_shown_at_a_smaller_size():
    image = Image.new("RGB", (4000, 1000))
    shown = render.photograph(image, "large")
    assert len(shown["picture"]) < 100_000
    assert shown["ratio"] == image.width / image.height
    assert image.size == (4000, 1000)


def test_pycocotools_reads_the_coco_file(outputs, detections, tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(render.to_text(render.coco([(outputs, detections), (outputs, [])])))
    coco = COCO(str(path))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["cat", "dog", "bird"]
    assert len(coco.getImgIds()) == 2
    first = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert first[0]["bbox"] == [0.0, 10.0, 100.0, 50.0]
    assert first[2]["bbox"] == [150.0, 50.0, 50.0, 50.0]
    assert [round(each["score"], 2) for each in first] == [0.9, 0.5, 0.3]
    assert coco.getAnnIds(imgIds=[2]) == []


def test_json_holds_the_boxes_unclipped(outputs, detections):
    report = json.loads(render.to_text(render.report(outputs, detections, Settings(0.2, nms=1.0))))
    assert report["detections"][0] == {
        "label": "cat", "label_index": 0, "score": 0.9, "box": [-5.0, 10.0, 100.0, 60.0]
    }  # fmt: skip
    assert report["nms"] is None
    assert (report["width"], report["height"]) == SIZE


def test_the_annotated_picture_has_boxes(detections):
    plain = Image.new("RGB", SIZE, "white")
    drawn = render.annotated(plain, detections)
    assert drawn.size == SIZE
    assert drawn.getpixel((50, 59)) == label_color("cat")
    assert plain.getpixel((50, 59)) == (255, 255, 255)
