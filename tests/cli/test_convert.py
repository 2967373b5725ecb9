"""`gdino convert` and the scripts in conversion/."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conversion"))
from published import SMALL, TINY, mmdet, original
from synthetic import assert_same, state_dict, values

from gdino_hf.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
GIGABYTE = 10**9
# Limit for the command on two cores; the start of Python and torch, which takes a few seconds, does not count.
FULL_SIZE_SECONDS = 50
FULL_SIZE_BYTES = 3 * GIGABYTE

MEASURE = """
import resource, sys, time
from gdino_hf.cli import main
status = main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "CPU", time.process_time())
sys.exit(status)
"""


@pytest.fixture
def files(tmp_path):
    for layout, wrapper, shapes in (("original", "model", original(SMALL)), ("mmdet", "state_dict", mmdet(SMALL))):
        torch.save({wrapper: state_dict(shapes)}, tmp_path / f"{layout}.pth")
    return tmp_path


@pytest.mark.parametrize("layout", ["original", "mmdet"])
def test_the_layout_is_recognized(layout, files, capsys):
    assert main(["convert", str(files / f"{layout}.pth"), str(files / "ours"), "--max-shard-size", "0.5MB"]) == 0
    out, err = capsys.readouterr()
    assert f"{layout} -> gdino" in out
    for title in ("mapped: ", "derived: ", "kept in conversion.safetensors: ", "dropped: ", "missing: 2", "assumed: "):
        assert title in out
    assert "warning: No tokenizer is saved" in err
    assert (files / "ours" / "model.safetensors.index.json").is_file()
    assert main(["convert", str(files / "ours"), str(files / "back.pth"), f"--to-{layout}"]) == 0
    back, source = (torch.load(files / name, weights_only=True) for name in ("back.pth", f"{layout}.pth"))
    assert back.keys() == source.keys()
    for wrapper in source:
        assert_same(back[wrapper], source[wrapper])
    assert json.loads((files / "back.conversion.json").read_text())["to"] == layout
    assert main(["convert", str(files / "ours"), str(files / "peer"), "--to-transformers"]) == 0
    assert main(["convert", str(files / "peer"), str(files / "again")]) == 0


def test_verbose_lists_every_key(files, capsys):
    assert main(["convert", str(files / "original.pth"), str(files / "ours"), "--verbose"]) == 0
    out = capsys.readouterr().out
    for key in original(SMALL):
        assert f" {key}" in out, key


def test_a_config_file_is_applied_or_its_fault_named(files, capsys):
    config = files / "extra.json"
    config.write_text('{"max_text_len": 99}')
    assert main(["convert", str(files / "original.pth"), str(files / "ours"), "--config", str(config)]) == 0
    assert json.loads((files / "ours" / "config.json").read_text())["max_text_len"] == 99
    config.write_text('{"d_model": 7}')
    assert main(["convert", str(files / "original.pth"), str(files / "other"), "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "--config" in error
    assert "multiple of 4" in error
    for argument in ("0", "lots"):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(files / "original.pth"), str(files / "other"), "--max-shard-size", argument])
        assert stopped.value.code == 2


@pytest.mark.parametrize("layout", ["original", "mmdet", "transformers"])
def test_scripts_convert_their_own_layout(layout, files, monkeypatch, capsys):
    script = str(REPOSITORY / "conversion" / f"convert_{layout}.py")
    source = files / ("mmdet.pth" if layout == "mmdet" else "original.pth")
    monkeypatch.setattr(sys, "argv", [script, str(source), str(files / "ours")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr()
    if layout == "transformers":
        assert ended.value.code == 2
        assert "is in the original layout, not transformers" in said.err
        assert not (files / "ours").exists()
    else:
        assert ended.value.code == 0, said.err
        assert f"{layout} -> gdino" in said.out
        assert (files / "ours" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no resource module")
def test_full_size_checkpoint_takes_less_than_a_minute_and_three_gigabytes(tmp_path, fresh_python):
    shapes = original(TINY)
    # One random value per row gives a file of full size without drawing 170 million numbers.
    state = {key: values(key, shape[:1]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
             if "_i" not in key.rpartition(".")[2] or "in_proj" in key else values(key, shape)
             for key, shape in shapes.items()}  # fmt: skip
    torch.save({"model": state}, tmp_path / "swint.pth")
    assert (tmp_path / "swint.pth").stat().st_size > 0.65 * GIGABYTE
    del state
    done = fresh_python.run(MEASURE, "convert", tmp_path / "swint.pth", tmp_path / "ours", "--preset", "tiny")
    assert done.returncode == 0, done.stderr
    _, peak, _, seconds = done.stdout.splitlines()[-1].split()
    assert float(peak) < FULL_SIZE_BYTES
    # CPU time, which does not depend on what else the machine does.
    assert float(seconds) < FULL_SIZE_SECONDS
