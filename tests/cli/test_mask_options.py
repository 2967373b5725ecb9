"""`gdino detect --masks` and `gdino label --masks`: masks in the results and every format, whatever stopped the run."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from detect_command import EVERYTHING, LABELS
from gdino_hf import Detections, Detector
from gdino_hf.data.formats import open_dataset
from gdino_hf.detection.coco_exchange import decode_masks
from gdino_hf.segmentation import Segmenter
from label_command import digests, make_pictures, rows, run_label
from tiny_segmenters import photo, save_segmenter

pytest.importorskip("pycocotools")
pytest.importorskip("shapely")

SIZES = {"a.png": (90, 60), "b.jpg": (60, 90)}
FORMATS = ("coco", "coco-polygons", "yolo", "labelme", "png", "parquet")
LEAST_IOU = 0.95


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return save_segmenter("sam2", tmp_path_factory.mktemp("sam2"))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        photo(size, seed).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def iou(one, other):
    return (one & other).sum() / (one | other).sum() if (one | other).any() else 1.0


def masks_of(report):
    return [as_masks(item).tolist() for item in report["images"]]


def as_masks(item):
    return decode_masks([found["mask"] for found in item["detections"]], (item["width"], item["height"]))


def assert_files_hold(out, name, found):
    """Compare the masks in every format with those of detections whose labels are `LABELS`."""
    exact = Detections.from_coco_dataset(json.loads((out / "coco.json").read_text()), name)
    assert np.array_equal(exact.masks, found.masks)
    stem, full = name.partition(".")[0], found.masks.any((1, 2))
    yolo = (out / "yolo" / "labels" / f"{stem}.txt").read_text()
    labelme = json.loads((out / "labelme" / f"{stem}.json").read_text())
    for read in (
        Detections.from_coco_dataset(json.loads((out / "coco_polygons.json").read_text()), name),
        Detections.from_yolo(yolo, LABELS, found.size),
        Detections.from_labelme(labelme, LABELS),
    ):
        assert read.text_labels == found.text_labels
        assert min(iou(*pair) for pair in zip(read.masks[full], found.masks[full], strict=True)) >= LEAST_IOU
    picture = np.asarray(Image.open(out / "masks" / "objects" / f"{stem}.png"))
    assert np.array_equal(picture, np.asarray(found.mask_picture()))
    return full.sum()


def test_detect_writes_masks(detect, tiny_folder, photos, segmenter, tmp_path):
    status, report, _, _ = detect(photos, *EVERYTHING, "--nms", "0.3", "--masks", segmenter, "--format", *FORMATS)
    assert status == 0
    assert (report["masks"], report["tighten"]) == (str(segmenter), False)
    detector = Detector(str(tiny_folder), device="cpu", segmenter=Segmenter(segmenter))
    for item in report["images"]:
        options = {"threshold": 0.0, "text_threshold": 0.0, "nms_threshold": 0.3}
        expected = detector(item["image"], LABELS, **options)
        assert len(expected) > 3
        assert np.array_equal(as_masks(item), expected.masks)
        assert assert_files_hold(tmp_path / "out", item["image"].rpartition("/")[2], expected) > 1
        drawn, plain = (np.asarray(Image.open(item[key]).convert("RGB")).astype(int) for key in ("annotated", "image"))
        assert (np.abs(drawn - plain).max(2) > 8).mean() > 0.05


def test_a_stopped_run_goes_on_with_its_segmenter_and_starts_anew_with_another(
    detect, photos, segmenter, tmp_path, monkeypatch
):
    arguments = (photos, *EVERYTHING, "--nms", "0.5", "--masks", segmenter)
    _, whole, _, _ = detect(*arguments, json_path=tmp_path / "whole.json")

    def full(*_):
        raise OSError(28, "No space left on device", "coco.json")

    with monkeypatch.context() as patch:
        patch.setattr("gdino_hf.detection.dataset_files.DataSetFiles.add", full)
        assert detect(*arguments, "--format", "coco")[0] == 1
    _, again, _, said = detect(*arguments, "--format", "coco")
    assert "2 of 2 images are done" in said
    assert [as_masks(item).tolist() for item in again["images"]] == [
        as_masks(item).tolist() for item in whole["images"]
    ]
    with monkeypatch.context() as patch:
        patch.setattr("gdino_hf.detection.dataset_files.DataSetFiles.add", full)
        assert detect(*arguments, "--format", "coco")[0] == 1
    other = save_segmenter("sam2", tmp_path / "other", seed=1)
    _, new, _, said = detect(*arguments[:-1], other, "--format", "coco")
    assert "an unfinished run with other settings is replaced" in said
    assert masks_of(new) != masks_of(whole)


def test_tightened_boxes_are_the_bounds_of_the_masks(detect, photos, segmenter):
    _, report, _, _ = detect(photos, *EVERYTHING, "--masks", segmenter, "--tighten")
    tight = 0
    for item in report["images"]:
        for found, mask in zip(item["detections"], as_masks(item), strict=True):
            if mask.any():
                columns, lines = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
                assert found["box"] == [columns[0], lines[0], columns[-1] + 1, lines[-1] + 1]
                tight += 1
    assert tight > 1


def test_without_the_option_nothing_is_said_of_masks(detect, photos):
    _, report, _, _ = detect(photos, *EVERYTHING)
    assert "mask" not in json.dumps(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tighten",), "--tighten is for --masks; give both"),
        (("--masks", "nowhere/at/all"), "The segmenter nowhere/at/all cannot be loaded (there is no such folder)"),
        (("--masks", "MODEL"), "its model_type is 'gdino', which boxes cannot prompt"),
        (("--masks", "SEGMENTER", "--device", "nowhere"), "--device nowhere cannot be used here"),
    ],
)
@pytest.mark.parametrize("verb", ["detect", "label"])
def test_mistakes_are_one_sentence_before_the_work(
    verb, arguments, message, detect, tiny_folder, photos, segmenter, tmp_path
):
    places = {"MODEL": str(tiny_folder), "SEGMENTER": str(segmenter)}
    arguments = [places.get(argument, argument) for argument in arguments]
    if verb == "detect":
        status, _, _, complained = detect(photos, *arguments)
    else:
        status, _, complained = run_label(tiny_folder, tmp_path / "out", photos, *arguments)
    assert status == 2
    assert message.removeprefix("--") in complained
    assert complained.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_libraries_are_said_before_the_work(detect, photos, segmenter, tmp_path, monkeypatch):
    for module in ("pycocotools", "shapely"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            status, _, _, complained = detect(photos, "--masks", segmenter, "--format", "yolo")
        assert status == 2
        assert f'need {module}; pip install "gdino-hf[masks]"' in complained
    assert not (tmp_path / "out").exists()


def test_label_writes_masks_and_its_resume_changes_no_byte(tiny_folder, segmenter, tmp_path):
    folder = make_pictures(tmp_path / "photos", 5)
    arguments = (folder, "--nms", "0.3", "--masks", segmenter, "--format", *FORMATS)
    status, _, complained = run_label(tiny_folder, tmp_path / "out", *arguments, shard=2)
    assert (status, complained.count("Traceback")) == (0, 0)
    found = rows(tmp_path / "out")
    assert [len(row["masks"]) for row in found] == [len(row["labels"]) for row in found]
    detector = Detector(str(tiny_folder), device="cpu", segmenter=Segmenter(segmenter))
    expected = detector(found[3]["source"], LABELS, threshold=0.005, nms_threshold=0.3)
    counts = [{"size": [found[3]["height"], found[3]["width"]], "counts": mask} for mask in found[3]["masks"]]
    assert np.array_equal(decode_masks(counts, expected.size), expected.masks)
    name = found[3]["source"].removeprefix(f"{folder}/")
    assert assert_files_hold(tmp_path / "out", name, expected) > 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["segmenter"], settings["tighten"]) == (str(segmenter), False)
    assert len(settings["segmenter_fingerprint"]) == 64

    # A run that lost its last shard and its files, as one that was killed.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "out", killed)
    (killed / "shards" / "00000002.parquet").unlink()
    for path in (killed / "coco.json", killed / "yolo", killed / "masks", killed / "labelme", killed / "boxes.parquet"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = json.loads((killed / "manifest.json").read_text())
    (killed / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    assert run_label(tiny_folder, killed, *arguments, shard=2)[0] == 0
    assert digests(killed) == digests(tmp_path / "out")

    other = save_segmenter("sam2", tmp_path / "other", seed=1)
    for changed, why in (
        (("--masks", other), "made with another segmenter fingerprint ("),
        ((), "another tighten (False then, none now)"),
        (("--masks", segmenter, "--tighten"), "another tighten (False then, True now)"),
    ):
        status, _, complained = run_label(tiny_folder, tmp_path / "out", folder, "--nms", "0.3", *changed, shard=2)
        assert status == 2
        assert why in complained.replace("'", "")
    moved = shutil.copytree(segmenter, tmp_path / "moved")
    assert run_label(tiny_folder, tmp_path / "out", folder, "--nms", "0.3", "--masks", moved, shard=2)[0] == 0


def test_what_label_splits_for_trainers_has_segments(tiny_folder, segmenter, tmp_path):
    folder = make_pictures(tmp_path / "photos", 6)
    options = ("--format", "yolo", "--nms", "0.3", "--split", "0.5", "0.3", "0.2", "--masks", segmenter)
    assert run_label(tiny_folder, tmp_path / "out", folder, *options)[0] == 0
    lines = [
        line.split()
        for path in (tmp_path / "out" / "split" / "yolo").rglob("labels/**/*.txt")
        for line in path.read_text().splitlines()
    ]
    assert lines
    assert all(len(line) > 6 for line in lines)
    assert len(list(open_dataset(tmp_path / "out" / "split" / "yolo" / "data.yaml")[0])) > 0
