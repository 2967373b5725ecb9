"""Folders, paths and single entries as people have them: read alike on every path, and named where they are not."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from gdino_hf.cli import main
from gdino_hf.data.annotation_files import annotation_file, find_split, other_splits
from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.coco import read_coco
from gdino_hf.data.formats import open_dataset
from gdino_hf.data.odvg import odvg_names, read_odvg
from gdino_hf.evaluation.ground_truth import coco_ground_truth
from gdino_hf.evaluation.open_ground_truth import open_ground_truth
from gdino_hf.model.picture_pixels import load_image
from gdino_hf.training.arguments import DataArguments
from gdino_hf.training.fine_tuning import read_data

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def coco(names=("1.png", "2.png"), annotations=None, categories=CATEGORIES):
    """Return a COCO file's content with one box in each picture."""
    images = [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names, 1)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [4, 3, 10, 6]} for n in range(1, len(names) + 1)]
    return {"images": images, "categories": categories, "annotations": annotations or boxes}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def export(root, *splits, **more):
    """Write an export's root: a folder for each split with its annotations beside the pictures."""
    for split in splits:
        for name in ("1.png", "2.png"):
            picture(root / split / name)
        write(root / split / "_annotations.coco.json", coco(**more))
    return root


def kinds(report):
    return {finding.kind for finding in report.findings}


@pytest.mark.parametrize(
    ("splits", "evaluated"),
    [
        (("train", "valid", "test"), "valid"),
        (("train", "test"), "test"),
        (("train",), "train"),
        (("valid",), "valid"),
    ],
)
def test_an_export_is_read_by_its_root_and_by_each_of_its_folders(tmp_path, splits, evaluated):
    root = export(tmp_path / "export", *splits)
    assert len(open_ground_truth(root).references) == 2
    assert annotation_file(root, "val", "test", "train").parent.name == evaluated
    assert check_dataset(root).path.parent.name == splits[0]
    for place in (root, root / splits[0]):
        assert len(open_dataset(place)[0]) == 2
        assert check_dataset(place).errors == []
        assert len(open_ground_truth(place).references) == 2
    if "train" in splits:
        found = [
            [split.path for split in read_data(DataArguments(data=str(place)))] for place in (root, root / "train")
        ]
        assert found[0] == found[1]


def test_a_file_for_one_split_and_folders_for_others_are_found_alike(tmp_path):
    root = export(tmp_path / "export", "valid")
    picture(root / "images" / "1.png")
    write(root / "train.json", coco(["1.png"]))
    assert annotation_file(root) == root / "train.json"
    assert annotation_file(root, "val") == find_split(root, "val") == root / "valid" / "_annotations.coco.json"
    assert other_splits(root / "train.json") == [root / "valid" / "_annotations.coco.json"]


def test_cocos_own_folders_are_found(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / f"{split}2017" / "1.png")
        write(tmp_path / "annotations" / f"instances_{split}2017.json", coco(["1.png"]))
        write(tmp_path / "annotations" / f"person_keypoints_{split}2017.json", coco(["1.png"]))
    file = tmp_path / "annotations" / "instances_train2017.json"
    assert find_split(file, "val") == file.with_name("instances_val2017.json")
    assert check_dataset(file).errors == []
    with pytest.raises(ValueError, match="several annotation files"):
        open_dataset(tmp_path)


