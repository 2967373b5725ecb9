"""Results at an address: the bytes of a run into a folder, whenever it is killed and whatever cannot be sent."""

import fsspec
import pytest
from huggingface_hub import constants

from gdino_hf.labeling import remote_results, run_lease
from gdino_hf.labeling.label_run import label_pictures
from gdino_hf.labeling.label_settings import LabelJob
from label_command import digests, errors, label_all, make_pictures, run_label, start_label

# What `label_all` does, as a command.
OPTIONS = ("--batch", "2", "--device", "cpu", "--nms", "1", "--format", "coco", "yolo", "parquet")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keep working folders out of the user's home."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    # Nobody else begins here at the same moment.
    monkeypatch.setattr(run_lease, "_SETTLE", 0.0)
    return tmp_path / "home" / "gdino-labels"


@pytest.fixture
def photos(bucket, tmp_path):
    """An address of 24 pictures in a bucket, of which one is damaged."""
    address, system = bucket
    folder = make_pictures(tmp_path / "photos", 24)
    next(folder.rglob("00007.*")).write_bytes(b"no picture")
    system.put(f"{folder}/", f"{address}/photos/", recursive=True)
    return f"{address}/photos"


def fetched(system, address, folder):
    """The digests of the files at an address."""
    system.invalidate_cache()
    system.get(f"{address}/", f"{folder}/", recursive=True)
    return digests(folder)


def left_here(home):
    """The folders that runs have left on this machine."""
    return [path for path in home.iterdir() if path.is_dir()]


def test_a_bucket_in_and_out_gives_the_bytes_of_a_folder(label_model, tmp_path, bucket, photos, home):
    address, system = bucket
    label_all(label_model, photos, tmp_path / "here")
    summary = label_all(label_model, photos, f"{address}/labels/")
    assert fetched(system, f"{address}/labels", tmp_path / "got") == digests(tmp_path / "here")
    assert len(errors(tmp_path / "got")) == 1
    assert (summary.folder, summary.failed) == (f"{address}/labels", 1)
    assert summary.formats["coco"] == f"{address}/labels/coco.json"
    assert left_here(home) == []
    # Another format of the finished run, without the model.
    status, printed, said = run_label(label_model, f"{address}/labels", photos, *OPTIONS[:-3], "voc", shard=4)
    assert status == 1, said
    assert f"voc: {address}/labels/voc" in printed
    system.invalidate_cache()
    assert system.exists(f"{address}/labels/voc")


def test_a_killed_run_goes_on_from_another_machine(label_model, tmp_path, bucket, photos):
    address, system = bucket
    label_all(label_model, photos, tmp_path / "here")
    environment = {"HF_HOME": str(tmp_path / "elsewhere")}
    process = start_label(label_model, f"{address}/labels", photos, *OPTIONS, shard=4, environment=environment)
    while True:
        assert process.poll() is None, process.communicate()
        system.invalidate_cache()
        if [name for name in system.find(f"{address}/labels") if "/shards/" in name]:
            break
    process.kill()
    process.communicate()
    names = {name.partition("/labels/")[2] for name in system.find(f"{address}/labels")}
    # What shards were made with is there before the first of them.
    assert {"manifest.json", "vocabulary.safetensors"} <= names
    assert b'"finished": false' in system.cat_file(f"{address}/labels/manifest.json")
    before = {name for name in names if name.startswith("shards/")}
    # A shard that a file system without whole files holds a part of is made again.
    torn = f"{address}/labels/{min(before)}"
    system.pipe_file(torn, system.cat_file(torn)[:-9])
    status, _, said = run_label(label_model, f"{address}/labels", photos, *OPTIONS, shard=4)
    assert status == 1, said
    assert fetched(system, f"{address}/labels", tmp_path / "got") == digests(tmp_path / "here")


