"""A run labels every picture once, whatever the sources; its files hold what `Detector` finds."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from gdino_hf import Detector, Vocabulary
from gdino_hf.detection import prepared_pictures
from gdino_hf.labeling.label_run import label_pictures
from gdino_hf.labeling.label_settings import LabelJob
from gdino_hf.labeling.shard_labels import ShardLabeler
from gdino_hf.labeling.sources import Sources
from label_command import LABELS, digests, errors, make_pictures, rows


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of several shapes."""
    return make_pictures(tmp_path / "photos", 20)


def test_rows_hold_every_picture_once_with_what_the_detector_finds(label, folder, label_model, tmp_path):
    status, printed, _ = label(folder)
    assert status == 0
    found = rows(tmp_path / "out")
    assert [row["source"] for row in found] == sorted(map(str, folder.rglob("*.*")))
    detector = Detector(str(label_model), device="cpu")
    vocabulary = detector.vocabulary(LABELS)
    for row in found:
        expected = detector(row["source"], vocabulary, threshold=0.005, nms_threshold=0.7)
        assert (row["width"], row["height"]) == expected.size
        # Pictures share forward passes, which changes rounding on some processors.
        np.testing.assert_allclose(np.array(row["boxes"]).reshape(-1, 4), expected.boxes, atol=1e-3)
        np.testing.assert_allclose(row["scores"], expected.scores, atol=1e-5)
        assert row["labels"] == expected.labels.tolist()
        assert row["status"] == ("found" if len(expected) else "nothing")
    boxes = sum(len(row["labels"]) for row in found)
    assert boxes > 20
    assert printed.startswith(f"{boxes:,} boxes in 20 pictures, in {tmp_path / 'out'}")
    assert errors(tmp_path / "out") == {}
    assert not (tmp_path / "out" / "plan").exists()


def test_the_manifest_says_with_what_the_shards_were_made_and_what_they_hold(label, folder, tmp_path):
    label(folder)
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    settings = manifest["settings"]
    assert manifest["finished"] is True
    assert (manifest["shards"], manifest["pictures"], manifest["failed"]) == (3, 20, 0)
    assert [entry["label"] for entry in settings["vocabulary"]["labels"]] == ["cat", "remote control", "dog"]
    assert (settings["threshold"], settings["nms_threshold"], settings["shard_size"]) == (0.005, 0.7, 8)
    assert len(settings["fingerprint"]) == 64
    assert settings["sources"] == [str(folder)]
    lines = [json.loads(line) for line in (out / "shards.jsonl").read_text().splitlines()]
    assert [line["pictures"] for line in lines] == [8, 8, 4]
    assert sum(line["boxes"] for line in lines) == manifest["boxes"]
    assert all((out / line["file"]).stat().st_size == line["bytes"] for line in lines)
    assert lines[0]["first"] == rows(out)[0]["source"]


def test_formats_hold_the_boxes_of_the_rows(label, folder, tmp_path):
    names = ("coco", "yolo", "voc", "label-studio", "createml", "odvg", "parquet")
    status, printed, _ = label(folder, "--format", *names)
    out = tmp_path / "out"
    assert status == 0
    found = rows(out)
    coco = json.loads((out / "coco.json").read_text())
    assert [row["file_name"] for row in coco["images"]] == [
        Path(row["source"]).relative_to(folder).as_posix() for row in found
    ]
    boxes = sum(len(row["labels"]) for row in found)
    assert len(coco["annotations"]) == boxes == parquet.read_table(out / "boxes.parquet").num_rows
    odvg = [json.loads(line) for line in (out / "odvg.jsonl").read_text().splitlines()]
    assert [[each["label"] for each in line["detection"]["instances"]] for line in odvg] == [
        row["labels"] for row in found
    ]
    assert json.loads((out / "label_map.json").read_text()) == {"0": "cat", "1": "remote control", "2": "dog"}
    assert len(list((out / "yolo" / "labels").rglob("*.txt"))) == len(list((out / "voc").rglob("*.xml"))) == 20
    assert len(json.loads((out / "labelstudio.json").read_text())) == 20
    assert f"these files name pictures by their paths inside {folder}" in printed


def test_pictures_without_a_find_are_left_out_of_formats_on_request(label, folder, tmp_path):
    label(folder, "--threshold", "0.9985", "--format", "coco")
    out = tmp_path / "out"
    empty = {row["source"] for row in rows(out) if row["status"] == "nothing"}
    assert 0 < len(empty) < 20
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 20
    label(folder, "--threshold", "0.9985", "--format", "coco", "--drop-empty")
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 20 - len(empty)
    assert len(rows(out)) == 20


