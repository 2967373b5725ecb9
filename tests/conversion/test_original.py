"""Grounding DINO's and Open-GroundingDino's .pth files."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, original
from synthetic import assert_same, state_dict

from gdino_hf import GDinoConfig, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.conversion.engine import Options, convert

VARIANTS = {
    "small": SMALL,
    "one level more": replace(SMALL, levels=5),
    "all stages": replace(SMALL, stages=(0, 1, 2, 3)),
    "other depths": replace(SMALL, depths=(2, 1, 3, 1), encoder_layers=1, decoder_layers=1),
    "other widths": replace(SMALL, embed_dim=12, num_heads=(1, 2, 3, 4), window=3, d_model=32, heads=2, ffn=96),
}


def load(path, wrapper="model"):
    content = torch.load(path, weights_only=True)
    assert wrapper is None or list(content) == [wrapper]
    return content if wrapper is None else content[wrapper]


def there_and_back(tmp_path, content, wrapper="model"):
    torch.save(content, tmp_path / "theirs.pth")
    report = convert(tmp_path / "theirs.pth", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back.pth", to="original")
    return report, load(tmp_path / "back.pth", wrapper)


def test_golden_checkpoint_comes_back_bit_equal(shared, tmp_path):
    source = shared / "golden" / "official_swin_w7" / "checkpoint.pth"
    report = convert(source, tmp_path / "ours")
    assert not [w for w in report.warnings if "tokenizer" not in w]
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    convert(tmp_path / "ours", tmp_path / "back.pth", to="original")
    assert_same(load(tmp_path / "back.pth"), load(source))


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_is_read_off_the_tensors_and_the_way_back_is_exact(name, tmp_path):
    sizes = VARIANTS[name]
    source = state_dict(original(sizes))
    report, back = there_and_back(tmp_path, {"model": source})
    assert_same(back, source)
    config = GDinoConfig.from_pretrained(tmp_path / "ours")
    backbone, text = config.backbone_config, config.text_config
    assert (backbone.embed_dim, list(backbone.depths)) == (sizes.embed_dim, list(sizes.depths))
    assert (list(backbone.num_heads), backbone.window_size) == (list(sizes.num_heads), sizes.window)
    assert list(backbone.out_indices) == [stage + 1 for stage in sizes.stages]
    assert (config.num_feature_levels, config.num_queries) == (sizes.levels, sizes.queries)
    assert (config.encoder_layers, config.decoder_layers) == (sizes.encoder_layers, sizes.decoder_layers)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (sizes.heads, sizes.heads)
    assert (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim) == (sizes.d_model, sizes.ffn, sizes.ffn)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (64, 2, 1100)
    assert config.decoder_bbox_embed_share
    assert config.class_head == "dot"
    assert config.inverse_sigmoid_eps == 1e-3
    _, info = GDinoForObjectDetection.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert "bert.pooler.dense.weight" in report.plan.kept


def test_separate_heads_are_recognized(tmp_path):
    source = state_dict(original(SMALL))
    for n in range(SMALL.decoder_layers):
        for layer in range(3):
            for name in ("weight", "bias"):
                head = source[f"bbox_embed.{n}.layers.{layer}.{name}"] + n
                source[f"bbox_embed.{n}.layers.{layer}.{name}"] = head
                source[f"transformer.decoder.bbox_embed.{n}.layers.{layer}.{name}"] = head
    _, back = there_and_back(tmp_path, {"model": source})
    assert_same(back, source)
    config = GDinoConfig.from_pretrained(tmp_path / "ours")
    assert not config.decoder_bbox_embed_share
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(ours["bbox_embed.2.layers.2.bias"], source["bbox_embed.2.layers.2.bias"])


@pytest.mark.parametrize("prefix", ["module.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", ["model", None])
def test_wrappers_and_prefixes_come_back(prefix, wrapper, tmp_path):
    source = state_dict(original(SMALL), torch.float16, prefix)
    report, back = there_and_back(tmp_path, source if wrapper is None else {wrapper: source}, wrapper)
    assert report.prefix == prefix
    assert_same(back, source)


def test_training_state_of_open_grounding_dino_is_dropped_and_reported(tmp_path):
    source = state_dict({**original(SMALL), "label_enc.weight": (2, 64)})
    content = {
        "model": source,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-4, output_dir="logs", text_encoder_type="bert-base-uncased"),
    }
    report, back = there_and_back(tmp_path, content)
    assert_same(back, source)
    assert "label_enc.weight" in report.plan.kept
    saved = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert saved["dropped"].keys() == {"optimizer", "lr_scheduler", "epoch", "args"}
    assert all(saved["dropped"].values())


def test_copies_that_differ_are_kept_with_a_warning(tmp_path):
    source = state_dict(original(SMALL))
    key = "transformer.decoder.bbox_embed.1.layers.0.bias"
    source[key] = source[key] + 1
    report, back = there_and_back(tmp_path, {"model": source})
    assert_same(back, source)
    assert any(key in warning for warning in report.warnings)


def test_legacy_pickles_and_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    source = state_dict(original(SMALL))
    torch.save({"model": source}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(source, tmp_path / "file.safetensors")
    for name in ("legacy.pth", "file.safetensors"):
        convert(tmp_path / name, tmp_path / f"{name}.ours")
    first, second = (
        load_file(tmp_path / f"{n}.ours" / "model.safetensors") for n in ("legacy.pth", "file.safetensors")
    )
    assert_same(first, second)


def test_tied_copies_share_storage_on_the_way_back(tmp_path):
    _, back = there_and_back(tmp_path, {"model": state_dict(original(SMALL))})
    copies = [key for key in back if key.endswith("bbox_embed.0.layers.0.weight") or "bbox_embed.2.layers.0.we" in key]
    assert len(copies) == 4
    assert len({back[key].data_ptr() for key in copies}) == 1


def test_a_model_saved_again_is_converted_back_without_a_record(tmp_path):
    source = state_dict(original(SMALL, position_ids=False))
    torch.save({"model": source}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours")
    GDinoForObjectDetection.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back.pth", to="original")
    back = load(tmp_path / "back.pth")
    assert back.keys() == {key for key in source if "pooler" not in key}
    assert all(torch.equal(back[key], source[key]) for key in back)


def test_fine_tuned_weights_are_converted_back(tmp_path):
    source = state_dict(original(SMALL))
    torch.save({"model": source}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours")
    model = GDinoForObjectDetection.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        model.bbox_embed[0].layers[0].bias.add_(1)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back.pth", to="original")
    back = load(tmp_path / "back.pth")
    assert list(back) == list(source)
    for key in ("bbox_embed.0", "bbox_embed.2", "transformer.decoder.bbox_embed.1"):
        assert torch.equal(back[f"{key}.layers.0.bias"], source["bbox_embed.0.layers.0.bias"] + 1)


def test_a_config_file_sets_what_no_tensor_shows(tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    overrides = {"text_config": {"num_attention_heads": 2}, "max_text_len": 32}
    report = convert(tmp_path / "theirs.pth", tmp_path / "ours", options=Options(overrides=overrides))
    config = GDinoConfig.from_pretrained(tmp_path / "ours")
    assert config.text_config.num_attention_heads == 2
    assert config.max_text_len == 32
    assert any("num_attention_heads" in sentence for sentence in report.assumed)


def test_tokenizer_image_processor_and_card_are_written_beside_the_weights(tiny_tokenizer, tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = Options(tokenizer=str(tmp_path / "tokenizer"), licence="mit")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", options=options)
    processor = GDinoProcessor.from_pretrained(tmp_path / "ours")
    assert processor.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert processor.image_processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    config = GDinoConfig.from_pretrained(tmp_path / "ours")
    assert config.special_token_ids == tiny_tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"])
    card = (tmp_path / "ours" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for part in ("theirs.pth", "SHA-256", "https://github.com/IDEA-Research/GroundingDINO", "gdino convert"):
        assert part in card


def test_weights_are_converted_without_a_tokenizer_with_a_warning(tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    report = convert(tmp_path / "theirs.pth", tmp_path / "ours")
    assert [w for w in report.warnings if w.startswith("No tokenizer is saved") and "--tokenizer" in w]
    assert not (tmp_path / "ours" / "tokenizer.json").exists()
    assert (tmp_path / "ours" / "model.safetensors").is_file()
