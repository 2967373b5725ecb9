"""EfficientNet-Lite with folded normalization, against the same layers one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gdino_hf.recipes.efficientnet_lite import EfficientNetLite, SameConvolution, crops
from recipes.small_efficientnet import BLOCKS, STARTS, small_weights


def step(weights, maps, conv, norm, stride=1, groups=1, active=True):
    """One convolution with TensorFlow's padding, by its definition, then normalization and ReLU6."""
    kernel = weights[f"{conv}.weight"].shape[-1]
    size = maps.shape[-1]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    padded = F.pad(maps, (total // 2, total - total // 2) * 2)
    found = F.conv2d(padded, weights[f"{conv}.weight"], stride=stride, groups=groups)
    names = ("running_mean", "running_var", "weight", "bias")
    found = F.batch_norm(found, *(weights[f"{norm}.{name}"] for name in names), eps=1e-3)
    return F.relu6(found) if active else found


@torch.no_grad()
def expected(weights, pixels):
    maps = step(weights, pixels, "_conv_stem", "_bn0", 2)
    for place, (outputs, expansion, _) in enumerate(BLOCKS):
        prefix, before, stride = f"_blocks.{place}.", maps, STARTS.get(place, 1)
        if expansion > 1:
            maps = step(weights, maps, f"{prefix}_expand_conv", f"{prefix}_bn0")
        maps = step(weights, maps, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride, maps.shape[1])
        maps = step(weights, maps, f"{prefix}_project_conv", f"{prefix}_bn2", active=False)
        if stride == 1 and before.shape[1] == outputs:
            maps = maps + before
    features = step(weights, maps, "_conv_head", "_bn1").mean((2, 3))
    return (features @ weights["_fc.weight"].T + weights["_fc.bias"]).softmax(-1)


@pytest.mark.parametrize("size", [64, 65, 47])
def test_probabilities_are_those_of_the_layers_one_by_one(size, tmp_path):
    weights = small_weights()
    torch.save(weights, tmp_path / "lite.pth")
    classifier = EfficientNetLite.from_file(tmp_path / "lite.pth")
    assert [block.shortcut for block in classifier.blocks] == [False, False, True, *[False] * 5]
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = classifier(pixels)
    torch.testing.assert_close(found, expected(weights, pixels), atol=1e-6, rtol=1e-4)
    assert found.std() > 0.01


def test_padding_leaves_more_at_the_end_than_at_the_beginning():
    weights = {"c.weight": torch.ones(1, 1, 3, 3), "n.weight": torch.ones(1), "n.bias": torch.zeros(1)}
    weights |= {"n.running_mean": torch.zeros(1), "n.running_var": torch.full((1,), 1 - 1e-3)}
    image = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])[None, None]
    # Stride 2 on 4 pixels needs 5: one more at the end, none before the first.
    found = SameConvolution(weights, "c", "n", 2, True)(image)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0], [0, 1]])[None, None])


def test_weights_of_another_network_are_refused():
    weights = small_weights()
    with pytest.raises(ValueError, match="squeeze and excitation, which EfficientNet-Lite does without"):
        EfficientNetLite({**weights, "_blocks.0._se_reduce.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="lack a classifier"):
        EfficientNetLite({name: value for name, value in weights.items() if name != "_fc.weight"})
    del weights["_blocks.7._project_conv.weight"]
    with pytest.raises(ValueError, match="have 6 stages, EfficientNet-Lite has 7"):
        EfficientNetLite(weights)


def test_crops_are_square_with_a_margin_and_stay_in_the_image():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 255
    image = Image.fromarray(pixels)
    left, right, whole = crops(image, [[0, 0, 20, 20], [60, 0, 80, 20], [0, 0, 80, 40]], size=8)
    torch.testing.assert_close(left, torch.full((3, 8, 8), -127 / 128))
    torch.testing.assert_close(right, torch.full((3, 8, 8), 1.0))
    assert (whole[:, :, 0] == -127 / 128).all()
    assert (whole[:, :, -1] == 1).all()
    # Half of the longer side and its margin, 0.65 * 20 = 13 pixels, to either side of x = 35: the last 8 are white.
    (middle,) = crops(image, [[25, 10, 45, 30]], size=26)
    assert (middle[:, :, -7:] == 1).all()
    assert (middle[:, :, :16] == -127 / 128).all()
    assert crops(image, [], size=8).shape == (0, 3, 8, 8)
