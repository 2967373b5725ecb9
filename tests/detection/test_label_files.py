"""Label files of every kind: the labels as they were written, and one sentence for what cannot be used."""

from __future__ import annotations

import json
import re

import pytest

from gdino_hf import Vocabulary
from gdino_hf.detection.label_files import label_lines, read_label_file

ODD = ["St. Bernard", "Washington, D.C.", 'a "quoted" cat', "猫 🐈", "{braces} [x]", "=1+1"]


def written(folder, content):
    path = folder / "labels"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(ODD),
        "\ufeff" + "\r\n".join([*ODD, "", "  ", ODD[0]]),
        json.dumps(ODD),
        json.dumps(dict.fromkeys(ODD), ensure_ascii=False, indent=2),
    ],
    ids=["lines", "mark and blanks", "list", "object"],
)
def test_lines_lists_and_objects_give_the_labels_as_they_are_written(tmp_path, content):
    path = written(tmp_path, content)
    assert read_label_file(path).labels == tuple(ODD)
    assert label_lines(path) == (None if content.lstrip("\ufeff")[0] in "[{" else ODD)


def test_json_has_aliases_and_options_are_those_of_a_vocabulary(tmp_path):
    path = written(tmp_path, json.dumps({"cat": ["cat", "kitten"], "cup": "a photo of a cup", "dog": None}))
    wanted = {"cat": ["cat", "kitten"], "cup": "a photo of a cup", "dog": None}
    assert read_label_file(path) == Vocabulary(wanted)
    options = {"template": "small {}", "negative": ["hat"], "combine": "mean"}
    assert read_label_file(path, **options) == Vocabulary(wanted, **options)


def test_saved_vocabularies_are_told_by_their_content(tmp_path):
    vocabulary = Vocabulary({"cat": ["cat", "kitten"]}, thresholds={"cat": 0.1}, negative="dog")
    for name in ("v.safetensors", "labels.txt", "v"):
        vocabulary.save(tmp_path / name)
        assert read_label_file(tmp_path / name) == vocabulary
        assert label_lines(tmp_path / name) is None
    with pytest.raises(TypeError, match="v is a saved vocabulary, which has its own negative; save it with them"):
        read_label_file(tmp_path / "v", negative="hat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("[]", "empty"),
        ("{}", "empty"),
        (b"caf\xe9", "it is not UTF-8 text: invalid continuation byte at byte 3|unexpected end of data at byte 3"),
        ('{"cat": ["cat"],}', "its JSON is damaged"),
        ("[" * 5000 + "]" * 5000, "its JSON is damaged"),
        ('{"cat": 3}', "the label 'cat' has 3, which is no text"),
        ('{"cat": [1]}', r"the label 'cat' has \[1\], which is no text"),
        ('{"cat": {"texts": ["cat"]}}', "the label 'cat' has {'texts'"),
        ('{"cat": null, "cat": "kitten"}', "the label 'cat' stands in it twice"),
        ("[1, 2]", r"it is the JSON \[1, 2\]"),
        ('{"": null}', "Label 0 is empty"),
        ('{"cat": []}', "empty"),
    ],
)
def test_what_is_no_label_file_is_one_sentence_with_the_remedy(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_label_file(path)
    said = str(caught.value)
    assert re.fullmatch(rf"{path} is not a label file \(.*\); give one label per line, JSON such as .*\.", said)


def test_a_damaged_saved_vocabulary_is_no_text(tmp_path):
    Vocabulary("cat").save(tmp_path / "v")
    content = (tmp_path / "v").read_bytes()
    with pytest.raises(ValueError, match="is not a saved vocabulary"):
        read_label_file(written(tmp_path, content.replace(b"gdino-vocabulary-1", b"gdino-vocabulary-9")))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="labels"):
        read_label_file(tmp_path / "labels")
