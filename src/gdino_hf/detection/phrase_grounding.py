"""Captions: from a sentence to the boxes of each of its phrases, or to the one box that an expression refers to."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..model.caption_prompt import build_caption, check_pair, phrase_tokens
from ..model.label_faults import label_remarks, tokens_of_labels
from ..model.text_prompt import Prompt, is_unknown, shorten
from .prompt_passes import Asked, Options, ScoredPicture

logger = logging.getLogger(__name__)

Span = tuple[int, int]
Chunker = Callable[[str], Sequence[Span]]
"""Function from a caption to the (start, end) characters of its noun phrases."""

_SPACY_MODEL = "en_core_web_sm"

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("""
    a an the this that these those my your his her its our their some any each every another other all both several
    many few no
""")
_FUNCTION_WORDS = _words("""
    of in on at by for with without to from into onto over under above below behind beside besides between among
    near next against along across around through during inside outside toward towards upon off out up down and or
    but nor so yet as than while when where which who whom whose what how why if because since until although though
    is are was were be been being am do does did have has had having will would can could may might shall should
    must not there here it they them he she him i me we us you one very too also just only it's there's
""")
_VERBS = _words("""
    sit sits sat stand stands stood lie lies lay hold holds held wear wears wore ride rides rode walk walks walked
    run runs ran look looks looked play plays played eat eats ate drink drinks drank carry carries carried jump
    jumps jumped hang hangs hung lean leans leaned drive drives drove fly flies flew sleep sleeps slept watch
    watches watched show shows showed cover covers covered contain contains contained throw throws threw catch
    catches caught cut cuts pull pulls pulled push pushes pushed use uses used make makes made take takes took find
    detect locate
