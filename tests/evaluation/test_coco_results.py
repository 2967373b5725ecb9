"""Tests of COCO results and average precision, against pycocotools and against values worked out by hand."""

import contextlib
import io
import json
import random

import pytest
from PIL import Image

from gdino_hf.evaluation.coco_results import METRICS, average_precision, detect_coco

# Both sum the same hundred terms in double precision.
ROUNDING = 1e-9


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a COCO file with its images."""

    def write(boxes, categories=("cat", "dog"), num_images=2, size=(200, 100)):
        """Write boxes given as (image, category, xywh, iscrowd)."""
        content = {
            "images": [
                {"id": 5 + i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(num_images)
            ],
            "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(categories)],
            "annotations": [
                {
                    "id": index + 1,
                    "image_id": 5 + image,
                    "category_id": 10 * (category + 1),
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
                for index, (image, category, box, crowd) in enumerate(boxes)
            ],
        }
        (tmp_path / "images").mkdir(exist_ok=True)
        for record in content["images"]:
            Image.new("RGB", size, (80, 120, 160)).save(tmp_path / "images" / record["file_name"])
        path = tmp_path / "val.json"
        path.write_text(json.dumps(content))
        return path

    return write


def detection(image, category, box, score):
    return {"image_id": 5 + image, "category_id": 10 * (category + 1), "bbox": list(box), "score": score}


def test_perfect_detections_have_an_average_precision_of_one(write):
    truth = write([(0, 0, (10, 10, 40, 40), 0), (1, 1, (50, 20, 30, 60), 0)])
    found = [detection(0, 0, (10, 10, 40, 40), 0.9), detection(1, 1, (50, 20, 30, 60), 0.4)]
    metrics = average_precision(truth, found)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1.0)


def test_a_mistake_with_a_higher_score_halves_precision(write):
    truth = write([(0, 0, (10, 10, 40, 40), 0)], categories=("cat",))
    found = [detection(0, 0, (120, 50, 40, 40), 0.9), detection(0, 0, (10, 10, 40, 40), 0.8)]
    assert average_precision(truth, found)["AP50"] == pytest.approx(0.5)


def test_an_iou_of_0_6_counts_for_ap50_but_not_for_ap75(write):
    truth = write([(0, 0, (0, 0, 50, 50), 0)], categories=("cat",))
    # 30 of 50 columns give an IoU of 0.6, which meets 3 of the ten thresholds (0.50, 0.55, 0.60).
    metrics = average_precision(truth, [detection(0, 0, (0, 0, 30, 50), 0.9)])
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == pytest.approx(0.0)
    assert metrics["AP"] == pytest.approx(0.3, abs=0.1 + ROUNDING)


def test_no_detections_give_zero(write):
    metrics = average_precision(write([(0, 0, (0, 0, 50, 50), 0)]), [])
    # The only box is of medium size, so the other sizes have no ground truth.
    absent = ("APs", "APl", "ARs", "ARl")
    assert metrics == {name: -1.0 if name in absent else 0.0 for name in METRICS}


def test_equals_pycocotools(write):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    rng = random.Random(0)

    def box():
        x, y = rng.uniform(0, 150), rng.uniform(0, 60)
        return (x, y, rng.uniform(4, 200 - x), rng.uniform(4, 100 - y))

    truths = [(rng.randrange(6), rng.randrange(3), box(), int(rng.random() < 0.15)) for _ in range(30)]
    truth = write(truths, categories=("cat", "dog", "cup"), num_images=6)
    found = [detection(rng.randrange(6), rng.randrange(3), box(), rng.random()) for _ in range(40)]
    for image, category, (x, y, w, h), _ in truths:
        near = (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), w * rng.uniform(0.8, 1.2), h)
        found.append(detection(image, category, near, rng.random()))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO(str(truth))
        evaluation = cocoeval.COCOeval(reference, reference.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = average_precision(truth, found)
    assert list(metrics.values()) == pytest.approx(evaluation.stats[: len(METRICS)].tolist(), abs=ROUNDING)
    assert 0.1 < metrics["AP"] < 0.9


def test_all_names_are_detected_and_the_best_pairs_are_kept(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)], categories=("cat", "dog", "red car"), num_images=3)
    found = detect_coco(tiny_model, tiny_processor, truth, batch_size=2, max_detections=25)
    assert {item["image_id"] for item in found} == {5, 6, 7}
    # 20 queries and three names make 60 pairs, of which the best 25 are kept.
    assert len(found) == 3 * 25
    assert {item["category_id"] for item in found} <= {10, 20, 30}
    scores = [item["score"] for item in found if item["image_id"] == 5]
    assert scores == sorted(scores, reverse=True)


def test_batch_equals_single_images(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)], num_images=3)
    together = detect_coco(tiny_model, tiny_processor, truth, batch_size=3, max_detections=5)
    apart = detect_coco(tiny_model, tiny_processor, truth, batch_size=1, max_detections=5)
    assert [item["category_id"] for item in together] == [item["category_id"] for item in apart]
    # Tolerance in pixels of a 200-pixel image, for float32 sums in another order.
    for one, other in zip(together, apart, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)


def test_limit_runs_on_the_first_images_only(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)])
    assert {item["image_id"] for item in detect_coco(tiny_model, tiny_processor, truth, limit=1)} == {5}


def test_boxes_of_an_image_rotated_by_exif_are_pixels_of_the_upright_image(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)])
    folder = truth.parent / "images"
    stored = next(iter(sorted(folder.iterdir())))
    upright = detect_coco(tiny_model, tiny_processor, truth, limit=1)
    with Image.open(stored) as picture:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
        turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(stored, exif=exif)
    for one, other in zip(upright, detect_coco(tiny_model, tiny_processor, truth, limit=1), strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)
