"""Grounding DINO in the files of other programs: NVIDIA TAO's, LLMDet's conversions, mmdetection's export, peft's."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from random_models import make_random_model

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, mmdet, original
from synthetic import assert_same, state_dict

from gdino_hf import GDinoConfig, GDinoForObjectDetection
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import convert


def same_model(first, second):
    """Check that two folders hold equal weights and equal configurations."""
    first, second = (GDinoForObjectDetection.from_pretrained(folder) for folder in (first, second))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    fields = [{k: v for k, v in x.config.to_dict().items() if k != "_name_or_path"} for x in (first, second)]
    assert fields[0] == fields[1]


def write(path, content):
    torch.save(content, path)
    return path


def as_tao(state):
    """Rename a state dict as NVIDIA TAO's Lightning module does."""
    return {
        "model.model." + (key.replace("backbone.0.", "backbone.0.body.", 1)): tensor
        for key, tensor in state.items()
        if key != "bert.embeddings.position_ids"
    }


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model."])
def test_tao_converts_like_the_original_and_comes_back(prefix, tmp_path):
    state = state_dict(original(SMALL))
    tao = {prefix + key: tensor for key, tensor in as_tao(state).items()}
    content = {"epoch": 3, "pytorch-lightning_version": "2.3.0", "state_dict": tao, "callbacks": {}}
    report = convert(write(tmp_path / "tao.pth", content), tmp_path / "tao")
    assert report.prefix == f"{prefix}model.model."
    convert(write(tmp_path / "plain.pth", {"model": state}), tmp_path / "plain")
    same_model(tmp_path / "tao", tmp_path / "plain")
    convert(tmp_path / "tao", tmp_path / "back.pth", to="original")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], tao)


def with_biases(state, decoder=True):
    """Add class heads with a bias, one for each decoder layer and one of the encoder."""
    layers = range(SMALL.decoder_layers)
    biases = {f"class_embed.{i}.bias": torch.tensor([-4.0 - 0.1 * i]) for i in layers}
    copies = {f"transformer.decoder.{key}": tensor for key, tensor in biases.items()} if decoder else {}
    return {**state, **biases, **copies, "transformer.enc_out_class_embed.bias": torch.tensor([-4.5])}


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("rename", [dict, as_tao])
def test_biased_class_heads_in_the_original_layout_are_kept(rename, decoder, tmp_path):
    state = rename(with_biases(state_dict(original(SMALL)), decoder))
    report = convert(write(tmp_path / "theirs.pth", {"model": state}), tmp_path / "ours")
    model = GDinoForObjectDetection.from_pretrained(tmp_path / "ours")
    assert model.config.class_head == "scaled_bias"
    assert [round(float(head.bias), 4) for head in model.class_embed] == [-4.0, -4.1, -4.2]
    assert float(model.model.encoder_output_class_embed.bias) == -4.5
    assert any("square root of the width" in sentence and "--config" in sentence for sentence in report.assumed)
    convert(tmp_path / "ours", tmp_path / "back.pth", to="original")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def test_a_bias_is_not_written_where_the_original_code_would_drop_it(tmp_path):
    convert(write(tmp_path / "mm.pth", {"state_dict": state_dict(mmdet(SMALL))}), tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"no class head 'scaled_bias' and would leave out its bias.*--to-mmdet"):
        convert(tmp_path / "ours", tmp_path / "back.pth", to="original")


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_mmdetections_export_of_the_original_is_the_original(wrapper, tmp_path):
    state = state_dict(original(SMALL))
    convert(write(tmp_path / "plain.pth", {"model": state}), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "mmdet.pth", to="mmdet")
    exported = torch.load(tmp_path / "mmdet.pth", weights_only=True)["state_dict"]
    # mmdetection's converter writes a bare state dict, with the pooler under BERT's name and no table of labels.
    bert = "language_model.language_backbone.body.model"
    exported |= {f"{bert}.pooler.dense.{x}": state[f"bert.pooler.dense.{x}"] for x in ("weight", "bias")}
    exported = {key: tensor for key, tensor in exported.items() if "label_embedding" not in key}
    assert not any("cls_branches" in key for key in exported)
    convert(write(tmp_path / "export.pth", {wrapper: exported} if wrapper else exported), tmp_path / "ours")
    same_model(tmp_path / "ours", tmp_path / "plain")
    config = GDinoConfig.from_pretrained(tmp_path / "ours")
    assert (config.class_head, config.inverse_sigmoid_eps, config.decoder_inverse_sigmoid_eps) == ("dot", 1e-3, 1e-3)


