"""Seeded mutations of the files of every form of data set: reading ends in rows or in one sentence.

`pytest -m fuzz tests/fuzz` reads all mutations; without it, a few of each form are read.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from form_cases import FORMS
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.dataset_pictures import dataset_pictures
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.open_ground_truth import open_ground_truth

MOST, FEW = 60, 6
SECONDS = 10.0
# Those whose annotations are files of text, and tars; damaged Arrow and Parquet files are the library's own matter.
MUTATED = [name for name in FORMS if not name.startswith("hub_")]
TEXT = (".json", ".jsonl", ".xml", ".txt", ".yaml", ".tar")
ODD = [
    *(b"null", b"-1", b"1e400", b"NaN", b'""', b"[]", b"{}", b"[[", b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\x1b[2J"),
    *(b"../../../etc/passwd", b"/etc/passwd", b"..\\..\\a.png", b"&lol;", b"<!DOCTYPE", b"!!python/object:os.system x"),
    *(b"9" * 400, b"[" * 3000, b"0.5 " * 3000, b"\n\n", b"'", b'"', b": ", b"- ", "安全帽".encode(), b" ", b"*a &a"),
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Replace, insert or cut off a few parts of a file."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice([0, 0, 1, 3, 20]))
        kind = rng.random()
        if kind < 0.7:
            data = data[:place] + rng.choice(ODD) + data[end:]
        elif kind < 0.9:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        else:
            data = data[:place]
    return data


def read(place) -> None:
    """Read a data set in every way; only a ValueError of one sentence may be raised."""
    for way in (open_dataset, check_dataset, open_ground_truth, lambda place: list(dataset_pictures(place))):
        begin = time.process_time()
        try:
            way(place)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 2500
        assert time.process_time() - begin < SECONDS


def try_mutations(form: str, root: Path, count: int) -> None:
    rng = random.Random(f"forms {form}")
    place = FORMS[form](root)
    files = sorted(path for path in root.rglob("*") if path.suffix in TEXT)
    for number in range(count):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(mutate(whole, rng))
        try:
            read(place)
        except Exception as error:
            raise AssertionError(f"{form}, mutation {number} of {path.relative_to(root)}") from error
        finally:
            path.write_bytes(whole)


@pytest.mark.parametrize("form", MUTATED)
def test_a_few_mutations_of_each_form_end_in_rows_or_one_sentence(form, tmp_path):
    try_mutations(form, tmp_path, FEW)


@pytest.mark.fuzz
@pytest.mark.parametrize("form", MUTATED)
def test_mutations_of_each_form_end_in_rows_or_one_sentence(form, tmp_path):
    try_mutations(form, tmp_path, MOST)
