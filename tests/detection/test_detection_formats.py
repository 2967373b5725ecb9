"""Every format gives back what it was made from, and the libraries it is for read the same boxes from it."""

import dataclasses
import json
import logging
import sys

import numpy as np
import pytest

from exchange_cases import CASES, HOSTILE, LANDSCAPE, make, with_masks
from gdino_hf import Detections
from gdino_hf.detection import annotation_tools, exchange_values, table_exchange, xml_exchange

HALF_A_PIXEL = 0.5
cases = pytest.mark.parametrize("found", CASES.values(), ids=CASES)


def as_json(value):
    """What a program reads that gets the value as JSON."""
    return json.loads(json.dumps(value))


ROUND_TRIPS = {
    "coco": lambda f: Detections.from_coco(as_json(f.to_coco()), f.names, f.size, source=f.source),
    "coco data set": lambda f: Detections.from_coco_dataset(as_json(f.to_coco_dataset())),
    "yolo": lambda f: Detections.from_yolo("\n".join(f.to_yolo(scores=True)), f.names, f.size, f.source),
    "voc": lambda f: Detections.from_voc(f.to_voc(), f.names),
    "cvat": lambda f: Detections.from_cvat(f.to_cvat(), names=f.names),
    "labelstudio": lambda f: Detections.from_label_studio(as_json(f.to_label_studio()), f.names, f.size, f.source),
    "fiftyone": lambda f: Detections.from_fiftyone(as_json(f.to_fiftyone()), f.size, f.names, f.source),
    "objects": lambda f: Detections.from_objects(as_json(f.to_objects()), f.names, source=f.source),
    "pandas": lambda f: Detections.from_pandas(f.to_pandas()),
    "arrow": lambda f: Detections.from_arrow(f.to_arrow()),
    "supervision": lambda f: Detections.from_supervision(f.to_supervision(), f.size, f.names, f.source),
}


