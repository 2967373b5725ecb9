"""Tests of training prompts with negative labels."""

import random
from collections import Counter

import pytest

from gdino_hf.data.negatives import PromptSampler

VOCABULARY = [f"name {index}" for index in range(30)]


def test_every_name_of_the_image_is_in_the_prompt_once():
    sampler = PromptSampler(VOCABULARY, (5, 12))
    rng = random.Random(0)
    for _ in range(50):
        labels = sampler(["name 3", "name 7", "name 3"], rng)
        assert {"name 3", "name 7"} <= set(labels)
        assert len(labels) == len(set(labels))
        assert 5 <= len(labels) <= 12


def test_absent_names_are_drawn_evenly():
    sampler = PromptSampler(VOCABULARY, (11, 11))
    rng = random.Random(0)
    counts = Counter(label for _ in range(1000) for label in sampler(["name 0"], rng))
    assert counts.pop("name 0") == 1000
    assert len(counts) == 29
    # 10 of 29 names in each of 1000 draws: a mean of 345 with a standard deviation of 15.
    assert max(abs(count - 345) for count in counts.values()) < 75


def test_names_of_the_image_appear_at_any_position():
    sampler = PromptSampler(VOCABULARY, (10, 10))
    rng = random.Random(0)
    places = Counter(sampler(["name 0"], rng).index("name 0") for _ in range(1000))
    assert set(places) == set(range(10))
    assert max(places.values()) < 160


def test_another_spelling_of_a_positive_is_not_a_negative():
    labels = PromptSampler(["Cat ", "dog"], (2, 2))(["cat"], random.Random(0))
    assert sorted(labels) == ["cat", "dog"]


def test_all_names_of_the_image_are_kept_even_above_the_maximum():
    names = VOCABULARY[:8]
    assert sorted(PromptSampler(VOCABULARY, (2, 3))(names, random.Random(0))) == sorted(names)


def test_an_image_without_names_gets_negatives():
    assert len(PromptSampler(VOCABULARY, (4, 4))([], random.Random(0))) == 4


@pytest.mark.parametrize(("vocabulary", "bounds"), [([], (1, 2)), (["a"], (0, 2)), (["a"], (3, 2))])
def test_invalid_arguments_are_rejected(vocabulary, bounds):
    with pytest.raises(ValueError, match=r"vocabulary|num_labels"):
        PromptSampler(vocabulary, bounds)
