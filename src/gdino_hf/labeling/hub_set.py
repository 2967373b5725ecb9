"""A data set for the Hub from a finished run: Parquet files with pictures and `objects`, and a card that says how."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from ..detection.exchange_values import kept_library
from ..detection.table_exchange import objects_features, objects_row
from ..error_text import reason
from ..model.printable import printable
from ..whole_files import whole_file, write_whole_text
from .label_results import shard_rows
from .label_settings import read_manifest
from .label_store import LabelStore, finished_shards
from .shard_files import LabelRow
from .shard_labels import PictureReader
from .source_items import SourceItem

FOLDER = "hub"
# Bytes of pictures in a file, about; the Hub's viewer reads row groups of up to 300 MB.
_FILE_BYTES = 400 * 2**20
_GROUP_BYTES = 50 * 2**20
# What the Hub's viewer and other readers decode; pictures of other formats are stored as PNG.
_STORED_AS_THEY_ARE = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
# Labels of which the card tells the number of boxes.
_MOST_IN_CARD = 50


@dataclass
class HubSet:
    """A data set that is ready to upload.

    Attributes:
        folder: Folder of the card and the Parquet files.
        pictures: Number of pictures in it.
        boxes: Number of boxes of each label.
        left_out: Source and reason of each picture that could be labelled, but not read again.
    """

    folder: Path
    pictures: int = 0
    boxes: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)


def write_hub_set(store: LabelStore, keep_empty: bool = True) -> HubSet:
    """Write the data set of a finished run into its folder of results, picture by picture.

    The columns are those of `Detections.to_objects`, which the Hub's viewer draws: image, image_id, width, height, and
    objects with bbox (x, y, width, height in pixels), category, score, area and id.

    Args:
        store: Files of the run, which is finished.
        keep_empty: Whether pictures in which nothing was found belong to it.

    Raises:
        ImportError: datasets is not installed.
        OSError: It cannot be written.
        ValueError: The run is not finished.
    """
    manifest = read_manifest(store)
    if manifest is None or not manifest.get("finished"):
        raise ValueError(f"{store.folder} holds no finished run; label the pictures first.")
    settings = manifest["settings"]
    names = [entry["label"] for entry in settings["vocabulary"]["labels"]]
    datasets = kept_library("datasets", "A data set for the Hub needs", "train")
    parquet = kept_library("pyarrow.parquet", "A data set for the Hub needs", "label")
    features = datasets.Features({"image": datasets.Image(), **objects_features(names)})
    made = HubSet(store.path(FOLDER))
    store.remove(FOLDER)
    groups = _groups(_rows(store, made, keep_empty))
    number, group = 0, next(groups, [])
    while group or number == 0:
        path = made.folder / f"data/train-{number:05d}.parquet"
        with whole_file(path) as unfinished, parquet.ParquetWriter(unfinished, features.arrow_schema) as file:
            group = _fill(file, group, groups, features.arrow_schema)
        number += 1
    write_whole_text(made.folder / "README.md", card(made, settings, names))
    return made


def push_hub_set(made: HubSet, repository: str, private: bool = False) -> str:
    """Upload a data set.

    Args:
        made: What `write_hub_set` returned.
        repository: Id of the data set on the Hub, "USER/NAME"; it is made if it is not there.
        private: Whether a new data set is private.

    Returns:
        Its address.

    Raises:
        OSError: The Hub cannot be reached, or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=address.repo_id,
        folder_path=made.folder,
        repo_type="dataset",
        commit_message=f"{made.pictures} pictures labelled with gdino-hf",
    )
    return str(address)


def card(made: HubSet, settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the card of a data set: what it holds, and how the boxes were made.

    Args:
        made: The data set.
        settings: Settings of the run.
        names: Its labels.
    """
    import yaml

    total = sum(made.boxes.values())
    head = {
        "task_categories": ["object-detection"],
        "tags": ["gdino-hf", "zero-shot-object-detection", "machine-generated"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    shown = sorted(names, key=lambda name: -made.boxes[name])[:_MOST_IN_CARD]
    rows = "\n".join(f"| {_cell(name)} | {made.boxes[name]:,} |" for name in shown)
    more = f"\n{len(names) - len(shown)} more labels have fewer boxes.\n" if len(names) > len(shown) else ""
    options = {name: settings[name] for name in ("threshold", "nms_threshold", "tiles", "dtype") if name in settings}
    own = {
        str(entry["label"]): entry["threshold"]
        for entry in settings["vocabulary"]["labels"]
        if entry["threshold"] is not None
    }
    if own:
        options["thresholds of labels"] = own
    how = "\n".join(f"- {name.replace('_', ' ')}: `{json.dumps(value)}`" for name, value in options.items())
    if "segmenter" in settings:
        how += (
            f"\n- masks, which this data set does not hold: `{_cell(settings['segmenter'])}`, SHA-256 of its files "
            f"`{settings['segmenter_fingerprint']}`"
        )
        how += "; the boxes are the bounds of the masks" if settings["tighten"] else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {made.pictures:,} pictures with {total:,} boxes

The boxes were found by a model and not checked by people. `objects` has `bbox` (x, y, width, height in pixels of the
upright picture), `category`, and the model's `score` in 0..1.

| label | boxes |
|---|---|
{rows}
{more}
Made with gdino-hf by `gdino label`:

- model: `{_cell(str(settings["model"]))}`, SHA-256 of its files `{settings["fingerprint"]}`
{how}

The pictures keep the licences of their sources.
"""


def _rows(store: LabelStore, made: HubSet, keep_empty: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of the data set, and count them."""
    read = PictureReader()
    for row in shard_rows(store, sorted(finished_shards(store))):
        if row.found is None or not (keep_empty or len(row.found)):
            continue
        try:
            content = _picture(read, row)
        except Exception as error:  # decoders and file systems raise exceptions of any type
            made.left_out[row.source] = reason(error, name_file=True)
            continue
        made.boxes.update(row.found.text_labels)
        name = PurePath(row.source).name
        yield {"image": {"bytes": content, "path": name}, **objects_row(row.found, made.pictures)}
        made.pictures += 1


def _picture(read: PictureReader, row: LabelRow) -> bytes:
    """Return a picture's content in a format that other readers decode, of the size in which its boxes are."""
    from ..model.picture_formats import picture_format
    from ..model.picture_pixels import load_image

    content = read(SourceItem(row.source, row.place))
    content = Path(content).read_bytes() if isinstance(content, str) else content
    picture = load_image(content)
    assert row.found is not None
    if picture.size != row.found.size:
        raise ValueError("it was changed after it was labelled")
    if picture_format(content, content[-64:]) in _STORED_AS_THEY_ARE:
        return content
    file = io.BytesIO()
    Image.Image.save(picture, file, "PNG")
    return file.getvalue()


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"])
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _fill(file: Any, group: list[dict[str, Any]], groups: Iterator[list[dict[str, Any]]], schema: Any) -> Any:
    """Write groups of rows into a Parquet file until it is large enough, and return the next group."""
    arrow = kept_library("pyarrow", "A data set for the Hub needs", "label")
    size = 0
    while size == 0 or (group and size < _FILE_BYTES):
        file.write_table(arrow.Table.from_pylist(group, schema))
        size += 1 + sum(len(row["image"]["bytes"]) for row in group)
        group = next(groups, [])
    return group


def _cell(text: str) -> str:
    """Return text for a table of Markdown."""
    return printable(text, limit=100).replace("|", "\\|").replace("`", "'")
