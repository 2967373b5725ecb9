"""`gdino detect --format`: data set files of the whole run beside the results, whole, and also after a stopped run."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from detect_command import EVERYTHING
from gdino_hf import Detections
from gdino_hf.cli import format_option
from gdino_hf.detection.dataset_files import FORMATS


@pytest.fixture
def folder(tmp_path):
    """A wide and a high picture, and one in a sub-folder."""
    chance = np.random.default_rng(0)
    for name, size in (("a.png", (90, 60)), ("b&<>.jpg", (60, 90)), ("sub/c.png", (80, 80))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size).save(path)
    return tmp_path / "photos"


def boxes_of(item):
    return [found["box"] for found in item["detections"]]


def test_the_names_are_those_of_the_library():
    assert tuple(FORMATS) == format_option.FORMAT_NAMES


def test_several_formats_hold_the_boxes_of_detections_json(detect, folder, tmp_path):
    status, report, printed, _ = detect(folder, *EVERYTHING, "--format", *FORMATS)
    assert status == 0
    out = tmp_path / "out"
    coco = json.loads((out / "coco.json").read_text(encoding="utf-8"))
    assert [row["file_name"] for row in coco["images"]] == ["a.png", "b&<>.jpg", "sub/c.png"]
    assert [row["name"] for row in coco["categories"]] == report["labels"]
    cvat = (out / "cvat.xml").read_text(encoding="utf-8")
    for item, row in zip(report["images"], coco["images"], strict=True):
        boxes = np.array(boxes_of(item), dtype=np.float32)
        texts = [found["label"] for found in item["detections"]]
        label_file = (out / "yolo" / "labels" / row["file_name"]).with_suffix(".txt")
        document = (out / "voc" / "Annotations" / row["file_name"]).with_suffix(".xml")
        for found in (
            Detections.from_coco_dataset(coco, row["id"]),
            Detections.from_cvat(cvat, row["file_name"]),
            Detections.from_yolo(label_file.read_text(), report["labels"], (item["width"], item["height"])),
            Detections.from_voc(document.read_text(encoding="utf-8"), report["labels"]),
        ):
            assert np.array_equal(found.boxes, boxes)
            assert found.text_labels == texts
            assert found.size == (item["width"], item["height"])
    assert f"coco: {out / 'coco.json'}" in printed
    assert f"yolo: {out / 'yolo'}\n" in printed
    assert printed.endswith(f"these files name pictures by their paths inside {folder}\n")


def test_without_the_option_there_are_no_such_files(detect, folder, tmp_path):
    _, _, printed, _ = detect(folder, *EVERYTHING)
    assert printed.endswith("detections.json\n")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.png", "b&<>.jpg", "sub", "detections.json"}


def test_a_run_that_was_stopped_writes_all_pictures_when_it_goes_on(detect, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "coco.json")

    with monkeypatch.context() as patch:
        patch.setattr("gdino_hf.detection.dataset_files.DataSetFiles.add", full)
        status, _, _, complained = detect(folder, *EVERYTHING, "--format", "coco", "yolo")
    assert status == 1
    assert "--format: the data set files cannot be written (No space left on device" in complained
    assert complained.count("\n") == 1
    assert not (tmp_path / "out" / "coco.json").exists()
    assert not (tmp_path / "out" / "yolo" / "labels").exists()
    status, report, _, said = detect(folder, *EVERYTHING, "--format", "coco", "yolo")
    assert status == 0
    assert "3 of 3 images are done" in said
    coco = json.loads((tmp_path / "out" / "coco.json").read_text(encoding="utf-8"))
    assert len(coco["annotations"]) == sum(len(boxes_of(item)) for item in report["images"])
    assert not list((tmp_path / "out").rglob(".*"))


def test_pictures_without_boxes_and_failed_ones(detect, folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"no picture")
    status, report, _, _ = detect(folder, "--threshold", "1", "--format", "coco", "yolo", "voc")
    assert status == 1
    assert len(report["failed"]) == 1
    coco = json.loads((tmp_path / "out" / "coco.json").read_text(encoding="utf-8"))
    assert len(coco["images"]) == 3
    assert coco["annotations"] == []
    assert (tmp_path / "out" / "yolo" / "labels" / "a.txt").read_text() == ""
    assert not (tmp_path / "out" / "yolo" / "labels" / "broken.txt").exists()


@pytest.mark.parametrize("arguments", [["--format", "cocoa"], ["--format"]])
def test_unknown_formats_are_refused(detect, folder, arguments):
    with pytest.raises(SystemExit) as stop:
        detect(folder, *arguments)
    assert stop.value.code == 2


def test_a_missing_library_and_a_file_in_the_way_are_said_before_the_work(detect, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        status, report, _, complained = detect(folder, "--format", "parquet")
    assert (status, report) == (2, None)
    assert 'Parquet files need pyarrow; pip install "gdino-hf[formats]"' in complained
    (tmp_path / "out" / "coco.json").mkdir(parents=True)
    status, report, _, complained = detect(folder, "--format", "coco")
    assert (status, report) == (2, None)
    assert "choose another --out" in complained


def test_a_refused_run_leaves_no_folder(detect, folder, tmp_path):
    """Whether the files can be written is tried before the model is loaded."""
    assert detect(folder, "--format", *FORMATS, labels="cat, ?")[0] == 2
    other = tmp_path / "elsewhere" / "found.json"
    assert detect(folder, "--format", *FORMATS, "--device", "nowhere", json_path=other)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_pictures_of_several_folders_are_named_from_the_folder_around_them(tmp_path):
    sources = [str(tmp_path / "a" / "x.jpg"), "https://example.org/y.jpg", str(tmp_path / "b" / "c" / "x.jpg")]
    assert format_option.pictures_folder(sources) == tmp_path
    assert format_option.pictures_folder(sources[1:2]) is None
