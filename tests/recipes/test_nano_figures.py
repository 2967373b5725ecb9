"""What a gdino-nano promises: the figures, each measured once."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.detection.detections import Detections
from gdino_hf.model.processing_gdino import GDinoProcessor
from gdino_hf.recipes import nano, nano_figures
from gdino_hf.recipes.nano_figures import (
    mean_of_names,
    measure,
    other_wordings,
    rate_absent,
    rate_photographs,
    rate_threshold,
    rate_wordings,
)
from gdino_hf.recipes.nano_rating import load_checkpoint, rate


def loaded(folder):
    return load_checkpoint(folder), GDinoProcessor.from_pretrained(folder)


BOX = [0.0, 0.0, 10.0, 10.0]


class Knowing:
    """A detector that finds given boxes of the names that it knows, each in every picture."""

    def __init__(self, boxes):
        self.boxes = boxes

    def __call__(self, image, names, **options):
        known = [(score, box, place) for place, name in enumerate(names) for score, box in self.boxes.get(name, ())]
        known.sort(key=lambda entry: -entry[0])
        return Detections(
            boxes=np.array([box for _, box, _ in known]).reshape(-1, 4),
            scores=np.array([score for score, _, _ in known]),
            labels=np.array([place for _, _, place in known], dtype=np.int64),
            names=tuple(names),
            size=(100, 100),
        )

    def stream(self, images, names, **options):
        return ((image, self(image, names, **options)) for image in images)


def row(*names, boxes=None):
    return {
        "image": Image.new("RGB", (100, 100)),
        "names": list(names),
        "boxes": [BOX] * len(names) if boxes is None else boxes,
        "crowd": [False] * len(names),
    }


def test_precision_and_recall_count_all_boxes_of_all_names():
    detector = Knowing({"cat": [(0.9, BOX), (0.2, [50, 50, 60, 60])], "dog": [(0.5, [20, 20, 30, 30])]})
    rated = rate_threshold(detector, [row("cat", "dog")], ["cat", "dog"])
    assert rated["as it is"] == {"precision": 0.5, "recall": 0.5}


def test_absent_names_are_asked_and_their_boxes_counted():
    names = ["cat", "dog", "cup"]
    detector = Knowing({"dog": [(0.9, BOX)], "cup": [(0.9, BOX), (0.8, BOX)]})
    # Of the first picture both absent names have boxes, of the second only one is absent.
    rated = rate_absent(detector, [row("cat"), row("cat", "cup")], names)
    assert rated == {"boxes per photograph": 2.0}


def test_photographs_tell_score_overlap_and_false_boxes(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "cat.jpg")
    picture = {"id": 1, "file_name": "cat.jpg", "width": 100, "height": 100}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
    spoon = {**box, "id": 2, "category_id": 2}
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "spoon"}]
    content = {"images": [picture], "annotations": [box, spoon], "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    detector = Knowing(
        {"cat": [(0.6, [0, 0, 10, 8]), (0.4, [50, 50, 60, 60])], "dog": [(0.5, BOX)], "tree": [(0.2, BOX)]}
    )
    assert rate_photographs(detector, tmp_path) == {"cat": {"score": 0.6, "IoU": 0.8, "false": 2}}
    # The best box tells its score below the default threshold too.
    assert rate_photographs(Knowing({"cat": [(0.1, BOX)]}), tmp_path) == {"cat": {"score": 0.1, "IoU": 1.0, "false": 0}}
    assert rate_photographs(Knowing({}), tmp_path) == {"cat": {"score": 0.0, "IoU": 0.0, "false": 0}}


def test_mean_of_names_that_were_left_out_and_of_the_others():
    by_name = {"cat": 0.1, "dog": 0.3, "cup": 0.8}
    assert mean_of_names(by_name, ["cat", "dog"]) == {"these names": 0.2, "other names": 0.8}
    with pytest.raises(ValueError, match="'horse' has no box"):
        mean_of_names(by_name, ["cat", "horse"])


def test_wordings_of_a_name():
    assert other_wordings("cat") == {"article": "a cat", "plural": "cats", "synonym": "kitty"}
    assert other_wordings("umbrella") == {"article": "an umbrella", "plural": "umbrellas"}
    assert other_wordings("broccoli") == {}


def test_boxes_are_found_again_under_another_wording():
    far = [50.0, 50.0, 60.0, 60.0]
    detector = Knowing({"cat": [(0.9, BOX), (0.8, far)], "a cat": [(0.9, BOX)], "cats": [(0.9, far), (0.8, BOX)]})
    rated = rate_wordings(detector, [row("cat"), row()], ["cat", "dog"])
    assert rated == {
        "article": {"found again": 0.5, "boxes": 2},
        "plural": {"found again": 1.0, "boxes": 2},
        "synonym": {"found again": 0.0, "boxes": 2},
    }


def test_what_is_measured_is_not_measured_again(tmp_path):
    path, calls = tmp_path / "figures.json", []

    def task(title):
        return lambda: calls.append(title) or {"value": len(calls)}

    def broken():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        measure(path, "abc", {"first": task("first"), "second": broken})
    content = measure(path, "abc", {"first": task("first"), "second": task("second")})
    assert calls == ["first", "second"]
    assert content == {"weights": "abc", "first": {"value": 1}, "second": {"value": 2}}
    with pytest.raises(ValueError, match="another model"):
        measure(path, "xyz", {})


def test_the_command_measures_everything(parts, example_folder, tmp_path, capsys):
    torch.manual_seed(0)
    nano.export(*nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64), tmp_path / "model")
    command = [str(tmp_path / "model"), "--processor", str(tmp_path / "model"), "--photographs", str(example_folder)]
    sets = ["--everyday", str(parts / "data"), "--wild", str(parts / "wild")]
    nano_figures.main([*command, *sets, "--output", str(tmp_path / "figures.json"), "--names", "blue"])
    printed = json.loads(capsys.readouterr().out)
    by_name = printed["average_precision"].pop("AP50 by name")
    assert printed.pop("AP50") == {
        f"{which} names": by_name["everyday/val"][n] for which, n in (("these", "blue"), ("other", "red"))
    }
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["average_precision"].pop("AP50 by name") == by_name
    assert printed == written
    rated = rate(*loaded(tmp_path / "model"), {"everyday/val": parts / "data" / "val.json"})
    assert printed["average_precision"]["everyday/val"] == rated["everyday/val"]
    assert printed["average_precision"].keys() == {
        f"{title}{way}" for title in ("everyday/val", "wild/val") for way in ("", ", every box")
    }
    assert printed["photographs"].keys() == {"cat", "person", "cup"}
    assert {"threshold", "absent", "wordings"} <= printed.keys()
