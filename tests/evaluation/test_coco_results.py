"""Claims about average precision: COCO's own tool, and cases one can count."""

import contextlib
import io
import json
import random

import pytest
from PIL import Image

from gdino_hf.evaluation.coco_results import METRICS, average_precision, detect_coco

# Both are double precision sums of the same hundred terms.
ROUNDING = 1e-9


@pytest.fixture
def write(tmp_path):
    def write(boxes, categories=("cat", "dog"), num_images=2, size=(200, 100)):
        """A COCO file with its images; boxes are (image, category, xywh, iscrowd)."""
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


def test_perfect_detections(write):
    truth = write([(0, 0, (10, 10, 40, 40), 0), (1, 1, (50, 20, 30, 60), 0)])
    found = [detection(0, 0, (10, 10, 40, 40), 0.9), detection(1, 1, (50, 20, 30, 60), 0.4)]
    metrics = average_precision(truth, found)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1.0)


def test_a_better_scored_mistake_halves_precision(write):
    truth = write([(0, 0, (10, 10, 40, 40), 0)], categories=("cat",))
    found = [detection(0, 0, (120, 50, 40, 40), 0.9), detection(0, 0, (10, 10, 40, 40), 0.8)]
    assert average_precision(truth, found)["AP50"] == pytest.approx(0.5)


def test_overlap_of_0_6_counts_at_50_but_not_at_75(write):
    truth = write([(0, 0, (0, 0, 50, 50), 0)], categories=("cat",))
    # 30 of the 50 columns: IoU 0.6, so 3 of the ten thresholds (0.50, 0.55, 0.60) are met.
    metrics = average_precision(truth, [detection(0, 0, (0, 0, 30, 50), 0.9)])
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == pytest.approx(0.0)
    assert metrics["AP"] == pytest.approx(0.3, abs=0.1 + ROUNDING)


def test_nothing_found_is_zero(write):
    metrics = average_precision(write([(0, 0, (0, 0, 50, 50), 0)]), [])
    # The one box is of medium size: of the others there is nothing to find.
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


def test_every_name_is_asked_and_the_best_pairs_are_kept(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)], categories=("cat", "dog", "red car"), num_images=3)
    found = detect_coco(tiny_model, tiny_processor, truth, batch_size=2, max_detections=25)
    assert {item["image_id"] for item in found} == {5, 6, 7}
    # 20 queries answer for three names each: more pairs than queries, 25 of them kept.
    assert len(found) == 3 * 25
    assert {item["category_id"] for item in found} <= {10, 20, 30}
    scores = [item["score"] for item in found if item["image_id"] == 5]
    assert scores == sorted(scores, reverse=True)


def test_batches_give_what_single_images_give(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)], num_images=3)
    together = detect_coco(tiny_model, tiny_processor, truth, batch_size=3, max_detections=5)
    apart = detect_coco(tiny_model, tiny_processor, truth, batch_size=1, max_detections=5)
    assert [item["category_id"] for item in together] == [item["category_id"] for item in apart]
    # Boxes in pixels of an image of 200, from float32 in another order of summation.
    for one, other in zip(together, apart, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)


def test_limit_looks_at_the_first_images_only(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)])
    assert {item["image_id"] for item in detect_coco(tiny_model, tiny_processor, truth, limit=1)} == {5}


def test_boxes_of_a_picture_stored_on_its_side_are_pixels_of_the_upright_one(write, tiny_model, tiny_processor):
    truth = write([(0, 0, (10, 10, 40, 40), 0)])
    folder = truth.parent / "images"
    stored = next(iter(sorted(folder.iterdir())))
    upright = detect_coco(tiny_model, tiny_processor, truth, limit=1)
    with Image.open(stored) as picture:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees to the right
        turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(stored, exif=exif)
    for one, other in zip(upright, detect_coco(tiny_model, tiny_processor, truth, limit=1), strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)
