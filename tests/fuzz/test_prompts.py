"""Seeded prompts of every kind: whatever is in them, preparing ends in tokens or in one sentence.

`pytest -m fuzz tests/fuzz` tries all 2,000; without it, every thirtieth is tried.
"""

from __future__ import annotations

import random
import resource
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gdino_hf import NANO, GDinoProcessor
from gdino_hf.cli.errors import UsageError
from gdino_hf.cli.inputs import read_labels
from gdino_hf.model.caption_prompt import build_caption
from gdino_hf.model.label_faults import LabelWarning
from gdino_hf.model.text_prompt import split_labels

PROMPTS, STEP = 2_000, 30
SECONDS, KILOBYTES = 10.0, 2**20
LONGEST = 1_000_000

WORDS = ("cat", "dog", "remote control", "St. Bernard", "3.5 mm jack", "U.S. flag", "a", "the", "person in red")
SIGNS = "[CLS] [SEP] [PAD] [MASK] [UNK] ##ing <script> =1+1 =HYPERLINK(1) %s{} --labels ../.. \\n @file None nan"
SCRIPTS = "安全帽 猫 кошка قطة 🐱 👩‍🚒 ﬁ İ ß 𝒄𝒂𝒕 ½ ﷺ"
PIECES = (
    *SIGNS.split(),
    *SCRIPTS.split(),
    *("\x1b[2J", "\x00", "\u202e", "\ufeff", "\u200b", "\u200d", "\ud800", "\udfff", "\U000e0041", "\uffff"),
    *(".", "..", ",", "?", "。", "、", "\n", "\r\n", "\t", "\u2028", "...", ". .", ",,", '"', "-", "_", "()", "!!!"),
    *("' or 1", "e" + "\u0301" * 200, "a." * 300, "z" * 5_000),
)
ODD = (None, 3, 1.5, True, b"cat", ["cat"], {"cat": 1}, [], (), object(), float("nan"), 10**5000)


def text(rng):
    """Return words and odd pieces in any order."""
    pieces = [
        rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(PIECES) if rng.random() < 0.8 else character(rng)
        for _ in range(rng.choice((0, 1, 1, 2, 3, 8, 40)))
    ]
    found = rng.choice(("", " ", " ", ", ", ". ")).join(pieces)
    return (found * rng.choice((1, 1, 1, 1, 1, 30, 3_000)))[:LONGEST]


def character(rng):
    return chr(rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000))))


def prompt(rng):
    """Return what someone may pass as the processor's text."""
    kind = rng.randrange(8)
    if kind < 2:
        return text(rng)
    labels = [text(rng) if rng.random() < 0.9 else rng.choice(WORDS) for _ in range(rng.choice((0, 1, 2, 3, 5)))]
    if kind == 2:
        labels = [rng.choice(WORDS) for _ in range(rng.choice((1, 100, 700)))]
    if kind == 3:
        labels.insert(rng.randrange(len(labels) + 1), rng.choice(ODD))
    if kind == 4:
        return [labels, [rng.choice(WORDS)]]
    if kind == 5:
        return rng.choice(
            (tuple(labels), [tuple(labels)], iter(labels), dict.fromkeys(map(str, labels)), rng.choice(ODD))
        )
    if kind == 6:
        for _ in range(rng.choice((2, 30, 2_000))):
            labels = [labels]
    return labels


def is_a_sentence(error):
    """Return whether an error's message is one short line that can be printed."""
    # Tokenizers' own errors name no label.
    if "TextEncodeInput" in str(error):
        return False
    message = str(error)
    return "\n" not in message and len(message.split()) >= 4 and len(message) <= 1_500 and message.isprintable()


def check_tokens(processor, inputs):
    """Check that every label has its tokens inside its prompt, and names the boxes of outputs."""
    start, end = processor.tokenizer.cls_token_id, processor.tokenizer.sep_token_id
    for each in inputs.prompts:
        for chunk in each.chunks:
            assert chunk.input_ids[0] == start
            assert chunk.input_ids[-1] == end
            assert len(chunk.input_ids) <= processor.max_text_len
            assert all(0 < first < last < len(chunk.input_ids) for first, last in chunk.spans)
    shape = (*inputs["input_ids"].shape[:1], 2)
    outputs = SimpleNamespace(logits=torch.zeros(*shape, 256), pred_boxes=torch.full((*shape, 4), 0.5))
    found = processor.post_process_grounded_object_detection(outputs, inputs, multi_label=True, threshold=0.1)
    for each, result in zip(inputs.prompts, found, strict=True):
        assert set(result["text_labels"]) == set(each.labels[: each.num_positives])


@pytest.fixture(scope="module")
def processor():
    return GDinoProcessor.from_pretrained(NANO)


@pytest.fixture
def page(monkeypatch):
    """The page's reading of its fields by name, and its refusal."""
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "demo"))
    from gdino_demo.queries import PHRASES, WHOLE, read_caption, read_query
    from gdino_demo.safety import Refused

    fields = {
        "page's labels": read_query,
        "page's negative labels": lambda given: read_query("zebra", given),
        "page's caption": lambda given: read_caption(given, WHOLE),
        "page's phrases": lambda given: read_caption(given, PHRASES),
    }
    return fields, Refused


def tried(seed, processor, page):
    """Prepare one prompt in every way, and return what went wrong."""
    rng = random.Random(seed)
    given, options = prompt(rng), rng.choice(({}, {}, {"negative_labels": [rng.choice(WORDS)]}))
    fields, refused = page
    ways = {
        "processor": (lambda: check_tokens(processor, processor(text=given, **options)), (TypeError, ValueError)),
        "negatives": (lambda: processor(text=["zebra"], negative_labels=given), (TypeError, ValueError)),
        "caption": (lambda: build_caption(given, processor.tokenizer), (TypeError, ValueError)),
    }
    if isinstance(given, str):
        ways["split"] = (lambda: split_labels(given), ())
        ways |= {field: (partial(read, given), (refused,)) for field, read in fields.items()}
        if not given.startswith("@"):
            ways["command"] = (lambda: read_labels(given), (UsageError,))
    wrong = []
    for way, (act, documented) in ways.items():
        began = time.process_time()
        try:
            act()
        except documented as error:
            if not is_a_sentence(error):
                wrong.append(f"{seed} {way}: no sentence: {error!r:.300}")
        except Exception as error:
            wrong.append(f"{seed} {way}: undocumented {error!r:.300}")
        if time.process_time() - began > SECONDS:
            wrong.append(f"{seed} {way}: took {time.process_time() - began:.0f} s")
    return wrong


def run(seeds, processor, page):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LabelWarning)
        wrong = [sentence for seed in seeds for sentence in tried(seed, processor, page)]
    assert wrong == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


def test_some_prompts(processor, page):
    run(range(0, PROMPTS, STEP), processor, page)


@pytest.mark.fuzz
def test_many_prompts(processor, page):
    run(range(PROMPTS), processor, page)
