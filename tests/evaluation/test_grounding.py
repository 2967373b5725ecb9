"""Tests of phrase recall and referring accuracy against values counted by hand."""

import pytest

from gdino_hf.evaluation.grounding import phrase_recall, referring_accuracy

LEFT, RIGHT, BOTH, NOWHERE = [0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 30, 10], [90, 90, 99, 99]


def image(*phrases):
    return {"phrases": [{"boxes": list(boxes)} for boxes in phrases]}


def test_recall_counts_the_rank_of_the_first_hit():
    predictions = [image([LEFT], [NOWHERE] * 3 + [LEFT], [NOWHERE] * 7 + [LEFT], [NOWHERE] * 10 + [LEFT])]
    recall = phrase_recall(predictions, [image([LEFT], [LEFT], [LEFT], [LEFT])])
    assert recall == {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75, "phrases": 4}


def test_any_accepts_one_true_box_and_merged_demands_the_box_around_all():
    one, around = [image([LEFT])], [image([BOTH])]
    truth = [image([LEFT, RIGHT])]
    assert phrase_recall(one, truth, "any")["recall@1"] == 1.0
    assert phrase_recall(one, truth, "merged")["recall@1"] == 0.0
    assert phrase_recall(around, truth, "any")["recall@1"] == 0.0
    assert phrase_recall(around, truth, "merged")["recall@1"] == 1.0


def test_an_iou_of_exactly_one_half_is_enough():
    half, less = [0, 0, 10, 5], [0, 0, 10, 4.99]
    assert phrase_recall([image([half])], [image([LEFT])])["recall@1"] == 1.0
    assert phrase_recall([image([less])], [image([LEFT])])["recall@1"] == 0.0


def test_phrases_without_a_box_are_ignored():
    recall = phrase_recall([image([LEFT], [LEFT])], [image([LEFT], [])])
    assert (recall["recall@1"], recall["phrases"]) == (1.0, 1)
    assert phrase_recall([], [])["recall@1"] == -1.0


def test_a_phrase_without_predicted_boxes_is_missed():
    assert phrase_recall([image([])], [image([LEFT])])["recall@10"] == 0.0


def test_referring_accuracy_uses_only_the_best_box():
    predictions = [image([LEFT, RIGHT]), image([RIGHT, LEFT])]
    assert referring_accuracy(predictions, [image([LEFT])] * 2) == {"accuracy": 0.5, "expressions": 2}


def test_mismatches_are_rejected():
    with pytest.raises(ValueError, match="1 phrases but references of 2"):
        phrase_recall([image([LEFT])], [image([LEFT], [RIGHT])])
    with pytest.raises(ValueError, match="1 images but references of 0"):
        phrase_recall([image([LEFT])], [])
    with pytest.raises(ValueError, match="'best'"):
        phrase_recall([], [], "best")
