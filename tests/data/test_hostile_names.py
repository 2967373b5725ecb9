"""Messages about data never hold what a terminal would act on, whatever files, folders and classes are called."""

import json
import logging
import random
import warnings
from pathlib import Path

import pytest
from PIL import Image

from gdino_hf.data.annotation_files import annotation_file, annotation_format, find_split
from gdino_hf.data.annotation_options import AnnotationOptions
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.collator import GDinoDataCollator
from gdino_hf.data.formats import open_dataset
from gdino_hf.data.odvg_content import odvg_names, read_label_map
from gdino_hf.data.reproducible_sampling import ReproducibleDataset
from gdino_hf.evaluation.coco_results import read_coco_results
from gdino_hf.evaluation.ground_truth import coco_ground_truth
from gdino_hf.evaluation.open_ground_truth import open_ground_truth
from gdino_hf.evaluation.prediction_file import PredictionFile, read_predictions
from gdino_hf.evaluation.table import read_table
from gdino_hf.model.printable import printable
from gdino_hf.training.splits import read_split, split_file

PIECES = ("\x1b[2J", "\x1b]0;title\x07", "\r", "\x9b31m", "\u202egnp.exe", "\u2066", "\x08\x08", "\x7f", "\u2028", "\n")
SEEDS = range(4)


def hostile(rng):
    """Return a name with several characters that a terminal acts on."""
    return "a" + "b".join(rng.sample(PIECES, 4)) + "c"


@pytest.fixture
def messages(caplog):
    """Return a function that calls a function and returns its exception's message, log lines and warnings."""

    def messages(call, *args, **kwargs):
        caplog.clear()
        said = []
        with caplog.at_level(logging.DEBUG, "gdino_hf"), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                result = call(*args, **kwargs)
                if not isinstance(result, (str, dict, list, tuple, Path, type(None))):
                    said.append(str(result))
            # Only documented errors are expected; others would be raised here.
            except (OSError, ValueError, TypeError) as error:
                said.append(str(error))
        said += [record.getMessage() for record in caplog.records if record.name.startswith("gdino_hf")]
        return said + [str(warning.message) for warning in warned]

    return messages


def assert_harmless(said):
    for text in said:
        for line in text.split("\n"):
            assert line == printable(line), ascii(text)
        assert "\n\n" not in text


def coco(name):
    """Return COCO content in which every field that can hold text holds the name."""
    images = [
        {"id": 1, "file_name": "there.png", "width": 20, "height": 10},
        {"id": name, "file_name": name, "width": name, "height": 10},
        {"id": 3, "file_name": f"../{name}", "width": 20, "height": 10},
        {"id": 4, "file_name": "damaged" + name, "width": 20, "height": 10},
        {"id": 4, "file_name": "there.png", "width": 7, "height": 9},
        {"id": [name], "file_name": [name]},
        name,
    ]
    boxes = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]},
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]},
        {"id": name, "image_id": 1, "category_id": 1, "bbox": [1, 1, 50, 5], "iscrowd": name, "area": name},
        {"id": name, "image_id": name, "category_id": name, "bbox": [name, 1, 5, 5]},
        {"id": name, "image_id": 1, "category_id": {"a": name}, "bbox": name, "segmentation": [[name] * 4]},
        {"id": name, "image_id": [name], "category_id": 1, "segmentation": {"size": [9, 9], "counts": name}},
        name,
    ]
    names = [
        {"id": 1, "name": "cat", "supercategory": name},
        {"id": name, "name": name},
        {"id": 3, "name": name.upper(), "supercategory": "cat"},
        {"id": 1, "name": name + " ", "supercategory": name},
        {"id": 5, "name": [name]},
        name,
    ]
    return {"images": images, "annotations": boxes, "categories": names}


def spoilt(content, rng):
    """Return the content with all its faults, or with only a few, so that readers get past the first."""
    if rng.random() < 0.3:
        return content
    return {key: [entries[0], *rng.sample(entries[1:], rng.randrange(3))] for key, entries in content.items()}


