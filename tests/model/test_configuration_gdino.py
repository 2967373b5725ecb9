"""Claims about the configuration: presets, files of transformers' model types, and values that are refused."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    BertConfig,
    GroundingDinoConfig,
    MMGroundingDinoConfig,
    ResNetConfig,
    RobertaConfig,
    SwinConfig,
)

from gdino_hf import GDinoConfig
from gdino_hf.model.csp_pan import CspPanConfig

PRESETS = ("tiny", "base", "mm-tiny", "mm-base", "mm-large", "nano")
SWIN_TINY = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
SWIN_BASE = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}
SWIN_LARGE = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12}
# Fields that all published models share.
PUBLISHED = {
    "d_model": 256,
    "num_queries": 900,
    "encoder_layers": 6,
    "encoder_ffn_dim": 2048,
    "encoder_attention_heads": 8,
    "encoder_n_points": 4,
    "decoder_layers": 6,
    "decoder_ffn_dim": 2048,
    "decoder_attention_heads": 8,
    "decoder_n_points": 4,
    "max_text_len": 256,
    "special_token_ids": [101, 102, 1012, 1029],
    "fusion_type": "bi_attention",
    "fusion_init_value": 1e-4,
    "fusion_droppath": 0.1,
    "positional_embedding_temperature": 20,
    "query_position_temperature": 10000,
    "text_position_temperature": 10000,
    "activation_function": "relu",
    "dropout": 0.0,
    "two_stage": True,
    "embedding_init_target": True,
    "two_stage_bbox_embed_share": False,
    "focal_alpha": 0.25,
    "focal_gamma": 2.0,
    "bbox_cost": 5.0,
    "giou_cost": 2.0,
    "class_loss_coefficient": 1.0,
    "bbox_loss_coefficient": 5.0,
    "giou_loss_coefficient": 2.0,
}
ORIGINAL = {
    "class_head": "dot",
    "decoder_bbox_embed_share": True,
    "decoder_cls_embed_share": True,
    "inverse_sigmoid_eps": 1e-3,
    "decoder_inverse_sigmoid_eps": 1e-3,
    "class_cost": 1.0,
}
# The mmdetection code clamps at 1e-3 where the decoder refines boxes and at 1e-5 in the head.
MM = {
    "class_head": "scaled_bias",
    "decoder_bbox_embed_share": False,
    "decoder_cls_embed_share": False,
    "inverse_sigmoid_eps": 1e-5,
    "decoder_inverse_sigmoid_eps": 1e-3,
    "class_cost": 2.0,
}


def fields(config, names):
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    ("name", "own", "swin", "stages", "levels"),
    [
        ("tiny", ORIGINAL, SWIN_TINY, [2, 3, 4], 4),
        ("base", ORIGINAL, SWIN_BASE, [2, 3, 4], 4),
        ("mm-tiny", MM, SWIN_TINY, [2, 3, 4], 4),
        ("mm-base", MM, SWIN_BASE, [2, 3, 4], 4),
        ("mm-large", MM, SWIN_LARGE, [1, 2, 3, 4], 5),
    ],
)
def test_presets_are_the_published_models(name, own, swin, stages, levels):
    config = GDinoConfig.preset(name)
    expected = {**PUBLISHED, **own, "num_feature_levels": levels}
    assert fields(config, expected) == expected
    backbone = config.backbone_config
    assert isinstance(backbone, SwinConfig)
    assert fields(backbone, swin) == swin
    assert list(backbone.out_indices) == stages
    assert backbone.image_size == (384 if swin["window_size"] == 12 else 224)
    assert fields(config.text_config, ("hidden_size", "num_hidden_layers")) == {
        "hidden_size": 768,
        "num_hidden_layers": 12,
    }


def test_nano_is_small_and_has_the_heads_of_mm():
    config = GDinoConfig.preset("nano")
    assert isinstance(config.backbone_config, CspPanConfig)
    assert config.backbone_config.head_features
    expected = {
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_queries": 100,
        "class_head": "scaled_bias",
        "decoder_bbox_embed_share": False,
        "decoder_cls_embed_share": False,
    }
    assert fields(config, expected) == expected
    assert fields(config.text_config, ("hidden_size", "num_hidden_layers")) == {
        "hidden_size": 384,
        "num_hidden_layers": 3,
    }


def test_presets_take_overrides_and_share_nothing():
    one = GDinoConfig.preset("tiny", num_queries=300, backbone_config=ResNetConfig(out_indices=[2, 3, 4]))
    assert one.num_queries == 300
    assert isinstance(one.backbone_config, ResNetConfig)
    two, three = GDinoConfig.preset("tiny"), GDinoConfig.preset("tiny")
    two.backbone_config.embed_dim, two.backbone_config.depths[0] = 1, 99
    two.special_token_ids.append(7)
    assert three.backbone_config.embed_dim == 96
    assert three.backbone_config.depths[0] == 2
    assert three.special_token_ids == GDinoConfig.preset("base").special_token_ids == [101, 102, 1012, 1029]


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=f"There is no preset 'huge'; choose one of {', '.join(PRESETS)}"):
        GDinoConfig.preset("huge")


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_config_loads_unchanged(name, tmp_path):
    config = GDinoConfig.preset(name, class_head="cosine", fusion_type="gated", auxiliary_loss=False)
    config.save_pretrained(tmp_path)
    for loaded in (GDinoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GDinoConfig
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert type(loaded.text_config) is BertConfig
        # Only the path it was loaded from differs.
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert GDinoConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_sub_configs_may_be_dictionaries():
    config = GDinoConfig(
        backbone_config={"model_type": "resnet", "out_features": ["stage3", "stage4"]},
        text_config={"model_type": "roberta", "hidden_size": 64},
    )
    assert isinstance(config.backbone_config, ResNetConfig)
    assert list(config.backbone_config.out_features) == ["stage3", "stage4"]
    assert isinstance(config.text_config, RobertaConfig)
    assert config.text_config.hidden_size == 64
    nano = GDinoConfig(backbone_config={"model_type": "csp_pan", "pan_width": 32}, text_config={"hidden_size": 96})
    assert isinstance(nano.backbone_config, CspPanConfig)
    assert nano.backbone_config.pan_width == 32
    assert isinstance(nano.text_config, BertConfig)
    assert nano.text_config.hidden_size == 96


def test_defaults_are_swin_tiny_and_bert_base():
    config = GDinoConfig()
    assert fields(config.backbone_config, SWIN_TINY) == SWIN_TINY
    assert list(config.backbone_config.out_indices) == [2, 3, 4]
    assert config.text_config.to_dict() == BertConfig().to_dict()
    assert config.hidden_size == config.d_model
    assert config.decoder_inverse_sigmoid_eps == config.inverse_sigmoid_eps


def write_foreign(folder, config):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("foreign", "class_head"), [(GroundingDinoConfig, "dot"), (MMGroundingDinoConfig, "scaled_bias")]
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_config_of_transformers_is_adapted(foreign, class_head, shared, tmp_path):
    theirs = foreign(
        backbone_config=SwinConfig(**SWIN_BASE, out_indices=[2, 3, 4]),
        text_config=BertConfig(num_hidden_layers=7),
        num_queries=321,
        d_model=128,
        encoder_layers=2,
        dropout=0.1,
        max_text_len=77,
        decoder_bbox_embed_share=shared,
        auxiliary_loss=False,
        architectures=["TheirsForObjectDetection"],
    )
    written = write_foreign(tmp_path, theirs)
    assert written["model_type"] != "gdino"
    for config in (GDinoConfig.from_pretrained(tmp_path), GDinoConfig.from_dict(written)):
        assert config.model_type == config.to_dict()["model_type"] == "gdino"
        assert config.class_head == class_head
        expected = {"num_queries": 321, "d_model": 128, "encoder_layers": 2, "dropout": 0.1, "max_text_len": 77}
        assert fields(config, expected) == expected
        assert config.decoder_bbox_embed_share is shared
        assert fields(config.backbone_config, SWIN_BASE) == SWIN_BASE
        assert config.text_config.num_hidden_layers == 7
        # The files turn auxiliary losses off, and their class names mean nothing here.
        assert config.auxiliary_loss is True
        assert "TheirsForObjectDetection" not in (config.architectures or [])
    assert written["auxiliary_loss"] is False


def test_an_adapted_config_is_saved_as_gdino(tmp_path):
    write_foreign(tmp_path / "theirs", MMGroundingDinoConfig())
    config = GDinoConfig.from_pretrained(tmp_path / "theirs", auxiliary_loss=False)
    assert config.auxiliary_loss is False
    config.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "gdino"
    assert GDinoConfig.from_pretrained(tmp_path / "ours").to_dict() == config.to_dict()


def test_an_argument_overrides_an_adapted_file(tmp_path):
    write_foreign(tmp_path, GroundingDinoConfig())
    config = GDinoConfig.from_pretrained(tmp_path, num_queries=12, class_head="cosine")
    assert config.num_queries == 12
    assert config.class_head == "cosine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"encoder_layers": 0}, "encoder_layers must be at least 1, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"num_feature_levels": 0}, "num_feature_levels must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads must be at least 1, got 0"),
        ({"decoder_attention_heads": 0}, "decoder_attention_heads must be at least 1, got 0"),
        ({"encoder_n_points": 0}, "encoder_n_points must be at least 1, got 0"),
        ({"decoder_n_points": 0}, "decoder_n_points must be at least 1, got 0"),
        ({"max_text_len": 3}, "max_text_len must be at least 4, got 3"),
        ({"query_dim": 2}, "query_dim must be 4 .*, got 2"),
        ({"d_model": 250}, "d_model must be a multiple of 4 .*, got 250"),
        ({"encoder_attention_heads": 6}, r"d_model \(256\) must be a multiple of encoder_attention_heads \(6\)"),
        ({"decoder_attention_heads": 6}, r"d_model \(256\) must be a multiple of decoder_attention_heads \(6\)"),
        ({"encoder_attention_heads": 1}, "encoder_attention_heads must be even, .* got 1"),
        ({"encoder_ffn_dim": 2050}, r"encoder_ffn_dim / 2 \(1025\) must be a multiple of .* \(4\)"),
        ({"position_embedding_type": "learned"}, "position_embedding_type must be 'sine', got 'learned'"),
        (
            {"two_stage_bbox_embed_share": True, "decoder_bbox_embed_share": False},
            "two_stage_bbox_embed_share needs decoder_bbox_embed_share",
        ),
        ({"class_head_temperature": 0.0}, "class_head_temperature must be positive, got 0.0"),
        ({"contrastive_temperature": -1.0}, "contrastive_temperature must be positive, got -1.0"),
        ({"inverse_sigmoid_eps": 0.0}, "inverse_sigmoid_eps must be positive, got 0.0"),
        ({"inverse_sigmoid_eps": math.nan}, "inverse_sigmoid_eps must be positive, got nan"),
        ({"decoder_inverse_sigmoid_eps": -1.0}, "decoder_inverse_sigmoid_eps must be positive, got -1.0"),
        ({"denoising_label_noise": 1.5}, r"denoising_label_noise must be within 0\.\.1, got 1.5"),
        ({"denoising_label_noise": -0.1}, r"denoising_label_noise must be within 0\.\.1, got -0.1"),
        ({"num_denoising_queries": -1}, "num_denoising_queries must be at least 0, got -1"),
        ({"denoising_box_noise": -1.0}, "denoising_box_noise must be at least 0, got -1.0"),
        ({"denoising_label_embeddings": -5}, "denoising_label_embeddings must be at least 0, got -5"),
        ({"dropout": -1.0}, r"dropout must be within 0\.\.1, got -1.0"),
        ({"fusion_droppath": 1.5}, r"fusion_droppath must be within 0\.\.1, got 1.5"),
        ({"fusion_droppath": 1}, "fusion_droppath must be below 1, got 1"),
        ({"focal_alpha": 3.0}, r"focal_alpha must be within 0\.\.1, got 3.0"),
        ({"class_cost": math.nan}, "class_cost must be at least 0, got nan"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive, got 0.0"),
        ({"encoder_ffn_dim": 0}, "encoder_ffn_dim must be at least 1, got 0"),
        ({"decoder_ffn_dim": 0}, "decoder_ffn_dim must be at least 1, got 0"),
        ({"positional_embedding_temperature": 0}, "positional_embedding_temperature must be positive, got 0"),
        ({"special_token_ids": [1]}, r"special_token_ids must hold at least the ids .* got \[1\]"),
        ({"activation_function": "foo"}, "activation_function must be a name that transformers knows, .* got 'foo'"),
        ({"class_head": "euclidean"}, "'class_head' expected one of .*'dot', 'scaled_bias', 'cosine'.*euclidean"),
        ({"fusion_type": "none"}, "'fusion_type' expected one of .*'bi_attention', 'gated'.*none"),
        ({"num_queries": "many"}, "'num_queries' expected int, got str"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    # transformers wraps the error of a strict configuration in its own, which contains our sentence.
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        GDinoConfig(**changes)
