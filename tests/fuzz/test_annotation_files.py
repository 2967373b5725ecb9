"""Seeded mutations of annotation files: whatever is in them, reading ends in rows or in one sentence.

`pytest -m fuzz tests/fuzz` reads all 300 files; without it, a few of each kind are read.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import resource
import time

import pytest
from PIL import Image

from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.open_ground_truth import open_ground_truth
from gdino_hf.training.arguments import DataArguments
from gdino_hf.training.fine_tuning import read_data

FILES, FEW = 300, 9
SECONDS, BYTES = 10.0, 2**30

NAMES = ("cat", "dog", "cup")
ODD = [
    *(None, True, -1, 0, 3, 1.5, 10**30, 10**400, -(2**63), float("nan"), float("inf"), "", " ", "7", "1e400", "nan"),
    *(
        "\ud800",
        "x\0y",
        "../" * 400,
        "/etc/passwd",
        "..\\..\\a.png",
        "http://a/b.png",
        "\x1b[2J\u202e",
        "安全帽",
        "=1+1",
    ),
    *([], {}, [[]], [None], [0, 0, 1, 1], [1, float("nan"), 2, 3], ["1", "2", "3", "4"], [[1, 1, 2, 2]], [1] * 5000),
    *(
        {"a": 1},
        {"size": [30, 40], "counts": [1200]},
        {"size": [10**9, 10**9], "counts": "0"},
        {"size": 3, "counts": 3},
    ),
    *({"size": [30, 40], "counts": "PPPPPPPPPPPPPPPPPPPP"}, [[1, 2, 3]], [["a", "b"]], "instances"),
]


def coco(rng):
    """Return the content of a whole COCO file of six pictures."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(6)]
    categories = [{"id": n, "name": name, "supercategory": "thing"} for n, name in enumerate(NAMES)]
    boxes = []
    for number in range(12):
        x, y = rng.randrange(20), rng.randrange(15)
        box = {"id": number, "image_id": number % 6, "category_id": number % 3, "bbox": [x, y, 12, 9], "area": 108}
        boxes.append(box | {"iscrowd": 0, "segmentation": [[x, y, x + 12, y, x + 12, y + 9]]})
    return {"info": {}, "images": images, "categories": categories, "annotations": boxes}


def odvg(rng, captions):
    """Return the lines of a whole ODVG file of six pictures, of names or of captions."""
    lines = []
    for number in range(6):
        x, y = rng.randrange(20), rng.randrange(15)
        box, line = [x, y, x + 12, y + 9], {"filename": f"{number}.png", "width": 40, "height": 30}
        if captions:
            region = {"bbox": box, "phrase": "a cat", "tokens_positive": [[0, 5]]}
            line["grounding"] = {"caption": "a cat and a dog", "regions": [region, {"bbox": box, "phrase": "a dog"}]}
        else:
            line["detection"] = {"instances": [{"bbox": box, "label": number % 3, "category": NAMES[number % 3]}]}
        lines.append(line)
    return lines


def places(value, path=()):
    """Yield the path of every value inside a nested one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def spoil(content, rng):
    """Change one to four values: replace, remove, repeat or wrap them, or give them another's."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 4)):
        every = list(places(content))
        if not every:
            break
        *inner, key = rng.choice(every)
        parent = content
        for step in inner:
            parent = parent[step]
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2:
            parent[key] = [parent[key]]
        elif kind == 3 and isinstance(parent[key], (int, float)):
            parent[key] = str(parent[key])
        elif kind == 4:
            parent[key] = copy.deepcopy(rng.choice(list(parent.values()) if isinstance(parent, dict) else parent))
        else:
            parent[key] = rng.choice(ODD)
    return content


def spoil_bytes(data, rng):
    """Cut, overwrite, repeat or nest the bytes of a file."""
    place = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(8) + data[place + 8 :]
    if kind == 2:
        return data + data
    if kind == 3:
        return b"[" * 100_000 + data
    if kind == 4:
        return data[:place] + b'{"a":' * 50_000 + data[place:]
    return data.replace(b'"bbox"', b'"bbox" ').replace(b"1", rng.choice([b"1e999", b"-", b"01", b"1_0"]), 3)


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes())
    return tmp_path


def outcome(call):
    """Return a call's result, or None and the sentence of its ValueError."""
    try:
        return call(), None
    except ValueError as error:
        return None, str(error)


def read_everywhere(path, options):
    """Read a file in every way there is; anything but a ValueError of one line is a failure."""
    for call in (
        lambda: str(check_dataset(path, options=options)),
        lambda: [row["image"].size for row in open_dataset(path, options=options)[0]],
        lambda: list(open_dataset(path, streaming=True, options=options)[0]),
        lambda: open_ground_truth(path, options=options),
        lambda: read_data(DataArguments(data=str(path), val="none", test="none", crowds=options.crowds)),
    ):
        result, sentence = outcome(call)
        if sentence is not None:
            assert sentence.strip()
            assert "\n" not in sentence, sentence
            assert len(sentence) < 2000, sentence
        elif isinstance(result, str):
            assert result.splitlines()


def mutated(seed):
    """Return the name and the bytes of a mutated annotation file."""
    rng = random.Random(seed)
    kind = ("coco", "names", "captions")[seed % 3]
    content = coco(rng) if kind == "coco" else odvg(rng, captions=kind == "captions")
    if rng.random() < 0.8:
        content = spoil(content, rng)
    text = json.dumps(content) if kind == "coco" else "\n".join(map(json.dumps, content))
    data = text.encode("utf-8", "surrogatepass")
    return ("train.json" if kind == "coco" else "train.jsonl"), spoil_bytes(data, rng) if rng.random() < 0.3 else data


def read_files(folder, seeds):
    options = [AnnotationOptions(), AnnotationOptions("keep", "stored", "scale", "keep", "skip", "anywhere")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        name, data = mutated(seed)
        path = folder / name
        path.write_bytes(data)
        begin = time.process_time()
        for choice in options:
            try:
                read_everywhere(path, choice)
            except Exception as error:
                raise AssertionError(f"file {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - begin < SECONDS, f"file {seed} takes too long"
        path.unlink()
    # ru_maxrss is in kilobytes on Linux.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_a_few_mutated_files_end_in_rows_or_one_sentence(folder, caplog):
    caplog.set_level(logging.CRITICAL)
    read_files(folder, range(FEW))


@pytest.mark.fuzz
def test_all_mutated_files_end_in_rows_or_one_sentence(folder, caplog):
    caplog.set_level(logging.CRITICAL)
    read_files(folder, range(FEW, FEW + FILES))
