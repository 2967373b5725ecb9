"""Sources are listed in one order, which goes on behind any picture whatever came or went since."""

import io
import sys
import tarfile

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants
from PIL import Image

from gdino_hf.labeling.shard_labels import PictureReader
from gdino_hf.labeling.source_items import SourceItem
from gdino_hf.labeling.sources import Sources

PNG = io.BytesIO()
Image.new("RGB", (3, 2), "red").save(PNG, "PNG")
PNG = PNG.getvalue()


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def listed(*arguments, after=None, exclude=None):
    return [item.source for _, item in Sources([str(each) for each in arguments], exclude).items(after)]


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    return path


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path):
    names = ["b.png", "a/z.png", "a.png", "a/b/c.png", "é.jpg", "A.png", "c.tar.png"]
    fill(tmp_path, *names)
    assert listed(tmp_path) == [str(path) for path in sorted(tmp_path / name for name in names)]


def test_listing_goes_on_behind_every_picture_when_others_come_and_go(tmp_path):
    fill(tmp_path / "p", "a.png", "b/1.png", "b/2.png", "d.png")
    write_tar(tmp_path / "p" / "c.tar", ["x.png", "y.png"])
    (tmp_path / "list.txt").write_text("p/d.png\nq.png\np/a.png\nr.png\n")
    arguments = [str(tmp_path / "p"), str(tmp_path / "list.txt")]
    pairs = list(Sources(arguments).items())
    keys, items = [key for key, _ in pairs], [item for _, item in pairs]
    assert keys == sorted(keys)
    assert [item.source.rpartition("/")[2] for item in items] == [
        *("a.png", "1.png", "2.png", "x.png", "y.png", "d.png", "q.png", "r.png")
    ]
    for place, key in enumerate(keys):
        assert [item for _, item in Sources(arguments).items(key)] == items[place + 1 :]
    (tmp_path / "p" / "b" / "1.png").unlink()
    fill(tmp_path / "p", "0.png", "b/1-new.png")
    assert [item for _, item in Sources(arguments).items(keys[2])] == items[3:]


def test_results_inside_a_source_are_passed_over_and_a_source_as_results_is_refused(tmp_path):
    fill(tmp_path, "a.png", "out/b.png")
    assert listed(tmp_path, exclude=tmp_path / "out") == [str(tmp_path / "a.png")]
    with pytest.raises(ValueError, match="is one of the sources; choose another folder"):
        Sources([str(tmp_path)], tmp_path)


def test_what_is_no_picture_is_counted_and_an_archive_that_is_none_is_a_fault(tmp_path):
    fill(tmp_path, "a.png", ".hidden/b.png")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "table.parquet").write_bytes(b"no parquet")
    sources = Sources([str(tmp_path)])
    faults = {item.source.rpartition("/")[2]: item.fault for _, item in sources.items()}
    assert faults["a.png"] is None
    assert "the rest of the archive cannot be listed" in faults["broken.tar"]
    assert "the rest of the archive cannot be listed" in faults["table.parquet"]
    assert sources.remarks == [f"{tmp_path}: 2 files left out: 1 is not a picture and 1 is hidden"]


def test_members_of_one_name_have_names_of_their_own(tmp_path):
    archive = write_tar(tmp_path / "a.tar", ["x.png", "./x.png", "sub/x.png"])
    assert listed(archive) == [f"{archive}/{name}" for name in ("x.png", "x#2.png", "sub/x.png")]


def test_addresses_are_listed_and_read_through_fsspec(tmp_path):
    system = fsspec.filesystem("memory")
    for name in ("/set/b.png", "/set/sub/a.png", "/set/readme.md"):
        system.pipe_file(name, PNG)
    system.pipe_file("/set/c.tar", write_tar(tmp_path / "c.tar", ["in.png"]).read_bytes())
    system.pipe_file("/list.txt", b"set/b.png\nmemory://set/sub/a.png\n")
    try:
        found = [item for _, item in Sources(["memory://set"]).items()]
        assert [item.source for item in found] == [
            "memory:///set/b.png",
            "memory:///set/c.tar/in.png",
            "memory:///set/sub/a.png",
        ]
        assert [PictureReader()(item) for item in found] == [PNG] * 3
        assert listed("memory://set/*.png") == ["memory:///set/b.png"]
        again = [item for _, item in Sources(["memory://list.txt"]).items()]
        assert [PictureReader()(item) for item in again] == [PNG] * 2
        with pytest.raises(ValueError, match=r"memory://nothing cannot be listed \(there is nothing at this address\)"):
            list(Sources(["memory://nothing"]).items())
    finally:
        system.rm("/set", recursive=True)
        system.rm("/list.txt")


def test_a_file_system_that_needs_a_library_says_which(monkeypatch):
    # Not s3, which fsspec keeps once another test has used it.
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs://bucket/photos cannot be listed .*gcsfs"):
        list(Sources(["gs://bucket/photos"]).items())


@pytest.mark.parametrize(
    "missing",
    ["pictures", "pictures/", "./a/b", "a/b/", "a/b/c", "a/b.jpg", "a/b.TAR.gz", "a/set.json", "a/data.yaml", "here/b"],
)
def test_a_path_that_is_not_there_is_called_missing(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="is not there; name a file, a folder") as caught:
        Sources([missing]).check()
    assert str(tmp_path / missing) in str(caught.value)
    with pytest.raises(ValueError, match=r"^/no/such is not there"):
        Sources(["/no/such"]).check()


def test_a_name_that_may_be_a_path_or_an_id_is_told_to_be_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sources = Sources(["photos/july"])
    assert sources.arguments == ["hf://datasets/photos/july"]
    sources.check()
    with pytest.raises(
        ValueError, match=r"^photos/july is not there, and as a data set of the Hub it cannot be listed \(.+\)\.$"
    ):
        list(sources.items())


def test_what_a_remote_file_system_raises_is_one_sentence(monkeypatch):
    """Libraries of clouds have errors of their own, for instance for missing credentials."""

    class NoCredentialsError(Exception):
        pass

    def find(self, path, **options):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "find", find)
    with pytest.raises(ValueError, match=r"memory://photos cannot be listed \(Unable to locate credentials\)"):
        list(Sources(["memory://photos"]).items())


def test_an_archive_that_became_shorter_is_an_error_with_its_name(tmp_path):
    archive = write_tar(tmp_path / "a.tar", ["x.png", "y.png"])
    items = [item for _, item in Sources([str(archive)]).items()]
    archive.write_bytes(archive.read_bytes()[:1000])
    read = PictureReader()
    assert read(items[0]) == PNG
    with pytest.raises(OSError, match=r"a\.tar ends before byte \d+; it was changed after it was listed"):
        read(items[1])


def test_items_survive_json():
    for item in (
        SourceItem("/a/\udcff.png"),
        SourceItem("/a.tar/x", ("tar", "/a.tar", 512, 3)),
        SourceItem("b", None, "?"),
    ):
        assert SourceItem.of_json(item.as_json()) == item
