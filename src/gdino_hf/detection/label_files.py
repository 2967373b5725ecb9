"""Label files: lines of text, JSON with aliases, or a saved vocabulary, told apart by their content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.text_prompt import shorten

if TYPE_CHECKING:
    from .vocabulary import Vocabulary

_REMEDY = 'give one label per line, JSON such as {"cat": ["cat", "kitten"]}, or a saved vocabulary'
# A safetensors file begins with the length of its header, which is JSON.
_LENGTH_BYTES = 8


def read_label_file(path: str | Path, **options: Any) -> Vocabulary:
    """Read a vocabulary from a label file of any kind.

    Args:
        path: UTF-8 text with one label per line, which may hold commas and periods; JSON, either a list of labels or an
            object from each label to its text, to a list of its aliases, or to null for the label itself; or a file
            that `Vocabulary.save` wrote.
        **options: Options of `Vocabulary`, such as `negative` and `template`. A saved vocabulary has its own.

    Returns:
        The vocabulary.

    Raises:
        TypeError: There are options for a saved vocabulary, or there is no such option.
        OSError: The file cannot be read.
        ValueError: It is none of these, or a label in it cannot be used.
    """
    from .vocabulary import Vocabulary

    content = Path(path).read_bytes()
    if _is_safetensors(content):
        if options:
            raise TypeError(f"{path} is a saved vocabulary, which has its own {', '.join(options)}; save it with them.")
        return Vocabulary.load(path)
    try:
        return Vocabulary(_labels_of(_text(content)), **options)
    except ValueError as error:
        raise ValueError(f"{path} is not a label file ({str(error).rstrip('.')}); {_REMEDY}.") from error


def label_lines(path: str | Path) -> list[str] | None:
    """Read the labels of a file that has one label per line.

    Args:
        path: The file.

    Returns:
        The labels without blanks around them, each once; None if the file is JSON or a saved vocabulary.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8 text.
    """
    content = Path(path).read_bytes()
    if _is_safetensors(content):
        return None
    text = _text(content)
    return None if _is_json(text) else _lines(text)


def _is_safetensors(content: bytes) -> bool:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    return content[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{" and length <= len(content) - _LENGTH_BYTES


def _is_json(text: str) -> bool:
    ends = text.strip()[:1] + text.strip()[-1:]
    return ends in ("{}", "[]")


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _lines(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _labels_of(text: str) -> Any:
    """Return the labels of a text in a form that `Vocabulary` takes."""
    if not _is_json(text):
        return _lines(text)
    try:
        labels = json.loads(text, object_pairs_hook=_each_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its JSON is damaged: {error}") from error
    if not isinstance(labels, dict):
        if not _are_texts(labels):
            raise ValueError(f"it is the JSON {shorten(labels)}")
        return labels
    for label, texts in labels.items():
        if texts is not None and not isinstance(texts, str) and not _are_texts(texts):
            raise ValueError(f"the label {shorten(label)} has {shorten(texts)}, which is no text")
    return labels


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object, of which Python would keep the last of equal labels alone."""
    found: dict[str, Any] = {}
    for label, texts in pairs:
        if label in found:
            raise ValueError(f"the label {shorten(label)} stands in it twice")
        found[label] = texts
    return found


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
