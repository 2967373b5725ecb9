"""Claims about the small backbone: strides and channels of its maps, its parts, its place among the AutoBackbones."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoBackbone, AutoConfig

from gdino_hf.model.csp_pan import (
    ConvLeakyReLU,
    CspPanBackbone,
    CspPanConfig,
    CspStage,
    PartialBlock,
    PathAggregation,
    resize_to,
)

SMALL = {"stem_width": 4, "stage_widths": [4, 4, 8, 8], "stage_depths": [1, 1, 2, 1], "pan_width": 6}
# float32 against float32 in another order of summation.
TOLERANCE = 1e-5


def make(**changes):
    torch.manual_seed(0)
    return CspPanBackbone(CspPanConfig(**SMALL, **changes)).eval()


def pixels(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_default_network_has_the_published_size():
    backbone = CspPanBackbone(CspPanConfig())
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 3_295_328
    assert backbone.channels == [128, 128, 128]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97), (33, 31), (1, 7)])
def test_maps_have_strides_8_16_32_rounded_up(height, width):
    maps = make()(pixels(height, width)).feature_maps
    sizes = [(2, 6, -(-height // stride), -(-width // stride)) for stride in (8, 16, 32)]
    assert [tuple(x.shape) for x in maps] == sizes


def test_hidden_states_are_the_stem_and_the_stages():
    output = make()(pixels(), output_hidden_states=True)
    sizes = [(2, channels, 64 // s, 96 // s) for channels, s in ((4, 4), (8, 4), (8, 8), (16, 16), (16, 32))]
    assert [tuple(x.shape) for x in output.hidden_states] == sizes
    assert make()(pixels()).hidden_states is None


def test_return_dict_false_returns_a_tuple():
    backbone = make()
    maps = backbone(pixels(), return_dict=False)[0]
    assert all(torch.equal(x, y) for x, y in zip(maps, backbone(pixels()).feature_maps, strict=True))


def test_head_features_double_the_channels_and_keep_the_first_half():
    plain, doubled = make(), make(head_features=True)
    assert doubled.channels == [12, 12, 12]
    doubled.load_state_dict(plain.state_dict(), strict=False)
    maps = doubled(pixels()).feature_maps
    for level, (x, y) in enumerate(zip(plain(pixels()).feature_maps, maps, strict=True)):
        assert torch.equal(y[:, :6], x)
        expected = F.leaky_relu(doubled.heads[level].conv(x), 0.1)
        torch.testing.assert_close(y[:, 6:], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chosen", [{"out_features": ["p4", "p5"]}, {"out_indices": [1, 2]}])
def test_levels_can_be_chosen_by_name_or_index(chosen):
    backbone = make(**chosen)
    assert backbone.config.out_features == ["p4", "p5"]
    assert list(backbone.config.out_indices) == [1, 2]
    assert backbone.channels == [6, 6]
    maps, every = backbone(pixels()).feature_maps, make()(pixels()).feature_maps
    assert all(torch.equal(x, y) for x, y in zip(maps, every[1:], strict=True))


@pytest.mark.parametrize("head_features", [False, True])
def test_saves_and_loads_like_any_auto_backbone(head_features, tmp_path):
    backbone = make(head_features=head_features, out_features=["p3", "p5"], negative_slope=0.2)
    backbone.save_pretrained(tmp_path)
    # AutoBackbone.from_pretrained contacts the Hub even for folders, so the configuration is used to find the class.
    assert type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path))) is CspPanBackbone
    loaded = CspPanBackbone.from_pretrained(tmp_path).eval()
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    for name, value in SMALL.items():
        assert getattr(loaded.config, name) == value
    assert loaded.config.negative_slope == 0.2
    expected = backbone(pixels()).feature_maps
    assert all(torch.equal(x, y) for x, y in zip(loaded(pixels()).feature_maps, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_widths": [4, 4, 8]}, r"stage_widths is \[4, 4, 8\], but there are 4 stages"),
        ({"stage_depths": [1] * 5}, r"stage_depths is \[1, 1, 1, 1, 1\], but there are 4 stages"),
        ({"stage_widths": [4, 4, 7, 8]}, r"stage_widths is \[4, 4, 7, 8\], .*give even numbers"),
        ({"stage_widths": [0, 4, 8, 8]}, "give even numbers"),
        ({"out_features": ["p6"]}, "p6"),
        ({"out_indices": [3]}, "out_indices"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CspPanConfig(**changes)


def test_convolution_is_leaky_below_zero():
    layer = ConvLeakyReLU(1, 1, negative_slope=0.25)
    torch.nn.init.dirac_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.tensor([[[[-4.0, 2.0], [0.0, -1.0]]]])
    assert torch.equal(layer(x), torch.tensor([[[[-1.0, 2.0], [0.0, -0.25]]]]))


def test_blocks_output_the_deeper_half_first_and_stages_the_entry_last():
    torch.manual_seed(0)
    stage, x = CspStage(3, 4, 1, stride=2, negative_slope=0.1), torch.randn(1, 3, 6, 6)
    block = stage.blocks[0]
    assert isinstance(block, PartialBlock)
    entry = stage.entry(x)
    first = block.first(entry)
    inner = torch.cat((block.second(first), first), dim=1)
    assert torch.equal(stage(x), torch.cat((stage.exit(inner), entry), dim=1))
    assert stage(x).shape == (1, 8, 3, 3)


def test_resize_is_bilinear_between_pixel_centres():
    x = torch.tensor([[[[0.0, 4.0]]]])
    found = resize_to(x, torch.zeros(1, 1, 1, 4))
    assert found.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert resize_to(found, x).flatten().tolist() == [0.5, 3.5]


def test_pyramid_sums_from_coarse_to_fine_and_back():
    torch.manual_seed(0)
    pyramid = PathAggregation([2, 3, 4], 5)
    maps = [torch.randn(1, c, n, n) for c, n in ((2, 8), (3, 4), (4, 2))]
    fine, middle, coarse = (lateral(x) for lateral, x in zip(pyramid.laterals, maps, strict=True))
    middle = middle + resize_to(coarse, middle)
    fine = fine + resize_to(middle, fine)
    middle = middle + resize_to(fine, middle)
    coarse = coarse + resize_to(middle, coarse)
    for found, expected in zip(pyramid(maps), (fine, middle, coarse), strict=True):
        assert torch.equal(found, expected)


def test_every_parameter_gets_a_gradient():
    backbone = make(head_features=True)
    sum(x.square().sum() for x in backbone(pixels()).feature_maps).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


def test_initial_weights_preserve_the_scale_of_the_image():
    backbone = CspPanBackbone(CspPanConfig()).eval()
    with torch.no_grad():
        maps = backbone(pixels(64, 64)).feature_maps
    # Kaiming initialization through fifteen layers and the sums of the pyramid: within an order of magnitude of 1.
    assert all(0.1 < x.std() < 10 for x in maps)
