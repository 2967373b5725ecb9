"""Annotation files that are damaged or hold something else are named with the reason, never passed over."""

import json

import pytest
from PIL import Image

from gdino_hf.cli import main
from gdino_hf.data.annotation_files import annotation_file, find_split
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.formats import open_dataset

BROKEN = {
    "": "it is empty",
    "{": "it is not valid json",
    "<html>404</html>": "it is not valid json",
    "version https://git-lfs.github.com/spec/v1": "it is not valid json",
    "[" * 10**5: "nested too deeply|not valid json",
    '{"licenses": []}': "it is neither COCO json .* nor ODVG json lines",
    "[1, 2]": "it is neither COCO json .* nor ODVG json lines",
}


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("place", ["train.json", "things.json", "train/_annotations.coco.json", "annotations/a.json"])
@pytest.mark.parametrize("read", [check_dataset, open_dataset, annotation_file])
def test_a_folder_with_only_a_broken_file_names_it(tmp_path, content, place, read):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"(?s)holds no annotations.*{BROKEN[content]}") as caught:
        read(tmp_path)
    assert path.name in str(caught.value)
    with pytest.raises(ValueError, match=BROKEN[content]):
        read(path) if read != annotation_file else check_dataset(path)


def test_a_broken_lines_file_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("{\n{}")
    with pytest.raises(ValueError, match=r"train\.jsonl( holds no annotations)?: it is not valid json"):
        check_dataset(tmp_path)


@pytest.fixture
def data(tmp_path):
    """A data set with a usable train split."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.effect_noise((64, 48), 90).convert("RGB").save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["val.json", "valid.json", "instances_val2017.json", "valid/_annotations.coco.json"])
def test_a_broken_validation_file_is_said_to_be_unused(data, tmp_path, tiny_folder, capsys, name):
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_text("{")
    with pytest.raises(ValueError, match="holds no annotations: it is not valid json"):
        find_split(data, "val")
    assert check_dataset(data).findings == []
    options = ["--model", str(tiny_folder), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(data), *options, "--max-steps", "1", "--use_cpu"]) == 0
    said = capsys.readouterr().err
    assert "The val split is not used, because " in said or "found as the val split and is not used" in said
    assert (data / name).name in said
    # Evaluating the training split instead would pass the broken one over.
    assert main(["eval", str(data), *options]) == 2
    assert (data / name).name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "val_config.json", "predictions_val.json", "package.json"])
def test_other_files_are_no_matter(data, name):
    (data / name).write_text(json.dumps({"a": 1}))
    assert find_split(data, "val") is None
    assert annotation_file(data, "val", "test", "train") == data / "train.json"
