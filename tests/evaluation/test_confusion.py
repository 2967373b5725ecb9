"""Tests of confusion matrices against values counted by hand."""

import numpy as np
import pytest

from gdino_hf.evaluation.confusion import best_threshold, confusion_matrix, pairwise_iou

HERE, NEAR, ELSEWHERE = [0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]
CAT, DOG, BACKGROUND = 0, 1, 2


def found(*items):
    return {
        "boxes": [box for _, box, _ in items],
        "labels": [label for label, _, _ in items],
        "scores": [score for _, _, score in items],
    }


def truth(*items, crowd=None):
    return {
        "boxes": [box for _, box in items],
        "labels": [label for label, _ in items],
        "crowd": crowd or [False] * len(items),
    }


def matrix(prediction, reference, threshold=0.3):
    return confusion_matrix([prediction], [reference], 2, threshold).tolist()


def test_right_wrong_missed_and_false_detections_are_counted():
    prediction = found((CAT, HERE, 0.9), (CAT, ELSEWHERE, 0.8), (DOG, [80, 0, 90, 10], 0.7))
    reference = truth((CAT, HERE), (DOG, ELSEWHERE), (DOG, [20, 20, 30, 30]))
    # The cat is found, one dog is detected as a cat and one missed, and one detected dog does not exist.
    assert matrix(prediction, reference) == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_a_match_with_the_right_label_precedes_a_higher_score():
    prediction = found((DOG, HERE, 0.9), (CAT, NEAR, 0.5))
    assert matrix(prediction, truth((CAT, HERE))) == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_a_second_detection_of_an_object_is_false():
    assert matrix(found((CAT, HERE, 0.9), (CAT, NEAR, 0.8)), truth((CAT, HERE))) == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_detections_below_the_threshold_do_not_count():
    assert matrix(found((CAT, HERE, 0.29)), truth((CAT, HERE))) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_a_crowd_is_never_missed_and_excuses_detections_of_its_label():
    reference = truth((CAT, [0, 0, 100, 100]), crowd=[True])
    assert matrix(found((CAT, HERE, 0.9)), reference) == np.zeros((3, 3)).tolist()
    assert matrix(found((DOG, HERE, 0.9)), reference) == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_empty_images_give_a_matrix_of_zeros():
    assert matrix(found(), truth()) == np.zeros((3, 3)).tolist()


def test_rows_and_columns_sum_to_true_and_predicted_boxes():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 80, (40, 2))
    boxes = np.hstack([corners, corners + rng.uniform(5, 40, (40, 2))])
    labels = rng.integers(0, 2, 40)
    prediction = {"boxes": boxes[:25] + 1, "labels": rng.integers(0, 2, 25), "scores": rng.uniform(size=25)}
    counted = confusion_matrix([prediction], [{"boxes": boxes, "labels": labels}], 2, 0.0)
    assert counted[:2].sum(axis=1).tolist() == np.bincount(labels).tolist()
    assert counted[:, :2].sum(axis=0).tolist() == np.bincount(prediction["labels"]).tolist()


def test_best_threshold_is_where_f1_is_highest():
    # F1 after each detection is 2/3, 1/2, 4/5 and 2/3.
    items = [(CAT, HERE, 0.9), (CAT, [90, 0, 99, 9], 0.7), (CAT, ELSEWHERE, 0.6), (DOG, HERE, 0.2)]
    assert best_threshold([found(*items)], [truth((CAT, HERE), (CAT, ELSEWHERE))]) == 0.6
    assert best_threshold([found((DOG, HERE, 0.9))], [truth((CAT, HERE))]) == 0.0
    assert best_threshold([], []) == 0.0


def test_iou_of_boxes_without_area_is_zero():
    assert pairwise_iou(np.array([[1.0, 1, 1, 1]]), np.array([[1.0, 1, 1, 1]])).tolist() == [[0.0]]
    assert pairwise_iou(np.array([HERE], dtype=float), np.array([[0, 0, 20, 10.0]]))[0, 0] == pytest.approx(0.5)
    assert pairwise_iou(np.array([HERE], dtype=float), np.array([[0, 0, 20, 10.0]]), over_first_area=True)[0, 0] == 1.0
