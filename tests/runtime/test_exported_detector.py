"""The torch-free Detector: its calls, its results and its messages, on graphs of a few operators."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import gdino_hf
from gdino_hf.detection.exported_folder import ExportedFolder
from gdino_hf.runtime import DetectionError, Detector, ExportError, Vocabulary
from gdino_hf.runtime.__main__ import main
from gdino_hf.runtime.prompt_tokens import PromptTokenizer

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from runtime.tiny_exports import BAKED, IMAGE, boxes, edited, table, write_export

CAT, CUP, DOG = 4937, 2452, 3899  # tokens of gdino-nano's vocabulary


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {variant: write_export(folder / variant, variant) for variant in ("whole", "split", "baked")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    paths = []
    for number, (height, width) in enumerate([(50, 80), (80, 50), (64, 64)]):
        paths.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def expected_scores(path, tokens):
    """Return (Q, N) scores of labels of one token each, from the package's own image processor."""
    processor = gdino_hf.GDinoImageProcessor(size={"shortest_edge": 40, "longest_edge": 60})
    pixels = processor(images=path)["pixel_values"].numpy()
    mean = pixels.sum() / (pixels.shape[2] * pixels.shape[3])
    return 1 / (1 + np.exp(-(table()[tokens].T + mean)))


def test_the_models_own_suppression_holds_where_a_call_gives_none(tmp_path, exports, pictures):
    plain = Detector(exports["whole"], threads=1)
    suppressing = Detector(edited(write_export(tmp_path / "own"), {"post": {"nms_threshold": 0.0}}), threads=1)
    question = (pictures[0], ["cat", "cup"])
    fewer = suppressing(*question, threshold=0.0)
    assert 0 < len(fewer) < len(plain(*question, threshold=0.0))
    assert fewer == plain(*question, threshold=0.0, nms_threshold=0.0)
    assert suppressing(*question, threshold=0.0, nms_threshold=1) == plain(*question, threshold=0.0)


@pytest.mark.parametrize("variant", ["whole", "split", "baked"])
def test_scores_and_boxes_are_those_of_the_graph(exports, pictures, variant):
    found = Detector(exports[variant], threads=1)(pictures[0], ["cat", "cup"], threshold=0.0, multi_label=True)
    scores = expected_scores(pictures[0], [CAT, CUP])
    order = np.argsort(-scores, axis=None, kind="stable")
    np.testing.assert_allclose(found.scores, scores.flatten()[order], atol=1e-5)
    assert found.labels.tolist() == (order % 2).tolist()
    assert found.names == ("cat", "cup")
    center, side = boxes()[0, order // 2, :2], boxes()[0, order // 2, 2:]
    corners = np.concatenate([center - side / 2, center + side / 2], axis=1) * [80, 50, 80, 50]
    np.testing.assert_allclose(found.boxes, corners.clip(0, [80, 50, 80, 50]), atol=1e-3)
    assert found.presence == pytest.approx({"cat": scores[:, 0].max(), "cup": scores[:, 1].max()}, abs=1e-5)
    assert (found.size, found.source) == ((80, 50), str(pictures[0]))


@pytest.mark.parametrize("variant", ["whole", "split"])
def test_lists_and_streams_equal_single_pictures(exports, pictures, variant):
    detector = Detector(exports[variant], threads=1)
    single = [detector(path, "cat, cup", threshold=0.1) for path in pictures]
    assert sum(map(len, single)) > 3
    for batch_size in (1, 2, 3):
        together = detector(pictures, "cat, cup", threshold=0.1, batch_size=batch_size)
        streamed = list(detector.stream(pictures, "cat, cup", threshold=0.1, batch_size=batch_size))
        for one, other, (source, third), path in zip(single, together, streamed, pictures, strict=True):
            assert source == path
            for found in (other, third):
                np.testing.assert_allclose(found.scores, one.scores, atol=1e-5)
                np.testing.assert_allclose(found.boxes, one.boxes, atol=1e-3)
                assert found.labels.tolist() == one.labels.tolist()


def test_pictures_of_other_sizes_in_a_batch_change_nothing(tmp_path, pictures):
    """As convolutions do, this graph's scores depend on how far a picture is padded, whatever the mask says."""
    import onnx
    from onnx import helper

    folder = write_export(tmp_path / "export")
    model = onnx.load(folder / "model.onnx")
    nodes = [node for node in model.graph.node if node.op_type != "Div"]
    place = next(place for place, node in enumerate(nodes) if node.op_type == "Squeeze")
    mean = helper.make_node("ReduceMean", ["pixel_values"], ["average"], axes=[1, 2, 3], keepdims=1, name="average")
    nodes[place : place + 1] = [mean, helper.make_node("Squeeze", ["average", "last"], ["mean"], name="squeezed")]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "model.onnx")
    content = (folder / "model.onnx").read_bytes()
    entry = {"name": "model.onnx", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    detector = Detector(edited(folder, {"files": {"model": entry}}), threads=1)
    single = [detector(path, "cat, cup", threshold=0.1) for path in pictures]
    assert len({found.size for found in single}) > 1
    for one, other in zip(single, detector(pictures, "cat, cup", threshold=0.1, batch_size=3), strict=True):
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-6)
        assert other.labels.tolist() == one.labels.tolist()


