"""Vocabularies as people type them: aliases after a colon."""

import pytest

from gdino_hf import Vocabulary
from gdino_hf.detection.vocabulary_text import parse_vocabulary, vocabulary_text
from gdino_hf.model.text_prompt import split_labels


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat: cat, kitten", {"cat": ["cat", "kitten"]}),
        ("cat: cat, kitten; dog", {"cat": ["cat", "kitten"], "dog": ["dog"]}),
        ("cat: cat, kitten\ndog: puppy.", {"cat": ["cat", "kitten"], "dog": ["puppy"]}),
        ("bird, cat: kitten", {"bird": ["bird"], "cat": ["kitten"]}),
        ("pet:cat,dog", {"pet": ["cat", "dog"]}),
        ("猫：猫，小猫；狗", {"猫": ["猫", "小猫"], "狗": ["狗"]}),
        ("cat: kitten; cat: cat", {"cat": ["kitten", "cat"]}),
        ("cat:", {"cat": ["cat"]}),
        ("St. Bernard: St. Bernard, big dog", {"St. Bernard": ["St. Bernard", "big dog"]}),
        ("jack: 3.5 mm jack", {"jack": ["3.5 mm jack"]}),
        ("", {}),
    ],
)
def test_a_colon_gives_a_label_its_names(text, names):
    assert parse_vocabulary(text) == names


@pytest.mark.parametrize(
    "text", ["cat, remote control", "a cat. a dog.", "St. Bernard, 16:9 screen, 12:30", "cat\ndog\n\nbird", "a; b"]
)
def test_text_without_names_gives_the_labels_of_split_labels(text):
    assert list(parse_vocabulary(text)) == split_labels(text)
    assert all(names == [label] for label, names in parse_vocabulary(text).items())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(": kitten", "no label before the colon of"), ("cat: kitten, dog: puppy", "a line of its own")],
)
def test_colons_that_cannot_be_meant_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_vocabulary(text)


@pytest.mark.parametrize("labels", [["cat", "dog"], {"cat": ["cat", "kitten"], "remote control": None}])
def test_a_vocabulary_comes_back_from_its_text(labels):
    vocabulary = Vocabulary(labels)
    assert Vocabulary(parse_vocabulary(vocabulary_text(vocabulary))) == vocabulary
