"""The closed-set teacher's boxes as targets of the decoder."""

import math

import pytest
import torch

from gdino_hf.model.matcher import MatchingCosts
from gdino_hf.recipes.teacher_boxes import MOST_BOXES, set_loss, teacher_boxes

COSTS = MatchingCosts(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0, focal_alpha=0.25, focal_gamma=2.0)
# [CLS] first label (two tokens) . second label . [SEP]; the teacher knows the second label only in the second image.
PHRASE_IDS = torch.tensor([[-1, 0, 0, -1, 1, -1, -1], [-1, 0, 0, -1, 1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
CLASSES = torch.tensor([[2, -1], [0, 1]])


def seen(entries, num_cells=6, num_classes=3):
    """Scores and boxes of all cells: zero scores and whole-image boxes but for (image, cell, class, score, box)."""
    scores = torch.zeros(2, num_cells, num_classes)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(2, num_cells, 1)
    for image, cell, label, score, box in entries:
        scores[image, cell, label] = score
        boxes[image, cell] = torch.tensor(box)
    return scores, boxes


LEFT, RIGHT, NEAR_LEFT = [0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.2, 0.4], [0.26, 0.5, 0.2, 0.4]


def found(entries):
    return teacher_boxes(*seen(entries), CLASSES, PHRASE_IDS, MASK)


def test_only_likely_boxes_of_labels_in_the_prompt_count():
    result = found(
        [
            (0, 0, 2, 0.9, LEFT),
            (0, 1, 0, 0.9, RIGHT),  # class 0 is not in the first prompt
            (0, 2, 2, 0.04, RIGHT),  # too faint
            (1, 3, 1, 0.3, RIGHT),
            (1, 4, 0, 0.6, LEFT),
        ]
    )
    assert result.targets.sizes == [1, 2]
    torch.testing.assert_close(result.scores, torch.tensor([0.9, 0.6, 0.3]))
    torch.testing.assert_close(result.targets.boxes, torch.tensor([LEFT, LEFT, RIGHT]))
    assert result.targets.batch_index.tolist() == [0, 1, 1]
    assert result.targets.positive_maps.int().tolist() == [
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
    ]


def test_of_boxes_that_overlap_the_likeliest_is_kept():
    result = found([(1, 0, 0, 0.5, LEFT), (1, 1, 0, 0.8, NEAR_LEFT), (1, 2, 1, 0.4, LEFT)])
    # The box of another class stays.
    torch.testing.assert_close(result.scores, torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(result.targets.boxes, torch.tensor([NEAR_LEFT, LEFT]))


def test_labels_that_the_teacher_does_not_know_are_not_taught():
    result = found([])
    assert result.taught.int().tolist() == [[1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert result.targets.sizes == [0, 0]


def test_number_of_boxes_is_limited_to_the_likeliest():
    count = MOST_BOXES + 10
    scores, boxes = torch.zeros(2, count, 3), torch.zeros(2, count, 4)
    scores[1, :, 0] = torch.linspace(0.1, 0.9, count)
    boxes[1] = torch.stack([torch.tensor([(i + 0.5) / count, 0.5, 0.5 / count, 0.1]) for i in range(count)])
    result = teacher_boxes(scores, boxes, CLASSES, PHRASE_IDS, MASK)
    assert result.targets.sizes == [0, MOST_BOXES]
    assert result.scores.min() >= scores[1, 10, 0]


def quality_focal(p, y):
    return (y - p) ** 2 * -(y * math.log(p) + (1 - y) * math.log(1 - p))


def test_set_loss_equals_its_formula():
    teacher = found([(1, 0, 0, 0.8, LEFT), (1, 1, 1, 0.4, RIGHT)])
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(2, 3, 9, generator=generator)
    boxes = torch.full((2, 3, 4), 0.5)
    # Query 2 is nearest to the left box and query 0 to the right one.
    boxes[1, 2], boxes[1, 0] = torch.tensor([0.25, 0.5, 0.2, 0.3]), torch.tensor([0.75, 0.5, 0.2, 0.4])
    loss = set_loss([logits], [boxes], teacher, MASK > 0, COSTS)
    wanted = torch.zeros(2, 3, 7)
    wanted[1, 2, 1:3], wanted[1, 0, 4] = 0.8, 0.4
    expected = sum(
        quality_focal(logits[image, query, token].sigmoid().item(), wanted[image, query, token].item())
        for image in range(2)
        for query in range(3)
        for token in range(7)
        if teacher.taught[image, token]
    )
    assert loss.ce.item() == pytest.approx(expected / 1.2, rel=1e-5)
    assert loss.bbox.item() == pytest.approx(0.8 * 0.1 / 1.2, rel=1e-4)
    # One box lies in the other, so GIoU is IoU: 0.06 / 0.08.
    assert loss.giou.item() == pytest.approx(0.8 * 0.25 / 1.2, rel=1e-4)


def test_layers_are_added_and_a_duplicate_costs():
    teacher = found([(1, 0, 0, 0.8, LEFT)])
    boxes = torch.tensor([LEFT, LEFT, RIGHT]).repeat(2, 1, 1)
    single = torch.full((2, 3, 7), -8.0)
    single[1, 0, 1:3] = math.log(0.8 / 0.2)
    double = single.clone()
    double[1, 1, 1:3] = math.log(0.8 / 0.2)
    one, two = (set_loss([x], [boxes], teacher, MASK > 0, COSTS).ce.item() for x in (single, double))
    assert one < 1e-2 < 1 < two
    both = set_loss([single, double], [boxes, boxes], teacher, MASK > 0, COSTS)
    assert both.ce.item() == pytest.approx(one + two)


def test_gradients_reach_logits_and_boxes_but_not_untaught_tokens():
    teacher = found([(0, 0, 2, 0.8, LEFT)])
    logits, boxes = torch.zeros(2, 3, 7, requires_grad=True), torch.full((2, 3, 4), 0.4, requires_grad=True)
    loss = set_loss([logits], [boxes], teacher, MASK > 0, COSTS)
    (loss.ce + loss.bbox + loss.giou).backward()
    assert logits.grad[0, :, 4].abs().max() == 0
    assert logits.grad[0, :, 1].abs().min() > 0
    # One query of the first image is matched, none of the second.
    assert (boxes.grad.abs().sum(-1) > 0).sum(dim=1).tolist() == [1, 0]


def test_nothing_seen_gives_finite_terms():
    loss = set_loss([torch.zeros(2, 3, 7)], [torch.full((2, 3, 4), 0.5)], found([]), MASK > 0, COSTS)
    assert loss.ce.item() > 0
    assert (loss.bbox.item(), loss.giou.item()) == (0, 0)
