"""Names that images are known not to contain: read from COCO, LVIS and ODVG, checked, and the only negatives there."""

import json
import random

import pytest
from PIL import Image

from gdino_hf.cli import main
from gdino_hf.data.checks import check_dataset
from gdino_hf.data.collator import GDinoDataCollator
from gdino_hf.data.formats import open_dataset
from gdino_hf.data.mosaic import Mosaic
from gdino_hf.data.negatives import PromptSampler
from gdino_hf.data.transforms import mirror
from gdino_hf.evaluation.ground_truth import coco_ground_truth

NAMES = ["cat", "dog", "cup", "hat", "lion"]
BOX = [1, 1, 5, 5]


def coco(folder, *fields):
    """Write a file with an image for each dict of fields and a cat in each."""
    images = []
    for number, more in enumerate(fields):
        Image.new("RGB", (20, 10), (number * 40,) * 3).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 20, "height": 10, **more})
    content = {
        "images": images,
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": BOX} for n in range(len(fields))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)],
    }
    path = folder / "train.json"
    path.write_text(json.dumps(content))
    return path


def odvg(folder, *fields, inside=False):
    """Write the same as ODVG lines, with the fields in the line or in its "detection"."""
    lines = []
    for number, more in enumerate(fields):
        Image.new("RGB", (20, 10)).save(folder / f"{number}.png")
        detection = {"instances": [{"bbox": BOX, "label": 1}]} | (more if inside else {})
        line = {"filename": f"{number}.png", "width": 20, "height": 10, "detection": detection}
        lines.append(line | ({} if inside else more))
    (folder / "label_map.json").write_text(json.dumps(dict(enumerate(NAMES, 1))))
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def kinds(path):
    ignored = ("empty classes", "repeated photographs")
    return {item.kind: item.count for item in check_dataset(path).findings if item.kind not in ignored}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [coco, odvg, lambda folder, *fields: odvg(folder, *fields, inside=True)])
def test_absent_names_are_read(tmp_path, write, streaming):
    fields = [{"neg_names": ["dog", "cup"]}, {"neg_names": []}, {}, {"neg_category_ids": [4, 99]}, {"neg_names": None}]
    path = write(tmp_path, *fields)
    rows, _ = open_dataset(path, streaming=streaming)
    assert [row["neg_names"] for row in rows] == [["dog", "cup"], [], None, ["hat"], None]
    assert kinds(path) == {}


def test_files_without_such_a_field_have_no_such_column(tmp_path):
    assert "neg_names" not in open_dataset(coco(tmp_path, {}, {}))[0].column_names
    assert "neg_names" not in open_dataset(odvg(tmp_path, {}, {}))[0].column_names


@pytest.mark.parametrize("write", [coco, odvg])
@pytest.mark.parametrize(
    ("field", "kind", "read"),
    [
        ({"neg_names": "dog"}, "broken absent names", []),
        ({"neg_names": ["dog", 7, " "]}, "broken absent names", ["dog"]),
        ({"neg_names": {"dog": 1}}, "broken absent names", []),
        ({"neg_names": ["dog", "CAT "]}, "contradicting absent names", ["dog"]),
        ({"neg_names": ["dog", "unicorn"]}, "absent names without class", ["dog", "unicorn"]),
        *(
            ({name: ["dog"]}, "unread absent names", None)
            for name in ("negative_names", "neg_labels", "negatives", "negative_categories", "absent_names", "neg")
        ),
        ({"neg_text": "dog"}, "unread absent names", None),
    ],
)
def test_fields_that_cannot_be_used_are_named(tmp_path, caplog, write, field, kind, read):
    path = write(tmp_path, field, {"neg_names": ["dog"]})
    assert kinds(path).keys() == {kind}
    rows, _ = open_dataset(path)
    assert [row["neg_names"] for row in rows] == [read, ["dog"]]
    assert (kind in caplog.text) == (kind in ("broken absent names", "unread absent names"))


@pytest.mark.parametrize("field", ["source", "negligible", "license", "negotiated_names", "coco_url"])
def test_other_fields_are_no_matter_of_absent_names(tmp_path, field):
    assert kinds(coco(tmp_path, {field: ["dog"]})) == {}


def test_absent_names_beside_a_caption_are_not_read_and_named(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    grounding = {"caption": "a cat", "regions": [{"bbox": BOX, "phrase": "cat"}]}
    line = {"filename": "a.png", "width": 20, "height": 10, "grounding": grounding, "neg_names": ["dog"]}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line))
    assert kinds(path) == {"unread absent names": 1}


def row(**fields):
    return {"image": Image.new("RGB", (64, 64)), "boxes": [[1, 1, 9, 9]], "names": ["cat"], **fields}


def prompts(collator, *rows):
    return [set(labels) for labels in collator(list(rows))["text"]]


