"""The folder of the page: whole, described, small enough for every host, and never in place of something else."""

import copy
import json
import re

import onnx
import pytest

from gdino_hf import NANO, GDinoProcessor
from gdino_hf.export.npm_files import pinned_packages
from gdino_hf.export.web_page import write_web_page

# Cloudflare Pages takes no larger files.
MOST_BYTES = 25 * 2**20


@pytest.fixture
def processor():
    return GDinoProcessor.from_pretrained(NANO)


def test_the_folder_is_whole(page_site):
    folder = page_site / "some" / "where"
    facts = json.loads((folder / "page_facts.json").read_text(encoding="utf-8"))
    parts = [facts[name] for name in ("model", "tokenizer", "tokenizer_config")]
    parts += [runtime["wasm"] for runtime in facts["runtimes"].values()]
    for part in (part for files in parts for part in files):
        assert (folder / part["path"]).stat().st_size == part["bytes"]
    listed = set(json.loads(re.search(r"FILES = (\[.*\])", (folder / "files.js").read_text(), re.DOTALL)[1]))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present - listed == {"files.js", "_headers"}
    assert max((folder / name).stat().st_size for name in present) <= MOST_BYTES
    text = (folder / "licenses.txt").read_text(encoding="utf-8")
    for package in pinned_packages():
        assert f"{package.name} {package.version}, {package.license}" in text


def test_the_model_is_that_of_the_onnx_file_in_half_the_bytes(page_site, nano_export):
    folder = page_site / "some" / "where"
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("model.onnx.*")))
    assert [node.op_type for node in onnx.load_from_string(content).graph.node].count("Cast") > 50
    assert len(content) < 0.6 * sum(path.stat().st_size for path in nano_export.glob("model.onnx*"))


def test_the_sources_name_no_other_server(page_site):
    """A page that asked another server for a font or a script would tell it about every visitor."""
    folder = page_site / "some" / "where"
    for path in folder.glob("*.*"):
        if path.suffix in (".html", ".css", ".js"):
            assert re.findall(r"https?://", path.read_text(encoding="utf-8")) == [], path.name
    policy = re.search(r'content="(default-src[^"]*)"', (folder / "index.html").read_text(encoding="utf-8"))[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe-inline" not in policy
    words = {word for rule in rules.values() for word in rule.split()}
    assert words == {"'self'", "'none'", "'wasm-unsafe-eval'", "blob:", "data:"}


def test_a_folder_with_something_else_is_refused_and_left_alone(processor, npm_packages, tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="exists and is not a page"):
        write_web_page(tmp_path / "none.onnx", processor, tmp_path, name="x")
    assert (tmp_path / "letter.txt").read_text() == "keep me"


def save_graph(path, *inputs):
    """Save an ONNX file with the given inputs that does nothing."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in (*inputs, "y")]
    node = onnx.helper.make_node("Identity", [inputs[0]], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "nothing", ends[:-1], ends[-1:])), path)
    return path


def test_what_the_page_cannot_do_is_refused(processor, npm_packages, tmp_path):
    padded = copy.deepcopy(processor)
    padded.image_processor.pad_size = {"height": 640, "width": 640}
    with pytest.raises(ValueError, match=r"pads to .*640.*; set pad_size to None"):
        write_web_page(tmp_path / "none.onnx", padded, tmp_path / "out", name="x")
    split = save_graph(tmp_path / "split.onnx", "pixel_values", "text_features")
    with pytest.raises(ValueError, match="input 'text_features', which the page does not know"):
        write_web_page(split, processor, tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()


def test_the_same_export_has_the_same_version_and_another_model_another(processor, npm_packages, tmp_path):
    """A new version makes every visitor load the model again."""
    versions = []
    for name, inputs in {"one": ["input_ids"], "same": ["input_ids"], "other": ["input_ids", "pixel_values"]}.items():
        write_web_page(save_graph(tmp_path / f"{name}.onnx", *inputs), processor, tmp_path / name, name="x")
        versions.append((tmp_path / name / "files.js").read_bytes())
    assert versions[0] == versions[1] != versions[2]
