"""Formats with a file for each picture: YOLO, Pascal VOC, LabelMe and PNG pictures of masks."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any

from ..model.printable import printable
from ..whole_files import check_writable, whole_folder, write_whole_text
from . import labelme_exchange, xml_exchange, yolo_exchange
from .format_writer import FormatWriter
from .mask_pictures import mask_picture

logger = logging.getLogger(__name__)

# Bytes of a file name that file systems allow.
_LONGEST_NAME = 255


class FilesPerPicture(FormatWriter):
    """A folder with a file for each picture, which readers find by the picture's name without its ending."""

    ending = ""

    @classmethod
    def check(cls, folder: Path) -> None:
        check_writable((folder / cls.place).with_suffix(cls.ending))

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        self._place = stack.enter_context(whole_folder(folder / self.place))
        # Path of the latest file inside its folder.
        self.last = Path()
        self._taken: set[str] = set()
        self._renamed = 0
        self._first: tuple[str, Path] | None = None

    def add(self, found: Any, name: str, number: int) -> None:
        self.last = self._path(name)
        path = self._place / self.last
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write(path, found, name)

    def write(self, path: Path, found: Any, name: str) -> None:
        """Write the file of a picture."""
        path.write_text(self.text(found, name), encoding="utf-8", errors="backslashreplace", newline="\n")

    def text(self, found: Any, name: str) -> str:
        raise NotImplementedError

    def finish(self) -> None:
        if self._first is not None:
            logger.warning(
                "%s finds labels by a picture's name without its ending, which is that of another picture for %d "
                "pictures; rename them as their label files, for instance %s, whose labels are in %s.",
                self.purpose,
                self._renamed,
                printable(self._first[0]),
                printable(self._first[1]),
            )

    def _path(self, name: str) -> Path:
        """Choose the file of a picture, which lies inside the folder whatever the picture's name is."""
        if "://" in name:
            # An address: its last part, without the query and without characters that file systems refuse.
            name = re.sub(r"[^\w. -]", "_", name.partition("?")[0].rpartition("/")[2])
        parts = [part.replace("\0", "_") for part in PurePath(name).parts if part not in ("..", PurePath(name).anchor)]
        picture = PurePath(*(parts or ["image"]))
        path = Path(picture.with_name(_short_enough(picture.stem, self.ending)))
        number = 1
        while str(path).lower() in self._taken:
            ending = (f"-{number}" if number > 1 else "") + self.ending
            path = Path(picture.with_name(_short_enough(picture.name, ending)))
            number += 1
        if number > 1:
            self._renamed += 1
            self._first = self._first or (name, path)
        self._taken.add(str(path).lower())
        return path


def _short_enough(stem: str, ending: str) -> str:
    """Return a file name that file systems accept, cut before its ending if need be."""
    kept = os.fsencode(stem)[: _LONGEST_NAME - len(ending)]
    return kept.decode(errors="ignore" if len(kept) < len(os.fsencode(stem)) else "surrogateescape") + ending


class Yolo(FilesPerPicture):
    """Lines of boxes, or of outlines where there are masks."""

    place, shown, ending = "yolo/labels", "yolo", ".txt"
    purpose = "YOLO"

    def text(self, found: Any, name: str) -> str:
        return "".join(f"{line}\n" for line in yolo_exchange.label_lines(found, scores=False))

    def finish(self) -> None:
        super().finish()
        write_whole_text(self.folder / "yolo" / "data.yaml", yolo_exchange.data_yaml(self.names))


class Voc(FilesPerPicture):
    """Documents, and the list of the pictures of a split."""

    place, shown, ending = "voc/Annotations", "voc", ".xml"
    purpose = "Pascal VOC"

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        # Readers of the devkit's layout list a split's pictures here.
        self._list = self.open("voc/ImageSets/Main/train.txt")

    def add(self, found: Any, name: str, number: int) -> None:
        super().add(found, name, number)
        self._list.write(f"{printable(self.last.with_name(self.last.name[: -len(self.ending)]).as_posix())}\n")

    def text(self, found: Any, name: str) -> str:
        return xml_exchange.voc_document(found, PurePath(name).name)


class LabelMe(FilesPerPicture):
    """JSON files that LabelMe opens beside the pictures."""

    place, shown, ending = "labelme", "labelme", ".json"
    purpose = "LabelMe files, to copy into the folder of pictures"

    def text(self, found: Any, name: str) -> str:
        return json.dumps(labelme_exchange.labelme_document(found, PurePath(name).name), ensure_ascii=False) + "\n"


class MaskPictures(FilesPerPicture):
    """Numbers of objects in objects/, numbers of labels in labels/, and labels.json, the label of each number."""

    place, shown, ending = "masks", "masks", ".png"
    purpose = "masks as PNG pictures of numbers"

    def write(self, path: Path, found: Any, name: str) -> None:
        for kind in ("objects", "labels"):
            place = self._place / kind / self.last
            place.parent.mkdir(parents=True, exist_ok=True)
            mask_picture(found, kind).save(place)  # type: ignore[arg-type]

    def finish(self) -> None:
        super().finish()
        names = {str(number): name for number, name in enumerate(self.names, 1)}
        text = json.dumps(names, ensure_ascii=False) + "\n"
        (self._place / "labels.json").write_text(text, encoding="utf-8", errors="backslashreplace")
