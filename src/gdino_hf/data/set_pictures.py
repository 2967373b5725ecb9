"""The pictures of a data set with all its splits, for work that needs no boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..error_text import reason
from .annotation_files import SUFFIXES, all_annotation_files, annotation_file, annotation_format
from .annotation_options import DEFAULT_OPTIONS
from .coco_content import load_coco
from .faults import OUTSIDE, Findings
from .forms import TITLES, KnownSet, form_of, known_set
from .image_paths import ImagePaths, OutsideError
from .object_tables import SAVED, ObjectTable, split_names
from .odvg_content import odvg_lines
from .places import SPLIT_NAMES, is_there, split_place, with_split
from .reading import open_set
from .rows import is_file, parse_line, parse_text
from .stored_pictures import Picture
from .tar_shards import TarShards
from .voc_folder import VocFolder

# Endings of files that can be a data set; the pictures of archives are found without their annotations.
_SUFFIXES = (*SUFFIXES, ".yaml", ".yml")
# Forms whose pictures lie in archives.
_IN_ARCHIVES = (ObjectTable.form, TarShards.form)


@dataclass(frozen=True)
class RecognizedSet:
    """A data set whose form was recognized.

    Attributes:
        base: Its file or folder.
        form: Its form, a key of `TITLES`.
        parts: Its annotation files or splits, as `annotation_file` returns them; none for tar and Parquet files, whose
            pictures can be listed without them.
    """

    base: str
    form: str
    parts: tuple[Path, ...]

    @property
    def title(self) -> str:
        """What the form is called in messages, without the examples that tell users what else it can be."""
        return TITLES[self.form].partition(" (")[0]

    def part_names(self) -> list[str]:
        """Return the names of the splits or annotation files; none for a folder that is one part.

        Files of one name, such as those of an export's folders, are told apart by their folders.
        """
        named = [split_place(part)[1] or (part.name if is_file(part) else "") for part in self.parts]
        pairs = zip(named, self.parts, strict=True)
        return [f"{part.parent.name}/{name}" if named.count(name) > 1 else name for name, part in pairs if name]

    def pictures(self, part: Path, findings: Findings) -> Iterator[Picture]:
        """Yield the pictures of a part in its order. The file of a picture need not exist.

        Args:
            part: One of `parts`.
            findings: Receives entries that name no picture, and paths that lead outside the data set.

        Raises:
            ValueError: The part cannot be read.
        """
        reader = open_set(part)
        if reader is None:
            yield from _listed_pictures(part, findings)
            return
        for key in reader.keys():  # noqa: SIM118 - a reader is no mapping
            try:
                picture = reader.picture(key, findings.add)
            except (OSError, ValueError) as error:
                findings.add("broken entries", f"{reader.shown(key)}: {reason(error)}")
                continue
            if picture is not None:
                yield picture
        for path in reader.paths_outside():
            findings.add(OUTSIDE, path)


def recognized_set(place: str) -> RecognizedSet | None:
    """Recognize a data set with all its splits, or the one split that is named after a colon.

    Args:
        place: A path.

    Returns:
        The data set; None for anything else, such as a folder of pictures.

    Raises:
        ValueError: It is a data set, but cannot be read.
    """
    base, split = split_place(place)
    path = Path(base)
    if not is_there(path):
        return None
    if split is not None:
        part = annotation_file(place)
        return RecognizedSet(base, annotation_format(part), (part,))
    if is_file(path) and path.suffix.lower() not in _SUFFIXES:
        return None
    files = list(all_annotation_files(path)) if path.is_dir() else [path] if _is_annotation_file(path) else []
    if files:
        return RecognizedSet(base, annotation_format(files[0]), tuple(files))
    form = form_of(base)
    if form in _IN_ARCHIVES and not _is_saved(base):
        return RecognizedSet(base, form, ())
    known = known_set(base) if form is not None else None
    if known is not None:
        return RecognizedSet(known.base, known.form, _parts(known))
    # Exports may have a folder for each split and nothing above them.
    folders = [path / name for names in SPLIT_NAMES.values() for name in names if (path / name).is_dir()]
    folders = [folder for folder in folders if form_of(str(folder)) not in (None, *_IN_ARCHIVES)]
    inside = [known for known in map(known_set, map(str, folders)) if known is not None]
    if not inside:
        return None
    return RecognizedSet(base, inside[0].form, tuple(part for each in inside for part in _parts(each)))


def _is_saved(base: str) -> bool:
    return any(is_there(Path(base) / name) for name in SAVED)


def _is_annotation_file(path: Path) -> bool:
    try:
        return path.suffix in SUFFIXES and bool(annotation_format(path))
    except ValueError:
        return False


def _parts(known: KnownSet) -> tuple[Path, ...]:
    """Return the splits of a data set as its reader takes them."""
    names = [known.split] if known.split is not None else list(known.splits)
    splits = [known.splits.get(name, name) for name in names]
    if known.form == VocFolder.form:
        # Its documents are in one folder, and its lists of splits need not name them all.
        splits = []
    elif known.form == ObjectTable.form and names:
        splits = split_names(known.base)
    return tuple(Path(with_split(known.base, split)) for split in splits) or (Path(known.base),)


def _listed_pictures(file: Path, findings: Findings) -> Iterator[Path]:
    """Yield the pictures that a COCO or ODVG file lists."""
    paths = ImagePaths(file, None, DEFAULT_OPTIONS)
    finders = _coco_finders if annotation_format(file) == "coco" else _odvg_finders
    for where, find in finders(file, paths, findings):
        try:
            yield find()
        except OutsideError as error:
            findings.add(OUTSIDE, f"{where}: {error}")
        except ValueError as error:
            findings.add("broken entries", f"{where}: {error}")


def _coco_finders(file: Path, paths: ImagePaths, findings: Findings) -> Iterator[tuple[str, Callable[[], Path]]]:
    for number, image in enumerate(load_coco(file, findings).images):
        yield f"image {number}", partial(paths.find_coco, image)


def _odvg_finders(file: Path, paths: ImagePaths, findings: Findings) -> Iterator[tuple[str, Callable[[], Path]]]:
    def find(line: bytes) -> Path:
        return paths.find(parse_text(parse_line(line).get("filename"), "its filename"))

    for number, line in odvg_lines(file):
        yield f"line {number}", partial(find, line)
