"""Data set files: libraries read the boxes of every picture, names stay inside the folder, and files are whole."""

import csv
import dataclasses
import gc
import json
import logging
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from exchange_cases import HOSTILE, LANDSCAPE, PORTRAIT, make, with_masks
from gdino_hf import Detections
from gdino_hf.detection.dataset_files import FORMATS, DataSetFiles

HALF_A_PIXEL = 0.5
NAMES = ("cat", "remote control", "dog")
SIZES = {"a.jpg": LANDSCAPE, "sub/b.png": PORTRAIT, "empty.jpg": (64, 48), "dot.png": (1, 1)}


def write(folder, formats, pictures, names=NAMES):
    with DataSetFiles(folder, formats, names) as files:
        for found in pictures:
            files.add(found)
    return files


@pytest.fixture
def pictures():
    """Wide, high, without boxes, and of one pixel."""
    numbers = {"a.jpg": 9, "sub/b.png": 5, "empty.jpg": 0, "dot.png": 1}
    found = [make(SIZES[name], number=number, source=name) for name, number in numbers.items()]
    found[-1] = Detections([[0, 0, 1, 1]], [0.5], [2], NAMES, (1, 1), source="dot.png")
    return found


@pytest.fixture
def photos(tmp_path):
    """A folder with pictures of the sizes that the detections tell."""
    for name, size in SIZES.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    return tmp_path / "photos"


def sorted_boxes(boxes, labels):
    return sorted([label, *map(float, box)] for box, label in zip(boxes, labels, strict=True))


def assert_same_boxes(data_set, pictures, folder):
    """Compare a DetectionDataset of supervision with the detections by picture, label and box."""
    expected = {str((folder / found.source).resolve()): found for found in pictures}
    assert {str(Path(path).resolve()) for path in data_set.image_paths} == set(expected)
    for path in data_set.image_paths:
        read, found = data_set.annotations[path], expected[str(Path(path).resolve())]
        labels = [data_set.classes[number] for number in (read.class_id if len(read) else [])]
        ours = sorted_boxes(found.boxes, found.text_labels)
        theirs = sorted_boxes(read.xyxy, labels)
        assert [row[0] for row in theirs] == [row[0] for row in ours]
        sides = np.array([row[1:] for row in theirs]) - np.array([row[1:] for row in ours])
        assert np.abs(sides).max(initial=0) < HALF_A_PIXEL


def test_supervision_reads_coco(tmp_path, pictures, photos):
    sv = pytest.importorskip("supervision")
    write(tmp_path / "out", ["coco"], pictures)
    data_set = sv.DetectionDataset.from_coco(str(photos), str(tmp_path / "out" / "coco.json"))
    assert data_set.classes == list(NAMES)
    assert_same_boxes(data_set, pictures, photos)


def test_supervision_reads_masks_of_coco(tmp_path):
    sv = pytest.importorskip("supervision")
    pytest.importorskip("pycocotools")
    found = with_masks(make((120, 90), number=4, source="m.png"))
    Image.new("RGB", found.size).save(tmp_path / "m.png")
    write(tmp_path, ["coco"], [found])
    data_set = sv.DetectionDataset.from_coco(str(tmp_path), str(tmp_path / "coco.json"))
    (path,) = data_set.image_paths
    assert np.array_equal(np.asarray(data_set.annotations[path].mask), found.masks)


@pytest.mark.parametrize("part", ["", "sub"])
def test_supervision_reads_yolo(tmp_path, pictures, photos, part):
    sv = pytest.importorskip("supervision")
    write(tmp_path / "out", ["yolo"], pictures)
    labels, yolo = tmp_path / "out" / "yolo" / "labels" / part, tmp_path / "out" / "yolo" / "data.yaml"
    data_set = sv.DetectionDataset.from_yolo(str(photos / part), str(labels), str(yolo))
    assert data_set.classes == list(NAMES)
    there = [found for found in pictures if Path(found.source).parent == Path(part)]
    assert_same_boxes(data_set, there, photos)


@pytest.mark.parametrize("part", ["", "sub"])
def test_supervision_reads_pascal_voc(tmp_path, pictures, photos, part):
    sv = pytest.importorskip("supervision")
    write(tmp_path / "out", ["voc"], pictures)
    xmls = tmp_path / "out" / "voc" / "Annotations" / part
    data_set = sv.DetectionDataset.from_pascal_voc(str(photos / part), str(xmls))
    there = [found for found in pictures if Path(found.source).parent == Path(part)]
    assert_same_boxes(data_set, there, photos)