def test_a_learned_scale_is_refused(tmp_path):
    # mmdetection's contrastive head may have one; no published checkpoint does.
    state = state_dict({**mmdet(SMALL), "bbox_head.cls_branches.0.log_scale": (1,)})
    with pytest.raises(ConversionError, match="log_scale"):
        convert(write(tmp_path / "mm.pth", {"state_dict": state}), tmp_path / "ours")


@pytest.mark.parametrize("to", [None, "mmdet", "transformers"])
def test_a_folder_whose_configuration_describes_another_head_converts_with_its_bias(to, tiny_config, tmp_path):
    config = copy.deepcopy(tiny_config)
    config.class_head, config.decoder_bbox_embed_share, config.decoder_cls_embed_share = "scaled_bias", False, False
    model = make_random_model(config)
    folder = tmp_path / "llmdet_swin_tiny_hf"
    model.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    for name in ("class_head", "decoder_bbox_embed_share", "decoder_cls_embed_share"):
        del fields[name]
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "grounding-dino"}))
    state = load_file(folder / "model.safetensors")
    state = {key: tensor.reshape(1) if "class_embed" in key else tensor for key, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    target = tmp_path / ("out.pth" if to == "mmdet" else "out")
    report = convert(folder, target, to=to)
    assert any("class_head is 'scaled_bias'" in sentence for sentence in report.assumed)
    if to == "mmdet":
        stored = torch.load(target, weights_only=True)["state_dict"]
        assert torch.equal(stored["bbox_head.cls_branches.1.bias"].view(()), model.class_embed[1].bias.detach())
        return
    loaded = GDinoForObjectDetection.from_pretrained(target)
    assert loaded.config.class_head == "scaled_bias"
    assert torch.equal(loaded.class_embed[1].bias, model.class_embed[1].bias)
    assert torch.equal(loaded.bbox_embed[1].layers[0].weight, model.bbox_embed[1].layers[0].weight)


@pytest.mark.parametrize(("wrapper", "prefix"), [("ema", "net."), ("params", "detector.model."), ("state_dict", "gd.")])
@pytest.mark.parametrize("shapes", [original, mmdet])
def test_wrappers_and_prefixes_of_any_name_are_found_and_come_back(shapes, wrapper, prefix, tmp_path):
    state = {prefix + key: tensor for key, tensor in state_dict(shapes(SMALL)).items()}
    # A dictionary under a usual name that holds no tensors is not the model.
    content = {"model": {"name": "swin"}, wrapper: state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    report = convert(write(tmp_path / "theirs.pth", content), tmp_path / "ours")
    assert report.prefix == prefix
    convert(tmp_path / "ours", tmp_path / "back.pth", to=shapes.__name__)
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)[wrapper], state)


def test_a_file_of_two_models_is_refused_with_their_names(tmp_path):
    state = state_dict(mmdet(SMALL))
    both = {f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in state.items()}
    path = write(tmp_path / "semi.pth", {"state_dict": both})
    with pytest.raises(
        ConversionError, match=r"'student\.' and 'teacher\.', and most of its.*; save the tensors of one prefix alone"
    ):
        convert(path, tmp_path / "ours")
    path = write(tmp_path / "two.pth", {"a": state, "b": state})
    with pytest.raises(ConversionError, match=r"holds tensors under 'a' and 'b'.*save its state dict alone"):
        convert(path, tmp_path / "ours")
