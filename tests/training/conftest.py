"""Small data sets drawn on the spot, and the options that make a training of them short."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


def draw_split(folder: Path, split: str, count: int, seed: int = 0) -> Path:
    """A COCO file of grey pictures, each with a red square called cat and a blue one called dog."""
    rng = random.Random(f"{split} {seed}")
    names = list(COLOURS)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(names)]}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
        for number, name in enumerate(names):
            # One in each half, so that neither hides the other.
            x, y = rng.randrange(8) + 32 * number, rng.randrange(40)
            pixels[y : y + 24, x : x + 24] = COLOURS[name]
            content["annotations"].append(
                {
                    "id": 2 * index + number + 1,
                    "image_id": index,
                    "category_id": number,
                    "bbox": [x, y, 24, 24],
                    "area": 576,
                    "iscrowd": 0,
                }
            )
        file_name = f"{split}{index}.png"
        Image.fromarray(pixels).save(folder / "images" / file_name)
        content["images"].append({"id": index, "file_name": file_name, "width": 64, "height": 64})
    path = folder / f"{split}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def drawn(tmp_path) -> Path:
    """A data set folder of its own: 12 pictures to learn from, 4 to measure on."""
    draw_split(tmp_path / "drawn", "train", 12)
    draw_split(tmp_path / "drawn", "val", 4)
    return tmp_path / "drawn"


@pytest.fixture
def options(drawn, tiny_folder, tmp_path) -> list[str]:
    """The command line of a short training on one thread."""
    return [
        *("train", str(drawn), "--model", str(tiny_folder), "--runs", str(tmp_path / "runs"), "--use_cpu"),
        *("--batch-size", "4", "--learning-rate", "1e-3", "--logging_steps", "1", "--disable_tqdm", "true"),
    ]


@pytest.fixture
def one_thread():
    """Sums in one order, whatever the machine's cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
