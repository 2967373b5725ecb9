"""Tests of albumentations pipelines in place of the package's own augmentation."""

import random

import numpy as np
import pytest
from PIL import Image

from gdino_hf.data.albumentations_pipeline import AlbumentationsPipeline, load_pipeline
from gdino_hf.data.collator import GDinoDataCollator
from gdino_hf.training.arguments import DataArguments

albumentations = pytest.importorskip("albumentations")

BOXES = [[4, 6, 20, 30], [40, 10, 60, 44]]


def example(**more):
    """Return an image with its left half red, and a box in each half."""
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[:, :32, 0] = 255
    row = {"image": Image.fromarray(pixels), "boxes": BOXES, "names": ["cat", "dog"], "crowd": [False, False]}
    return {**row, **more}


def compose(transforms, form="pascal_voc", fields=None, **options):
    params = albumentations.BboxParams(form, label_fields=fields, **options)
    return albumentations.Compose(transforms, bbox_params=params)


@pytest.mark.parametrize("fields", [None, ["class_labels"], ["labels", "ids"]])
@pytest.mark.parametrize("form", ["pascal_voc", "coco", "yolo", "albumentations"])
def test_boxes_follow_the_image_in_every_format(form, fields):
    pipeline = AlbumentationsPipeline(compose([albumentations.HorizontalFlip(p=1)], form, fields))
    result = pipeline(example(), random.Random(0))
    assert result["boxes"] == pytest.approx(np.array([[44, 6, 60, 30], [4, 10, 24, 44]]), abs=1e-3)
    assert result["image"].getpixel((60, 5)) == (255, 0, 0)
    assert result["names"] == ["cat", "dog"]


def test_a_dropped_box_takes_its_name_and_spans_with_it():
    crop = albumentations.Crop(x_min=32, y_min=0, x_max=64, y_max=48)
    pipeline = AlbumentationsPipeline(compose([crop], fields=["labels"], min_visibility=0.5))
    given = example(spans=[[[0, 3]], [[4, 7]]], caption="cat dog")
    result = pipeline(given, random.Random(0))
    assert result["boxes"].tolist() == [[8, 10, 28, 44]]
    assert (result["names"], result["spans"], result["crowd"]) == (["dog"], [[[4, 7]]], [False])
    assert result["image"].size == (32, 48)


def test_images_without_boxes_pass():
    pipeline = AlbumentationsPipeline(compose([albumentations.HorizontalFlip(p=1)]))
    result = pipeline(example(boxes=[], names=[], crowd=[]), random.Random(0))
    assert result["boxes"].shape == (0, 4)


def test_the_same_seed_draws_the_same():
    transforms = [albumentations.RandomCrop(24, 24), albumentations.HorizontalFlip(p=0.5)]
    pipeline = AlbumentationsPipeline(compose(transforms))
    drawn = [np.asarray(pipeline(example(), random.Random(seed))["image"]).tobytes() for seed in (1, 2, 3, 1)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) > 1


def test_a_pipeline_that_would_leave_boxes_behind_is_refused():
    with pytest.raises(ValueError, match="no bbox_params"):
        AlbumentationsPipeline(albumentations.Compose([albumentations.HorizontalFlip()]))


def test_a_pipeline_that_normalizes_is_refused_when_it_runs():
    pipeline = AlbumentationsPipeline(compose([albumentations.Normalize()]))
    with pytest.raises(ValueError, match="leave out Normalize"):
        pipeline(example(), random.Random(0))


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_saved_pipeline_is_loaded_for_the_command(form, tmp_path, tiny_processor):
    file = tmp_path / f"pipeline.{form}"
    albumentations.save(compose([albumentations.HorizontalFlip(p=1)]), file, data_format=form)
    collator = GDinoDataCollator(tiny_processor, labels=["cat", "dog"], transform=load_pipeline(file))
    batch = collator([example()])
    centers = batch["labels"][0]["boxes"][:, 0].tolist()
    assert centers == pytest.approx([52 / 64, 14 / 64], abs=1e-3)
    assert DataArguments(data="x", albumentations=str(file)).albumentations == str(file)


def test_a_file_that_is_no_pipeline_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as an albumentations pipeline") as caught:
        load_pipeline(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
