"""Tests of Hugging Face data sets, folders with metadata and WebDataset tars, and what is said about their faults."""

import io
import json
import logging
import tarfile

import pytest

from form_cases import NAMES, hub_saved, imagefolder, picture, webdataset, webdataset_yolo
from gdino_hf.data.annotation_files import annotation_file, find_split
from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.data.box_formats import BoxVote
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.open_ground_truth import open_ground_truth

datasets = pytest.importorskip("datasets")

CORNERS = [[4.0, 2.0, 30.0, 40.0], [20.0, 25.0, 60.0, 45.0]]
SIZE = (64, 48)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def content(place=0, size=SIZE):
    file = io.BytesIO()
    picture(place, size).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(boxes=CORNERS, labels=("cat", "dog"), label="category", kind=None, as_dicts=False, count=2, **columns):
    """Return a data set of equal rows, with the boxes and names in `objects`."""
    kind = kind or datasets.Value("string")
    fields = {"bbox": datasets.List(datasets.Value("float64")), label: kind}
    objects = [{"bbox": box, label: name} for box, name in zip(boxes, labels, strict=True)]
    if as_dicts:
        feature = datasets.List(fields)
    else:
        objects = {"bbox": list(boxes), label: list(labels)}
        feature = {name: datasets.List(field) for name, field in fields.items()}
    given = {"image": [content(number) for number in range(count)], "objects": [objects] * count, **columns}
    features = datasets.Features({"image": datasets.Image(), "objects": feature, **FEATURES(columns)})
    return datasets.Dataset.from_dict(given, features=features)


def FEATURES(columns):  # noqa: N802
    """Return the features of further columns as `datasets` guesses them."""
    return datasets.Dataset.from_dict(columns).features if columns else {}


