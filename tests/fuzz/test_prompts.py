"""Seeded prompts of every kind of text: each becomes a prompt of its labels, or one sentence.

`pytest -m fuzz tests/fuzz` builds all 2,000 prompts; without it, a few are built.
"""

from __future__ import annotations

import random
import resource
import sys
import time
import warnings

import pytest

from gdino_hf import NANO, GDinoProcessor
from gdino_hf.cli.errors import UsageError
from gdino_hf.cli.inputs import read_labels
from gdino_hf.model.caption_prompt import build_caption
from gdino_hf.model.text_prompt import split_labels

PROMPTS, FEW = 2000, 60
SECONDS, BYTES = 10.0, 2**30

WORDS = ("cat", "remote control", "a cat", "St. Bernard", "U.S. flag", "3.5 mm jack", "кошка", "猫", "安全帽", "x" * 40)
SEPARATORS = (", ", ". ", ".", "\n", "; ", "，", "。", " . ", ",,", " and ", "/", "?", "[SEP]", " ", "")
ODD = (
    *("\0", "\x1b[2J", "\ud800", "\udfff", "\u202e", "\u200d", "\u200b", "\ufeff", "\u2028", "\U000e0041", "\uffff"),
    *("😀", "👨‍👩‍👧", "🏳️‍🌈", "e" + "\u0301" * 200, "ﷺ", "\U0001f1e9\U0001f1ea", "Ǆ", "ß", "İ", "ﬁ", "①", "½", "٣"),
    *("[CLS]", "[PAD]", "[MASK]", "##cat", "<s>", "=HYPERLINK(1)", "'; --", "../..", "@file", "--labels", "%s", "{}"),
    *(
        "   ",
        "\t",
        "...",
        "!!!",
        ".,.,",
        "-",
        "_",
        "1e999",
        "nan",
        "None",
        "a." * 300,
        "a " * 300,
        "z" * 5000,
        "猫" * 600,
    ),
)


@pytest.fixture(scope="module")
def processor():
    return GDinoProcessor.from_pretrained(NANO)


def prompt_text(seed):
    """Return a text, a list of labels, or a value that is neither."""
    rng = random.Random(seed)
    pieces = [rng.choice(WORDS if rng.random() < 0.6 else ODD) for _ in range(rng.choice((0, 1, 2, 5, 30, 300)))]
    if rng.random() < 0.1:
        pieces.append("".join(chr(rng.randrange(0x110000)) for _ in range(rng.choice((1, 20, 500)))))
    kind = rng.random()
    if kind < 0.5:
        return "".join(piece + rng.choice(SEPARATORS) for piece in pieces)
    if kind < 0.9:
        return pieces
    return rng.choice(
        (None, 3, [None], [[]], {"cat": 1}, [3, "cat"], b"cat", [b"cat"], (), [""], float("nan"), [pieces])
    )


def sentence_of(call):
    """Return the sentence of the documented errors that a call raises, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except (TypeError, ValueError, UsageError) as error:
            return str(error)
    return None


def build(processor, seeds):
    """Build the prompts in every way there is; return how many became prompts."""
    built = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        text = prompt_text(seed)
        begin = time.process_time()
        calls = [lambda text=text: processor(text=[text])]
        if isinstance(text, str):
            calls += [
                lambda text=text: processor(text=text),
                lambda text=text: split_labels(text),
                lambda text=text: read_labels(text),
                lambda text=text: build_caption(text, processor.tokenizer),
            ]
        sentences = [sentence_of(call) for call in calls]
        built += sentences[0] is None
        for sentence in filter(None, sentences):
            assert sentence.isprintable(), (seed, sentence)
            assert len(sentence) < 1000, (seed, sentence)
        assert time.process_time() - begin < SECONDS, seed
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes * (1 if sys.platform == "darwin" else 1024) < BYTES
    return built


def test_a_few_prompts_are_built_or_refused_in_one_sentence(processor):
    assert build(processor, range(FEW)) > 0


@pytest.mark.fuzz
def test_all_prompts_are_built_or_refused_in_one_sentence(processor):
    built = build(processor, range(PROMPTS))
    assert 0.1 < built / PROMPTS < 0.95