def test_photographs_lie_in_folders_named_like_the_file_too(tmp_path):
    for place in ("images/1.png", "2.png", "train/3.png", "images/train/4.png"):
        picture(tmp_path / place)
    path = write(tmp_path / "train.json", coco(["1.png", "2.png", "3.png", "4.png"]))
    assert len(read_coco(path)) == 4
    assert check_dataset(path).errors == []
    line = {"width": 40, "height": 30, "detection": {"instances": []}}
    lines = [json.dumps({**line, "filename": f"{n}.png"}) for n in (1, 2, 3, 4)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert len(read_odvg(tmp_path / "train.jsonl")) == 4


def test_a_split_with_several_files_is_named_and_does_not_stop_training(tmp_path):
    root = export(tmp_path / "export", "train", "test")
    write(root / "test" / "more.json", coco())
    sets = read_data(DataArguments(data=str(root)))
    assert sets.test is None
    assert "more.json" in sets.remarks[0]
    assert "--test none" in sets.remarks[0]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("_annotations.csv", "filename,width,height,class,xmin,ymin,xmax,ymax", "CSV"),
        ("train/boxes.tfrecord", "", "TFRecord"),
    ],
)
def test_other_formats_are_recognized_and_told_what_to_do(tmp_path, name, content, what, capsys):
    file = tmp_path / "set" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    for read in (open_dataset, check_dataset, open_ground_truth):
        for place in (tmp_path / "set", file):
            with pytest.raises(ValueError, match=rf"holds {what} annotations.*export them as COCO"):
                read(place)
    for place in (tmp_path / "set", file):
        assert main(["train", str(place)]) == main(["eval", str(place)]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert [what in line for line in errors if "error:" in line] == [True, True]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("labels/a.txt", "0 0.5 0.5 0.1 0.2", "YOLO"),
        ("Annotations/a.xml", "<annotation><filename>a.jpg</filename></annotation>", "Pascal VOC"),
        ("a.json", '{"version": "5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg"}', "LabelMe"),
    ],
)
def test_the_annotations_of_one_picture_are_told_from_a_data_set(tmp_path, name, content, what):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    for read in (open_dataset, check_dataset, open_ground_truth):
        with pytest.raises(ValueError, match=rf"{what} annotations of one picture; give the folder"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        "1.png",
        {},
        {"id": 9},
        {"id": 9, "file_name": None},
        {"id": 9, "file_name": " "},
        {"file_name": "1.png"},
        {"id": None, "file_name": "1.png"},
        {"id": [1], "file_name": "1.png"},
    ],
)
def test_one_broken_image_entry_is_left_out_with_a_count(tmp_path, entry, caplog):
    content = coco()
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    content["images"].insert(1, entry)
    path = write(tmp_path / "train.json", content)
    with caplog.at_level(logging.WARNING):
        assert len(read_coco(path)) == len(coco_ground_truth(path).references) == 2
    assert "broken entries: 1 " in caplog.text
    assert "broken entries: 1 " in str(check_dataset(path))
    assert check_dataset(path).errors == []
    assert len(list(read_coco(path, streaming=True))) == 2


def test_only_broken_image_entries_are_an_error(tmp_path):
    path = write(tmp_path / "train.json", {**coco(), "images": [{"id": 1}, {}], "annotations": []})
    with pytest.raises(ValueError, match="no usable entries"):
        read_coco(path)
    assert "no usable entries" in kinds(check_dataset(path))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"area": "much"}, "broken areas"),
        ({"area": float("nan")}, "broken areas"),
        ({"area": [1]}, "broken areas"),
        ({"bbox": [1, 2, None, 4]}, "broken boxes"),
        ({"bbox": [1, 2, 3]}, "broken boxes"),
        ({"bbox": "1 2 3 4"}, "broken boxes"),
        ({"category_id": 99}, "few unknown classes"),
        ({"category_id": None}, "few unknown classes"),
        ({"image_id": 99}, "few unknown images"),
        ({"image_id": None}, "few unknown images"),
    ],
)
def test_one_bad_annotation_of_many_stops_nothing(tmp_path, change, kind):
    picture(tmp_path / "1.png")
    boxes = [{"id": n, "image_id": 1, "category_id": 1, "bbox": [n % 20, 3, 10, 6]} for n in range(200)]
    boxes[7] |= change
    path = write(tmp_path / "train.json", coco(["1.png"], boxes))
    report = check_dataset(path)
    assert kind in kinds(report)
    assert report.errors == []
    kept = 200 if kind == "broken areas" else 199
    assert len(read_coco(path)[0]["boxes"]) == len(coco_ground_truth(path).references[1]["boxes"]) == kept


