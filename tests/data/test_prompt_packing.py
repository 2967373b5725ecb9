"""Tests of choosing a prompt's labels: positives before negatives, whatever their names."""

import logging
import random
import string

import pytest

from gdino_hf.data.prompt_packing import PromptPacker, pack
from gdino_hf.model.text_prompt import build_prompt

ODD = [
    "猫 cat",
    "日本語 の label",
    "🦊 fox",
    "naïve café",
    "ﬁne ligature",
    "İstanbul",
    "a\u0301ccent",
    "x\u200by",
    "ß ring",
    "e" * 60,
]


def names(count, rng):
    """Return random names of one to six words."""
    return [
        " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 6)))
        for _ in range(count)
    ]


@pytest.fixture
def packer(tiny_tokenizer):
    return PromptPacker(tiny_tokenizer, 256)


def test_all_labels_are_chosen_in_order_if_they_fit(packer):
    labels = ["cup", "cat", "dog"]
    assert packer.choose(labels, ["dog"], random.Random(0), 0) == labels


def test_positives_come_before_negatives_with_hundreds_of_names(packer, tiny_tokenizer):
    rng = random.Random(0)
    vocabulary = list(dict.fromkeys(names(400, rng) + ODD))
    for _ in range(100):
        positives = rng.sample(vocabulary, rng.randint(0, 40))
        chosen = packer.choose(vocabulary, positives, rng, rng.randrange(5))
        prompt = build_prompt(chosen, tiny_tokenizer, 256)
        assert len(prompt.chunks) == 1
        kept = {packer.key(label) for label in chosen}
        assert len(kept) == len(chosen)
        wanted = {packer.key(name) for name in positives}
        if wanted <= kept:
            # None of the labels left out would have fitted.
            used = len(prompt.chunks[0].input_ids) - 2
            shortest = min(
                len(build_prompt([label], tiny_tokenizer, 256).chunks[0].input_ids) - 2
                for label in vocabulary
                if packer.key(label) not in kept
            )
            assert used + shortest > 254
        else:
            assert kept <= wanted


def test_positives_that_do_not_fit_take_turns(packer, caplog):
    rng = random.Random(1)
    positives = list(dict.fromkeys(names(60, rng)))
    groups = len(pack([len(build_prompt([p], packer.tokenizer, 256).chunks[0].input_ids) - 2 for p in positives], 254))
    assert groups > 3
    with caplog.at_level(logging.WARNING):
        seen = [packer.choose([*positives, "cat"], positives, rng, turn) for turn in range(5, 5 + groups)]
    assert set().union(*seen) == set(positives)
    assert all("cat" not in chosen for chosen in seen)
    assert caplog.text.count("take turns") == 1


def test_every_positive_has_its_turn_whatever_the_order_of_each_prompt(packer):
    rng = random.Random(2)
    positives = list(dict.fromkeys(names(60, rng)))
    lengths = [len(build_prompt([name], packer.tokenizer, 256).chunks[0].input_ids) - 2 for name in positives]
    seen = set()
    for turn in range(len(pack(lengths, 254))):
        seen |= set(packer.choose(rng.sample([*positives, "cat"], 61), positives, rng, turn))
    assert seen == set(positives)


def test_negatives_are_drawn_evenly(tiny_tokenizer):
    packer = PromptPacker(tiny_tokenizer, 12)
    rng = random.Random(0)
    vocabulary = ["cat", "dog", "cup", "person", "red", "blue", "car", "tree", "face", "hat"]
    counts = dict.fromkeys(vocabulary, 0)
    for _ in range(900):
        for label in packer.choose(vocabulary, ["cat"], rng, 0):
            counts[label] += 1
    assert counts.pop("cat") == 900
    # Four of nine labels in each of 900 draws: a mean of 400 with a standard deviation of 15.
    assert max(abs(count - 400) for count in counts.values()) < 75


def test_labels_the_model_cannot_tell_apart_are_chosen_once(packer):
    assert packer.choose(["Cat", "cat ", "c.a.t", "CAT."], [], random.Random(0), 0) == ["Cat", "c.a.t"]
    # A positive in another spelling is that label, not a second one.
    assert packer.choose(["dog", "Cat"], ["cat"], random.Random(0), 0) == ["dog", "Cat"]


def test_a_label_that_fits_no_prompt_is_logged_once_and_left_out(packer, caplog):
    labels = ["cat", "...", "", "z " * 300, "dog"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert packer.choose(labels, ["..."], random.Random(0), 0) == ["cat", "dog"]
    assert caplog.text.count("is left out") == 3


def test_one_seed_gives_one_choice(packer):
    vocabulary = names(300, random.Random(0))
    once, again, other = (packer.choose(vocabulary, [], random.Random(seed), 0) for seed in (1, 1, 2))
    assert once == again != other


def test_pack_keeps_the_order_and_the_limit():
    assert pack([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert pack([], 6) == [[]]
