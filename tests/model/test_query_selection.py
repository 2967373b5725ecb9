"""Claims about query selection: where proposals stand, and which tokens become queries."""

import math

import pytest
import torch
from torch import nn

from gdino_hf.model.query_selection import make_proposals, select_queries

SHAPES = [(4, 6), (2, 3)]
TOKENS = 30


def make_masks():
    """A full image, and one that fills 3 x 4 of 4 x 6 cells and 2 x 2 of 2 x 3."""
    masks = [torch.ones(2, h, w).bool() for h, w in SHAPES]
    masks[0][1, 3:], masks[0][1, :, 4:], masks[1][1, :, 2:] = False, False, False
    return masks, torch.cat([mask.flatten(1) for mask in masks], dim=1)


def test_proposals_are_boxes_around_real_cells_that_double_with_the_level():
    masks, flat = make_masks()
    logits, valid = make_proposals(SHAPES, flat, masks)
    assert logits.dtype == torch.float32
    real_sizes = [[(4, 6), (2, 3)], [(3, 4), (2, 2)]]
    for image in range(2):
        token = 0
        for level, (height, width) in enumerate(SHAPES):
            real_height, real_width = real_sizes[image][level]
            for row in range(height):
                for column in range(width):
                    if row < real_height and column < real_width:
                        side = 0.05 * 2**level
                        box = [(column + 0.5) / real_width, (row + 0.5) / real_height, side, side]
                        assert valid[image, token]
                        expected = [math.log(x / (1 - x)) for x in box]
                        assert logits[image, token].tolist() == pytest.approx(expected, abs=1e-5)
                    else:
                        assert not valid[image, token]
                        assert (logits[image, token] == math.inf).all()
                    token += 1


def test_known_proposal():
    logits, _ = make_proposals([(1, 1)], torch.ones(1, 1).bool(), [torch.ones(1, 1, 1).bool()])
    assert logits.sigmoid().flatten().tolist() == pytest.approx([0.5, 0.5, 0.05, 0.05], abs=1e-6)


@pytest.mark.parametrize(("width", "edge"), [(49, True), (51, False)])
def test_proposals_nearer_to_the_border_than_a_hundredth_are_left_out(width, edge):
    # The first centre is at 0.5 / width: 0.0102 of 49 cells, 0.0098 of 51.
    mask = torch.ones(1, 1, width).bool()
    _, valid = make_proposals([(1, width)], mask.flatten(1), [mask])
    assert valid[0, 1:-1].all()
    assert bool(valid[0, 0]) is edge
    assert bool(valid[0, -1]) is edge


def test_levels_whose_proposals_outgrow_the_image_have_none():
    shapes = [(1, 1)] * 6
    masks = [torch.ones(1, 1, 1).bool()] * 6
    _, valid = make_proposals(shapes, torch.ones(1, 6).bool(), masks)
    # 0.05 * 2^4 = 0.8 is a proposal, 1.6 is none.
    assert valid[0].tolist() == [True] * 5 + [False]


class Setup:
    """Tokens whose logits are written down; the features pass through unchanged."""

    def __init__(self, best, real=None, valid=None, queries=3, tokens=4, width=5):
        images, count = len(best), len(best[0])
        generator = torch.Generator().manual_seed(0)
        self.vision = torch.randn(images, count, width, generator=generator).requires_grad_()
        self.real = torch.ones(images, count).bool() if real is None else torch.tensor(real).bool()
        self.valid = self.real if valid is None else torch.tensor(valid).bool()
        self.proposals = torch.randn(images, count, 4, generator=generator)
        self.proposals = self.proposals.masked_fill(~self.valid[..., None], torch.inf)
        # The best token differs from image token to image token, and the sum over tokens speaks for another order.
        self.logits = torch.full((images, max(count, queries), tokens), -50.0)
        for image, row in enumerate(best):
            for index, score in enumerate(row):
                self.logits[image, index] = -10.0 * abs(score) - 20
                self.logits[image, index, index % tokens] = score
        self.box_head = nn.Linear(width, 4)
        self.queries = queries

    def select(self, **options):
        return select_queries(
            self.vision,
            self.real,
            self.proposals,
            self.valid,
            self.queries,
            lambda x: x,
            lambda _: self.logits,
            self.box_head,
            **options,
        )


