"""Tiny pretrained parts and data sets of coloured squares for the recipes' tests."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gdino_hf.recipes.closed_set_teacher import DETECTOR_FILE

NAMES = ["red", "blue"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 220, 30)}


def write_pictures(folder, counts, names, source=None):
    """Write a COCO data set of one square per picture, whose name is its colour.

    Pictures of a source say that the other names are absent, and the file lists the names of the source.
    """
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for split, count in counts.items():
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(names)]}
        if source is not None:
            content["info"] = {"set_names": {source: names}}
        for index in range(count):
            name, x, y = names[index % 2], rng.randrange(40), rng.randrange(40)
            pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
            pixels[y : y + 24, x : x + 24] = COLOURS[name]
            file_name = f"{split}{index}.png"
            Image.fromarray(pixels).save(folder / "images" / file_name)
            picture = {"id": index, "file_name": file_name, "width": 64, "height": 64}
            if source is not None:
                picture |= {"source": source, "neg_names": [other for other in names if other != name]}
            content["images"].append(picture)
            content["annotations"].append(
                {
                    "id": index + 1,
                    "image_id": index,
                    "category_id": names.index(name),
                    "bbox": [x, y, 24, 24],
                    "area": 576,
                    "iscrowd": 0,
                }
            )
        (folder / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def parts(tmp_path_factory, tiny_tokenizer):
    """Folders of a tiny backbone, a tiny text encoder, and two data sets: "data", and "wild" with absent names."""
    from transformers import BertConfig, BertModel

    from gdino_hf.model.csp_pan import CspPanBackbone, CspPanConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    shape = {"stem_width": 8, "stage_widths": [8, 8, 8, 8], "stage_depths": [1, 1, 1, 1], "pan_width": 8}
    CspPanBackbone(CspPanConfig(**shape, head_features=True)).save_pretrained(folder / "backbone")
    rows = len(NAMES) + 4 * 3
    detector = {f"p{level}.weight": torch.randn(rows, 8) for level in (3, 4, 5)}
    detector |= {f"p{level}.bias": torch.zeros(rows) for level in (3, 4, 5)}
    save_file(detector, folder / "backbone" / DETECTOR_FILE, {"num_classes": str(len(NAMES))})
    text_config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    BertModel(text_config).save_pretrained(folder / "text")
    tiny_tokenizer.save_pretrained(folder / "text")
    write_pictures(folder / "data", {"train": 12, "val": 4}, NAMES)
    write_pictures(folder / "wild", {"train": 6, "val": 2}, ["green", "blue"], source="paint")
    return folder


@pytest.fixture(scope="session")
def start(parts, tmp_path_factory):
    """Folder of a model to start from, built around the tiny parts."""
    from gdino_hf.recipes import nano

    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    nano.export(*nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64), folder)
    return folder
