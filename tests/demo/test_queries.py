"""What visitors ask for: label text with aliases, vocabulary files and captions, within the page's limits."""

import json
import os
import time

import pytest
import torch
from gdino_demo import queries
from gdino_demo.queries import PHRASES, read_caption, read_query, read_vocabulary_file
from gdino_demo.safety import LONGEST_TEXT, MOST_LABELS, Refused

from gdino_hf import Vocabulary
from gdino_hf.detection.vocabulary import EncodedTexts


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("cat, remote control", ["cat", "remote control"]),
        ("a cat. a remote control.", ["a cat", "a remote control"]),
        ("St. Bernard", ["St. Bernard"]),
        ("cat,, cat ,dog\n", ["cat", "dog"]),
        ("猫, кот", ["猫", "кот"]),
        ("cat: cat, kitten; dog", {"cat": ["cat", "kitten"], "dog": None}),
        ("cat: cat, kitten\ndog: puppy", {"cat": ["cat", "kitten"], "dog": "puppy"}),
    ],
)
def test_labels_are_a_list_a_sentence_or_have_names(text, labels):
    assert read_query(text).vocabulary == Vocabulary(labels)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        None,
        "!!!",
        "<script>alert(1)</script>",
        "cat, a>b",
        "cat: a>b",
        "a\x00b",
        "x" * (LONGEST_TEXT + 1),
        ", ".join(map(str, range(MOST_LABELS + 1))),
        "cat: " + ", ".join(map(str, range(MOST_LABELS + 1))),
        "cat: !!!",
        ": cat",
    ],
    ids=["empty", "commas", "none", "marks", "script", "angle", "alias", "control", "long", "many", "many names",
         "marks as a name", "no label"],
)  # fmt: skip
def test_labels_that_cannot_be_used_are_refused(text):
    with pytest.raises(Refused):
        read_query(text)


def test_negative_labels_are_optional_and_no_labels():
    assert read_query("cat", "").negatives == ()
    assert read_query("cat", "dog: dog, puppy").negatives == ("dog",)
    with pytest.raises(Refused, match="leave it in one"):
        read_query("cat, dog", "Dog")


def test_a_file_replaces_the_text_and_keeps_what_it_holds(tmp_path):
    saved = Vocabulary({"cat": ["cat", "kitten"]}, negative=["dog"], thresholds={"cat": 0.1}, colors={"cat": "#ff0000"})
    saved.save(tmp_path / "a.safetensors")
    assert read_query("bird", "", (str(tmp_path / "a.safetensors"), "pets.safetensors")).vocabulary == saved
    (tmp_path / "b.json").write_text(json.dumps({"cat": ["cat", "kitten"], "Washington, D.C.": None}))
    query = read_query("", "dog", (str(tmp_path / "b.json"), "b.json"))
    assert query.vocabulary == Vocabulary({"cat": ["cat", "kitten"], "Washington, D.C.": None}, negative=["dog"])
    with pytest.raises(Refused, match=r"pets\.safetensors is a saved vocabulary, .* empty the field"):
        read_query("", "bird", (str(tmp_path / "a.safetensors"), "pets.safetensors"))


def test_text_features_of_a_file_are_not_used(tmp_path):
    """They would be stored for later visitors, who could be given false ones."""
    forged = Vocabulary(["cat"])
    forged.encoded = EncodedTexts("any", {(101, 4937, 1012, 102): torch.zeros(4, 8)})
    forged.save(tmp_path / "a.safetensors")
    assert Vocabulary.load(tmp_path / "a.safetensors").encoded is not None
    assert read_vocabulary_file(str(tmp_path / "a.safetensors"), "a.safetensors").encoded is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.exe", b"MZ\x90\x00", "a.exe is not a label file (it is not UTF-8 text"),
        ("a.json", b"[" * 10**5 + b"]" * 10**5, "a.json is not a label file (its JSON is damaged"),
        ("a.json", b"[" * 10**5, "100000 characters; they may have 4000"),
        ("a.json", json.dumps([str(i) for i in range(MOST_LABELS + 1)]).encode(), "There are 101 labels"),
        ("a.json", json.dumps(["x" * 3000, "y" * 3000]).encode(), "may have 4000"),
        ("a.json", b'["<b>"]', "angle bracket"),
        ("a.json", b'{"cat": ["\\u0000"]}', "control characters"),
        ("a.txt", b"?!", "consists of punctuation"),
        ("a.safetensors", b"\x02" + bytes(7) + b"{}", "a.safetensors is not a saved vocabulary"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused) as refusal:
        read_vocabulary_file(str(tmp_path / name), name)
    assert sentence in refusal.value.message
    assert str(tmp_path) not in refusal.value.message
    assert "\n" not in refusal.value.message


def test_large_and_removed_files_are_named_and_use_prolongs_life(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("cat")
    os.utime(path, (1, 1))
    read_vocabulary_file(str(path), "a.txt")
    assert time.time() - path.stat().st_mtime < 60
    monkeypatch.setattr(queries, "LARGEST_VOCABULARY", 2)
    with pytest.raises(Refused, match=r"a\.txt has .* MB; a vocabulary may have"):
        read_vocabulary_file(str(path), "a.txt")
    with pytest.raises(Refused, match="no longer kept"):
        read_vocabulary_file(str(tmp_path / "gone.txt"), "gone.txt")


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A cat beside a red cup.", ["cat", "red cup"]),
        ("  a man wearing\na blue hat ", ["man", "blue hat"]),
        ("near", ["near"]),
    ],
)
def test_a_caption_has_phrases_with_their_characters(caption, phrases):
    query = read_caption(caption)
    assert query.vocabulary is None
    assert [query.caption[start:end] for start, end in query.phrases] == phrases
    assert "\n" not in query.caption


def test_phrases_by_themselves_are_labels():
    query = read_caption("a cat by a cat and a dog", PHRASES)
    assert query.vocabulary == Vocabulary(["cat", "dog"])
    assert (query.caption, len(query.phrases)) == ("a cat by a cat and a dog", 3)
    with pytest.raises(Refused, match="101 labels"):
        read_caption(", ".join(f"thing{number}" for number in range(MOST_LABELS + 1)), PHRASES)


@pytest.mark.parametrize("caption", ["", None, " . ", "a <b>cat</b>", "x" * (LONGEST_TEXT + 1), "a\x00cat"])
def test_captions_that_cannot_be_used_are_refused(caption):
    with pytest.raises(Refused, match="caption"):
        read_caption(caption)
