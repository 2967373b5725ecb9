"""Labelling on a Ray cluster of two machines in one: killed processes and a lost machine change no byte."""

import importlib.util
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from gdino_hf.labeling.label_order import LabelOrder
from gdino_hf.labeling.label_run import label_pictures
from gdino_hf.labeling.label_settings import LabelJob, read_manifest, settings_digest
from gdino_hf.labeling.label_store import LabelStore, shard_name
from gdino_hf.labeling.ray_workers import RayCluster, TaskSettings, label_shard, own_variables
from gdino_hf.labeling.sources import Sources
from label_command import HANGS, LABELS, digests, errors, label_all, make_pictures, run_label, start_label

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def folder(tmp_path):
    """Forty-eight pictures, of which one is damaged."""
    folder = make_pictures(tmp_path / "photos", 48)
    file = next(folder.rglob("00007.*"))
    file.write_bytes(file.read_bytes()[:80])
    return folder


def working():
    """The processes of a cluster on this computer that label a shard now."""
    import psutil

    return [each for each in psutil.process_iter(["cmdline"]) if "label_shard" in " ".join(each.info["cmdline"] or ())]


def await_shards(process, out, number):
    while len(LabelStore(out).names("shards")) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@needs_ray
@pytest.mark.soak
def test_a_killed_process_and_a_lost_machine_change_no_byte(label_model, folder, tmp_path, cluster):
    options = ("--batch", "2", "--device", "cpu", "--format", "coco", "yolo", "parquet")
    start_label(label_model, tmp_path / "whole", folder, *options, shard=4).communicate()
    out = tmp_path / "out"
    process = start_label(label_model, out, folder, *options, "--ray", cluster.address, shard=4)
    await_shards(process, out, 2)
    while not (found := working()):
        assert process.poll() is None, process.communicate()
    found[0].send_signal(signal.SIGKILL)
    await_shards(process, out, 4)
    cluster.remove_node(cluster.second, allow_graceful=False)
    assert process.poll() is None
    printed, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "in 48 pictures" in printed
    assert digests(out) == digests(tmp_path / "whole")
    assert len(errors(out)) == 1


def test_a_task_gives_the_file_that_a_run_here_writes(label_model, folder, tmp_path, monkeypatch):
    # A task sets the variables of its process, here the test's.
    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")
    label_all(label_model, folder, tmp_path / "whole")
    store = LabelStore(tmp_path / "whole")
    manifest = read_manifest(store)
    job = LabelJob(
        str(label_model), "cpu", batch_size=2, shard_size=4, options={"threshold": 0.005, "nms_threshold": 1.0}
    )
    order = LabelOrder(
        job,
        store.read("vocabulary.safetensors"),
        settings_digest(manifest["settings"]),
        manifest["settings"]["fingerprint"],
    )
    settings = TaskSettings(order, torch.get_num_threads(), own_variables())
    items = [item for _, item in Sources([str(folder)]).items()]
    assert label_shard(settings, items[4:8], ()) == store.read(shard_name(1))
    # A process keeps its model until the settings change.
    assert label_shard(settings, items[44:], ()) == store.read(shard_name(11))
    said = label_shard(replace(settings, order=replace(order, fingerprint="0" * 64)), items[:4], ())
    assert "are not those of the machine that asks" in said
    said = label_shard(
        replace(settings, order=replace(order, job=replace(job, model=str(tmp_path / "gone")))), items[:4], ()
    )
    assert said.startswith("a worker on ")


def test_what_a_cluster_cannot_do_is_one_sentence(label_model, folder, tmp_path, monkeypatch):
    for options, message in (
        (("--ray-gpus", "0.5"), "--ray-gpus is for --ray; give both"),
        (("--ray-cpus", "2"), "--ray-cpus is for --ray; give both"),
        (("--ray", "auto", "--ray-gpus", "1.5"), "'1.5' is no share of a GPU"),
    ):
        status, _, said = run_label(label_model, tmp_path / "out", folder, *options)
        assert status == 2
        assert message in said
    # As if it was not installed.
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, said = run_label(label_model, tmp_path / "out", folder, "--ray", "auto")
    assert (status, said.count("\n")) == (2, 1)
    assert 'Working on a cluster needs ray; pip install "gdino-hf[ray]"' in said
    assert not (tmp_path / "out").exists()


def test_a_cluster_has_workers_of_its_own(label_model, folder, tmp_path):
    with pytest.raises(ValueError, match="brings its own workers"):
        label_pictures([folder], LABELS, tmp_path / "out", workers=2, cluster=RayCluster())
    for wrong in ({"workers": 0}, {"cpus": 0}, {"gpus": -1}):
        with pytest.raises(ValueError, match="give"):
            RayCluster(**wrong)