@cases
@pytest.mark.parametrize("round_trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trips_are_the_identity(found, round_trip):
    assert round_trip(found) == found


@cases
def test_createml_gives_back_all_but_the_scores(found):
    again = Detections.from_createml(as_json(found.to_createml()), found.size, found.names)
    assert again == dataclasses.replace(found, scores=np.ones(len(found)))


@cases
def test_yolo_without_scores_gives_back_the_boxes(found):
    lines = found.to_yolo()
    assert all(len(line.split()) == 5 for line in lines)
    again = Detections.from_yolo(lines, found.names, found.size, found.source)
    assert again == dataclasses.replace(found, scores=np.ones(len(found)))


def test_round_trips_of_thousands_of_random_boxes():
    chance = np.random.default_rng(0)
    # Powers from a thousandth of a pixel to the whole picture.
    corners = np.minimum(10 ** chance.uniform(-3, 3.2, (4000, 2, 2)), LANDSCAPE)
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    found = Detections(boxes, chance.random(4000), np.zeros(4000), ("a",), LANDSCAPE, source="x")
    for name, round_trip in ROUND_TRIPS.items():
        assert round_trip(found) == found, name


def test_numbers_are_short():
    (row,) = CASES["decimals"].to_coco()
    assert row == {"image_id": 1, "category_id": 2, "bbox": [12.35, 7.1, 77.67, 26.23], "score": 0.1234}
    (line,) = CASES["decimals"].to_yolo(scores=True)
    assert len(line) < 60


def test_the_boxes_of_each_format_follow_its_convention():
    found = Detections([[10, 20, 50, 40]], [0.5], [1], ("a", "b"), (100, 200), source="p.jpg")
    assert found.to_coco(7, {"a": 3, "b": 90})[0] == {
        "image_id": 7,
        "category_id": 90,
        "bbox": [10, 20, 40, 20],
        "score": 0.5,
    }
    assert found.to_yolo() == ["1 0.3 0.15 0.4 0.1"]
    voc = found.to_voc()
    for side in ("<xmin>11</xmin>", "<ymin>21</ymin>", "<xmax>50</xmax>", "<ymax>40</ymax>", "<score>0.5</score>"):
        assert side in voc
    box = {"x": 30, "y": 30, "width": 40, "height": 20}
    assert found.to_createml() == {"image": "p.jpg", "annotations": [{"label": "b", "coordinates": box}]}
    (region,) = found.to_label_studio()["result"]
    assert region["value"] == {"x": 10, "y": 10, "width": 40, "height": 10, "rotation": 0, "rectanglelabels": ["b"]}
    assert found.to_fiftyone() == [{"label": "b", "bounding_box": [0.1, 0.1, 0.4, 0.1], "confidence": 0.5}]
    assert 'xtl="10" ytl="20" xbr="50" ybr="40"' in found.to_cvat()
    objects = {"id": [0], "area": [800], "bbox": [[10, 20, 40, 20]], "category": [1], "score": [0.5]}
    assert found.to_objects(5) == {"image_id": 5, "width": 100, "height": 200, "objects": objects}


@pytest.mark.parametrize("name", ["coco", "coco data set", "pandas", "arrow", "supervision"])
def test_masks_and_track_ids_are_kept_where_there_is_a_place(name):
    found = dataclasses.replace(with_masks(make((120, 90), number=4)), track_ids=[7, 8, 9, 10])
    assert ROUND_TRIPS[name](found) == found


@pytest.mark.parametrize("name", ["pandas", "arrow", "supervision"])
def test_a_picture_without_boxes_keeps_that_there_were_masks_and_track_ids(name):
    found = Detections.none(("cat",), (9, 7), masks=np.zeros((0, 7, 9)), track_ids=[], source="a.jpg")
    assert ROUND_TRIPS[name](found) == found


@pytest.mark.parametrize("name", ["coco", "coco data set"])
def test_spans_are_kept_as_tokens_positive(name):
    found = dataclasses.replace(make(number=2), caption="a dog, a cat", spans=(((2, 5),), ((9, 12), (0, 1))))
    trips = {
        **ROUND_TRIPS,
        "coco": lambda f: Detections.from_coco(
            as_json(f.to_coco()), f.names, f.size, source=f.source, caption=f.caption
        ),
    }
    assert trips[name](found) == found


@pytest.mark.parametrize("name", ["pandas", "arrow"])
def test_tables_keep_what_belongs_to_the_picture(name):
    found = make(number=2, presence={"cat": 0.5}, colors={"cat": "#00ff00"}, caption="a cat")
    assert ROUND_TRIPS[name](found) == found


@cases
def test_supervision_reads_boxes_names_and_masks(found):
    sv = pytest.importorskip("supervision")
    theirs = found.to_supervision()
    assert np.array_equal(theirs.xyxy, found.boxes)
    assert np.array_equal(theirs.confidence, found.scores)
    assert list(theirs["class_name"]) == found.text_labels
    assert len(sv.Detections.merge([theirs, theirs])) == 2 * len(found)


def test_supervision_detections_of_other_models_take_names_by_class_id():
    sv = pytest.importorskip("supervision")
    theirs = sv.Detections(xyxy=np.array([[1.0, 2, 3, 4]]), class_id=np.array([1]))
    found = Detections.from_supervision(theirs, (10, 10), ["a", "b"])
    assert (found.text_labels, found.scores.tolist()) == (["b"], [1.0])
    with pytest.raises(ValueError, match="no class names; give names"):
        Detections.from_supervision(theirs, (10, 10))
    with pytest.raises(ValueError, match=r"give size=\(width, height\)"):
        Detections.from_supervision(theirs, names=["a", "b"])


def test_pycocotools_reads_results_and_data_set():
    coco = pytest.importorskip("pycocotools.coco")
    found = with_masks(make((120, 90), number=5))
    truth = coco.COCO()
    truth.dataset = as_json(found.to_coco_dataset())
    truth.createIndex()
    results = truth.loadRes(as_json([{k: v for k, v in row.items() if k != "segmentation"} for row in found.to_coco()]))
    for read in (truth, results):
        rows = read.loadAnns(read.getAnnIds(imgIds=[1]))
        boxes = np.array([row["bbox"] for row in rows])
        boxes[:, 2:] += boxes[:, :2]
        assert np.abs(boxes - found.boxes).max() < HALF_A_PIXEL
        assert [truth.loadCats(row["category_id"])[0]["name"] for row in rows] == found.text_labels
    masks = np.array([truth.annToMask(row) for row in truth.loadAnns(truth.getAnnIds(imgIds=[1]))])
    assert np.array_equal(masks, found.masks)


def test_polygons_and_plain_run_lengths_of_coco_are_read():
    rows = [
        {"category_id": 1, "bbox": [1, 1, 4, 2], "segmentation": [[1, 1, 5, 1, 5, 3, 1, 3]]},
        {"category_id": 1, "bbox": [0, 0, 1, 2], "segmentation": {"size": [6, 8], "counts": [0, 2, 46]}},
    ]
    found = Detections.from_coco(rows, ["a"], (8, 6))
    assert found.masks[0, 1:3, 1:5].all()
    assert found.masks.sum((1, 2)).tolist() == [8, 2]


@cases
def test_datasets_encodes_rows_with_class_labels(found):
    datasets = pytest.importorskip("datasets")
    features = table_exchange.objects_features(found.names)
    rows = datasets.Dataset.from_list([found.to_objects(3), found.to_objects(4)], features=features)
    category = rows.features["objects"]["category"].feature
    assert category.names == list(found.names)
    row = rows[1]
    assert Detections.from_objects(row, category.names, source=found.source) == found
    boxes = np.array(row["objects"]["bbox"]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    assert np.abs(boxes - found.boxes).max(initial=0) < HALF_A_PIXEL


def test_pandas_joins_pictures_and_parquet_keeps_tables(tmp_path):
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    one, other = make(number=3), make(number=2, source="b.jpg")
    frame = pandas.concat([one.to_pandas(), other.to_pandas()], ignore_index=True)
    assert frame.groupby("source")["score"].size().to_dict() == {"sub/a photo.jpg": 3, "b.jpg": 2}
    with pytest.raises(ValueError, match="boxes of 2 pictures; split it by `source`"):
        Detections.from_pandas(frame)
    part = Detections.from_pandas(frame[frame.source == "b.jpg"], names=other.names)
    assert part == other
    parquet.write_table(one.to_arrow(), tmp_path / "one.parquet")
    assert Detections.from_arrow(parquet.read_table(tmp_path / "one.parquet")) == one
    frame = pandas.read_parquet(tmp_path / "one.parquet")
    assert np.array_equal(frame[["x1", "y1", "x2", "y2"]].to_numpy(), one.boxes)


# Label Studio's documentation of predictions: https://labelstud.io/guide/predictions
LABEL_STUDIO_SCHEMA = {
    "type": "object",
    "required": ["result"],
    "properties": {
        "model_version": {"type": "string"},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "result": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "type", "from_name", "to_name", "original_width", "original_height", "value"],
                "properties": {
                    "type": {"const": "rectanglelabels"},
                    "score": {"type": "number", "minimum": 0, "maximum": 1},
                    "original_width": {"type": "integer"},
                    "original_height": {"type": "integer"},
                    "image_rotation": {"const": 0},
                    "value": {
                        "type": "object",
                        "required": ["x", "y", "width", "height", "rotation", "rectanglelabels"],
                        "additionalProperties": False,
                        "properties": {
                            **{side: {"type": "number", "minimum": 0, "maximum": 100} for side in ("x", "y")},
                            **{side: {"type": "number", "minimum": 0, "maximum": 100} for side in ("width", "height")},
                            "rotation": {"const": 0},
                            "rectanglelabels": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                        },
                    },
                },
            },
        },
    },
}


