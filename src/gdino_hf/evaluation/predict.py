"""A model over a data set: every label asked of every image, by the convention of the published figures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ..model.image_processing_gdino import load_image
from ..model.text_prompt import Prompt, build_prompt
from .prediction_file import PredictionFile, Predictions


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
    limit: int | None = None,
    store: PredictionFile | None = None,
    progress: str = "predict",
) -> Predictions:
    """Ask for all labels in every image; every pair of query and label counts, the best are kept.

    Labels beyond what a prompt holds go to further prompts; each image's features and each prompt's are computed once.

    Args:
        model: A GDinoForObjectDetection, left in the mode it was in.
        processor: Its processor.
        rows: Each with "image" (PIL, path or bytes) and optionally "image_id", its place by default; a list, a
            Dataset or an IterableDataset.
        labels: What is looked for; results number them.
        prompts: What each label is called in the prompt, where that is not its name.
        batch_size: Images per forward.
        max_detections: Detections kept per image; None keeps what the prompts give.
        max_per_prompt: Detections kept per image and prompt; max_detections by default.
        labels_per_prompt: Most labels of one prompt; None puts in as many as it holds.
        score: A label's score from its tokens: the mean, as published, or the highest.
        limit: Only the first so many images.
        store: Where predictions go as they are made. What it has already is not made again.
        progress: What the progress bar is called.

    Returns:
        The predictions. An image that cannot be read is named on the terminal, skipped and listed in `failed`.

    Raises:
        ValueError: There is no label, one cannot be used, or a row has no image.
        OSError: The store cannot be written.
    """
    if prompts is not None and len(prompts) != len(labels):
        raise ValueError(f"There are {len(prompts)} prompts for {len(labels)} labels; give one each.")
    asked = list(labels if prompts is None else prompts)
    was_training = model.training
    model.eval()
    try:
        parts = _prompt_parts(model, processor, asked, labels_per_prompt)
        results = start_results(store)
        batches = read_batches(rows, results, batch_size, limit=limit, store=store, progress=progress)
        for batch in batches:
            inputs = prepare_images(processor, batch, results, store)
            if not batch:
                continue
            inputs = inputs.to(model.device)
            features = model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], inputs["image_sizes"])
            detections = [
                _detect(
                    model, processor, features, part, inputs.original_sizes, score, max_per_prompt or max_detections
                )
                for part in parts
            ]
            for place, item in enumerate(batch):
                record(item.entry(_merge([found[place] for found in detections], max_detections)), results, store)
    finally:
        model.train(was_training)
    return results


@dataclass
class Picture:
    """An image that was read.

    Attributes:
        image_id: What its row calls it.
        image: Upright, RGB.
        row: The row it came from.
    """

    image_id: Any
    image: Any
    row: Mapping[str, Any]

    def entry(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of `Predictions.images`."""
        return {"image_id": self.image_id, "width": self.image.width, "height": self.image.height, **found}


def read_batches(
    rows: Any,
    results: Predictions,
    batch_size: int,
    *,
    limit: int | None = None,
    store: PredictionFile | None = None,
    progress: str = "predict",
) -> Iterator[list[Picture]]:
    """Read images in batches with a progress bar; those that are done or cannot be read are left out.

    Args:
        rows: As in `predict`.
        results: Knows what is done, and gets what fails.
        batch_size: Images of a batch.
        limit: Only the first so many rows.
        store: Gets what fails, too.
        progress: What the bar is called.
    """
    done = {entry["image_id"] for entry in results.images}
    total = len(rows) if hasattr(rows, "__len__") else None
    if limit is not None:
        total = limit if total is None else min(total, limit)
    batch: list[Picture] = []
    if not sys.stderr.isatty():
        print(f"{progress}: {'a stream of' if total is None else total} images", file=sys.stderr, flush=True)
    # disable=None: no bar where stderr is not a terminal, but the line above
    for index, row in enumerate(tqdm(islice(_undecoded(rows), limit), progress, total, disable=None, leave=False)):
        if "image" not in row:
            raise ValueError(f"Row {index} has no 'image' but {', '.join(row)}; give rows with images.")
        image_id = row.get("image_id", index)
        if image_id in done:
            continue
        try:
            batch.append(Picture(image_id, _read(row["image"]), row))
        # Bulk work: whatever is wrong with one image is its own affair, the others go on.
        except Exception as error:
            record_failure(image_id, error, results, store)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def start_results(store: PredictionFile | None) -> Predictions:
    """What the store has already; what failed is tried again."""
    return Predictions() if store is None else Predictions(dict(store.header), list(store.earlier.images))


