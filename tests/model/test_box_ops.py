"""Claims about boxes: formats, overlaps against hand-worked values, logits and suppression."""

import itertools
import math

import pytest
import torch

from gdino_hf.model.box_ops import (
    batched_nms,
    box_area,
    box_iou,
    cxcywh_to_xyxy,
    elementwise_giou,
    elementwise_iou,
    generalized_box_iou,
    inverse_sigmoid,
    nms,
    xyxy_to_cxcywh,
)

# A few float32 roundings of numbers near 1.
ROUNDING = 1e-6


def random_boxes(count, generator, scale=1.0):
    corner = torch.rand(count, 2, generator=generator)
    return torch.cat((corner, corner + 0.05 + scale * torch.rand(count, 2, generator=generator)), dim=-1)


def greedy_nms_by_loop(boxes, scores, threshold, classes=None):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i)):
        rivals = [j for j in kept if classes is None or classes[i] == classes[j]]
        if all(box_iou(boxes[i : i + 1], boxes[j : j + 1]).item() <= threshold for j in rivals):
            kept.append(i)
    return kept


def test_formats_are_inverse_to_each_other():
    boxes = random_boxes(50, torch.Generator().manual_seed(0))
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, atol=ROUNDING)
    assert torch.equal(cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.5, 1.0])), torch.tensor([0.25, 0.0, 0.75, 1.0]))


def test_half_precision_is_computed_in_float32():
    boxes = torch.tensor([[0.501, 0.5, 0.2, 0.2]], dtype=torch.bfloat16)
    assert cxcywh_to_xyxy(boxes).dtype == torch.float32
    assert box_iou(boxes, boxes).dtype == torch.float32
    assert inverse_sigmoid(boxes).dtype == torch.float32
    assert inverse_sigmoid(boxes.double()).dtype == torch.float64


def test_area_of_swapped_corners_is_zero():
    assert torch.equal(box_area(torch.tensor([[0.0, 0, 2, 3], [2, 3, 0, 0], [2, 0, 0, 3]])), torch.tensor([6.0, 0, 0]))


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0, 1.0),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
        ([0, 0, 1, 1], [2, 0, 3, 1], 0.0, -1 / 3),
        ([0, 0, 4, 4], [1, 1, 2, 2], 1 / 16, 1 / 16),
        ([0, 0, 1, 1], [1, 1, 2, 2], 0.0, -1 / 2),
    ],
)
def test_overlaps_equal_hand_worked_values(a, b, iou, giou):
    a, b = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    assert elementwise_iou(a, b).item() == pytest.approx(iou, abs=ROUNDING)
    assert elementwise_giou(a, b).item() == pytest.approx(giou, abs=ROUNDING)
    assert generalized_box_iou(b[None], a[None]).item() == pytest.approx(giou, abs=ROUNDING)


def test_pairwise_agrees_with_elementwise():
    generator = torch.Generator().manual_seed(1)
    a, b = random_boxes(7, generator), random_boxes(5, generator)
    for pairwise, elementwise in ((box_iou, elementwise_iou), (generalized_box_iou, elementwise_giou)):
        matrix = pairwise(a, b)
        assert matrix.shape == (7, 5)
        for i, j in itertools.product(range(7), range(5)):
            assert matrix[i, j] == elementwise(a[i], b[j])


def test_degenerate_boxes_give_finite_overlaps_and_gradients():
    a = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.8]], requires_grad=True)
    value = elementwise_giou(a, a.detach().flip(0)) + elementwise_giou(a, a.detach())
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(a.grad).all()


def test_giou_gradient_is_right():
    generator = torch.Generator().manual_seed(2)
    a, b = random_boxes(6, generator).double().requires_grad_(), random_boxes(6, generator).double()
    assert torch.autograd.gradcheck(elementwise_giou, (a, b))


def test_inverse_sigmoid_inverts_and_is_bounded_by_eps():
    x = torch.linspace(0.01, 0.99, 50)
    # At 0.01 the logit has slope 100, which multiplies the rounding error of the sigmoid.
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x, atol=1e-5)
    for eps in (1e-3, 1e-5):
        bound = -math.log(eps)
        ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]), eps)
        assert torch.allclose(ends, torch.tensor([-bound, -bound, bound, bound]), rtol=1e-5)


def test_empty_inputs_give_empty_outputs():
    none, some = torch.zeros(0, 4), torch.rand(3, 4)
    assert cxcywh_to_xyxy(none).shape == (0, 4)
    assert box_iou(none, some).shape == (0, 3)
    assert generalized_box_iou(some, none).shape == (3, 0)
    assert nms(none, torch.zeros(0), 0.5).shape == (0,)
    assert batched_nms(none, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).dtype == torch.int64


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_equals_the_greedy_loop(threshold):
    generator = torch.Generator().manual_seed(3)
    boxes = random_boxes(80, generator, scale=0.5)
    # Scores are rounded, so ties occur; the earlier box must win them.
    scores = (torch.rand(80, generator=generator) * 10).round() / 10
    classes = torch.randint(3, (80,), generator=generator)
    assert nms(boxes, scores, threshold).tolist() == greedy_nms_by_loop(boxes, scores, threshold)
    kept = batched_nms(boxes, scores, classes, threshold).tolist()
    assert kept == greedy_nms_by_loop(boxes, scores, threshold, classes)


def test_nms_in_blocks_equals_nms_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    boxes, scores = random_boxes(100, generator, scale=0.5), torch.rand(100, generator=generator)
    at_once = nms(boxes, scores, 0.4)
    monkeypatch.setattr("gdino_hf.model.box_ops.NMS_BLOCK", 7)
    assert torch.equal(nms(boxes, scores, 0.4), at_once)


def test_a_suppressed_box_suppresses_nothing():
    # The middle box overlaps both others; they do not overlap each other.
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.2).tolist() == [0, 2]


def test_classes_are_independent_even_at_huge_coordinates():
    boxes = torch.tensor([[1e6, 1e6, 1e6 + 10, 1e6 + 10]]).repeat(2, 1)
    assert batched_nms(boxes, torch.tensor([0.1, 0.2]), torch.tensor([5, 1000]), 0.5).tolist() == [1, 0]


def test_mismatched_nms_inputs_are_named():
    with pytest.raises(ValueError, match=r"boxes \(2, 4\) and scores \(3,\)"):
        nms(torch.rand(2, 4), torch.rand(3), 0.5)
    with pytest.raises(ValueError, match="one class per score"):
        batched_nms(torch.rand(2, 4), torch.rand(2), torch.zeros(3), 0.5)
