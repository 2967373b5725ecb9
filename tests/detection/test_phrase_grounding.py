"""Captions: phrases keep their characters, tokens and scores, and an expression has one box."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from gdino_hf import Detector
from gdino_hf.detection import phrase_grounding
from gdino_hf.detection.phrase_grounding import noun_phrases, phrases_by_rule
from gdino_hf.model.caption_prompt import build_caption, phrase_tokens
from gdino_hf.model.label_faults import LabelWarning
from random_models import make_random_model

CAPTION = "The big cats sit on a table left of the red cup."


@pytest.fixture(scope="module")
def detector(tiny_config, tiny_processor):
    return Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)


@pytest.fixture(scope="module")
def picture():
    pixels = torch.randint(0, 256, (64, 80, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a man riding a brown horse on the beach", ["man", "brown horse", "beach"]),
        ("A dog sits on a sofa.", ["dog", "sofa"]),
        ("two cats, a remote control and the TV", ["two cats", "remote control", "TV"]),
        ("The woman who wears a red hat is holding an umbrella", ["woman", "red hat", "umbrella"]),
        ("running shoes under the table", ["running shoes", "table"]),
        ("a child's toy-car near St. Bernard", ["child's toy-car", "St", "Bernard"]),
        ("it is on the", []),
        ("", []),
        ("...!?", []),
        ("café crème", ["café crème"]),
        ("3 4 5", []),
    ],
)
def test_rules_find_the_noun_phrases(caption, phrases):
    assert [caption[start:end] for start, end in phrases_by_rule(caption)] == phrases


def test_each_phrase_has_the_best_score_of_its_tokens(detector, picture):
    spans = [(4, 12), (22, 27), (40, 47)]
    found = detector.ground(picture, CAPTION, spans=spans, threshold=0.0)
    assert found.names == ("big cats", "table", "red cup")
    assert found.caption == CAPTION
    prompt = build_caption(CAPTION, detector.processor.tokenizer, 64)
    inputs = detector.processor(images=picture, text=[prompt])
    with torch.no_grad():
        outputs = detector.model(**inputs)
    probabilities = outputs.logits[0].float().sigmoid()
    for name, span in zip(found.names, spans, strict=True):
        tokens = phrase_tokens(prompt, [span])[1]
        wanted = probabilities[:, tokens].amax(-1)
        of_phrase = found.filter(labels=name)
        assert of_phrase.scores.tolist() == pytest.approx(sorted(wanted.tolist(), reverse=True), abs=1e-5)
        assert found.presence[name] == pytest.approx(wanted.max().item(), abs=1e-5)
        assert set(of_phrase.spans) == {(span,)}
        for scores, score in zip(of_phrase.token_scores, of_phrase.scores, strict=True):
            assert " ".join(text for text, _ in scores).replace(" ", "") == name.replace(" ", "")
            assert max(value for _, value in scores) == pytest.approx(score, abs=1e-5)


def test_a_phrase_may_have_several_parts(detector, picture):
    found = detector.ground(picture, CAPTION, spans=[[(4, 7), (44, 47)]], threshold=0.0)
    assert found.names == ("big cup",)
    assert set(found.spans) == {((4, 7), (44, 47))}
    assert {text for text, _ in found.token_scores[0]} == {"big", "cup"}


def test_the_chunker_can_be_replaced(detector, picture):
    found = detector.ground(picture, CAPTION, chunker=lambda text: [(text.index("table"), text.index("table") + 5)])
    assert found.names == ("table",)
    with pytest.raises(ValueError, match="not \\[start, end\\) of a caption of 48 characters"):
        detector.ground(picture, CAPTION, chunker=lambda text: [(0, 900)])


def test_without_a_chunker_the_noun_phrases_are_asked_for(detector, picture):
    assert detector.ground(picture, CAPTION).names == ("big cats", "table left", "red cup")
    # A caption without a noun phrase is one.
    assert detector.ground(picture, "of the").names == ("of the",)


def test_an_expression_has_one_box_the_best(detector, picture):
    found = detector.refer(picture, "the red cup left of the table")
    assert len(found) == 1
    every = detector.ground(picture, "the red cup left of the table", spans=[(0, 29)], threshold=0.0)
    assert found.boxes.tolist() == every.boxes[:1].tolist()
    assert found.scores[0] == every.scores.max()


@pytest.mark.parametrize(
    ("caption", "spans", "message"),
    [
        ("", None, "nothing to look for"),
        (CAPTION, [], "no spans"),
        (CAPTION, [(0, 99)], "caption of 48 characters"),
        (CAPTION, [(3, 4)], "hold no word"),
        ("cat " * 100, None, "has 101 tokens but a prompt of 64"),
        ("安全帽", None, "knows no word of the caption's phrases '安全帽'; use words"),
        ("a cat and 安全帽", [(10, 13)], "knows no word of the caption's phrases '安全帽'"),
    ],
)
def test_captions_that_cannot_be_used_are_refused(detector, picture, caption, spans, message):
    with pytest.raises(ValueError, match=message):
        detector.ground(picture, caption, spans=spans)


def test_phrases_that_are_unknown_or_cannot_be_told_apart_are_named(detector, picture):
    with pytest.warns(LabelWarning) as said:
        found = detector.ground(picture, "a cat, a 安全帽 and a 安全帶", threshold=0.0)
    same, unknown = (str(warning.message) for warning in said)
    assert "cannot tell these labels apart" in same
    assert "'安全帽' = '安全帶'" in same
    assert "does not know every word of these labels" in unknown
    assert "cat" not in unknown
    assert found.names == ("cat", "安全帽", "安全帶")


def test_spacy_is_used_where_it_is_installed(monkeypatch):
    chunk = SimpleNamespace(start_char=0, end_char=7, root=SimpleNamespace(pos_="NOUN"))
    pronoun = SimpleNamespace(start_char=8, end_char=10, root=SimpleNamespace(pos_="PRON"))
    spacy = ModuleType("spacy")
    spacy.load = lambda name: lambda caption: SimpleNamespace(noun_chunks=[chunk, pronoun])
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    phrase_grounding._spacy.cache_clear()
    try:
        assert noun_phrases("the dog it") == [(4, 7)]
    finally:
        phrase_grounding._spacy.cache_clear()
