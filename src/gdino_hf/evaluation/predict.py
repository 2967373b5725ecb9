"""Detection over a data set: every label in every image, scored by the convention of the published results."""

from __future__ import annotations

import functools
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ..data.stored_pictures import read_row_picture
from ..detection.prepared_images import prepare_image
from ..detection.prompt_passes import Asked, score_pictures
from ..detection.stages import in_order
from ..detection.text_features import TextFeatureStore
from ..error_text import reason
from ..model.grounded_results import Selection
from ..model.picture_limits import PictureError
from ..model.printable import printable
from ..model.text_prompt import build_prompt
from . import LVIS_LABELS, LVIS_PER_PROMPT, MAX_DETECTIONS
from .prediction_file import Predictions, PredictionStore

_READERS = 2
# Where duplicates are suppressed, how many times `max_detections` compete.
_CANDIDATES = 10


@torch.no_grad()
def predict(
    model: Any,
    processor: Any,
    rows: Iterable[Mapping[str, Any]],
    labels: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    batch_size: int = 8,
    max_detections: int | None = 100,
    max_per_prompt: int | None = None,
    labels_per_prompt: int | None = None,
    score: Literal["max", "mean"] = "mean",
    nms_threshold: float | None = None,
    limit: int | None = None,
    store: PredictionStore | None = None,
    progress: str | None = "predict",
    texts: TextFeatureStore | None = None,
) -> Predictions:
    """Detect all labels in every image, keeping the best of all pairs of query and label.

    Labels that do not fit one prompt are split over several. Image features are computed once per image and text
    features once per prompt.

    Args:
        model: A GDinoForObjectDetection; it is run in eval mode and then put back into its own mode.
        processor: The model's processor.
        rows: Rows with "image" (PIL, path or bytes) and optionally "image_id" (default: the row's index), as a list, a
            Dataset or an IterableDataset.
        labels: Labels to detect; results refer to them by index.
        prompts: Text to use for each label in the prompt; None uses the labels themselves.
        batch_size: Number of images per forward pass. Each pass takes the next rows, without those that cannot be read,
            so that an image shares its pass with the same ones however the rows are divided between processes or runs.
        max_detections: Maximum number of detections kept per image; None for no limit.
        max_per_prompt: Maximum number of detections kept per image and prompt; None for `max_detections`.
        labels_per_prompt: Maximum number of labels in a prompt; None for as many as fit.
        score: How a label's score follows from its tokens': "mean", as published, or "max".
        nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; 1 keeps both,
            None stands for the processor's own value.
        limit: Number of images to run on, from the first; None for all.
        store: File that predictions are appended to at once. Images that it already holds are not run again.
        progress: Title of the progress bar; None shows and reports nothing.
        texts: Text features of the model that are kept between calls; None computes them anew.

    Returns:
        The predictions. An image that cannot be read is reported on the terminal, skipped and listed in `failed`.

    Raises:
        ValueError: There are no labels, a label cannot be used, or a row has no image.
        OSError: The store cannot be written.
    """
    if prompts is not None and len(prompts) != len(labels):
        raise ValueError(f"There are {len(prompts)} prompts for {len(labels)} labels; give one each.")
    asked = _asked(
        model,
        processor,
        labels,
        list(labels if prompts is None else prompts),
        labels_per_prompt,
        score,
        max_detections,
        max_per_prompt,
        nms_threshold if nms_threshold is not None else getattr(processor, "nms_threshold", None),
    )
    was_training = model.training
    model.eval()
    try:
        texts = texts or TextFeatureStore(model)
        results = start_results(store)
        reader = BatchReader(processor, model.device, batch_size, results, store)
        with closing(reader.batches(rows, limit, progress)) as batches:
            for batch in batches:
                ids = [item.image_id for item in batch]
                for item, scored in zip(
                    batch, score_pictures(model, texts, asked, [item.inputs for item in batch], ids), strict=True
                ):
                    if not item.is_stored:
                        record(item.entry(_arrays(scored.found)), results, store)
    finally:
        model.train(was_training)
    return results


