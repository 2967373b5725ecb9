"""Claims about the Hub: custom code, model cards, auto classes and initialization."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor

from gdino_hf import NANO, GDinoConfig, GDinoForObjectDetection, GDinoImageProcessor, GDinoModel, GDinoProcessor
from gdino_hf.model.model_card import write_model_card
from random_models import make_random_model

# A program that loads a folder's custom code without being able to import gdino_hf, and saves the model's outputs.
STRANGER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gdino_hf":
            raise ModuleNotFoundError("No module named " + name)

sys.meta_path.insert(0, Refuse())
folder, output = sys.argv[1:]
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor

torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True).eval()
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(bare).__name__ == "GDinoModel", type(bare)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "GDinoConfig"
inputs = processor(images=Image.open(folder + "/picture.png"), text=["cat", "remote control"])
with torch.no_grad():
    outputs = model(**inputs)
assert "gdino_hf" not in sys.modules
save_file({"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}, output)
"""


@pytest.fixture
def registered():
    """Mark the classes as custom code, as users do before pushing, and unmark them afterwards."""
    marks = {
        GDinoConfig: "AutoConfig",
        GDinoForObjectDetection: "AutoModelForZeroShotObjectDetection",
        GDinoImageProcessor: "AutoImageProcessor",
        GDinoProcessor: "AutoProcessor",
    }
    before = {cls: cls._auto_class for cls in marks}
    for cls, name in marks.items():
        cls.register_for_auto_class(name)
    yield
    for cls, name in before.items():
        cls._auto_class = name


