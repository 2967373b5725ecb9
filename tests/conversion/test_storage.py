"""Files are written tensor by tensor, and completely or not at all."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, original
from synthetic import assert_same, state_dict

from gdino_hf import GDinoForObjectDetection
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import Options, convert
from gdino_hf.conversion.plan import Step
from gdino_hf.conversion.storage import staged, write_safetensors


def test_written_files_read_back_in_every_dtype(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "double": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "transposed": torch.randn(3, 5, generator=generator).T,
        "half": torch.randn(7, generator=generator).half(),
        "bfloat": torch.randn(3, 1, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "expanded": torch.arange(3)[:, None].expand(3, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "truth": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    steps = [Step(k, (k,), "rename", tuple(t.shape), t.dtype, lambda read, k=k: read(k)) for k, t in tensors.items()]
    write_safetensors(tmp_path / "file.safetensors", steps, tensors.__getitem__)
    back = load_file(tmp_path / "file.safetensors")
    assert_same({key: back[key] for key in tensors}, tensors)


def test_shards_are_filled_and_load(tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "whole")
    limit = 300_000
    convert(tmp_path / "theirs.pth", tmp_path / "shards", options=Options(max_shard_size=limit))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    tensors = {}
    for name in files:
        shard = load_file(tmp_path / "shards" / name)
        size = sum(tensor.nbytes for tensor in shard.values())
        assert size <= limit or len(shard) == 1
        tensors.update(shard)
    assert_same(dict(sorted(tensors.items())), dict(sorted(whole.items())))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    models = [GDinoForObjectDetection.from_pretrained(tmp_path / name) for name in ("whole", "shards")]
    assert_same(models[1].state_dict(), models[0].state_dict())
    convert(tmp_path / "shards", tmp_path / "back.pth", to="original")
    assert_same(torch.load(tmp_path / "back.pth")["model"], torch.load(tmp_path / "theirs.pth")["model"])


def test_overwriting_a_sharded_model_removes_its_shards(tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", options=Options(max_shard_size=300_000))
    convert(tmp_path / "theirs.pth", tmp_path / "ours", options=Options(overwrite=True))
    assert [path.name for path in (tmp_path / "ours").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("present", [True, False])
def test_an_interrupted_conversion_leaves_the_target_unchanged(present, tmp_path):
    target = tmp_path / "target"
    if present:
        target.mkdir()
        (target / "config.json").write_text("old")

    def fail():
        with staged(target) as folder:
            (folder / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if present else [])
    if present:
        assert (target / "config.json").read_text() == "old"


def test_a_finished_folder_has_the_usual_permissions(tmp_path):
    with staged(tmp_path / "deep" / "target") as folder:
        (folder / "config.json").write_text("new")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_target_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConversionError, match="cannot be written"), staged(tmp_path / "target"):
        pass


def test_a_full_disk_is_named_as_such_and_leaves_nothing(tiny_folder, tmp_path):
    """torch.save itself would only speak of positions in the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConversionError, match=r"theirs\.pth cannot be written \(.*No space left on device"):
            convert(str(tiny_folder), str(tmp_path / "theirs.pth"), to="original")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
