"""Tests of detection_map: the metrics equal those of pycocotools, loaded by path and imported."""

import json
import multiprocessing

import numpy as np
import pytest
import random_cases as cases
import torch

evaluate = pytest.importorskip("evaluate")
pytest.importorskip("faster_coco_eval")

from gdino_hf.evaluation import detection_map  # noqa: E402
from gdino_hf.evaluation.box_map import evaluate_boxes  # noqa: E402
from gdino_hf.evaluation.detection_map import DetectionMap  # noqa: E402

# Both sum the same numbers in double precision, in another order.
ROUNDING = 1e-9


@pytest.fixture
def metric(tmp_path):
    return DetectionMap(cache_dir=str(tmp_path))


@pytest.mark.parametrize("seed", range(12))
def test_equals_pycocotools_on_adversarial_cases(metric, seed):
    pytest.importorskip("pycocotools")
    predictions, references = cases.random_case(seed)
    stats = cases.pycocotools_stats(
        cases.coco_annotations(references),
        cases.coco_annotations(predictions),
        list(range(len(references))),
        list(range(cases.LABELS)),
    )
    figures = metric.compute(predictions=predictions, references=references)
    figures.pop("per_class")
    assert list(figures.values()) == pytest.approx(stats, abs=ROUNDING)


def test_equals_pycocotools_on_fractional_corners(metric):
    pytest.importorskip("pycocotools")
    # 10.1 + 32 - 10.1 is not 32 in floating point, but the area must stay on the border between small and medium.
    boxes = [[10.1, 10.1, 32.0, 32.0], [70.3, 20.7, 96.0, 96.0], [0.1, 0.2, 31.9, 32.1]]
    truths = [{"image_id": 0, "category_id": 0, "bbox": box, "area": box[2] * box[3]} for box in boxes]
    found = [{**truth, "score": 0.9 - 0.1 * place} for place, truth in enumerate(truths)]
    found.append({"image_id": 0, "category_id": 0, "bbox": [150.7, 3.3, 32.0, 32.0], "area": 32.0**2, "score": 0.95})
    corners = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in found)]
    figures = metric.compute(
        predictions=[{"boxes": corners, "scores": [item["score"] for item in found], "labels": [0] * 4}],
        references=[{"boxes": corners[:3], "labels": [0] * 3}],
    )
    figures.pop("per_class")
    assert list(figures.values()) == pytest.approx(cases.pycocotools_stats(truths, found, [0], [0]), abs=ROUNDING)


