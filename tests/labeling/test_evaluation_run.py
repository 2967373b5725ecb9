"""Evaluation by several processes: the predictions and the figures are those of one process, byte by byte."""

import contextlib
import io
import json
import pickle

import pytest

pytest.importorskip("faster_coco_eval")

from form_cases import FORMS
from gdino_hf.cli import main
from gdino_hf.evaluation.open_ground_truth import open_ground_truth
from gdino_hf.evaluation.predict import predict, undecoded
from gdino_hf.evaluation.prediction_file import PredictionLines, read_predictions
from gdino_hf.labeling.evaluation_order import PARTS, EvaluationOrder, portable_row
from gdino_hf.labeling.label_settings import model_fingerprint
from gdino_hf.labeling.ray_workers import TaskSettings, label_shard, own_variables
from gdino_hf.labeling.shard_labels import DIED
from label_command import make_pictures
from rank_processes import accelerate_launch, as_a_launcher_does

NAMES = ("cat", "dog")
NUMBER = 140


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A COCO file of 140 small pictures of several sizes, of which one is damaged: five shards."""
    folder = make_pictures(tmp_path_factory.mktemp("set") / "images", NUMBER)
    images, annotations = [], []
    for number, path in enumerate(sorted(folder.rglob("*.*"), key=lambda path: path.name)):
        width, height = [(90, 60), (60, 90), (80, 80), (120, 50)][number % 4]
        name = path.relative_to(folder).as_posix()
        images.append({"id": 1000 - number, "file_name": name, "width": width, "height": height})
        box = {"bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
        annotations.append({"id": number + 1, "image_id": 1000 - number, "category_id": number % 2, **box})
        if number == 70:
            path.write_bytes(path.read_bytes()[:90])
    categories = [{"id": place, "name": name} for place, name in enumerate(NAMES)]
    file = folder.parent / "val.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


@pytest.fixture(scope="module")
def whole(data, label_model, tmp_path_factory):
    """The results of one process."""
    folder = tmp_path_factory.mktemp("whole")
    status, _ = evaluate(data, label_model, "--runs", folder)
    assert status == 1
    return folder / "eval" / "val"


def evaluate(data, model, *rest):
    """Run the verb here: its status and what it complained of."""
    complained = io.StringIO()
    arguments = ["eval", data, "--model", model, "--device", "cpu", "--batch", "4", *rest]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complained):
        status = main([*map(str, arguments)])
    return status, complained.getvalue()


def same(folder, whole):
    """Assert that two runs have the same predictions and figures."""
    for name in ("predictions.jsonl", "metrics.json", "labels.csv", "confusion.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (folder / PARTS).exists()


def test_one_process_judges_all_pictures_but_the_damaged_one(whole):
    report = json.loads((whole / "metrics.json").read_text())
    assert (report["images"], len(report["failed"])) == (NUMBER - 1, 1)


@pytest.mark.soak  # workers that go on, below, do the same
def test_workers_give_the_figures_of_one_process(data, label_model, whole, tmp_path):
    status, said = evaluate(data, label_model, "--runs", tmp_path, "--workers", "2")
    assert (status, said.count("is left out")) == (1, 1)
    same(tmp_path / "eval" / "val", whole)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [as_a_launcher_does, pytest.param(accelerate_launch, marks=pytest.mark.soak)])
def test_processes_of_a_launcher_give_the_figures_of_one(data, label_model, whole, tmp_path, fresh_python, launch):
    pytest.importorskip("accelerate")
    options = ["--model", label_model, "--device", "cpu", "--batch", "4", "--runs", tmp_path]
    printed = launch(fresh_python, ["eval", data, *options], statuses=(0, 1))
    assert printed.count("images judged") == 1
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["val"]
    same(tmp_path / "eval" / "val", whole)


@pytest.mark.parametrize("kept", [0, 5, 66, 100])
def test_a_stopped_run_goes_on_to_the_same_bytes(data, label_model, whole, tmp_path, kept):
    """Stopped in the middle of a batch: its pictures share a forward pass again."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_bytes(b"".join(lines[: kept + 1]) + lines[kept + 1][:20])
    evaluate(data, label_model, "--resume", folder)
    assert read_predictions(folder / "predictions.jsonl").images[-1]["image_id"] == 1000 - NUMBER + 1
    if kept < 70:
        same(folder, whole)


