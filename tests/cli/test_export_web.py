"""`gdino export --format web`: what it refuses before it traces the model."""

import pytest

from gdino_hf import NANO
from gdino_hf.cli import main
from gdino_hf.export.web_page import shown_name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "0.3"], "--threshold is for --format web, not for onnx; leave it out"),
        (["--npm-folder", "."], "--npm-folder is for --format web, not for onnx; leave it out"),
        (["--format", "web", "--variant", "split"], "--variant split does not go into a page"),
        (["--format", "web", "--threshold", "2"], "--threshold"),
        (["--format", "web", "--npm-folder", "nowhere"], "is missing; run `npm install onnxruntime-web@"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys):
    try:
        code = main(["export", "nano", "--out", str(tmp_path / "page"), *options])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "page").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_bytes(b"a photograph")
    for place in (tmp_path, tmp_path / "holiday.jpg"):
        assert main(["export", "nano", "--out", str(place)]) == 2
        assert "something else, which an export would replace; choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_label_with_a_comma_cannot_stand_in_the_pages_field(tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("cat, black\ndog\n")
    out = str(tmp_path / "page")
    assert main(["export", "nano", "--format", "web", "--out", out, "--labels", f"@{tmp_path / 'labels.txt'}"]) == 2
    assert "hold commas or periods, which separate labels; leave these out" in capsys.readouterr().err


def test_a_page_does_not_tell_where_its_model_was(tmp_path):
    (tmp_path / "secret" / "my-model").mkdir(parents=True)
    assert shown_name(tmp_path / "secret" / "my-model") == "my-model"
    assert shown_name("IDEA-Research/grounding-dino-tiny") == "IDEA-Research/grounding-dino-tiny"
    assert shown_name("nano") == "gdino-nano"
    assert shown_name(NANO) == "gdino-nano"
