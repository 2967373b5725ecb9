"""Fixtures for all tests: a tiny random model with its own vocabulary, and the folder of shared data."""

from __future__ import annotations

import base64
import gc
import json
import multiprocessing.util
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers use all cores already, so each one and the processes it starts have one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# transformers compiles some 500 expressions whenever a model is loaded or saved; by default `re` keeps 512 in all.
re._MAXCACHE = 8192
# multiprocessing asks for its folder once and keeps it. A test that moves the temporary folder must not be the first to
# start a process: sockets below pytest's long paths cannot be opened.
multiprocessing.util.get_temp_dir()

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GDINO_SHARED", REPOSITORY.parent / "shared"))
REQUIRE_BROWSER = os.environ.get("GDINO_REQUIRE_BROWSER") == "1"
REQUIRE_SHARED = os.environ.get("GDINO_REQUIRE_SHARED") == "1"

WORDS = (
    "cat dog person cup remote control red blue car tree face hat lion table chair bird ball bottle book phone the of "
    "traffic light left right small big cats dogs persons cups"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = ".?,;:!-'\"()[]/&+#"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """If GDINO_REQUIRE_SHARED=1, fail tests that would be skipped because the shared folder is missing."""
    report = yield
    if REQUIRE_SHARED and report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
        if "shared" in reason.lower():
            report.outcome = "failed"
            report.longrepr = f"GDINO_REQUIRE_SHARED=1, yet this test was skipped: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    """Use one thread per test process, since the processes already use all cores."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _collections_leave_out_imports(_one_thread_per_worker):
    """Keep imported objects out of garbage collections, each of which they would make a quarter of a second longer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _files_are_not_flushed_to_disk():
    """Leave out fsync, which protects from power failures: no test can see it, and each call waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _save_nothing_drawn(figure, path):
    """What replaces the saving of a plot: a picture of one pixel."""
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1)).save(path)


@pytest.fixture(scope="session", autouse=True)
def _plots_are_not_rendered():
    """Leave out what takes a third of a short training and of an evaluation; yields the function that renders."""
    from gdino_hf.evaluation import plots

    render = plots._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", _save_nothing_drawn)
        yield render


@pytest.fixture
def rendered_plots(_plots_are_not_rendered, monkeypatch):
    """Render plots, for tests that look at them."""
    from gdino_hf.evaluation import plots

    monkeypatch.setattr(plots, "_save", _plots_are_not_rendered)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files and data beside the repository; without it, tests that need it are skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"shared folder {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def fresh_python():
    """Runs code in processes of their own that start quickly."""
    from fresh_python import fresh_python

    with fresh_python() as python:
        yield python


@pytest.fixture(scope="session")
def example_folder() -> Path:
    """The photographs that ship with the demo."""
    return REPOSITORY / "demo" / "examples"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A BERT word-piece tokenizer of about 150 tokens: some words, single letters and their continuations.

    The special tokens have ids 0 to 4 here instead of BERT's 101, 102, 1012 and 1029, so that code which does not take
    the ids from the tokenizer or the config fails.
    """
    from transformers import BertTokenizerFast

    letters = list(LETTERS)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PUNCTUATION, *letters, *(f"##{x}" for x in letters)]
    tokens += [word for word in dict.fromkeys(WORDS.split()) if word not in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=256)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """Config of a tiny model that has every part of a real one. Copy it before changing it."""
    from gdino_hf.model.configuration_gdino import GDinoConfig
    from tiny_peers import tiny_bert, tiny_swin

    special_tokens = ["[CLS]", "[SEP]", ".", "?"]
    return GDinoConfig(
        backbone_config=tiny_swin(),
        text_config=tiny_bert(len(tiny_tokenizer), max_position_embeddings=256),
        d_model=64,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        num_queries=20,
        num_denoising_queries=10,
        max_text_len=64,
        dropout=0.0,
        fusion_droppath=0.0,
        special_token_ids=tiny_tokenizer.convert_tokens_to_ids(special_tokens),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A random model in eval mode. The whole session shares it, so its weights must not be changed."""
    import copy

    import torch

    from gdino_hf.model.modeling_gdino import GDinoForObjectDetection

    torch.manual_seed(0)
    return GDinoForObjectDetection(copy.deepcopy(tiny_config)).eval()


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer):
    """The processor of the tiny model, for images of 64 pixels."""
    from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
    from gdino_hf.model.processing_gdino import GDinoProcessor

    image_processor = GDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return GDinoProcessor(image_processor=image_processor, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_model, tiny_processor) -> Path:
    """A folder with the saved tiny model and its processor."""
    folder = tmp_path_factory.mktemp("tiny-gdino")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def browser():
    """The installed Chromium. Without one, tests are skipped, or fail if GDINO_REQUIRE_BROWSER is 1."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        message = "there is no Chromium, or no playwright to drive it"
        (pytest.fail if REQUIRE_BROWSER else pytest.skip)(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """Folder for screenshots: GDINO_TEST_ARTIFACTS, or a temporary one."""
    folder = os.environ.get("GDINO_TEST_ARTIFACTS")
    if folder is None:
        return tmp_path_factory.mktemp("artifacts")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


class Hub(BaseHTTPRequestHandler):
    """Handler for the requests to the Hub that an upload of small files makes."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        _, _, name = self.path.partition("/resolve/main/")
        if not name:
            self.answer({"siblings": []})
        elif name in self.server.files:
            self.answer(self.server.files[name], headers={"ETag": '"1"', "X-Repo-Commit": "0" * 40})
        else:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b"".join(self.chunks())
        hub = self.server
        if self.path == "/api/repos/create":
            if hub.forbidden:
                self.answer({"error": "You may not create this"}, 403)
                return
            hub.repositories.append(json.loads(body)["name"])
            self.answer({"url": f"http://{self.headers['Host']}/me/{hub.repositories[-1]}"})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/main" in self.path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"http://{self.headers['Host']}/me/{hub.repositories[-1]}/commit/0"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})
        else:
            self.answer({})

    def chunks(self):
        while size := int(self.rfile.readline() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def answer(self, content, status=200, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def nano_export(tmp_path_factory) -> Path:
    """gdino-nano as an exported folder with one ONNX file; tracing it takes a minute. Do not write to it."""
    from made_once import made_once

    pytest.importorskip("onnxscript")
    from gdino_hf.export import export

    return made_once(tmp_path_factory, "nano-onnx", lambda folder: export("nano", folder))


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A local Hub server; `files` holds the uploaded files, and `repositories` the names of created repositories."""
    from huggingface_hub import constants
    from transformers.utils import hub as transformers_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.repositories, server.forbidden = {}, [], False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    # transformers keeps a client with the previous address.
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
