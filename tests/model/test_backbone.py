"""Claims about the backbone: frozen statistics, unused parameters, levels, and masks of feature maps."""

import copy

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, SwinConfig

from gdino_hf.model.backbone import (
    Backbone,
    FrozenBatchNorm2d,
    check_image_sizes,
    freeze_batch_norm,
    input_projections,
    project,
    project_by_size,
    resize_mask,
    unused_parameters,
)
from gdino_hf.model.configuration_gdino import GDinoConfig

SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def swin(levels=4, **changes):
    return GDinoConfig(
        backbone_config=SwinConfig(**{**SWIN, "out_indices": [2, 3, 4], **changes}), num_feature_levels=levels
    )


def resnet(features=("stage2", "stage3", "stage4"), levels=4):
    return GDinoConfig(backbone_config=ResNetConfig(**RESNET, out_features=list(features)), num_feature_levels=levels)


def batch_norm(channels=3):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def test_frozen_batch_norm_equals_batch_norm_in_eval_mode_in_either_mode():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), batch_norm(), nn.Sequential(batch_norm(), nn.ReLU()))
    x = torch.randn(4, 3, 5, 6)
    expected = module.eval()(x)
    freeze_batch_norm(module)
    assert isinstance(module[1], FrozenBatchNorm2d)
    assert isinstance(module[2][0], FrozenBatchNorm2d)
    before = copy.deepcopy(module.state_dict())
    assert torch.equal(module.train()(x), expected)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias"]


def test_frozen_batch_norm_equals_its_formula_and_loads_the_weights_of_a_batch_norm():
    norm = batch_norm()
    frozen = FrozenBatchNorm2d(3, norm.eps)
    frozen.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4, 5)
    for channel in range(3):
        mean, variance = norm.running_mean[channel].item(), norm.running_var[channel].item()
        scale, shift = norm.weight[channel].item(), norm.bias[channel].item()
        expected = (x[:, channel].double() - mean) / (variance + 1e-3) ** 0.5 * scale + shift
        torch.testing.assert_close(frozen(x)[:, channel].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (swin(), {"swin.layernorm"}),
        (swin(levels=2), {"swin.layernorm", "hidden_states_norms.stage2"}),
        (resnet(("stage2", "stage3")), {"encoder.stages.3"}),
        (resnet(), set()),
    ],
    ids=["swin", "swin with two levels", "resnet without its last stage", "resnet"],
)
def test_unused_parameters_are_those_without_a_gradient(config, expected):
    names = unused_parameters(config)
    assert all(any(name.startswith(prefix + ".") for prefix in expected) for name in names)
    assert all(any(name.startswith(prefix + ".") for name in names) for prefix in expected)
    backbone = Backbone(config)
    model = backbone.conv_encoder.model
    # Parameters of batch norms became buffers.
    names = {name for name, _ in model.named_parameters()} & set(names)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == names
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    maps = backbone(torch.randn(1, 3, 64, 64))[-config.num_feature_levels :]
    sum(x.square().sum() for x in maps).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == names


def test_maps_come_fine_to_coarse_with_their_channels():
    backbone = Backbone(resnet()).eval()
    maps = backbone(torch.zeros(2, 3, 64, 96))
    assert backbone.channels == [8, 12, 16]
    assert [tuple(x.shape) for x in maps] == [(2, 8, 8, 12), (2, 12, 4, 6), (2, 16, 2, 3)]


def test_no_batch_norm_is_left_in_a_backbone():
    modules = list(Backbone(resnet()).modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in modules)


@pytest.mark.parametrize(("levels", "sizes"), [(2, [4, 2]), (3, [8, 4, 2]), (5, [8, 4, 2, 1, 1])])
def test_levels_are_the_last_maps_followed_by_strided_convolutions(levels, sizes):
    torch.manual_seed(0)
    backbone = Backbone(resnet(levels=levels)).eval()
    projections = input_projections(backbone.channels, levels, 12)
    features = project(backbone, projections, torch.randn(1, 3, 64, 64))
    assert [tuple(x.shape) for x in features] == [(1, 12, size, size) for size in sizes]


def test_the_first_extra_level_reads_the_last_map_and_the_next_reads_the_first():
    torch.manual_seed(0)
    backbone = Backbone(resnet(levels=5)).eval()
    projections, pixels = input_projections(backbone.channels, 5, 12), torch.randn(1, 3, 64, 64)
    features, maps = project(backbone, projections, pixels), backbone(pixels)
    for index in range(3):
        assert torch.equal(features[index], projections[index](maps[index]))
    assert torch.equal(features[3], projections[3](maps[2]))
    assert torch.equal(features[4], projections[4](features[3]))


def test_images_of_mixed_sizes_are_projected_as_if_alone():
    torch.manual_seed(0)
    backbone = Backbone(resnet(levels=4)).eval()
    projections = input_projections(backbone.channels, 4, 12)
    sizes = [(64, 40), (33, 64), (64, 40)]
    pixels = torch.randn(3, 3, 64, 64)
    features, masks = project_by_size(backbone, projections, pixels, sizes)
    for index, (height, width) in enumerate(sizes):
        alone = project(backbone, projections, pixels[index : index + 1, :, :height, :width])
        for feature, mask, x in zip(features, masks, alone, strict=True):
            h, w = x.shape[-2:]
            # Convolutions of two images and of one add up in a different order.
            torch.testing.assert_close(feature[index, :, :h, :w], x[0], rtol=0, atol=1e-5)
            assert mask[index, :h, :w].all()
            assert mask[index].sum() == h * w
            assert (feature[index][:, ~mask[index]] == 0).all()


def test_sizes_tell_whether_there_is_padding():
    pixels = torch.zeros(2, 3, 8, 6)
    assert check_image_sizes([(8, 6), (8, 6)], pixels)
    assert not check_image_sizes([(8, 6), (8, 5)], pixels)


@pytest.mark.parametrize("sizes", [[(8, 6)], [(8, 6), (9, 6)], [(8, 6), (8, 0)]])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=r"image_sizes .* do not fit pixel_values \(2, 3, 8, 6\)"):
        check_image_sizes(sizes, torch.zeros(2, 3, 8, 6))


@pytest.mark.parametrize("size", [(3, 4), (2, 2), (1, 1), (7, 9)])
def test_resized_mask_takes_the_nearest_pixel(size):
    mask = torch.zeros(2, 7, 9, dtype=torch.int64)
    mask[0, :5, :7], mask[1, :7, :3] = 1, 1
    found = resize_mask(mask, size)
    assert found.dtype == torch.bool
    for image in range(2):
        for row in range(size[0]):
            for column in range(size[1]):
                expected = bool(mask[image, row * 7 // size[0], column * 9 // size[1]])
                assert found[image, row, column].item() is expected
