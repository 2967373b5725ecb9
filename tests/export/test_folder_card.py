"""The card of an exported folder: its Python block runs as it stands, without PyTorch where the format allows it."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from gdino_hf.export.folder_card import card
from runtime.tiny_exports import write_export

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OTHER = {"opset": 20, "precision": "float32", "gdino_hf_version": "1", "graphs": {}, "figures": {}}


@pytest.mark.parametrize("variant", ["whole", "baked"])
def test_the_block_of_the_card_runs(variant, tmp_path, monkeypatch):
    folder = write_export(tmp_path / "path/of/this/folder", variant)
    text = card(json.loads((folder / "gdino_export.json").read_text()) | OTHER)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert block.startswith("from gdino_hf.runtime import Detector\n")
    Image.new("RGB", (64, 48), (200, 200, 200)).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["found"].names == (("cat", "cup") if variant == "baked" else ("cat", "remote control"))


def test_a_format_that_needs_pytorch_has_the_packages_detector(tmp_path):
    document = json.loads((write_export(tmp_path / "folder") / "gdino_export.json").read_text())
    text = card(document | OTHER | {"format": "executorch", "opset": None})
    assert "from gdino_hf import Detector" in text
    assert "without PyTorch" not in text
