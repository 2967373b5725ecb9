"""The data set of `--push-to-hub`: readers of the Hub's data sets see the pictures and boxes, and a card says how."""

import json

import numpy as np
import pytest
from PIL import Image

from label_command import make_pictures, rows

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, one of them damaged and one in a format that browsers do not show."""
    folder = make_pictures(tmp_path / "photos", 9)
    Image.new("RGB", (70, 50), "red").save(folder / "z.ppm")
    (folder / "00003.png").write_bytes(b"no picture")
    return folder


def test_the_uploaded_set_has_pictures_boxes_and_a_card(label, folder, tmp_path, hub):
    status, printed, said = label(folder, "--push-to-hub", "me/pets")
    assert status == 1
    assert hub.repositories == ["pets"], said
    assert set(hub.files) == {"README.md", "data/train-00000.parquet"}
    assert "data set: " in printed
    (tmp_path / "data.parquet").write_bytes(hub.files["data/train-00000.parquet"])
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    category = loaded.features["objects"]["category"].feature
    assert category.names == ["cat", "remote control", "dog"]
    found = [row for row in rows(tmp_path / "out") if row["error"] is None]
    assert len(loaded) == len(found) == 9
    for row, expected in zip(loaded, found, strict=True):
        assert row["image"].size == (row["width"], row["height"]) == (expected["width"], expected["height"])
        corners = np.array(expected["boxes"]).reshape(-1, 4)
        sizes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        assert np.allclose(np.array(row["objects"]["bbox"]).reshape(-1, 4), sizes, atol=0.01)
        assert row["objects"]["category"] == expected["labels"]
    card = hub.files["README.md"].decode()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert card.startswith("---\ntask_categories:\n- object-detection\n")
    assert f"# 9 pictures with {manifest['boxes']:,} boxes" in card
    assert manifest["settings"]["fingerprint"] in card
    assert "threshold: `0.005`" in card
    # The folder as it was uploaded: the card names the files of its split, as the viewer reads them.
    whole = datasets.load_dataset(str(tmp_path / "out" / "hub"), cache_dir=str(tmp_path / "cache-of-folder"))
    assert list(whole) == ["train"]
    assert isinstance(whole["train"].features["image"], datasets.Image)
    assert whole["train"].column_names == ["image", "image_id", "width", "height", "objects"]
    assert np.array_equal(np.asarray(whole["train"][0]["image"]), np.asarray(loaded[0]["image"]))


def test_a_refused_upload_keeps_the_set_and_says_so(label, folder, tmp_path, hub):
    hub.forbidden = True
    status, _, said = label(folder, "--push-to-hub", "me/pets")
    assert status == 1
    assert "me/pets cannot be uploaded" in said
    assert "the same command tries again" in said
    assert (tmp_path / "out" / "hub" / "data" / "train-00000.parquet").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--push-to-hub", "a b/c"], "--push-to-hub: "), (["--private"], "--private is for --push-to-hub; give both")],
)
def test_ids_that_the_hub_refuses_are_refused_before_the_work(label, folder, tmp_path, options, message):
    status, _, said = label(folder, *options)
    assert status == 2
    assert message in said
    assert not (tmp_path / "out").exists()