def test_equals_pycocotools_on_predictions_of_gdino_nano(shared, metric, tmp_path):
    """Checks real predictions, with crowds, an image without ground truth and one without predictions."""
    pytest.importorskip("pycocotools")
    from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor
    from gdino_hf.evaluation.ground_truth import coco_ground_truth
    from gdino_hf.evaluation.predict import predict

    data = shared / "data" / "everyday"
    content = json.loads((data / "val.json").read_text())
    content["images"] = content["images"][:16]
    chosen = sorted(image["id"] for image in content["images"])
    # The data set has neither crowds nor empty images, so some are made.
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in chosen[1:]]
    for item in content["annotations"][::7]:
        item["iscrowd"] = 1
    (tmp_path / "val.json").write_text(json.dumps(content))
    truth = coco_ground_truth(tmp_path / "val.json", data / "images")
    model, processor = GDinoForObjectDetection.from_pretrained(NANO), GDinoProcessor.from_pretrained(NANO)
    found, meant = truth.paired_with(predict(model, processor, truth.rows, truth.labels, batch_size=4).images)
    found[2] = {**found[2], "boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0)}
    metric.add_batch(predictions=found, references=meant)
    figures = metric.compute(label_names=truth.labels)
    per_class = figures.pop("per_class")

    ids = sorted(category["id"] for category in content["categories"])
    detections = [
        {
            "image_id": item["image_id"],
            "category_id": ids[int(label)],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "score": float(score),
        }
        for item in found
        for (x1, y1, x2, y2), label, score in zip(item["boxes"], item["labels"], item["scores"], strict=True)
    ]
    stats = cases.pycocotools_stats(content["annotations"], detections, chosen, ids)
    assert len(found) == len(meant) == 16
    assert list(figures.values()) == pytest.approx(stats, abs=1e-6)
    assert 0.05 < figures["AP"] < 0.9
    known = [row["AP"] for row in per_class.values() if row["AP"] >= 0]
    assert np.mean(known) == pytest.approx(figures["AP"], abs=ROUNDING)


def test_loading_by_path_gives_the_same_metrics(metric, tmp_path):
    predictions, references = cases.random_case(3)
    loaded = evaluate.load(detection_map.__file__, cache_dir=str(tmp_path / "loaded"))
    # The loaded class comes from a copy of the file.
    assert type(loaded).__module__ != DetectionMap.__module__
    for prediction, reference in zip(predictions, references, strict=True):
        loaded.add(prediction=prediction, reference=reference)
    assert loaded.compute() == metric.compute(predictions=predictions, references=references)


def test_takes_tensors_arrays_and_empty_lists(metric):
    metric.add_batch(
        predictions=[
            {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])},
            {"boxes": [], "scores": [], "labels": []},
        ],
        references=[
            {"boxes": np.array([[0, 0, 10, 10]]), "labels": np.array([1])},
            {"boxes": np.zeros((0, 4)), "labels": []},
        ],
    )
    figures = metric.compute(label_names=["cat", "dog"])
    assert figures["AP"] == pytest.approx(1.0)
    assert figures["per_class"]["dog"]["AP50"] == pytest.approx(1.0)
    assert figures["per_class"]["cat"] == {"AP": -1.0, "AP50": -1.0, "AP75": -1.0, "AR": -1.0}


def test_takes_half_precision_arrays_of_dicts_and_iscrowd(metric):
    predictions = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10]], dtype=torch.bfloat16, requires_grad=True),
            "scores": torch.tensor([0.5], dtype=torch.float16),
            "labels": torch.tensor([3.0]),
            "text_labels": ["cat"],
        }
    ]
    reference = {"boxes": [[0, 0, 10, 10], [50, 50, 90, 90]], "labels": np.array([3, 3], dtype=np.uint8)}
    for crowd, expected in ((torch.tensor([0, 1]), 1.0), (torch.tensor([0, 0]), 0.5)):
        target = {**reference, "iscrowd": crowd, "image_id": torch.tensor([7]), "area": torch.tensor([100.0, 1600.0])}
        figures = metric.compute(
            predictions=np.array(predictions), references=np.array([target]), label_names={"3": "cat", "5": "dog"}
        )
        assert figures["AR100"] == pytest.approx(expected)
        assert list(figures["per_class"]) == ["cat", "dog"]


def test_two_processes_give_the_metrics_of_one(metric, tmp_path):
    predictions, references = cases.random_case(5)
    references = [{**reference, "image_id": image} for image, reference in enumerate(references)]
    whole = metric.compute(predictions=predictions, references=references)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        halves = [(rank, predictions[rank::2], references[rank::2], str(tmp_path)) for rank in range(2)]
        assert pool.starmap(judge_half, halves, chunksize=1) == [whole, None]


def judge_half(rank, predictions, references, folder):
    """Compute the metric in one of two processes, which sees half of the images."""
    half = DetectionMap(num_process=2, process_id=rank, experiment_id="two", cache_dir=folder)
    half.add_batch(predictions=predictions, references=references)
    return half.compute()


def test_an_iou_of_0_6_counts_at_three_of_ten_thresholds(metric):
    # 30 of 50 columns give an IoU of 0.6, which meets the thresholds 0.50, 0.55 and 0.60.
    figures = metric.compute(
        predictions=[{"boxes": [[0, 0, 30, 50]], "scores": [0.9], "labels": [0]}],
        references=[{"boxes": [[0, 0, 50, 50]], "labels": [0]}],
    )
    assert (figures["AP50"], figures["AP75"]) == (pytest.approx(1.0), pytest.approx(0.0))
    assert figures["AP"] == pytest.approx(0.3)


def test_tied_scores_are_ordered_by_image_id(metric):
    right = {"boxes": [[0, 0, 10, 10]], "scores": [0.5], "labels": [0]}
    wrong = {"boxes": [[50, 50, 60, 60]], "scores": [0.5], "labels": [0]}
    truth = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    nothing = {"boxes": [], "labels": []}
    first = metric.compute(
        predictions=[wrong, right], references=[{**nothing, "image_id": 1}, {**truth, "image_id": 2}]
    )
    last = metric.compute(predictions=[wrong, right], references=[{**nothing, "image_id": 2}, {**truth, "image_id": 1}])
    assert (first["AP50"], last["AP50"]) == (pytest.approx(0.5), pytest.approx(1.0))


def test_no_ground_truth_gives_minus_one_and_no_detections_give_zero(metric):
    nothing = {"boxes": [], "scores": [], "labels": []}
    assert metric.compute(predictions=[nothing], references=[{"boxes": [], "labels": []}])["AP"] == -1.0
    figures = metric.compute(predictions=[nothing], references=[{"boxes": [[0, 0, 50, 50]], "labels": [0]}])
    assert (figures["AP"], figures["APm"], figures["APs"]) == (0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"boxes": [], "labels": []}, {"boxes": [], "labels": []}, "lacks scores"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [], "labels": [0]}, {"boxes": [], "labels": []}, "1 boxes but 0 scores"),
        ({"boxes": [[5, 0, 1, 1]], "scores": [1], "labels": [0]}, {"boxes": [], "labels": []}, "x1 <= x2"),
        (
            {"boxes": np.ones((4, 2)), "scores": [1, 1], "labels": [0, 0]},
            {"boxes": [], "labels": []},
            r"shape \(4, 2\)",
        ),
        ({"boxes": [0, 0, 1, 1], "scores": [1], "labels": [0]}, {"boxes": [], "labels": []}, r"shape \(4,\)"),
        ({"boxes": [[0, 1], [0]], "scores": [1], "labels": [0]}, {"boxes": [], "labels": []}, "different lengths"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [1], "labels": [0.5]}, {"boxes": [], "labels": []}, "labels holds 0.5"),
        (
            {"boxes": [[0, 0, 1, 1]], "scores": [1], "labels": ["cat"]},
            {"boxes": [], "labels": []},
            "holds .*cat.*numbers",
        ),
        ({"boxes": None, "scores": [], "labels": []}, {"boxes": [], "labels": []}, "boxes holds None"),
        ({"boxes": [], "scores": [], "labels": []}, {"boxes": [[0, 0, 1, 1]], "labels": []}, "1 boxes but 0 labels"),
        (
            {"boxes": [[0, 0, 1, 1]], "scores": [float("nan")], "labels": [0]},
            {"boxes": [], "labels": []},
            "not finite",
        ),
    ],
)
def test_malformed_input_is_rejected(metric, prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[prediction], references=[reference])


def test_label_names_must_be_complete_and_distinct(metric):
    image = {"boxes": [[0, 0, 1, 1]], "labels": [1]}
    for names, message in ((["cat"], "no name for the label 1"), (["cat", "cat"], "'cat' twice")):
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=[{**image, "scores": [1]}], references=[image], label_names=names)


def test_unequal_numbers_of_images_are_rejected(metric):
    nothing = {"boxes": [], "labels": []}
    with pytest.raises(ValueError, match="0 images but references of 1"):
        metric.add_batch(predictions=[], references=[nothing])
    with pytest.raises(ValueError, match="0 images but references of 1"):
        evaluate_boxes([], [nothing])
