"""`gdino eval` from the command line to files: figures, stored predictions, resumption, tables and mistakes."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faster_coco_eval")

from gdino_hf import GDinoProcessor
from gdino_hf.cli import main
from gdino_hf.cli.run_folder import new_run_folder
from gdino_hf.evaluation.evaluate import write_csv
from gdino_hf.evaluation.ground_truth import coco_ground_truth
from gdino_hf.evaluation.prediction_file import PredictionFile

NAMES = ("cat", "dog")
FILES = ("metrics.json", "metrics.csv", "labels.csv", "confusion.csv", "predictions.png")


def run(*arguments):
    """Status, what was printed and what was complained of."""
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        status = main(["eval", *map(str, arguments)])
    return status, printed.getvalue(), complained.getvalue()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A COCO file of four photographs; the working directory is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return write_data(tmp_path / "set")


def write_data(folder, lvis=False):
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((200, 100)).save(folder / "images" / f"{number}.png")
        content["images"].append({"id": 5 + number, "file_name": f"{number}.png", "width": 200, "height": 100})
        box = [10 + number, 10, 60, 40]
        category = 10 * (1 + number % 2)
        annotation = {"id": number + 1, "image_id": 5 + number, "category_id": category, "bbox": box, "area": 2400}
        content["annotations"].append({**annotation, "iscrowd": 0})
        if lvis:
            content["images"][-1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["categories"] = [
        {"id": 10 * (place + 1), "name": name, "frequency": "rf"[place]} for place, name in enumerate(NAMES)
    ]
    path = folder / "val.json"
    path.write_text(json.dumps(content))
    return path


def perfect(data, path, of=slice(None)):
    """A file of predictions that are the truth."""
    truth = coco_ground_truth(data)
    with PredictionFile(path, {"model": "oracle", "kind": "boxes", "labels": truth.labels}) as store:
        for image in list(truth.references)[of]:
            reference = truth.references[image]
            scores = [0.9] * len(reference["boxes"])
            found = {"boxes": reference["boxes"], "scores": scores, "labels": reference["labels"]}
            store.append({"image_id": image, "width": 200, "height": 100, **found})
    return path


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_stored_predictions_are_judged_without_a_model(data, tmp_path):
    status, printed, _ = run(data, "--predictions", perfect(data, tmp_path / "p.jsonl"), "--model", "no/such-model")
    folder = tmp_path / "work" / "runs" / "eval" / "val"
    assert status == 0
    assert metrics(folder)["metrics"]["AP"] == pytest.approx(1.0)
    assert all((folder / name).stat().st_size for name in FILES)
    rows = dict(list(csv.reader((folder / "metrics.csv").open()))[1:])
    assert float(rows["AP50"]) == pytest.approx(1.0)
    labels = list(csv.DictReader((folder / "labels.csv").open()))
    assert [(row["label"], row["boxes"], float(row["AP"])) for row in labels] == [("cat", "2", 1.0), ("dog", "2", 1.0)]
    confusion = list(csv.reader((folder / "confusion.csv").open()))
    assert confusion[1:] == [["cat", "2", "0", "0"], ["dog", "0", "2", "0"], ["background", "0", "0", "0"]]
    assert "4 images judged" in printed
    assert printed.splitlines()[1].split()[:3] == ["1.000", "1.000", "1.000"]


def test_names_act_neither_on_the_terminal_nor_in_a_spreadsheet(data, tmp_path):
    content = json.loads(data.read_text())
    used = sorted({annotation["category_id"] for annotation in content["annotations"]})
    nasty = dict(zip(used, ["\x1b[A\rresults: elsewhere\nresults: there", " =HYPERLINK(1)"], strict=True))
    for category in content["categories"]:
        category["name"] = nasty.get(category["id"], category["name"])
    data.write_text(json.dumps(content))
    status, printed, _ = run(data, "--predictions", perfect(data, tmp_path / "p.jsonl"), "--model", "no/such-model")
    assert status == 0
    assert r"\x1b[A\rresults: elsewhere\nresults: there" in printed
    assert [line.startswith("results: ") for line in printed.splitlines()].count(True) == 1
    folder = tmp_path / "work" / "runs" / "eval" / "val"
    assert "' =HYPERLINK(1)" in [row["label"] for row in csv.DictReader((folder / "labels.csv").open(newline=""))]
    assert "' =HYPERLINK(1)" in next(csv.reader((folder / "confusion.csv").open(newline="")))


@pytest.mark.parametrize(
    "text",
    [
        "=1",
        " =1",
        "\n=1",
        "\tx",
        "+1",
        "-1",
        "@x",
        "\uff1d1",
        "\uff20x",
        "\u3000\uff0b1",
        "\ufeff=1",
        "\u200b\u202e=1",
        "\x00-1",
    ],
)
def test_cells_that_a_spreadsheet_would_compute_begin_with_an_apostrophe(text, tmp_path):
    write_csv(tmp_path / "table.csv", ("label", "value"), [(text, -1.5), ("cat", 2)])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1:] == [[f"'{text}", "-1.5"], ["cat", "2"]]


def test_labels_with_semicolons_stay_one_cell_in_spreadsheets_that_separate_by_them(tmp_path):
    label = "cat;=HYPERLINK(1)\t=1"
    write_csv(tmp_path / "table.csv", ("label", "value"), [(label, 1.5)])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [label, "1.5"]
    for separator in ";\t":
        with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
            assert not any(cell.startswith("=") for row in csv.reader(file, delimiter=separator) for cell in row)


def test_coco_results_are_judged_as_pycocotools_does(data, tmp_path):
    cocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    content = json.loads(data.read_text())
    # Areas of segments, a crowd, and an image without anything found.
    content["annotations"][0] |= {"area": 800.0, "iscrowd": 1}
    content["annotations"][1]["area"] = 31.0**2
    data.write_text(json.dumps(content))
    found = [
        {"image_id": image, "category_id": category, "bbox": box.round(2).tolist(), "score": round(score, 1)}
        for image in (5, 6, 7)
        for category in (10, 20, 30)
        for box, score in zip(rng.normal((11, 11, 60, 40), 4, (9, 4)), rng.random(9).tolist(), strict=True)
    ]
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert run(data, "--predictions", tmp_path / "results.json", "--model", "no/such-model")[0] == 0
    report = metrics(tmp_path / "work/runs/eval/val")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = cocotools.COCO(str(data))
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert report["images"] == 4
    assert list(report["metrics"].values()) == pytest.approx(judge.stats.tolist(), abs=1e-9)
    assert 0 < report["metrics"]["AP"] < 1


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([{"image_id": 99, "category_id": 10, "bbox": [1, 1, 5, 5], "score": 0.5}], "image 99"),
        ([{"image_id": 5, "category_id": 10, "bbox": [1, 1, 5], "score": 0.5}], "four finite numbers"),
        ([{"image_id": 5, "category_id": 10, "bbox": [1, 1, -5, 5], "score": 0.5}], "negative side"),
        ([{"image_id": 5, "category_id": 10, "segmentation": {}, "score": 0.5}], "the box None"),
        ([{"image_id": 5, "category_id": 10, "bbox": [1, 1, 5, 5], "score": "high"}], "score is 'high'"),
        ([{"image_id": 5, "bbox": [1, 1, 5, 5], "score": 1}], "category_id None"),
        ([[1, 2]], "Detection 0"),
    ],
)
def test_malformed_coco_results_are_one_line(data, tmp_path, results, message):
    (tmp_path / "results.json").write_text(json.dumps(results))
    status, _, complained = run(data, "--predictions", tmp_path / "results.json")
    assert status == 2
    assert message in complained
    assert complained.count("\n") == 1


def test_predictions_of_other_labels_are_refused(data, tmp_path):
    image = {"image_id": 5, "boxes": [[1, 1, 9, 9]], "scores": [0.5]}
    for labels, label, message in (
        (["zebra"], 0, "other labels (zebra)"),
        (["cat"], 1, "outside the 1 labels of its header"),
    ):
        path = tmp_path / f"{label}.jsonl"
        with PredictionFile(path, {"kind": "boxes", "labels": labels}) as store:
            store.append({**image, "labels": [label]})
        status, _, complained = run(data, "--predictions", path)
        assert (status, complained.count("\n")) == (2, 1)
        assert message in complained
    with PredictionFile(tmp_path / "empty.jsonl", {"kind": "boxes", "labels": list(NAMES)}):
        pass
    status, _, complained = run(data, "--predictions", tmp_path / "empty.jsonl")
    assert (status, "predictions of no image" in complained) == (2, True)


def test_the_folder_one_is_in_names_the_run(data, tmp_path, monkeypatch):
    stored = perfect(data, tmp_path / "p.jsonl")
    monkeypatch.chdir(data.parent)
    assert run(".", "--predictions", stored, "--runs", tmp_path / "runs")[0] == 0
    assert metrics(tmp_path / "runs/eval/set")["images"] == 4


def test_predictions_of_the_model_give_the_same_figures_later(data, tiny_folder, tmp_path):
    status, _, _ = run(data, "--model", tiny_folder, "--batch", 2, "--name", "first")
    first = tmp_path / "work" / "runs" / "eval" / "first"
    assert status == 0
    assert metrics(first)["settings"]["model"] == str(tiny_folder)
    assert metrics(first)["settings"]["labels"] == list(NAMES)
    assert run(data, "--predictions", first / "predictions.jsonl", "--name", "again")[0] == 0
    again = first.with_name("again")
    assert metrics(again) == metrics(first)
    for name in ("labels.csv", "confusion.csv", "predictions.png"):
        assert (again / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.usefixtures("rendered_plots")
def test_curves_are_drawn_where_matplotlib_is_and_missed_in_one_line_where_not(data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    stored = perfect(data, tmp_path / "p.jsonl")
    run(data, "--predictions", stored, "--name", "with")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    status, _, complained = run(data, "--predictions", stored, "--name", "without")
    drawn = {path.name for path in (tmp_path / "work/runs/eval/with").iterdir()}
    left = {path.name for path in (tmp_path / "work/runs/eval/without").iterdir()}
    assert drawn - left == {"precision_recall.png", "confusion.png"}
    assert status == 0
    assert complained.strip() == 'gdino eval: Plots need matplotlib; pip install "gdino-hf[train]"'


def test_earlier_results_are_never_overwritten(data, tmp_path):
    stored = perfect(data, tmp_path / "p.jsonl")
    for _ in range(3):
        assert run(data, "--predictions", stored, "--name", "same")[0] == 0
    folders = sorted(path.name for path in (tmp_path / "work/runs/eval").iterdir())
    assert folders == ["same", "same-2", "same-3"]
    assert new_run_folder("eval", "same", tmp_path / "work" / "runs").name == "same-4"


def test_images_without_prediction_are_not_judged_and_that_is_said(data, tmp_path):
    stored = perfect(data, tmp_path / "p.jsonl", of=slice(0, 3))
    status, printed, _ = run(data, "--predictions", stored)
    assert (status, metrics(tmp_path / "work/runs/eval/val")["images"]) == (0, 3)
    assert "3 images judged of 4" in printed


def test_an_unreadable_image_is_named_skipped_and_listed(data, tiny_folder, tmp_path):
    (data.parent / "images" / "1.png").write_bytes(b"no picture")
    (data.parent / "images" / "2.png").unlink()
    status, printed, complained = run(data, "--model", tiny_folder)
    report = metrics(tmp_path / "work/runs/eval/val")
    assert status == 1
    assert [item["image_id"] for item in report["failed"]] == [6, 7]
    assert report["images"] == 2
    assert "1.png" in complained
    assert "2.png" in complained
    assert "2 images judged of 4; 2 could not be used" in printed


def test_a_stopped_run_goes_on_in_its_folder(data, tiny_folder, tmp_path):
    assert run(data, "--model", tiny_folder, "--limit", 2, "--name", "r")[0] == 0
    folder = tmp_path / "work/runs/eval/r"
    # As SIGKILL leaves it: in the middle of a line.
    stored = folder / "predictions.jsonl"
    stored.write_bytes(stored.read_bytes()[:-30])
    assert run(data, "--model", tiny_folder, "--resume", folder)[0] == 0
    assert run(data, "--model", tiny_folder, "--name", "whole")[0] == 0
    resumed, whole = metrics(folder), metrics(folder.with_name("whole"))
    assert resumed["images"] == 4
    assert resumed["metrics"] == pytest.approx(whole["metrics"])
    status, _, complained = run(data, "--model", tiny_folder, "--resume", folder, "--score", "max")
    assert status == 2
    assert "another score" in complained


def test_only_some_labels(data, tiny_folder, tmp_path):
    assert run(data, "--model", tiny_folder, "--labels", "dog, bird")[0] == 0
    report = metrics(tmp_path / "work/runs/eval/val")
    assert list(report["labels"]) == ["dog", "bird"]
    assert report["labels"]["dog"]["boxes"] == 2
    assert report["labels"]["bird"]["AP"] == -1.0


def test_lvis_is_recognized_and_has_its_groups(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "set", lvis=True)
    status, printed, _ = run(data, "--predictions", perfect(data, tmp_path / "p.jsonl"))
    report = metrics(tmp_path / "runs/eval/val")
    assert (status, report["protocol"]) == (0, "lvis")
    assert {name: report["metrics"][name] for name in ("AP", "APr", "APc", "APf")} == pytest.approx(
        {"AP": 1.0, "APr": 1.0, "APc": -1.0, "APf": 1.0}
    )
    assert report["labels"]["cat"]["frequency"] == "rare"
    assert "APc" in printed
    assert run(data, "--model", tiny_folder, "--name", "tiny")[0] == 0
    assert metrics(tmp_path / "runs/eval/tiny")["settings"]["labels_per_prompt"] == 80


def test_a_table_of_data_sets_ends_in_their_average(data, tiny_folder, tmp_path):
    write_data(tmp_path / "other")
    table = tmp_path / "sets.yaml"
    table.write_text(
        "- {name: one, annotations: set/val.json, prompts: {cat: small cat}}\n"
        "- {name: two, annotations: other/val.json}\n"
        "- {name: gone, annotations: nowhere.json}\n"
    )
    status, printed, complained = run("--table", table, "--model", tiny_folder)
    folder = tmp_path / "work/runs/eval/sets"
    report = json.loads((folder / "table.json").read_text())
    assert status == 1
    assert list(report["data sets"]) == ["one", "two"]
    assert "nowhere.json" in report["failed"]["gone"]
    assert "gone" in complained
    mean = sum(row["AP"] for row in report["data sets"].values()) / 2
    assert report["average"]["AP"] == pytest.approx(mean)
    assert metrics(folder / "one")["settings"]["prompts"] == ["small cat", "dog"]
    lines = list(csv.reader((folder / "table.csv").open()))
    assert [line[0] for line in lines] == ["data set", "one", "two", "average"]
    assert "average of 2 of 3" in printed


@pytest.mark.parametrize(("protocol", "metric"), [("auto", "recall@1 any-box"), ("referring", "accuracy")])
def test_captions_are_judged_by_their_phrases(data, tiny_folder, tmp_path, protocol, metric):
    pytest.importorskip("gdino_hf.data.formats")
    lines = [
        {
            "filename": f"{number}.png",
            "width": 200,
            "height": 100,
            "grounding": {
                "caption": "a cat left the dog",
                "regions": [{"bbox": [10, 10, 70, 50], "phrase": "a cat", "tokens_positive": [[0, 5]]}],
            },
        }
        for number in range(3)
    ]
    captions = tmp_path / "set" / "captions.jsonl"
    captions.write_text("\n".join(map(json.dumps, lines)) + "\n")
    status, printed, _ = run(captions, "--model", tiny_folder, "--protocol", protocol)
    report = metrics(tmp_path / "work/runs/eval/captions")
    assert (status, report["images"]) == (0, 3)
    assert 0 <= report["metrics"][metric] <= 1
    assert metric.split()[0] in printed
    stored = tmp_path / "work/runs/eval/captions/predictions.jsonl"
    assert run(captions, "--predictions", stored, "--protocol", protocol, "--name", "again")[0] == 0
    status, _, complained = run(captions, "--model", tiny_folder, "--protocol", protocol, "--nms", "0.5")
    assert status == 2
    assert "--nms is for data with labels" in complained
    assert metrics(tmp_path / "work/runs/eval/again")["metrics"] == report["metrics"]


def test_suppression_follows_the_option_or_else_the_processor(data, tiny_folder, tiny_processor, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_folder, own)
    GDinoProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, nms_threshold=0.0).save_pretrained(own)

    def number_of_boxes(name, *options):
        assert run(data, "--name", name, *options)[0] == 0
        lines = (tmp_path / "work/runs/eval" / name / "predictions.jsonl").read_text().splitlines()
        return sum(len(json.loads(line).get("scores", ())) for line in lines)

    every = number_of_boxes("plain", "--model", tiny_folder)
    fewer = number_of_boxes("option", "--model", tiny_folder, "--nms", "0")
    assert 0 < fewer < every
    assert number_of_boxes("own", "--model", own) == fewer
    assert number_of_boxes("every", "--model", own, "--nms", "1") == every
    assert metrics(tmp_path / "work/runs/eval/own")["settings"]["nms_threshold"] == 0


def test_detections_in_odvg_lines_are_judged_as_boxes(data, tiny_folder, tmp_path):
    pytest.importorskip("gdino_hf.data.formats")
    truth = coco_ground_truth(data)
    lines = [
        {
            "filename": f"{number}.png",
            "width": 200,
            "height": 100,
            "detection": {
                "instances": [
                    {"bbox": box, "label": int(label), "category": NAMES[label]}
                    for box, label in zip(reference["boxes"].tolist(), reference["labels"], strict=True)
                ]
            },
        }
        for number, reference in enumerate(truth.references.values())
    ]
    path = tmp_path / "set" / "val.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run(path, "--model", tiny_folder, "--name", "odvg")[0] == 0
    assert run(data, "--model", tiny_folder, "--name", "coco")[0] == 0
    odvg, coco = (metrics(tmp_path / "work/runs/eval" / name)["metrics"] for name in ("odvg", "coco"))
    assert odvg == pytest.approx(coco)


def test_a_photograph_missing_from_odvg_lines_is_named_and_skipped(data, tiny_folder, tmp_path):
    line = {"width": 200, "height": 100, "detection": {"instances": [{"bbox": [1, 2, 9, 9], "category": "cat"}]}}
    path = tmp_path / "set" / "val.jsonl"
    path.write_text("".join(json.dumps({"filename": name, **line}) + "\n" for name in ("0.png", "gone.png")))
    status, printed, complained = run(path, "--model", tiny_folder)
    assert (status, "gone.png" in complained) == (1, True)
    assert "1 image judged of 2; 1 could not be used" in printed


def test_a_folder_is_judged_by_its_validation_part(data, tmp_path):
    other = {**json.loads(data.read_text()), "images": [{"id": 99, "file_name": "9.png", "width": 9, "height": 9}]}
    (data.parent / "train.json").write_text(json.dumps({**other, "annotations": []}))
    assert run(data.parent, "--predictions", perfect(data, tmp_path / "p.jsonl"))[0] == 0
    assert metrics(tmp_path / "work/runs/eval/set")["images"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(data, tiny_folder, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "predictions.jsonl").symlink_to("/dev/full")
    status, _, complained = run(data, "--model", tiny_folder, "--resume", folder)
    assert status == 1
    assert "No space left" in complained.splitlines()[-1]
    assert "Traceback" not in complained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give DATA or --table"),
        (["{data}", "--table", "x.yaml"], "give DATA or --table"),
        (["no/such.json"], "does not exist"),
        (["{data}", "--predictions", "no/such.jsonl"], "cannot be read as predictions"),
        (["{data}", "--predictions", "{data}"], "not a prediction file"),
        (["{data}", "--predictions", "x", "--labels", "cat"], "exclude each other"),
        (["{data}", "--predictions", "x", "--nms", "0"], "exclude each other"),
        (["{data}", "--labels", "zebra"], "has nothing of --labels zebra"),
        (["{data}", "--protocol", "lvis"], "no neg_category_ids or neg_names"),
        (["{data}", "--protocol", "phrases"], "no captions"),
        (["{data}", "--resume", "."], "holds no predictions.jsonl"),
        (["{data}", "--model", "no/such-model"], "cannot be loaded"),
        (["{data}", "--name", "a/b", "--model", "{model}"], "--name"),
        (["--table", "no/such.yaml"], "cannot be read as YAML"),
        (["{data}", "--limit", "0"], "'0' is not a whole number"),
        (["{data}", "--nms", "2"], "'2' is not a number from 0 to 1"),
        (["{data}", "--threshold", "2"], "'2' is not a number from 0 to 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(data, tiny_folder, arguments, message):
    arguments = [argument.format(data=data, model=tiny_folder) for argument in arguments]
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        try:
            status = main(["eval", *arguments])
        except SystemExit as ended:
            status = ended.code
    assert status == 2
    last = complained.getvalue().strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in complained.getvalue()


def test_damaged_data_is_one_line(data, tmp_path):
    content = json.loads(data.read_text())
    for damaged in ({}, {**content, "images": []}, {**content, "categories": [{"name": "cat"}]}, [1, 2]):
        path = tmp_path / "damaged.json"
        path.write_text(json.dumps(damaged))
        status, _, complained = run(path)
        assert status == 2
        assert complained.count("\n") == 1
        assert "damaged.json" in complained
