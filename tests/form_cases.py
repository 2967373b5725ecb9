"""The same pictures and boxes written in every form of data set, for tests that compare what is read."""

import io
import json
import tarfile
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

NAMES = ["bird", "cat", "dog"]
SIZES = {"a.png": (64, 48), "b.png": (40, 80), "c.png": (50, 50)}
# Whole pixels whose fractions of the pictures' sizes are exact in few decimals.
BOXES = {
    "a.png": [("dog", (8, 12, 24, 36)), ("cat", (32, 0, 64, 24))],
    "b.png": [("bird", (10, 20, 30, 60))],
    "c.png": [],
}
ROWS = [
    {
        "width": SIZES[name][0],
        "height": SIZES[name][1],
        "boxes": [[float(side) for side in box] for _, box in boxes],
        "names": [label for label, _ in boxes],
        "crowd": [False] * len(boxes),
    }
    for name, boxes in BOXES.items()
]


def picture(place: int, size: tuple[int, int]) -> Image.Image:
    """Return a picture of a colour that its place tells."""
    return Image.new("RGB", size, (40 * place, 90, 200))


def write_pictures(folder: Path) -> None:
    """Write the pictures, each of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, (name, size) in enumerate(SIZES.items()):
        picture(place, size).save(folder / name)


def coco(root: Path) -> Path:
    """COCO json beside images/."""
    write_pictures(root / "images")
    images, annotations = [], []
    for number, (name, boxes) in enumerate(BOXES.items()):
        width, height = SIZES[name]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for label, (x1, y1, x2, y2) in boxes:
            row = {"id": len(annotations), "image_id": number, "category_id": NAMES.index(label)}
            annotations.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "train.json").write_text(json.dumps(content))
    return root / "train.json"


def odvg(root: Path) -> Path:
    """ODVG json lines with a label map."""
    write_pictures(root / "images")
    lines = []
    for name, boxes in BOXES.items():
        instances = [{"bbox": list(box), "label": NAMES.index(label), "category": label} for label, box in boxes]
        width, height = SIZES[name]
        row = {"filename": name, "width": width, "height": height, "detection": {"instances": instances}}
        lines.append(json.dumps(row))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    (root / "label_map.json").write_text(json.dumps({str(number): name for number, name in enumerate(NAMES)}))
    return root / "train.jsonl"


def _yolo_line(name, label, box):
    width, height = SIZES[name]
    x1, y1, x2, y2 = box
    values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    return " ".join([str(NAMES.index(label)), *(repr(value) for value in values)])


def _outline(name, label, box):
    width, height = SIZES[name]
    x1, y1, x2, y2 = (side / size for side, size in zip(box, (width, height) * 2, strict=True))
    return " ".join(map(str, [NAMES.index(label), x1, y1, x2, y1, x2, y2, x1, y2]))


def _yolo(root: Path, line, pictures: str, labels: str, description: str) -> Path:
    write_pictures(root / pictures)
    (root / labels).mkdir(parents=True, exist_ok=True)
    for name, boxes in BOXES.items():
        # The last picture has no label file, which means no objects.
        if boxes:
            text = "".join(line(name, *each) + "\n" for each in boxes)
            (root / labels / name).with_suffix(".txt").write_text(text)
    (root / "data.yaml").write_text(description)
    return root / "data.yaml"


def yolo(root: Path) -> Path:
    """YOLO with images/train and labels/train."""
    return _yolo(root, _yolo_line, "images/train", "labels/train", f"path: .\ntrain: images/train\nnames: {NAMES}\n")


def yolo_roboflow(root: Path) -> Path:
    """YOLO as Roboflow exports it: ../train/images, and outlines."""
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    text = f"train: ../train/images\nval: ../valid/images\nnc: 3\nnames:\n{names}\n"
    _yolo(root, _outline, "train/images", "train/labels", text)
    return root


def _voc_xml(name):
    width, height = SIZES[name]
    objects = "".join(
        f"<object><name>{escape(label)}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in BOXES[name]
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def voc(root: Path) -> Path:
    """Pascal VOC in the devkit's folders."""
    write_pictures(root / "JPEGImages")
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name in BOXES:
        (root / "Annotations" / name).with_suffix(".xml").write_text(_voc_xml(name))
    (root / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{Path(name).stem}\n" for name in BOXES))
    return root


def voc_flat(root: Path) -> Path:
    """Pascal VOC with documents beside the pictures in a split's folder."""
    write_pictures(root / "train")
    for name in BOXES:
        (root / "train" / name).with_suffix(".xml").write_text(_voc_xml(name))
    return root


def createml(root: Path) -> Path:
    """CreateML as Roboflow exports it."""
    write_pictures(root / "train")
    rows = []
    for name, boxes in BOXES.items():
        marks = []
        for label, (x1, y1, x2, y2) in boxes:
            sides = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "width": x2 - x1, "height": y2 - y1}
            marks.append({"label": label, "coordinates": sides})
        rows.append({"image": name, "annotations": marks})
    (root / "train" / "_annotations.createml.json").write_text(json.dumps(rows))
    return root


