"""Tests of YOLO, Pascal VOC, CreateML and LabelMe as people have them, and of what is said about their faults."""

import json
import shutil

import pytest
from PIL import Image

from form_cases import NAMES, createml, labelme, voc, write_pictures, yolo, yolo_roboflow
from gdino_hf.data.annotation_files import annotation_file, find_split
from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.dataset_pictures import dataset_pictures
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.open_ground_truth import open_ground_truth
from gdino_hf.training.arguments import DataArguments
from gdino_hf.training.fine_tuning import read_data


def kinds(place, **options):
    """Return the kinds of fault that a check finds, with their examples."""
    report = check_dataset(place, options=AnnotationOptions(**options))
    return {finding.kind: finding.examples for finding in report.findings}


@pytest.mark.parametrize(
    "description",
    [
        "train: images/train\nval: images/train\n",
        "train: [images/train]\nval: [images/train]\n",
        "train: train.txt\nval: train.txt\n",
        "path: {root}\ntrain: images/train\nval: images/train\n",
        "path: /elsewhere/datasets/pets\ntrain: images/train\nvalid: ./images/train\n",
    ],
)
@pytest.mark.parametrize("names", ["names: {names}", "names: {{0: bird, 1: cat, 2: dog}}\nnc: 3"])
def test_data_yaml_in_every_spelling(tmp_path, description, names):
    place = yolo(tmp_path)
    (tmp_path / "train.txt").write_text("./images/train/a.png\nimages/train/b.png\n\nimages/train/c.png\n")
    place.write_text(description.format(root=tmp_path) + names.format(names=NAMES))
    for split in ("train", "val"):
        rows, labels = open_dataset(annotation_file(tmp_path, split))
        assert labels == NAMES
        assert [row["names"] for row in rows] == [["dog", "cat"], ["bird"], []]


def test_a_split_of_a_yolo_export_stands_for_itself(tmp_path):
    yolo_roboflow(tmp_path)
    assert annotation_file(tmp_path / "train") == annotation_file(tmp_path)
    assert len(open_dataset(tmp_path / "train")[0]) == 3


def test_yolo_without_data_yaml_takes_its_list_of_names(tmp_path):
    yolo(tmp_path).unlink()
    with pytest.raises(ValueError, match=r"neither data.yaml nor classes.txt"):
        open_dataset(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    assert open_dataset(tmp_path)[1] == NAMES
    assert find_split(tmp_path, "val") is None


def test_faults_of_yolo_labels_are_named_with_their_lines(tmp_path):
    place = yolo(tmp_path)
    labels = tmp_path / "labels" / "train"
    (labels / "a.txt").write_text("2 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n1 0.5 0.5\n1 0.5 0.5 1.4 0.2\n")
    (labels / "gone.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    found = kinds(place)
    assert "labels/train/a.txt line 2" in found["unknown classes"][0]
    assert "7" in found["unknown classes"][0]
    assert found["broken boxes"][0].startswith("labels/train/a.txt line 3: the line '1 0.5 0.5'")
    assert found["fractions outside"] == ["labels/train/a.txt line 4: 0.5, 0.5, 1.4, 0.2"]
    assert found["labels without pictures"] == ["labels/train/gone.txt"]
    with pytest.raises(ValueError, match=r"unknown classes, labels/train/a.txt line 2.*repair it"):
        open_dataset(place)


def test_pixels_in_place_of_fractions_are_an_error(tmp_path):
    place = yolo(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "labels" / "train" / f"{name}.txt").write_text("1 20 20 8 8\n")
    assert "pixels for fractions" in kinds(place)


def test_yolo_pictures_without_any_label_file_are_an_error(tmp_path):
    place = yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "elsewhere")
    assert "labels/train/a.txt" in kinds(place)["no label files"][0]
    with pytest.raises(ValueError, match="no label files"):
        open_dataset(place)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("train: images/train\n", "names"),
        ("train: images/train\nnames: [cat, dog]\nnc: 3\n", "has 2 names but nc is 3"),
        ("train: images/no\nnames: [cat]\n", "'images/no', which does not exist"),
        ("train: 7\nnames: [cat]\n", "has 7 for train"),
        ("names: [cat\n", "cannot be read as YAML"),
        ("- names: x\nnames\n", "cannot be read as YAML|holds a list|no annotations"),
    ],
)
def test_a_broken_data_yaml_is_one_sentence(tmp_path, text, why):
    place = yolo(tmp_path)
    place.write_text(text)
    for read in (open_dataset, check_dataset):
        with pytest.raises(ValueError, match=why) as caught:
            read(place)
        assert "\n" not in str(caught.value)