def test_what_cannot_be_sent_is_kept_and_sent_by_the_same_command(
    label_model, tmp_path, bucket, photos, home, monkeypatch
):
    address, system = bucket
    label_all(label_model, photos, tmp_path / "here")
    own = type(system)._put_file

    async def broken(self, local, remote, **options):
        if "/shards/" in remote:
            raise OSError("the network is down")
        await own(self, local, remote, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "_put_file", broken)
        # Instances keep the methods that their class had when they were made.
        type(system).clear_instance_cache()
        status, _, said = run_label(label_model, f"{address}/labels", photos, *OPTIONS, shard=4)
        type(system).clear_instance_cache()
    assert status == 1
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert f"the results cannot be sent to {address}/labels (the network is down); they are in {home}" in last
    assert b'"finished": false' in system.cat_file(f"{address}/labels/manifest.json")
    status, _, said = run_label(label_model, f"{address}/labels", photos, *OPTIONS, shard=4)
    assert status == 1
    assert "all pictures were labelled before" in said
    assert fetched(system, f"{address}/labels", tmp_path / "got") == digests(tmp_path / "here")
    assert left_here(home) == []


def test_what_a_removed_run_left_here_does_not_count(label_model, tmp_path, bucket, photos):
    address, system = bucket
    with pytest.raises(ZeroDivisionError):
        label_all(label_model, photos, f"{address}/labels", after=1)
    system.rm(f"{address}/labels", recursive=True)
    job = LabelJob(str(label_model), "cpu")
    assert label_pictures([photos], "cat", f"{address}/labels", job=job).pictures == 24
    with pytest.raises(ValueError, match=rf"^{address}/labels holds labels that were made with another vocabulary"):
        label_pictures([photos], "dog", f"{address}/labels", job=job)


def test_an_address_that_another_machine_works_for_is_refused_until_it_falls_silent(
    label_model, tmp_path, bucket, photos, monkeypatch
):
    address, system = bucket
    owner = f"{address}/labels/{run_lease.LEASE}"
    system.pipe_file(owner, b'{"token": "other", "host": "elsewhere", "machine": "00000000", "process": 1}')
    monkeypatch.setattr(run_lease, "_LOOK", 0.01)

    def changes(line):
        system.pipe_file(owner, b'{"token": "other", "host": "elsewhere", "number": 2}')

    refused = pytest.raises(ValueError, match=f"^Another run on elsewhere is at work in {address}/labels; wait for it")
    with refused, remote_results.working_folder(f"{address}/labels", changes):
        pytest.fail("it was taken")
    monkeypatch.setattr(run_lease, "_SILENCE", 0.05)
    assert label_all(label_model, photos, f"{address}/labels").pictures == 24
    system.invalidate_cache()
    names = {name.rpartition("/")[2] for name in system.find(f"{address}/labels")}
    assert "manifest.json" in names
    assert not any(name.startswith(".") for name in names)


def test_file_systems_that_show_parts_of_files_get_them_under_another_name(tmp_path, monkeypatch):
    folder, out = tmp_path / "here", tmp_path / "there"
    (folder / "shards").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"finished": false, "settings": {}}')
    (folder / "shards" / "00000000.parquet").write_bytes(b"a shard")
    (folder / ".unfinished").write_bytes(b"no result")
    remote = remote_results.RemoteFolder(f"local://{out}", folder, print)
    remote.check()
    remote.start()
    remote.finish()
    assert digests(out) == {name: digest for name, digest in digests(folder).items() if not name.startswith(".")}
    (folder / "shards" / "00000000.parquet").write_bytes(b"a shard, changed")
    again = remote_results.RemoteFolder(f"local://{out}", folder, print)
    seen = []
    own = type(fsspec.filesystem("local")).mv
    monkeypatch.setattr(
        type(fsspec.filesystem("local")), "mv", lambda self, *names, **more: (seen.append(names), own(self, *names))[1]
    )
    again.start()
    again.finish()
    assert (out / "shards" / "00000000.parquet").read_bytes() == b"a shard, changed"
    assert all(source.rpartition("/")[2].startswith(".") for source, _ in seen)


def test_what_cannot_be_used_is_one_sentence(label_model, tmp_path, bucket, photos):
    address, _ = bucket
    for out, options, message in (
        ("s3://no-such-bucket/labels", (), "s3://no-such-bucket/labels cannot be written"),
        ("nosuch://bucket/labels", (), "nosuch://bucket/labels cannot be used for results (Protocol not known"),
        (f"{address}/labels", ("--push-to-hub", "me/set"), "which must be a folder and no address"),
        (f"{address}/photos", (), "is one of the sources; choose another place for the results"),
    ):
        status, _, said = run_label(label_model, out, photos, *options)
        assert status == 2
        assert message in said
        assert said.count("\n") == 1