def odvg(name):
    """Return lines in which every field that can hold text holds the name."""
    there = {"filename": "there.png", "width": 20, "height": 10}
    box = {"bbox": [1, 1, 5, 5], "category": "cat"}
    return [
        {**there, "detection": {"instances": [box]}},
        {**there, "detection": {"instances": [{**box, "category": name}, {**box, "bbox": [name] * 4}]}},
        {**there, "filename": name, "detection": {"instances": [box]}},
        {**there, "filename": f"../{name}", "detection": {"instances": [box]}},
        {**there, "filename": "damaged" + name, "detection": {"instances": [box]}},
        {**there, "width": name, "detection": {"instances": [{"bbox": [1, 1, 5, 5], "label": name}]}},
        {**there, "detection": {"instances": name}},
        {**there, "detection": name},
        {**there, "grounding": {"caption": name, "regions": []}},
        {**there, name: name},
        name,
    ]


def grounding(name):
    there = {"filename": "there.png", "width": 20, "height": 10}
    region = {"bbox": [1, 1, 5, 5], "phrase": name}
    return [
        {**there, "grounding": {"caption": f"a {name}", "regions": [region]}},
        {**there, "grounding": {"caption": "none", "regions": [{**region, "tokens_positive": [[name, 1]]}]}},
        {**there, "grounding": {"caption": "none", "regions": [{**region, "tokens_positive": name}, region]}},
        {**there, "grounding": {"caption": [name], "regions": name}},
    ]


def prepare(folder, name):
    """Make a data set's folder, whose name is hostile too, with a picture and a damaged one."""
    place = folder / name / "set"
    place.mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(place / "there.png")
    (place / ("damaged" + name)).write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    return place


def read_all(messages, path, options):
    """Return the messages of everything that reads an annotation file."""
    said = messages(lambda: check_dataset(path, options=options, max_examples=99))
    said += messages(lambda: check_dataset(path, options=options).raise_for_errors())
    said += messages(lambda: str(read_split(path, options=options).remarks).replace("\\n", "") and None)
    for streaming in (False, True):
        said += messages(lambda streaming=streaming: [0 for _ in open_dataset(path, None, streaming, options)[0]])
    said += messages(open_ground_truth, path, None, options)
    said += messages(annotation_format, path)
    said += messages(annotation_file, path.parent)
    said += messages(find_split, path, "val")
    return said + messages(split_file, path.parent, "test", "--test")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_messages_about_coco_files(tmp_path, messages, seed, unreadable):
    rng = random.Random(seed)
    name = hostile(rng)
    place = prepare(tmp_path, name)
    path = place / f"{name}.json"
    number = 0
    for _ in range(4):
        path.write_text(json.dumps(spoilt(coco(name), rng)))
        said = read_all(messages, path, AnnotationOptions(unreadable=unreadable))
        assert_harmless(said)
        number += sum(r"\x" in text or r"\u" in text for text in said)
    # The name does appear, escaped.
    assert number > 10