@pytest.mark.parametrize("size", [("40", "30"), ("40.0", 30.0), (0, 0), (-4, 3), ("wide", 30), (None, 30), (40.5, 30)])
def test_sizes_as_text_are_read_and_unusable_ones_are_the_pictures(tmp_path, size):
    picture(tmp_path / "1.png")
    content = coco(["1.png"])
    content["images"][0] |= {"width": size[0], "height": size[1]}
    path = write(tmp_path / "train.json", content)
    row = read_coco(path)[0]
    assert (row["width"], row["height"], row["boxes"]) == (40, 30, [[4, 3, 14, 9]])
    assert check_dataset(path).errors == []


def test_an_entry_listed_twice_alike_is_taken_once(tmp_path):
    picture(tmp_path / "1.png")
    content = coco(["1.png"], categories=[*CATEGORIES, CATEGORIES[0]])
    content["images"] *= 2
    path = write(tmp_path / "train.json", content)
    assert len(read_coco(path)) == len(coco_ground_truth(path).references) == 1
    assert kinds(check_dataset(path)) == {"repeated entries", "empty classes"}


def line(**change):
    instances = [{"bbox": [1, 1, 5, 5], "label": 0, "category": "cat"}]
    return json.dumps({"filename": "1.png", "width": 40, "height": 30, "detection": {"instances": instances}} | change)


@pytest.mark.parametrize("broken", ["{", "[]", line(filename=None), line(filename=7), line(detection=[])])
def test_one_broken_line_is_left_out_with_a_count(tmp_path, broken, caplog):
    picture(tmp_path / "1.png")
    path = tmp_path / "train.jsonl"
    path.write_text(f"{line()}\n{broken}\n{line(width='40', height='30')}\n")
    with caplog.at_level(logging.WARNING):
        assert read_odvg(path)["image_id"] == [0, 2]
    assert "broken entries: 1 " in caplog.text
    assert check_dataset(path).errors == []
    path.write_text(broken if broken not in ("{", "[]") else f"{line(filename=3)}\n{broken}")
    with pytest.raises(ValueError, match="Line 1"):
        read_odvg(path)
    assert "no usable entries" in kinds(check_dataset(path))


def test_a_name_of_two_label_numbers_is_one_label(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "train.jsonl").write_text(line())
    (tmp_path / "label_map.json").write_text('{"0": "cat", "1": "dog", "2": "Cat "}')
    assert odvg_names(tmp_path / "train.jsonl") == ["cat", "dog"]


@pytest.mark.parametrize("form", ["absolute", "up", "inner", "backslash"])
@pytest.mark.parametrize("kind", ["coco", "odvg"])
def test_a_path_that_leaves_the_folder_is_refused_unless_allowed(tmp_path, form, kind, capsys):
    outside = tmp_path / "private.png"
    picture(outside)
    root = tmp_path / "set"
    picture(root / "inside.png")
    (root / "sub").mkdir()
    name = {
        "absolute": str(outside),
        "up": "../private.png",
        "inner": "sub/../../private.png",
        "backslash": "..\\private.png",
    }[form]
    if kind == "coco":
        path = write(root / "train.json", coco(["inside.png", name]))
    else:
        path = root / "train.jsonl"
        path.write_text(f"{line(filename='inside.png')}\n{line(filename=name)}\n")
    for read in (open_dataset, open_ground_truth):
        with pytest.raises(ValueError, match="--paths anywhere"):
            read(path)
    assert "paths outside" in [finding.kind for finding in check_dataset(path).errors]
    assert main(["train", str(path)]) == main(["eval", str(path)]) == 2
    assert capsys.readouterr().err.count("--paths anywhere") == 2
    assert len(open_dataset(path, options=AnnotationOptions(unreadable="skip"))[0]) == 1
    options = AnnotationOptions(paths="anywhere")
    assert len(open_dataset(path, options=options)[0]) == 2
    assert len(open_ground_truth(path, options=options).references) == 2
    assert len(read_data(DataArguments(data=str(path), paths="anywhere")).train.rows) == 2