def test_the_pascal_voc_split_lists_every_picture(tmp_path, pictures):
    write(tmp_path, ["voc"], pictures)
    stems = (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").read_text(encoding="utf-8").splitlines()
    assert stems == ["a", "sub/b", "empty", "dot"]
    for stem, found in zip(stems, pictures, strict=True):
        document = (tmp_path / "voc" / "Annotations" / f"{stem}.xml").read_text(encoding="utf-8")
        assert Detections.from_voc(document, NAMES, found.source) == found


def test_supervision_reads_createml(tmp_path, pictures, photos):
    sv = pytest.importorskip("supervision")
    if not hasattr(sv.DetectionDataset, "from_createml"):
        pytest.skip("this supervision does not read CreateML")
    write(tmp_path / "out", ["createml"], pictures)
    data_set = sv.DetectionDataset.from_createml(str(photos), str(tmp_path / "out" / "createml.json"))
    assert_same_boxes(data_set, pictures, photos)


def test_pycocotools_reads_data_set_and_results_of_the_same_images(tmp_path, pictures):
    coco = pytest.importorskip("pycocotools.coco")
    write(tmp_path, ["coco", "coco-results"], pictures)
    truth = coco.COCO(str(tmp_path / "coco.json"))
    results = truth.loadRes(str(tmp_path / "coco_results.json"))
    by_name = {row["file_name"]: row["id"] for row in truth.dataset["images"]}
    for found in pictures:
        for read in (truth, results):
            rows = read.loadAnns(read.getAnnIds(imgIds=[by_name[found.source]]))
            boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            assert np.abs(boxes - found.boxes).max(initial=0) < HALF_A_PIXEL
            assert [truth.loadCats(row["category_id"])[0]["name"] for row in rows] == found.text_labels
            assert [row["score"] for row in rows] == pytest.approx(found.scores.tolist())


def test_the_readers_of_this_package_train_on_coco(tmp_path, pictures, photos):
    from gdino_hf.data.formats import open_dataset

    write(tmp_path, ["coco"], pictures[:3])
    rows, names = open_dataset(tmp_path / "coco.json", photos)
    assert names == list(NAMES)
    assert [row["width"] for row in rows] == [found.size[0] for found in pictures[:3]]
    for row, found in zip(rows, pictures[:3], strict=True):
        boxes = np.array(row["boxes"]).reshape(-1, 4)
        assert np.abs(boxes - found.boxes).max(initial=0) < HALF_A_PIXEL
        assert row["names"] == found.text_labels


def test_datasets_reads_the_imagefolder(tmp_path, pictures, photos):
    datasets = pytest.importorskip("datasets")
    write(photos, ["hf"], pictures)
    rows = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(pictures)
    for row in rows:
        (found,) = (one for one in pictures if one.size == row["image"].size)
        assert Detections.from_objects(row, NAMES, source=found.source) == found


def test_pandas_reads_csv_and_parquet(tmp_path, pictures):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    write(tmp_path, ["csv", "parquet"], pictures)
    for frame in (pandas.read_csv(tmp_path / "boxes.csv"), pandas.read_parquet(tmp_path / "boxes.parquet")):
        assert set(frame.source) == {"a.jpg", "sub/b.png", "dot.png"}
        for found in pictures[:2]:
            part = frame[frame.source == found.source].drop(columns="source")
            assert Detections.from_pandas(part, names=NAMES, source=found.source) == found


def test_labels_of_every_kind_come_back_from_csv_and_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    names = (*HOSTILE, "NA", "'quoted'", "=2", "a, b", "+1")
    found = make((40, 30), names, len(names), "a.jpg")
    write(tmp_path, ["csv", "parquet"], [found], names)
    csv_frame = pandas.read_csv(tmp_path / "boxes.csv", keep_default_na=False)
    for frame in (csv_frame, pandas.read_parquet(tmp_path / "boxes.parquet")):
        assert Detections.from_pandas(frame, names=names) == found


def test_cvat_holds_every_picture(tmp_path, pictures):
    write(tmp_path, ["cvat"], pictures)
    document = (tmp_path / "cvat.xml").read_text(encoding="utf-8")
    for found in pictures:
        assert Detections.from_cvat(document, found.source) == found


def test_datumaro_which_imports_for_cvat_reads_the_same_boxes(tmp_path, pictures, photos):
    """datumaro is not among the requirements of the tests, so this runs where someone installed it."""
    datumaro = pytest.importorskip("datumaro.components.dataset")
    write(tmp_path, ["cvat", "coco"], pictures[:2])
    layouts = {
        "cvat": (tmp_path / "cvat.xml", "train.xml", "images"),
        "coco_instances": (tmp_path / "coco.json", "annotations/instances_default.json", "images/default"),
    }
    for name, (file, place, images) in layouts.items():
        folder = tmp_path / name
        (folder / place).parent.mkdir(parents=True)
        file.rename(folder / place)
        (folder / images).parent.mkdir(parents=True, exist_ok=True)
        (folder / images).symlink_to(photos)
        items = {item.id: item for item in datumaro.Dataset.import_from(str(folder), name)}
        for found in pictures[:2]:
            boxes = [
                box for box in items[str(Path(found.source).with_suffix(""))].annotations if hasattr(box, "points")
            ]
            theirs = sorted_boxes([box.points for box in boxes], [NAMES[box.label] for box in boxes])
            ours = sorted_boxes(found.boxes, found.text_labels)
            assert [row[0] for row in theirs] == [row[0] for row in ours]
            sides = np.array([row[1:] for row in theirs]) - np.array([row[1:] for row in ours])
            assert np.abs(sides).max() < HALF_A_PIXEL


def test_label_studio_tasks_hold_predictions_and_addresses(tmp_path, pictures):
    pictures[0] = dataclasses.replace(pictures[0], source="https://example.org/a b.jpg?x=1")
    pictures[1] = dataclasses.replace(pictures[1], source="sub/b & c.png")
    write(tmp_path, ["labelstudio"], pictures)
    tasks = json.loads((tmp_path / "labelstudio.json").read_text(encoding="utf-8"))
    assert [task["data"]["image"] for task in tasks[:2]] == [
        "https://example.org/a b.jpg?x=1",
        "/data/local-files/?d=sub/b%20%26%20c.png",
    ]
    for task, found in zip(tasks, pictures, strict=True):
        (prediction,) = task["predictions"]
        assert Detections.from_label_studio(prediction, NAMES, found.size, found.source) == found
    assert 'value="remote control"' in (tmp_path / "labelstudio.xml").read_text(encoding="utf-8")


EVIL_SOURCES = [
    "../../outside.jpg",
    "/etc/absolute.jpg",
    'quote"<&>\n.jpg',
    "esc\x1b[2J.jpg",
    "bytes\udcff.jpg",
    "nul\0.jpg",
    "..",
    "",
    "https://example.org/../x/%2e%2e/pic.jpg?token=1/2",
]


def test_hostile_names_stay_inside_the_folder_and_read_back(tmp_path):
    names = (*HOSTILE, "esc\x1b")
    pictures = [make((40, 30), names, len(names), source) for source in EVIL_SOURCES]
    out = tmp_path / "deep" / "out"
    write(out, FORMATS, pictures, names)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    for ending, folder in ((".txt", out / "yolo" / "labels"), (".xml", out / "voc" / "Annotations")):
        assert len(list(folder.rglob(f"*{ending}"))) == len(EVIL_SOURCES)
    content = json.loads((out / "coco.json").read_text(encoding="utf-8"))
    assert [row["file_name"] for row in content["images"]] == EVIL_SOURCES
    for number, found in enumerate(pictures, start=1):
        assert Detections.from_coco_dataset(content, number) == found
    assert list(yaml.safe_load((out / "yolo" / "data.yaml").read_text(encoding="utf-8"))["names"].values()) == list(
        names
    )
    document = (out / "cvat.xml").read_text(encoding="utf-8")
    assert Detections.from_cvat(document, EVIL_SOURCES[2], names) == pictures[2]
    for path in (out / "voc" / "Annotations").rglob("*.xml"):
        found = Detections.from_voc(path.read_text(encoding="utf-8"), names)
        assert found.text_labels == pictures[0].text_labels
    with (out / "boxes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + len(EVIL_SOURCES) * len(names)
    assert not any(cell.startswith(("=", "@")) for row in rows for cell in row)


def test_pictures_that_differ_in_their_ending_alone_keep_their_labels_apart(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write(tmp_path, ["yolo"], [make(number=1, source=name) for name in ("a.jpg", "A.png", "a.png", "b.png")])
    labels = sorted(path.name for path in (tmp_path / "yolo" / "labels").iterdir())
    assert labels == ["A.png.txt", "a.png-2.txt", "a.txt", "b.txt"]
    (message,) = caplog.messages
    assert "that of another picture for 2 pictures" in message
    assert message.endswith("for instance A.png, whose labels are in A.png.txt.")


def test_an_error_leaves_earlier_files_as_they_were(tmp_path, pictures):
    write(tmp_path, FORMATS, pictures)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken():
        yield pictures[1]
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        write(tmp_path, FORMATS, broken())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_files_beside_the_labels_survive_a_second_run(tmp_path, pictures):
    write(tmp_path, ["yolo"], pictures)
    (tmp_path / "yolo" / "images").mkdir()
    (tmp_path / "yolo" / "images" / "a.jpg").touch()
    write(tmp_path, ["yolo"], pictures[1:])
    assert (tmp_path / "yolo" / "images" / "a.jpg").exists()
    assert not (tmp_path / "yolo" / "labels" / "a.txt").exists()


def test_no_pictures_give_valid_files(tmp_path):
    write(tmp_path, FORMATS, [])
    for name in ("coco.json", "coco_results.json", "createml.json", "labelstudio.json"):
        json.loads((tmp_path / name).read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="0 of the 0 pictures"):
        Detections.from_cvat((tmp_path / "cvat.xml").read_text(encoding="utf-8"))


def test_memory_does_not_grow_with_the_boxes(tmp_path):
    found = make(number=60)

    def peak(number):
        pictures = (dataclasses.replace(found, source=f"{picture}.jpg") for picture in range(number))
        # Garbage that awaits its collection would count.
        gc.collect()
        tracemalloc.start()
        write(tmp_path / str(number), ["coco", "yolo", "cvat", "csv"], pictures)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    # Buffers are full after 20 pictures. A picture's boxes take 7,000 bytes in COCO alone; names and garbage take less.
    assert peak(120) < peak(20) + 100 * 3500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: DataSetFiles(folder, ["cocoa"], NAMES), "no format 'cocoa'; choose from coco, coco-results"),
        (lambda folder: write(folder, ["coco"], [make(names=("x",))]), "same labels in the same order"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []
