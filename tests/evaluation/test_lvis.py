"""Tests of LVIS fixed AP, against values counted by hand and against the lvis package if it is installed."""

import logging
import random
import sys
import types

import numpy as np
import pytest

pytest.importorskip("faster_coco_eval")

from gdino_hf.evaluation.lvis import lvis_fixed_ap

HERE, ELSEWHERE = [0, 0, 10, 10], [50, 50, 60, 60]


def found(*items):
    """Return a prediction with the given (label, box, score) items."""
    return {
        "boxes": [box for _, box, _ in items],
        "scores": [score for _, _, score in items],
        "labels": [label for label, _, _ in items],
    }


def truth(*labels, negative=(), not_exhaustive=()):
    """Return a reference with a box HERE for each label."""
    return {
        "boxes": [HERE] * len(labels),
        "labels": list(labels),
        "negative_labels": list(negative),
        "not_exhaustive_labels": list(not_exhaustive),
    }


def ap50(predictions, references, **options):
    return lvis_fixed_ap(predictions, references, **options)[0]["AP50"]


def test_a_mistake_counts_only_where_the_label_is_annotated():
    mistake, right = found((0, ELSEWHERE, 0.9)), found((0, HERE, 0.8))
    assert ap50([mistake, right], [truth(), truth(0)]) == pytest.approx(1.0)
    assert ap50([mistake, right], [truth(negative=[0]), truth(0)]) == pytest.approx(0.5)


def test_extra_detections_are_ignored_where_annotation_is_not_exhaustive():
    both = found((0, ELSEWHERE, 0.9), (0, HERE, 0.8))
    assert ap50([both], [truth(0)]) == pytest.approx(0.5)
    assert ap50([both], [truth(0, not_exhaustive=[0])]) == pytest.approx(1.0)


def test_the_limit_is_per_label_over_all_images_not_per_image():
    # With 400 other detections of the label in the image, COCO's limit of 100 would lose the right one, the last.
    many = found(*[(0, ELSEWHERE, 0.9 - i / 1000) for i in range(400)], (0, HERE, 0.1))
    assert ap50([many], [truth(0)]) == pytest.approx(1 / 401)
    assert ap50([many], [truth(0)], max_per_label=400) == pytest.approx(0.0)
    # Detections of another label do not count towards the limit.
    other = found(*[(1, HERE, 0.99)] * 400, (0, HERE, 0.1))
    assert ap50([other], [truth(0)], max_per_label=1) == pytest.approx(1.0)


def test_frequency_groups_are_averaged_separately():
    figures, _ = lvis_fixed_ap([found((0, HERE, 0.9))], [truth(0, 1)], frequencies=["r", "f", "c"])
    assert (figures["APr"], figures["APf"], figures["APc"]) == (pytest.approx(1.0), 0.0, -1.0)
    assert figures["AP"] == pytest.approx(0.5)


def test_without_frequencies_the_number_of_images_determines_the_group():
    references = [truth(0, 1, 2)] * 10 + [truth(1, 2)] * 90 + [truth(2)]
    figures, _ = lvis_fixed_ap([found((0, HERE, 0.9))] * len(references), references)
    # 10 images make a label rare, 100 common, 101 frequent. Label 0 is ignored in images not annotated for it.
    assert (figures["APr"], figures["APc"], figures["APf"]) == (pytest.approx(1.0), 0.0, 0.0)


def test_an_unknown_frequency_is_rejected():
    with pytest.raises(ValueError, match="'x' is no frequency"):
        lvis_fixed_ap([found()], [truth(0)], frequencies=["x"])


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_lvis_package(seed, monkeypatch):
    # The package imports OpenCV only for drawing, and uses np.float, which numpy has removed.
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
    monkeypatch.setattr(np, "float", float, raising=False)
    lvis = pytest.importorskip("lvis")
    rng = random.Random(seed)
    labels, frequencies = range(5), ["r", "c", "f", "r", "c"]
    predictions, references = [], []
    for _ in range(6):
        positive = [label for label in labels if rng.random() < 0.5]
        boxes = [(label, _box(rng)) for label in positive for _ in range(rng.randint(1, 4))]
        near = [(label, [side + rng.randint(0, 4) for side in box], rng.random()) for label, box in boxes]
        near = [(label, [*box[:2], max(box[0] + 1, box[2]), max(box[1] + 1, box[3])], s) for label, box, s in near]
        predictions.append(found(*near, *[(rng.choice(labels), _box(rng), rng.random()) for _ in range(15)]))
        references.append(
            {
                "boxes": [box for _, box in boxes],
                "labels": [label for label, _ in boxes],
                "negative_labels": [label for label in labels if label not in positive and rng.random() < 0.5],
                "not_exhaustive_labels": [label for label in positive if rng.random() < 0.4],
            }
        )
    dataset = {
        "images": [
            {
                "id": image,
                "neg_category_ids": reference["negative_labels"],
                "not_exhaustive_category_ids": reference["not_exhaustive_labels"],
            }
            for image, reference in enumerate(references)
        ],
        "categories": [{"id": label, "frequency": frequencies[label]} for label in labels],
        "annotations": [],
    }
    for image, reference in enumerate(references):
        for label, (x1, y1, x2, y2) in zip(reference["labels"], reference["boxes"], strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            item = {"image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            dataset["annotations"].append({**item, "id": len(dataset["annotations"]) + 1})
    results = [
        {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image, item in enumerate(predictions)
        for label, (x1, y1, x2, y2), score in zip(item["labels"], item["boxes"], item["scores"], strict=True)
    ]
    official = lvis.LVIS.__new__(lvis.LVIS)
    official.logger, official.dataset = logging.getLogger("lvis"), dataset
    official._create_index()
    evaluation = lvis.LVISEval(official, lvis.LVISResults(official, results, max_dets=-1), "bbox")
    evaluation.params.max_dets = -1
    evaluation.run()
    figures, _ = lvis_fixed_ap(predictions, references, frequencies)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    expected = {name: evaluation.get_results()[name] for name in names}
    # Both compute the same sums in double precision.
    assert {name: figures[name] for name in names} == pytest.approx(expected, abs=1e-9)


def _box(rng):
    x, y = rng.randint(0, 60), rng.randint(0, 60)
    return [x, y, x + rng.randint(1, 120), y + rng.randint(1, 120)]
