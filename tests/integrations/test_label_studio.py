"""The function of docs/integrations.md answers Label Studio's tasks with predictions as its server takes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import gdino_hf

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


@pytest.fixture(scope="module")
def names(example_folder):
    """Names that the page's block defines."""
    section = PAGE.read_text(encoding="utf-8").partition("## Label Studio")[2]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    namespace: dict = {}
    exec(block.replace("demo/examples", str(example_folder)), namespace)
    return namespace


def test_predictions_are_percentages_of_the_picture(names, example_folder):
    paths = [str(example_folder / name) for name in ("cat.jpg", "cup.jpg")]
    predictions = names["predict"]([{"id": i, "data": {"image": path}} for i, path in enumerate(paths)], ["cat", "cup"])
    detector = gdino_hf.Detector("nano")
    # The server takes JSON.
    for prediction, path in zip(json.loads(json.dumps(predictions)), paths, strict=True):
        found = detector(path, ["cat", "cup"], threshold=0.2)
        assert len(prediction["result"]) == len(found) > 0
        assert prediction["score"] == pytest.approx(found.scores.mean(), abs=1e-5)
        for region, each in zip(prediction["result"], found, strict=True):
            assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "rectanglelabels")
            assert (region["original_width"], region["original_height"]) == found.size
            value = region["value"]
            assert value["rectanglelabels"] == [each.text_label]
            assert 0 <= value["x"] < value["x"] + value["width"] <= 100.001
            assert 0 <= value["y"] < value["y"] + value["height"] <= 100.001
            width, height = found.size
            x, y = value["x"] / 100 * width, value["y"] / 100 * height
            right, bottom = x + value["width"] / 100 * width, y + value["height"] / 100 * height
            assert [x, y, right, bottom] == pytest.approx(each.box, abs=0.5)


def test_pictures_without_finds_get_an_empty_prediction(names, learned_picture):
    (prediction,) = names["predict"]([{"id": 1, "data": {"image": str(learned_picture)}}], ["lion"])
    assert prediction["result"] == [] or all(region["score"] > 0.2 for region in prediction["result"])
    assert isinstance(float(prediction["score"]), float)