def test_only_absent_names_are_negatives(tiny_processor):
    collator = GDinoDataCollator(tiny_processor, prompt_sampler=PromptSampler(NAMES, (5, 5)), return_text=True)
    rows = [row(neg_names=["dog", "Cup"]), row(neg_names=[]), row(neg_names=None), row()]
    assert prompts(collator, *rows) == [{"cat", "dog", "Cup"}, {"cat"}, set(NAMES), set(NAMES)]
    # An image of nothing, of which nothing is known, is asked for one neutral label.
    assert prompts(collator, row(names=[], boxes=[], neg_names=[])) == [{"object"}]


def test_functions_and_batches_that_propose_other_names_are_restricted_too(tiny_processor):
    def everything(names, rng):
        return [*NAMES]

    collator = GDinoDataCollator(tiny_processor, prompt_sampler=everything, return_text=True)
    assert prompts(collator, row(neg_names=["dog"])) == [{"cat", "dog"}]
    collator = GDinoDataCollator(tiny_processor, return_text=True)
    other = row(names=["hat"], neg_names=["cat"])
    assert prompts(collator, row(neg_names=["dog"]), other) == [{"cat"}, {"hat", "cat"}]
    # Fixed labels are those of every prompt.
    collator = GDinoDataCollator(tiny_processor, labels=NAMES, return_text=True)
    assert prompts(collator, row(neg_names=["dog"])) == [set(NAMES)]


def test_mirroring_swaps_the_sides_in_absent_names():
    mirrored = mirror(row(names=["left arrow"], neg_names=["right arrow", "cat"]))
    assert (mirrored["names"], mirrored["neg_names"]) == (["right arrow"], ["left arrow", "cat"])


@pytest.mark.parametrize(
    ("lists", "common"),
    [
        ([["dog", "cup"], ["Cup ", "hat"], ["hat", "cup"], ["cup"]], ["cup"]),
        ([["dog", "cup"], None, ["cup", "dog"], None], ["dog", "cup"]),
        ([["dog"], [], ["dog"], ["dog"]], []),
    ],
)
def test_a_mosaic_lacks_what_all_its_images_lack(lists, common):
    rows = [row(neg_names=names) for names in lists]

    class InOrder:
        """Draws the other three images one by one."""

        place = 0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            self.place += 1
            return rows[self.place]

    result = Mosaic(InOrder(), probability=1)(rows[0], random.Random(0))
    assert sorted(name.strip().lower() for name in result["neg_names"]) == sorted(common)
    assert "neg_names" not in Mosaic([row()] * 3, probability=1)(row(), random.Random(0))


def test_evaluation_counts_a_label_only_where_it_is_annotated(tmp_path):
    truth = coco_ground_truth(coco(tmp_path, {"neg_names": ["dog"]}, {"neg_names": []}, {}))
    assert truth.is_federated
    assert [reference["negative_labels"] for reference in truth.references.values()] == [[1], [], [1, 2, 3, 4]]
    assert not coco_ground_truth(coco(tmp_path, {}, {})).is_federated
    broken = coco_ground_truth(coco(tmp_path, {"neg_category_ids": 7, "not_exhaustive_category_ids": "a"}, {}))
    assert [reference["negative_labels"] for reference in broken.references.values()] == [[], []]


def test_wild_photographs_have_the_negatives_of_their_own_set(shared, tiny_processor):
    """The convention of the shared data: each image lists the names of its set that it lacks."""
    content = json.loads((shared / "data" / "wild" / "val.json").read_text())
    rows, names = open_dataset(shared / "data" / "wild" / "val.json")
    assert rows["neg_names"] == [image["neg_names"] for image in content["images"]]
    sampler, rng = PromptSampler(names, (len(names), len(names))), random.Random(0)
    for image in content["images"][::10]:
        held = rows[image["id"] - content["images"][0]["id"]]["names"]
        assert set(sampler(held, rng, image["neg_names"])) == {*held, *image["neg_names"]}


def test_training_and_evaluation_take_such_files(tmp_path, tiny_folder, capsys):
    for number, split in enumerate(("train", "val")):
        (tmp_path / split).mkdir()
        coco(tmp_path / split, {"neg_names": ["dog", "cup"]}, {"neg_names": []}, {}, {"neg_names": ["hat"]})
        (tmp_path / split / "train.json").rename(tmp_path / split / f"{split}.json")
        for image in (tmp_path / split).glob("*.png"):
            Image.new("RGB", (20, 10), (number * 99, int(image.stem) * 50, 9)).save(image)
    options = ["--model", str(tiny_folder), "--runs", str(tmp_path / "runs")]
    assert main(["train", str(tmp_path), *options, "--max-steps", "2", "--use_cpu", "--augment", "small-set"]) == 0
    assert main(["eval", str(tmp_path / "val" / "val.json"), *options]) == 0
    assert "APr" in capsys.readouterr().out
