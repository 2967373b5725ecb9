"""Claims about the fusion of image and text in C, compared with the plain layer in float64."""

import copy

import pytest
import torch

from gdino_hf import GDinoConfig
from gdino_hf.inference import packed_fusion
from gdino_hf.inference.float_linear import FloatLinear, load
from gdino_hf.inference.packed_fusion import PackedFusionLayer
from gdino_hf.model.fusion import FusionLayer

pytestmark = pytest.mark.skipif(load() is None, reason="the float32 layers cannot run here")
ROUNDING = 2e-5


def make(width, heads, tokens, text, batch=2, seed=0):
    torch.manual_seed(seed)
    config = GDinoConfig(
        d_model=width, encoder_attention_heads=2 * heads, encoder_ffn_dim=4 * width, decoder_attention_heads=heads
    )
    layer = FusionLayer(config).eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    vision, words = 2 * torch.randn(batch, tokens, width), 2 * torch.randn(batch, text, width)
    real, text_mask = torch.rand(batch, tokens) < 0.7, torch.rand(batch, text) < 0.7
    real[:, 0] = text_mask[:, -1] = True
    return layer, vision, words, real, text_mask


def expected(layer, vision, words, real, text_mask):
    return copy.deepcopy(layer).double()(vision.double(), words.double(), real, text_mask)[:2]


@pytest.mark.parametrize(
    ("width", "heads", "tokens", "text"),
    [(32, 2, 1, 1), (48, 4, 97, 3), (64, 1, 700, 21), (20, 5, 300, 9), (256, 4, 520, 256)],
)
@pytest.mark.parametrize("padded", [True, False])
def test_fusion_equals_the_plain_layer(library, monkeypatch, width, heads, tokens, text, padded):
    monkeypatch.setattr(packed_fusion, "load", lambda: library)
    layer, vision, words, real, text_mask = make(width, heads, tokens, text)
    real = real if padded else None
    with torch.inference_mode():
        packed = PackedFusionLayer(layer, FloatLinear)
        assert packed._library_for(vision, text_mask) is library
        found = packed(vision, words, real, text_mask)[:2]
        for ours, theirs in zip(found, expected(layer, vision, words, real, text_mask), strict=True):
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=ROUNDING * scale)


def test_blocks_that_are_all_padding_do_not_count(library, monkeypatch):
    """Whole blocks of padded tokens, before and behind real ones, whose scores are the largest."""
    monkeypatch.setattr(packed_fusion, "load", lambda: library)
    layer, vision, words, real, text_mask = make(32, 2, 1000, 4)
    real[:] = False
    real[:, 400:480] = True
    vision[~real] *= 50
    with torch.inference_mode():
        found = PackedFusionLayer(layer, FloatLinear)(vision, words, real, text_mask)[1]
    theirs = expected(layer, vision, words, real, text_mask)[1]
    torch.testing.assert_close(found.double(), theirs, rtol=0, atol=ROUNDING * theirs.abs().max().item())


def test_large_scores_neither_overflow_nor_vanish(library, monkeypatch):
    monkeypatch.setattr(packed_fusion, "load", lambda: library)
    layer, vision, words, real, text_mask = make(32, 2, 300, 4)
    words *= 1000
    with torch.inference_mode():
        found = PackedFusionLayer(layer, FloatLinear)(vision, words, real, text_mask)[:2]
    for ours in found:
        assert ours.isfinite().all()


def test_nan_reaches_every_result_that_depends_on_it(library, monkeypatch):
    monkeypatch.setattr(packed_fusion, "load", lambda: library)
    layer, vision, words, _, text_mask = make(32, 2, 300, 4)
    vision[0, 250, 3] = float("nan")
    with torch.inference_mode():
        image, text, _ = PackedFusionLayer(layer, FloatLinear)(vision, words, None, text_mask)
    assert image[0, 250].isnan().all()
    assert text[0].isnan().all()
    assert not image[0, :250].isnan().any()
    assert not image[1].isnan().any()
    assert not text[1].isnan().any()


def test_other_cases_run_as_before():
    layer, vision, words, real, text_mask = make(32, 2, 60, 4)
    packed = PackedFusionLayer(layer, FloatLinear)
    none = torch.zeros_like(text_mask)
    assert packed._library_for(vision, none) is None
    assert packed._library_for(vision.bfloat16(), text_mask) is None
    assert PackedFusionLayer(layer)._library_for(vision, text_mask) is None
    packed.kind = "gated"
    assert packed._library_for(vision, text_mask) is None
    packed.kind = layer.kind
    with torch.inference_mode():
        found = packed(vision, words, real, none)[0]
        torch.testing.assert_close(found, layer(vision, words, real, none)[0], rtol=0, atol=1e-4)
