"""Vocabularies: labels stay the caller's own, prompts do not depend on their order, and files bring everything back."""

from __future__ import annotations

import random

import pytest
import torch

from gdino_hf import Vocabulary
from gdino_hf.detection.vocabulary import EncodedTexts

WORDS = ["cat", "dog", "person", "cup", "remote control", "red car", "hat", "table", "big cats", "traffic light"]


def spelled(prompt, tokenizer):
    """Return label -> texts, as the tokens of all chunks say."""
    found = {}
    for chunk in prompt.chunks:
        for index, (start, end) in zip(chunk.label_indices, chunk.spans, strict=True):
            found.setdefault(prompt.labels[index], []).append(tokenizer.decode(chunk.input_ids[start:end]))
    return found


def test_text_list_and_mapping_mean_the_same():
    assert Vocabulary("cat, dog") == Vocabulary(["cat", "dog"]) == Vocabulary({"cat": None, "dog": ["dog"]})
    assert Vocabulary("cat, dog") != Vocabulary("dog, cat")


def test_equal_labels_are_one_and_keep_the_first_place():
    assert Vocabulary(["dog", "cat", "dog"]).labels == ("dog", "cat")


def test_aliases_and_texts_are_what_prompts_hold(tiny_tokenizer):
    vocabulary = Vocabulary({"animal": ["cat", "dog"], "cup": "the red cup", "hat": None}, template="small {}")
    assert spelled(vocabulary.prompt(tiny_tokenizer, 64), tiny_tokenizer) == {
        "animal": ["cat", "dog"],
        "cup": ["the red cup"],
        "hat": ["small hat"],
    }


@pytest.mark.parametrize("per_prompt", [None, 1, 3])
def test_prompts_do_not_depend_on_the_order_of_labels(tiny_tokenizer, per_prompt):
    rng = random.Random(0)
    wanted = None
    for _ in range(5):
        vocabulary = Vocabulary(rng.sample(WORDS, len(WORDS)), labels_per_prompt=per_prompt, negative=["ball", "face"])
        prompt = vocabulary.prompt(tiny_tokenizer, 20)
        found = [
            (chunk.input_ids, [prompt.labels[index] for index in chunk.label_indices], chunk.spans)
            for chunk in prompt.chunks
        ]
        wanted = wanted or found
        assert found == wanted
        assert prompt.labels[: len(WORDS)] == vocabulary.labels
        assert prompt.num_negatives == 2
        assert all({"ball", "face"} <= {prompt.labels[i] for i in chunk.label_indices} for chunk in prompt.chunks)


def test_a_label_with_all_its_aliases_stays_in_one_prompt(tiny_tokenizer):
    aliases = {word: [word, f"small {word}", f"the {word}"] for word in WORDS}
    prompt = Vocabulary(aliases).prompt(tiny_tokenizer, 20)
    assert len(prompt.chunks) > 2
    homes = [sum(i in chunk.label_indices for chunk in prompt.chunks) for i in range(len(WORDS))]
    assert set(homes) == {1}
    assert spelled(prompt, tiny_tokenizer) == {label: sorted(texts) for label, texts in aliases.items()}


def test_labels_per_prompt_is_kept(tiny_tokenizer):
    prompt = Vocabulary(WORDS, labels_per_prompt=4).prompt(tiny_tokenizer, 64)
    assert [len(chunk.label_indices) for chunk in prompt.chunks] == [4, 4, 2]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "empty"),
        ({}, {}, "empty"),
        (["cat", ""], {}, "Label 1 is empty"),
        ({"cat": []}, {}, "empty"),
        (["cat"], {"template": "a photo"}, r"must have one \{\}"),
        (["cat"], {"template": "{} {}"}, r"must have one \{\}"),
        (["cat"], {"combine": "sum"}, "combine must be"),
        (["cat"], {"thresholds": {"dog": 0.5}}, "'dog' has a threshold but is not a label"),
        (["cat"], {"thresholds": {"cat": 1.5}}, "threshold of 'cat' is 1.5"),
        (["cat"], {"colors": {"cat": "red"}}, "#rrggbb"),
        (["cat"], {"negative": ["cat"]}, "'cat' is a label and a negative label"),
        (["cat"], {"labels_per_prompt": 0}, "labels_per_prompt is 0"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(labels, options, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(labels, **options)


def test_labels_that_are_no_text_are_a_type_error():
    with pytest.raises(TypeError, match="list of strings"):
        Vocabulary([1, 2])


def test_aliases_that_exceed_a_prompt_are_refused(tiny_tokenizer):
    many = [f"{first} {second}" for first in ("red", "blue", "big") for second in ("cat", "dog", "cup", "hat")]
    with pytest.raises(ValueError, match=r"12 texts of the label .thing. have .* stay in one prompt; give it fewer"):
        Vocabulary({"thing": many}).prompt(tiny_tokenizer, 20)


def test_saved_vocabulary_comes_back_whole(tmp_path):
    vocabulary = Vocabulary(
        {"猫 cat": ["cat", "small cat"], 'a "cup"': None},
        negative={"dog": "big dog"},
        combine="mean",
        thresholds={"猫 cat": 0.25},
        colors={'a "cup"': "#FF8800"},
        labels_per_prompt=7,
    )
    features = {(2, 40, 7, 3): torch.randn(4, 8), (2, 3): torch.randn(2, 8)}
    vocabulary.encoded = EncodedTexts("abc", features)
    vocabulary.save(tmp_path / "words.safetensors")
    found = Vocabulary.load(tmp_path / "words.safetensors")
    assert found == vocabulary
    assert found.colors == {'a "cup"': "#ff8800"}
    assert found.thresholds(0.3).tolist() == pytest.approx([0.25, 0.3])
    assert found.encoded.fingerprint == "abc"
    assert found.encoded.features.keys() == features.keys()
    assert all(torch.equal(found.encoded.features[tokens], x) for tokens, x in features.items())


def test_vocabulary_without_features_is_saved_too(tmp_path):
    Vocabulary("cat").save(tmp_path / "cat.safetensors")
    assert Vocabulary.load(tmp_path / "cat.safetensors").encoded is None


@pytest.mark.parametrize("content", [b"", b"cat, dog", b"\x10\0\0\0\0\0\0\0{}              "])
def test_other_files_are_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"x is not a saved vocabulary \(.*\); save it again"):
        Vocabulary.load(tmp_path / "x")


def test_thresholds_go_into_a_copy():
    vocabulary = Vocabulary("cat, dog")
    changed = vocabulary.with_thresholds({"dog": 0.6})
    assert changed.thresholds(0.1).tolist() == pytest.approx([0.1, 0.6])
    assert vocabulary.thresholds(0.1).tolist() == pytest.approx([0.1, 0.1])
