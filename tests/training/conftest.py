"""Small generated data sets, and options for a short training on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


def draw_split(folder: Path, split: str, count: int, seed: int = 0) -> Path:
    """Write a COCO file of grey images, each with a red square named cat and a blue square named dog."""
    rng = random.Random(f"{split} {seed}")
    names = list(COLOURS)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(names)]}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
        for number, name in enumerate(names):
            # One square in each half, so that neither covers the other.
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
    """Data set folder with 12 training and 4 validation images, fresh for each test."""
    draw_split(tmp_path / "drawn", "train", 12)
    draw_split(tmp_path / "drawn", "val", 4)
    return tmp_path / "drawn"


@pytest.fixture
def options(drawn, tiny_folder, tmp_path) -> list[str]:
    """Arguments of `gdino train` for a short training."""
    return [
        *("train", str(drawn), "--model", str(tiny_folder), "--runs", str(tmp_path / "runs"), "--use_cpu"),
        *("--batch-size", "4", "--learning-rate", "1e-3", "--logging_steps", "1", "--disable_tqdm", "true"),
    ]


@pytest.fixture
def one_thread():
    """Run torch on one thread, so that sums do not depend on the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
