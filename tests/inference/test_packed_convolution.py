"""Convolutions by rows give what the whole convolution gives."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gdino_hf.inference import packed_convolution as module
from gdino_hf.inference.packed_convolution import PackedConv2d, pack_convolutions

# Sums of up to 1,200 products of standard normal numbers, in another order.
ROUNDING = 2e-4


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (5, 1, 2, 24), (7, 2, 3, 3), ((3, 1), (2, 1), (0, 2), 1), (4, 4, 0, 1)],
)
@pytest.mark.parametrize("size", [(37, 29), (8, 64), (5, 5)])
def test_rows_equal_the_whole(monkeypatch, kernel, stride, padding, groups, size):
    monkeypatch.setattr(module, "_WORK", 1)  # several blocks although the maps are small
    generator = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(24, 48, kernel, stride, padding, groups=groups)
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 24, *size, generator=generator)
    packed = PackedConv2d(plain)
    with torch.inference_mode():
        ours, theirs = packed(x), plain(x)
        again = packed(x)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < ROUNDING
    assert torch.equal(ours, again)


def test_weights_are_shared_and_changes_seen():
    plain = nn.Conv2d(3, 8, 3, padding=1)
    packed = PackedConv2d(plain)
    x = torch.ones(1, 3, 6, 6)
    with torch.inference_mode():
        packed(x)
    with torch.no_grad():
        plain.weight.mul_(2.0)
    with torch.inference_mode():
        assert torch.allclose(packed(x), plain(x), atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(copy.deepcopy(packed)(x), plain(x), atol=1e-5)
    assert [name for name, _ in packed.named_parameters()] == ["weight", "bias"]


def test_gradients_and_odd_layers_stay_with_pytorch():
    plain = nn.Conv2d(3, 8, 3, padding=1)
    x = torch.ones(1, 3, 6, 6, requires_grad=True)
    PackedConv2d(plain)(x).sum().backward()
    assert x.grad is not None
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, dilation=2), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding_mode="reflect")
    )
    pack_convolutions(layers)
    assert {type(layer) for layer in layers} == {nn.Conv2d}
    wider = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.ConvTranspose2d(8, 8, 3))
    pack_convolutions(wider)
    assert [type(wider[0][0]), type(wider[1])] == [PackedConv2d, nn.ConvTranspose2d]


def test_an_image_smaller_than_the_kernel_is_refused_as_usual():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"(?i)kernel size"):
        PackedConv2d(nn.Conv2d(3, 8, 7))(torch.ones(1, 3, 4, 4))


SEVERAL_SIZES = """
import torch
from torch import nn
from gdino_hf.inference.packed_convolution import PackedConv2d
layer = PackedConv2d(nn.Conv2d(256, 256, 3, padding=1))
images = [torch.ones(1, 256, *size).contiguous(memory_format=torch.channels_last) for size in [(10, 10), (40, 40)]]
with torch.inference_mode():
    for repeat in range(2):
        print(f"repeat {repeat}", flush=True)
        for image in images:
            layer(image)
"""


def test_weights_are_not_converted_again():
    """oneDNN's layout of a weight depends on the input's size; in the wrong one it is converted in every call."""
    package = str(Path(sys.modules["gdino_hf"].__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", SEVERAL_SIZES]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    first, second = (part.count(",reorder,") for part in printed.split("repeat 0")[1].split("repeat 1"))
    assert "convolution" in printed, "oneDNN does not say what it does"
    assert first > 0
    assert second == 0


def test_packed_weights_of_many_sizes_do_not_pile_up():
    layer = PackedConv2d(nn.Conv2d(3, 8, 3, padding=1))
    with torch.inference_mode():
        for side in range(8, 28):
            layer(torch.ones(1, 3, side, side))
    assert 1 <= len(layer._packed[1]) <= module._COPIES