@cases
def test_label_studio_predictions_fit_the_documented_schema(found):
    jsonschema = pytest.importorskip("jsonschema")
    prediction = as_json(found.to_label_studio(model_version="nano"))
    jsonschema.validate(prediction, LABEL_STUDIO_SCHEMA)
    ids = [region["id"] for region in prediction["result"]]
    assert len(set(ids)) == len(found)


@cases
def test_label_studio_sdk_accepts_predictions_and_converts_them_to_the_same_boxes(found):
    """The SDK pins older releases than this package is tested with, so it runs where someone installed it."""
    interface = pytest.importorskip("label_studio_sdk.label_interface")
    objects = pytest.importorskip("label_studio_sdk.label_interface.objects")
    converter = pytest.importorskip("label_studio_sdk.converter.utils")
    labels = interface.LabelInterface(annotation_tools.label_studio_config(found.names))
    prediction = as_json(found.to_label_studio())
    assert labels.validate_prediction(prediction, return_errors=True) == []
    assert objects.PredictionValue(**prediction).result == prediction["result"]
    for region, box in zip(prediction["result"], found.boxes.tolist(), strict=True):
        label = {**region["value"], **{k: region[k] for k in ("original_width", "original_height")}}
        x, y, width, height = np.array(converter.convert_annotation_to_yolo(label)) * (found.size * 2)
        sides = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert sides == pytest.approx(box, abs=HALF_A_PIXEL)


