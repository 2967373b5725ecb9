"""Files to download: every format of `gdino detect --format`, as one file or as an archive, with the boxes shown."""

import io
import json
import zipfile

import numpy as np
import pytest
from gdino_demo.formats import FORMAT_NAMES, coco_data, format_file, png
from gdino_demo.safety import Refused
from PIL import Image
from pycocotools.coco import COCO

from gdino_hf import Detections
from gdino_hf.cli import format_option
from gdino_hf.visualize import label_color

SIZE = (200, 100)
BOXES = [[-5.0, 10.0, 100.0, 60.0], [20.0, 20.0, 40.0, 40.0], [150.0, 50.0, 210.0, 100.0]]


@pytest.fixture
def found():
    return Detections(BOXES, [0.9, 0.5, 0.3], [0, 1, 0], ("cat", "dog", "bird"), SIZE, source="a.png")


def test_the_formats_are_those_of_the_command():
    assert FORMAT_NAMES == format_option.FORMAT_NAMES


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_format_is_one_file_or_an_archive(name, found):
    file_name, content = format_file(name, [found, Detections.none(found.names, SIZE, source="b.png")])
    texts = {file_name: content}
    if file_name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            texts = {each: archive.read(each) for each in archive.namelist()}
        assert len(texts) > 1
    assert not any(each.startswith(("/", "..")) for each in texts)
    assert b"a.png" in b"".join(texts.values()) or name in ("yolo", "coco-results", "png")
    if name == "yolo":
        assert set(texts) == {"yolo/data.yaml", "yolo/labels/a.txt", "yolo/labels/b.txt"}
        assert texts["yolo/labels/a.txt"].split(b"\n")[1].split() == [b"1", b"0.15", b"0.3", b"0.1", b"0.2"]


def test_pycocotools_reads_the_coco_file(found, tmp_path):
    name, content = format_file("coco", [found, Detections.none(found.names, SIZE, source="b.png")])
    (tmp_path / name).write_bytes(content)
    coco = COCO(str(tmp_path / name))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["cat", "dog", "bird"]
    assert len(coco.getImgIds()) == 2
    first = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert first[0]["bbox"] == [0.0, 10.0, 100.0, 50.0]
    assert first[2]["bbox"] == [150.0, 50.0, 50.0, 50.0]
    assert [round(each["score"], 2) for each in first] == [0.9, 0.5, 0.3]
    assert coco.getAnnIds(imgIds=[2]) == []


def test_coco_data_is_the_content_of_the_coco_file(found):
    assert coco_data([found]) == json.loads(format_file("coco", [found])[1])
    assert coco_data([]) == {"images": [], "categories": [], "annotations": []}


def test_unknown_formats_and_no_pictures_are_refused(found):
    with pytest.raises(Refused, match="choose one of coco"):
        format_file("../etc", [found])
    with pytest.raises(Refused, match="nothing to write"):
        format_file("coco", [])


def test_the_annotated_picture_has_boxes(found):
    plain = Image.new("RGB", SIZE, "white")
    drawn = Image.open(io.BytesIO(png(plain, found)))
    assert drawn.size == SIZE
    assert drawn.getpixel((50, 59)) == label_color("cat")
    assert plain.getpixel((50, 59)) == (255, 255, 255)
    assert np.asarray(drawn).shape == (100, 200, 3)
