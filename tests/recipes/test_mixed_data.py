"""Everyday and wild photographs as one training set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
from gdino_hf.recipes import mixed_data
from gdino_hf.recipes.mixed_data import (
    MixedRows,
    WithoutNames,
    held_out,
    look,
    look_once,
    mixed_weights,
    taught_row,
    weights_digest,
)
from gdino_hf.recipes.wordings import Wordings

CLASSES = ["apple", "car", "couch", "dog"]
WORDINGS = Wordings([*CLASSES, "fresh apple", "sofa", "hammer", "dent"])
ROW = {"width": 200, "height": 100, "boxes": [[0, 0, 100, 50]], "names": ["sofa"], "crowd": [False], "neg_names": []}


def taught(row, best=(0.0, 0.0, 0.0, 0.0), boxes=()):
    return taught_row({**ROW, **row}, {"best": list(best), "boxes": [list(box) for box in boxes]}, CLASSES, WORDINGS)


def test_sure_boxes_of_other_things_are_added_in_pixels():
    result = taught({}, best=(0, 0.9, 0, 0), boxes=[(1, 0.9, 0.6, 0.5, 0.9, 1.0)])
    np.testing.assert_allclose(result["boxes"], [[0, 0, 100, 50], [120, 50, 180, 100]])
    assert result["names"] == ["sofa", "car"]
    assert result["crowd"] == [False, False]


def test_boxes_of_what_is_annotated_already_are_not_added():
    # A couch is a sofa; the other box covers the annotated one, under a name that the annotation does not use.
    result = taught({}, best=(0, 0, 0.9, 0.9), boxes=[(2, 0.9, 0.6, 0.5, 0.9, 1.0), (3, 0.9, 0.0, 0.0, 0.5, 0.45)])
    assert result["names"] == ["sofa"]


def test_absent_are_names_that_the_teacher_is_sure_not_to_see():
    assert taught({}, best=(0.01, 0.04, 0.0, 0.2))["neg_names"] == ["apple", "car"]
    # "couch" is what the annotated "sofa" means, and "apple" may name the annotated "fresh apple".
    assert taught({"names": ["fresh apple"]})["neg_names"] == ["car", "couch", "dog"]


def test_known_absent_names_stay_unless_the_teacher_sees_them():
    result = taught({"neg_names": ["hammer", "dent"]}, best=(0.5, 0.5, 0.5, 0.5))
    assert result["neg_names"] == ["hammer", "dent"]
    seen = taught({"neg_names": ["dog", "dent"]}, best=(0.5, 0.5, 0.5, 0.9), boxes=[(3, 0.9, 0.6, 0.5, 0.9, 1.0)])
    assert (seen["names"], seen["neg_names"]) == (["sofa", "dog"], ["dent"])


def test_rows_without_boxes_can_be_taught():
    result = taught({"boxes": [], "names": [], "crowd": []}, best=(0, 0.9, 0, 0), boxes=[(1, 0.9, 0, 0, 0.5, 0.5)])
    np.testing.assert_allclose(result["boxes"], [[0, 0, 100, 50]])
    assert (result["names"], result["neg_names"]) == (["car"], ["apple", "couch", "dog"])


def test_mixed_rows_are_everyday_ones_then_wild_ones():
    everyday = [{"names": ["dog", "dog"], "boxes": [[0, 0, 1, 1]] * 2}]
    rows = MixedRows(everyday, [ROW], [{"best": [0.0] * 4, "boxes": []}], CLASSES, WORDINGS)
    assert len(rows) == 2
    assert rows[0]["neg_names"] == ["apple", "car", "couch"]
    assert rows[1]["names"] == ["sofa"]


def test_weights_give_each_set_its_share_and_rare_names_more():
    everyday, wild = [["dog"]] * 9 + [["car"]], [["hammer"]] * 5
    weights = mixed_weights(everyday, wild, wild_share=0.4, rare=0.4)
    assert sum(weights) == pytest.approx(15)
    assert sum(weights[10:]) == pytest.approx(0.4 * 15)
    # "car" is on a tenth of the images, so its factor is sqrt(0.4 / 0.1).
    assert weights[9] / weights[0] == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"0\.\.1, got 1\.5"):
        mixed_weights(everyday, wild, wild_share=1.5, rare=0.4)


class Looker:
    """A backbone and a teacher that know the colour of a picture: class 0 is red, with one box."""

    def __call__(self, pixels):
        return SimpleNamespace(feature_maps=(pixels,))

    @staticmethod
    def teach(maps):
        red = (maps[0][:, 0].mean(dim=(1, 2)) > maps[0][:, 2].mean(dim=(1, 2))).float()
        scores = torch.stack((0.9 * red, torch.full_like(red, 0.02)), dim=-1)
        # Two cells see the same object.
        scores = torch.stack((scores, 0.8 * scores), dim=1)
        return scores, torch.tensor([0.5, 0.5, 0.5, 0.25]).repeat(len(red), 2, 1)


@pytest.fixture
def pictures():
    return [{"image": Image.new("RGB", (40, 20), colour)} for colour in ("red", "blue")]


def test_look_keeps_the_best_score_of_each_class_and_sure_boxes(pictures):
    looker = Looker()
    red, blue = look(pictures, looker, looker.teach, GDinoImageProcessor(size={"height": 8, "width": 8}))
    later = look(pictures, looker, looker.teach, GDinoImageProcessor(size={"height": 8, "width": 8}), first=1)
    assert list(later) == [blue]
    assert red == {"best": [0.9, 0.02], "boxes": [[0, 0.9, 0.25, 0.375, 0.75, 0.625]]}
    assert blue == {"best": [0.0, 0.02], "boxes": []}


def test_looking_once_is_enough(tmp_path, pictures):
    looker, path = Looker(), tmp_path / "seen.json"
    processor = GDinoImageProcessor(size={"height": 8, "width": 8})
    first = look_once(path, "two pictures", 2, lambda first: look(pictures, looker, looker.teach, processor, first))
    assert json.loads(path.read_text())["found"] == first
    assert len(first) == 2
    assert look_once(path, "two pictures", 2, lambda first: pytest.fail("looked again")) == first
    with pytest.raises(ValueError, match=r"seen\.json is about other photographs or was made with other settings"):
        look_once(path, "two others", 2, lambda first: pytest.fail("looked again"))
    path.write_text(json.dumps(first))
    with pytest.raises(ValueError, match="delete it"):
        look_once(path, "two pictures", 2, lambda first: pytest.fail("looked again"))


def test_an_interrupted_look_goes_on_where_it_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_data, "WRITE_EVERY", 2)
    path, begun = tmp_path / "seen.json", []

    def broken(first):
        begun.append(first)
        yield from ({"photograph": index} for index in range(first, first + 3))
        raise KeyboardInterrupt

    def whole(first):
        begun.append(first)
        return [{"photograph": index} for index in range(first, 7)]

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            look_once(path, "seven", 7, broken)
    found = look_once(path, "seven", 7, whole)
    assert found == [{"photograph": index} for index in range(7)]
    # Each time three were found, and two of them written.
    assert begun == [0, 2, 4]
    assert json.loads(path.read_text())["found"] == found
    with pytest.raises(ValueError, match=r"seen\.json has 7 photographs, but 8 are to be looked at; delete it"):
        look_once(path, "seven", 8, lambda first: [])


def test_the_digest_of_weights_tells_modules_apart():
    torch.manual_seed(0)
    first, other = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    assert weights_digest(first, torch.nn.Identity()) == weights_digest(other)
    other.running_mean[1] = 1e-6
    assert weights_digest(first) != weights_digest(other)
    assert weights_digest(first, other) != weights_digest(other, first)


def test_rows_that_are_drawn_more_often_leave_the_share_of_their_set_as_it_is():
    everyday, wild = [["dog"], ["car"]], [["dent"], ["dent"], ["dent"]]
    weights = mixed_weights(everyday, wild, 0.4, rare=0.0, factors=[1.0, 3.0, 2.0, 2.0, 2.0])
    assert weights == pytest.approx([0.75, 2.25, 2 / 3, 2 / 3, 2 / 3])


def test_held_out_rows_are_never_drawn_and_the_share_stays():
    everyday, wild = [["dog"], ["car"], ["dog"], ["car"], ["dog"]], [["dent"], ["dent"]]
    weights = mixed_weights(everyday, wild, 0.4, rare=0.0, hold_out=2)
    assert [index for index, weight in enumerate(weights) if weight == 0] == [0, 2, 4]
    assert list(held_out(5, 2)) == [0, 2, 4]
    assert list(held_out(5, 0)) == []
    assert sum(weights[:5]) == pytest.approx(0.6 * 7)
    assert sum(weights[5:]) == pytest.approx(0.4 * 7)


def test_names_left_out_have_no_boxes_and_are_never_absent_either():
    row = {
        **ROW,
        "names": ["sofa", "dog", "car"],
        "boxes": [[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]],
        "crowd": [False, True, False],
        "neg_names": ["apple", "couch", "hammer"],
    }
    rows = WithoutNames([row], ["couch", "car"], WORDINGS)
    assert len(rows) == 1
    left = rows[0]
    # A sofa is a couch.
    assert (left["names"], left["crowd"], left["neg_names"]) == (["dog"], [True], ["apple", "hammer"])
    np.testing.assert_array_equal(left["boxes"], [[0, 0, 2, 2]])
    assert left["width"] == 200
