"""WebDataset tars: pictures with a JSON, XML or text file of the same name in uncompressed tar files."""

from __future__ import annotations

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..error_text import reason
from ..model.picture_formats import PICTURE_SUFFIXES
from ..model.printable import printable
from .box_formats import decide_numbers
from .content import BoxForm
from .createml_file import createml_marks, is_createml
from .faults import Findings, Report
from .labelme_folder import labelme_marks
from .odvg_content import read_label_map
from .picture_objects import fields_of, find_columns, row_marks
from .picture_sets import Mark, PictureEntry, PictureSet, files_of, read_mapping
from .places import SHARDS, SPLIT_NAMES, is_address, split_of
from .stored_pictures import open_binary, read_part, tar_picture
from .voc_document import parse_xml
from .voc_folder import voc_marks, voc_size
from .yolo_folder import NAME_LISTS, names_file, yolo_marks

_TAR, _COMPRESSED = ".tar", (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 10**6
_MOST_BYTES = 2**26

# What the numbers of each kind of annotation are; those of objects are found out from all boxes.
_NUMBERS: Mapping[str, tuple[BoxForm, bool]] = {
    "labelme": ("xyxy", False),
    "odvg": ("xyxy", False),
    "createml": ("cxcywh", False),
    "voc": ("xyxy", False),
    "yolo": ("cxcywh", True),
}


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Sample:
    """A picture and its annotations inside a tar."""

    shard: str
    picture: _Member
    annotation: _Member | None


class TarShards(PictureSet):
    """WebDataset tars; `base` is a path, an address, a pattern with {000..012} or *, a list joined by ::, or a folder.

    The tars' tables are read once; pictures are read at their place when they are needed.
    """

    form = "webdataset"
    title = "WebDataset tars"

    @classmethod
    def splits(cls, base: str) -> dict[str, str]:
        found = [split_of(PurePosixPath(shard).stem) for shard in shard_paths(base)]
        return {split: split for split in SPLIT_NAMES if split in found} if None not in found else {}

    @cached_property
    def _shards(self) -> list[str]:
        shards = shard_paths(self.base)
        wanted = split_of(self.split or "")
        own = [shard for shard in shards if split_of(PurePosixPath(shard).stem) == wanted]
        return own if wanted is not None and own else shards

    @cached_property
    def _samples(self) -> list[_Sample]:
        return [sample for shard in self._shards for sample in read_samples(shard)]

    def keys(self) -> Sequence[int]:
        return range(len(self._samples))

    def shown(self, key: Any) -> str:
        sample = self._samples[key]
        return f"{PurePosixPath(sample.shard).name}!{(sample.annotation or sample.picture).name}"

    @cached_property
    def _kind(self) -> str | None:
        """Kind of the first annotation; None if there is none."""
        for sample in self._samples:
            if sample.annotation is not None:
                try:
                    return _read(sample.annotation, self._bytes(sample))[0]
                except ValueError:
                    # Reading the rows reports this file.
                    continue
        return None

    def _bytes(self, sample: _Sample) -> bytes:
        assert sample.annotation is not None
        if sample.annotation.size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 20} MB")
        return read_part(sample.shard, sample.annotation.offset, sample.annotation.size)

    def names(self) -> dict[Any, str] | None:
        folder = Path(self._shards[0]).parent if self._shards and not is_address(self._shards[0]) else Path("-")
        if self._kind != "yolo":
            return dict(read_label_map(folder / "rows", None)) or None
        file = names_file(folder)
        if file is None:
            raise ValueError(
                f"{printable(self.base)} numbers its classes without naming them; put {NAME_LISTS[0]} with a name a "
                "line beside the tars."
            )
        return dict(enumerate(file.read_text(encoding="utf-8-sig").splitlines()))

    def box_numbers(self) -> tuple[BoxForm, bool]:
        return self._numbers

    @cached_property
    def _numbers(self) -> tuple[BoxForm, bool]:
        known = _NUMBERS.get(self._kind or "")
        return decide_numbers(self, self.options.box_format) if known is None else known

    def entry(self, key: int, report: Report) -> PictureEntry | None:
        sample = self._samples[key]
        stored = tar_picture(sample.shard, sample.picture.name, sample.picture.offset, sample.picture.size)
        entry = PictureEntry(f"{PurePosixPath(sample.shard).stem}/{sample.picture.name}", stored)
        if sample.annotation is None:
            report("pictures alone in tars", self.shown(key))
            return entry
        kind, content = _read(sample.annotation, self._bytes(sample))
        if kind != self._kind:
            raise ValueError(f"its annotations are of another kind ({kind}) than the first ones ({self._kind})")
        where = self.shown(key)
        entry.marks = self._marks(kind, content, where, report)
        entry.size = voc_size(content) if kind == "voc" else _size(content)
        return entry

    def _marks(self, kind: str, content: Any, where: str, report: Report) -> list[Mark]:
        if kind == "voc":
            return voc_marks(content, where, self.options, report)
        if kind == "yolo":
            return yolo_marks(content, where, report)
        if kind == "labelme":
            return labelme_marks(content, where, report)
        if kind == "createml":
            return createml_marks(content, where, report)
        if kind == "odvg":
            content = read_mapping(content["detection"], "its detection")
        columns = find_columns({name: fields_of(value) for name, value in content.items()}, where)
        return row_marks(content, columns, where, report)

    def finish(self, findings: Findings) -> None:
        if self._kind is None:
            findings.add("no annotations", printable(self.base))


