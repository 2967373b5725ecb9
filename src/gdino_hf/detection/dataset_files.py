"""Data sets on disk in the formats of other tools, written picture by picture, whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote
from xml.etree import ElementTree

from ..whole_files import whole_file, write_whole_text
from . import annotation_tools, coco_exchange, table_exchange, xml_exchange
from .exchange_values import kept_library, picture_name
from .files_per_picture import LabelMe, MaskPictures, Voc, Yolo
from .format_writer import FormatWriter
from .spreadsheet_cells import harmless_cell, table_writer

logger = logging.getLogger(__name__)

# Boxes gathered before they are written to a Parquet file: fewer would make many small row groups.
_ROW_GROUP = 10_000


class DataSetFiles:
    """Writes the detections of many pictures as data sets, without keeping them in memory.

    ```python
    with DataSetFiles("found", ["coco", "yolo"], labels) as files:
        for path, found in detector.stream(paths, labels):
            if isinstance(found, Detections):
                files.add(found)
    ```

    The files appear in the folder when the block ends, in place of earlier ones; if it ends with an exception, earlier
    files stay as they are.

    Args:
        folder: Folder of the files, which is made.
        formats: Names from `FORMATS`.
        names: All labels, the `names` of each picture's detections.

    Raises:
        ImportError: A format needs a library that is not installed.
        OSError: The folder cannot be written to.
        ValueError: A format is unknown.
    """

    def __init__(self, folder: str | Path, formats: Iterable[str], names: Sequence[str]) -> None:
        self.folder, self.names = Path(folder), tuple(names)
        self.formats = tuple(dict.fromkeys(formats))
        unknown = next((name for name in self.formats if name not in FORMATS), None)
        if unknown is not None:
            raise ValueError(f"There is no format {unknown!r}; choose from {', '.join(FORMATS)}.")
        self._writers: list[FormatWriter] = []
        self._number = 0
        self._stack = ExitStack()
        for name in self.formats:
            FORMATS[name].check(self.folder)

    def __enter__(self) -> DataSetFiles:
        with ExitStack() as stack:
            self._writers = [FORMATS[name](self.folder, self.names, stack) for name in self.formats]
            self._stack = stack.pop_all()
        return self

    def add(self, found: Any, file_name: str | None = None) -> None:
        """Write the detections of the next picture.

        Args:
            found: `Detections` whose `names` are those of the data set.
            file_name: Path of the picture inside the folder of pictures; its `source` by default.

        Raises:
            OSError: The disk is full or cannot be written to.
            ValueError: The detections have other names.
        """
        if found.names != self.names:
            raise ValueError(
                f"The picture's labels are {', '.join(found.names)}, but the data set's are {', '.join(self.names)}; "
                "all pictures of a data set need the same labels in the same order."
            )
        for writer in self._writers:
            writer.add(found, picture_name(found, file_name), self._number)
        self._number += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # The stack puts the files in place, or removes them if there is an exception.
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            for writer in self._writers:
                writer.finish()

    def paths(self) -> dict[str, Path]:
        """Return the file, or the folder of several files, of each format."""
        return {name: self.folder / FORMATS[name].shown for name in self.formats}


class _JsonRows:
    """Writes the items of a JSON list, one a line."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._separator = file, "\n"

    def add(self, row: Any) -> None:
        self._file.write(self._separator + json.dumps(row, ensure_ascii=False))
        self._separator = ",\n"


class _OneFile(FormatWriter):
    """A format with one text file."""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        self._file = self.open(self.place)


class _Coco(_OneFile):
    place = shown = "coco.json"
    purpose = "COCO data set"
    polygons = False

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        # Annotations follow all images in the file, so they wait on disk.
        waiting = tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  by the stack
        self._waiting = stack.enter_context(waiting)
        categories = json.dumps(coco_exchange.category_rows(names), ensure_ascii=False)
        self._file.write(f'{{"categories": {categories},\n"images": [')
        self._images, self._annotations, self._next = _JsonRows(self._file), _JsonRows(self._waiting), 1

    def add(self, found: Any, name: str, number: int) -> None:
        self._images.add(coco_exchange.image_row(found, number + 1, name))
        for row in coco_exchange.annotation_rows(found, number + 1, self._next, polygons=self.polygons):
            self._annotations.add(row)
        self._next += len(found)

    def finish(self) -> None:
        self._file.write('],\n"annotations": [')
        self._waiting.seek(0)
        shutil.copyfileobj(self._waiting, self._file)
        self._file.write("]}\n")


class _CocoPolygons(_Coco):
    place = shown = "coco_polygons.json"
    purpose = "COCO data set with masks as polygons"
    polygons = True


class _JsonList(_OneFile):
    """A JSON list with an entry for each picture, or several."""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        self._file.write("[")
        self._rows = _JsonRows(self._file)

    def add(self, found: Any, name: str, number: int) -> None:
        for row in self.rows(found, name, number):
            self._rows.add(row)

    def rows(self, found: Any, name: str, number: int) -> list[Any]:
        raise NotImplementedError

    def finish(self) -> None:
        self._file.write("]\n")