def test_a_folder_that_the_user_names_belongs_to_the_data_set(tmp_path):
    picture(tmp_path / "photographs" / "1.png")
    path = write(tmp_path / "set" / "train.json", coco([str(tmp_path / "photographs" / "1.png")]))
    assert len(read_coco(path, tmp_path / "photographs")) == 1
    with pytest.raises(ValueError, match="paths outside"):
        read_coco(path)


def test_paths_that_stay_inside_and_links_are_accepted(tmp_path):
    picture(tmp_path / "elsewhere" / "2.png")
    root = tmp_path / "set"
    picture(root / "images" / "1.png")
    os.symlink(tmp_path / "elsewhere" / "2.png", root / "images" / "2.png")
    names = ["images/1.png", "2.png", "sub/../1.png", str(root / "images" / "1.png"), "images\\1.png"]
    content = coco(names)
    assert len(read_coco(write(root / "train.json", content))) == 5


def group(used):
    """Return categories of which one only groups the others, and a box of one category in each picture."""
    parents = {"furniture": "none", "chair": "furniture", "sofa": "furniture"}
    categories = [{"id": n, "name": name, "supercategory": parents[name]} for n, name in enumerate(parents)]
    boxes = [{"id": n, "image_id": n, "category_id": used, "bbox": [4, 3, 10, 6]} for n in (1, 2)]
    return {"categories": categories, "annotations": boxes}


@pytest.mark.parametrize("splits", [("train", "valid"), ("valid", "train")])
def test_a_class_with_boxes_in_one_split_only_stays_a_label_of_the_others(tmp_path, splits):
    root = export(tmp_path / "export", splits[0], **group(used=0))
    export(root, splits[1], **group(used=1))
    names = ["furniture", "chair", "sofa"]
    for split in splits:
        assert open_dataset(root / split)[1] == open_ground_truth(root / split).labels == names
        assert "grouping classes" not in kinds(check_dataset(root / split))
    sets = read_data(DataArguments(data=str(root)))
    assert sets.val is not None
    assert sets.train.labels == sets.val.labels == sets.val.truth.labels == names
    # Splits of one run that lie in different places are compared as well.
    apart = [export(tmp_path / "a", splits[0], **group(used=0)), export(tmp_path / "b", splits[1], **group(used=1))]
    places = {split: str(place / split) for split, place in zip(splits, apart, strict=True)}
    sets = read_data(DataArguments(data=places["train"], val=places["valid"]))
    assert sets.val is not None
    assert sets.train.labels == sets.val.labels == sets.val.truth.labels == names


def test_a_group_without_boxes_in_any_split_is_left_out_of_all(tmp_path):
    root = export(tmp_path / "export", "train", "valid", **group(used=1))
    sets = read_data(DataArguments(data=str(root)))
    assert [split.labels for split in sets] == [["chair", "sofa"]] * 2
    assert any("furniture" in remark for remark in sets.train.remarks)