def test_regions_that_are_no_boxes_are_counted(caplog):
    found = make(number=2)
    prediction = found.to_label_studio()
    prediction["result"].append({"type": "choices", "value": {"choices": ["x"]}})
    with caplog.at_level(logging.WARNING):
        assert Detections.from_label_studio(prediction, found.names, source=found.source) == found
    assert "1 of Label Studio's regions are not rectangles" in caplog.text
    prediction["result"][0]["value"]["rotation"] = 30
    with pytest.raises(ValueError, match="turned by 30 degrees"):
        Detections.from_label_studio(prediction)


def test_control_characters_of_labels_survive_xml():
    names = ("esc\x1b[2J", "nul\0", "cr\r", "\ufffe", 'q"<&>')
    found = make(names=names, number=10, source="pic\x1b\udcff&.jpg")
    for text, read in ((found.to_voc(), Detections.from_voc), (found.to_cvat(), Detections.from_cvat)):
        assert text.encode("utf-8").isascii()
        again = read(text, names=names)
        assert again.text_labels == found.text_labels
        assert again.source == r"pic\x1b\udcff&.jpg"
        assert read(text).text_labels[0] == 'q"<&>'


def test_xml_with_entities_is_refused():
    bomb = '<!DOCTYPE a [<!ENTITY b "cccc">]><annotation>&b;</annotation>'
    for read in (Detections.from_voc, Detections.from_cvat):
        with pytest.raises(ValueError, match="has a DOCTYPE"):
            read(bomb)
        with pytest.raises(ValueError, match="cannot be read"):
            read("<annotation>")
        with pytest.raises(ValueError, match="is a <html>"):
            read("<html/>")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Detections.from_yolo("5 0.5 0.5 1 1", ["a"], (9, 9)), "class 5, but there are 1 names"),
        (lambda: Detections.from_yolo("0 0.1 0.1 0.2 0.2", ["a"], (9, 9)).polygons(), "There are no masks"),
        (lambda: Detections.from_labelme({"shapes": []}), "give size="),
        (lambda: Detections.from_yolo("0 x 0.1 0.2 0.2", ["a"], (9, 9)), "is not a class number"),
        (lambda: Detections.from_coco([{"category_id": 4, "bbox": [0, 0, 1, 1]}], ["a"], (9, 9)), "category_id 4"),
        (lambda: Detections.from_coco([{"bbox": [0, 0, 1, 1]}], ["a"], (9, 9)), "has no 'category_id'"),
        (lambda: Detections.from_coco_dataset({"images": [], "annotations": [], "categories": []}), "0 of the 0"),
        (lambda: make().to_coco(category_ids={"cat": 1}), "no id for 'remote control'"),
        (lambda: Detections.from_createml({"annotations": [{"label": "a"}]}, (9, 9)), "has no 'coordinates'"),
        (lambda: Detections.from_label_studio({"result": []}), "give size="),
        (lambda: Detections.from_objects({"objects": {"bbox": [[0, 0, 1, 1]], "category": [2]}}, ["a"]), "category 2"),
        (lambda: Detections.from_voc("<annotation><size/></annotation>"), "None for size/width"),
        (lambda: Detections.from_fiftyone([{"label": "x", "bounding_box": [0, 0, 1, 1]}], (9, 9), ["a"]), "'x' is not"),
    ],
)
def test_damaged_data_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_library_is_one_sentence_with_the_command(monkeypatch):
    for module, convert in (
        ("supervision", make().to_supervision),
        ("pandas", make().to_pandas),
        ("pyarrow", make().to_arrow),
        ("pycocotools.mask", with_masks(make((9, 9))).to_coco),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r'pip install "gdino-hf\[formats\]"'):
            convert()


def test_what_a_format_cannot_hold_is_said_once(caplog):
    exchange_values._say_once.cache_clear()
    found = dataclasses.replace(make(number=2), track_ids=[1, 2])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found.to_yolo()
            found.to_voc()
    assert caplog.messages == [
        "YOLO has no place for track ids, which are left out.",
        "Pascal VOC has no place for track ids, which are left out.",
    ]


def test_the_labeling_configuration_escapes_labels():
    from xml.etree import ElementTree

    view = ElementTree.fromstring(annotation_tools.label_studio_config(HOSTILE))
    assert [label.get("value") for label in view.iter("Label")] == [xml_exchange.xml_text(name) for name in HOSTILE]