def shard_paths(place: str) -> list[str]:
    """Return the tars that a place stands for; none if it does not stand for tars.

    Args:
        place: A path or address of a tar, a pattern with {000..012}, {a,b} or *, several joined by ::, or a folder.

    Raises:
        ValueError: The tars are compressed.
    """
    if place.endswith(_COMPRESSED):
        raise ValueError(
            f"{printable(place)} is compressed, so pictures cannot be read at their place; unpack it to a .tar."
        )
    if _TAR not in place:
        return [str(path) for path in files_of(Path(place), _TAR)] if not is_address(place) else []
    found = list(itertools.islice(_expanded(place), _MOST_SHARDS))
    return found if all(shard.endswith(_TAR) for shard in found) else []


def _expanded(place: str) -> Iterator[str]:
    for part in place.split(SHARDS):
        for shard in _braces(part):
            if "*" in shard and not is_address(shard):
                yield from sorted(glob.glob(shard))
            else:
                yield shard


def _braces(text: str) -> Iterator[str]:
    """Yield the texts that a text with {a,b} and {00..12} stands for."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    inside = _RANGE.fullmatch(found[1])
    if inside is None:
        choices: Iterator[str] = iter(found[1].split(","))
    else:
        first, last = int(inside[1]), int(inside[2])
        choices = (str(number).zfill(len(inside[1])) for number in range(first, last + 1))
    for choice in choices:
        yield from _braces(text[: found.start()] + choice + text[found.end() :])


def read_samples(shard: str) -> list[_Sample]:
    """Return the pictures of a tar with their annotations: members whose names are equal up to the first dot.

    Raises:
        ValueError: The tar cannot be read.
    """
    members: dict[str, list[_Member]] = {}
    try:
        with open_binary(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    path = PurePosixPath(member.name)
                    key = str(path.with_name(path.name.partition(".")[0])) if path.name.strip(".") else member.name
                    members.setdefault(key, []).append(_Member(member.name, member.offset_data, member.size))
    # Remote file systems raise exceptions of their own.
    except Exception as error:
        raise ValueError(f"{printable(shard)} cannot be read as a tar file ({reason(error)}).") from error
    samples = []
    for found in members.values():
        picture = next((each for each in found if each.name.lower().endswith(PICTURE_SUFFIXES)), None)
        others = [each for each in found if each.name.lower().endswith((".json", ".xml", ".txt"))]
        others.sort(key=lambda each: (".json", ".xml", ".txt").index(PurePosixPath(each.name).suffix.lower()))
        if picture is not None:
            samples.append(_Sample(shard, picture, others[0] if others else None))
    return samples


def _read(member: _Member, data: bytes) -> tuple[str, Any]:
    """Return the kind of an annotation and its content.

    Raises:
        ValueError: It cannot be read.
    """
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix == ".xml":
        return "voc", parse_xml(data, "annotation")
    text = data.decode("utf-8-sig", "replace")
    if suffix == ".txt":
        return "yolo", text
    try:
        content = read_mapping(json.loads(text), "it")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "shapes" in content:
        return "labelme", content
    if "detection" in content:
        return "odvg", content
    return ("createml" if is_createml(content) else "objects"), content


def _size(content: Any) -> tuple[Any, Any] | None:
    if not isinstance(content, Mapping):
        return None
    size = tuple(content.get(side, content.get(f"image{side.title()}")) for side in ("width", "height"))
    return (size[0], size[1]) if all(size) else None
