"""Files and folders are whole or absent, whatever stops the writing."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from gdino_hf.whole_files import whole_file, whole_folder, write_whole_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "report.json"
    with whole_file(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists()
        assert unfinished.suffix == ".json"
    assert path.read_text() == "half"
    assert names(path.parent) == ["report.json"]


def test_a_failed_write_keeps_the_earlier_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "report.json"
    write_whole_text(path, "old")
    with suppress(RuntimeError), whole_file(path) as unfinished:
        unfinished.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To the process, files that may not grow look like a full disk.
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_whole_text(path, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with whole_folder(path) as unfinished:
            (unfinished / content).write_text(content)
        assert names(path) == [content]
    with suppress(RuntimeError), whole_folder(path) as unfinished:
        (unfinished / "half").write_text("")
        raise RuntimeError
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_a_killed_process_leaves_the_earlier_content(tmp_path, kind):
    path = tmp_path / "a.txt"
    code = f"""
import os, signal
from gdino_hf.whole_files import {kind}
for content in ("old", "new"):
    with {kind}({str(path)!r}) as unfinished:
        (unfinished / "a" if {kind == "whole_folder"} else unfinished).write_text(content)
        if content == "new":
            os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -signal.SIGKILL
    assert (path / "a" if kind == "whole_folder" else path).read_text() == "old"


def test_text_that_cannot_be_encoded_is_escaped(tmp_path):
    write_whole_text(tmp_path / "a.txt", "caf\udce9")
    assert (tmp_path / "a.txt").read_text() == "caf\\udce9"
