"""Wordings of names: which phrases stand for a name, and what a phrase means."""

import random

import pytest

from gdino_hf.recipes.wordings import SYNONYMS, Reworded, Wordings, plural, wordings


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("cat", "cats"),
        ("bus", "buses"),
        ("wine glass", "wine glasses"),
        ("glass", None),
        ("couch", "couches"),
        ("puppy", "puppies"),
        ("key", "keys"),
        ("person", "people"),
        ("butter knife", "butter knives"),
        ("potato", "potatoes"),
        ("sheep", None),
        ("fried rice", None),
        ("scissors", None),
        ("Arduino Uno", None),
    ],
)
def test_plural(name, many):
    assert plural(name) == many


def test_wordings_have_articles_plurals_synonyms_and_a_template():
    found = wordings("tv")
    assert found[0] == "tv"
    assert {"a tv", "the tv", "tvs", "a photo of a tv", "television", "a television", "televisions"} <= set(found)
    assert {"an airplane", "the airplane", "a plane"} <= set(wordings("airplane"))
    assert len(found) == len(set(found))


def test_what_is_not_counted_has_neither_plural_nor_a():
    assert wordings("rice") == ["rice", "the rice"]
    assert wordings("scissors") == ["scissors", "the scissors"]


def test_names_of_two_sets_with_one_meaning_share_it():
    vocabulary = Wordings(["couch", "tv", "sofa", "hammer"])
    assert {vocabulary.meaning(label) for label in ("couch", "Sofa", "the sofa", "couches", "a photo of a sofa")} == {
        "couch"
    }
    assert vocabulary.meaning("television") == "tv"
    assert vocabulary.meaning("hammers") == "hammer"
    assert vocabulary.meaning("piano") == "piano"


def test_wordings_that_could_mean_two_names_are_not_drawn():
    # "knives" is the plural of "knife" and, here, a name of its own.
    vocabulary = Wordings(["airplane", "knife", "knives"])
    rng = random.Random(0)
    assert "knives" not in {vocabulary.draw("knife", rng) for _ in range(200)}
    assert "aircraft" in {vocabulary.draw("airplane", rng) for _ in range(200)}
    assert vocabulary.draw("piano", rng) == "piano"


def test_indices_know_every_wording_of_the_teachers_classes():
    indices = Wordings(["cat", "couch", "sofa", "hammer"]).indices(["cat", "couch"])
    assert {indices[label] for label in ("cat", "kitty", "a cat", "cats")} == {0}
    assert {indices[label] for label in ("sofa", "the couch", "sofas")} == {1}
    assert "hammer" not in indices


def test_synonyms_are_words_of_one_name_only():
    words = [word for synonyms in SYNONYMS.values() for word in synonyms]
    assert len(words) == len(set(words))
    assert not set(words) & set(SYNONYMS)


def test_reworded_names_keep_their_boxes_and_meaning():
    vocabulary = Wordings(["cat", "tv", "dog", "couch"])
    example = {"names": ["cat", "tv", "cat"], "neg_names": ["dog", "couch"]}
    transform = Reworded(vocabulary, probability=1.0, absent_probability=1.0)
    for seed in range(50):
        result = transform(example, random.Random(seed))
        assert [vocabulary.meaning(name) for name in result["names"]] == example["names"]
        assert [vocabulary.meaning(name) for name in result["neg_names"]] == example["neg_names"]
        assert result["names"][0] == result["names"][2] != "cat"
    assert example["names"] == ["cat", "tv", "cat"]
    assert Reworded(vocabulary, 0.0, 0.0)(example, random.Random(0)) == example


def test_share_of_reworded_names():
    vocabulary = Wordings(["cat", "dog"])
    transform, rng = Reworded(vocabulary, probability=0.3, absent_probability=0.1), random.Random(0)
    results = [transform({"names": ["cat"], "neg_names": ["dog"]}, rng) for _ in range(2000)]
    assert sum(result["names"] != ["cat"] for result in results) / 2000 == pytest.approx(0.3, abs=0.04)
    assert sum(result["neg_names"] != ["dog"] for result in results) / 2000 == pytest.approx(0.1, abs=0.03)


def test_two_names_never_get_one_wording():
    # Both can become "sofas".
    transform = Reworded(Wordings(["couch", "sofa"]), probability=1.0)
    for seed in range(300):
        first, second = transform({"names": ["couch", "sofa"]}, random.Random(seed))["names"]
        assert first != second
