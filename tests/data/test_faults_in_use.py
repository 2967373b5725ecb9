"""Faults that real annotation files have: crowds, EXIF orientations, segments, ids, sizes, names and folders."""

import json
import logging

import numpy as np
import pytest
from PIL import Image, ImageOps

from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.coco import category_names, read_coco
from gdino_hf.data.coco_content import id_key
from gdino_hf.data.formats import annotation_file, open_dataset
from gdino_hf.data.frames import turn_box
from gdino_hf.data.odvg import read_odvg
from gdino_hf.data.segments import segment_box
from gdino_hf.evaluation.coco_results import coco_predictions
from gdino_hf.evaluation.ground_truth import coco_ground_truth
from gdino_hf.evaluation.open_ground_truth import open_ground_truth

ORIENTATION = 0x0112


def save(path, size=(40, 30), orientation=1):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, exif=exif)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a COCO file of pictures of 40 x 30 pixels, with two of them by default."""

    def write(annotations, images=None, categories=None):
        if images is None:
            images = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in (1, 2)]
        for image in images:
            if not (tmp_path / image["file_name"]).exists():
                save(tmp_path / image["file_name"])
        path = tmp_path / "train.json"
        categories = categories or [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
        return path

    return write


def box(image=1, bbox=(4, 3, 10, 6), category=1, **more):
    return {"id": image, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def kinds(report):
    return {finding.kind for finding in report.findings}


def test_a_file_of_crowds_only_is_an_error_and_can_be_kept(write):
    path = write([box(1, iscrowd=1), box(2, iscrowd=1)])
    report = check_dataset(path)
    assert {"only crowds", "images of crowds", "classes of crowds"} <= kinds(report)
    assert report.boxes_per_name["cat"] == 0
    with pytest.raises(ValueError, match="--crowds keep"):
        report.raise_for_errors()
    with pytest.raises(ValueError, match="--crowds keep"):
        read_coco(path)
    keep = AnnotationOptions(crowds="keep")
    assert check_dataset(path, options=keep).boxes_per_name["cat"] == 2
    assert read_coco(path, options=keep)["crowd"] == [[False], [False]]
    assert coco_ground_truth(path, options=keep).references[1]["crowd"].tolist() == [False]


def test_a_name_of_broken_boxes_alone_is_no_crowd(write):
    path = write([box(1), box(2, (1, None, 3, 4), category=2)])
    assert kinds(check_dataset(path)) == {"broken boxes", "empty classes", "images without boxes"}
    # Beside a broken box, a crowd is one.
    path = write([box(1), box(2, (1, None, 3, 4), category=2), box(2, category=2, iscrowd=1)])
    assert {"broken boxes", "classes of crowds"} <= kinds(check_dataset(path))


def test_what_is_skipped_by_choice_is_a_warning(write, tmp_path):
    path = write([box(1), box(2, category=2)])
    (tmp_path / "images" / "2.jpg" if (tmp_path / "images").is_dir() else tmp_path / "2.jpg").unlink()
    assert [finding.kind for finding in check_dataset(path).errors] == ["missing files"]
    report = check_dataset(path, options=AnnotationOptions(unreadable="skip"))
    assert report.errors == []
    assert "warning: missing files: 1 image" in str(report)


def test_pictures_and_names_of_crowds_are_named(write):
    report = check_dataset(write([box(1), box(2, category=2, iscrowd=1)]))
    assert "images of crowds: 1 " in str(report)
    assert "2.jpg" in str(report)
    assert "classes of crowds: 1 " in str(report)
    assert report.boxes_per_name == {"cat": 1, "dog": 0}
    report.raise_for_errors()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_the_picture_does(orientation):
    pixels = np.zeros((30, 40), dtype=np.uint8)
    pixels[3:9, 4:14] = 255
    picture = Image.fromarray(pixels)
    picture.getexif()[ORIENTATION] = orientation
    assert turn_box((4, 3, 14, 9), (40, 30), orientation) == ImageOps.exif_transpose(picture).getbbox()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_in_stored_pixels_are_turned_in_training_and_evaluation(write, tmp_path, orientation, caplog):
    save(tmp_path / "1.jpg", orientation=orientation)
    path = write([box()], images=[{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}])
    expected = list(turn_box((4, 3, 14, 9), (40, 30), orientation))
    with caplog.at_level(logging.WARNING):
        row = read_coco(path)[0]
    assert "boxes turned" in caplog.text
    assert row["image"].size == (row["width"], row["height"]) == (30, 40)
    assert row["boxes"] == [expected]
    assert coco_ground_truth(path).references[1]["boxes"].tolist() == [expected]
    assert kinds(check_dataset(path)) == {"boxes turned", "empty classes"}


def test_the_photograph_of_the_report_gets_its_box(write, tmp_path):
    save(tmp_path / "1.jpg", size=(300, 451), orientation=6)
    # Taken as pixels of the upright picture, this box would be .33 .54 .66 .93.
    bbox = (0, 22, 298, 428)
    row = read_coco(write([box(bbox=bbox)], images=[{"id": 1, "file_name": "1.jpg", "width": 300, "height": 451}]))[0]
    x1, y1, x2, y2 = row["boxes"][0]
    target = [(x1 + x2) / 2 / 451, (y1 + y2) / 2 / 300, (x2 - x1) / 451, (y2 - y1) / 300]
    assert target == pytest.approx([0.48, 0.50, 0.95, 0.99], abs=0.005)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_an_orientation_that_sizes_do_not_show_follows_the_option(write, tmp_path, orientation):
    save(tmp_path / "1.jpg", orientation=orientation)
    path = write([box()], images=[{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}])
    assert read_coco(path)[0]["boxes"] == [[4, 3, 14, 9]]
    assert "unclear orientations" in kinds(check_dataset(path))
    stored = AnnotationOptions(boxes_follow="stored")
    turned = list(turn_box((4, 3, 14, 9), (40, 30), orientation))
    assert read_coco(path, options=stored)[0]["boxes"] == [turned]
    assert coco_ground_truth(path, options=stored).references[1]["boxes"].tolist() == [turned]


def test_another_size_of_the_same_proportion_is_scaled_or_refused(write):
    path = write([box(bbox=(8, 6, 20, 12))], images=[{"id": 1, "file_name": "1.jpg", "width": 80, "height": 60}])
    for read in (read_coco, coco_ground_truth):
        with pytest.raises(ValueError, match="--sizes scale"):
            read(path)
    scale = AnnotationOptions(sizes="scale")
    assert read_coco(path, options=scale)[0]["boxes"] == [[4, 3, 14, 9]]
    reference = coco_ground_truth(path, options=scale).references[1]
    assert reference["boxes"].tolist() == [[4, 3, 14, 9]]
    assert reference["area"].tolist() == [60]
    with pytest.raises(ValueError, match="wrong sizes"):
        read_coco(write([box()], images=[{"id": 1, "file_name": "1.jpg", "width": 80, "height": 50}]), options=scale)


def test_odvg_boxes_are_turned_too(tmp_path):
    save(tmp_path / "a.jpg", orientation=6)
    line = {"filename": "a.jpg", "width": 40, "height": 30}
    line["detection"] = {"instances": [{"bbox": [4, 3, 14, 9], "label": 0, "category": "cat"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    row = read_odvg(tmp_path / "train.jsonl")[0]
    assert (row["width"], row["height"], row["boxes"]) == (30, 40, [list(turn_box((4, 3, 14, 9), (40, 30), 6))])


def masks():
    rng = np.random.default_rng(0)
    for place in range(12):
        mask = np.zeros((30, 40), dtype=np.uint8)
        x, y = rng.integers(0, 20, 2)
        mask[y : y + rng.integers(1, 10), x : x + rng.integers(1, 20)] = 1
        mask &= (rng.random(mask.shape) < 0.9).astype(np.uint8) if place % 2 else mask
        if mask.any():
            yield mask


def test_boxes_of_masks_are_pycocotools_bounds():
    mask_tools = pytest.importorskip("pycocotools.mask")
    for mask in masks():
        packed = mask_tools.encode(np.asfortranarray(mask))
        x, y, width, height = mask_tools.toBbox(packed).tolist()
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        assert segment_box(text) == (x, y, x + width, y + height)
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        runs = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
        assert segment_box({"size": [30, 40], "counts": runs}) == (x, y, x + width, y + height)


def test_boxes_of_polygons_are_pycocotools_bounds():
    mask_tools = pytest.importorskip("pycocotools.mask")
    for polygon in ([4, 3, 14, 3, 14, 9, 4, 9], [5, 20, 30, 2, 11, 28]):
        x, y, width, height = mask_tools.toBbox(mask_tools.frPyObjects([polygon], 30, 40))[0].tolist()
        assert segment_box([polygon]) == pytest.approx((x, y, x + width, y + height), abs=1)


@pytest.mark.parametrize(
    "annotation",
    [
        {"bbox": []},
        {"bbox": None},
        {},
        {"bbox": [0, 0, 0, 0]},
        {"bbox": [None, None, None, None]},
        {"bbox": [4, 3, None, 6]},
    ],
)
def test_annotations_without_a_box_take_it_from_the_segment(write, annotation):
    polygon = {"image_id": 1, "category_id": 1, "segmentation": [[4, 3, 14, 3, 14, 9, 4, 9]], **annotation}
    mask = {"size": [30, 40], "counts": [3 + 30 * 4, 6, 24, 6, 30 * 40 - 159]}
    coded = {"image_id": 2, "category_id": 1, "segmentation": mask, **annotation}
    path = write([polygon, coded])
    assert read_coco(path)["boxes"] == [[[4, 3, 14, 9]], [[4, 3, 6, 9]]]
    truth = coco_ground_truth(path)
    assert [truth.references[n]["boxes"].tolist() for n in (1, 2)] == [[[4, 3, 14, 9]], [[4, 3, 6, 9]]]
    assert check_dataset(path).boxes_per_name["cat"] == 2


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("given", [{}, {"width": None, "height": 40}, {"width": "0", "height": 30}])
def test_without_a_size_masks_tell_which_way_up_a_picture_was_annotated(tmp_path, given, orientation, crowd):
    """Some tools write no width and height, or zeros; their masks are those of the stored picture."""
    save(tmp_path / "a.jpg", orientation=orientation)
    mask = {"size": [30, 40], "counts": [3 + 30 * 4, 6, 24, 6, 30 * 40 - 159]}
    boxes = [{"segmentation": mask, "iscrowd": crowd}, {"bbox": [10, 10, 8, 6]}]
    content = {
        "images": [{"id": "p", "file_name": "a.jpg", **given}],
        "annotations": [{"id": n, "image_id": "p", "category_id": "c", **more} for n, more in enumerate(boxes)],
        "categories": [{"id": "c", "name": "cat"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    turned = orientation if orientation > 4 else 1
    expected = [list(turn_box(each, (40, 30), turned)) for each in ((4, 3, 6, 9), (10, 10, 18, 16))]
    row = read_coco(tmp_path / "train.json")[0]
    assert row["boxes"] == expected
    assert row["crowd"] == [bool(crowd), False]
    truth = coco_ground_truth(tmp_path / "train.json")
    assert truth.references["p"]["boxes"].tolist() == expected
    assert ("boxes turned" in str(check_dataset(tmp_path / "train.json"))) == (orientation > 4)


def test_a_mask_of_the_other_side_first_gives_no_box(write):
    mask = {"size": [40, 30], "counts": [3 + 40 * 4, 6, 34, 6, 30 * 40 - 209]}
    path = write([box(2), {"image_id": 1, "category_id": 1, "segmentation": mask}])
    assert read_coco(path)["boxes"][0] == []
    assert "its mask is of 30x40 pixels, but its image of 40x30" in str(check_dataset(path))


@pytest.mark.parametrize(
    "segment", [[["a", 1]], {"size": [1]}, {"size": [2, 2], "counts": [9]}, {"size": [2, 2], "counts": "~"}]
)
def test_a_broken_segment_is_left_out_with_a_count(write, segment):
    path = write([box(2), {"image_id": 1, "category_id": 1, "segmentation": segment}])
    assert read_coco(path)["boxes"][0] == []
    assert "broken boxes: 1 " in str(check_dataset(path))


def test_text_ids_and_missing_sizes_are_accepted_alike(write):
    images = [{"id": name, "file_name": f"{name}.jpg"} for name in ("left", "7")]
    categories = [{"id": "c", "name": "cat"}, {"id": "2", "name": "dog"}]
    annotations = [
        {"image_id": "left", "category_id": "c", "bbox": [4, 3, 10, 6]},
        {"image_id": 7, "category_id": 2, "bbox": ["4", "3", "10", "6.0"]},
    ]
    path = write(annotations, images, categories)
    rows = read_coco(path)
    assert rows["image_id"] == ["left", "7"]
    assert rows["names"] == [["cat"], ["dog"]]
    assert (rows["width"], rows["height"]) == ([40, 40], [30, 30])
    truth = coco_ground_truth(path)
    assert sorted(truth.references) == ["7", "left"]
    assert truth.labels == category_names(path) == ["dog", "cat"]
    assert check_dataset(path).errors == []
    results = [{"image_id": 7, "category_id": "2", "bbox": [4, 3, 10, 6], "score": 0.5}]
    assert [len(image["boxes"]) for image in coco_predictions(results, truth).images] == [0, 1]
    assert id_key("07") == "07"


def test_predictions_of_unknown_categories_are_named(write, caplog):
    truth = coco_ground_truth(write([box()]))
    known = {"image_id": 1, "category_id": 1, "bbox": [4, 3, 10, 6], "score": 0.5}
    with caplog.at_level(logging.WARNING):
        coco_predictions([known, {**known, "category_id": 91}], truth)
    assert "1 of 2 detections" in caplog.text
    assert "91" in caplog.text
    with pytest.raises(ValueError, match="nothing can be scored"):
        coco_predictions([{**known, "category_id": 0}], truth)


def test_more_boxes_than_queries_are_named(write):
    path = write([box() for _ in range(5)])
    assert "5 boxes, 4 queries" in str(check_dataset(path, num_queries=4))
    assert "more boxes than queries" not in kinds(check_dataset(path))


def test_normalized_boxes_are_named_with_the_remedy(write):
    boxes = [(1, (0.1, 0.2, 0.3, 0.4)), (2, (0, 0, 1, 1))]
    # Wherever the box of a whole picture stands, whose numbers are no fractions.
    for order in (boxes, boxes[::-1]):
        path = write([box(*given) for given in order])
        for read in (read_coco, coco_ground_truth):
            with pytest.raises(ValueError, match="probably normalized; multiply"):
                read(path)
        assert "normalized boxes" in kinds(check_dataset(path))


def test_a_class_that_only_groups_others_is_left_out_unless_asked_for(write):
    names = ["furniture", "chair", "sofa", "table"]
    categories = [
        {"id": n, "name": name, "supercategory": "furniture" if n else "none"} for n, name in enumerate(names)
    ]
    path = write([box(1, category=2), box(2, category=1)], categories=categories)
    report = check_dataset(path)
    assert "grouping classes" in str(report)
    assert set(report.boxes_per_name) == set(names[1:])
    assert open_dataset(path)[1] == coco_ground_truth(path).labels == names[1:]
    keep = AnnotationOptions(groups="keep")
    assert open_dataset(path, options=keep)[1] == coco_ground_truth(path, options=keep).labels == names
    used = write([box(1, category=0), box(2, category=1)], categories=categories)
    assert category_names(used) == names


def test_a_name_under_two_ids_is_one_label(write):
    categories = [{"id": 1, "name": "cat"}, {"id": 5, "name": "Cat"}, {"id": 7, "name": "dog"}]
    path = write([box(1), box(2, category=5)], categories=categories)
    truth = coco_ground_truth(path)
    assert truth.labels == open_dataset(path)[1] == ["cat", "dog"]
    assert truth.references[2]["labels"].tolist() == [0]
    results = [{"image_id": 1, "category_id": 5, "bbox": [4, 3, 10, 6], "score": 0.5}]
    assert coco_predictions(results, truth).images[0]["labels"].tolist() == [0]


def test_photographs_in_several_folders_are_found_file_by_file(write, tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in (1, 2, 3)]
    path = write([box()], images)
    for number, folder in ((1, "images"), (2, "train")):
        (tmp_path / folder).mkdir()
        (tmp_path / f"{number}.jpg").rename(tmp_path / folder / f"{number}.jpg")
    assert len(read_coco(path)) == 3
    assert check_dataset(path).errors == []
    assert all(Image.open(row["image"]) for row in coco_ground_truth(path).rows)


def test_missing_photographs_can_be_skipped(write, tmp_path, caplog):
    path = write([box(1), box(2)])
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(ValueError, match=r"2\.jpg.*--unreadable skip"):
        read_coco(path)
    with caplog.at_level(logging.WARNING):
        assert len(read_coco(path, options=AnnotationOptions(unreadable="skip"))) == 1
    assert "missing files: 1 " in caplog.text


def test_one_bad_box_does_not_stop_the_others(write, caplog):
    path = write([box(1, ("4", "3", "10", "6")), box(2, (1, None, 2, 3)), box(2)])
    with caplog.at_level(logging.WARNING):
        assert read_coco(path)["boxes"] == [[[4, 3, 14, 9]], [[4, 3, 14, 9]]]
    assert "broken boxes: 1 " in caplog.text


def test_an_export_is_opened_by_its_root_or_its_split(write, tmp_path):
    path = write([box()])
    for split in ("train", "valid"):
        (tmp_path / "export" / split).mkdir(parents=True)
        (tmp_path / "export" / split / "_annotations.coco.json").write_text(path.read_text())
        for number in (1, 2):
            save(tmp_path / "export" / split / f"{number}.jpg")
    root = tmp_path / "export"
    assert annotation_file(root).parent.name == "train"
    assert annotation_file(root, "val").parent.name == "valid"
    assert len(open_dataset(root)[0]) == len(open_dataset(root / "train")[0]) == 2
    assert check_dataset(root).path == check_dataset(root / "train").path


def test_a_yolo_export_is_recognized(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [cat]")
    (tmp_path / "labels").mkdir()
    with pytest.raises(ValueError, match="has no pictures, though it is a YOLO folder"):
        open_dataset(tmp_path)


def test_stored_predictions_of_turned_pictures_that_are_absent_are_refused(write, tmp_path, caplog):
    save(tmp_path / "1.jpg", orientation=6)
    path = write([box()], images=[{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}])
    found = {"image_id": 1, "width": 30, "height": 40, "boxes": np.zeros((0, 4)), "scores": [], "labels": []}
    coco_ground_truth(path).paired_with([found])
    (tmp_path / "1.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        truth = coco_ground_truth(path)
    assert "without regard to EXIF" in caplog.text
    with pytest.raises(ValueError, match=r"image 1 is 30x40 there and 40x30 here.*--images"):
        truth.paired_with([found])
    # Where the sizes agree, nothing is turned in a way that matters, and results without sizes are taken as they are.
    assert truth.paired_with([{**found, "width": 40, "height": 30}])[1][0]["boxes"].tolist() == [[4, 3, 14, 9]]
    results = [{"image_id": 1, "category_id": 1, "bbox": [4, 3, 10, 6], "score": 0.5}]
    assert truth.paired_with(coco_predictions(results, truth).images)[1][0]["boxes"].tolist() == [[4, 3, 14, 9]]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_odvg_evaluation_turns_boxes_or_says_that_it_cannot(tmp_path, orientation, caplog):
    save(tmp_path / "a.jpg", orientation=orientation)
    line = {"filename": "a.jpg", "width": 40, "height": 30}
    line["detection"] = {"instances": [{"bbox": [4, 3, 14, 9], "label": 0, "category": "cat"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    truth = open_ground_truth(tmp_path / "train.jsonl")
    assert truth.references[0]["boxes"].tolist() == [list(turn_box((4, 3, 14, 9), (40, 30), orientation))]
    assert truth.sizes == {0: (30, 40)}
    (tmp_path / "a.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert open_ground_truth(tmp_path / "train.jsonl").sizes == {0: (40, 30)}
    assert "without regard to EXIF" in caplog.text


def test_numbers_of_segments_may_be_text():
    assert segment_box([["4", "3", "14", "3", "14", "9.0"]]) == (4, 3, 14, 9)
    assert segment_box({"size": ["30", "40"], "counts": [123, 6, 1071]}) == (4, 3, 5, 9)


@pytest.mark.parametrize(
    ("bbox", "kind"),
    [((30, 20, 25, 5), "boxes outside"), ((-9, 2, 12, 8), "boxes outside"), ((5, 5, 0, 3), "boxes without area")],
)
def test_readers_say_that_they_clip_or_drop_boxes(write, caplog, bbox, kind):
    path = write([box(), box(image=2, bbox=bbox)])
    assert kind in kinds(check_dataset(path))
    open_dataset(path)
    assert kind in caplog.text
    assert len(caplog.records) == 1
    caplog.clear()
    open_ground_truth(path)
    assert kind in caplog.text


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_cut_off_photograph_is_named_without_decoding_all(write, tmp_path, ending):
    name, whole = f"deep.{ending}", np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(whole).save(tmp_path / name)
    path = write([box()], [{"id": 1, "file_name": name, "width": 80, "height": 60}])
    assert check_dataset(path).errors == []
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 4])
    assert [finding.kind for finding in check_dataset(path).errors] == ["unreadable files"]


def test_zeros_behind_a_photograph_are_no_damage(write, tmp_path):
    path = write([box()], [{"id": 1, "file_name": "padded.jpg", "width": 40, "height": 30}])
    with (tmp_path / "padded.jpg").open("ab") as file:
        file.write(bytes(5000))
    assert check_dataset(path).errors == []


@pytest.mark.parametrize(
    ("size", "is_used"), [([30, 40], True), (["30", "40"], True), ([15, 20], False), ([60, 80], False)]
)
def test_a_mask_of_an_image_of_another_size_is_left_out(write, caplog, size, is_used):
    height, width = (int(side) for side in size)
    mask = {"size": size, "counts": [2 * height + 3, 4, width * height - 2 * height - 7]}
    path = write([box(), {"id": 9, "image_id": 2, "category_id": 1, "segmentation": mask}])
    assert ("broken boxes" in kinds(check_dataset(path))) != is_used
    rows, _ = open_dataset(path)
    assert rows[1]["boxes"] == ([[2, 3, 3, 7]] if is_used else [])
    assert ("its mask is of" in caplog.text) != is_used