def test_queries_are_the_tokens_with_the_best_single_token_best_first():
    best = [[0.5, 3.0, -1.0, 2.0, 1.0], [9.0, -3.0, -1.0, -2.0, 7.0]]
    setup = Setup(best)
    found = setup.select()
    for image, order in enumerate(([1, 3, 4], [0, 4, 2])):
        assert torch.equal(found.logits[image], setup.logits[image, order])
        assert torch.equal(found.features[image], setup.vision[image, order])
        boxes = setup.box_head(setup.vision[image, order]) + setup.proposals[image, order]
        torch.testing.assert_close(found.box_logits[image], boxes)
    assert found.all_logits.shape == (2, 5, 4)
    assert found.all_box_logits is None
    everything = setup.select(all_boxes=True)
    assert everything.all_box_logits.shape == (2, 5, 4)
    torch.testing.assert_close(everything.box_logits, found.box_logits)


def test_gradients_reach_features_boxes_and_head_of_the_selected_only():
    setup = Setup([[0.5, 3.0, -1.0, 2.0, 1.0]])
    found = setup.select()
    (found.features.sum() + found.box_logits.sum()).backward()
    assert (setup.vision.grad[0].abs().sum(-1) > 0).tolist() == [False, True, False, True, True]
    assert setup.box_head.weight.grad.abs().sum() > 0


def test_padding_is_never_chosen_before_real_tokens():
    # Token 3 is padding and would score best; token 1 is real, though no proposal stands there.
    setup = Setup([[1.0, -90.0, 2.0, 100.0]], real=[[1, 1, 1, 0]], valid=[[1, 0, 1, 0]])
    found = setup.select()
    assert torch.equal(found.logits[0], setup.logits[0, [2, 0, 1]])
    # What has no proposal is zero before the projection, and its box stays at infinity.
    assert (found.features[0, 2] == 0).all()
    assert (found.box_logits[0, 2] == torch.inf).all()


def test_fewer_tokens_than_queries_are_filled_up_with_empty_ones():
    setup = Setup([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]], real=[[1, 1, 1], [1, 1, 0]], queries=5)
    setup.logits[:, 3:] = 80.0
    found = setup.select()
    assert found.features.shape == (2, 5, 5)
    assert found.all_logits.shape == (2, 5, 4)
    assert torch.equal(found.logits[0, :3], setup.logits[0, [2, 1, 0]])
    assert torch.equal(found.logits[1, :2], setup.logits[1, [0, 1]])
    assert (found.features[0, 3:] == 0).all()
    assert (found.features[1, 2:] == 0).all()
    # Boxes at infinity are finite after the sigmoid and give a gradient that is.
    boxes = found.box_logits.sigmoid()
    assert (boxes[0, 3:] == 1).all()
    boxes.sum().backward()
    assert setup.vision.grad.isfinite().all()
    assert setup.box_head.weight.grad.isfinite().all()


def test_an_image_selects_the_same_alone_and_beside_a_larger_one():
    masks, flat = make_masks()
    proposals, valid = make_proposals(SHAPES, flat, masks)
    alone_shapes = [(3, 4), (2, 2)]
    alone_masks = [torch.ones(1, *shape).bool() for shape in alone_shapes]
    alone_proposals, alone_valid = make_proposals(alone_shapes, torch.ones(1, 16).bool(), alone_masks)
    torch.manual_seed(0)
    vision = torch.randn(2, TOKENS, 5)
    box_head, class_head, project = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(5, 5)
    for queries in (7, 16):
        heads = (queries, project, class_head, box_head)
        batch = select_queries(vision, flat, proposals, valid, *heads)
        alone = select_queries(vision[1:, flat[1]], torch.ones(1, 16).bool(), alone_proposals, alone_valid, *heads)
        for name in ("features", "logits", "box_logits"):
            torch.testing.assert_close(getattr(batch, name)[1:], getattr(alone, name), rtol=0, atol=1e-6)
