"""Masks leave and come back: run lengths exactly, outlines with an IoU of 0.95, whatever the shape of the mask."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from exchange_cases import make, with_masks
from gdino_hf import Detections
from gdino_hf.data.formats import open_dataset
from gdino_hf.detection.dataset_files import DataSetFiles
from gdino_hf.visualize import label_color

coco_masks = pytest.importorskip("pycocotools.mask")
pytest.importorskip("shapely")

WIDTH, HEIGHT = 150, 110
LEAST_IOU = 0.95
COLUMNS, ROWS = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))


def disk(x, y, radius):
    return (COLUMNS - x) ** 2 + (ROWS - y) ** 2 < radius**2


def pixels(*places):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x, y in places:
        mask[y, x] = True
    return mask


def noise(blur, share, seed=0):
    field = ndimage.gaussian_filter(np.random.default_rng(seed).random((HEIGHT, WIDTH)), blur)
    return field < np.quantile(field, share)


MASKS = {
    "disk": disk(70, 50, 40),
    "ring": disk(70, 50, 40) & ~disk(60, 45, 20),
    "island in a hole": disk(70, 50, 40) & ~disk(70, 50, 25) | disk(70, 50, 9),
    "ten holes": disk(75, 55, 50) & ~np.logical_or.reduce([disk(45 + 7 * n, 40 + 3 * n, 3) for n in range(10)]),
    "many parts": np.logical_or.reduce([disk(12 + 13 * n, 15 + 8 * n, 2 + n // 2) for n in range(10)]),
    "one pixel": pixels((70, 50)),
    "corners": pixels((0, 0), (WIDTH - 1, 0), (0, HEIGHT - 1), (WIDTH - 1, HEIGHT - 1)),
    "a large part and single pixels": disk(70, 50, 40) | pixels((3, 3), (140, 100), (141, 101), (5, 90)),
    "a hole of one pixel": ~pixels((70, 50)),
    "touching corners": pixels((70, 50), (71, 51), (70, 52), (72, 50)),
    "horizontal line": ROWS == 50,
    "vertical line": COLUMNS == 149,
    "diagonal": COLUMNS == ROWS,
    "thin curve": np.abs(ROWS - 50 - 40 * np.sin(COLUMNS / 12)) < 1,
    "everything": np.ones((HEIGHT, WIDTH), dtype=bool),
    "coarse noise": noise(4, 0.5),
    "fine noise": noise(1, 0.4),
    "single noise": noise(0, 0.1),
    "nothing": pixels(),
}


def found_with(masks, size=(WIDTH, HEIGHT)):
    number = len(masks)
    corners = np.random.default_rng(number).random((number, 2, 2)) * size
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    scores, labels = np.linspace(0.9, 0.1, number), np.arange(number) % 3
    names = ("cat", "remote control", "dog")
    return Detections(boxes, scores, labels, names, size, source="sub/a photo.png", masks=np.array(masks))


def iou(one, other):
    return (one & other).sum() / max((one | other).sum(), 1) if (one | other).any() else 1.0


@pytest.fixture
def found():
    return found_with(list(MASKS.values()))


def test_run_lengths_of_coco_give_the_masks(found):
    for row, mask in zip(found.to_coco(), found.masks, strict=True):
        assert np.array_equal(coco_masks.decode(row["segmentation"]), mask)
    rows = json.loads(json.dumps(found.to_coco()))
    assert Detections.from_coco(rows, found.names, found.size, source=found.source) == found


@pytest.mark.parametrize("name", MASKS)
def test_pycocotools_reads_polygons_as_the_mask(name, tmp_path):
    from pycocotools.coco import COCO

    found = found_with([MASKS[name]])
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(found.to_coco_dataset(polygons=True)))
    coco = COCO(str(path))
    (annotation,) = coco.loadAnns(coco.getAnnIds())
    assert isinstance(annotation["segmentation"], list) or name == "nothing"
    assert annotation["area"] == MASKS[name].sum()
    assert iou(coco.annToMask(annotation).astype(bool), MASKS[name]) >= LEAST_IOU


@pytest.mark.parametrize("name", MASKS)
def test_exact_outlines_give_exactly_the_mask(name):
    (polygons,) = found_with([MASKS[name]]).polygons(exact=True)
    if name == "nothing":
        assert polygons == []
        return
    segment = coco_masks.merge(coco_masks.frPyObjects([p.ravel().tolist() for p in polygons], HEIGHT, WIDTH))
    assert np.array_equal(coco_masks.decode(segment), MASKS[name])


def test_smooth_outlines_have_few_corners_and_polygons_their_parts():
    smooth, parts = found_with([MASKS["disk"], MASKS["many parts"]]).polygons()
    assert len(smooth) == 1
    assert len(smooth[0]) < 60
    assert len(found_with([MASKS["disk"]]).polygons(exact=True)[0][0]) > 150
    assert len(parts) == ndimage.label(MASKS["many parts"])[1]


def test_outlines_of_random_masks_hold():
    masks = [noise(blur, share, seed) for seed, blur in enumerate((0, 1, 2, 6)) for share in (0.02, 0.6)]
    worst = 1.0
    for row, mask in zip(found_with(masks).to_coco(polygons=True), masks, strict=True):
        segment = coco_masks.merge(coco_masks.frPyObjects(row["segmentation"], HEIGHT, WIDTH))
        worst = min(worst, iou(coco_masks.decode(segment).astype(bool), mask))
    assert worst >= LEAST_IOU


@pytest.mark.parametrize("scores", [False, True])
def test_yolo_segments_read_back_as_the_masks(found, scores):
    lines = found.to_yolo(scores=scores)
    assert len(lines) == len(found)
    assert all(0 <= float(value) <= 1 for line in lines for value in line.split()[1:])
    again = Detections.from_yolo(lines, found.names, found.size, found.source)
    assert np.array_equal(again.labels, found.labels)
    assert not scores or np.array_equal(again.scores, found.scores)
    for name, read, mask in zip(MASKS, again.masks, found.masks, strict=True):
        # A line of YOLO cannot be without pixels: an empty mask is its box.
        assert iou(read, mask) >= LEAST_IOU or name == "nothing"
    x1, y1, x2, y2 = found.boxes[-1].tolist()
    assert again.masks[-1].sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.1)


def test_supervision_reads_yolo_segments(tmp_path):
    sv = pytest.importorskip("supervision")
    found = with_masks(make((120, 90), number=4, source="m.png"))
    Image.new("RGB", found.size).save(tmp_path / "m.png")
    with DataSetFiles(tmp_path, ["yolo"], found.names) as files:
        files.add(found)
    labels, yaml = tmp_path / "yolo" / "labels", tmp_path / "yolo" / "data.yaml"
    data_set = sv.DetectionDataset.from_yolo(str(tmp_path), str(labels), str(yaml), force_masks=True)
    (path,) = data_set.image_paths
    for read, mask in zip(np.asarray(data_set.annotations[path].mask), found.masks, strict=True):
        # It fills corners' pixels, too, which adds a row and a column.
        assert (read & mask).sum() == mask.sum()
        assert read.sum() - mask.sum() <= 120 + 90


def test_labelme_polygons_read_back_as_the_masks(found):
    document = json.loads(json.dumps(found.to_labelme("a photo.png")))
    assert (document["imageWidth"], document["imageHeight"]) == found.size
    assert document["imagePath"] == "a photo.png"
    again = Detections.from_labelme(document, found.names, source=found.source)
    assert again.text_labels == found.text_labels
    assert np.array_equal(again.scores, found.scores)
    for name, read, mask in zip(MASKS, again.masks, found.masks, strict=True):
        assert iou(read, mask) >= LEAST_IOU or name == "nothing"
    tight = found.tightened().boxes
    assert np.abs(again.boxes - tight)[:-1].max() <= 1


def test_labelme_without_masks_has_rectangles_that_read_back():
    found = make(number=5)
    document = found.to_labelme()
    assert {shape["shape_type"] for shape in document["shapes"]} == {"rectangle"}
    assert Detections.from_labelme(document, found.names) == found


def test_labelme_groups_are_one_object_and_shapes_without_extent_are_told_of(caplog):
    triangle = {"label": "a", "shape_type": "polygon", "points": [[0, 0], [4, 0], [0, 4]]}
    far = {"label": "a", "shape_type": "polygon", "points": [[6, 6], [9, 6], [6, 9]]}
    content = {"imageWidth": 9, "imageHeight": 9, "shapes": [{**triangle, "group_id": 1}, {**far, "group_id": 1}]}
    joined = Detections.from_labelme(content)
    assert joined.boxes.tolist() == [[0, 0, 9, 9]]
    content["shapes"] = [triangle, far, {"label": "p", "shape_type": "point", "points": [[1, 1]]}]
    assert len(Detections.from_labelme(content)) == 2
    (message,) = caplog.messages
    assert message == "A shape of a LabelMe file is left out (shapes without extent: LabelMe shape 3: 'point')."


def test_pictures_of_numbers_have_the_better_object_on_top():
    masks = [disk(50, 50, 30), disk(70, 50, 30), pixels()]
    found = found_with(masks)
    objects, labels = (np.asarray(found.mask_picture(kind)) for kind in ("objects", "labels"))
    assert objects.dtype == np.uint8
    assert np.array_equal(objects, np.where(masks[0], 1, np.where(masks[1], 2, 0)))
    assert np.array_equal(labels, objects)
    many = found_with([pixels((n % WIDTH, n // WIDTH)) for n in range(300)])
    assert np.asarray(many.mask_picture()).max() == 300
    assert np.asarray(many.mask_picture("labels")).max() == 3
    boxes = Detections([[1, 2, 4, 6]], [1], [0], ["a"], (9, 9))
    assert np.asarray(boxes.mask_picture())[2:6, 1:4].tolist() == [[1] * 3] * 4
    with pytest.raises(ValueError, match="kind is 'classes'; choose objects or labels"):
        found.mask_picture("classes")


def test_masks_stay_with_their_boxes(found):
    order = found.sort("label")
    assert np.array_equal(order.masks, found.masks[np.argsort(found.labels, kind="stable")])
    chosen = found.filter(labels="dog", threshold=0.3)[::-1]
    kept = np.flatnonzero((found.labels == 2) & (found.scores > 0.3))[::-1]
    assert np.array_equal(chosen.masks, found.masks[kept])
    assert np.array_equal(found.to_supervision().mask, found.masks)
    assert Detections.from_pandas(found.to_pandas()) == found
    assert Detections.from_arrow(found.to_arrow()) == found
    assert found[:0].to_coco(polygons=True) == []


def test_tightened_boxes_are_the_bounds_of_masks(found):
    tight = dict(zip(MASKS, found.tightened().boxes.tolist(), strict=True))
    assert tight["disk"] == [31, 11, 110, 90]
    assert tight["one pixel"] == [70, 50, 71, 51]
    assert tight["vertical line"] == [149, 0, 150, 110]
    assert tight["nothing"] == found.boxes[-1].tolist()
    with pytest.raises(ValueError, match="There are no masks; make them with"):
        make().tightened()


def test_a_plot_tints_masks_and_leaves_the_rest_of_the_box():
    mask = disk(70, 50, 20)
    found = Detections([[40, 20, 100, 80]], [0.9], [0], ["cat"], (WIDTH, HEIGHT), masks=mask[None])
    drawn = np.asarray(found.plot(Image.new("RGB", found.size, "white"), show_scores=False, font_size=11)).astype(int)
    assert np.abs(drawn[50, 70] - (0.55 * 255 + 0.45 * np.array(label_color("cat")))).max() <= 2
    assert drawn[75, 50].tolist() == [255] * 3
    assert drawn[5, 5].tolist() == [255] * 3


def test_files_of_a_data_set_hold_the_masks(tmp_path, found):
    found = found[[0, 1, 4, 7]]
    Image.new("RGB", found.size).save(tmp_path / "a photo.png")
    names = ("coco", "coco-polygons", "yolo", "labelme", "png")
    nothing = Detections.none(found.names, (20, 10), source="b.png")
    with DataSetFiles(tmp_path / "out", names, found.names) as files:
        files.add(found, "a photo.png")
        files.add(nothing)
    out = tmp_path / "out"
    for file, exact in (("coco.json", True), ("coco_polygons.json", False)):
        again = Detections.from_coco_dataset(json.loads((out / file).read_text()), "a photo.png")
        pairs = zip(again.masks, found.masks, strict=True)
        assert all(np.array_equal(*pair) if exact else iou(*pair) >= LEAST_IOU for pair in pairs)
    document = json.loads((out / "labelme" / "a photo.json").read_text())
    assert document["imagePath"] == "a photo.png"
    assert np.array_equal(
        np.asarray(Image.open(out / "masks" / "objects" / "a photo.png")), np.asarray(found.mask_picture())
    )
    assert Image.open(out / "masks" / "labels" / "b.png").size == (20, 10)
    assert json.loads((out / "masks" / "labels.json").read_text()) == {"1": "cat", "2": "remote control", "3": "dog"}
    # The readers of this package make a box of each object, however many parts it has.
    Image.new("RGB", nothing.size).save(tmp_path / "b.png")
    for place, boxes in (
        (out / "labelme", found.tightened().boxes),
        (out / "yolo" / "data.yaml", found.tightened().boxes),
        (out / "coco.json", found.boxes),
        (out / "coco_polygons.json", found.boxes),
    ):
        rows, _ = open_dataset(place, tmp_path)
        assert np.abs(np.array(rows[0]["boxes"]) - boxes).max() <= 1
        assert rows[0]["names"] == found.text_labels
