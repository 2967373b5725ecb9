"""An actor of a Ray Data pipeline labels pictures in every form that a column may hold."""

from gdino_hf.labeling.label_settings import LabelJob
from gdino_hf.labeling.ray_pipeline import RowLabeler
from gdino_hf.labeling.ray_workers import own_variables
from label_command import LABELS, make_pictures

JOB = {"device": "cpu", "batch_size": 2, "shard_size": 4, "options": {"threshold": 0.005}}


def test_rows_are_paths_bytes_structs_or_arrays(label_model, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    from gdino_hf import Vocabulary

    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")
    path = next(make_pictures(tmp_path, 2).rglob("*.png"))
    pixels = np.array(Image.open(path).convert("RGB"))
    labeler = RowLabeler(LabelJob(str(label_model), **JOB), Vocabulary(LABELS), ("image", "id"), 1, own_variables())
    content = path.read_bytes()
    pictures = [str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, pixels, None]
    table = labeler({"id": np.arange(6), "image": pictures}).to_pylist()
    assert [row["source"] for row in table] == ["0", "1", "2", "3", "4", "5"]
    assert len(table[0]["boxes"]) > 0
    assert all(row["boxes"] == table[0]["boxes"] and row["scores"] == table[0]["scores"] for row in table[:5])
    assert (table[5]["status"], table[5]["error"]) == ("failed", "the row has no picture")
