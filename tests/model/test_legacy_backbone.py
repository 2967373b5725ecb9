"""Claims about the fields that named a backbone before `backbone_config`: they build what they say or are refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
from transformers import ResNetConfig, SwinConfig, TimmBackboneConfig

from gdino_hf import GDinoConfig, GDinoForObjectDetection

SMALL = {
    "text_config": {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


@pytest.fixture
def folder(tmp_path):
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]).save_pretrained(tmp_path)
    return str(tmp_path)


def test_published_files_whose_fields_say_nothing_are_read_as_before():
    silent = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_kwargs": None}
    config = GDinoConfig(backbone_config=SwinConfig(embed_dim=48), **silent)
    assert config.backbone_config.embed_dim == 48
    assert type(GDinoConfig(**silent).backbone_config) is SwinConfig
    assert not {"backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs"} & set(config.to_dict())


@pytest.mark.parametrize("name", ["resnet50", "tf_mobilenetv3_small_075", "timm/resnet18.a1_in1k"])
def test_timm_names_give_timm_backbones(name):
    config = GDinoConfig(backbone=name, use_timm_backbone=True)
    assert type(config.backbone_config) is TimmBackboneConfig
    assert config.backbone_config.backbone == name
    assert list(config.backbone_config.out_indices) == [2, 3, 4]
    options = {"out_indices": (1, 2), "output_stride": 16}
    config = GDinoConfig(backbone=name, use_timm_backbone=True, backbone_kwargs=options)
    assert list(config.backbone_config.out_indices) == [1, 2]
    assert config.backbone_config.output_stride == 16


def test_a_bare_name_is_timms():
    assert GDinoConfig(backbone="resnet50").backbone_config.backbone == "resnet50"


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_building_a_timm_backbone_without_timm_names_the_package():
    with pytest.raises(ImportError, match="timm"):
        GDinoForObjectDetection(GDinoConfig(backbone="resnet50", **SMALL))


@pytest.mark.parametrize("options", [None, {"out_features": ["stage2", "stage4"]}])
def test_a_backbone_of_transformers_is_read_and_built(folder, options):
    config = GDinoConfig(backbone=folder, use_timm_backbone=False, backbone_kwargs=options, **SMALL)
    assert type(config.backbone_config) is ResNetConfig
    wanted = ["stage2", "stage4"] if options else ["stage2", "stage3", "stage4"]
    assert config.backbone_config.out_features == wanted
    model = GDinoForObjectDetection(config)
    assert type(model.model.backbone.conv_encoder.model).__name__ == "ResNetBackbone"
    assert model.model.backbone.channels == ([16, 32] if options else [16, 24, 32])


def test_fields_set_as_attributes_count_when_the_model_is_built(folder):
    config = GDinoConfig(**SMALL)
    config.backbone, config.use_timm_backbone, config.backbone_config = folder, False, None
    config.backbone_kwargs = {"out_indices": [2, 3, 4]}
    model = GDinoForObjectDetection(config)
    assert model.model.backbone.channels == [16, 24, 32]
    config = GDinoConfig(**SMALL)
    config.backbone = "resnet50"
    with pytest.raises(ValueError, match="both given"):
        GDinoForObjectDetection(config)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"backbone": "resnet50", "use_pretrained_backbone": True}, "use_pretrained_backbone=True is not supported"),
        ({"use_pretrained_backbone": True}, "use_pretrained_backbone=True is not supported"),
        ({"backbone": "resnet50", "backbone_config": SwinConfig()}, "'resnet50' and backbone_config are both given"),
        ({"backbone": "resnet50", "backbone_config": {"model_type": "swin"}}, "both given"),
        ({"use_timm_backbone": True}, "without the name of a timm model"),
        ({"use_timm_backbone": True, "backbone_config": SwinConfig()}, "without the name of a timm model"),
        ({"backbone_kwargs": {"out_indices": [1]}}, "without a backbone"),
        ({"backbone": "resnet50", "use_timm_backbone": False}, "'resnet50' cannot be read"),
        ({"backbone": "nobody/no-such-backbone"}, "cannot be read"),
        ({"backbone": 50}, "must be the name of a model, got 50"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        GDinoConfig(**fields)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_is_no_backbone_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert', which is no image backbone"):
        GDinoConfig(backbone=str(tmp_path))


def test_a_timm_configuration_may_repeat_the_flag():
    config = GDinoConfig(use_timm_backbone=True, backbone_config=TimmBackboneConfig(backbone="resnet18"))
    assert config.backbone_config.backbone == "resnet18"


def test_a_foreign_file_with_the_flag_of_pretrained_weights_is_read(tmp_path):
    file = {"model_type": "grounding-dino", "use_pretrained_backbone": True, "backbone_config": {"model_type": "swin"}}
    (tmp_path / "config.json").write_text(json.dumps(file))
    assert type(GDinoConfig.from_pretrained(tmp_path).backbone_config) is SwinConfig
