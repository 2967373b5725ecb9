"""The walk of docs/walk.md as one program: what it writes, and that its model beats the one it began with."""

import json
import re

import pytest

pytest.importorskip("faster_coco_eval")

from PIL import Image

from example_scripts import ROOT, load_example
from gdino_hf.data.formats import open_dataset

# AP differs between machines and versions of libraries by a few hundredths.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def program():
    """The script as a module."""
    return load_example("label_look_train_use")


@pytest.mark.slow
def test_all_steps_run_on_a_few_pictures(program, tmp_path, capsys):
    walk = program.main(["--quick", "--out", str(tmp_path / "walk"), "--train=--use_cpu --disable_tqdm true"])
    printed = capsys.readouterr().out
    assert "2 pictures reviewed; boxes: " in printed
    export = json.loads((walk.folder / "reviewed.json").read_text())
    assert [len(task["annotations"]) for task in export] == [1, 1, 0, 0, 0, 0]
    # What comes back of the person's corrections is the truth, to a hundredth of a pixel.
    reviewed, names = open_dataset(walk.folder / "reviewed.json", walk.pictures)
    truth, _ = open_dataset(walk.truth)
    assert set(names) <= set(program.NAMES)
    for row, other in zip(reviewed, truth, strict=False):
        assert row["names"] == other["names"]
        for box, true in zip(row["boxes"], other["boxes"], strict=True):
            assert box == pytest.approx(true, abs=0.01)
    with Image.open(walk.folder / "sheet.jpg") as sheet:
        assert sheet.width > 500
    split = walk.folder / "labels-2" / "split" / "coco"
    assert sorted(path.name for path in split.iterdir()) == ["test", "train", "valid"]
    assert json.loads((walk.folder / "found" / "detections.json").read_text())["images"]
    assert set(walk.figures()) == {"before", "after"}


def test_what_a_person_does_is_counted(program):
    names = ("cat", "dog")

    def boxes(*given):
        corners, labels = [box for box, _ in given], [label for _, label in given]
        return program.Detections(corners, [0.9] * len(given), labels, names, (200, 100))

    true = boxes(([0, 0, 40, 40], 0), ([50, 0, 90, 40], 1), ([100, 0, 140, 40], 0), ([150, 0, 190, 40], 1))
    found = boxes(([0, 0, 40, 39], 0), ([50, 0, 90, 40], 0), ([100, 0, 130, 40], 0), ([0, 60, 30, 90], 1))
    work = dict.fromkeys(("kept", "renamed", "moved", "drawn", "deleted"), 0)
    program.count_work(found, true, work)
    assert work == {"kept": 1, "renamed": 1, "moved": 1, "drawn": 1, "deleted": 1}


@pytest.mark.training
def test_the_model_of_the_walk_beats_the_one_it_began_with(program, tmp_path):
    figures = program.main(["--out", str(tmp_path / "walk")]).figures()
    page = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    stated = {
        name: float(re.search(rf"^\| {title} \| ([\d.]+) \|", page, re.MULTILINE)[1])
        for name, title in (("before", "gdino-nano"), ("after", "trained on 40 corrected pictures"))
    }
    assert figures["after"] > figures["before"] + 0.5
    assert figures == pytest.approx(stated, abs=TOLERANCE)
