"""Hugging Face data sets with `objects`: by id on the Hub, saved to a folder, or as Parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..error_text import reason
from ..model.picture_formats import PICTURE_SUFFIXES
from ..model.printable import printable
from .box_formats import decide_numbers
from .content import BoxForm
from .faults import OUTSIDE, Report
from .odvg_content import read_label_map
from .picture_objects import ObjectColumns, find_columns, row_marks
from .picture_sets import PictureEntry, PictureSet, is_inside
from .places import SPLIT_NAMES, is_address, is_there, split_of
from .stored_pictures import Picture, StoredPicture, read_all

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hf://datasets/"
"""What a place begins with that is surely an id on the Hub, also without a slash."""

SAVED = ("dataset_dict.json", "state.json")
"""Files of folders that `save_to_disk` wrote."""

_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "png")
_SIZE, _ID = ("width", "height"), "image_id"
# Columns of rows that training gives a meaning of its own.
_OURS = ("boxes", "names", "crowd", "caption", "spans", "neg_names", "sample_key", "resized", "replayed", "crowd_names")
# What a column of that name is called beside ours.
_GIVEN = "_given"


class ObjectTable(PictureSet):
    """A Hugging Face data set; `base` is an id (perhaps with @CONFIG), a folder or a Parquet file.

    Pictures stay where the data set has them: in memory-mapped files on disk.
    """

    form = "huggingface"
    title = "a Hugging Face data set (an id on the Hub, a saved folder or Parquet)"
    holds_pictures = True

    @classmethod
    def splits(cls, base: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in split_names(base):
            split = split_of(name)
            # The exact name stands before a longer one, such as train_small.
            if split is not None and (split not in found or name in SPLIT_NAMES[split]):
                found[split] = name
        return found

    @classmethod
    def has_split(cls, base: str, split: str) -> bool:
        return split.partition("[")[0] in split_names(base)

    @cached_property
    def table(self) -> Dataset:
        """The rows as the data set has them."""
        return load_table(self.base, self.split)

    def keys(self) -> Sequence[int]:
        return range(len(self.table))

    def shown(self, key: Any) -> str:
        return f"row {key}"

    @cached_property
    def _image_column(self) -> str:
        from datasets import Image

        features = self.table.features
        found = [name for name, feature in features.items() if isinstance(feature, Image)]
        named = [name for name in (*found, *features) if name in _IMAGE_COLUMNS]
        if not (named or found):
            raise ValueError(
                f"{printable(self.base)} has no column of pictures but {printable(', '.join(features))}; call it image."
            )
        return (named or found)[0]

    @cached_property
    def _columns(self) -> ObjectColumns:
        features = self.table.features
        fields = {name: _fields(feature) for name, feature in features.items()}
        kinds = {name: "name" for feature in features.values() for name in _named_fields(feature)}
        kinds |= {name: "name" for name, feature in features.items() if _is_name(feature)}
        return find_columns(fields, printable(self.base), kinds)

    @cached_property
    def _rows(self) -> Dataset:
        """The columns with boxes, names, sizes and ids."""
        columns = self._columns
        wanted = (columns.objects, columns.box, columns.label, columns.crowd, columns.area, *_SIZE, _ID)
        return self.table.select_columns([name for name in self.table.column_names if name in wanted])

    @cached_property
    def _pictures(self) -> Dataset:
        from datasets import Image

        column = self._image_column
        return self.table.select_columns([column]).cast_column(column, Image(decode=False))

    @cached_property
    def _paths(self) -> list[str | None]:
        """Name of each picture in its column."""
        import pyarrow.compute as pc

        column = self._pictures.data.column(self._image_column)
        return list(pc.struct_field(column, "path").to_pylist())

    @cached_property
    def _are_files(self) -> bool:
        """Whether the column has paths of files in place of their content."""
        import pyarrow.compute as pc

        column = self._pictures.data.column(self._image_column)
        return bool(pc.struct_field(column, "bytes").null_count == len(column))

    @cached_property
    def _ids(self) -> list[int] | None:
        """The image ids of the data set, if they are numbers and each stands for one row."""
        if _ID not in self._rows.column_names:
            return None
        ids = list(self._rows[_ID])
        is_usable = all(isinstance(number, int) and not isinstance(number, bool) for number in ids)
        return ids if is_usable and len(set(ids)) == len(ids) else None

    def names(self) -> dict[Any, str] | None:
        columns = self._columns
        features = self.table.features
        feature = _label_feature(features[columns.objects or columns.label], columns.label)
        if hasattr(feature, "names"):
            return dict(enumerate(feature.names))
        if getattr(feature, "dtype", None) in ("string", "large_string"):
            return None
        beside = read_label_map(Path(self.base) / "rows", None) if is_there(self.base) else {}
        if not beside:
            raise ValueError(
                f"{printable(self.base)} numbers its classes in {columns.label} without naming them; cast the column "
                'to ClassLabel, or put a label_map.json with {"0": "cat", ...} into its folder.'
            )
        return dict(beside)

    def box_numbers(self) -> tuple[BoxForm, bool]:
        return self._numbers

    @cached_property
    def _numbers(self) -> tuple[BoxForm, bool]:
        return decide_numbers(self, self.options.box_format)

    def entry(self, key: int, report: Report) -> PictureEntry | None:
        where = self.shown(key)
        row = self._rows[key]
        picture = self.picture(key, report)
        if picture is None:
            return None
        size = tuple(row.get(side) for side in _SIZE)
        marks = row_marks(row, self._columns, where, report)
        image_id = None if self._ids is None else self._ids[key]
        return PictureEntry(picture.name, picture, marks, (size[0], size[1]) if all(size) else None, image_id)

    def picture(self, key: int, report: Report) -> Picture | None:
        found = self._picture(key)
        if not self._is_allowed(found):
            report(OUTSIDE, f"{self.shown(key)}: its path {printable(found)} leads outside the data set's folder")
            return None
        return found

    def _picture(self, key: int) -> Picture:
        path = self._paths[key]
        if self._are_files and path is not None and is_address(path):
            return StoredPicture(self.base, path, lambda: read_all(path))
        if self._are_files:
            return Path(path or f"row-{key}")
        return StoredPicture(self.base, self._file_names[key], lambda: self._content(key))

    @cached_property
    def _file_names(self) -> list[str]:
        """A name for each stored picture: that of its column if these are names of files, and each stands for one."""
        names = [PurePosixPath(path or "").name for path in self._paths]
        if len(set(names)) == len(names) and all(name.lower().endswith(PICTURE_SUFFIXES) for name in names):
            return names
        suffixes = [PurePosixPath(name).suffix.lower() for name in names]
        return [
            f"{self.split or 'row'}-{key:06d}{suffix if suffix in PICTURE_SUFFIXES else '.jpg'}"
            for key, suffix in enumerate(suffixes)
        ]

    def _content(self, key: int) -> bytes:
        value = self._pictures[key][self._image_column]
        if value is None or value["bytes"] is None:
            raise OSError(f"row {key} has no picture")
        return bytes(value["bytes"])

    def _is_allowed(self, path: Picture) -> bool:
        from datasets import config
        from huggingface_hub import constants

        if self.options.paths == "anywhere":
            return True
        if isinstance(path, StoredPicture):
            # Addresses on the Hub are those of the data set itself.
            return not self._are_files or path.name.startswith("hf://")
        caches = [config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
        return is_inside(path, [*caches, *([self.base] if is_there(self.base) else [])])

    def joined(self, rows: Dataset) -> Dataset:
        from datasets import concatenate_datasets

        from .picture_column import PictureColumn

        key_of = None if self._ids is None else {number: key for key, number in enumerate(self._ids)}
        keys = [number if key_of is None else key_of[number] for number in rows["image_id"]]
        own = self.table if keys == list(range(len(self.table))) else self.table.select(keys)
        pictures = own.select_columns([self._image_column])
        if self._image_column != "image":
            pictures = pictures.rename_column(self._image_column, "image")
        pictures = pictures.cast_column("image", PictureColumn())
        more = own.remove_columns([name for name in (self._image_column, *_SIZE, _ID) if name in own.column_names])
        for name in more.column_names:
            if name in _OURS or name == "image":
                more = more.rename_column(name, name + _GIVEN)
        parts = [pictures, rows.remove_columns("image")] + ([more] if more.column_names else [])
        return concatenate_datasets(parts, axis=1)


def split_names(base: str) -> list[str]:
    """Return the names of a data set's splits, as it has them; none for a single table.

    Raises:
        ValueError: It cannot be found.
    """
    folder = Path(base)
    if is_there(folder / SAVED[0]):
        return list(_read_splits(folder / SAVED[0]))
    if is_there(folder / SAVED[1]) or folder.is_file():
        return []
    from datasets import get_dataset_split_names

    name, config = _id_and_config(base)
    try:
        return list(get_dataset_split_names(name, config))
    # Whatever the library and the network raise, the user gets one sentence.
    except Exception as error:
        raise _cannot_load(base, error) from error


def load_table(base: str, split: str | None) -> Dataset:
    """Load a split of a data set, memory-mapped from disk; a data set on the Hub is downloaded first.

    Raises:
        ValueError: It cannot be loaded.
    """
    import datasets

    folder = Path(base)
    try:
        if any(is_there(folder / name) for name in SAVED):
            saved = datasets.load_from_disk(base)
            return saved[split or next(iter(saved))] if isinstance(saved, datasets.DatasetDict) else saved
        if folder.is_file():
            return datasets.Dataset.from_parquet(base)
        name, config = _id_and_config(base)
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:
        raise _cannot_load(base, error) from error


def _id_and_config(base: str) -> tuple[str, str | None]:
    if is_there(base):
        return base, None
    name, _, config = base.removeprefix(HUB).partition("@")
    return name, config or None


def _cannot_load(base: str, error: Exception) -> ValueError:
    why = reason(error, most_lines=2).rstrip(".")
    if is_there(base):
        return ValueError(f"{printable(base)} cannot be read as a Hugging Face data set ({why}).")
    return ValueError(f"{printable(base)} does not exist, and cannot be loaded from the Hub as a data set ({why}).")


def _read_splits(file: Path) -> Sequence[str]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{printable(os.fspath(file))} cannot be read ({reason(error)}).") from error


def _inner(feature: Any) -> Any:
    """Return what the items of a list are."""
    return getattr(feature, "feature", feature)


def _fields(feature: Any) -> list[str]:
    inner = _inner(feature)
    return list(inner) if isinstance(inner, Mapping) else []


def _named_fields(feature: Any) -> list[str]:
    """Return the fields that are text or named classes."""
    inner = _inner(feature)
    return [name for name, kind in inner.items() if _is_name(kind)] if isinstance(inner, Mapping) else []


def _is_name(feature: Any) -> bool:
    inner = _inner(feature)
    return hasattr(inner, "names") or getattr(inner, "dtype", None) in ("string", "large_string")


def _label_feature(feature: Any, label: str) -> Any:
    """Return the kind of a label, in a list or column of its own or among the fields of objects."""
    inner = _inner(feature)
    return _inner(inner[label]) if isinstance(inner, Mapping) else inner