def prediction_limits(protocol: str) -> dict[str, Any]:
    """Return the arguments of `predict` by which published results of a protocol are made.

    Args:
        protocol: "coco" or "lvis".

    Returns:
        "max_detections", "max_per_prompt" and "labels_per_prompt".
    """
    if protocol == "lvis":
        return {"max_detections": None, "max_per_prompt": LVIS_PER_PROMPT, "labels_per_prompt": LVIS_LABELS}
    return {"max_detections": MAX_DETECTIONS, "max_per_prompt": None, "labels_per_prompt": None}


@dataclass
class Picture:
    """An image that was read from a row.

    Attributes:
        image_id: Identifier of the image in its row.
        size: Width and height in pixels of the upright image.
        inputs: The image prepared for the model.
        row: The row it was read from.
        is_stored: Whether its predictions are stored already; it is run again beside others of its batch.
    """

    image_id: Any
    size: tuple[int, int]
    inputs: Any
    row: Mapping[str, Any]
    is_stored: bool = False

    def entry(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Combine predictions with the image's id and size into an entry of `Predictions.images`."""
        return {"image_id": self.image_id, "width": self.size[0], "height": self.size[1], **found}


@dataclass
class BatchReader:
    """Reads images and prepares them for a model in threads, ahead of the batch that the model works on.

    Attributes:
        processor: The model's processor.
        device: The model's device.
        size: Number of images in a batch.
        results: Predictions so far, whose images are skipped; images that cannot be used are added to `failed`.
        store: File that images that cannot be used are also recorded in.
    """

    processor: Any
    device: Any
    size: int
    results: Predictions
    store: PredictionStore | None

    def batches(self, rows: Any, limit: int | None, progress: str | None) -> Generator[list[Picture], None, None]:
        """Yield batches of images with a progress bar, without images that cannot be used.

        A batch is `size` rows, of which some may be unusable. One whose images are all done is passed over; of another,
        images that are done are in it again, so that the results do not depend on where an earlier run stopped.

        Args:
            rows: Rows as for `predict`.
            limit: Number of rows to read, from the first; None for all.
            progress: Title of the progress bar; None shows nothing.
        """
        done = {entry["image_id"] for entry in self.results.images}
        total = len(rows) if hasattr(rows, "__len__") else None
        if limit is not None:
            total = limit if total is None else min(total, limit)
        if progress is not None and not sys.stderr.isatty():
            print(f"{progress}: {'a stream of' if total is None else total} images", file=sys.stderr, flush=True)
        numbered = cut(enumerate(islice(undecoded(rows), limit)), self.size)
        read = functools.partial(self._read_batch, done)
        # disable=None shows no bar if stderr is not a terminal; the line printed above stands in for it.
        bar = tqdm(desc=progress, total=total, disable=True if progress is None else None, leave=False)
        with bar, closing(in_order(read, numbered, _READERS, ahead=_READERS)) as found:
            for number, items in found:
                for item in items:
                    if isinstance(item, _Unusable):
                        record_failure(item.image_id, item.error, self.results, self.store, progress is not None)
                pictures = [item for item in items if isinstance(item, Picture)]
                if not all(picture.is_stored for picture in pictures):
                    yield pictures
                bar.update(number)

    def _read_batch(
        self, done: set[Any], rows: Sequence[tuple[int, Mapping[str, Any]]]
    ) -> tuple[int, list[Picture | _Unusable]]:
        """Read and prepare a batch of rows; return their number, and no images if all of them are done."""
        for index, row in rows:
            if "image" not in row and "fault" not in row:
                raise ValueError(f"Row {index} has no 'image' but {printable(', '.join(row))}; give rows with images.")
        if all(row.get("image_id", index) in done for index, row in rows):
            return len(rows), []
        return len(rows), [self._read(done, index, row) for index, row in rows]

    def _read(self, done: set[Any], index: int, row: Mapping[str, Any]) -> Picture | _Unusable:
        image_id = row.get("image_id", index)
        if "fault" in row:
            return _Unusable(image_id, ValueError(row["fault"]))
        # In bulk work one broken image, whatever exception it causes, must not stop the others.
        try:
            image = read_row_picture(row["image"])
            inputs = prepare_image(self.processor, image, self.device)
            return Picture(image_id, image.size, inputs, row, image_id in done)
        except Exception as error:
            return _Unusable(image_id, error)


@dataclass(frozen=True)
class _Unusable:
    """An image that cannot be read, or that the processor rejects, and the reason."""

    image_id: Any
    error: Exception


def start_results(store: PredictionStore | None) -> Predictions:
    """Return the predictions that the store already holds. Its failed images are left out, so they are tried again."""
    return Predictions() if store is None else Predictions(dict(store.header), list(store.earlier.images))


def record(entry: dict[str, Any], results: Predictions, store: PredictionStore | None) -> None:
    """Add the predictions of one image to the results and to the store."""
    results.images.append(entry)
    if store is not None:
        store.append(entry)


def record_failure(
    image_id: Any, error: Exception, results: Predictions, store: PredictionStore | None, say: bool = True
) -> None:
    """Record an image that is left out in the results and the store, and report it on the terminal."""
    # Such an error's own text names the file.
    why = str(error).rstrip(".") if isinstance(error, PictureError) else reason(error, most_lines=3)
    entry = {"image_id": image_id, "error": why}
    if say:
        report_failure(entry)
    results.failed.append(entry)
    if store is not None:
        store.append(entry)


def report_failure(entry: Mapping[str, Any]) -> None:
    """Report on the terminal that an image is left out."""
    tqdm.write(f"image {printable(entry['image_id'])} is left out: {printable(entry['error'])}", file=sys.stderr)


def cut(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield parts of this size, the last one perhaps smaller."""
    items = iter(items)
    while part := list(islice(items, size)):
        yield part


def undecoded(rows: Any) -> Any:
    """Return the rows with undecoded images, so that a broken image cannot end the iteration."""
    features = getattr(rows, "features", None)
    if features is None or "image" not in features:
        return rows
    from datasets import Image

    return rows.cast_column("image", Image(decode=False)) if isinstance(features["image"], Image) else rows


def _asked(
    model: Any,
    processor: Any,
    labels: Sequence[str],
    texts: Sequence[str],
    labels_per_prompt: int | None,
    score: Literal["max", "mean"],
    max_detections: int | None,
    max_per_prompt: int | None,
    nms_threshold: float | None,
) -> Asked:
    """Arrange labels in prompts in their own order, as published results do; a `Vocabulary` would sort them."""
    step = labels_per_prompt or len(texts)
    if step < 1 or not texts:
        raise ValueError(
            f"There are {len(texts)} labels and {labels_per_prompt} per prompt; give at least one of each."
        )
    max_text_len = min(processor.max_text_len, model.config.max_text_len)
    chunks = [
        replace(chunk, label_indices=tuple(start + index for index in chunk.label_indices))
        for start in range(0, len(texts), step)
        for chunk in build_prompt(texts[start : start + step], processor.tokenizer, max_text_len).chunks
    ]
    select = Selection(0.0, score=score, multi_label=True, top_k=max_detections, nms_threshold=nms_threshold)
    per_prompt = max_per_prompt
    if per_prompt is None and max_detections is not None:
        suppresses = nms_threshold is not None and nms_threshold < 1
        per_prompt = max_detections * (_CANDIDATES if suppresses else 1)
    return Asked(tuple(labels), tuple(chunks), select, top_k_per_prompt=per_prompt)


def _arrays(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the predictions of one image: boxes (N, 4) xyxy in pixels, scores (N,) and labels (N,), best first."""
    return {
        "boxes": found["boxes"].double().cpu().numpy(),
        "scores": found["scores"].double().cpu().numpy(),
        "labels": found["labels"].cpu().numpy(),
    }
