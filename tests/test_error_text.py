"""Exceptions become words that fit into a sentence."""

import errno
from urllib.error import HTTPError, URLError

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import UnidentifiedImageError

from gdino_hf.error_text import reason

TRACEBACK = (
    'Caught OSError in worker 0.\nTraceback (most recent call last):\n  File "x.py"\nOSError: broken data stream.\n'
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("The box is empty; repair it."), "The box is empty; repair it"),
        (ValueError("first\n\n  second   line.\nthird"), "first"),
        (RuntimeError(TRACEBACK), "OSError: broken data stream"),
        (ValueError(""), "ValueError"),
        (MemoryError(), "MemoryError"),
        (ValueError(" \n "), "ValueError"),
        (KeyError("boxes"), "the key 'boxes' is missing"),
        (KeyError(), "KeyError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "No such file or directory"),
        (OSError("cannot identify the disk"), "cannot identify the disk"),
        (UnidentifiedImageError("cannot identify image file <_io.BytesIO>"), "it is not a picture that can be read"),
        (URLError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")), "Connection refused"),
        (URLError("unknown url type: ftp"), "unknown url type: ftp"),
        (HTTPError("http://host/a.jpg", 404, "Not Found", None, None), "HTTP Error 404: Not Found"),
        (
            StrictDataclassFieldValidationError("width", ValueError("it must be positive")),
            "it must be positive",
        ),
    ],
)
def test_reason_is_one_line_without_a_period(error, words):
    assert reason(error) == words


def test_file_of_an_oserror_is_named_on_request():
    error = PermissionError(errno.EACCES, "Permission denied", "runs/a")
    assert reason(error, name_file=True) == "Permission denied: runs/a"
    assert reason(OSError(errno.ENOSPC, "No space left on device"), name_file=True) == "No space left on device"


def test_more_lines_are_joined_on_request():
    assert reason(ValueError("first\n second \n\nthird.\nfourth"), most_lines=3) == "first second third"
