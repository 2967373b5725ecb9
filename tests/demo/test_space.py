"""The demo folder as a Space: it starts on its own, with nothing but what its requirements name."""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "demo"
# Starting loads torch, gradio and the model, which is slow beside other tests.
PATIENCE_SECONDS = 120


@pytest.fixture
def space(tmp_path):
    """A copy of the folder that is pushed to the Hub."""
    folder = tmp_path / "space"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_and_ask(command, folder, tmp_path, **environment):
    """Start a server, detect with it, stop it, and return the labels found and the log."""
    from gradio_client import Client, handle_file

    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GRADIO_TEMP_DIR")},
        "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
        "PYTHONUNBUFFERED": "1", **environment,
    }  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        client = Client(address, verbose=False)
        picture = handle_file(folder / "examples" / "cat.jpg")
        found = client.predict(image=picture, labels="cat", api_name="/detect")
        return [detection["label"] for detection in found["detections"]], log.read_text()
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def closure(requirements):
    """Return the names of all packages that pip would install for some requirements, by the metadata here."""
    names, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        seen = {(name, extra) for extra in ("", *requirement.extras)} - names
        names |= seen
        if not seen:
            continue
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform or Python version
        for line in map(Requirement, further):
            if line.marker is None or any(line.marker.evaluate({"extra": extra}) for _, extra in seen):
                waiting.append(line)
    return {name for name, _ in names}


def test_the_folder_starts_with_its_requirements_alone_and_uses_zero_gpu(space, tmp_path):
    lines = (space / "requirements.txt").read_text().split()
    allowed = closure(line for line in lines if not line.startswith("gdino-hf"))
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    (demo_extra,) = re.findall(r"^demo = \[(.*)\]", pyproject, re.MULTILINE)
    (torch_extra,) = re.findall(r"^torch = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    (core,) = re.findall(r"^dependencies = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    assert any(Requirement(line).name == "gdino-hf" and "demo" in Requirement(line).extras for line in lines)
    assert "gdino-hf[torch]" in demo_extra
    allowed |= closure(
        line for line in re.findall(r'"(.*?)"', demo_extra + torch_extra + core) if not line.startswith("gdino-hf")
    )
    # The test environment has more packages than a Space; their modules are hidden.
    modules = importlib.metadata.packages_distributions()
    hidden = {
        module
        for module, packages in modules.items()
        if not any(re.sub(r"[-_.]+", "-", package).lower() in allowed for package in packages)
    } - {"gdino_hf", "pip", "setuptools", "_distutils_hack"}
    assert {"playwright", "pytest", "skimage"} <= hidden
    # A stand-in for `spaces` on ZeroGPU: a decorator that must be imported before torch.
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "spaces.py").write_text(
        "import sys\nassert 'torch' not in sys.modules\n"
        "def GPU(function):\n    return lambda *args: print('the GPU is asked for', args[0]) or function(*args)\n"
    )
    start = tmp_path / "start.py"
    start.write_text(
        textwrap.dedent(f"""
        import runpy, sys
        from importlib.machinery import PathFinder

        class Visible(PathFinder):
            hidden = {hidden!r}

            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] in cls.hidden else super().find_spec(name, path, target)

        sys.meta_path = [Visible if finder is PathFinder else finder for finder in sys.meta_path]
        sys.path[0] = {str(space)!r}
        sys.path[1:1] = [{str(REPOSITORY / "src")!r}, {str(tmp_path / "zero")!r}]
        runpy.run_path("app.py", run_name="__main__")
        """)
    )
    labels, log = serve_and_ask([sys.executable, str(start)], space, tmp_path)
    assert labels == ["cat"], log
    assert log.count("the GPU is asked for nano") == 1, log


@pytest.mark.environments
def test_it_starts_in_a_clean_environment_with_its_requirements(space, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The checkout replaces the package, which may not be on an index yet.
    text = (space / "requirements.txt").read_text()
    text = re.sub(r"^gdino-hf(\[.*?\])?.*$", rf"{REPOSITORY}\1", text, flags=re.MULTILINE)
    (space / "requirements.txt").write_text(text)
    pip = [python, "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, "-r", space / "requirements.txt"], check=True)
    labels, log = serve_and_ask([str(python), "app.py"], space, tmp_path)
    assert labels == ["cat"], log


def test_the_card_names_existing_files_and_endpoints():
    import gradio
    import yaml

    _, head, text = (DEMO / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["sdk"], card["license"]) == ("gradio", "apache-2.0")
    assert card["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert (DEMO / card["app_file"]).is_file()
    for endpoint in ("/detect", "/detect_url", "/ground", "/batch", "/video", "/compare"):
        assert endpoint in text


def test_every_example_has_its_credit():
    credits = (DEMO / "examples" / "CREDITS.md").read_text()
    for photograph in (DEMO / "examples").glob("*.jpg"):
        assert photograph.name in credits
