"""`gdino detect --caption`, `--tiles` and the presence of labels: equal to the Detector of Python."""

import json

import numpy as np
import pytest
from PIL import Image

from detect_command import EVERYTHING, LABELS
from gdino_hf import NANO, Detector
from gdino_hf.cli import main
from random_models import make_random_model

CAPTION = "a cat beside the red car"
# The report rounds scores to four digits and boxes to two.
SCORE, PIXEL = 1e-4, 0.011


@pytest.fixture
def run(tmp_path, tiny_folder, capsys):
    """The verb without labels: its status, its report and what it complained about."""

    def call(*arguments):
        out = tmp_path / "out"
        try:
            status = main(["detect", *map(str, arguments), "--model", str(tiny_folder), "--out", str(out)])
        except SystemExit as error:
            status = error.code
        path = out / "detections.json"
        return status, json.loads(path.read_text()) if path.is_file() else None, capsys.readouterr().err

    return call


def compare(entry, found):
    assert [item["label"] for item in entry["detections"]] == found.text_labels
    scores, boxes = ([item[name] for item in entry["detections"]] for name in ("score", "box"))
    np.testing.assert_allclose(scores, found.scores, atol=SCORE)
    np.testing.assert_allclose(boxes, found.boxes, atol=PIXEL)
    assert entry["presence"] == pytest.approx(found.presence, abs=SCORE)


def test_a_caption_gives_the_boxes_spans_and_token_scores_of_its_phrases(run, photo, tiny_folder):
    status, report, _ = run(photo, "--caption", CAPTION, *EVERYTHING)
    assert status == 0
    assert (report["caption"], report["labels"]) == (CAPTION, ["cat", "red car"])
    found = Detector(str(tiny_folder), device="cpu").ground(photo, CAPTION, threshold=0.0)
    (entry,) = report["images"]
    compare(entry, found)
    for item, scores in zip(entry["detections"], found.token_scores, strict=True):
        ((start, end),) = item["spans"]
        assert CAPTION[start:end] == item["label"]
        assert [token for token, _ in item["token_scores"]] == [token for token, _ in scores]
        assert max(score for _, score in item["token_scores"]) == pytest.approx(item["score"], abs=SCORE)


def test_phrases_that_the_tokenizer_does_not_know_are_named_or_refused(run, photo, tmp_path):
    status, _, said = run(photo, "--caption", "a cat and a 安全帽")
    assert status == 0
    assert said.splitlines()[0].startswith("warning: The tokenizer does not know every word of these labels")
    assert "'安全帽'" in said.splitlines()[0]
    status, _, said = run(photo, "--caption", "安全帽", "--out", tmp_path / "other")
    assert status == 2
    assert said.startswith("gdino detect: error: --caption: The tokenizer knows no word of the caption's phrases")


def test_presence_has_labels_that_were_not_found(run, photo):
    _, report, _ = run(photo, "--labels", ", ".join(LABELS), "--negative", "hat", "--threshold", "1")
    (entry,) = report["images"]
    assert entry["detections"] == []
    assert list(entry["presence"]) == LABELS
    assert all(0 < score < 1 for score in entry["presence"].values())


def test_tiles_give_what_the_detector_gives_with_tiles(run, tmp_path, tiny_folder):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    options = ["--labels", "cat, dog", *EVERYTHING, "--nms", "0.5"]
    _, report, _ = run(tmp_path / "large.png", *options, "--tiles", "64", "--overlap", "0.5")
    assert (report["tiles"], report["overlap"]) == (64, 0.5)
    found = Detector(str(tiny_folder), device="cpu")(
        tmp_path / "large.png", ["cat", "dog"], threshold=0.0, nms_threshold=0.5, tiles=64, overlap=0.5
    )
    compare(report["images"][0], found)
    _, whole, _ = run(tmp_path / "large.png", *options)
    assert "tiles" not in whole
    assert whole["images"][0]["detections"] != report["images"][0]["detections"]
    _, grounded, _ = run(tmp_path / "large.png", "--caption", CAPTION, *EVERYTHING, "--tiles", "64")
    found = Detector(str(tiny_folder), device="cpu").ground(tmp_path / "large.png", CAPTION, threshold=0.0, tiles=64)
    compare(grounded["images"][0], found)
    assert {CAPTION[slice(*span)] for item in grounded["images"][0]["detections"] for span in item["spans"]} == {
        "cat",
        "red car",
    }


