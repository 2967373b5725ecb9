"""Detections as HTML and JSON: escaped, inside the picture, and equal in every form."""

import html.parser
import json
from types import SimpleNamespace

import pytest
from gdino_demo import render
from gdino_demo.outputs import Settings
from gdino_demo.queries import Query
from PIL import Image

from gdino_hf import Detections, Vocabulary
from gdino_hf.visualize import label_color

HOSTILE = """"><script>alert('1')</script>${alert(1)}{{constructor}}&"""
SIZE = (200, 100)
BOXES = [[-5.0, 10.0, 100.0, 60.0], [20.0, 20.0, 40.0, 40.0], [150.0, 50.0, 210.0, 100.0]]


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
def found():
    return Detections(
        BOXES,
        [0.9, 0.5, 0.3],
        [0, 1, 0],
        ("cat", "dog", "bird"),
        SIZE,
        presence={"cat": 0.9, "dog": 0.5, "bird": 0.125},
        source="a.png",
        colors={"dog": "#102030"},
    )


@pytest.fixture
def outputs(found):
    return SimpleNamespace(
        name="a.png",
        size=SIZE,
        model="nano",
        labels=found.names,
        query=Query(Vocabulary(found.names)),
        tiles=(),
        seconds=0.1234,
        device="CPU",
        backend="C",
        masks=None,
        remarks=(),
        own_threshold=lambda label: None,
    )


def test_boxes_are_clipped_in_per_cent_and_labelled(found):
    tags = [attributes for tag, attributes in Tags(render.boxes(found)).tags if tag == "div"]
    assert [each["aria-label"] for each in tags] == ["cat 0.90", "cat 0.30", "dog 0.50"]  # the smallest on top
    assert all(each["tabindex"] == "0" for each in tags)
    assert tags[0]["style"].startswith("left:0.000%;top:10.000%;width:50.000%;height:50.000%")
    assert tags[1]["style"].startswith("left:75.000%;top:50.000%;width:25.000%;height:50.000%")
    color = "--box:#{:02x}{:02x}{:02x}".format(*label_color("cat"))
    assert [color in each["style"] for each in tags] == [True, True, False]
    assert "--box:#102030" in tags[2]["style"]


def test_presence_names_every_label_found_or_not(outputs, found):
    text = Tags(render.presence(outputs, found.filter(labels="cat"), Settings(0.2, hidden=frozenset(["dog"])))).text
    assert text == "LabelHighest scoreFoundcat0.902 boxesdog0.50hiddenbird0.12not found"
    rows = [
        attributes.get("class")
        for tag, attributes in Tags(render.presence(outputs, found, Settings(0.2))).tags
        if tag == "tr"
    ]
    assert rows == [None, "gd-found", "gd-found", "gd-missing"]


def test_presence_says_why_a_label_has_no_box(outputs, found):
    def text(settings):
        return Tags(render.presence(outputs, found[[]], settings)).text.partition("Found")[2]

    assert "dog0.50another label fits better" in text(Settings(0.2))
    assert "bird0.12not found" in text(Settings(0.2))
    assert "dog0.50not found" in text(Settings(0.5))
    assert "dog0.50below the word threshold" in text(Settings(0.2, text_threshold=0.6))
    outputs.own_threshold = {"dog": 0.7}.get
    assert "dog0.50not found" in text(Settings(0.2))


def test_phrases_of_a_caption_are_marked_in_the_colours_of_their_boxes():
    caption = "a <cat> by a cat & a dog"
    spans = [(2, 7), (13, 16), (21, 24), (14, 15)]
    found = Detections.none(["<cat>", "cat", "dog"], SIZE, caption=caption)
    parsed = Tags(render.caption(found, spans))
    assert parsed.text == caption
    colors = [attributes["style"].split(";")[0] for tag, attributes in parsed.tags if tag == "mark"]
    assert colors == ["background:#{:02x}{:02x}{:02x}".format(*label_color(name)) for name in found.names]


def test_markup_in_texts_is_escaped(outputs):
    found = Detections(
        [[1.0, 1.0, 9.0, 9.0]], [0.5], [0], (HOSTILE,), SIZE, presence={HOSTILE: 0.5}, caption=HOSTILE,
        spans=(((0, 5),),), token_scores=(((HOSTILE, 0.5),),),
    )  # fmt: skip
    outputs.labels, outputs.model, outputs.remarks = (HOSTILE,), HOSTILE, (HOSTILE,)
    outputs.query = Query(caption=HOSTILE, phrases=((0, 5),))
    outputs.best = lambda: next(iter(found))
    pieces = [
        render.boxes(found),
        render.table(found),
        render.presence(outputs, found, Settings(0.2)),
        render.status(outputs, found, Settings(0.2)),
        render.status(outputs, found[[]], Settings(0.9)),
        render.photograph(Image.new("RGB", SIZE), HOSTILE)["picture"],
    ]
    for piece in pieces:
        parsed = Tags(piece)
        assert "script" not in {tag for tag, _ in parsed.tags}
        assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert all(HOSTILE in Tags(piece).text for piece in pieces[1:5])


def test_large_pictures_are_shown_at_a_smaller_size():
    image = Image.new("RGB", (4000, 1000))
    shown = render.photograph(image, "large")
    assert len(shown["picture"]) < 100_000
    assert shown["ratio"] == image.width / image.height
    assert image.size == (4000, 1000)


def test_json_holds_presence_and_boxes_inside_the_picture(outputs, found):
    report = json.loads(render.to_text(render.report(outputs, found, Settings(0.2, nms=1.0))))
    first = report["detections"][0]
    assert (first["label"], first["label_index"], first["box"]) == ("cat", 0, [0.0, 10.0, 100.0, 60.0])
    assert first["score"] == pytest.approx(0.9)
    assert report["presence"] == {"cat": 0.9, "dog": 0.5, "bird": 0.125}
    assert report["nms"] is None
    assert (report["width"], report["height"]) == SIZE
    assert not {"caption", "tiles", "remarks"} & set(report)


def test_json_of_a_caption_has_the_characters_of_each_phrase(outputs, found):
    spans, scores = (((2, 5),),) * 3, ((("cat", 0.9),),) * 3
    one = Detections(
        BOXES, [0.9, 0.5, 0.3], [0, 1, 0], found.names, SIZE, caption="a cat", spans=spans, token_scores=scores
    )
    report = render.report(outputs, one, Settings(0.2))
    assert report["caption"] == "a cat"
    assert report["detections"][0]["spans"] == [[2, 5]]
    assert report["detections"][0]["token_scores"] == [["cat", 0.9]]