def prepare_images(processor: Any, batch: list[Picture], results: Predictions, store: PredictionFile | None) -> Any:
    """The image half of the model's inputs; images the processor refuses are taken out of the batch.

    Args:
        processor: The model's.
        batch: Gets shorter where an image is refused.
        results: Gets what fails.
        store: The same.
    """
    try:
        return processor(images=[item.image for item in batch])
    except (TypeError, ValueError):
        for item in list(batch):
            try:
                processor(images=[item.image])
            except (TypeError, ValueError) as error:
                batch.remove(item)
                record_failure(item.image_id, error, results, store)
        return processor(images=[item.image for item in batch]) if batch else None


def record(entry: dict[str, Any], results: Predictions, store: PredictionFile | None) -> None:
    """Add one image's predictions to the results and to the store."""
    results.images.append(entry)
    if store is not None:
        store.append(entry)


def record_failure(image_id: Any, error: Exception, results: Predictions, store: PredictionFile | None) -> None:
    """Name an image that is left out on the terminal, and list it."""
    reason = " ".join(str(error).split()) or type(error).__name__
    tqdm.write(f"image {image_id} is left out: {reason}", file=sys.stderr)
    entry = {"image_id": image_id, "error": reason}
    results.failed.append(entry)
    if store is not None:
        store.append(entry)


def _undecoded(rows: Any) -> Any:
    """Rows whose photographs are still files: one that is broken must not end the iteration."""
    features = getattr(rows, "features", None)
    if features is None or "image" not in features:
        return rows
    from datasets import Image

    return rows.cast_column("image", Image(decode=False)) if isinstance(features["image"], Image) else rows


def _read(image: Any) -> Any:
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    return load_image(image)


@dataclass(frozen=True)
class _PromptPart:
    """A prompt that one forward takes: which of the labels it asks for, and its text features."""

    prompt: Prompt
    labels: np.ndarray
    features: Any


def _prompt_parts(model: Any, processor: Any, asked: list[str], labels_per_prompt: int | None) -> list[_PromptPart]:
    step = labels_per_prompt or len(asked)
    if step < 1 or not asked:
        raise ValueError(
            f"There are {len(asked)} labels and {labels_per_prompt} per prompt; give at least one of each."
        )
    max_text_len = min(processor.max_text_len, model.config.max_text_len)
    parts = []
    for start in range(0, len(asked), step):
        whole = build_prompt(asked[start : start + step], processor.tokenizer, max_text_len)
        for chunk in whole.chunks:
            prompt = build_prompt(
                [whole.labels[index] for index in chunk.label_indices], processor.tokenizer, max_text_len
            )
            ids = torch.tensor([prompt.chunks[0].input_ids], device=model.device)
            indices = np.array(chunk.label_indices, dtype=np.int64) + start
            parts.append(_PromptPart(prompt, indices, model.get_text_features(ids)))
    return parts


def _detect(
    model: Any,
    processor: Any,
    image_features: Any,
    part: _PromptPart,
    sizes: Sequence[tuple[int, int]],
    score: Literal["max", "mean"],
    top_k: int | None,
) -> list[dict[str, np.ndarray]]:
    """Detections of one prompt's labels in every image of a batch."""
    outputs = model(image_features=image_features, text_features=part.features)
    found = processor.post_process_grounded_object_detection(
        outputs,
        SimpleNamespace(prompts=[part.prompt]),
        threshold=0.0,
        text_threshold=0.0,
        target_sizes=list(sizes),
        score=score,
        multi_label=True,
        top_k=top_k,
    )
    return [
        {
            "boxes": result["boxes"].double().cpu().numpy(),
            "scores": result["scores"].double().cpu().numpy(),
            "labels": part.labels[result["labels"].cpu().numpy()],
        }
        for result in found
    ]


def _merge(found: Sequence[Mapping[str, np.ndarray]], max_detections: int | None) -> dict[str, np.ndarray]:
    """The best of all prompts."""
    together = {name: np.concatenate([part[name] for part in found]) for name in ("boxes", "scores", "labels")}
    order = np.argsort(-together["scores"], kind="stable")[:max_detections]
    return {name: values[order] for name, values in together.items()}