def test_pictures_outside_of_a_yolo_data_set_are_refused_unless_allowed(tmp_path):
    (tmp_path / "set").mkdir()
    place = yolo(tmp_path / "set")
    write_pictures(tmp_path / "other" / "images")
    place.write_text(f"train: ../other/images\nnames: {NAMES}\n")
    with pytest.raises(ValueError, match="--paths anywhere"):
        open_dataset(place)
    place.write_text(f"train: list.txt\nnames: {NAMES}\n")
    (tmp_path / "set" / "list.txt").write_text(f"{tmp_path}/other/images/a.png\nimages/train/b.png\n")
    assert "paths outside" in kinds(place)
    rows, _ = open_dataset(place, options=AnnotationOptions(paths="anywhere"))
    assert len(rows) == 2


def test_labelling_goes_through_a_data_set_whatever_its_annotations_are(tmp_path, caplog):
    place = yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_text("9 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.25 0.5\n")
    (tmp_path / "images" / "train" / "b.png").write_bytes(b"cut off")
    found = list(dataset_pictures(place))
    assert [each.row["names"] for each in found] == [["cat"], [], []]
    assert found[0].open().size == (64, 48)
    with pytest.raises(ValueError, match=r"b\.png"):
        found[1].open()
    assert "unknown classes" in caplog.text
    assert "unreadable files" in caplog.text


def test_pictures_whose_size_fractions_need_are_missed_in_evaluation_too(tmp_path):
    place = yolo(tmp_path)
    (tmp_path / "images" / "train" / "b.png").unlink()
    assert len(open_ground_truth(place).references) == 2
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/train/b.png\n")
    place.write_text(f"train: list.txt\nnames: {NAMES}\n")
    with pytest.raises(ValueError, match="missing files"):
        open_ground_truth(place)


def test_an_absent_val_of_data_yaml_is_a_remark_that_does_not_stop_training(tmp_path):
    yolo_roboflow(tmp_path)
    sets = read_data(DataArguments(data=str(tmp_path)))
    assert sets.val is None
    assert "'../valid/images' for val, which does not exist" in sets.remarks[0]
    assert sets.train.labels == NAMES


def test_fractions_of_a_turned_picture_are_those_of_the_upright_one(tmp_path):
    place = yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    # Stored lying, 80x40, and seen upright, 40x80.
    Image.new("RGB", (80, 40)).save(tmp_path / "images" / "train" / "b.png", exif=exif)
    row = open_dataset(place)[0][1]
    assert (row["width"], row["height"]) == row["image"].size == (40, 80)
    assert row["boxes"] == [[10, 20, 30, 60]]


def test_outlines_and_keypoints_become_boxes(tmp_path):
    place = yolo(tmp_path)
    place.write_text(f"train: images/train\nnames: {NAMES}\nkpt_shape: [2, 3]\n")
    labels = tmp_path / "labels" / "train"
    (labels / "a.txt").write_text("0 0.5 0.5 0.25 0.5 0.4 0.4 2 0.6 0.6 1\n")
    (labels / "b.txt").write_text("1 0.25 0.25 0.75 0.25 0.5 0.75\n")
    rows, _ = open_dataset(place)
    assert rows[0]["boxes"] == [[24, 12, 40, 36]]
    assert rows[1]["boxes"] == [[10, 20, 30, 60]]