def labelme(root: Path) -> Path:
    """LabelMe with rectangles whose corners are in either order, and polygons."""
    write_pictures(root)
    for name, boxes in BOXES.items():
        shapes = []
        for place, (label, (x1, y1, x2, y2)) in enumerate(boxes):
            kind, points = ("rectangle", [[x2, y2], [x1, y1]])
            if place % 2:
                kind, points = ("polygon", [[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
            shapes.append({"label": label, "shape_type": kind, "points": points, "flags": {}, "group_id": None})
        width, height = SIZES[name]
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": name, "imageData": None}
        content |= {"imageHeight": height, "imageWidth": width}
        (root / name).with_suffix(".json").write_text(json.dumps(content))
    return root


def label_studio(root: Path) -> Path:
    """An export of Label Studio: rectangles and polygons, of which the latest annotation counts."""
    write_pictures(root / "images")
    tasks: list[dict] = []
    for name, boxes in BOXES.items():
        width, height = SIZES[name]
        result = []
        for place, (label, (x1, y1, x2, y2)) in enumerate(boxes):
            percent = {"x": x1 / width, "y": y1 / height, "width": (x2 - x1) / width, "height": (y2 - y1) / height}
            value = {side: 100 * number for side, number in percent.items()} | {"rotation": 0}
            kind = "rectanglelabels"
            if place % 2:
                kind, corners = "polygonlabels", [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
                value = {"points": [[100 * x / width, 100 * y / height] for x, y in corners]}
            region = {"original_width": width, "original_height": height, "image_rotation": 0, "type": kind}
            result.append({**region, "id": f"r{place}", "from_name": "label", "value": {**value, kind: [label]}})
        old = {"id": 1, "was_cancelled": False, "result": [{"type": "choices", "value": {"choices": ["bad"]}}]}
        annotations = [old, {"id": 2, "was_cancelled": False, "result": result}]
        address = f"/data/local-files/?d={name}" if len(tasks) % 2 else f"/data/upload/3/0a1b2c3d-{name}"
        tasks.append({"id": len(tasks), "annotations": annotations, "data": {"image": address}, "predictions": []})
    (root / "train.json").write_text(json.dumps(tasks))
    return root


def imagefolder(root: Path) -> Path:
    """An imagefolder with metadata.jsonl, whose boxes can only be corner and size."""
    write_pictures(root / "train")
    lines = []
    for name, boxes in BOXES.items():
        bbox = [[x1, y1, x2 - x1, y2 - y1] for _, (x1, y1, x2, y2) in boxes]
        lines.append(
            json.dumps({"file_name": name, "objects": {"bbox": bbox, "category": [label for label, _ in boxes]}})
        )
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def _objects_table(category):
    """Return a `datasets.Dataset` with the pictures inside and boxes as corner and size."""
    from datasets import Dataset, Features, Image, List, Value

    rows = []
    for number, (name, boxes) in enumerate(BOXES.items()):
        labels = [label for label, _ in boxes]
        objects = {
            "bbox": [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for _, (x1, y1, x2, y2) in boxes],
            "category": labels if category is None else [NAMES.index(label) for label in labels],
            "area": [float((x2 - x1) * (y2 - y1)) for _, (x1, y1, x2, y2) in boxes],
        }
        rows.append({"image_id": number, "image": _encoded(number, name), "licence": f"of {name}", "objects": objects})
    kind = Value("string") if category is None else category
    fields = {"bbox": List(List(Value("float32"), length=4)), "category": List(kind), "area": List(Value("float32"))}
    columns = {"image_id": Value("int64"), "image": Image(), "licence": Value("string"), "objects": fields}
    return Dataset.from_list(rows, features=Features(columns))


def _encoded(number, name):
    content = io.BytesIO()
    picture(number, SIZES[name]).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": name}


def hub_saved(root: Path) -> Path:
    """A data set dict saved by `datasets`, with ClassLabel."""
    from datasets import ClassLabel, DatasetDict

    rows = _objects_table(ClassLabel(names=NAMES))
    DatasetDict({"train": rows}).save_to_disk(root / "saved")
    return root / "saved"


def hub_parquet(root: Path) -> Path:
    """A folder of Parquet files as the Hub has them, with categories as text."""
    rows = _objects_table(None)
    (root / "data").mkdir()
    rows.to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return root


def _tar(path: Path, rows) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in rows:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def webdataset(root: Path) -> Path:
    """Two tars with a JSON beside each picture, given by a pattern."""
    shards = [[], []]
    for number, (name, boxes) in enumerate(BOXES.items()):
        bbox = [[x1, y1, x2 - x1, y2 - y1] for _, (x1, y1, x2, y2) in boxes]
        content = {"objects": {"bbox": bbox, "category": [label for label, _ in boxes]}}
        shard = shards[number // 2]
        shard.append((name, _encoded(number, name)["bytes"]))
        shard.append((f"{Path(name).stem}.json", json.dumps(content).encode()))
    for number, rows in enumerate(shards):
        _tar(root / f"part-{number:03}.tar", rows)
    return root / "part-{000..001}.tar"


def webdataset_yolo(root: Path) -> Path:
    """A folder with a tar of pictures and YOLO label files, and classes.txt beside it."""
    rows = []
    for number, (name, boxes) in enumerate(BOXES.items()):
        rows.append((f"train/{name}", _encoded(number, name)["bytes"]))
        text = "".join(_yolo_line(name, *each) + "\n" for each in boxes)
        rows.append((f"train/{Path(name).stem}.txt", text.encode()))
    _tar(root / "pictures.tar", rows)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


FORMS = {
    maker.__name__: maker
    for maker in (
        coco,
        odvg,
        yolo,
        yolo_roboflow,
        voc,
        voc_flat,
        createml,
        labelme,
        label_studio,
        imagefolder,
        hub_saved,
        hub_parquet,
        webdataset,
        webdataset_yolo,
    )
}
"""Functions that write the data set in a form into an existing folder and return its path."""