def save(rows, folder, **splits):
    """Save rows as the split train, with further splits, and return the folder."""
    datasets.DatasetDict({"train": rows, **splits}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("as_dicts", [False, True])
@pytest.mark.parametrize("kind", [None, "ClassLabel"])
@pytest.mark.parametrize("label", ["category", "label", "category_id"])
def test_objects_in_the_forms_that_data_sets_have(tmp_path, as_dicts, kind, label):
    names = ("cat", "dog") if kind is None else (1, 2)
    kind = None if kind is None else datasets.ClassLabel(names=NAMES)
    place = save(table(labels=names, label=label, kind=kind, as_dicts=as_dicts), tmp_path / "set")
    rows, labels = open_dataset(place)
    assert rows[0]["boxes"] == CORNERS
    assert rows[0]["names"] == ["cat", "dog"]
    # A ClassLabel lists names that have no box, too.
    assert labels == (["cat", "dog"] if kind is None else NAMES)


def as_form(box, form):
    x1, y1, x2, y2 = box
    return {
        "xyxy": [x1, y1, x2, y2],
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
    }[form]


# Boxes near the right and the lower edge, of which each form fits itself alone.
TELLING = [[1.0, 2.0, 60.0, 40.0], [50.0, 30.0, 64.0, 48.0], [40.0, 1.0, 63.0, 9.0]]


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("form", ["xywh", "xyxy", "cxcywh"])
def test_what_boxes_are_is_recognized_from_all_of_them(tmp_path, form, is_relative):
    boxes = [as_form(box, form) for box in TELLING]
    if is_relative:
        boxes = [[side / size for side, size in zip(box, SIZE * 2, strict=True)] for box in boxes]
    place = save(table(boxes, ("cat",) * 3), tmp_path / "set")
    for box, expected in zip(open_dataset(place)[0][0]["boxes"], TELLING, strict=True):
        assert box == pytest.approx(expected, abs=1e-4)


def test_what_boxes_are_is_asked_where_several_forms_fit(tmp_path):
    small = [[10.0, 10.0, 18.0, 16.0]]
    place = save(table(small, ("cat",)), tmp_path / "set")
    with pytest.raises(ValueError, match=r"they fit all of xywh and xyxy and cxcywh; give --box-format") as caught:
        open_dataset(place)
    assert "\n" not in str(caught.value)
    for form, expected in (("xyxy", small[0]), ("xywh", [10, 10, 28, 26]), ("cxcywh", [1, 2, 19, 18])):
        rows, _ = open_dataset(place, options=AnnotationOptions(box_format=form))
        assert rows[0]["boxes"] == [expected]


def test_an_annotated_area_tells_what_boxes_are():
    vote = BoxVote()
    vote.add([10, 10, 18, 16], SIZE, area=8 * 6)
    assert vote.decide("auto", "set") == ("xyxy", False)


def test_boxes_that_fit_no_form_are_asked_about():
    vote = BoxVote()
    vote.add([100, 100, 10, 10], SIZE)
    with pytest.raises(ValueError, match="fit none of xywh, xyxy and cxcywh"):
        vote.decide("auto", "set")


def test_further_columns_are_kept_and_those_of_ours_get_another_name(tmp_path):
    more = {"licence": ["CC0", "CC BY"], "caption": ["a", "b"], "names": [["x"], ["y"]], "image_id": [7, 3]}
    rows, _ = open_dataset(save(table(**more), tmp_path / "set"))
    assert rows["licence"] == ["CC0", "CC BY"]
    assert rows["caption_given"] == ["a", "b"]
    assert rows["names_given"] == [["x"], ["y"]]
    assert rows["image_id"] == [7, 3]
    assert rows[0]["objects"]["bbox"] == CORNERS
    assert "caption" not in rows.column_names


def test_rows_whose_picture_is_damaged_are_left_out_with_their_columns(tmp_path):
    good = table(number=[1, 2], count=2)
    pictures = [{"bytes": b"no picture", "path": None}, content()]
    rows = good.remove_columns("image").add_column("image", pictures).cast_column("image", datasets.Image())
    place = save(rows, tmp_path / "set")
    with pytest.raises(ValueError, match="--unreadable skip"):
        open_dataset(place)
    rows, _ = open_dataset(place, options=AnnotationOptions(unreadable="skip"))
    assert rows["number"] == [2]
    assert rows[0]["image"].size == SIZE


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_splits_by_name(tmp_path, name):
    place = save(table(), tmp_path / "set", **{name: table(count=1), "extra": table(count=3)})
    assert str(find_split(place, "val")) == f"{place}:{name}"
    assert find_split(place, "test") is None
    assert len(open_dataset(annotation_file(place, "val"))[0]) == 1
    assert len(open_dataset(f"{place}:extra")[0]) == 3
    with pytest.raises(ValueError, match=rf"has no split testing; it has train, {name}"):
        open_dataset(f"{place}:testing")


def test_parquet_files_and_folders_with_splits(tmp_path):
    table().to_parquet(tmp_path / "train.parquet")
    table(count=1).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    assert len(open_dataset(tmp_path)[0]) == 2
    assert len(open_ground_truth(tmp_path).references) == 1
    assert len(open_dataset(tmp_path / "train.parquet")[0]) == 2


def test_numbers_without_names_are_refused_unless_a_label_map_names_them(tmp_path):
    place = save(table(labels=(1, 2), kind=datasets.Value("int64")), tmp_path / "set")
    with pytest.raises(ValueError, match=r"numbers its classes in category without naming them; cast"):
        open_dataset(place)
    (place / "label_map.json").write_text('{"1": "cat", "2": "dog"}')
    assert open_dataset(place)[0][0]["names"] == ["cat", "dog"]


def test_missing_columns_are_named(tmp_path):
    place = save(table().rename_column("objects", "things"), tmp_path / "boxes")
    with pytest.raises(ValueError, match=r"has the columns image, things, of which none is objects"):
        open_dataset(place)
    place = save(table().remove_columns("image"), tmp_path / "image")
    with pytest.raises(ValueError, match=r"has no column of pictures but objects; call it image"):
        open_dataset(place)


@pytest.mark.parametrize("place", ["someone/pets", "someone/pets@small", "someone/pets:test", "hf://datasets/cppe-5"])
def test_an_id_that_cannot_be_loaded_is_one_sentence(place):
    for read in (open_dataset, check_dataset, open_ground_truth):
        with pytest.raises(ValueError, match=r"does not exist, and cannot be loaded from the Hub") as caught:
            read(place)
        assert "\n" not in str(caught.value)


def test_paths_in_a_table_that_lead_outside_are_refused(tmp_path):
    picture(0, SIZE).save(tmp_path / "secret.png")
    rows = table(count=1).remove_columns("image")
    rows = rows.add_column("image", [{"bytes": None, "path": str(tmp_path / "secret.png")}])
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="--paths anywhere"):
        open_dataset(tmp_path / "set")
    assert len(open_dataset(tmp_path / "set", options=AnnotationOptions(paths="anywhere"))[0]) == 1


