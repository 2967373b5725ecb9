"""Methods of `Detections` that turn them into the formats of other tools, and back.

Numbers are written with the fewest decimals from which reading gives the same float32 boxes and scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..model.option_flags import checked_flag
from . import annotation_tools, coco_exchange, supervision_exchange, table_exchange, xml_exchange, yolo_exchange
from .mask_formats import MaskFormats

if TYPE_CHECKING:
    from .detections import Detections


class DetectionFormats(MaskFormats):
    """Conversions of the detections of one picture; `DataSetFiles` writes those of many.

    In every `from_` method, `names` are all labels in the order of their indices, and `source` names the picture. A
    score that the data lacks is 1. What a format has no place for is left out; a warning says so once where masks,
    track ids or spans are lost.
    """

    def to_supervision(self) -> Any:
        """Convert to `supervision.Detections`, for its annotators, trackers, zones and metrics.

        Returns:
            Boxes, scores, label indices, masks and track ids, with the labels in `data["class_name"]`. The names of
            other labels, size, source and presence have no place in it.

        Raises:
            ImportError: supervision is not installed.
        """
        return supervision_exchange.supervision_detections(self)

    @classmethod
    def from_supervision(
        cls,
        found: Any,
        size: tuple[int, int] | None = None,
        names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert from `supervision.Detections`.

        Args:
            found: Detections with `data["class_name"]`, or with class ids that index `names`.
            size: (width, height) of the picture in pixels; masks tell it, too.
            names: All labels; None takes the class names in order of appearance.
            source: Name of the picture.

        Raises:
            ValueError: There is no size, or a box has no name.
        """
        return cls._made(supervision_exchange.read_supervision(found, size, names, source))

    def to_coco(
        self, image_id: Any = 1, category_ids: Mapping[str, int] | None = None, polygons: bool = False
    ) -> list[dict[str, Any]]:
        """Convert to rows of COCO's results format, for `pycocotools.coco.COCO.loadRes`.

        Args:
            image_id: The picture's id in the ground truth.
            category_ids: Category id of each label in the ground truth; None counts the labels from 1.
            polygons: Whether masks are polygons (see `polygons`) instead of run lengths, which are exact.

        Returns:
            Dicts with image_id, category_id, bbox (x, y, width, height in pixels) and score; with masks also
            segmentation, and where there are any, track_id and tokens_positive (spans). An empty mask has no polygon
            and always is run lengths.

        Raises:
            ImportError: There are masks, but pycocotools is not installed, or shapely for polygons.
            ValueError: A label has no id.
        """
        return coco_exchange.result_rows(self, image_id, category_ids, checked_flag(polygons, "polygons"))

    @classmethod
    def from_coco(
        cls,
        rows: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        size: tuple[int, int],
        category_ids: Mapping[str, int] | None = None,
        source: str | None = None,
        caption: str | None = None,
    ) -> Detections:
        """Convert from COCO's results or annotations of one picture.

        Args:
            rows: Dicts as `to_coco` returns them; score, segmentation, track_id and tokens_positive may be missing.
            names: All labels.
            size: (width, height) of the picture in pixels.
            category_ids: Category id of each label; None counts the labels from 1.
            source: Name of the picture.
            caption: Text that tokens_positive index.

        Raises:
            ValueError: A row is malformed or of an unknown category, or rows are of several pictures.
        """
        others = {"source": source, "caption": caption}
        return cls._made(coco_exchange.read_rows(rows, names, size, category_ids, **others))

    def to_coco_dataset(
        self, file_name: str | None = None, category_ids: Mapping[str, int] | None = None, polygons: bool = False
    ) -> dict[str, Any]:
        """Convert to a COCO data set of one picture.

        Args:
            file_name: The picture's name; `source` by default.
            category_ids: Category id of each label; None counts the labels from 1.
            polygons: Whether masks are polygons instead of run lengths, as in `to_coco`.

        Returns:
            "images", "annotations" (which keep the scores, and track ids and spans where there are any) and
            "categories". Presence, token scores and colours have no place in it.

        Raises:
            ImportError: There are masks, but pycocotools is not installed, or shapely for polygons.
        """
        return coco_exchange.data_set(self, file_name, category_ids, checked_flag(polygons, "polygons"))

    @classmethod
    def from_coco_dataset(cls, content: Mapping[str, Any], image: str | int | None = None) -> Detections:
        """Convert from a COCO data set.

        Args:
            content: Dict with "images", "annotations" and "categories".
            image: Id or file_name of a picture; None is enough if there is one.

        Raises:
            ValueError: The picture is not in it, or there are several and none was chosen.
        """
        return cls._made(coco_exchange.read_data_set(content, image))

    def to_yolo(self, scores: bool = False) -> list[str]:
        """Convert to lines of a YOLO label file: class, center x, center y, width and height, as fractions.

        With masks, each line is a segment: the class and the corners of the outline. Parts of a mask are joined by
        lines of no width, as holes are. An empty mask is written as its box.

        Args:
            scores: Whether a score follows each box. Ultralytics writes it for predictions and refuses it in training.

        Returns:
            A line for each box. Names and size have no place in it, nor have scores by default.

        Raises:
            ImportError: There are masks, but shapely is not installed.
        """
        return yolo_exchange.label_lines(self, checked_flag(scores, "scores"))

    @classmethod
    def from_yolo(
        cls, lines: str | Iterable[str], names: Sequence[str], size: tuple[int, int], source: str | None = None
    ) -> Detections:
        """Convert from a YOLO label file.

        Args:
            lines: The file's text or its lines, each with or without a score. Segments become masks, and their bounds
                boxes.
            names: All labels, as in data.yaml.
            size: (width, height) of the picture in pixels.
            source: Name of the picture.

        Raises:
            ImportError: There are segments, but pycocotools is not installed.
            ValueError: A line is neither a box nor a segment, or its class has no name.
        """
        return cls._made(yolo_exchange.read_lines(lines, names, size, source))

    def to_voc(self, file_name: str | None = None) -> str:
        """Convert to a Pascal VOC document.

        xmin and ymin count pixels from 1, and xmax and ymax are the number of the last pixel, as in the VOC devkit,
        supervision and detectron2. They have decimals where boxes do. Scores stand in a <score> of each <object>, which
        readers of plain VOC pass over.

        Args:
            file_name: The picture's name; `source` by default.

        Returns:
            XML text. Labels without a box have no place in it. Characters that XML cannot hold become escapes.
        """
        return xml_exchange.voc_document(self, file_name)

    @classmethod
    def from_voc(cls, document: str, names: Sequence[str] | None = None, source: str | None = None) -> Detections:
        """Convert from a Pascal VOC document.

        Args:
            document: XML text.
            names: All labels; None takes those of the boxes in order of appearance.
            source: Name of the picture; its filename by default.

        Raises:
            ValueError: It is not such a document.
        """
        return cls._made(xml_exchange.read_voc(document, names, source))

    def to_cvat(self, file_name: str | None = None) -> str:
        """Convert to a document of "CVAT for images 1.1" with one picture.

        Args:
            file_name: The picture's name in the CVAT task; `source` by default.

        Returns:
            XML text. Each label of it has a text attribute "score"; CVAT passes over scores if the task's labels lack
            the attribute. Characters that XML cannot hold become escapes.
        """
        return xml_exchange.cvat_document(self, file_name)

    @classmethod
    def from_cvat(cls, document: str, image: str | None = None, names: Sequence[str] | None = None) -> Detections:
        """Convert from a document of "CVAT for images 1.1".

        Args:
            document: XML text.
            image: Name of a picture; None is enough if there is one.
            names: All labels; those of the task by default.

        Raises:
            ValueError: It is not such a document, the picture is not in it, or there are several and none was chosen.
        """
        return cls._made(xml_exchange.read_cvat(document, image, names))

    def to_createml(self, file_name: str | None = None) -> dict[str, Any]:
        """Convert to an entry of CreateML's list of annotated pictures.

        Args:
            file_name: The picture's name; `source` by default.

        Returns:
            "image" and "annotations", each with its label and the center x and y, width and height in pixels. Scores,
            size and labels without a box have no place in it.
        """
        return annotation_tools.createml_entry(self, file_name)

    @classmethod
    def from_createml(
        cls,
        content: Mapping[str, Any],
        size: tuple[int, int],
        names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert from an entry of CreateML's list of annotated pictures.

        Args:
            content: Dict with "image" and "annotations".
            size: (width, height) of the picture in pixels.
            names: All labels; None takes those of the boxes in order of appearance.
            source: Name of the picture; its "image" by default.

        Raises:
            ValueError: It is not such an entry.
        """
        return cls._made(annotation_tools.read_createml(content, size, names, source))

    def to_label_studio(
        self, from_name: str = "label", to_name: str = "image", model_version: str | None = None
    ) -> dict[str, Any]:
        """Convert to a prediction of Label Studio: an item of a task's "predictions".

        An ML backend returns a list of them from `predict`.

        Args:
            from_name: Name of the RectangleLabels control in the project's labeling configuration.
            to_name: Name of its Image.
            model_version: Version that Label Studio shows.

        Returns:
            "result" with a rectangle in per cent of the picture for each box, and "score", the mean of their scores.
            Names of labels without a box have no place in it; they belong to the labeling configuration.
        """
        return annotation_tools.label_studio_prediction(self, from_name, to_name, model_version)

    @classmethod
    def from_label_studio(
        cls,
        content: Mapping[str, Any],
        names: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert from a prediction or an annotation of Label Studio.

        Args:
            content: Dict with "result"; regions other than rectangles are left out, with a warning.
            names: All labels; None takes those of the boxes in order of appearance.
            size: (width, height) of the picture in pixels; each rectangle tells it, too.
            source: Name of the picture.

        Raises:
            ValueError: It is neither, a rectangle is turned, or there is no size.
        """
        return cls._made(annotation_tools.read_label_studio(content, names, size, source))

    def to_fiftyone(self) -> list[dict[str, Any]]:
        """Convert to arguments of `fiftyone.Detection`: `[fiftyone.Detection(**row) for row in found.to_fiftyone()]`.

        Returns:
            label, bounding_box (x, y, width, height as fractions of the picture), confidence, and for tracks index.
        """
        return annotation_tools.fiftyone_rows(self)

    @classmethod
    def from_fiftyone(
        cls,
        rows: Sequence[Mapping[str, Any]],
        size: tuple[int, int],
        names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert from fields of FiftyOne detections, such as `[detection.to_dict() for detection in detections]`.

        Args:
            rows: Dicts as `to_fiftyone` returns them; further fields are not read.
            size: (width, height) of the picture in pixels.
            names: All labels; None takes those of the boxes in order of appearance.
            source: Name of the picture.

        Raises:
            ValueError: A row lacks its label or its box.
        """
        return cls._made(annotation_tools.read_fiftyone(rows, size, names, source))

    def to_objects(self, image_id: int = 0) -> dict[str, Any]:
        """Convert to a row of a Hugging Face data set for object detection.

        `gdino_hf.detection.table_exchange.objects_features(names)` gives the features of such a data set.

        Args:
            image_id: The picture's id.

        Returns:
            image_id, width, height, and objects with lists of id, area, bbox (x, y, width, height in pixels), category
            (index of the label) and score. Names have their place in the features, and the picture in a column "image".
        """
        return table_exchange.objects_row(self, image_id)

    @classmethod
    def from_objects(
        cls,
        row: Mapping[str, Any],
        names: Sequence[str],
        size: tuple[int, int] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert from a row of a Hugging Face data set with "objects".

        Args:
            row: The row; its categories are indices of `names` or names themselves.
            names: All labels, as in the features.
            size: (width, height) of the picture in pixels; None reads the row's width and height.
            source: Name of the picture.

        Raises:
            ValueError: The row has no objects, there is no size, or a category has no name.
        """
        return cls._made(table_exchange.read_objects_row(row, names, size, source))

    def to_pandas(self) -> Any:
        """Convert to a pandas data frame with a row for each box; `pandas.concat` joins those of many pictures.

        Returns:
            Columns source, width, height, label, label_index, score, x1, y1, x2, y2, and where there are any, track_id
            and mask (COCO's compressed run lengths). The frame's `attrs` hold what belongs to the whole picture.

        Raises:
            ImportError: pandas is not installed.
        """
        return table_exchange.data_frame(self)

    @classmethod
    def from_pandas(
        cls,
        frame: Any,
        names: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert from a data frame of one picture.

        Args:
            frame: Columns as `to_pandas` returns them; label, x1, y1, x2 and y2 are needed.
            names: All labels; None takes those that the frame keeps, or those of its boxes in order of appearance.
            size: (width, height) of the picture in pixels; None reads the frame's.
            source: Name of the picture; None reads the frame's.

        Raises:
            ValueError: A column is missing, the frame is of several pictures, or there is no size.
        """
        return cls._made(table_exchange.read_data_frame(frame, names=names, size=size, source=source))

    def to_arrow(self) -> Any:
        """Convert to an Arrow table with a row for each box, for Parquet, DuckDB, Polars and `datasets`.

        Returns:
            The columns of `to_pandas`, always with track_id and mask, which may be null. The schema's metadata hold
            what belongs to the whole picture. Spans and token scores have no place in it.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return table_exchange.arrow_table(self)

    @classmethod
    def from_arrow(cls, table: Any, **given: Any) -> Detections:
        """Convert from an Arrow table of one picture.

        Args:
            table: Columns as `to_arrow` returns them; label, x1, y1, x2 and y2 are needed.
            **given: `names`, `size` and `source` in place of what the table keeps, as for `from_pandas`.

        Raises:
            TypeError: There is no such attribute.
            ValueError: A column is missing, the table is of several pictures, or there is no size.
        """
        return cls._made(table_exchange.read_arrow_table(table, **given))