def change(path, old, new):
    """Replace text of a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_difficult_objects_of_voc_neither_teach_nor_count_unless_kept(tmp_path):
    place = voc(tmp_path)
    change(tmp_path / "Annotations" / "a.xml", "<difficult>0", "<difficult>1")
    assert open_dataset(place)[0][0]["crowd"] == [True, True]
    assert kinds(place)["difficult boxes"] == ["Annotations/a.xml object 1", "Annotations/a.xml object 2"]
    assert open_dataset(place, options=AnnotationOptions(crowds="keep"))[0][0]["crowd"] == [False, False]
    assert "difficult boxes" not in kinds(place, crowds="keep")


def test_the_first_pixel_of_voc_is_one_unless_told(tmp_path):
    place = voc(tmp_path)
    rows, _ = open_dataset(place, options=AnnotationOptions(first_pixel="0"))
    assert rows[1]["boxes"] == [[11, 21, 30, 60]]
    change(tmp_path / "Annotations" / "a.xml", "<xmin>9<", "<xmin>0<")
    assert kinds(place)["pixels from zero"] == ["Annotations/a.xml object 1: 0, 13, 24, 36"]


def test_voc_splits_are_those_of_its_lists(tmp_path):
    place = voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b  1\n")
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets" / "Main" / "dog_train.txt").write_text("a  1\n")
    assert [row["names"] for row in open_dataset(annotation_file(place, "val"))[0]] == [["bird"]]
    assert len(open_dataset(f"{place}:trainval")[0]) == 2
    assert find_split(place, "test") is None
    with pytest.raises(ValueError, match=r"has no split minival; it has train, val"):
        open_dataset(f"{place}:minival")


def test_a_devkit_is_opened_by_its_year(tmp_path):
    (tmp_path / "VOCdevkit" / "VOC2007").mkdir(parents=True)
    voc(tmp_path / "VOCdevkit" / "VOC2007")
    assert len(open_dataset(tmp_path)[0]) == len(open_dataset(tmp_path / "VOCdevkit")[0]) == 3
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir()
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    with pytest.raises(ValueError, match=r"several data sets \(VOC2007, VOC2012\)"):
        open_dataset(tmp_path)


def test_voc_documents_as_tools_write_them(tmp_path):
    place = voc(tmp_path)
    # A name from another machine, a size of zero, and a file cut off.
    change(tmp_path / "Annotations" / "a.xml", "<filename>a.png", "<filename>C:\\photos\\IMG_1.JPG")
    change(tmp_path / "Annotations" / "b.xml", "<width>40</width><height>80", "<width>0</width><height>0")
    (tmp_path / "Annotations" / "c.xml").write_text("<annotation><object>")
    rows, _ = open_dataset(place)
    assert [row["boxes"][0] for row in rows] == [[8, 12, 24, 36], [10, 20, 30, 60]]
    assert kinds(place)["broken entries"][0].startswith("Annotations/c.xml: The XML cannot be read")


def test_entities_in_voc_documents_are_not_read(tmp_path):
    place = voc(tmp_path)
    for name in "abc":
        path = tmp_path / "Annotations" / f"{name}.xml"
        path.write_text('<!DOCTYPE x [<!ENTITY a "b">]>' + path.read_text())
    with pytest.raises(ValueError, match=r"no usable entries.*DOCTYPE"):
        open_dataset(place)


def test_faults_of_createml_are_named(tmp_path):
    createml(tmp_path)
    file = tmp_path / "train" / "_annotations.createml.json"
    rows = json.loads(file.read_text())
    rows[0]["annotations"][0]["coordinates"].pop("x")
    rows[0]["annotations"][1]["label"] = None
    rows.append({"image": "../../x.png", "annotations": []})
    file.write_text(json.dumps(rows))
    found = kinds(tmp_path)
    assert "'a.png' annotation 1" in found["broken boxes"][0]
    assert "'a.png' annotation 2" in found["unknown classes"][0]
    assert "entry 4" in found["paths outside"][0]


def test_shapes_of_labelme(tmp_path):
    labelme(tmp_path)
    shapes = [
        {"label": "cat", "shape_type": "circle", "points": [[20, 20], [23, 24]]},
        {"label": "cat", "shape_type": "line", "points": [[1, 1], [9, 9]]},
        {"label": "dog", "shape_type": "polygon", "points": [[1, 2], [9, 2], [5, "x"]]},
        {"label": "bird", "shape_type": "polygon", "points": [[1, 2], [9, 2], [5, 8]]},
    ]
    content = {"shapes": shapes, "imagePath": "..\\raw\\a.png", "imageWidth": 64, "imageHeight": 48}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "c.json").unlink()
    row = open_dataset(tmp_path)[0][0]
    assert (row["boxes"], row["names"]) == ([[15, 15, 25, 25], [1, 2, 9, 8]], ["cat", "bird"])
    found = kinds(tmp_path)
    assert found["shapes without extent"] == ["a.json shape 2: 'line'"]
    assert found["broken boxes"][0].startswith("a.json shape 3: its point")
    assert found["pictures without annotations"] == ["'c.png'"]


@pytest.mark.parametrize("form", [labelme, voc])
def test_annotations_in_sub_folders_are_those_of_the_pictures_beside_them(form, tmp_path):
    """Names may be equal in several folders, and some files lie above the others."""
    form(tmp_path)
    # Its list names the files as they were.
    shutil.rmtree(tmp_path / "ImageSets", ignore_errors=True)
    for kind in ("Annotations", "JPEGImages") if form is voc else (".",):
        for letter in "abc":
            folder = tmp_path / kind / ("." if letter == "a" else letter)
            folder.mkdir(exist_ok=True)
            for path in (tmp_path / kind).glob(f"{letter}.*"):
                new = folder / f"same{path.suffix}"
                path.rename(new)
                if new.suffix in (".json", ".xml"):
                    new.write_text(new.read_text().replace(f"{letter}.png", "same.png"))
    rows, labels = open_dataset(tmp_path)
    assert labels == NAMES
    found = {
        (row["width"], row["height"], row["image"].convert("RGB").getpixel((0, 0))[0]): row["names"] for row in rows
    }
    assert found == {(64, 48, 0): ["dog", "cat"], (40, 80, 40): ["bird"], (50, 50, 80): []}