def test_custom_code_reloads_without_the_package_bit_equal(
    registered, tiny_config, tiny_processor, tmp_path, fresh_python
):
    folder = tmp_path / "pushed"
    model = make_random_model(tiny_config)
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    picture.save(folder / "picture.png")
    # Outputs can be bit-equal only with the same backend, and custom code has no C library.
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "GDINO_MSDA": "torch"}
    result = fresh_python.run(STRANGER, folder, tmp_path / "out.safetensors", environment=environment, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = load_file(tmp_path / "out.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backend = os.environ.get("GDINO_MSDA")
    os.environ["GDINO_MSDA"] = "torch"
    try:
        with torch.no_grad():
            ours = model(**tiny_processor(images=picture, text=["cat", "remote control"]))
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("GDINO_MSDA") if backend is None else os.environ.update(GDINO_MSDA=backend)
    assert torch.equal(ours.logits, theirs["logits"])
    assert torch.equal(ours.pred_boxes, theirs["pred_boxes"])


def test_auto_classes_find_the_gdino_classes(tiny_folder):
    assert type(AutoConfig.from_pretrained(tiny_folder)) is GDinoConfig
    assert type(AutoModel.from_pretrained(tiny_folder)) is GDinoModel
    assert type(AutoModelForZeroShotObjectDetection.from_pretrained(tiny_folder)) is GDinoForObjectDetection
    assert type(AutoProcessor.from_pretrained(tiny_folder)) is GDinoProcessor
    assert type(AutoImageProcessor.from_pretrained(tiny_folder)) is GDinoImageProcessor


def test_saving_writes_a_card_once(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: zero-shot-object-detection" in card
    assert "| queries | 20 |" in card
    (tmp_path / "README.md").write_text("mine")
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def placeholder(**metadata):
    """Return the placeholder card that transformers writes into a new repository."""
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    return str(ModelCard.from_template(ModelCardData(**metadata), model_description=description))


def card_of(path):
    text = path.read_text(encoding="utf-8")
    return ModelCard(text).data.to_dict(), text


def test_card_replaces_only_an_untouched_placeholder(tiny_config, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(placeholder(license="mit", tags=["animals"]), encoding="utf-8")
    assert not write_model_card(tmp_path, tiny_config)
    assert write_model_card(tmp_path, tiny_config, name="me/mine", replace_placeholder=True)
    metadata, text = card_of(path)
    assert "# me/mine\n" in text
    assert metadata["license"] == "mit"
    assert metadata["tags"] == ["gdino", "grounding-dino", "open-vocabulary-detection", "animals"]
    for mine in (
        "---\nlicense: mit\n---\n# Mine\nIts boxes were automatically generated by a bigger model.\n",
        "This model card has been automatically generated.",
        placeholder().replace("[More Information Needed]", "me", 1),
    ):
        path.write_text(mine, encoding="utf-8")
        assert not write_model_card(tmp_path, tiny_config, replace_placeholder=True)
        assert path.read_text(encoding="utf-8") == mine


def test_pushing_names_the_repository_and_keeps_the_tags(hub, tiny_folder):
    model = GDinoForObjectDetection.from_pretrained(tiny_folder)
    model.push_to_hub("me/my-detector", tags=["animals"])
    card = hub.files["README.md"].decode()
    assert "# me/my-detector\n" in card
    assert 'from_pretrained("me/my-detector")' in card
    assert tiny_folder.name not in card.partition("## What it started from")[0]
    assert ModelCard(card).data.tags == ["gdino", "grounding-dino", "open-vocabulary-detection", "animals"]
    assert "model.safetensors" in hub.files


def test_pushing_keeps_a_handwritten_card(hub, tiny_model):
    mine = "---\nlicense: mit\n---\n# Mine\n\nIts boxes were automatically generated by a bigger model.\n"
    hub.files["README.md"] = mine.encode()
    copy.deepcopy(tiny_model).push_to_hub("me/my-detector")
    assert hub.files["README.md"].decode() == mine
    assert "model.safetensors" in hub.files


def test_card_of_custom_code_tells_how_to_load_it(registered, tiny_config, tmp_path):
    GDinoForObjectDetection(copy.deepcopy(tiny_config)).save_pretrained(tmp_path)
    assert f'from_pretrained("{tmp_path.name}", trust_remote_code=True)' in (tmp_path / "README.md").read_text()


def test_card_without_custom_code_does_not_ask_for_trust(tiny_folder):
    assert "trust_remote_code" not in (tiny_folder / "README.md").read_text()


def test_derived_cards_keep_licence_and_provenance(tmp_path):
    GDinoForObjectDetection.from_pretrained(NANO).save_pretrained(tmp_path / "first")
    GDinoForObjectDetection.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for folder, source in (("first", "gdino-nano"), ("second", "first")):
        metadata, text = card_of(tmp_path / folder / "README.md")
        assert metadata["license"] == "apache-2.0"
        assert f"The weights of {source} (licence: apache-2.0)." in text
        assert "| image backbone | NanoDet" in text
        # Figures hold only for the weights they were measured with.
        assert "AP50" not in text


def test_card_names_the_hub_repository_it_started_from(tiny_config, tmp_path):
    config = copy.deepcopy(tiny_config)
    config._name_or_path = "IDEA-Research/grounding-dino-tiny"
    write_model_card(tmp_path, config)
    metadata, text = card_of(tmp_path / "README.md")
    assert metadata["base_model"] == "IDEA-Research/grounding-dino-tiny"
    assert "https://huggingface.co/IDEA-Research/grounding-dino-tiny" in text


def test_fresh_models_start_from_the_published_initialization(tiny_config):
    model = GDinoForObjectDetection(copy.deepcopy(tiny_config))
    heads = [*model.bbox_embed, model.model.encoder_output_bbox_embed]
    assert all(not head.layers[-1].weight.any() for head in heads)
    attentions = [module for module in model.modules() if type(module).__name__ == "MSDeformAttn"]
    assert len(attentions) == 4
    for attention in attentions:
        assert not attention.sampling_offsets.weight.any()
        assert torch.equal(attention.sampling_offsets.bias, attention.initial_offsets())
        assert not attention.attention_weights.weight.any()