@pytest.mark.slow
def test_workers_go_on_with_what_one_process_began(data, label_model, whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_bytes(b"".join(lines[:11]))
    # Shards of an earlier try: one as it must be, one of other pictures.
    (folder / PARTS).mkdir()
    (folder / PARTS / "00000001.jsonl").write_bytes(b"".join(lines[33:65]))
    (folder / PARTS / "00000002.jsonl").write_bytes(b"".join(lines[1:9]))
    status, said = evaluate(data, label_model, "--resume", folder, "--workers", "2")
    assert (status, said.count("is left out")) == (1, 1)
    same(folder, whole)


@pytest.fixture
def rows(data):
    found = list(enumerate(open_ground_truth(data).rows))[:64]
    return [portable_row(row, index) for index, row in found]


def order(model, **changes):
    arguments = {"labels": list(NAMES), "prompts": list(NAMES), "score": "mean", "max_detections": 100}
    return EvaluationOrder(str(model), "cpu", batch_size=4, arguments=arguments, **changes)


def test_a_task_of_a_cluster_gives_the_lines_of_one_process(label_model, whole, rows, monkeypatch):
    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")
    given = order(label_model, fingerprint=model_fingerprint(str(label_model)))
    content = label_shard(TaskSettings(given, 1, own_variables()), rows, ())
    assert content.splitlines() == (whole / "predictions.jsonl").read_bytes().splitlines()[1:65]
    tally = given.tally(content)
    assert (tally.pictures, tally.failed) == (64, 0)
    said = label_shard(TaskSettings(order(label_model, fingerprint="0" * 64), 1, own_variables()), rows, ())
    assert "are not those of the machine that asks" in said


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_go_to_other_processes(label_model, form, tmp_path):
    """What a worker predicts from a pickled row is what this process predicts from the row."""
    rows = open_ground_truth(FORMS[form](tmp_path)).rows
    given = order(label_model)
    maker = given.maker(1)
    sent = pickle.loads(pickle.dumps([portable_row(row, index) for index, row in enumerate(undecoded(rows))]))
    here = PredictionLines()
    detector = maker.detector
    predict(detector.model, detector.processor, rows, batch_size=4, store=here, progress=None, **given.arguments)
    assert maker.content(sent, None, ()) == here.content()
    assert given.tally(here.content()).failed == 0


@pytest.mark.soak
def test_a_cluster_gives_the_figures_of_one_process(data, label_model, whole, tmp_path, cluster):
    status, said = evaluate(data, label_model, "--runs", tmp_path, "--ray", cluster.address)
    assert (status, "Traceback" in said) == (1, False)
    same(tmp_path / "eval" / "val", whole)


def test_pictures_that_processes_die_of_are_failures_and_change_no_other_batch(label_model, whole, rows):
    class Watcher:
        def __init__(self):
            self.begun, self.ended, self.failed = [], [], 0

        def reading(self, place):
            self.begun.append(place)

        def done(self, places, tally):
            self.ended += places
            self.failed += tally.failed

    watcher = Watcher()
    lines = order(label_model).maker(1).content(rows, watcher, [5]).splitlines()
    entries = {entry["image_id"]: entry for entry in map(json.loads, lines)}
    assert entries[rows[5]["image_id"]]["error"] == DIED
    before = (whole / "predictions.jsonl").read_bytes().splitlines()[1:65]
    beside = {row["image_id"] for row in rows[4:8]}
    assert [line for line in before if json.loads(line)["image_id"] not in beside] == [
        line for line in lines if json.loads(line)["image_id"] not in beside
    ]
    assert sorted(watcher.begun) == [place for place in range(64) if place != 5]
    assert (sorted(watcher.ended), watcher.failed) == (list(range(64)), 1)


def test_what_a_launcher_leaves_out_is_one_sentence(data, label_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    status, said = evaluate(data, label_model, "--runs", tmp_path)
    assert status == 2
    assert "WORLD_SIZE is 2, but MASTER_ADDR is not set; start the processes with `accelerate launch`" in said
    monkeypatch.setenv("WORLD_SIZE", "1")
    status, said = evaluate(data, label_model, "--runs", tmp_path, "--ray-cpus", "2")
    assert (status, "--ray-cpus is for --ray; give both" in said) == (2, True)
