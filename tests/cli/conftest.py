"""Fixtures for `gdino detect`: a picture, its file, and the command with the tiny model."""

import functools

import pytest

from detect_command import make_picture, run_detect


@pytest.fixture
def detect(tmp_path, tiny_folder):
    """`run_detect` with the tiny model and a folder of its own."""
    return functools.partial(run_detect, tiny_folder, tmp_path / "out")


@pytest.fixture
def picture():
    return make_picture()


@pytest.fixture
def photo(tmp_path, picture):
    path = tmp_path / "photos" / "photo.png"
    path.parent.mkdir()
    picture.save(path)
    return path
