"""Labelling with a segmenter: masks depend on the picture alone, whoever makes them, however often a run is killed."""

import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import Detections, Vocabulary
from gdino_hf.labeling.contact_sheet import contact_sheet
from gdino_hf.labeling.label_order import LabelOrder
from gdino_hf.labeling.label_settings import LabelJob, read_manifest, settings_digest
from gdino_hf.labeling.label_store import LabelStore, shard_name
from gdino_hf.labeling.ranks import Ranks
from gdino_hf.labeling.ray_pipeline import RowLabeler
from gdino_hf.labeling.ray_workers import TaskSettings, label_shard, own_variables
from gdino_hf.labeling.shard_files import LabelRow, encode_shard
from gdino_hf.labeling.shard_labels import ShardLabeler
from gdino_hf.labeling.sources import Sources
from gdino_hf.visualize import label_color
from label_command import FORMATS, LABELS, digests, label_all, make_pictures, rows, run_label, start_label
from tiny_segmenters import save_segmenter

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return save_segmenter("sam2", tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty pictures, of which one is damaged; five shards."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures") / "photos", 20)
    next(folder.rglob("00007.*")).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def whole(label_model, segmenter, folder, tmp_path_factory):
    """The folder of an unbroken run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDINO_ARITHMETIC", "fixed")
        label_all(label_model, folder, out, segmenter=segmenter)
    return out


@pytest.mark.parametrize("kind", ["sam2", "sam3_tracker"])
def test_masks_depend_on_the_picture_alone(label_model, folder, tmp_path, kind):
    options = {"threshold": 0.005, "top_k": 5}
    job = LabelJob(str(label_model), "cpu", segmenter=str(save_segmenter(kind, tmp_path)), options=options)
    labeler = ShardLabeler(job, Vocabulary(LABELS))
    items = [item for _, item in Sources([str(folder)]).items()][4:10]
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            found.append(labeler.rows(items))
        alone = [labeler.rows([item])[0] for item in items]
    finally:
        torch.set_num_threads(threads)
    for row, *others in zip(*found, alone, strict=True):
        assert all(row.masks == other.masks and row.error == other.error for other in others)
    assert sum(row.masks is None for row in alone) == 1


def test_a_killed_run_goes_on_and_gives_the_bytes_of_an_unbroken_one(
    label_model, segmenter, folder, whole, tmp_path, context
):
    out = tmp_path / "out"
    process = context.Process(target=label_all, args=(label_model, folder, out, None, None, segmenter))
    process.start()
    while not LabelStore(out).names("shards"):
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    label_all(label_model, folder, out, segmenter=segmenter)
    assert digests(out) == digests(whole)


@pytest.mark.soak
def test_two_killed_workers_and_the_one_that_goes_on_give_the_bytes_of_one_process(
    label_model, segmenter, folder, whole, tmp_path
):
    out = tmp_path / "out"
    options = ("--batch", "2", "--nms", "1", "--device", "cpu", "--masks", segmenter, "--format", *FORMATS)
    process = start_label(label_model, out, folder, *options, "--workers", "2", shard=4)
    while not LabelStore(out).names("shards"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    status, _, said = run_label(label_model, out, folder, *options, shard=4)
    assert status == 1, said
    assert digests(out) == digests(whole)


def test_ranks_give_the_bytes_of_one_process(label_model, segmenter, folder, whole, tmp_path, context):
    processes = [
        context.Process(target=label_all, args=(label_model, folder, tmp_path / "out", Ranks(rank, 2), None, segmenter))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert digests(tmp_path / "out") == digests(whole)


def test_a_task_of_a_cluster_gives_the_file_that_a_run_here_writes(
    label_model, segmenter, folder, whole, tmp_path, monkeypatch
):
    # A task sets the variables of its process, here the test's.
    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")
    store = LabelStore(whole)
    manifest = read_manifest(store)["settings"]
    job = LabelJob(
        str(label_model),
        "cpu",
        batch_size=2,
        shard_size=4,
        options={"threshold": 0.005, "nms_threshold": 1.0},
        segmenter=str(segmenter),
    )
    prints = manifest["fingerprint"], manifest["segmenter_fingerprint"]
    order = LabelOrder(job, store.read("vocabulary.safetensors"), settings_digest(manifest), *prints)
    settings = TaskSettings(order, torch.get_num_threads(), own_variables())
    items = [item for _, item in Sources([str(folder)]).items()]
    assert label_shard(settings, items[4:8], ()) == store.read(shard_name(1))
    said = label_shard(replace(settings, order=replace(order, segmenter_fingerprint="0" * 64, settings="x")), items, ())
    assert "are not those of the machine that asks" in said


def test_a_step_of_a_ray_data_pipeline_has_the_masks_of_a_run(label_model, segmenter, folder, whole, monkeypatch):
    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")
    job = LabelJob(
        str(label_model),
        "cpu",
        batch_size=2,
        options={"threshold": 0.005, "nms_threshold": 1.0},
        segmenter=str(segmenter),
    )
    threads = torch.get_num_threads()
    labeler = RowLabeler(job, Vocabulary(LABELS), ("path", "path"), threads, own_variables(), "masks")
    expected = rows(whole)[:4]
    found = labeler({"path": [row["source"] for row in expected]}).to_pylist()
    assert [row["masks"] for row in found] == [row["masks"] for row in expected]


def test_the_contact_sheet_shows_masks(tmp_path):
    Image.new("RGB", (480, 240)).save(tmp_path / "black.png")
    mask = np.zeros((1, 240, 480), dtype=bool)
    mask[:, :, :240] = True
    found = Detections([[0, 0, 480, 240]], [0.9], [0], ("cat",), (480, 240), masks=mask)
    row = LabelRow.of(str(tmp_path / "black.png"), found)
    LabelStore(tmp_path).write(shard_name(0), encode_shard([row], ["cat"], "", masks=True))
    contact_sheet(tmp_path, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        left, right = (sheet.getpixel((6 + x, 6 + 90)) for x in (60, 180))
    assert right == (0, 0, 0)
    assert np.allclose(left, 0.45 * np.array(label_color("cat")), atol=2)


def test_a_data_set_for_the_hub_says_that_it_has_no_masks(label_model, segmenter, folder, whole, tmp_path, hub):
    pytest.importorskip("datasets")
    out = shutil.copytree(whole, tmp_path / "out")
    options = ("--batch", "2", "--nms", "1", "--device", "cpu", "--masks", segmenter)
    status, _, said = run_label(label_model, out, folder, *options, "--push-to-hub", "me/pets", shard=4)
    assert status == 1
    assert "the data set on the Hub has boxes alone; masks are in the shards and formats" in said
    card = hub.files["README.md"].decode()
    digest = read_manifest(LabelStore(whole))["settings"]["segmenter_fingerprint"]
    assert f"masks, which this data set does not hold: `{segmenter}`, SHA-256 of its files `{digest}`" in card
    assert "bounds of the masks" not in card
