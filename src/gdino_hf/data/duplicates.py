"""Photographs that a data set holds twice: under two names, or in two splits, whose metrics are then too good."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .annotation_files import annotation_format, other_splits
from .annotation_options import AnnotationOptions
from .content import PICTURE
from .faults import Findings
from .image_paths import ImagePaths
from .odvg_content import odvg_lines
from .reading import read_content
from .rows import parse_line
from .stored_pictures import Picture, StoredPicture

Pair = tuple[Picture, Picture]
"""Two pictures that are equal."""

# Bytes compared at the beginning, the middle and the end of files of equal size.
_SAMPLE = 4096
# Smaller files are drawings or pictures of one colour, of which a data set may have many.
_SMALLEST_PHOTOGRAPH = 1024
# Roboflow names the copies that it makes of a photograph NAME.rf.HASH.jpg.
_COPY_MARK = ".rf."


def twins(paths: Iterable[Picture], others: Iterable[Picture]) -> tuple[list[Pair], list[Pair]]:
    """Find photographs that are equal, comparing samples of files of equal size.

    Args:
        paths: Photographs of a split.
        others: Photographs of the other splits. Those that are also among `paths` by name are left out.

    Returns:
        Pairs within `paths`, and pairs of one of `paths` and one of `others`. Copies that Roboflow made of one
        photograph count as equal in two splits.
    """
    own = list(dict.fromkeys(paths))
    foreign = [path for path in dict.fromkeys(others) if path not in set(own)]
    by_size: dict[int, list[Picture]] = defaultdict(list)
    origins: dict[str, Picture] = {}
    for path in own:
        by_size[_size(path)].append(path)
        if _COPY_MARK in path.name:
            origins.setdefault(_origin(path), path)
    by_size.pop(0, None)
    within: list[Pair] = []
    first: dict[tuple[int, bytes], Picture] = {}
    wanted = {size for path in foreign if (size := _size(path)) in by_size}
    for size, same in by_size.items():
        if len(same) < 2 and size not in wanted:
            continue
        for path in same:
            known = first.setdefault((size, _sample(path, size)), path)
            if known != path and size >= _SMALLEST_PHOTOGRAPH:
                within.append((known, path))
    across: list[Pair] = []
    for path in foreign:
        size = _size(path)
        twin = first.get((size, _sample(path, size))) if size in wanted else None
        if twin is None and _COPY_MARK in path.name:
            twin = origins.get(_origin(path))
        if twin is not None:
            across.append((twin, path))
    return within, across


def photographs_of_other_splits(file: Path, images: str | Path | None, options: AnnotationOptions) -> Iterator[Picture]:
    """Yield the photographs of the other splits of the data set that an annotation file belongs to.

    Args:
        file: The annotation file.
        images: Folder of the images, if one was named.
        options: Conventions of the file.
    """
    for other in other_splits(file):
        paths = ImagePaths(other, images, options)
        try:
            if annotation_format(other) == "odvg":
                for _, line in odvg_lines(other):
                    yield from _found(paths, {"file_name": parse_line(line).get("filename")})
            else:
                for entry in read_content(other, images, options, Findings()).images:
                    yield from [entry[PICTURE]] if PICTURE in entry else _found(paths, entry)
        except ValueError:
            # Checking that split reports what is wrong with it.
            continue


def _found(paths: ImagePaths, entry: dict) -> Iterator[Path]:
    try:
        yield paths.find_coco(entry)
    except ValueError:
        return


def _origin(path: Picture) -> str:
    return path.name.rpartition(_COPY_MARK)[0]


def _size(path: Picture) -> int:
    try:
        return path.size() if isinstance(path, StoredPicture) else path.stat().st_size
    except (OSError, ValueError):
        return 0


def _sample(path: Picture, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    except OSError:
        # Equal to nothing: the path is unique.
        digest.update(str(path).encode(errors="surrogateescape"))
    return digest.digest()
