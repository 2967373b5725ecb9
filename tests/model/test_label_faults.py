"""Labels that the tokenizer does not know or cannot tell apart: an error or a warning that names them, everywhere."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, pipeline

from gdino_hf import NANO, Detector, GDinoProcessor
from gdino_hf.cli import main
from gdino_hf.data.checks import check_dataset
from gdino_hf.model.label_faults import LabelWarning, label_remarks
from gdino_hf.model.text_prompt import build_prompt

ALIKE = "cannot tell these labels apart"
PARTLY = "does not know every word of these labels"


@pytest.fixture(scope="module")
def english():
    """The English vocabulary of the published models."""
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def processor():
    return GDinoProcessor.from_pretrained(NANO)


@pytest.mark.parametrize(
    ("labels", "alike", "partly"),
    [
        (["安全帽", "安全帶"], ["'安全帽' = '安全帶'"], ["'安全帽'", "'安全帶'"]),
        (["cat 🦄", "cat 🐱", "dog"], ["'cat 🦄' = 'cat 🐱'"], ["'cat 🦄'", "'cat 🐱'"]),
        (["café", "cafe"], ["'café' = 'cafe'"], []),
        (["Cat", "cat", "dog", "dog?"], ["'Cat' = 'cat'", "'dog' = 'dog?'"], []),
        (["red 猫", "dog"], [], ["'red 猫'"]),
        (["cat", "dog", "кошка"], [], []),
        (["cat", "cat"], [], []),
    ],
)
def test_remarks_name_the_labels(labels, alike, partly, english):
    remarks = label_remarks(build_prompt(labels, english), english)
    found = {kind: [remark for remark in remarks if kind in remark] for kind in (ALIKE, PARTLY)}
    assert [len(found[ALIKE]), len(found[PARTLY])] == [bool(alike), bool(partly)]
    assert len(remarks) == len(found[ALIKE]) + len(found[PARTLY])
    for kind, names in ((ALIKE, alike), (PARTLY, partly)):
        assert all(name in found[kind][0] for name in names)


@pytest.mark.parametrize("labels", [["🦄"], ["cat", "猫"], ["🦄", "🐱"], ["🦄!", "dog"], ["x" * 120]])
def test_labels_without_a_known_word_are_refused(labels, english):
    unknown = [label for label in labels if label not in ("cat", "dog")]
    with pytest.raises(ValueError, match="The tokenizer knows no word of the label") as caught:
        build_prompt(labels, english)
    assert all(label[:30] in str(caught.value) for label in unknown)
    with pytest.raises(ValueError, match="knows no word"):
        build_prompt(["person"], english, negative_labels=labels)


def test_long_lists_of_faults_stay_one_sentence(english):
    labels = [f"thing {number} 猫" for number in range(50)]
    (partly,) = label_remarks(build_prompt(labels, english), english)
    assert partly.count("猫") == 10
    assert "and 40 more" in partly
    with pytest.raises(ValueError, match="and 10 more"):
        build_prompt(["🦄" * (number + 1) for number in range(20)], english)


def test_labels_of_several_prompts_are_compared(english):
    labels = [*(f"thing {number}" for number in range(100)), "café"]
    labels += [*(f"other {number}" for number in range(100)), "cafe"]
    prompt = build_prompt(labels, english)
    assert len(prompt.chunks) > 1
    (alike,) = label_remarks(prompt, english)
    assert "'café' = 'cafe'" in alike


def test_the_processor_warns(processor):
    with pytest.warns(LabelWarning, match="'安全帽' = '安全帶'"):
        processor(text=["安全帽", "安全帶"])
    with pytest.warns(LabelWarning, match="'cat' = 'Cat'"):
        processor(text=["cat"], negative_labels=["Cat"])
    with pytest.raises(ValueError, match="'🦄', '🐱'"):
        processor(text=["🦄", "🐱"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(text=["cat", "remote control", "St. Bernard"])
        # Whoever builds the prompt has seen its labels.
        processor(text=[build_prompt(["Cat", "cat"], processor.tokenizer)])


def test_the_pipeline_warns(processor):
    detector = pipeline("zero-shot-object-detection", model=str(NANO), device="cpu")
    with pytest.warns(LabelWarning, match="'安全帽' = '安全帶'"):
        detector(Image.new("RGB", (64, 64)), candidate_labels=["安全帽", "安全帶"])
    with pytest.raises(ValueError, match="knows no word of the label '🦄'"):
        detector(Image.new("RGB", (64, 64)), candidate_labels=["cat", "🦄"])


def test_the_command_says_it_once(tmp_path, capsys):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    given = ["detect", *(str(tmp_path / f"{name}.png") for name in "ab"), "--out", str(tmp_path / "out")]
    assert main([*given, "--labels", "安全帽, 安全帶, cat"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("warning: The model cannot tell these labels apart") == 1
    assert shown.count("'安全帽' = '安全帶'") == 1
    assert "LabelWarning" not in shown
    assert main([*given, "--labels", "cat, 🦄"]) == 2
    assert "knows no word of the label '🦄'" in capsys.readouterr().err


def test_the_page_says_it(monkeypatch, example_folder):
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "demo"))
    from gdino_demo import render
    from gdino_demo.engine import Models
    from gdino_demo.outputs import Settings
    from gdino_demo.queries import read_query
    from gdino_demo.safety import Refused, read_picture

    models, settings = Models({"nano": Detector("nano")}), Settings(threshold=0.3)
    picture = read_picture(example_folder / "cat.jpg", "cat.jpg")
    outputs = models.run("nano", picture, read_query("安全帽, 安全帶, cat"))
    found = outputs.detections(settings)
    status = render.status(outputs, found, settings)
    assert ALIKE in status
    assert PARTLY in status
    assert any("安全帽" in remark for remark in render.report(outputs, found, settings)["remarks"])
    outputs = models.run("nano", picture, read_query("cat"))
    assert "remarks" not in render.report(outputs, outputs.detections(settings), settings)
    with pytest.raises(Refused, match="knows no word of the label '🦄'"):
        models.check("nano", read_query("cat, 🦄"))


def coco_of(folder, names):
    """A COCO file with a picture and a box of every name."""
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    boxes = [
        {"id": number, "image_id": 1, "category_id": number, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}
        for number in range(len(names))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": boxes,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    file = folder / "train.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_the_check_of_a_data_set_names_them(tmp_path, tiny_tokenizer):
    file = coco_of(tmp_path, ["安全帽", "安全帶", "🦄", "🐱", "café", "cafe", "cat"])
    findings = {finding.kind: finding for finding in check_dataset(file, max_examples=10).findings}
    assert findings["unknown names"].examples == ["'🦄'", "'🐱'"]
    assert findings["half-known names"].examples == ["'安全帽'", "'安全帶'"]
    assert findings["names of equal tokens"].examples == ["'安全帽' = '安全帶'", "'café' = 'cafe'"]
    assert not any(finding.is_error for finding in findings.values())
    file = coco_of(tmp_path, ["cat", "remote control", "кошка", "Straße"])
    assert check_dataset(file).findings == []
    # A model's own tokenizer may know other words.
    (finding,) = check_dataset(file, tokenizer=tiny_tokenizer).findings
    assert (finding.kind, finding.examples) == ("unknown names", ["'кошка'", "'Straße'"])


def test_training_stops_at_a_name_that_the_model_cannot_read(tmp_path, capsys):
    coco_of(tmp_path, ["cat", "🦄"])
    assert main(["train", str(tmp_path), "--runs", str(tmp_path / "runs"), "--max-steps", "1"]) == 2
    shown = capsys.readouterr().err
    assert "knows no word of the label '🦄'" in shown
    assert not (tmp_path / "runs").exists()