def test_the_pictures_of_a_table_stay_where_they_are(tmp_path):
    rows, _ = open_dataset(hub_saved(tmp_path))
    files = [file["filename"] for file in rows.cache_files]
    assert any(str(tmp_path / "saved") in file for file in files)


def test_faults_of_metadata_are_named_with_their_lines(tmp_path):
    file = imagefolder(tmp_path) / "train" / "metadata.jsonl"
    lines = file.read_text().splitlines()
    lines += ['{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": []}}', "{", '{"file_name": 3}']
    file.write_text("\n".join(lines))
    found = check_dataset(tmp_path).findings
    (broken,) = (finding for finding in found if finding.kind == "broken entries")
    assert broken.count == 3
    assert broken.examples[0] == "line 4: it has 1 boxes but 0 names"
    assert [example[:6] for example in broken.examples] == ["line 4", "line 5", "line 6"]


def write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for name, data in rows.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


OBJECT = {"bbox": [10, 20, 30, 40], "category": "cat", "label": "cat"}
JSONS = {
    "objects": {"objects": [OBJECT], "width": 64, "height": 96},
    "annotations": {"annotations": [{"bbox": [10, 20, 30, 40], "category_name": "cat", "area": 1200}]},
    "odvg": {"detection": {"instances": [{"bbox": [10, 20, 40, 60], "category": "cat"}]}},
    "labelme": {"shapes": [{"label": "cat", "shape_type": "rectangle", "points": [[10, 20], [40, 60]]}]},
    "createml": {
        "image": "a.png",
        "annotations": [{"label": "cat", "coordinates": {"x": 25, "y": 40, "width": 30, "height": 40}}],
    },
}


@pytest.mark.parametrize("kind", JSONS)
def test_json_of_every_kind_beside_the_pictures_of_a_tar(tmp_path, kind):
    rows = {"a.png": content(size=(64, 96))["bytes"], "a.json": json.dumps(JSONS[kind]).encode()}
    place = write_tar(tmp_path / "a.tar", rows)
    options = AnnotationOptions(box_format="xywh")
    rows, labels = open_dataset(place, options=options)
    assert rows[0]["boxes"] == [[10, 20, 40, 60]]
    assert labels == ["cat"]


def test_tars_by_pattern_list_and_folder(tmp_path):
    pattern = webdataset(tmp_path)
    shards = [tmp_path / "part-000.tar", tmp_path / "part-001.tar"]
    expected = [["dog", "cat"], ["bird"], []]
    for place in (pattern, tmp_path, tmp_path / "part-*.tar", "::".join(map(str, shards)), shards):
        assert [row["names"] for row in open_dataset(place)[0]] == expected
    assert [row["names"] for row in open_dataset(shards[1], options=AnnotationOptions())[0]] == [[]]


def test_tars_have_the_splits_of_their_names(tmp_path):
    data = {"a.png": content()["bytes"], "a.json": json.dumps({"objects": [OBJECT]}).encode()}
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", data)
    options = AnnotationOptions(box_format="xywh")
    assert len(open_dataset(tmp_path, options=options)[0]) == 2
    assert len(open_dataset(annotation_file(tmp_path, "val"), options=options)[0]) == 1


def test_tars_that_cannot_be_read_are_one_sentence(tmp_path):
    place = write_tar(tmp_path / "a.tar", {"a.png": content()["bytes"]})
    whole = place.read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "text.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "a.tar.gz").write_bytes(whole)
    cases = {"cut.tar": "cannot be read as a tar", "text.tar": "cannot be read as a tar", "a.tar.gz": "is compressed"}
    for name, why in {**cases, "none.tar": "cannot be read as a tar file"}.items():
        with pytest.raises(ValueError, match=why) as caught:
            open_dataset(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no annotations"):
        open_dataset(place)


def test_class_numbers_of_a_tar_need_a_list_of_names(tmp_path):
    place = webdataset_yolo(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"put classes.txt with a name a line beside the tars"):
        open_dataset(place)


def test_pictures_of_a_tar_without_annotations_have_no_objects_and_are_counted(tmp_path, caplog):
    data = {
        "a.png": content()["bytes"],
        "a.json": json.dumps({"objects": [OBJECT]}).encode(),
        "b.png": content()["bytes"],
    }
    place = write_tar(tmp_path / "a.tar", data)
    with caplog.at_level(logging.WARNING):
        rows, _ = open_dataset(place, options=AnnotationOptions(box_format="xywh"))
    assert rows["names"] == [["cat"], []]
    assert "pictures alone in tars: 1 picture" in caplog.text