""")


def noun_phrases(caption: str) -> list[Span]:
    """Find the noun phrases of an English caption without their articles.

    spaCy finds them where it is installed with its model en_core_web_sm. Elsewhere simple rules do, which know
    function words and the most common verbs of captions; a log line says so once.

    Args:
        caption: An English text.

    Returns:
        (start, end) characters of each phrase in order.
    """
    language = _spacy()
    if language is None:
        return phrases_by_rule(caption)
    spans = [(chunk.start_char, chunk.end_char) for chunk in language(caption).noun_chunks if chunk.root.pos_ != "PRON"]
    return [trimmed for span in spans if (trimmed := _without_determiner(caption, span)) is not None]


def phrases_by_rule(caption: str) -> list[Span]:
    """Find the noun phrases of an English caption by rules: runs of words between function words, verbs and marks.

    Args:
        caption: An English text.

    Returns:
        (start, end) characters of each phrase in order.
    """
    words = list(_WORD.finditer(caption))
    spans: list[Span] = []
    run: list[re.Match[str]] = []
    for place, word in enumerate(words):
        text = word.group().lower()
        previous = words[place - 1] if place else None
        following = words[place + 1].group().lower() if place + 1 < len(words) else ""
        if run and previous is not None and caption[previous.end() : word.start()].strip():
            _close(run, spans)
        starts = text in _DETERMINERS
        # "a man riding a horse" has a verb, "running shoes" has none.
        is_participle = text.endswith("ing") and len(text) > 4 and (bool(run) or following in _DETERMINERS)
        is_verb = (text in _VERBS and bool(run)) or is_participle
        if starts or text in _FUNCTION_WORDS or is_verb or (text in _VERBS and following in _DETERMINERS):
            _close(run, spans)
        else:
            run.append(word)
    _close(run, spans)
    return spans


def asked_of_caption(
    processor: Any, caption: str, spans: Sequence[Any] | None, chunker: Chunker | None, options: Options
) -> Asked:
    """Make what to look for from a caption; see `Detector.ground`.

    Args:
        processor: The model's processor.
        caption: The text, which is one prompt.
        spans: Characters of each phrase: (start, end) pairs, or lists of such pairs; None asks the chunker.
        chunker: Finds the noun phrases; None for `noun_phrases`.
        options: Which boxes become detections. A query may have several phrases.

    Returns:
        What to look for, whose names are the distinct phrases.

    Raises:
        ValueError: The caption cannot be used, a span is not of the caption or holds no word, or the tokenizer knows
            no word of any phrase.
    """
    prompt = build_caption(caption, processor.tokenizer, processor.max_text_len)
    phrases = _phrases(caption, spans, chunker)
    names: dict[str, int] = {}
    owners: list[int] = []
    ranges: list[Span] = []
    tokens_of: list[list[int]] = []
    for phrase in phrases:
        text = " ".join(caption[start:end] for start, end in phrase)
        index = names.setdefault(text, len(names))
        tokens = phrase_tokens(prompt, phrase)[1]
        if index == len(tokens_of):
            tokens_of.append([])
        tokens_of[index] += tokens
        for first, last in _ranges(tokens):
            owners.append(index)
            ranges.append((first, last))
    chunk = replace(prompt.chunks[0], label_indices=tuple(owners), spans=tuple(ranges))
    found = Prompt(tuple(names), 0, (chunk,))
    if all(is_unknown(tokens, processor.tokenizer) for tokens in tokens_of_labels(found)):
        raise ValueError(
            f"The tokenizer knows no word of the caption's phrases {shorten(', '.join(names))}; use words of its "
            "vocabulary, which is English in the published models."
        )
    select = replace(options, multi_label=True).rule(torch.full((len(names),), options.threshold), "max")
    spans_of = {name: tuple(sorted(s for p in phrases if _text(caption, p) == name for s in p)) for name in names}

    def details(scored: ScoredPicture) -> dict[str, Any]:
        labels = scored.found["labels"].tolist()
        return {
            "spans": tuple(spans_of[scored.asked.names[label]] for label in labels),
            "token_scores": _token_scores(scored, prompt, caption, [tokens_of[label] for label in labels]),
            "caption": caption,
        }

    remarks = tuple(label_remarks(found, processor.tokenizer))
    return Asked(tuple(names), (chunk,), select, details=details, remarks=remarks)


def _phrases(caption: str, spans: Sequence[Any] | None, chunker: Chunker | None) -> list[tuple[Span, ...]]:
    """Return the characters of each phrase, each as one or more pairs."""
    if spans is None:
        found = [(int(start), int(end)) for start, end in (chunker or noun_phrases)(caption)]
        for pair in found:
            check_pair(pair, len(caption))
        # A caption without a noun phrase is a phrase itself.
        return [(pair,) for pair in found] or [((0, len(caption)),)]
    if len(spans) == 0:
        raise ValueError(f"There are no spans for the caption {shorten(caption)}; give some, or None for all phrases.")
    phrases = []
    for span in spans:
        pairs = [span] if span and all(isinstance(number, int) for number in span) else list(span)
        for pair in pairs:
            check_pair(pair, len(caption))
        phrases.append(tuple((int(start), int(end)) for start, end in pairs))
    return phrases


def _text(caption: str, phrase: Sequence[Span]) -> str:
    return " ".join(caption[start:end] for start, end in phrase)


def _ranges(tokens: Sequence[int]) -> list[Span]:
    """Return the runs of adjacent positions as (first, last + 1)."""
    found: list[list[int]] = []
    for token in tokens:
        if found and token == found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([token, token + 1])
    return [(first, last) for first, last in found]


def _token_scores(
    scored: ScoredPicture, prompt: Prompt, caption: str, tokens: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return for each detection its phrase's tokens, as text, with their scores."""
    assert prompt.offsets is not None
    assert scored.logits is not None
    # One wait for the device, not one for each token.
    probabilities = scored.logits[scored.found["queries"]].float().sigmoid().tolist()
    return tuple(
        tuple((caption[slice(*prompt.offsets[token])], of_box[token]) for token in of_one)
        for of_box, of_one in zip(probabilities, tokens, strict=True)
    )


def _close(run: list[re.Match[str]], spans: list[Span]) -> None:
    """End a run of words; one that has a letter becomes a phrase."""
    if run and any(character.isalpha() for word in run for character in word.group()):
        spans.append((run[0].start(), run[-1].end()))
    run.clear()


def _without_determiner(caption: str, span: Span) -> Span | None:
    """Return a phrase without the determiners in front of it, or None if nothing else is in it."""
    for word in _WORD.finditer(caption, *span):
        if word.group().lower() not in _DETERMINERS:
            return word.start(), span[1]
    return None


@functools.cache
def _spacy() -> Any:
    """Return spaCy's English pipeline, or None if it or its model is not installed."""
    try:
        import spacy  # type: ignore[import-not-found]

        return spacy.load(_SPACY_MODEL)
    # spaCy raises exceptions of many types if its parts do not fit together.
    except Exception:
        logger.info(
            "Noun phrases are found by simple rules; install spacy and its model %s for better ones.", _SPACY_MODEL
        )
        return None
