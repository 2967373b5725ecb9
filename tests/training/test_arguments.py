"""How options determine the length of training prompts."""

import random

import pytest

from gdino_hf.data.negatives import PromptSampler
from gdino_hf.training.arguments import DataArguments

NAMES = [f"name {number}" for number in range(80)]


def labels_of(names, **options):
    """Return the fewest and the most labels among a hundred prompts for an image with one name."""
    arguments = DataArguments(data="train.json", **options)
    sampler = PromptSampler(names, arguments.prompt_length(len(names)))
    found = [len(sampler(names[:1], random.Random(seed))) for seed in range(100)]
    return min(found), max(found)


@pytest.mark.parametrize("count", [1, 3, 20, 59, 80])
def test_all_names_are_prompted_by_default(count):
    assert labels_of(NAMES[:count]) == (count, count)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"most_labels": 30}, (30, 30)),
        ({"least_labels": 70}, (70, 80)),
        ({"least_labels": 78, "most_labels": 79}, (78, 79)),
    ],
)
def test_bounds_are_kept(options, expected):
    assert labels_of(NAMES, **options) == expected


def test_replayed_prompts_vary_in_length_within_the_bounds():
    assert DataArguments(data="train.json").prompt_length(None) == (20, 60)
    assert DataArguments(data="train.json", most_labels=30).prompt_length(None) == (20, 30)
    assert DataArguments(data="train.json", most_labels=10).prompt_length(None) == (10, 10)
    assert DataArguments(data="train.json", least_labels=70).prompt_length(None) == (70, 70)


@pytest.mark.parametrize("options", [{"least_labels": 0}, {"most_labels": 0}, {"least_labels": 5, "most_labels": 4}])
def test_impossible_bounds_are_refused(options):
    with pytest.raises(ValueError, match="1 <= least <= most"):
        DataArguments(data="train.json", **options)
