"""Claims about image geometry: centres of cells, reference points on every level, and proposals."""

import math

import pytest
import torch

from gdino_hf.model.image_geometry import grid_centers, grid_reference_points, make_proposals

SHAPES = [(4, 6), (2, 3)]


def make_masks():
    """Masks of a full image, and of one that fills 3 x 4 of 4 x 6 cells and 2 x 2 of 2 x 3."""
    masks = [torch.ones(2, h, w).bool() for h, w in SHAPES]
    masks[0][1, 3:], masks[0][1, :, 4:], masks[1][1, :, 2:] = False, False, False
    return masks, torch.cat([mask.flatten(1) for mask in masks], dim=1)


def test_grid_centers_come_row_by_row():
    found = grid_centers(2, 3, torch.device("cpu"))
    assert found.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5]]


def test_reference_points_are_the_centres_of_cells_on_every_level():
    found = grid_reference_points([(2, 3), (1, 2)], torch.ones(1, 2, 2))
    assert found.shape == (1, 8, 2, 2)
    first = [[1 / 6, 1 / 4], [3 / 6, 1 / 4], [5 / 6, 1 / 4], [1 / 6, 3 / 4], [3 / 6, 3 / 4], [5 / 6, 3 / 4]]
    second = [[1 / 4, 1 / 2], [3 / 4, 1 / 2]]
    for level in range(2):
        torch.testing.assert_close(found[0, :, level], torch.tensor(first + second))


def test_padding_scales_reference_points_by_the_ratios_of_the_levels():
    # On the first level two of three columns and one of two rows are real, on the second one of two columns.
    ratios = torch.tensor([[[2 / 3, 1 / 2], [1 / 2, 1.0]]])
    found = grid_reference_points([(2, 3), (1, 2)], ratios)
    # Relative to the image the tokens are at (0.5 / 2, 0.5 / 1), ...; each level scales this by its own ratios.
    in_image = [[x, y] for y in (0.5, 1.5) for x in (0.25, 0.75, 1.25)] + [[0.5, 0.5], [1.5, 0.5]]
    for level in range(2):
        torch.testing.assert_close(found[0, :, level], torch.tensor(in_image) * ratios[0, level])
    # On its own level a token is at the centre of its cell, with or without padding.
    own = grid_reference_points([(2, 3), (1, 2)], torch.ones(1, 2, 2))
    torch.testing.assert_close(found[0, :6, 0], own[0, :6, 0])
    torch.testing.assert_close(found[0, 6:, 1], own[0, 6:, 1])


def test_proposals_surround_real_cells_and_double_in_size_with_each_level():
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
def test_proposals_within_a_hundredth_of_the_border_are_left_out(width, edge):
    # The first centre is at 0.5 / width: 0.0102 for 49 cells, 0.0098 for 51.
    mask = torch.ones(1, 1, width).bool()
    _, valid = make_proposals([(1, width)], mask.flatten(1), [mask])
    assert valid[0, 1:-1].all()
    assert bool(valid[0, 0]) is edge
    assert bool(valid[0, -1]) is edge


def test_levels_whose_proposals_exceed_the_image_have_none():
    shapes = [(1, 1)] * 6
    masks = [torch.ones(1, 1, 1).bool()] * 6
    _, valid = make_proposals(shapes, torch.ones(1, 6).bool(), masks)
    # 0.05 * 2^4 = 0.8 fits into the image, 1.6 does not.
    assert valid[0].tolist() == [True] * 5 + [False]