def test_formats_of_a_finished_run_are_written_without_the_model(label, folder, tmp_path, monkeypatch):
    label(folder)
    before = digests(tmp_path / "out")
    monkeypatch.setattr(Detector, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    status, _, said = label(folder, "--format", "yolo")
    after = digests(tmp_path / "out")
    assert status == 0
    assert said == "label: all pictures were labelled before; those that came later need another folder\n"
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) >= {"yolo/data.yaml"}


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_two_processes_give_the_bytes_of_one(label_model, folder, tmp_path, batch):
    job = LabelJob(
        str(label_model), "cpu", batch_size=batch, shard_size=4, options={"threshold": 0.005, "nms_threshold": 1.0}
    )
    for workers in (1, 2):
        label_pictures([folder], LABELS, tmp_path / f"{workers}", job=job, formats=["coco", "yolo"], workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_the_number_of_threads_changes_no_byte(label_model, example_folder, tmp_path, model):
    threads = torch.get_num_threads()
    name, threshold = ("nano", 0.1) if model == "nano" else (str(label_model), 0.005)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            job = LabelJob(name, "cpu", options={"threshold": threshold})
            summary = label_pictures([example_folder], "cat, cup, person", tmp_path / f"{number}", job=job)
    finally:
        torch.set_num_threads(threads)
    assert summary.boxes > 3
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


def test_the_arithmetic_is_chosen_by_a_rule_and_not_by_a_measurement(label_model, folder, tmp_path, monkeypatch):
    """Processes whose measurements differ would choose kinds of products that round differently."""
    monkeypatch.delenv("GDINO_ARITHMETIC")
    monkeypatch.setattr("gdino_hf.inference.arithmetic.product_speeds", lambda: pytest.fail("it was measured"))
    label_pictures([folder], "cat", tmp_path / "out", job=LabelJob(str(label_model), "cpu"))
    assert "GDINO_ARITHMETIC" not in os.environ


def test_batches_find_what_single_pictures_give(label_model, folder, tmp_path):
    for batch in (1, 4):
        job = LabelJob(str(label_model), "cpu", batch_size=batch, options={"threshold": 0.005, "nms_threshold": 1.0})
        label_pictures([folder], LABELS, tmp_path / f"{batch}", job=job)
    for one, four in zip(rows(tmp_path / "1"), rows(tmp_path / "4"), strict=True):
        # Kernels of other shapes add in another order: the tolerance of batches everywhere in this package.
        assert np.allclose(sorted(one["scores"]), sorted(four["scores"]), atol=1e-4)


def test_small_pictures_of_one_size_share_a_pass_without_padding(label_model, tmp_path, monkeypatch):
    folder = make_pictures(tmp_path / "photos", 24)
    items = [item for _, item in Sources([str(folder)]).items()]
    found, passes = [], []
    for pad, most in ((False, 10**6), (False, 7_000), (True, 10**6)):
        monkeypatch.setattr(prepared_pictures, "_SMALL_PIXELS", most)
        job = LabelJob(
            str(label_model), "cpu", batch_size=4, pad=pad, options={"threshold": 0.005, "nms_threshold": 1.0}
        )
        labeler = ShardLabeler(job, Vocabulary(LABELS))
        run, sizes = labeler._run, []

        def noted(batch, run=run, sizes=sizes):
            sizes.append([picture.image.size for picture in batch])
            return run(batch)

        monkeypatch.setattr(labeler, "_run", noted)
        found.append(labeler.rows(items))
        passes.append(sizes)
    assert all(len(set(sizes)) == 1 for sizes in passes[0] + passes[1])
    assert max(map(len, passes[0])) == 4
    # Pictures that are too large to share a pass do not wait for each other.
    assert all(len(sizes) == 1 for sizes in passes[1])
    assert [row.source for row in found[1]] == [item.source for item in items]
    for one, other in zip(found[0], found[1], strict=True):
        assert one.found.labels.tolist() == other.found.labels.tolist()
        np.testing.assert_allclose(one.found.scores, other.found.scores, atol=1e-5)


def test_damaged_and_foreign_files_are_errors_with_their_reason(label, folder, tmp_path):
    (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:60])
    (folder / "empty.jpg").touch()
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "notes.csv").write_text("1")
    status, printed, said = label(folder, "--format", "coco")
    out = tmp_path / "out"
    assert status == 1
    assert set(errors(out)) == {str(folder / name) for name in ("00003.png", "empty.jpg", "drawing.svg", "gone.jpg")}
    assert "which is not read here" in errors(out)[str(folder / "drawing.svg")]
    assert "this link leads nowhere" in errors(out)[str(folder / "gone.jpg")]
    assert len(rows(out)) == 23
    assert "4 could not be used; errors.parquet says why" in printed
    assert f"{folder}: 1 file left out: 1 is not a picture" in said
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 19