class _CocoResults(_JsonList):
    place = shown = "coco_results.json"
    purpose = "COCO results, with the image ids of the data set"

    def rows(self, found: Any, name: str, number: int) -> list[Any]:
        return coco_exchange.result_rows(found, number + 1, None)


class _CreateML(_JsonList):
    place = shown = "createml.json"
    purpose = "CreateML"

    def rows(self, found: Any, name: str, number: int) -> list[Any]:
        return [annotation_tools.createml_entry(found, name)]


class _LabelStudio(_JsonList):
    place = shown = "labelstudio.json"
    purpose = "Label Studio tasks with predictions, and labelstudio.xml, the labeling configuration"

    def rows(self, found: Any, name: str, number: int) -> list[Any]:
        prediction = annotation_tools.label_studio_prediction(found, "label", "image", None)
        # Label Studio opens files below its LOCAL_FILES_DOCUMENT_ROOT under this address.
        address = name if "://" in name else "/data/local-files/?d=" + quote(name, errors="surrogateescape")
        return [{"data": {"image": address}, "predictions": [prediction]}]

    def finish(self) -> None:
        super().finish()
        write_whole_text(self.folder / "labelstudio.xml", annotation_tools.label_studio_config(self.names))


class _Cvat(_OneFile):
    place = shown = "cvat.xml"
    purpose = "CVAT for images 1.1"

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        self._file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        self._write(xml_exchange.cvat_meta(names))

    def _write(self, element: ElementTree.Element) -> None:
        ElementTree.indent(element)
        self._file.write(ElementTree.tostring(element, encoding="unicode") + "\n")

    def add(self, found: Any, name: str, number: int) -> None:
        self._write(xml_exchange.cvat_image(found, number, name))

    def finish(self) -> None:
        self._file.write("</annotations>\n")


class _Csv(_OneFile):
    place = shown = "boxes.csv"
    purpose = "CSV, a row for each box"

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        self._rows = table_writer(self._file, lineterminator="\n")
        self._rows.writerow(table_exchange.COLUMNS)

    def add(self, found: Any, name: str, number: int) -> None:
        for _, *row in table_exchange.text_rows(found):
            self._rows.writerow([harmless_cell(value) for value in (name, *row)])


class _Parquet(FormatWriter):
    place = shown = "boxes.parquet"
    purpose = "Parquet, a row for each box"

    @classmethod
    def check(cls, folder: Path) -> None:
        super().check(folder)
        kept_library("pyarrow", "Parquet files need")

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        parquet = kept_library("pyarrow.parquet", "Parquet files need")
        self._schema = table_exchange.table_schema({"names": list(names)})
        unfinished = stack.enter_context(whole_file(folder / self.place))
        self._file = stack.enter_context(parquet.ParquetWriter(unfinished, self._schema))
        self._tables: list[Any] = []
        self._waiting = 0

    def add(self, found: Any, name: str, number: int) -> None:
        if len(found) == 0:
            return
        self._tables.append(table_exchange.arrow_table(found, name).replace_schema_metadata(self._schema.metadata))
        self._waiting += len(found)
        if self._waiting >= _ROW_GROUP:
            self.finish()

    def finish(self) -> None:
        arrow = kept_library("pyarrow", "Parquet files need")
        if self._tables:
            self._file.write_table(arrow.concat_tables(self._tables))
        self._tables, self._waiting = [], 0


class _HuggingFace(_OneFile):
    place = shown = "metadata.jsonl"
    purpose = "metadata of a Hugging Face imagefolder with objects"

    def add(self, found: Any, name: str, number: int) -> None:
        row = table_exchange.objects_row(found, number)
        # A list of numbers would not tell the labels: an imagefolder has no place for the names of a ClassLabel.
        row["objects"]["category"] = found.text_labels
        self._file.write(json.dumps({"file_name": name, **row}, ensure_ascii=False) + "\n")


class _Odvg(FormatWriter):
    place = shown = "odvg.jsonl"
    purpose = "ODVG json lines, and label_map.json, the label of each number"

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        super().__init__(folder, names, stack)
        self._file = self.open(self.place)

    def add(self, found: Any, name: str, number: int) -> None:
        self._file.write(json.dumps(annotation_tools.odvg_line(found, name), ensure_ascii=False) + "\n")

    def finish(self) -> None:
        names = json.dumps({str(number): name for number, name in enumerate(self.names)}, ensure_ascii=False)
        write_whole_text(self.folder / "label_map.json", names + "\n")


FORMATS: dict[str, type[FormatWriter]] = {
    "coco": _Coco,
    "coco-results": _CocoResults,
    "coco-polygons": _CocoPolygons,
    "yolo": Yolo,
    "voc": Voc,
    "cvat": _Cvat,
    "labelstudio": _LabelStudio,
    "createml": _CreateML,
    "labelme": LabelMe,
    "png": MaskPictures,
    "odvg": _Odvg,
    "hf": _HuggingFace,
    "csv": _Csv,
    "parquet": _Parquet,
}
"""The formats by name."""
