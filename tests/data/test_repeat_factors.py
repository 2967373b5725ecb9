"""Tests of repeat factors."""

import pytest

from gdino_hf.data.repeat_factors import repeat_factors


def test_rare_names_follow_the_formula():
    # "cat" on 1 of 100 images: sqrt(0.04 / 0.01) = 2; "dog" on all of them is not rare.
    names = [["dog"]] * 99 + [["dog", "cat", "cat"]]
    factors = repeat_factors(names, 0.04)
    assert factors[:99] == [1.0] * 99
    assert factors[99] == pytest.approx(2.0)


def test_an_image_has_the_factor_of_its_rarest_name():
    names = [["a", "b"], ["a"], ["a", "b"], ["a", "c"]]
    assert repeat_factors(names, 1.0) == pytest.approx([2**0.5, 1.0, 2**0.5, 2.0])


def test_threshold_zero_and_empty_images_stay_at_one():
    assert repeat_factors([["a"], [], ["b"]], 0.0) == [1.0, 1.0, 1.0]
    assert repeat_factors([[], []], 1.0) == [1.0, 1.0]
