"""Vocabularies as text: one thing by several names, the way people type it."""

from __future__ import annotations

import re

from ..model.text_prompt import shorten, split_labels
from .vocabulary import Vocabulary

# A colon, unless it stands between digits.
_COLON = re.compile(r":(?!(?<=\d:)\d)|：")


def parse_vocabulary(text: str) -> dict[str, list[str]]:
    """Read labels and their aliases from text.

    `split_labels` splits the text as usual. A colon gives a label the names that prompts hold for it; they end with the
    line or with a semicolon:

        cat: cat, kitten; dog: dog, puppy
        remote control

    Without a colon, and with colons between digits only ("16:9 screen"), the labels are those of `split_labels`.

    Args:
        text: Any text.

    Returns:
        Label -> its names, in order, for `Vocabulary`; a label without names of its own has itself. Empty if the text
        names nothing.

    Raises:
        ValueError: There is no label before a colon, or a name holds a colon.
    """
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        for entry in re.split("[;；]", line) if _COLON.search(line) else [line]:
            head, *names = _COLON.split(entry)
            if len(names) > 1:
                raise ValueError(
                    f"The entry {shorten(entry.strip())} has {len(names)} colons; give each label a line of its own."
                )
            labels = split_labels(head)
            if names and not labels:
                raise ValueError(f"There is no label before the colon of {shorten(entry.strip())}; write one.")
            texts = {label: [label] for label in labels}
            if names:
                texts[labels[-1]] = split_labels(names[0]) or [labels[-1]]
            for label, own in texts.items():
                found[label] = list(dict.fromkeys([*found.get(label, []), *own]))
    return found


def vocabulary_text(vocabulary: Vocabulary) -> str:
    """Return the labels of a vocabulary as `parse_vocabulary` reads them.

    Args:
        vocabulary: Any vocabulary. Labels or names with a comma, a colon or another separator inside are split when the
            text is read; thresholds, colours and negative labels have no place in it.

    Returns:
        "cat, dog", or a line for each label if one of them has names.
    """
    if all(entry.texts == (entry.label,) for entry in vocabulary.entries):
        return ", ".join(vocabulary.labels)
    return "\n".join(
        entry.label if entry.texts == (entry.label,) else f"{entry.label}: {', '.join(entry.texts)}"
        for entry in vocabulary.entries
    )
