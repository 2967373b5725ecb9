"""Claims about the Swin forward for exports: it equals transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoBackbone, SwinConfig

from gdino_hf.model import swin_export

# Both compute the same sums in the same order, up to how batched products are split.
ROUNDING = 1e-5


def make_backbone(**changes):
    torch.manual_seed(0)
    config = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
    backbone = AutoBackbone.from_config(SwinConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


@pytest.mark.parametrize("window_size", [4, 7])
@pytest.mark.parametrize("size", [(2, 64, 96), (1, 63, 95), (3, 113, 150), (1, 31, 65)])
def test_equals_the_stock_forward(window_size, size):
    backbone = make_backbone(window_size=window_size, out_features=["stem", "stage2", "stage4"])
    batch, height, width = size
    pixel_values = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    assert swin_export.knows(backbone)
    with torch.no_grad():
        ours = swin_export.export_forward(backbone, pixel_values)
        expected = backbone(pixel_values).feature_maps
    assert len(ours) == len(expected) == 3
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=ROUNDING)


def test_unsupported_backbones_are_declined():
    assert not swin_export.knows(make_backbone().train())
    assert not swin_export.knows(make_backbone(use_absolute_embeddings=True))
    assert not swin_export.knows(torch.nn.Identity().eval())


def test_renamed_parts_of_transformers_are_declined():
    """A release that renames a sub-module falls back to its own forward."""
    for owner, name in (("blocks", "mlp"), ("attention", "q_proj"), ("encoder", "layers")):
        backbone = make_backbone()
        block = backbone.swin.encoder.layers[0].blocks[0]
        delattr({"blocks": block, "attention": block.attention, "encoder": backbone.swin.encoder}[owner], name)
        assert not swin_export.knows(backbone), name
