"""The same label text gives the same labels in Python, in the command, on the web page and in the pipeline."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import BertTokenizerFast

from gdino_hf.cli import main
from gdino_hf.cli.inputs import read_labels
from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
from gdino_hf.model.pipeline_gdino import GDinoZeroShotObjectDetectionPipeline
from gdino_hf.model.processing_gdino import GDinoProcessor
from gdino_hf.model.text_prompt import split_labels

LABELS = [
    ("cat", ["cat"]),
    ("cat.", ["cat"]),
    ("cat, dog", ["cat", "dog"]),
    ("cat,dog", ["cat", "dog"]),
    ("cat, dog,", ["cat", "dog"]),
    ("cat, dog.", ["cat", "dog"]),
    ("cat. dog.", ["cat", "dog"]),
    ("cat. dog", ["cat", "dog"]),
    ("a cat. a dog", ["a cat", "a dog"]),
    ("a cat. a remote control.", ["a cat", "a remote control"]),
    ("cat.dog.", ["cat", "dog"]),
    (" cat .dog. ", ["cat", "dog"]),
    ("cat..dog...", ["cat", "dog"]),
    ("cat, a dog. a bird", ["cat", "a dog", "a bird"]),
    (",cat ,, dog , ", ["cat", "dog"]),
    ("  remote \t control  , cat  ", ["remote control", "cat"]),
    ("cat\ndog\r\n\nremote control\n", ["cat", "dog", "remote control"]),
    ("cat.\ndog.\n", ["cat", "dog"]),
    ("cat, dog, cat", ["cat", "dog"]),
    ("Cat, cat", ["Cat", "cat"]),
    ("St. Bernard", ["St. Bernard"]),
    ("St. Bernard. cat.", ["St. Bernard", "cat"]),
    ("mr. and mrs. cat, dog", ["mr. and mrs. cat", "dog"]),
    ("U.S. flag, cat", ["U.S. flag", "cat"]),
    ("flag of the U.S.", ["flag of the U.S."]),
    ("3.5 mm jack. cup.", ["3.5 mm jack", "cup"]),
    ("first cat. second cat", ["first cat", "second cat"]),
    ("'big' cat, \"red\" cup", ["'big' cat", '"red" cup']),
    ("child's toy, T-shirt & hat", ["child's toy", "T-shirt & hat"]),
    ("is it a cat? a dog?", ["is it a cat? a dog?"]),
    ("кошка, 猫, 🐈", ["кошка", "猫", "🐈"]),
    ("猫。犬。", ["猫", "犬"]),
    ("猫、犬，鳥", ["猫", "犬", "鳥"]),
    ("قطة، كلب", ["قطة", "كلب"]),
    ("café. Straße.", ["café", "Straße"]),
    ("\ufeffcat,\u00a0dog\u3000,\u200b cup", ["cat", "dog", "cup"]),
    ("cat\u2028dog", ["cat", "dog"]),
]
"""Label text and its labels; every entrance below is given all of them."""

every_label_text = pytest.mark.parametrize(("text", "labels"), LABELS, ids=[ascii(text) for text, _ in LABELS])


@pytest.fixture(scope="module")
def processor(tiny_tokenizer):
    """A processor that knows every letter of the labels, in any script."""
    vocabulary = dict(tiny_tokenizer.get_vocab())
    for letter in sorted({letter for text, _ in LABELS for letter in text.lower() if not letter.isspace()}):
        for token in (letter, f"##{letter}"):
            vocabulary.setdefault(token, len(vocabulary))
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True)
    return GDinoProcessor(GDinoImageProcessor(size={"height": 32, "width": 32}), tokenizer)


@pytest.fixture(scope="module")
def pipe(tiny_config, processor):
    return GDinoZeroShotObjectDetectionPipeline(model=GDinoForObjectDetection(tiny_config).eval(), processor=processor)


def test_there_are_at_least_thirty():
    assert len({text for text, _ in LABELS}) >= 30


@pytest.mark.filterwarnings("ignore::gdino_hf.model.label_faults.LabelWarning")
@every_label_text
def test_python_gives_these_labels(text, labels, processor):
    assert split_labels(text) == labels
    assert list(processor(text=text).prompts[0].labels) == labels
    one_per_image = processor(text=[text, [*labels]])
    assert [list(prompt.labels) for prompt in one_per_image.prompts] == [labels, labels]
    negative = processor(text=["zebra"], negative_labels=text).prompts[0]
    assert list(negative.labels) == ["zebra", *labels]


@every_label_text
def test_command_gives_these_labels(text, labels):
    assert read_labels(text) == labels


@every_label_text
def test_pipeline_gives_these_labels(text, labels, pipe):
    (prepared,) = pipe.preprocess({"image": Image.new("RGB", (8, 8)), "candidate_labels": text}, negative_labels=text)
    assert prepared["labels"] == labels
    assert prepared["negative_labels"] == labels


@every_label_text
def test_page_gives_these_labels(text, labels, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "demo"))
    from gdino_demo.queries import read_query

    # A vocabulary has each label once.
    once = tuple(dict.fromkeys(labels))
    assert read_query(text).vocabulary.labels == once
    assert read_query("something else", text).negatives == once


def test_labels_in_a_list_stay_as_they_are(processor, pipe):
    labels = ["a cat. a dog", "salt, pepper", "St. Bernard", "cat", "cat"]
    assert list(processor(text=[labels]).prompts[0].labels) == labels
    (prepared,) = pipe.preprocess({"image": Image.new("RGB", (8, 8)), "candidate_labels": [*labels, " cup "]})
    assert prepared["labels"] == [*labels, "cup"]


@pytest.mark.parametrize("text", ["", " ", ".", ",", " , ,. \n", "。"])
def test_text_without_a_label_is_refused(text, processor):
    assert split_labels(text) == []
    with pytest.raises(ValueError, match="names nothing"):
        processor(text=text)


def test_detect_command_asks_for_these_labels(tmp_path, monkeypatch, capsys):
    """From the command line to the report."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "red").save(photo)
    for text, labels in (LABELS[8], LABELS[23], LABELS[33], LABELS[34]):
        arguments = ["detect", str(photo), "--labels", text, "--out", str(tmp_path / "out"), "--negative", "zebra. hat"]
        assert main([*arguments, "--device", "cpu"]) == 0
        report = json.loads((tmp_path / "out" / "detections.json").read_text(encoding="utf-8"))
        assert report["labels"] == labels
        assert report["negative_labels"] == ["zebra", "hat"]
