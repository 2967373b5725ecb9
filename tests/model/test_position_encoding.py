"""Claims about position embeddings: each equals its formula, channel by channel and cell by cell."""

import math

import pytest
import torch

from gdino_hf.model.position_encoding import (
    box_position_embedding,
    image_position_embedding,
    sine_embedding,
    token_position_embedding,
)

# float32 angles up to 2 pi * 8, rounded once or twice to a relative 1e-7.
TOLERANCE = 2e-5


def wave(position, width, temperature):
    """Compute the sine embedding of one position in float64."""
    channels = []
    for i in range(width // 2):
        angle = position / temperature ** (2 * i / width)
        channels += [math.sin(angle), math.cos(angle)]
    return channels


@pytest.mark.parametrize("temperature", [20, 10000, 3.5])
@pytest.mark.parametrize("width", [2, 8, 10])
def test_sine_embedding_equals_its_formula(temperature, width):
    positions = 7 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    found = sine_embedding(positions, width, temperature)
    assert found.shape == (2, 3, width)
    assert found.dtype == torch.float32
    for row, values in zip(found.flatten(0, 1).tolist(), positions.flatten().tolist(), strict=True):
        assert row == pytest.approx(wave(values, width, temperature), abs=TOLERANCE)


def test_sine_embedding_known_values():
    found = sine_embedding(torch.tensor([0.0, math.pi / 2, math.pi]), 4, 100.0)
    # The second frequency is lower by a factor of 100^(2 / 4) = 10.
    slow = [math.sin(math.pi / 20), math.cos(math.pi / 20)], [math.sin(math.pi / 10), math.cos(math.pi / 10)]
    expected = [[0, 1, 0, 1], [1, 0, *slow[0]], [0, -1, *slow[1]]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_half_precision_positions_give_float32_embeddings():
    position = torch.tensor([1.5])
    assert torch.equal(sine_embedding(position.bfloat16(), 8, 20), sine_embedding(position, 8, 20))


@pytest.mark.parametrize("temperature", [20, 10000])
def test_image_grid_is_normalized_by_its_real_part_y_before_x(temperature):
    width = 12
    mask = torch.zeros(2, 4, 5).bool()
    mask[0], mask[1, :3, :2] = True, True
    found = image_position_embedding(mask, width, temperature).view(2, 4, 5, width)
    for image, (height, columns) in enumerate(((4, 5), (3, 2))):
        for row in range(height):
            for column in range(columns):
                y = (row + 1) / (height + 1e-6) * 2 * math.pi
                x = (column + 1) / (columns + 1e-6) * 2 * math.pi
                expected = wave(y, width // 2, temperature) + wave(x, width // 2, temperature)
                assert found[image, row, column].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_a_padded_image_has_the_positions_it_has_alone():
    mask = torch.zeros(1, 6, 7).bool()
    mask[:, :4, :3] = True
    padded = image_position_embedding(mask, 16, 20).view(1, 6, 7, 16)[:, :4, :3]
    alone = image_position_embedding(torch.ones(1, 4, 3).bool(), 16, 20).view(1, 4, 3, 16)
    assert torch.equal(padded, alone)


def test_an_image_of_padding_only_stays_finite():
    assert image_position_embedding(torch.zeros(1, 2, 3).bool(), 8, 20).isfinite().all()


@pytest.mark.parametrize("temperature", [20, 10000])
def test_boxes_are_embedded_in_the_order_y_x_w_h(temperature):
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))
    found = box_position_embedding(boxes, 6, temperature)
    assert found.shape == (2, 3, 24)
    for row, (x, y, w, h) in zip(found.flatten(0, 1).tolist(), boxes.flatten(0, 1).tolist(), strict=True):
        expected = [value for side in (y, x, w, h) for value in wave(side * 2 * math.pi, 6, temperature)]
        assert row == pytest.approx(expected, abs=TOLERANCE)


def test_tokens_are_embedded_by_their_place_in_the_phrase():
    position_ids = torch.tensor([[0, 0, 1, 2, 0], [0, 1, 2, 0, 3]])
    found = token_position_embedding(position_ids, 8, 10000)
    for row, position in zip(found.flatten(0, 1).tolist(), position_ids.flatten().tolist(), strict=True):
        assert row == pytest.approx(wave(position * 2 * math.pi, 8, 10000), abs=TOLERANCE)
    assert torch.equal(found[0, 3], found[1, 2])