@pytest.mark.parametrize("kind", [odvg, grounding])
@pytest.mark.parametrize("seed", SEEDS)
def test_messages_about_odvg_files(tmp_path, messages, seed, kind):
    rng = random.Random(seed)
    name = hostile(rng)
    place = prepare(tmp_path, name)
    path = place / f"{name}.jsonl"
    lines = kind(name)
    for unreadable in ("stop", "skip"):
        for chosen in (lines, rng.sample(lines, 2), [lines[0], rng.choice(lines)]):
            path.write_text("\n".join(map(json.dumps, chosen)) + "\n{" + name.encode("unicode_escape").decode())
            said = read_all(messages, path, AnnotationOptions(unreadable=unreadable))
            said += messages(odvg_names, path)
            assert_harmless(said)
            assert any(r"\x" in text or r"\u" in text for text in said)


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_about_files_that_are_none(tmp_path, messages, seed):
    rng = random.Random(seed)
    name = hostile(rng)
    place = prepare(tmp_path, name)
    path = place / f"train{name}.json"
    said = messages(check_dataset, place / name)
    said += messages(split_file, place / name, "train", "DATA")
    for text in ("", "[]", "{", json.dumps({"images": name}), json.dumps({name: name}), "\0" + name):
        path.write_text(text)
        said += read_all(messages, path, AnnotationOptions())
        said += messages(check_dataset, place)
    (place / "label_map.json").write_text(json.dumps({name: name}))
    said += messages(read_label_map, path, None)
    (place / "label_map.json").write_text(json.dumps([name]))
    said += messages(read_label_map, path, None)
    (place / f"data{name}.yaml").write_text(f"- name: '{name.encode('unicode_escape').decode()}'\n- {{")
    said += messages(read_table, place / f"data{name}.yaml")
    (place / f"data{name}.yaml").write_text(json.dumps([{"name": name, name: name}]))
    said += messages(read_table, place / f"data{name}.yaml")
    (place / "train.json").write_text(json.dumps(coco("a")))
    (place / f"train_{name}.json").write_text(json.dumps(coco("a")))
    (place / f"train-{name}.json").write_text(json.dumps(coco("a")))
    (place / "train.json").unlink()
    said += messages(find_split, place, "train") + messages(annotation_file, place)
    assert len(said) > 30
    assert_harmless(said)


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_about_predictions(tmp_path, messages, seed):
    name = hostile(random.Random(seed))
    place = prepare(tmp_path, name)
    content = {key: entries[:1] for key, entries in coco("a").items()}
    (place / "val.json").write_text(json.dumps(content))
    truth = coco_ground_truth(place / "val.json")
    path = place / f"{name}.json"
    found = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}
    said = []
    for change in ({"image_id": name}, {"category_id": name}, {"bbox": name}, {"score": name}, {"image_id": [name]}):
        for others in ([], [found]):
            path.write_text(json.dumps([*others, {**found, **change}]))
            said += messages(read_coco_results, path, truth)
    path.write_text(json.dumps({name: name}))
    said += messages(read_coco_results, path, truth)
    for line in ({"format": name}, {"format": "gdino-predictions", "version": name}):
        path.write_text(json.dumps(line) + "\n")
        said += messages(read_predictions, path)
    header = json.dumps({"format": "gdino-predictions", "version": 1, "labels": [name]}) + "\n"
    for line in ("{", json.dumps({name: name}), json.dumps({"image_id": name, "labels": [name]})):
        path.write_text(header + line + "\n")
        said += messages(read_predictions, path)
    path.write_text(header)
    said += messages(PredictionFile, path, {"labels": [name, name]})
    assert len(said) > 15
    assert_harmless(said)


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_of_loading_and_collating(tmp_path, messages, tiny_processor, seed):
    name = hostile(random.Random(seed))
    place = prepare(tmp_path, name)
    content = {key: entries[:1] for key, entries in coco(name).items()}
    content["images"][0]["file_name"] = f"{name}.png"
    content["categories"][0]["name"] = name
    (place / "there.png").rename(place / f"{name}.png")
    (place / "train.json").write_text(json.dumps(content))
    rows, labels = open_dataset(place)
    (place / f"{name}.png").write_bytes(b"damaged")
    said = messages(lambda: ReproducibleDataset(rows)[0])
    said += messages(lambda: ReproducibleDataset(rows, on_error="skip")[0])
    collator = GDinoDataCollator(tiny_processor, labels=["cat"])
    row = {"image": Image.new("RGB", (64, 64)), "boxes": [[1, 1, 9, 9]], "names": labels}
    said += messages(collator, [row])
    caption = {"caption": f"a {name}", "spans": [[[0, 900]]]}
    said += messages(GDinoDataCollator(tiny_processor), [{**row, **caption}])
    long = {**row, "names": [name * 80]}
    said += messages(GDinoDataCollator(tiny_processor), [long])
    assert len(said) >= 4
    assert_harmless(said)
