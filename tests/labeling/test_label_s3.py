"""Labelling from an S3 on this machine: the rows of a run over the same files here."""

import pytest

from label_command import make_pictures, rows, run_label

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


@pytest.fixture
def bucket(monkeypatch):
    """An address of an empty bucket, and a file system for it."""
    import fsspec

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("photos-of-a-test")
    yield "s3://photos-of-a-test", system
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_pictures_in_a_bucket_give_the_rows_of_files_here(label_model, tmp_path, bucket):
    address, system = bucket
    folder = make_pictures(tmp_path / "photos", 12)
    system.put(f"{folder}/", f"{address}/photos/", recursive=True)
    run_label(label_model, tmp_path / "here", folder)
    status, _, said = run_label(label_model, tmp_path / "there", f"{address}/photos")
    assert status == 0, said

    def renamed(out, root):
        return sorted(
            (row["source"].removeprefix(root), row["boxes"], row["scores"], row["labels"]) for row in rows(out)
        )

    assert renamed(tmp_path / "there", f"{address}/photos") == renamed(tmp_path / "here", str(folder))
