"""Pictures that are prepared one by one and joined equal those that the processor prepares together."""

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.detection.prepared_images import join_images, prepare_image


@pytest.mark.parametrize("sizes", [[(90, 60)], [(90, 60), (60, 90), (200, 50)]])
def test_joined_pictures_equal_a_batch_of_the_processor(tiny_processor, sizes):
    chance = np.random.default_rng(0)
    images = [Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    joined = join_images([prepare_image(tiny_processor, image, "cpu") for image in images], "cpu")
    expected = tiny_processor(images=images)
    assert set(joined) == set(expected)
    for name, value in expected.items():
        assert torch.equal(joined[name], value), name
    assert joined.original_sizes == expected.original_sizes == [(height, width) for width, height in sizes]


def test_preparing_leaves_the_number_of_threads(tiny_processor):
    before = torch.get_num_threads()
    prepare_image(tiny_processor, Image.new("RGB", (64, 64)), torch.device("cpu"))
    assert torch.get_num_threads() == before
