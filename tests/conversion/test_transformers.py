"""Conversion of transformers' grounding-dino and mm-grounding-dino folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, mmdet, original
from synthetic import assert_same, relative_position_index, state_dict

from gdino_hf import GDinoConfig, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import Options, convert
from tiny_peers import tiny_bert, tiny_peer_config

PEERS = {
    "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection, {}),
    "mm-grounding-dino": (
        MMGroundingDinoConfig,
        MMGroundingDinoForObjectDetection,
        {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False},
    ),
    "mm-grounding-dino, shared": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection, {}),
}
SWIN = "model.backbone.conv_encoder.model."
BERT = "model.text_backbone."


@pytest.fixture(params=PEERS)
def peer_folder(request, tmp_path):
    config_class, model_class, overrides = PEERS[request.param]
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    text = tiny_bert(1100, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=48)
    config = tiny_peer_config(config_class, swin, text, decoder_layers=3, **overrides)
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def there_and_back(folder):
    report = convert(folder, folder.parent / "ours")
    convert(folder.parent / "ours", folder.parent / "back", to="transformers")
    return report, load_file(folder.parent / "back" / "model.safetensors")


def test_folder_comes_back_bit_equal_with_its_config(peer_folder, tmp_path):
    _, back = there_and_back(peer_folder)
    source = load_file(peer_folder / "model.safetensors")
    assert_same(dict(sorted(back.items())), dict(sorted(source.items())))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back")]
    assert configs[0] == configs[1]
    assert GDinoConfig.from_pretrained(tmp_path / "ours").to_dict()["model_type"] == "gdino"
    model_class = next(m for c, m, _ in PEERS.values() if c.model_type == configs[0]["model_type"])
    _, info = model_class.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_further_tensors_of_earlier_versions_come_back_too(peer_folder):
    path = peer_folder / "model.safetensors"
    state = {key: tensor for key, tensor in load_file(path).items() if "swin.layernorm" not in key}
    state[f"{BERT}embeddings.position_ids"] = torch.arange(512)[None]
    state[f"{BERT}pooler.dense.weight"] = torch.rand(64, 64)
    for stage, block in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0)):
        key = f"{SWIN}encoder.layers.{stage}.blocks.{block}.attention.self.relative_position_index"
        state[key] = relative_position_index(4)
    shared = "bbox_embed.1.layers.0.bias" not in state
    for layer in range(3):
        for name in ("weight", "bias"):
            for n in range(3):
                tensor = state[f"bbox_embed.{0 if shared else n}.layers.{layer}.{name}"]
                state[f"model.decoder.bbox_embed.{n}.layers.{layer}.{name}"] = tensor.clone()
                if shared and n:
                    state[f"bbox_embed.{n}.layers.{layer}.{name}"] = tensor.clone()
    save_file(state, path, metadata={"format": "pt"})
    report, back = there_and_back(peer_folder)
    assert not [warning for warning in report.warnings if "tokenizer" not in warning]
    assert list(report.plan.kept) == [f"{BERT}pooler.dense.weight"]
    assert report.plan.filled.keys() == {f"{SWIN}swin.layernorm.bias", f"{SWIN}swin.layernorm.weight"}
    assert_same(dict(sorted(back.items())), dict(sorted(state.items())))


@pytest.mark.parametrize("form", ["pytorch_model.bin", "sharded bin", "sharded safetensors"])
def test_other_weight_files_are_read(peer_folder, form, tmp_path):
    state = load_file(peer_folder / "model.safetensors")
    (peer_folder / "model.safetensors").unlink()
    if form == "pytorch_model.bin":
        torch.save(state, peer_folder / form)
    else:
        stem, save = ("pytorch_model", torch.save) if "bin" in form else ("model", save_file)
        suffix = "bin" if "bin" in form else "safetensors"
        halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
        weight_map = {}
        for number, half in enumerate(halves, start=1):
            name = f"{stem}-0000{number}-of-00002.{suffix}"
            save(half, peer_folder / name)
            weight_map.update(dict.fromkeys(half, name))
        index = {"metadata": {}, "weight_map": weight_map}
        (peer_folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    convert(peer_folder, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert_same(dict(sorted(ours.items())), dict(sorted(state.items())))


def test_a_missing_shard_is_named(peer_folder, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (peer_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"model-00001-of-00002\.safetensors, which is not in the folder"):
        convert(peer_folder, tmp_path / "ours")


@pytest.mark.parametrize("layout", ["original", "mmdet"])
def test_weights_of_other_projects_go_on_to_transformers(layout, tiny_tokenizer, tmp_path):
    shapes = original(SMALL) if layout == "original" else mmdet(SMALL)
    torch.save({"model" if layout == "original" else "state_dict": state_dict(shapes)}, tmp_path / "theirs.pth")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", options=Options(tokenizer=str(tmp_path / "tokenizer")))
    report = convert(tmp_path / "ours", tmp_path / "peer", to="transformers")
    assert ("model.denoising_label_embedding.weight" in report.plan.dropped) == (layout == "mmdet")
    model_class = GroundingDinoForObjectDetection if layout == "original" else MMGroundingDinoForObjectDetection
    peer, info = model_class.from_pretrained(tmp_path / "peer", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert json.loads((tmp_path / "peer" / "config.json").read_text())["architectures"] == [model_class.__name__]
    ours = GDinoForObjectDetection.from_pretrained(tmp_path / "ours")
    for layer, other in zip(ours.model.decoder.layers, peer.model.decoder.layers, strict=True):
        assert torch.equal(layer.encoder_attn_text.key.weight, other.encoder_attn_text.key.weight)
    assert len({head.layers[0].weight.data_ptr() for head in peer.bbox_embed}) == (
        1 if layout == "original" else SMALL.decoder_layers
    )
    assert type(AutoProcessor.from_pretrained(tmp_path / "peer")).__name__ == "GroundingDinoProcessor"
    assert GDinoProcessor.from_pretrained(tmp_path / "peer").tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


def test_tokenizer_licence_and_image_size_of_the_source_are_kept(peer_folder, tiny_processor, tmp_path):
    tiny_processor.save_pretrained(peer_folder)
    (peer_folder / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-4.0\n---\n# theirs\n")
    convert(peer_folder, tmp_path / "ours")
    processor = GDinoProcessor.from_pretrained(tmp_path / "ours")
    assert processor.tokenizer.get_vocab() == tiny_processor.tokenizer.get_vocab()
    assert processor.image_processor.size == tiny_processor.image_processor.size
    assert (tmp_path / "ours" / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")


@pytest.mark.parametrize("preset", ["cosine head", "gated fusion", "other backbone"])
def test_what_transformers_cannot_express_is_refused(preset, tiny_config, tmp_path):
    import copy

    from gdino_hf.model.csp_pan import CspPanConfig

    config = copy.deepcopy(tiny_config)
    if preset == "cosine head":
        config.class_head = "cosine"
    elif preset == "gated fusion":
        config.fusion_type = "gated"
    else:
        config.backbone_config = CspPanConfig(stem_width=8, stage_widths=[8, 8, 16, 16], pan_width=8)
    GDinoForObjectDetection(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"cosine|gated|csp_pan"):
        convert(tmp_path / "ours", tmp_path / "peer", to="transformers")
    with pytest.raises(ConversionError, match=r"has no place in the original layout|has no class head 'cosine'"):
        convert(tmp_path / "ours", tmp_path / "theirs.pth", to="original")
    assert not (tmp_path / "peer").exists()
    assert not (tmp_path / "theirs.pth").exists()
