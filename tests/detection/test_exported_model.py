"""Exported folders in `gdino_hf.Detector` and the commands: the runtime's results, and its sentences on bad folders."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import gdino_hf
from gdino_hf import runtime
from gdino_hf.cli import main
from gdino_hf.detection.exported_folder import ExportError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from runtime.tiny_exports import edited, with_settings, write_export

# A number of the results is float32 through two other ways of summing.
SCORES, PIXELS = 1e-5, 1e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    return {each: with_settings(write_export(place / each, each)) for each in ("whole", "split", "baked")}


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(3)
    sizes = [(50, 80), (80, 50), (60, 80)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def assert_equal(ours, theirs):
    for mine, found in zip(ours, theirs, strict=True):
        assert found.text_labels == mine.text_labels
        np.testing.assert_allclose(found.scores, mine.scores, atol=SCORES)
        np.testing.assert_allclose(found.boxes, mine.boxes, atol=PIXELS)
        assert found.presence == pytest.approx(mine.presence, abs=SCORES)


@pytest.mark.parametrize("variant", ["whole", "split", "baked"])
@pytest.mark.parametrize("labels", [["cat", "cup"], {"thing": ["cup", "cat"]}, "Cup"])
def test_the_package_finds_what_the_runtime_finds(folders, pictures, variant, labels):
    own, light = gdino_hf.Detector(folders[variant]), runtime.Detector(folders[variant], threads=1)
    for options in ({"threshold": 0.1}, {"threshold": 0.0, "multi_label": True, "batch_size": 2}, {"tiles": 40}):
        found = light(pictures, labels, **options)
        assert sum(map(len, found)) > 0
        assert_equal(own(pictures, labels, **options), found)
    streamed = [found for _, found in own.stream(pictures, labels, threshold=0.1)]
    assert_equal(streamed, light(pictures, labels, threshold=0.1))


def test_baked_labels_are_the_default_in_both(folders, pictures):
    own, light = gdino_hf.Detector(folders["baked"]), runtime.Detector(folders["baked"])
    assert own.labels == light.labels == ("cat", "cup")
    assert_equal(own(pictures, threshold=0.1), light(pictures, threshold=0.1))
    whole = gdino_hf.Detector(folders["whole"])
    assert whole.labels is None
    with pytest.raises(ValueError, match="takes any labels; say what to look for"):
        whole(pictures[0])


def test_labels_beyond_a_baked_vocabulary_are_one_sentence_everywhere(folders, pictures, tmp_path, capsys):
    sentence = (
        r"'dog' is not among the 2 labels that .*baked was exported with \('cat', 'cup'\); ask for these, or export"
    )
    for detector in (gdino_hf.Detector(folders["baked"]), runtime.Detector(folders["baked"])):
        with pytest.raises(ExportError, match=sentence):
            detector(pictures, ["cat", "dog"])
        with pytest.raises(ExportError, match=sentence):
            next(detector.stream(pictures, ["cat", "dog"]))
        with pytest.raises(ExportError, match=sentence):
            detector.vocabulary({"pet": ["cat", "dog"]})
    with pytest.raises(ValueError, match="baked in, and a caption has others; export the model without --labels"):
        gdino_hf.Detector(folders["baked"]).ground(pictures[0], "a dog on a mat")
    pictures[0].save(tmp_path / "picture.png")
    asked = ["--labels", "cat, dog", "--model", str(folders["baked"])]
    for command in (
        ["detect", str(tmp_path / "picture.png"), *asked],
        ["label", str(tmp_path / "picture.png"), *asked, "--out", str(tmp_path / "labelled")],
        ["track", str(tmp_path), *asked, "--out", str(tmp_path / "tracked")],
        ["bench", *asked],
        ["eval", str(data_set(tmp_path)), "--model", str(folders["baked"]), "--runs", str(tmp_path / "runs")],
    ):
        assert main(command) == 2
        errors = capsys.readouterr().err
        assert "'dog' is not among the 2 labels" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "labelled" / "annotations.json").exists()


def data_set(folder):
    """Write a data set of one picture with the labels cat and dog."""
    (folder / "data").mkdir()
    Image.new("RGB", (80, 50), (200, 100, 0)).save(folder / "data" / "picture.png")
    boxes = [{"id": i, "image_id": 1, "category_id": i, "bbox": [5, 5, 20, 20], "area": 400} for i in (1, 2)]
    content = {
        "images": [{"id": 1, "file_name": "picture.png", "width": 80, "height": 50}],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "data" / "data.json").write_text(json.dumps(content))
    return folder / "data" / "data.json"


def test_commands_time_and_judge_an_exported_model(folders, tmp_path, capsys):
    model = ["--model", str(folders["split"])]
    report = tmp_path / "bench.json"
    assert main(["bench", *model, "--labels", "cat, dog", "--repeats", "1", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["deformable_attention"] == "onnx"
    assert main(["eval", str(data_set(tmp_path)), *model, "--runs", str(tmp_path / "runs")]) == 0
    assert "AP50" in capsys.readouterr().out
    assert main(["train", str(data_set(tmp_path / "runs")), *model]) == 2
    assert "is an exported model; give the model that it was exported from" in capsys.readouterr().err


def replace_model(folder, content):
    (folder / "model.onnx").write_bytes(content)
    entry = {"name": "model.onnx", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edited(folder, {"files": {"model": entry}})


def cut_off(folder):
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-100])


def flip(folder):
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


FAULTS = {
    "cut off": (cut_off, r"model.onnx has \d+ bytes instead of \d+; copy it again"),
    "one bit": (flip, "model.onnx is damaged, its SHA-256 is not the one in gdino_export.json"),
    "missing": (lambda folder: (folder / "model.onnx").unlink(), "model.onnx is missing; copy the whole folder"),
    "a folder in its place": (
        lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").mkdir()),
        "model.onnx is missing; copy the whole folder",
    ),
    "another file": (lambda folder: replace_model(folder, b"no graph"), r"onnxruntime \S+ cannot load .*model.onnx"),
    "old runtime": (
        lambda folder: edited(folder, {"runtime": {"name": "onnxruntime", "least_version": "99.0"}}),
        r"needs onnxruntime 99.0 or newer, and \S+ is installed; pip install -U onnxruntime",
    ),
    "later version": (
        lambda folder: edited(folder, {"format_version": 7}),
        "format version 7, and this gdino-hf reads",
    ),
    "no version": (lambda folder: (folder / "gdino_export.json").write_text("[]"), "format version None"),
    "no JSON": (lambda folder: (folder / "gdino_export.json").write_text("{"), "gdino_export.json cannot be read"),
    "not text": (
        lambda folder: (folder / "gdino_export.json").write_bytes(b"\xff\xfe\x00"),
        "gdino_export.json cannot be read",
    ),
    "deep JSON": (
        lambda folder: (folder / "gdino_export.json").write_text("[" * 100_000),
        "gdino_export.json cannot be read",
    ),
    "no files": (lambda folder: edited(folder, {"files": {}}), "does not describe a whole export"),
    "another variant": (lambda folder: edited(folder, {"variant": "split"}), "does not describe a whole export"),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:5000]),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_the_same_sentence_for_every_reader(fault, folders, tmp_path, capsys):
    change, message = FAULTS[fault]
    folder = tmp_path / "damaged"
    shutil.copytree(folders["whole"], folder)
    change(folder)
    for read in (gdino_hf.Detector, runtime.Detector):
        with pytest.raises(ValueError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    assert main(["detect", str(tmp_path / "picture.png"), "--labels", "cat", "--model", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gdino detect: error: --model ")


def test_a_folder_without_its_document_is_told_from_one_without_weights(folders, tmp_path):
    shutil.copytree(folders["split"], tmp_path / "torn")
    (tmp_path / "torn" / "gdino_export.json").unlink()
    with pytest.raises(
        ValueError, match=r"has image\.onnx of an exported model, but no gdino_export\.json; copy the whole"
    ):
        gdino_hf.Detector(tmp_path / "torn")
    with pytest.raises(ExportError, match=r"it has no gdino_export\.json"):
        runtime.Detector(tmp_path / "torn")


def test_another_device_than_the_cpu_is_refused(folders):
    assert gdino_hf.Detector(folders["whole"], device="cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="is an exported model, which runs on the CPU, not on device meta; leave"):
        gdino_hf.Detector(folders["whole"], device="meta")


def test_a_folder_that_moved_still_runs(folders, pictures, tmp_path):
    shutil.copytree(folders["split"], tmp_path / "elsewhere")
    found = gdino_hf.Detector(tmp_path / "elsewhere")(pictures, "cat", threshold=0.1)
    assert_equal(found, gdino_hf.Detector(folders["split"])(pictures, "cat", threshold=0.1))


def test_a_graph_of_fixed_size_says_which_pictures_it_takes(folders, tmp_path):
    import onnx

    folder = tmp_path / "fixed"
    shutil.copytree(folders["whole"], folder)
    model = onnx.load(folder / "model.onnx")
    for port in model.graph.input:
        for axis in port.type.tensor_type.shape.dim:
            fixed = {"batch": 1, "height": 40, "width": 60}.get(axis.dim_param)
            if fixed is not None:
                axis.ClearField("dim_param")
                axis.dim_value = fixed
    replace_model(folder, model.SerializeToString())
    for detector in (gdino_hf.Detector(folder), runtime.Detector(folder)):
        assert detector(Image.new("RGB", (90, 60)), "cat").size == (90, 60)
        with pytest.raises(ExportError, match=r"takes pictures of 40x60 pixels .* this one has 60x40 after resizing"):
            detector(Image.new("RGB", (60, 90)), "cat")


def test_sizes_that_a_runtime_refuses_are_one_sentence(folders, tmp_path):
    """The graph adds a constant for ten tokens to the logits, so that no other prompt will do."""
    import onnx
    from onnx import helper, numpy_helper

    folder = tmp_path / "picky"
    shutil.copytree(folders["whole"], folder)
    model = onnx.load(folder / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10, dtype=np.float32), "ten"))
    (last,) = (node for node in model.graph.node if node.output[0] == "logits")
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Add", ["before", "ten"], ["logits"]))
    replace_model(folder, model.SerializeToString())
    for detector in (gdino_hf.Detector(folder), runtime.Detector(folder)):
        with pytest.raises(
            ExportError, match=r"picky cannot take these sizes: pixel_values 1x3x40x\d+, .*input_ids 1x4"
        ):
            detector(Image.new("RGB", (90, 60)), "cat")


def test_a_document_names_its_digests(folders):
    document = json.loads((folders["whole"] / "gdino_export.json").read_text())
    read = gdino_hf.Detector(folders["whole"]).model.folder
    assert read.digests == {"model": document["files"]["model"]["sha256"]}
