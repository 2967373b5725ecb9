"""Claims about query selection: which image tokens become queries, and where gradients go."""

import torch
from torch import nn

from gdino_hf.model.image_geometry import make_proposals
from gdino_hf.model.query_selection import select_queries

SHAPES = [(4, 6), (2, 3)]
TOKENS = 30


def make_masks():
    """Masks of a full image, and of one that fills 3 x 4 of 4 x 6 cells and 2 x 2 of 2 x 3."""
    masks = [torch.ones(2, h, w).bool() for h, w in SHAPES]
    masks[0][1, 3:], masks[0][1, :, 4:], masks[1][1, :, 2:] = False, False, False
    return masks, torch.cat([mask.flatten(1) for mask in masks], dim=1)


class Setup:
    """Image tokens with given logits, whose features are not changed by the projection."""

    def __init__(self, best, real=None, valid=None, queries=3, tokens=4, width=5):
        images, count = len(best), len(best[0])
        generator = torch.Generator().manual_seed(0)
        self.vision = torch.randn(images, count, width, generator=generator).requires_grad_()
        self.real = torch.ones(images, count).bool() if real is None else torch.tensor(real).bool()
        self.valid = self.real if valid is None else torch.tensor(valid).bool()
        self.proposals = torch.randn(images, count, 4, generator=generator)
        self.proposals = self.proposals.masked_fill(~self.valid[..., None], torch.inf)
        # Image tokens differ in their best text token, and summing over text tokens would give another order.
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


def test_queries_are_the_image_tokens_with_the_highest_token_logits_best_first():
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


def test_gradients_reach_only_the_selected_tokens():
    setup = Setup([[0.5, 3.0, -1.0, 2.0, 1.0]])
    found = setup.select()
    (found.features.sum() + found.box_logits.sum()).backward()
    assert (setup.vision.grad[0].abs().sum(-1) > 0).tolist() == [False, True, False, True, True]
    assert setup.box_head.weight.grad.abs().sum() > 0


def test_padding_is_never_chosen_before_real_tokens():
    # Token 3 is padding and would score best; token 1 is real but has no proposal.
    setup = Setup([[1.0, -90.0, 2.0, 100.0]], real=[[1, 1, 1, 0]], valid=[[1, 0, 1, 0]])
    found = setup.select()
    assert torch.equal(found.logits[0], setup.logits[0, [2, 0, 1]])
    # The features of a token without proposal are zero, and its box logits are infinite.
    assert (found.features[0, 2] == 0).all()
    assert (found.box_logits[0, 2] == torch.inf).all()


def test_missing_tokens_are_filled_up_with_empty_ones():
    setup = Setup([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]], real=[[1, 1, 1], [1, 1, 0]], queries=5)
    setup.logits[:, 3:] = 80.0
    found = setup.select()
    assert found.features.shape == (2, 5, 5)
    assert found.all_logits.shape == (2, 5, 4)
    assert torch.equal(found.logits[0, :3], setup.logits[0, [2, 1, 0]])
    assert torch.equal(found.logits[1, :2], setup.logits[1, [0, 1]])
    assert (found.features[0, 3:] == 0).all()
    assert (found.features[1, 2:] == 0).all()
    # Infinite box logits give finite boxes and finite gradients after the sigmoid.
    boxes = found.box_logits.sigmoid()
    assert (boxes[0, 3:] == 1).all()
    boxes.sum().backward()
    assert setup.vision.grad.isfinite().all()
    assert setup.box_head.weight.grad.isfinite().all()


def test_an_image_selects_the_same_queries_alone_and_beside_a_larger_one():
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
