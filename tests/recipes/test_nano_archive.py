"""The archive that takes training to another machine, with small generated images and pretrained parts."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import NANO
from gdino_hf.data.coco import read_coco
from gdino_hf.model.csp_pan import CspPanBackbone
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
from gdino_hf.model.processing_gdino import GDinoProcessor
from gdino_hf.recipes import nano_archive, nano_mixed
from gdino_hf.recipes.closed_set_teacher import ClosedSetHead
from gdino_hf.recipes.nano_rating import load_checkpoint


@pytest.fixture(scope="module")
def sets(parts, tmp_path_factory):
    """The two sets with photographs of 200 x 100 pixels in place of 64 x 64; boxes lie as before, in proportion."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("data", "wild"):
        shutil.copytree(parts / name, folder / name)
        file = folder / name / "train.json"
        content = json.loads(file.read_text())
        for entry in content["images"]:
            path = folder / name / "images" / entry["file_name"]
            Image.open(path).resize((200, 100)).save(path)
            entry |= {"width": 200, "height": 100}
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["bbox"] = [x * 200 / 64, y * 100 / 64, w * 200 / 64, h * 100 / 64]
        content["annotations"][0]["iscrowd"] = 1
        file.write_text(json.dumps(content))
    return folder


def packed(parts, sets, start, archive, *more):
    given = ("--everyday", str(sets / "data"), "--wild", str(sets / "wild"), "--backbone", str(parts / "backbone"))
    nano_archive.main(["pack", str(archive), *given, "--start", str(start), *more])


@pytest.fixture(scope="module")
def archive(parts, sets, start, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "nano.zip"
    packed(parts, sets, start, path)
    return path


def test_photographs_become_small_and_boxes_and_names_stay_where_they_were(sets, archive, tmp_path):
    nano_archive.unpack(archive, tmp_path / "folder")
    for before, after in (("data", "everyday"), ("wild", "wild")):
        whole = list(read_coco(sets / before / "train.json"))
        small = list(read_coco(tmp_path / "folder" / after / "train.json"))
        assert [row["image_id"] for row in small] == [row["image_id"] for row in whole]
        for old, new in zip(whole, small, strict=True):
            # The longer side is as long as the model's input.
            assert new["image"].size == (64, 32)
            np.testing.assert_allclose(np.array(new["boxes"]) / 64, np.array(old["boxes"]) / 200, atol=2e-4)
            assert {key: new[key] for key in ("names", "crowd")} == {key: old[key] for key in ("names", "crowd")}
            assert new.get("neg_names") == old.get("neg_names")
            # The middle of the square has its colour, up to the compression.
            left, top, right, bottom = new["boxes"][0]
            place = int(left + right) // 2, int(top + bottom) // 2
            pixels = [each["image"].convert("RGB").resize((64, 32)).getpixel(place) for each in (old, new)]
            assert np.abs(np.subtract(*pixels)).max() < 25
    content = json.loads((tmp_path / "folder" / "wild" / "train.json").read_text())
    assert content["info"] == {"set_names": {"paint": ["green", "blue"]}}
    assert {entry["source"] for entry in content["images"]} == {"paint"}


def test_weights_come_back_in_float16(parts, start, archive, tmp_path):
    nano_archive.unpack(archive, tmp_path / "folder")
    expected, found = load_checkpoint(start).state_dict(), load_checkpoint(tmp_path / "folder" / "start").state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.half().to(weight.dtype), rtol=0, atol=0)
    processor = GDinoProcessor.from_pretrained(tmp_path / "folder" / "start")
    assert processor.image_processor.size == {"height": 64, "width": 64}
    backbones = [
        CspPanBackbone.from_pretrained(path) for path in (parts / "backbone", tmp_path / "folder" / "backbone")
    ]
    for (name, weight), other in zip(
        backbones[0].state_dict().items(), backbones[1].state_dict().values(), strict=True
    ):
        assert torch.equal(weight.half(), other.half()), name
    heads = [ClosedSetHead.from_pretrained(path) for path in (parts / "backbone", tmp_path / "folder" / "backbone")]
    assert torch.equal(heads[0].layer(0)[0], heads[1].layer(0)[0])


def test_only_weights_that_differ_from_the_embedded_models_are_packed():
    known, changed = (GDinoForObjectDetection.from_pretrained(NANO) for _ in range(2))
    assert nano_archive.differing(changed, known) == {}
    with torch.no_grad():
        changed.model.level_embed.add_(1)
    assert list(nano_archive.differing(changed, known)) == ["model.level_embed"]


