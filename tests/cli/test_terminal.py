"""What the command prints: no control character of a file name, a label or a message reaches the terminal."""

import contextlib
import io
import json
import sys

import pytest
from PIL import Image

from detect_command import EVERYTHING, run_detect
from gdino_hf.cli import main
from gdino_hf.cli.terminal import EscapingStream, safe_terminal
from gdino_hf.evaluation.predict import record_failure
from gdino_hf.evaluation.prediction_file import Predictions
from gdino_hf.model.printable import printable, printable_lines

# Window title, clear screen, colour, an 8-bit control sequence, direction override.
NASTY = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b2J\u202e"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b2J\u202e"


def is_harmless(text):
    return text.replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NASTY, ESCAPED),
        ("two\nlines\r\x00", r"two\nlines\r\x00"),
        ("\udcff\u2028\ufeff", r"\udcff\u2028\ufeff"),
        ("кошка 猫 😀 cafe\u0301 क्\u200dष\u3000x", "кошка 猫 😀 cafe\u0301 क्\u200dष\u3000x"),
    ],
)
def test_control_characters_are_written_as_escapes(text, shown):
    assert printable(text) == shown


def test_lines_and_progress_bars_stay():
    assert printable_lines("a\n\tb\r 5%|\u2588\x1b[A\x1b[2J") == "a\n\tb\r 5%|\u2588\x1b[A\\x1b[2J"


def test_long_text_is_cut():
    assert printable("x" * 300, limit=20) == "x" * 17 + "..."


def test_a_stream_escapes_whatever_is_written_to_it():
    under = io.StringIO()
    stream = EscapingStream(under)
    print(NASTY, file=stream)
    stream.writelines(["one\n", NASTY])
    assert under.getvalue() == f"{ESCAPED}\none\n{ESCAPED}"
    assert stream.getvalue() == under.getvalue()


def test_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with safe_terminal():
        assert isinstance(sys.stderr, EscapingStream)
    assert (sys.stdout, sys.stderr) == before


def test_detect_prints_no_escape_sequence_of_names_and_labels(tmp_path, tiny_folder, picture):
    folder = tmp_path / f"photos{NASTY}"
    folder.mkdir()
    picture.save(folder / f"a{NASTY}.png")
    (folder / f"b{NASTY}.png").write_bytes(b"no picture")
    (folder / f"c{NASTY}.txt").write_bytes(b"no picture")
    labels = f"cat, dog {NASTY}"
    status, report, printed, complained = run_detect(
        tiny_folder, tmp_path / f"out{NASTY}", folder, f"{NASTY}.png", *EVERYTHING, labels=labels
    )
    assert status == 1
    assert is_harmless(printed)
    assert is_harmless(complained)
    assert ESCAPED in printed
    assert ESCAPED in complained
    # The JSON holds the names as they are.
    assert report["images"][0]["image"] == str(folder / f"a{NASTY}.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect", "x.jpg", "--labels", "cat", f"--{NASTY}"],
        ["detect", "x.jpg", "--labels", "cat", "--threshold", NASTY],
        ["detect", "x.jpg", "--labels", "cat", "--model", f"./{NASTY}", "--device", "cpu"],
        [NASTY],
        ["eval", f"{NASTY}.json"],
        ["convert", f"{NASTY}.pth", "out"],
    ],
)
def test_errors_print_no_escape_sequence(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("x.jpg")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    assert status in (1, 2)
    assert r"\x1b" in printed.getvalue()
    assert is_harmless(printed.getvalue())


def test_evaluation_prints_no_escape_sequence_of_labels_and_files(tmp_path, tiny_folder, picture):
    (tmp_path / "images").mkdir()
    names = [f"a{NASTY}.png", f"b{NASTY}.png"]
    picture.save(tmp_path / "images" / names[0])
    (tmp_path / "images" / names[1]).write_bytes(b"no picture")
    content = {
        "images": [{"id": n, "file_name": name, "width": 120, "height": 80} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": f"cat {NASTY}"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": n % 2, "category_id": n, "bbox": [5, 5, 50, 50], "area": 2500, "iscrowd": 0}
            for n in (1, 2)
        ],
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(["eval", str(path), "--model", str(tiny_folder), "--runs", str(tmp_path / "runs")])
    assert r"\x1b" in printed.getvalue()
    assert is_harmless(printed.getvalue().replace("\r", "").replace("\x1b[A", ""))


@pytest.mark.parametrize(
    "argv",
    [
        ["detect", "--x\ry\ndone", "--labels", "cat"],
        ["\r\nx"],
        ["detect", "a.png", "--labels", "cat", "--model", "no\rwhere\nresults: here"],
        ["eval", "no\r\n.json"],
        ["train", "no\r\n"],
        ["convert", "no\r\n", "out"],
    ],
    ids=ascii,
)
def test_line_breaks_in_arguments_do_not_make_lines(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    with contextlib.suppress(SystemExit):
        assert main(argv) == 2
    said = capsys.readouterr().err.rstrip("\n")
    assert "\r" not in said
    assert len([line for line in said.split("\n") if not line.startswith(("usage:", " "))]) == 1


def test_ids_of_images_do_not_make_lines(tmp_path, capsys):
    record_failure("7\rimage 1 is fine\nresults: there", ValueError("no\rpicture"), Predictions(), None)
    assert capsys.readouterr().err.strip("\n").count("\n") == 0
