"""Files and folders are whole or absent, whatever stops the writing."""

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from gdino_hf.whole_files import check_writable, make_folder, remove_empty, whole_file, whole_folder, write_whole_text


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


def start_writing(kind, path, content):
    """Start a process that has written a file or folder but not yet put it in place; a line on stdin lets it go on."""
    code = f"""
from gdino_hf.whole_files import {kind}
with {kind}({str(path)!r}) as unfinished:
    (unfinished / "a" if {kind == "whole_folder"} else unfinished).write_text({content!r})
    print("written", flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    return process


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_processes_that_write_the_same_file_do_not_meet(tmp_path, kind):
    path = tmp_path / "a.txt"
    contents = ["first" * 1000, "second", "third" * 10]
    processes = [start_writing(kind, path, content) for content in contents]
    assert len(names(tmp_path)) == 3
    for process, content in zip(processes, contents, strict=True):
        process.communicate("\n")
        assert process.returncode == 0
        assert (path / "a" if kind == "whole_folder" else path).read_text() == content
    assert names(tmp_path) == ["a.txt"]


def test_threads_that_write_the_same_folder_leave_one_of_them_whole(tmp_path):
    path = tmp_path / "model"

    def write(number):
        with whole_folder(path) as unfinished:
            for part in ("a", "b"):
                (unfinished / part).write_text(str(number))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(40)))
    assert (path / "a").read_text() == (path / "b").read_text()
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_what_a_killed_process_left_is_removed_but_not_what_a_living_one_writes(tmp_path, kind):
    path = tmp_path / "a.txt"
    killed, living = start_writing(kind, path, "killed"), start_writing(kind, path, "living")
    killed.kill()
    killed.wait()
    own = (tmp_path / ".a.unfinished-notes.txt", tmp_path / ".a.unfinished-00000000-1-0123456x.txt")
    for file in own:
        file.write_text("named alike by someone else")
    assert len(names(tmp_path)) == 4
    code = f"from gdino_hf.whole_files import write_whole_text; write_whole_text({str(tmp_path / 'b.txt')!r}, 'new')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(names(tmp_path)) == 4
    living.communicate("\n")
    assert (path / "a" if kind == "whole_folder" else path).read_text() == "living"
    assert names(tmp_path) == sorted([*(file.name for file in own), "a.txt", "b.txt"])


def test_the_longest_file_names_can_be_written(tmp_path):
    for name in ("x" * 251 + ".txt", "語" * 83 + ".txt"):
        write_whole_text(tmp_path / name, "a")
        assert (tmp_path / name).read_text() == "a"


def test_a_link_at_a_guessed_name_is_not_followed(tmp_path):
    """Whoever can write to a folder must not make us overwrite a file elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    place = tmp_path / "shared"
    place.mkdir()
    for name in ("a.unfinished.txt", ".a.txt.part", "a.txt.part"):
        (place / name).symlink_to(elsewhere)
    write_whole_text(place / "a.txt", "new")
    assert elsewhere.read_text() == "kept"


def test_writability_is_checked_without_a_trace(tmp_path):
    write_whole_text(tmp_path / "report.json", "old")
    check_writable(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == "old"
    check_writable(tmp_path / "new" / "deep" / "report.json")
    assert names(tmp_path) == ["report.json"]
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "there" / "report.json")
    with pytest.raises(OSError, match="folder"):
        check_writable(tmp_path / "there")
    assert names(tmp_path) == ["report.json", "there"]


def test_many_may_check_one_missing_folder_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        checks = [pool.submit(check_writable, tmp_path / "new" / f"{number}.json") for number in range(400)]
    assert [check.exception() for check in checks] == [None] * 400
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_folders_of_a_refused_work_are_removed_unless_something_is_in_them(tmp_path):
    made = make_folder(tmp_path / "runs" / "train" / "cats")
    assert [path.name for path in made] == ["cats", "train", "runs"]
    (tmp_path / "runs" / "kept.txt").write_text("")
    remove_empty(made)
    assert names(tmp_path / "runs") == ["kept.txt"]
    assert make_folder(tmp_path / "runs") == []
    with pytest.raises(OSError, match=r"kept\.txt"):
        make_folder(tmp_path / "runs" / "kept.txt" / "below")
