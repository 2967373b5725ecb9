"""The pipeline takes what people pass, and its boxes lie within the picture."""

from __future__ import annotations

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from gdino_hf.model.text_prompt import build_prompt
from random_models import make_random_model

TASK = "zero-shot-object-detection"
LABELS = ["cat", "remote control"]
ALL = {"threshold": 0.0}


def picture(seed=0, width=80, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def detector(tiny_config, tiny_processor):
    return pipeline(TASK, model=make_random_model(tiny_config), processor=tiny_processor, device="cpu")


@pytest.fixture(scope="module")
def expected(detector):
    return [detector(picture(seed), candidate_labels=LABELS, **ALL) for seed in range(3)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    return [folder / f"{seed}.png" for seed in range(3)]


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(encoded(picture(int(self.path[1]))))

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def addresses():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}/{seed}.png" for seed in range(3)]
    server.shutdown()


KINDS = {
    "path": lambda image, path, address: str(path),
    "Path": lambda image, path, address: Path(path),
    "address": lambda image, path, address: address,
    "bytes": lambda image, path, address: path.read_bytes(),
    "bytearray": lambda image, path, address: bytearray(path.read_bytes()),
    "memoryview": lambda image, path, address: memoryview(path.read_bytes()),
    "file": lambda image, path, address: io.BytesIO(path.read_bytes()),
    "PIL": lambda image, path, address: image,
    "array": lambda image, path, address: np.asarray(image),
    "tensor": lambda image, path, address: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "undecoded": lambda image, path, address: {"bytes": None, "path": str(path)},
    "undecoded bytes": lambda image, path, address: {"bytes": path.read_bytes(), "path": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_every_kind_alone_in_a_list_and_from_a_generator(kind, detector, expected, paths, addresses):
    def given():
        return [KINDS[kind](picture(seed), paths[seed], addresses[seed]) for seed in range(3)]

    if not kind.startswith("undecoded"):
        assert detector(given()[1], candidate_labels=LABELS, **ALL) == expected[1]
        assert detector(given(), candidate_labels=LABELS, **ALL) == expected
        assert list(detector((each for each in given()), candidate_labels=LABELS, **ALL)) == expected
    rows = [{"image": each, "text_queries": LABELS} for each in given()]
    assert detector(rows, **ALL) == expected
    assert detector(rows[2], **ALL) == expected[2]


def test_generators_and_data_sets_are_read_one_by_one(detector, expected, paths):
    read = []

    def pictures():
        for path in paths:
            read.append(path)
            yield path

    results = detector(pictures(), candidate_labels=LABELS, **ALL)
    assert next(iter(results)) == expected[0]
    assert len(read) < 3
    assert detector(iter([]), candidate_labels=LABELS) is not None
    assert list(detector(map(str, paths), candidate_labels=LABELS, **ALL)) == expected


def test_data_sets_of_every_kind(detector, expected, paths):
    rows = Dataset.from_dict({"file": [str(path) for path in paths], "number": [0, 1, 2]})
    pictures = rows.rename_column("file", "image")
    for given in (
        KeyDataset(rows, "file"),
        KeyDataset([{"file": np.asarray(picture(seed))} for seed in range(3)], "file"),
        pictures,
        pictures.to_iterable_dataset(),
        IterableDataset.from_generator(lambda: ({"image": str(path)} for path in paths)),
    ):
        assert list(detector(given, candidate_labels=LABELS, **ALL)) == expected
    own = pictures.add_column("candidate_labels", [LABELS] * 3)
    assert list(detector(own, **ALL)) == expected


def test_batches_of_arrays_are_lists_of_pictures(detector, expected, paths):
    arrays = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    assert detector(arrays, candidate_labels=LABELS, **ALL) == expected
    assert detector(torch.from_numpy(arrays).permute(0, 3, 1, 2), candidate_labels=LABELS, **ALL) == expected
    names = [str(path) for path in paths]
    for given in (np.array(names), pandas.Series(names, index=[7, 8, 9])):
        assert detector(given, candidate_labels=LABELS, **ALL) == expected
    batched = detector(arrays, candidate_labels=LABELS, batch_size=3, **ALL)
    assert [len(result) for result in batched] == [len(result) for result in expected]
    assert detector([], candidate_labels=LABELS) == []


def test_each_picture_may_have_its_own_labels(detector, expected, paths):
    labels = [LABELS, ["dog"], LABELS]
    results = detector(paths, candidate_labels=labels, **ALL)
    assert (results[0], results[2]) == (expected[0], expected[2])
    assert {found["label"] for found in results[1]} == {"dog"}
    mixed = [{"image": paths[0]}, {"image": paths[1], "candidate_labels": ["dog"]}, paths[2]]
    assert detector(mixed, candidate_labels=LABELS, **ALL) == results
    assert detector(paths[1], candidate_labels=[["dog"]], **ALL) == results[1]


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        ([picture(), picture()], [["cat"]], "labels for 1 pictures but 2 pictures"),
        ((picture() for _ in range(2)), [["cat"], ["dog"]], "one list of labels for all"),
        ({"text_queries": ["cat"]}, None, "must have 'image', got text_queries"),
        ({"image": picture(), "text_queries": ["cat"], "candidate_labels": ["dog"]}, None, "differ"),
        (picture(), None, "has no labels; pass candidate_labels="),
        ([picture(), {"image": picture()}], None, "has no labels"),
    ],
)
def test_pictures_and_labels_that_do_not_fit_are_refused(given, labels, message, detector):
    with pytest.raises(ValueError, match=message):
        detector(given, candidate_labels=labels)


def test_other_inputs_and_options_are_named(detector):
    with pytest.raises(TypeError, match=r"The pipeline takes a picture, .* got int"):
        detector(3, candidate_labels=LABELS)
    with pytest.raises(TypeError, match="There is no option 'treshold'; the pipeline takes timeout"):
        detector(picture(), candidate_labels=LABELS, treshold=0.5)
    with pytest.raises(ValueError, match="candidate_labels and text_queries differ"):
        detector(picture(), candidate_labels=LABELS, text_queries=["dog"])


def test_other_names_of_options(detector, expected):
    assert detector(picture(0), text_queries=LABELS, **ALL) == expected[0]
    middle = expected[0][5]["score"]
    with pytest.warns(FutureWarning, match="box_threshold is now called threshold"):
        assert detector(picture(0), candidate_labels=LABELS, box_threshold=middle) == expected[0][:5]
    with pytest.raises(ValueError, match="differ; give one"):
        detector(picture(0), candidate_labels=LABELS, box_threshold=0.5, threshold=0.4)


def test_boxes_lie_within_the_picture(detector):
    boxes = [(0.01, 0.5, 0.2, 0.4), (0.5, 0.99, 0.4, 0.3), (0.5, 0.5, 1.4, 1.2), (0.5, 0.5, 0.5, 0.5)]
    output = {
        "logits": torch.full((1, len(boxes), 8), -9.0),
        "pred_boxes": torch.tensor([boxes]),
        "prompt": build_prompt(["cat"], detector.tokenizer),
        "target_size": (64, 80),
    }
    output["logits"][0, :, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    found = [list(result["box"].values()) for result in detector.postprocess([output], threshold=0.1)]
    assert found == [[0, 19, 8, 44], [24, 53, 56, 64], [0, 0, 80, 64], [20, 16, 60, 48]]
    assert SimpleNamespace(**output).pred_boxes.shape == (1, 4, 4)


def test_an_array_of_objects_is_a_list_of_pictures_or_refused(detector, tmp_path):
    picture().save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = detector(path, candidate_labels=LABELS, **ALL)
    assert detector(np.array(path), candidate_labels=LABELS, **ALL) == expected
    assert detector(np.array([path, path]), candidate_labels=LABELS, **ALL) == [expected, expected]
    # What numpy makes of a picture with dtype=object.
    with pytest.raises(TypeError, match=r"array of numbers.*got an array of object of the shape \(64, 80, 3\)"):
        detector(np.array(picture(), dtype=object), candidate_labels=LABELS, **ALL)


LABEL_FORMS = {
    "array": np.array(LABELS),
    "column": pandas.Series(LABELS),
    "index": pandas.Index(LABELS),
    "keys": dict.fromkeys(LABELS).keys(),
    "values": dict(enumerate(LABELS)).values(),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_may_be_an_array_a_column_or_the_keys_of_a_dict(form, detector, expected):
    assert detector(picture(0), candidate_labels=LABEL_FORMS[form], **ALL) == expected[0]
    rows = [{"image": picture(seed), "candidate_labels": LABEL_FORMS[form]} for seed in range(3)]
    assert detector(rows, **ALL) == expected
    assert detector.processor(text=LABEL_FORMS[form])["input_ids"].tolist() == (
        detector.processor(text=LABELS)["input_ids"].tolist()
    )


@pytest.mark.parametrize(
    "labels", [set(LABELS), (label for label in LABELS), pandas.Series([1, 2]), np.zeros((2, 3)), b"cat", {"cat": 1}]
)
def test_labels_without_an_order_or_that_are_no_text_are_refused_in_a_line(labels, detector):
    with pytest.raises(TypeError, match=r"^Labels must be a string or a list of strings, got .+\.$") as caught:
        detector(picture(0), candidate_labels=labels)
    assert "\n" not in str(caught.value)


def test_the_rows_of_a_table_are_pictures(detector, expected, paths):
    table = pandas.DataFrame({"image": list(map(str, paths)), "other": 3})
    assert detector(table, candidate_labels=LABELS, **ALL) == expected
    table["candidate_labels"] = [LABELS] * 3
    assert detector(table, **ALL) == expected


def test_base64_of_web_addresses_without_padding_is_a_picture(detector, expected):
    text = base64.urlsafe_b64encode(encoded(picture(0))).decode()
    assert "-" in text
    assert detector(text.rstrip("="), candidate_labels=LABELS, **ALL) == expected[0]


@pytest.mark.parametrize(
    "option", [{"threshold": "0.1"}, {"top_k": "3"}, {"nms_threshold": "x"}, {"text_threshold": True}], ids=str
)
def test_options_of_the_wrong_kind_are_refused_in_a_sentence(option, detector):
    (name,) = option
    with pytest.raises(ValueError, match=rf"^{name} .{{12,}}\.$"):
        detector(picture(0), candidate_labels=LABELS, **option)