def test_training_reads_the_header_of_each_picture_once(tmp_path, monkeypatch):
    from gdino_hf.data import frames

    opened = []
    read = frames.picture_files.read_header
    monkeypatch.setattr(
        frames.picture_files, "read_header", lambda path, name: opened.append(str(path)) or read(path, name=name)
    )
    root = export(tmp_path / "export", "train", "valid", "test")
    sets = read_data(DataArguments(data=str(root)))
    assert [len(split.truth.references) for split in sets] == [2, 2, 2]
    train = str(root / "train")
    assert len({path for path in opened if not path.startswith(train)}) == 4
    assert len([path for path in opened if not path.startswith(train)]) == 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_a_picture_of_a_row_is_turned_once_whatever_reads_it_next(tmp_path, tiny_processor, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("RGB", (40, 30))
    stored.paste((255, 255, 255), (0, 0, 20, 15))
    stored.save(tmp_path / f"1.{kind}", exif=exif)
    content = coco([f"1.{kind}"])
    del content["images"][0]["width"]
    picture = read_coco(write(tmp_path / "train.json", content))[0]["image"]
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"1.{kind}"))
    assert picture.size == load_image(picture).size == upright.size
    again = np.asarray(load_image(load_image(picture)), dtype=int)
    assert np.abs(again - np.asarray(upright.convert("RGB"), dtype=int)).max() < 60


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png", exif=exif)
    content = (tmp_path / "1.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    moved = content[:start] + content[end:last] + content[start:end] + content[last:]
    assert len(moved) == len(content)
    (tmp_path / "1.png").write_bytes(moved)
    row = read_coco(write(tmp_path / "train.json", coco(["1.png"])))[0]
    assert row["image"].size == (row["width"], row["height"]) == (30, 40)


def test_a_damaged_picture_is_named_by_whatever_reads_it(tmp_path):
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    path = write(tmp_path / "train.json", coco())
    lines = [line(filename="1.png"), line(filename="2.png")]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    whole = (tmp_path / "2.png").read_bytes()
    # Cut in the pixels, which only decoding notices.
    (tmp_path / "2.png").write_bytes(whole[:60])
    for file in (path, tmp_path / "lines.jsonl"):
        for streaming in (False, True):
            rows, _ = open_dataset(file, streaming=streaming)
            with pytest.raises(ValueError, match=r"2\.png.*cannot be decoded"):
                list(rows)
    for content in (b"no picture", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"):
        (tmp_path / "2.png").write_bytes(content)
        for file in (path, tmp_path / "lines.jsonl"):
            with pytest.raises(ValueError, match=r"2\.png"):
                open_dataset(file)
            with pytest.raises(ValueError, match=r"2\.png"):
                list(open_dataset(file, streaming=True)[0])
            assert "unreadable files" in kinds(check_dataset(file))


def test_rows_join_with_those_of_the_stock_image_column(tmp_path):
    import datasets

    picture(tmp_path / "1.png")
    rows = read_coco(write(tmp_path / "train.json", coco(["1.png"])))
    stock = rows.cast_column("image", datasets.Image())
    assert rows.features == stock.features
    assert len(datasets.concatenate_datasets([rows, stock])) == 2
    assert rows.select([0]).map(lambda row: {"image_id": row["image_id"] + 1})[0]["image"].size == (40, 30)
    rows.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")[0]["image"].size == (40, 30)


@pytest.mark.parametrize("size", [{"width": None}, {"width": "wide"}, {"width": 0, "height": 0}, {"height": "30"}])
def test_sizes_of_lines_may_be_missing_or_text(tmp_path, size):
    picture(tmp_path / "1.png")
    path = tmp_path / "train.jsonl"
    path.write_text(line(**size))
    row = read_odvg(path)[0]
    assert (row["width"], row["height"], row["boxes"]) == (40, 30, [[1, 1, 5, 5]])
    assert check_dataset(path).errors == []
    assert open_ground_truth(path).sizes == {0: (40, 30)}


def test_normalized_boxes_of_lines_are_named(tmp_path):
    picture(tmp_path / "1.png")
    path = tmp_path / "train.jsonl"
    instances = [{"bbox": [0.1, 0.2, 0.5, 0.9], "label": 0, "category": "cat"}]
    path.write_text(line(detection={"instances": instances}))
    assert "normalized boxes" in kinds(check_dataset(path))
    for read in (open_dataset, open_ground_truth):
        with pytest.raises(ValueError, match="probably normalized"):
            read(path)
