"""A converted folder is pushed by the Hub's own client, here to a server on this machine that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, original
from synthetic import state_dict

from gdino_hf.cli import main


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files asks for."""

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        self.answer({"siblings": []})

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b"".join(self.chunks())
        hub = self.server
        if self.path == "/api/repos/create":
            if hub.forbidden:
                self.answer({"error": "You may not create this"}, 403)
                return
            hub.repositories.append(json.loads(body)["name"])
            self.answer({"url": f"http://{self.headers['Host']}/me/converted", "id": "me/converted"})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/main" in self.path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"http://{self.headers['Host']}/me/converted/commit/0"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})
        else:
            self.answer({})

    def chunks(self):
        while size := int(self.rfile.readline() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.repositories, server.forbidden = {}, [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()


@pytest.fixture
def command(tiny_tokenizer, tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--push-to-hub", "me/converted"]
    return ["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours"), *options]


def test_everything_is_pushed_with_a_card_that_names_source_licence_and_conversion(hub, command, tmp_path, capsys):
    assert main(command) == 0
    assert "pushed: " in capsys.readouterr().out
    assert hub.repositories == ["converted"]
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "theirs.pth" in card
    assert "gdino convert" in card


def test_a_hub_that_refuses_leaves_the_converted_folder_and_says_so(hub, command, tmp_path, capsys):
    hub.forbidden = True
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "is converted but not pushed" in error
    assert "me/converted" in error
    assert (tmp_path / "ours" / "model.safetensors").is_file()