def test_names_of_every_kind_are_kept(label, tmp_path):
    folder = tmp_path / "photos"
    picture = Image.effect_noise((60, 60), 50).convert("RGB")
    long = "ü" * 123 + ".png"
    for name in (
        "a/same.jpg",
        "b/same.jpg",
        "猫 🐈.png",
        "two\nlines.png",
        long,
        "x" * 246 + ".jpg",
        "x" * 246 + ".png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    picture.save(folder / ("y" * 255), "PNG")
    if os.name == "posix":
        picture.save(os.fsencode(folder) + b"/\xff.jpg")
    status, _, _ = label(folder, "--format", "coco", "yolo", "voc", "odvg")
    out = tmp_path / "out"
    assert status == 0
    names = {row["file_name"] for row in json.loads((out / "coco.json").read_text())["images"]}
    assert {"a/same.jpg", "b/same.jpg", "猫 🐈.png", "two\nlines.png", long, "y" * 255} < names
    assert len(names) == len(rows(out)) == len(list((out / "yolo/labels").rglob("*.txt"))) == 9


def test_tars_parquet_files_lists_and_globs_give_the_rows_of_files(label, label_model, folder, tmp_path):
    files = sorted(folder.glob("*.*"))
    with tarfile.open(tmp_path / "some.tar", "w") as tar, tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as packed:
        for file in files:
            tar.add(file, f"set/{file.name}")
            packed.add(file, file.name)
        tar.addfile(tarfile.TarInfo("set/notes.json"), io.BytesIO())
    table = {"id": list(range(len(files))), "image": [{"bytes": f.read_bytes(), "path": f.name} for f in files]}
    parquet.write_table(arrow.table(table), tmp_path / "some.parquet", row_group_size=5)
    (tmp_path / "list.txt").write_text("\n".join(f"photos/{file.name}" for file in files) + "\n\n")
    expected = None
    for number, source in enumerate(("photos/*.*", "list.txt", "some.tar", "packed.tar.gz", "some.parquet")):
        out = tmp_path / f"out{number}"
        job = LabelJob(str(label_model), "cpu", shard_size=6, options={"threshold": 0.005, "nms_threshold": 1.0})
        summary = label_pictures([tmp_path / source], LABELS, out, job=job)
        assert (summary.pictures, summary.failed) == (len(files), 0)
        found = [{name: row[name] for name in ("width", "scores", "boxes", "labels")} for row in rows(out)]
        expected = expected or found
        assert found == expected, source
    assert rows(tmp_path / "out2")[0]["source"] == f"{tmp_path}/some.tar/set/{files[0].name}"


def test_pictures_that_several_sources_name_are_labelled_once(label, folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{file}\n" for file in folder.glob("*.jpg")))
    label(folder / "00001.png", folder, f"{folder}/*.png", listed, folder / ".." / "photos" / "00003.png")
    sources = [row["source"] for row in rows(tmp_path / "out")]
    assert len(sources) == len(set(sources)) == 20
    assert sources[0] == str(folder / "00001.png")


def test_a_vocabulary_brings_thresholds_for_its_labels(label_model, folder, tmp_path):
    job = LabelJob(str(label_model), "cpu", options={"threshold": 0.005, "nms_threshold": 1.0})
    aliases = {"cat": ["cat", "lion"], "dog": None}
    scores = []
    for name, thresholds in (("all", {}), ("best", {"cat": 0.9, "dog": 0.9})):
        label_pictures([folder], Vocabulary(aliases, thresholds=thresholds), tmp_path / name, job=job)
        scores.append([score for row in rows(tmp_path / name) for score in row["scores"]])
    assert scores[1] == [score for score in scores[0] if score > 0.9]
    assert 0 < len(scores[1]) < len(scores[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there; name a file, a folder, a list, an archive or an address"),
        (["*.nothing"], "matches nothing; quote the pattern, and check it"),
        (["."], "There are no pictures in"),
        (["photos", "--model", "nowhere"], "nowhere cannot be loaded"),
        (["photos", "--device", "nowhere"], "nowhere cannot be used here"),
        (["photos", "--labels", "cat, ?"], "nothing to look for"),
        (["photos", "--batch", "2", "--tiles", "31"], "--tiles 31 is too small"),
        (["photos", "--out", "nosuch://bucket/out"], "cannot be used for results (Protocol not known: nosuch)"),
        (["photos", "--labels", "@photos/00001.png"], "--labels"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(label, folder, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if arguments == ["."] else tmp_path)
    status, _, said = label(*arguments)
    assert status == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_formats_that_cannot_be_written_are_refused_before_the_work(label, folder, tmp_path):
    with pytest.raises(ValueError, match="There is no format 'nothing'"):
        label_pictures([folder], LABELS, tmp_path / "out", formats=["nothing"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "coco.json").mkdir(parents=True)
    status, _, said = label(folder, "--format", "coco")
    assert status == 1
    assert "the results cannot be written (It is a folder: " in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["coco.json"]
