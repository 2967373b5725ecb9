"""Adapters that peft saved are merged into their model, and the result equals peft's own."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotObjectDetection

from gdino_hf import NANO, GDinoConfig, GDinoForObjectDetection
from gdino_hf.cli import main
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import Options, convert
from gdino_hf.training.lora import add_adapters
from random_models import make_random_model

# Both sides add the same two float32 products, the one in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
# gdino-nano is stored in float16.
HALF = {"rtol": 1e-3, "atol": 1e-4}
EVERYWHERE = r".*(q_proj|value_proj|fc1|projection|0\.0|query|dense|word_embeddings_)$"


@pytest.fixture(scope="module")
def base(tiny_config, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_random_model(tiny_config).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def adapted(folder, kind):
    """Return a model with random adapters of a kind."""
    model = GDinoForObjectDetection.from_pretrained(folder)
    if kind == "train":
        peft = add_adapters(model, 3)
    else:
        settings = {"r": 3, "lora_alpha": 5, "target_modules": EVERYWHERE}
        if kind == "rslora":
            settings["use_rslora"] = True
        if kind == "patterns":
            settings |= {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"decoder.*fc1": 7}}
        if kind == "biases":
            settings["bias"] = "all"
        peft = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft


def assert_same(folder, peft, tolerance=TOLERANCE):
    merged = copy.deepcopy(peft).merge_and_unload().state_dict()
    found, info = GDinoForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert found.state_dict().keys() == merged.keys()
    changed = 0
    original = GDinoForObjectDetection.from_pretrained(peft.peft_config["default"].base_model_name_or_path).state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], **tolerance)
        changed += not torch.equal(tensor, original[name])
    assert changed >= 10


@pytest.mark.parametrize("kind", ["train", "everywhere", "rslora", "patterns", "biases"])
def test_adapters_alone_are_merged_into_the_model_they_name(kind, base, tmp_path):
    peft = adapted(base, kind)
    peft.save_pretrained(tmp_path / "adapter")
    report = convert(tmp_path / "adapter", tmp_path / "merged")
    assert str(base) in report.notes["adapters"]
    assert_same(tmp_path / "merged", peft)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", ["train", "everywhere"])
def test_transformers_own_way_to_load_adapters_still_works(kind, base, tmp_path):
    adapted(base, kind).save_pretrained(tmp_path / "adapter")
    for load in (GDinoForObjectDetection, AutoModelForZeroShotObjectDetection):
        model = load.from_pretrained(tmp_path / "adapter")
        assert sum("lora_" in name for name, _ in model.named_parameters()) >= 20


def test_detect_says_what_to_do_with_adapters(base, tmp_path, capsys, example_folder):
    adapted(base, "train").save_pretrained(tmp_path / "adapter")
    assert (
        main(["detect", str(example_folder / "cat.jpg"), "--labels", "cat", "--model", str(tmp_path / "adapter")]) == 2
    )
    assert "merge them into their model by `gdino convert`" in capsys.readouterr().err


def test_a_whole_model_with_adapters_needs_no_other(base, tmp_path):
    peft = adapted(base, "train")
    peft.save_pretrained(tmp_path / "adapter")
    # As trainers write it that save the wrapped model: every name has peft's prefix.
    torch.save({"state_dict": peft.state_dict()}, tmp_path / "adapter" / "whole.pth")
    (tmp_path / "whole").mkdir()
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "whole")
    shutil.copy(base / "config.json", tmp_path / "whole")
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in peft.state_dict().items()},
        tmp_path / "whole" / "model.safetensors",
    )
    convert(tmp_path / "whole", tmp_path / "merged")
    assert_same(tmp_path / "merged", peft)


def test_the_merged_model_goes_on_to_other_layouts(base, tmp_path):
    peft = adapted(base, "train")
    peft.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "merged.pth", to="original")
    convert(tmp_path / "merged.pth", tmp_path / "merged", options=Options(overrides={"max_text_len": 64}))
    assert GDinoConfig.from_pretrained(tmp_path / "merged").d_model == 64
    merged = copy.deepcopy(peft).merge_and_unload().state_dict()
    stored = torch.load(tmp_path / "merged.pth", weights_only=True)["model"]
    name = "model.decoder.layers.1.fc1.weight"
    torch.testing.assert_close(stored["transformer.decoder.layers.1.linear1.weight"], merged[name], **TOLERANCE)


def test_base_overrules_the_named_model_and_nano_is_one(base, tmp_path):
    peft = adapted(NANO, "train")
    peft.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(json.dumps(NANO)[1:-1], "gone/away"))
    with pytest.raises(ConversionError, match=r"belongs to the model gone/away, which cannot be opened.*--base"):
        convert(tmp_path / "adapter", tmp_path / "merged")
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", "nano"]) == 0
    peft.peft_config["default"].base_model_name_or_path = NANO
    assert_same(tmp_path / "merged", peft, HALF)
    with pytest.raises(ConversionError, match=r"--base the model that was fine-tuned"):
        convert(tmp_path / "adapter", tmp_path / "other", options=Options(base=str(base)))


def change(folder, edit):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


REFUSED = {
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json beside it"),
    "dora": ({"use_dora": True}, "use_dora set"),
    "another kind": ({"peft_type": "IA3"}, "the kind 'IA3'"),
    "no alpha": ({"lora_alpha": None}, "no number lora_alpha"),
    "alpha as text": ({"lora_alpha": "8"}, "no number lora_alpha"),
    "no base": ({"base_model_name_or_path": None}, "does not name the model of its adapters; give --base"),
    "half an adapter": (lambda folder: change(folder, lambda s: s.pop(first(s))), "only one of the two matrices"),
    "another shape": (
        lambda folder: change(folder, lambda s: s.update({first(s): torch.ones(3, 5)})),
        "do not fit the model's",
    ),
    "magnitudes": (
        lambda folder: change(folder, lambda s: s.update({"base_model.model.x.lora_magnitude_vector": torch.ones(3)})),
        "an adapter of a kind that is not merged here",
    ),
    "two adapters": (
        lambda folder: change(
            folder,
            lambda s: s.update({k.replace("lora_A.", "lora_A.two."): v.clone() for k, v in s.items() if "lora_A" in k}),
        ),
        "holds several adapters",
    ),
}


def first(state):
    return min(key for key in state if "lora_A" in key)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_sentence(case, base, tmp_path, capsys):
    edit, words = REFUSED[case]
    folder = tmp_path / "adapter"
    adapted(base, "train").save_pretrained(folder)
    if callable(edit):
        edit(folder)
    else:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    capsys.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "merged").exists()
