"""The contact sheet of a run: which pictures are on it, its size, and what it says if there are none."""

import pytest
from PIL import Image

from gdino_hf.labeling.contact_sheet import contact_sheet
from label_command import label_all, make_pictures


@pytest.fixture(scope="module")
def run(label_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    label_all(label_model, make_pictures(root / "photos", 12), root / "out")
    return root / "out"


@pytest.mark.parametrize(("number", "columns", "shown", "size"), [(5, 3, 5, (744, 498)), (50, 4, 12, (990, 744))])
def test_pictures_with_finds_are_drawn(run, tmp_path, number, columns, shown, size):
    assert contact_sheet(run, tmp_path / "sheet.png", number, columns) == shown
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == size
        # Pictures and boxes of several colours, no white sheet.
        assert len(sheet.convert("RGB").getcolors(2**20)) > 100


def test_a_picture_that_is_gone_is_passed_over(run, tmp_path):
    gone = sorted((run.parent / "photos").rglob("*.*"))[0]
    content = gone.read_bytes()
    gone.unlink()
    try:
        assert contact_sheet(run, tmp_path / "sheet.png", 12) == 11
    finally:
        gone.write_bytes(content)


def test_a_run_without_finds_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no picture with a find; lower the threshold"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="number is 0 and columns is 6"):
        contact_sheet(tmp_path, tmp_path / "sheet.png", 0)