def test_json_of_aliases_gives_what_the_vocabulary_gives(run, photo, tmp_path, tiny_folder):
    texts = {"animal": ["cat", "dog"], "St. Cup, old": "red cup", "hat": None}
    (tmp_path / "labels.json").write_text(json.dumps(texts))
    status, report, _ = run(photo, "--labels", f"@{tmp_path / 'labels.json'}", "--negative", "table", *EVERYTHING)
    assert status == 0
    assert (report["labels"], report["negative_labels"]) == (list(texts), ["table"])
    assert [entry["texts"] for entry in report["vocabulary"]["labels"]] == [["cat", "dog"], ["red cup"], ["hat"]]
    found = Detector(str(tiny_folder), device="cpu")(photo, texts, negative="table", threshold=0.0)
    assert len(found) > 0
    compare(report["images"][0], found)


def test_thresholds_of_a_saved_vocabulary_come_before_those_of_the_command(run, photo, tmp_path, tiny_folder):
    detector = Detector(str(tiny_folder), device="cpu")
    every = detector(photo, LABELS, threshold=0.0)
    limits = {label: float(np.median(every.filter(labels=label).scores)) for label in set(every.text_labels)}
    limits |= {"dog": 0.1}
    vocabulary = detector.vocabulary(LABELS, thresholds=limits, colors=dict.fromkeys(LABELS, "#ff8800"))
    vocabulary.save(tmp_path / "fitted")
    status, report, _ = run(photo, "--labels", f"@{tmp_path / 'fitted'}", "--threshold", "1")
    assert status == 0
    # The usual text threshold of 0.25 would undo the threshold of "dog".
    assert report["text_threshold"] == pytest.approx(0.1)
    found = detector(photo, vocabulary)
    assert 0 < len(found) < len(every)
    compare(report["images"][0], found)
    pixels = np.asarray(Image.open(report["images"][0]["annotated"]).convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels.astype(int) - [0xFF, 0x88, 0]).max(1) < 40).any()


def test_a_vocabulary_of_another_model_is_refused(run, photo, tmp_path, tiny_config, tiny_processor):
    other = Detector(make_random_model(tiny_config, seed=1), processor=tiny_processor, device="cpu")
    other.vocabulary("cat").save(tmp_path / "other")
    status, report, said = run(photo, "--labels", f"@{tmp_path / 'other'}")
    assert (status, report) == (2, None)
    assert "computed by another model" in said
    assert len(said.splitlines()) == 1


def test_a_run_with_other_aliases_is_another_run(run, photo, tmp_path):
    path = tmp_path / "labels.json"
    reports = []
    for texts in (["cat"], ["cat", "dog"]):
        path.write_text(json.dumps({"animal": texts}))
        _, report, said = run(photo, "--labels", f"@{path}", *EVERYTHING)
        assert "goes on" not in said
        reports.append(report["images"][0]["presence"])
    assert reports[0] != reports[1]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "one of the arguments --labels --caption is required"),
        (["--labels", "cat", "--caption", "a cat"], "not allowed with argument"),
        (["--caption", "  "], "--caption is empty; write for instance"),
        (["--caption", "a cat", "--negative", "dog"], "--negative is for --labels"),
        (["--caption", "cat " * 300], "--caption: "),
        (["--labels", "cat", "--tiles", "31"], "--tiles 31 is too small; give at least 32 pixels"),
        (["--labels", "@labels.json"], "--labels '@labels.json': the label file cannot be read (No such file"),
        (["--labels", "cat", "--negative", f"@{NANO}/config.json"], "only --labels of gdino detect takes JSON"),
        (["--labels", f"@{NANO}/config.json"], "is not a label file (the label"),
        (["--labels", f"@{NANO}/model.safetensors"], "is not a saved vocabulary"),
        (["--labels", "cat", "--overlap", "0.5"], "--overlap is for --tiles"),
        (["--labels", "cat", "--tiles", "64", "--overlap", "1"], "--overlap 1 leaves nothing new"),
    ],
)
def test_options_that_do_not_go_together_are_named(run, photo, options, complaint):
    status, report, said = run(photo, *options)
    assert status == 2
    assert report is None
    assert complaint in said
