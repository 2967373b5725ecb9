"""Tests of mirrored and shortened captions: the spans of every phrase still select its words."""

import random

import pytest

from gdino_hf.data.captions import fit_caption, swap_sides
from gdino_hf.model.caption_prompt import build_caption


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("the left cat and the right dog", "the right cat and the left dog"),
        ("Left, RIGHT and left.", "Right, LEFT and right."),
        ("leftover on a bright copyright upright", "leftover on a bright copyright upright"),
        ("left-hand door, right_shoe", "right-hand door, left_shoe"),
        ("the leftmost of the rightmost, leftward", "the rightmost of the leftmost, rightward"),
        ("lefty rights aright left2 2right éright", "lefty rights aright left2 2right éright"),
        ("(left)", "(right)"),
        ("", ""),
    ],
)
def test_left_and_right_are_swapped_in_whole_words_only(text, mirrored):
    assert swap_sides(text)[0] == mirrored
    assert swap_sides(mirrored)[0] == text


def test_spans_move_with_the_swapped_words():
    text = "left cat of the left, a RIGHT dog left"
    mirrored, move = swap_sides(text)
    for phrase in ("left cat", "cat", "of the left", "RIGHT dog", "dog", "dog left", "the left, a RIGHT"):
        start = text.index(phrase)
        new_start, new_end = move(start, start + len(phrase))
        assert mirrored[new_start:new_end] == swap_sides(phrase)[0]
    # A position inside a swapped word selects the whole word.
    assert mirrored[slice(*move(1, 3))] == "right"


def sentence(rng, words, length):
    return " ".join(rng.choice(words) for _ in range(length))


WORDS = ["cat", "red", "hat", "zebra", "lion", "qu", "blue"]


@pytest.mark.parametrize("seed", range(6))
def test_shortened_captions_fit_and_every_phrase_appears_in_some_turn(tiny_tokenizer, seed):
    rng = random.Random(seed)
    lengths = [rng.choice((3, 8, 40 if seed % 2 else 12)) for _ in range(12)]
    caption = rng.choice((". ", "? ")).join(sentence(rng, WORDS, length) for length in lengths)
    starts = [0, *(place + 1 for place, letter in enumerate(caption) if letter == " ")]
    spans = []
    for _ in range(8):
        start = rng.choice(starts)
        end = caption.find(" ", start)
        spans.append([[start, end if end > 0 else len(caption)]])
    phrases = [caption[start:end].rstrip(".?") for ((start, end),) in spans]
    spans = [[[start, start + len(phrase)]] for ((start, _),), phrase in zip(spans, phrases, strict=True)]
    seen = set()
    for turn in range(30):
        cut, moved = fit_caption(caption, spans, tiny_tokenizer, 32, turn)
        assert len(build_caption(cut, tiny_tokenizer, 32).chunks[0].input_ids) <= 32
        for index, pairs in enumerate(moved):
            if pairs:
                assert "".join(cut[start:end] for start, end in pairs) == phrases[index]
                seen.add(index)
    assert seen == set(range(8))


def test_sentences_without_a_phrase_are_dropped_first(tiny_tokenizer):
    caption = "the red car. a cat. the tree of the big table. a dog."
    spans = [[[caption.index("cat"), caption.index("cat") + 3]], [[caption.index("dog"), caption.index("dog") + 3]]]
    # There is room for ten tokens: the two sentences with phrases, and the first of the others, which has four tokens.
    cut, moved = fit_caption(caption, spans, tiny_tokenizer, 12, 0)
    assert cut == "the red car. a cat. a dog."
    assert [cut[start:end] for ((start, end),) in moved] == ["cat", "dog"]


def test_a_caption_that_fits_is_unchanged(tiny_tokenizer):
    assert fit_caption("a cat", [[[2, 5]]], tiny_tokenizer, 256, 3) == ("a cat", [[[2, 5]]])


def test_very_long_words_are_cut(tiny_tokenizer):
    caption = "x" * 95 + " cat " + "日" * 300
    cut, moved = fit_caption(caption, [[[96, 99]]], tiny_tokenizer, 32, 0)
    assert cut[slice(*moved[0][0])] == "cat"
    assert len(build_caption(cut, tiny_tokenizer, 32).chunks[0].input_ids) <= 32