def test_labels_that_need_several_prompts_are_all_found(exports, pictures):
    labels = ["cat", "dog", "cup", "table", "chair", "bird", "ball", "bottle"]  # four fit into twelve tokens
    detector = Detector(exports["whole"], threads=1)
    found = detector(pictures[0], labels, threshold=0.0, multi_label=True)
    assert sorted(set(found.text_labels)) == sorted(labels)
    scores = expected_scores(pictures[0], [DOG])
    assert found.presence["dog"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_aliases_templates_negatives_and_own_thresholds_work_as_in_a_vocabulary(exports, pictures):
    detector = Detector(exports["split"], threads=1)
    scores = expected_scores(pictures[0], [CAT, DOG])
    found = detector(pictures[0], {"pet": ["cat", "dog"]}, threshold=0.0)
    assert found.presence["pet"] == pytest.approx(float(scores.max()), abs=1e-5)
    negative = detector(pictures[0], ["cat"], negative=["dog"], threshold=0.0)
    assert len(negative) == int((scores[:, 0] >= scores[:, 1]).sum())
    assert len(negative) < len(found)
    vocabulary = Vocabulary(["cat", "dog"], thresholds={"cat": 1.0}, colors={"dog": "#ff0000"})
    found = detector(pictures[0], vocabulary, threshold=0.0)
    assert set(found.text_labels) == {"dog"}
    assert found.colors == {"dog": "#ff0000"}


def test_a_graph_with_a_fixed_batch_takes_any_number_of_pictures(tmp_path, exports, pictures):
    fixed = Detector(write_export(tmp_path / "fixed", batch=2), threads=1)
    free = Detector(exports["whole"], threads=1)
    for count in (1, 2, 3):
        ours = fixed([pictures[2]] * count, "cat", threshold=0.1, batch_size=3)
        assert len(ours) == count
        np.testing.assert_allclose(ours[-1].scores, free(pictures[2], "cat", threshold=0.1).scores, atol=1e-5)


def test_openvino_gives_what_onnx_runtime_gives(tmp_path, exports, pictures):
    openvino = pytest.importorskip("openvino")
    folder = write_export(tmp_path / "openvino", format="openvino", runtime={"least_version": "2025.0"})
    graph = openvino.convert_model(folder / "model.onnx")
    openvino.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
    document = json.loads((folder / "gdino_export.json").read_text())
    document["files"] = {}
    for role, suffix in (("model", "xml"), ("weights", "bin")):
        content = (folder / f"openvino_model.{suffix}").read_bytes()
        entry = {"name": f"openvino_model.{suffix}", "bytes": len(content)}
        document["files"][role] = entry | {"sha256": hashlib.sha256(content).hexdigest()}
    (folder / "gdino_export.json").write_text(json.dumps(document))
    detector, reference = Detector(folder, threads=1), Detector(exports["whole"], threads=1)
    for path in pictures:
        found, expected = (each(path, ["cat", "cup"], threshold=0.0) for each in (detector, reference))
        assert found.labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)


