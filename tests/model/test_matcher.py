"""Claims about matching: for every layer and image it is the one-to-one assignment of least cost."""

import itertools

import pytest
import torch

from gdino_hf.model.matcher import MatchingCosts, hungarian_match, matching_cost
from gdino_hf.model.targets import prepare_targets

COSTS = MatchingCosts(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0, focal_alpha=0.25, focal_gamma=2.0)
PHRASES = torch.tensor([[-1, 0, 0, -1, 1, -1, -1], [-1, 0, -1, -1, -1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def make(counts=(3, 2), queries=5, layers=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = [
        {
            "class_labels": torch.arange(n) % (2 - image),
            "boxes": 0.3 + 0.3 * torch.rand(n, 4, generator=generator),
        }
        for image, n in enumerate(counts)
    ]
    logits = torch.randn(layers, 2, queries, 7, generator=generator).masked_fill(MASK[:, None] == 0, -torch.inf)
    boxes = 0.2 + 0.5 * torch.rand(layers, 2, queries, 4, generator=generator)
    return logits, boxes, prepare_targets(labels, PHRASES, MASK)


@pytest.mark.parametrize("tied", [False, True])
def test_total_cost_equals_brute_force(tied):
    logits, boxes, targets = make()
    if tied:
        logits, boxes = logits[:, :, :1].expand_as(logits), boxes[:, :, :1].expand_as(boxes)
    for layer, (target, query) in enumerate(hungarian_match(logits, boxes, targets, MASK > 0, COSTS)):
        cost = matching_cost(logits[layer], boxes[layer], targets, MASK > 0, COSTS)
        for image in range(2):
            rows = (targets.batch_index == image).nonzero()[:, 0]
            mine = targets.batch_index[target] == image
            assert len(set(query[mine].tolist())) == len(rows)
            best = min(cost[rows, list(p)].sum().item() for p in itertools.permutations(range(5), len(rows)))
            # With ties the pairs may differ but not the total, a sum of a few float32 numbers below 20.
            assert cost[target[mine], query[mine]].sum().item() == pytest.approx(best, abs=1e-4)


def test_more_boxes_than_queries_match_every_query():
    logits, boxes, targets = make(counts=(4, 1), queries=2)
    target, query = hungarian_match(logits, boxes, targets, MASK > 0, COSTS)[0]
    assert sorted(query[targets.batch_index[target] == 0].tolist()) == [0, 1]
    assert len(target) == 3


def test_layers_may_differ_in_queries_and_an_image_in_boxes():
    logits, boxes, targets = make(counts=(3, 0))
    both = hungarian_match([logits[0], logits[1, :, :4]], [boxes[0], boxes[1, :, :4]], targets, MASK > 0, COSTS)
    alone = hungarian_match([logits[1, :, :4]], [boxes[1, :, :4]], targets, MASK > 0, COSTS)
    assert torch.equal(both[1][1], alone[0][1])
    assert both[0][0].tolist() == [0, 1, 2]


def test_half_precision_under_autocast_matches_as_float32():
    logits, boxes, targets = make()
    low = [x.bfloat16() for x in logits], [x.bfloat16() for x in boxes]
    expected = hungarian_match([x.float() for x in low[0]], [x.float() for x in low[1]], targets, MASK > 0, COSTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hungarian_match(*low, targets, MASK > 0, COSTS)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(expected, found, strict=True))


def test_predictions_that_are_not_finite_are_named():
    logits, boxes, targets = make()
    boxes[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        hungarian_match(logits, boxes, targets, MASK > 0, COSTS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_without_boxes_predictions_that_are_not_finite_are_named_too(value, where):
    logits, boxes, targets = make(counts=(0, 0))
    assert [len(query) for _, query in hungarian_match(logits, boxes, targets, MASK > 0, COSTS)] == [0, 0]
    (logits if where == "logits" else boxes)[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite .* look for NaN or infinity in pixel_values"):
        hungarian_match(logits, boxes, targets, MASK > 0, COSTS)
