"""Fixtures for bulk labelling: a folder with a random model whose boxes depend on the picture, and the command."""

import functools
import multiprocessing
import os
import uuid

import pytest

from label_command import PACKAGE, run_label
from random_models import make_random_model


@pytest.fixture(autouse=True)
def _same_arithmetic(monkeypatch):
    """Let `Detector` choose the arithmetic as labelling does, so that results can be compared bit by bit."""
    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")


@pytest.fixture(scope="session")
def label_model(tmp_path_factory, tiny_config, tiny_processor):
    """The folder of a tiny random model whose scores and boxes depend on picture and text."""
    folder = tmp_path_factory.mktemp("label-model")
    make_random_model(tiny_config, perturb=lambda name: True).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def label(tmp_path, label_model):
    """`run_label` with that model and a folder of its own."""
    return functools.partial(run_label, label_model, tmp_path / "out")


@pytest.fixture(scope="session")
def context():
    """Processes that begin with the package imported, so that a run begins in a moment."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["gdino_hf.labeling.label_run", "gdino_hf.model.modeling_gdino"])
    return made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two machines of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # With it, Ray writes a token into the home folder.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_enable_metrics_collection", "0")
        # Ray is polite to other processes, and a busy computer would make it wait for long.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")]))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
        try:
            made.second = made.add_node(num_cpus=1, **memory)
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def bucket(monkeypatch):
    """An address of an empty bucket, and a file system for it."""
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
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
    # What the server holds outlives it in this process.
    name = f"test-{uuid.uuid4().hex}"
    system.mkdir(name)
    yield f"s3://{name}", system
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()