def test_prompts_equal_those_of_the_packages_tokenizer(exports):
    tokenizer = gdino_hf.GDinoProcessor.from_pretrained(gdino_hf.NANO).tokenizer
    ours = PromptTokenizer(ExportedFolder.read(exports["whole"]))
    labels = [
        "cat",
        "Remote Control",
        "naïve café",
        "T-shirt",
        "St. Bernard",
        "what?",
        "貓",
        "3.5 mm jack",
        "xylophonist",
    ]
    vocabulary = Vocabulary(labels, template="a photo of a {}")
    assert vocabulary.prompt(ours, 256) == vocabulary.prompt(tokenizer, 256)
    assert vocabulary.prompt(ours, 16) == vocabulary.prompt(tokenizer, 16)


def test_baked_labels_are_the_default_and_a_part_of_them_may_be_asked_for(exports, pictures):
    detector = Detector(exports["baked"])
    assert detector.labels == ("cat", "cup")
    assert detector(pictures[0], threshold=0.0).names == ("cat", "cup")
    assert set(detector(pictures[0], "cup", threshold=0.0).text_labels) == {"cup"}
    either = detector(pictures[0], {"thing": ["cat", "cup"]}, threshold=0.0)
    assert either.presence["thing"] == pytest.approx(float(expected_scores(pictures[0], [CAT, CUP]).max()), abs=1e-5)
    known = r" is not among the 2 labels that .* was exported with \('cat', 'cup'\); ask for these"
    for labels, text in ((["cat", "Dog"], "'Dog'"), ({"cat": ["cat", "kitten"]}, "'kitten'")):
        with pytest.raises(ExportError, match=text + known):
            detector(pictures[0], labels)
        with pytest.raises(ExportError, match=text + known):
            next(detector.stream(pictures, labels))


def test_a_damaged_or_foreign_folder_is_one_sentence(tmp_path, exports):
    with pytest.raises(ExportError, match=r"is not an exported folder \(it has no gdino_export.json\); make one"):
        Detector(tmp_path)
    with pytest.raises(ExportError, match=r"elsewhere is not an exported folder \(there is none\); make one"):
        Detector(tmp_path / "elsewhere")
    (tmp_path / "model.onnx").write_bytes(b"a graph alone")
    with pytest.raises(ExportError, match=r"model.onnx is not an exported folder \(it is a file\)"):
        Detector(tmp_path / "model.onnx")
    folder = write_export(tmp_path / "short")
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[:-100])
    with pytest.raises(ExportError, match=rf"model.onnx has {len(whole) - 100} bytes instead of {len(whole)}; copy it"):
        Detector(folder)
    (folder / "model.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ExportError, match=r"model.onnx is damaged, its SHA-256 is not the one in gdino_export.json"):
        Detector(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"model.onnx is missing; copy the whole folder"):
        Detector(folder)
    (folder / "gdino_export.json").write_text("{")
    with pytest.raises(ExportError, match=r"gdino_export.json cannot be read"):
        Detector(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 9}, "has the format version 9, and this gdino-hf reads 1; update gdino-hf"),
        ({"format": "executorch"}, "in the format 'executorch', which needs torch; open it with gdino_hf.Detector"),
        (
            {"runtime": {"least_version": "99.1"}},
            r"needs onnxruntime 99.1 or newer, and \S+ is installed; pip",
        ),
        (
            {"format": "openvino", "runtime": {"least_version": "9999.1"}},
            r"needs openvino 9999.1 or newer, and 20\S+ is installed; pip install -U openvino",
        ),
        ({"image": None}, r"gdino_export.json is damaged \(TypeError"),
        ({"image": {}}, r"gdino_export.json is damaged \(KeyError: 'resample'\)"),
        ({"image": IMAGE | {"size": None}}, r"is damaged \(TypeError: the size of pictures is no pair of edges\)"),
        ({"image": IMAGE | {"image_std": None}}, r"is damaged \(TypeError"),
        ({"text": {"max_text_len": "x"}}, r"is damaged \(ValueError: invalid literal"),
        ({"runtime": {"least_version": "abc"}}, r"is damaged \(ValueError: there is no version 'abc' of a runtime\)"),
        ({"post": {"nms_threshold": 6}}, r"is damaged \(ValueError: nms_threshold must be within 0..1, got 6"),
        ({"labels": {"names": ["cat"]}}, r"gdino_export.json is damaged \(KeyError: 'label_indices'\)"),
        ({"labels": BAKED | {"spans": []}}, r"is damaged \(ValueError: 2 labels have 0 spans\)"),
        ({"labels": BAKED}, "does not describe a whole export"),
        ({"variant": "split"}, "does not describe a whole export"),
        ({"variant": "half"}, r"is damaged \(KeyError: 'half'\)"),
        ({"format": "tflite"}, "does not describe a whole export"),
        ({"files": {"model": {"name": "model.onnx"}}}, r"is damaged \(KeyError: 'bytes'\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_document_that_does_not_fit_is_one_sentence(tmp_path, changes, message):
    if changes.get("format") == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=message):
        Detector(edited(write_export(tmp_path / "export"), changes))