def test_equal_content_gives_equal_archives(parts, sets, start, archive, tmp_path):
    packed(parts, sets, start, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_a_lower_limit_lowers_the_quality_and_an_impossible_one_is_refused(
    parts, sets, start, archive, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(nano_archive, "QUALITIES", (95, 10))
    packed(parts, sets, start, tmp_path / "large.zip")
    assert "18 photographs of at most 64 pixels at a WebP quality of 95" in capsys.readouterr().out
    size = (tmp_path / "large.zip").stat().st_size
    packed(parts, sets, start, tmp_path / "less.zip", "--megabytes", str((size - 1) / 1e6))
    assert "at a WebP quality of 10" in capsys.readouterr().out
    assert (tmp_path / "less.zip").stat().st_size < size
    with pytest.raises(ValueError, match=r"At a WebP quality of 10 and 64 pixels, .* do not fit .*; raise"):
        packed(parts, sets, start, tmp_path / "none.zip", "--megabytes", str(size / 2e6))
    assert not (tmp_path / "none.zip").exists()


def test_the_size_of_an_archive_is_known_before_it_is_written(archive):
    with zipfile.ZipFile(archive) as file:
        files = {name: file.read(name) for name in file.namelist()}
    # zlib's own frame is six bytes that zip does not write.
    room = nano_archive.packed_size(files) + nano_archive._AT_END
    assert 0 <= room - archive.stat().st_size <= 6 * sum(name.endswith(".json") for name in files)


def test_training_goes_on_from_the_archive_for_a_time_and_the_model_comes_back(start, archive, tmp_path):
    given = ["train", str(archive), "--output", str(tmp_path / "run"), "--export", str(tmp_path / "model")]
    options = ["--minutes", "0.05", "--batch-size", "4", "--least-labels", "1", "--most-labels", "3"]
    nano_archive.main([*given, *options, "--hold-out", "0", "--learning-rate", "1e-3"])
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "model")
    assert not torch.equal(before.model.level_embed.half(), after.model.level_embed.half())
    text = before.model.text_backbone.state_dict()
    for name, weight in after.model.text_backbone.state_dict().items():
        assert torch.equal(weight.half(), text[name].half()), name
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log
    # A resumed command finds the time used up, and unpacks nothing again.
    stamp = (tmp_path / "run" / "archive" / "start" / "model.safetensors").stat().st_mtime_ns
    nano_archive.main([*given, *options, "--hold-out", "0", "--learning-rate", "1e-3"])
    assert (tmp_path / "run" / "archive" / "start" / "model.safetensors").stat().st_mtime_ns == stamp


def test_folders_that_the_archive_brings_are_refused(archive, tmp_path):
    for option in (["--wild", "elsewhere"], ["--start=nano"]):
        with pytest.raises(ValueError, match=rf"{option[0].split('=')[0]} comes with the archive; leave it out"):
            nano_archive.main(["train", str(archive), "--output", str(tmp_path / "run"), *option])
    assert not (tmp_path / "run").exists()


def test_pack_refuses_options_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        nano_archive.parse_arguments(
            ["pack", "a.zip", "--everyday", "e", "--wild", "w", "--backbone", "b", "--region-model", "m"]
        )
    assert "pack does not know --region-model" in capsys.readouterr().err


def test_a_schedule_by_time_replaces_steps(capsys):
    given = ["--everyday", "e", "--wild", "w", "--backbone", "b", "--output", "o"]
    assert nano_mixed._schedule(nano_mixed.parse_arguments([*given, "--minutes", "8"])) == {}
    by_steps = nano_mixed._schedule(nano_mixed.parse_arguments([*given, "--steps", "9", "--decay-steps", "4"]))
    assert by_steps["max_steps"] == 9
    assert by_steps["lr_scheduler_kwargs"]["num_decay_steps"] == 4
    with pytest.raises(SystemExit):
        nano_mixed.parse_arguments([*given, "--minutes", "8", "--decay-steps", "4"])
    assert "--minutes replaces --decay-steps; give one of the two" in capsys.readouterr().err


def test_what_is_no_archive_and_another_archive_are_refused(archive, tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "another archive")
    for name in ("text.zip", "other.zip"):
        with pytest.raises(ValueError, match=rf"{name} is not an archive that `nano_archive pack` wrote"):
            nano_archive.unpack(tmp_path / name, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
    nano_archive.unpack(archive, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"does not hold what .*text\.zip holds; choose another --output"):
        nano_archive.unpack(tmp_path / "text.zip", tmp_path / "folder")
