"""Damaged TIFF files are errors of ours, not lines that libtiff prints to stderr."""

import io
import subprocess
import sys
import threading

import pytest
from PIL import Image, features

from gdino_hf.model.tiff_messages import _setters, quiet_libtiff

pytestmark = pytest.mark.skipif(not features.check("libtiff") or not _setters(), reason="libtiff cannot be reached")

CODE = """
import io, os, sys, warnings
import numpy as np
from PIL import Image
from gdino_hf.model.picture_pixels import load_image

noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
tried = 0
for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group3", "group4"):
    file = io.BytesIO()
    (noise.convert("1") if compression.startswith("group") else noise).save(file, "TIFF", compression=compression)
    for start in range(20, 60, 7):
        data = bytearray(file.getvalue())
        for place in range(start, len(data) - 200, 97):
            data[place] ^= 255
        for picture in (bytes(data), "opened"):
            try:
                load_image(Image.open(io.BytesIO(data)) if picture == "opened" else picture)
            except (ValueError, OSError):
                pass
            tried += 1
print(tried)
warnings.warn("a warning of ours")
os.write(2, b"written to stderr\\n")
"""


def test_damaged_files_print_nothing_and_stderr_still_works():
    run = subprocess.run([sys.executable, "-W", "ignore::UserWarning:PIL", "-c", CODE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 72
    lines = [line for line in run.stderr.splitlines() if "warnings.warn" not in line]
    # Python's own warnings are none of libtiff's messages.
    lines = [line for line in lines if "Warning: " not in line or "of ours" in line]
    assert len(lines) == 2, run.stderr
    assert lines[0].endswith("UserWarning: a warning of ours")
    assert lines[1] == "written to stderr"


def damaged_fax() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("1").save(file, "TIFF", compression="group4")
    data = bytearray(file.getvalue())
    for place in range(20, len(data) - 200, 97):
        data[place] ^= 255
    return bytes(data)


def test_libtiff_speaks_again_afterwards(capfd):
    data = damaged_fax()
    with quiet_libtiff(), quiet_libtiff():
        Image.open(io.BytesIO(data)).load()
    assert "Fax4Decode" not in capfd.readouterr().err
    Image.open(io.BytesIO(data)).load()
    assert "Fax4Decode" in capfd.readouterr().err


def test_threads_that_decode_side_by_side_are_all_quiet(capfd):
    data = damaged_fax()

    def decode():
        for _ in range(20):
            with quiet_libtiff():
                Image.open(io.BytesIO(data)).load()

    threads = [threading.Thread(target=decode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == ""
    Image.open(io.BytesIO(data)).load()
    assert "Fax4Decode" in capfd.readouterr().err