def test_a_file_that_the_library_refuses_is_one_sentence(tmp_path):
    folder = write_export(tmp_path / "export")
    (folder / "model.onnx").write_bytes(b"no graph")
    document = json.loads((folder / "gdino_export.json").read_text())
    document["files"]["model"] |= {"bytes": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}
    (folder / "gdino_export.json").write_text(json.dumps(document))
    with pytest.raises(ExportError, match=r"^onnxruntime \S+ cannot load .*; update onnxruntime, or export the model"):
        Detector(folder)


def test_options_labels_and_pictures_are_checked_as_in_the_package(exports, pictures, tmp_path):
    detector = Detector(exports["whole"])
    with pytest.raises(TypeError, match="There is no option 'treshold'; choose threshold"):
        detector(pictures[0], "cat", treshold=0.1)
    with pytest.raises(ValueError, match=r"threshold must be within 0..1, got 3"):
        detector(pictures[0], "cat", threshold=3)
    with pytest.raises(ValueError, match="takes any labels; say what to look for"):
        detector(pictures[0])
    with pytest.raises(ValueError, match="names nothing"):
        detector(pictures[0], " , ")
    with pytest.raises(ValueError, match="threads is 0; give a whole number"):
        Detector(exports["whole"], threads=0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    first, second = detector.stream([tmp_path / "broken.png", pictures[0]], "cat")
    assert isinstance(first[1], DetectionError)
    assert "broken.png" in str(first[1])
    assert len(second[1].names) == 1


def test_the_module_writes_json_and_tells_of_pictures_it_cannot_read(exports, pictures, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = [str(exports["whole"]), str(pictures[0]), "missing.jpg", "--labels", "cat", "cup", "--threshold", "0.1"]
    assert main([*arguments, "--out", str(out), "--plots", str(tmp_path / "plots")]) == 1
    first, second = json.loads(out.read_text())["images"]
    assert (first["width"], first["height"]) == (80, 50)
    assert {found["label"] for found in first["detections"]} <= {"cat", "cup"}
    assert "missing.jpg" in second["error"]
    assert Image.open(tmp_path / "plots" / "0.jpg").size == (80, 50)
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path), "a.jpg", "--labels", "cat"]) == 2
    assert capsys.readouterr().err.startswith("python -m gdino_hf.runtime: error: ")


def test_pictures_with_boxes_replace_neither_each_other_nor_the_pictures(exports, pictures, tmp_path, capsys):
    first, second = tmp_path / "a" / "x.jpg", tmp_path / "b" / "x.jpg"
    for path in (first, second):
        path.parent.mkdir()
        Image.open(pictures[0]).convert("RGB").save(path)
    before = first.read_bytes()
    arguments = [str(exports["whole"]), str(first), str(second), "--labels", "cat", "--plots"]
    assert main([*arguments, str(first.parent)]) == 2
    assert "would replace" in capsys.readouterr().err
    assert first.read_bytes() == before
    assert main([*arguments, str(tmp_path / "plots")]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["x-2.jpg", "x.jpg"]


def test_a_library_that_is_there_and_broken_is_one_sentence(exports, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('DLL load failed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(
        ExportError, match=r"cannot be imported \(DLL load failed\); pip install --force-reinstall onnx"
    ):
        Detector(exports["whole"])


def test_importing_the_runtime_loads_neither_torch_nor_transformers():
    code = (
        "import sys, gdino_hf.runtime\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'huggingface_hub', 'onnxruntime'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
