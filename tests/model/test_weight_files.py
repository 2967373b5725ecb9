"""Claims about checkpoints that do not fit their configuration, or are not what a model folder should be."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForZeroShotObjectDetection, pipeline

from gdino_hf import Detector, GDinoConfig, GDinoForObjectDetection, GDinoModel
from random_models import make_random_model

SEPARATE = {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
INFO = ("missing_keys", "unexpected_keys", "mismatched_keys")


def edit(folder, **changes):
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def biased(tiny_config, tiny_processor, tmp_path_factory):
    """A model with scaled, biased heads, one per layer, and its folder."""
    config = copy.deepcopy(tiny_config)
    config.class_head, config.decoder_bbox_embed_share, config.decoder_cls_embed_share = "scaled_bias", False, False
    model = make_random_model(config)
    folder = tmp_path_factory.mktemp("biased")
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return model, folder


def as_llmdet(source, target, model_type="grounding-dino"):
    """Write a folder like llmdet_swin_tiny_hf: the type and head of Grounding DINO, biases of shape [1], copies."""
    shutil.copytree(source, target)
    edit(target, model_type=model_type, class_head=None, architectures=None, **dict.fromkeys(SEPARATE))

    def change(state):
        for key in [key for key in state if "class_embed" in key]:
            state[key] = state[key].reshape(1)
        for key in [key for key in state if key.startswith(("bbox_embed.", "class_embed."))]:
            state[f"model.decoder.{key}"] = state[key].clone()

    change_weights(target, change)
    return target


def outputs(model, processor):
    inputs = processor(images=Image.linear_gradient("L").convert("RGB"), text=["cat", "remote control"])
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found.logits, found.pred_boxes


@pytest.mark.parametrize("model_type", ["grounding-dino", "gdino"])
def test_a_biased_head_that_the_configuration_does_not_name_is_recognized(
    model_type, biased, tiny_processor, tmp_path, caplog
):
    model, source = biased
    folder = as_llmdet(source, tmp_path / "llmdet", model_type)
    loaded, info = GDinoForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in INFO), info
    assert loaded.config.class_head == "scaled_bias"
    assert not loaded.config.decoder_bbox_embed_share
    for found, expected in zip(outputs(loaded, tiny_processor), outputs(model, tiny_processor), strict=True):
        torch.testing.assert_close(found, expected)
    (warning,) = [r.getMessage() for r in caplog.records if "other heads" in r.getMessage()]
    assert "class_head='scaled_bias'" in warning
    loaded.save_pretrained(tmp_path / "again")
    assert GDinoConfig.from_pretrained(tmp_path / "again").class_head == "scaled_bias"
    again = GDinoForObjectDetection.from_pretrained(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_auto_classes_and_pipeline_recognize_the_head_too(biased, tmp_path):
    model, source = biased
    folder = as_llmdet(source, tmp_path / "llmdet", "gdino")
    bias = model.class_embed[1].bias
    for loaded in (
        AutoModelForZeroShotObjectDetection.from_pretrained(folder),
        AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"),
        pipeline("zero-shot-object-detection", model=str(folder), device="cpu").model,
    ):
        assert torch.equal(loaded.class_embed[1].bias, bias)
    core = AutoModel.from_pretrained(folder)
    assert isinstance(core, GDinoModel)
    assert torch.equal(core.encoder_output_class_embed.bias, model.model.encoder_output_class_embed.bias)


def test_the_given_configuration_object_is_not_changed(biased, tmp_path):
    folder = as_llmdet(biased[1], tmp_path / "llmdet")
    config = GDinoConfig.from_pretrained(folder)
    assert GDinoForObjectDetection.from_pretrained(folder, config=config).config.class_head == "scaled_bias"
    assert config.class_head == "dot"


def test_pickled_weights_are_recognized_alike(biased, tmp_path):
    folder = as_llmdet(biased[1], tmp_path / "llmdet")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = GDinoForObjectDetection.from_pretrained(folder)
    assert torch.equal(loaded.class_embed[1].bias, biased[0].class_embed[1].bias)


def test_a_missing_bias_stops(folder):
    edit(folder, class_head="scaled_bias")
    with pytest.raises(ValueError, match=r"class_head 'scaled_bias', whose bias.*class_head='dot'"):
        GDinoForObjectDetection.from_pretrained(folder)
    assert GDinoForObjectDetection.from_pretrained(folder, class_head="dot").config.class_head == "dot"
    fresh = GDinoForObjectDetection.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert (fresh.config.class_head, round(float(fresh.class_embed[0].bias.detach()), 2)) == ("scaled_bias", -4.6)


def test_one_stored_head_is_shared_whatever_the_configuration_says(folder):
    edit(folder, **SEPARATE)
    loaded, info = GDinoForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in INFO), info
    assert loaded.config.decoder_bbox_embed_share


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.enc_output.bias", "model.text_backbone.embeddings.word_embeddings.weight"])
def test_weights_that_are_no_numbers_are_refused(value, name, folder):
    change_weights(folder, lambda state: state[name].view(-1)[3:4].fill_(value))
    with pytest.raises(ValueError, match="1 of its tensors hold NaN or infinity, for instance"):
        GDinoForObjectDetection.from_pretrained(folder)


def test_half_precision_weights_whose_sum_overflows_are_accepted(folder):
    change_weights(folder, lambda state: state["model.enc_output.weight"].fill_(60000.0))
    GDinoForObjectDetection.from_pretrained(folder, dtype=torch.float16)


SIZES = {
    "encoder_layers": {"encoder_layers": 10**9},
    "decoder_layers": {"decoder_layers": 10**9},
    "num_feature_levels": {"num_feature_levels": 10**9},
    "num_queries": {"num_queries": 10**12},
    "d_model": {"d_model": 4 * 10**9},
    "encoder_n_points": {"encoder_n_points": 10**9},
    "max_text_len": {"max_text_len": 10**9},
    "num_labels": {"num_labels": 10**9},
    "text_config.num_hidden_layers": {"text_config": {"num_hidden_layers": 10**9}},
    "text_config.hidden_size": {"text_config": {"hidden_size": 10**9}},
    "text_config.vocab_size": {"text_config": {"vocab_size": 10**12}},
    "text_config.num_labels": {"text_config": {"num_labels": 10**9}},
    "backbone_config.depths": {"backbone_config": {"depths": [1, 10**9, 1, 1]}},
    "backbone_config.embed_dim": {"backbone_config": {"embed_dim": 10**9}},
    "backbone_config.window_size": {"backbone_config": {"window_size": 10**9}},
}


def merged(folder, changes):
    fields = json.loads((folder / "config.json").read_text())
    return {name: {**fields[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("load", [GDinoForObjectDetection, AutoModel, GDinoConfig], ids=lambda cls: cls.__name__)
def test_sizes_beyond_any_model_are_refused_at_once(name, load, folder):
    edit(folder, **merged(folder, SIZES[name]))
    with pytest.raises(ValueError, match=rf"{name.split('.')[-1]}\)? must be at most [\d,]+, got [\d,]+"):
        load.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_layers": 150, "d_model": 1024},
        {"text_config": {"vocab_size": 10**7}},
        {"text_config": {"hidden_size": 2**16, "num_hidden_layers": 100}},
        {"backbone_config": {"embed_dim": 2**15}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_more_weights_than_the_files_hold_are_refused_before_memory_is_taken(changes, folder):
    edit(folder, **merged(folder, changes))
    with pytest.raises(ValueError, match=r"config.json describes a model of [\d,]+ weights, but the files hold [\d,]+"):
        GDinoForObjectDetection.from_pretrained(folder)


def shards(folder):
    """Split a folder's weights into two files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
        save_file({key: state[key] for key in part}, folder / name, {"format": "pt"})
    weight_map = {key: names[index % 2] for index, key in enumerate(keys)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, names


def rename_second(index, names, name):
    index.write_text(index.read_text().replace(names[1], name))


def test_shards_load(folder):
    shards(folder)
    GDinoForObjectDetection.from_pretrained(folder)


@pytest.mark.parametrize("how", ["parent", "two levels up", "absolute", "hidden", "link", "link to a folder"])
def test_an_index_that_names_files_outside_its_folder_is_refused(how, folder, tmp_path):
    index, names = shards(folder)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    second = outside / "x.safetensors"
    shutil.move(folder / names[1], second)
    (folder / "sub").mkdir()
    if how.startswith("link"):
        os.symlink(second if how == "link" else outside, folder / "linked")
    name = {
        "parent": "../elsewhere/x.safetensors",
        "two levels up": f"../../{tmp_path.name}/elsewhere/x.safetensors",
        "absolute": str(second),
        "hidden": "sub/../../elsewhere/x.safetensors",
        "link": "linked",
        "link to a folder": "linked/x.safetensors",
    }[how]
    rename_second(index, names, name)
    for load in (GDinoForObjectDetection, AutoModelForZeroShotObjectDetection, AutoModel):
        with pytest.raises(ValueError, match="lies outside its folder; put every weight file into the folder itself"):
            load.from_pretrained(folder)


def test_shards_in_the_hubs_cache_are_links_and_load(folder, tmp_path):
    _, names = shards(folder)
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--mine" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    for name in names:
        shutil.move(snapshot / name, blobs / f"hash of {name}")
        os.symlink(f"../../blobs/hash of {name}", snapshot / name)
    GDinoForObjectDetection.from_pretrained(snapshot)


def snapshot_of(folder, cache, repository="models--me--mine"):
    """Move a model's files into a cache of the Hub, as a snapshot of links, and return it with the store."""
    snapshot, store = cache / repository / "snapshots" / "abc", cache / repository / "blobs"
    store.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    for path in snapshot.iterdir():
        shutil.move(path, store / f"hash of {path.name}")
        os.symlink(f"../../blobs/hash of {path.name}", path)
    return snapshot, store


@pytest.mark.parametrize("way", ["itself", "relative", "through a link", "subfolder", "shared store"])
def test_a_snapshot_in_the_hubs_cache_loads(way, folder, tmp_path, monkeypatch):
    snapshot, store = snapshot_of(folder, tmp_path / "hub")
    given, options = snapshot, {}
    if way == "relative":
        monkeypatch.chdir(snapshot)
        given = "."
    elif way == "through a link":
        given = tmp_path / "mine"
        given.symlink_to(snapshot)
    elif way == "subfolder":
        (snapshot / "deep").mkdir()
        for path in list(snapshot.iterdir()):
            if path.is_symlink():
                path.unlink()
                os.symlink(f"../../../blobs/hash of {path.name}", snapshot / "deep" / path.name)
        options = {"subfolder": "deep"}
    elif way == "shared store":
        # Several repositories share contents: the blob is a link again.
        shared = tmp_path / "hub" / "blobs" / "ab"
        shared.mkdir(parents=True)
        blob = store / "hash of model.safetensors"
        shutil.move(blob, shared / "abcd")
        os.symlink("../../blobs/ab/abcd", blob)
    GDinoForObjectDetection.from_pretrained(given, **options)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"])
@pytest.mark.parametrize("where", ["elsewhere", "snapshots", "chain"])
def test_weights_that_are_a_link_to_a_file_outside_are_refused(name, where, folder, tmp_path):
    """As for the files that an index names; a folder called snapshots is no cache of the Hub."""
    outside = tmp_path / "secret.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    target = outside
    if where == "snapshots":
        folder = shutil.move(folder, tmp_path / "a" / "snapshots" / "b")
    elif where == "chain":
        target = folder / "link"
        target.symlink_to(outside)
    (folder / name).symlink_to(target)
    variant = {"variant": "fp16"} if "fp16" in name else {}
    for load in (GDinoForObjectDetection, AutoModelForZeroShotObjectDetection):
        with pytest.raises(ValueError, match=r"is a link to a file outside its folder; put the file itself there") as e:
            load.from_pretrained(folder, **variant)
        assert "\n" not in str(e.value)


def test_links_inside_the_folder_and_to_the_folder_load(folder, tmp_path):
    (folder / "files").mkdir()
    shutil.move(folder / "model.safetensors", folder / "files" / "a")
    os.symlink("files/a", folder / "model.safetensors")
    (tmp_path / "link").symlink_to(folder)
    GDinoForObjectDetection.from_pretrained(tmp_path / "link")


HOSTILE_KEYS = ("\x1b[2Jevil", "a\nb.weight", "bbox_embed.0.\u202elayers", "\x9b31m", "k" * 501, "\x00")


@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=ascii)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_of_tensors_that_a_terminal_would_act_on_are_refused(key, kind, folder, caplog):
    change_weights(folder, lambda state: state.update({key: torch.zeros(3)}))
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for load in (GDinoForObjectDetection, GDinoModel, AutoModelForZeroShotObjectDetection):
        with pytest.raises(ValueError, match=r"holds a tensor named '.+'; names have 1 to 500") as caught:
            load.from_pretrained(folder)
        assert str(caught.value).isprintable()
    assert "evil" not in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"backbone_config": {"model_type": "\x1b[2J\x07"}},
        {"fusion_type": "\x1b[2J"},
        {"activation_function": "\x1b[2J"},
        {"\x1b[2J": {"d_model": 1}, "d_model": 7},
        {"position_embedding_type": "\x1b[2J" * 100, "query_dim": 5},
    ],
    ids=ascii,
)
def test_messages_about_a_configuration_hold_no_escape_sequence(change, folder):
    edit(folder, **change)
    with pytest.raises(ValueError, match=r"\S") as caught:
        GDinoForObjectDetection.from_pretrained(folder)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_about_a_folder_hold_no_escape_sequence(folder, tmp_path):
    odd = shutil.move(folder, tmp_path / "a\x1b[2Jb")
    shutil.copy(odd / "config.json", tmp_path)
    (odd / "config.json").write_text("{")
    for _ in range(2):
        with pytest.raises((OSError, ValueError), match=r"a\\x1b\[2Jb") as caught:
            GDinoForObjectDetection.from_pretrained(odd)
        assert "\x1b" not in str(caught.value)
        shutil.copy(tmp_path / "config.json", odd)
        (odd / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": None}, {"a": ["b"]}, {"a": ""}, "x", 7])
def test_a_damaged_index_is_named(weight_map, folder):
    index, _ = shards(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json (has no weight_map|gives|names)"):
        GDinoForObjectDetection.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"weight_map": ' * 100_000, "\0", '"x"'])
def test_an_index_that_is_no_json_is_named(text, folder):
    index, _ = shards(folder)
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (is not a JSON file|has no weight_map)"):
        GDinoForObjectDetection.from_pretrained(folder)


QUANTIZED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32)


def quantize(state, dtype, scaled=False, only=lambda key: key.endswith("weight")):
    """Store weights in another data type, as quantizers do."""
    for key in [key for key in state if only(key) and state[key].ndim == 2]:
        scale = state[key].abs().max() / 100 + 1e-6
        state[key] = (state[key] / scale).abs().clamp(max=100).to(dtype)
        if scaled:
            state[f"{key}_scale"] = scale.clone()


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_quantized_weights_are_refused_not_read_as_floats(folder, dtype, scaled, kind):
    change_weights(folder, lambda state: quantize(state, dtype, scaled))
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    how = r"with scales \(.+_scale\) that are not read here" if scaled else "without the scales that they need"
    for load in (GDinoForObjectDetection, GDinoModel, AutoModelForZeroShotObjectDetection):
        with pytest.raises(ValueError, match=rf"as {str(dtype)[6:]}, quantized weights {how}; take") as caught:
            load.from_pretrained(folder)
        assert "\n" not in str(caught.value)


def test_one_quantized_weight_among_others_is_refused(folder):
    change_weights(folder, lambda state: quantize(state, torch.int8, only=lambda key: "decoder.layers.1.fc1" in key))
    with pytest.raises(ValueError, match=r"The files hold \S*decoder\.layers\.1\.fc1\.weight as int8, quantized"):
        GDinoForObjectDetection.from_pretrained(folder)


@pytest.mark.parametrize("method", ["evil", "", None])
def test_integers_are_refused_whatever_a_quantization_config_says(method, folder):
    """transformers skips methods that it does not know, and would read the integers as the weights."""
    change_weights(folder, lambda state: quantize(state, torch.int8))
    edit(folder, quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=r"as int8, quantized weights|quant"):
        GDinoForObjectDetection.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_weights_that_are_mostly_zeros_are_refused(kept, folder):
    """A file system shows zeros where an interrupted download left a hole."""

    def clear(state):
        keys = sorted(state)
        for key in keys[int(kept * len(keys)) :]:
            state[key] = torch.zeros_like(state[key])

    change_weights(folder, clear)
    with pytest.raises(ValueError, match=r"matrices hold zeros only, as files do that a download left unfinished"):
        GDinoForObjectDetection.from_pretrained(folder)


@pytest.mark.parametrize("ids", [[-1, 2, 3], [2, 3, 10**9], [9, 8, 7, 6]])
def test_special_tokens_that_the_tokenizer_does_not_have_are_refused(ids, folder):
    """With them, all labels of a prompt would be one phrase, without a word."""
    edit(folder, special_token_ids=ids)
    with pytest.raises(ValueError, match="special_token_ids"):
        Detector(folder)


@pytest.mark.parametrize("fields", [{"id2label": [1, 2]}, {"quantization_config": [1]}])
def test_the_cause_of_values_of_the_wrong_kind_is_named(fields, folder):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=r"one of its JSON files has a value of the wrong kind: "):
        Detector(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_wide_floats_load(folder, dtype):
    change_weights(folder, lambda state: state.update({k: v.to(dtype) for k, v in state.items() if v.ndim}))
    assert GDinoForObjectDetection.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32
