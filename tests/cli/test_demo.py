"""`gdino demo`: mistakes are one line and status 2, and the page is the Space's folder."""

import contextlib
import io
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from fresh_python import COMMAND
from gdino_hf.cli import main

pytest.importorskip("gradio", reason="the page needs gradio (the demo extra)")


def run(*arguments):
    """Status and complaint."""
    complained = io.StringIO()
    with contextlib.redirect_stderr(complained):
        try:
            status = main(["demo", *arguments])
        except SystemExit as stop:
            status = stop.code
    return status, complained.getvalue()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/such/model/anywhere"], "--model no/such/model/anywhere cannot be loaded"),
        (["--model", "nano", "--model", "no/such/model"], "--model no/such/model cannot be loaded"),
        (["--port", "http"], "'http' is not a port from 1 to 65535"),
        (["--port", "70000"], "'70000' is not a port from 1 to 65535"),
        (["--fetch-ports", "8080", "0"], "'0' is not a port from 1 to 65535"),
        (["--masks", "no/such/segmenter"], "--masks: The segmenter no/such/segmenter cannot be loaded"),
        (["--tighten"], "--tighten is for --masks; give both"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
    ],
)
def test_mistakes_are_one_line(arguments, sentence):
    status, complaint = run(*arguments)
    assert status == 2
    assert sentence in complaint.splitlines()[-1]
    assert "Traceback" not in complaint


def test_further_ports_are_passed_to_the_page(monkeypatch):
    from gdino_hf.cli import demo

    seen = []

    class Page:
        """Stands in for the page, which would serve until it is stopped."""

        def __init__(self, detectors, segmenters, mcp):
            seen.append(os.environ.get("GDINO_DEMO_PORTS"))

        def launch(self, **options):
            pass

        close = launch

    monkeypatch.setattr(demo, "_page_class", lambda: Page)
    monkeypatch.setattr(demo, "load_detector", lambda *_, **__: None)
    # Set first, so that the variable is removed again after the test.
    monkeypatch.setenv("GDINO_DEMO_PORTS", "")
    monkeypatch.delenv("GDINO_DEMO_PORTS")
    assert run() == (0, "")
    assert run("--fetch-ports", "8080", "8443") == (0, "")
    assert seen == [None, "8080 8443"]


def test_without_gradio_the_remedy_is_named(tmp_path, fresh_python):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\", name='gradio')")
    done = fresh_python.run(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{COMMAND}", "demo")
    assert done.returncode == 2
    assert 'the page needs gradio; install it with pip install "gdino-hf[demo]"' in done.stderr


def test_two_models_are_served_under_names_without_paths(tiny_folder, tmp_path, fresh_python):
    from gradio_client import Client

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, complaint = run("--model", str(tiny_folder), "--port", str(port))
        assert status == 2
        assert complaint.splitlines()[-1].endswith(f"--port {port} is taken or not allowed here; choose another")
    options = ["--model", tiny_folder, "--model", "nano", "--port", port]
    server = fresh_python.start(COMMAND, "demo", *options, environment={"TMPDIR": str(tmp_path)})
    try:
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 120
        while True:
            assert server.runs(), (server.folder / "err").read_text()
            assert time.monotonic() < deadline, (server.folder / "err").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            time.sleep(0.2)
        described = Client(address, verbose=False).view_api(return_format="dict")["named_endpoints"]["/detect"]
        (model,) = (each for each in described["parameters"] if each["parameter_name"] == "model")
        assert model["parameter_default"] == Path(tiny_folder).name
        assert "nano" in model["type"]["enum"]
        assert str(Path(tiny_folder).parent) not in str(described)
    finally:
        os.kill(server.number, signal.SIGTERM)
        server.wait()
