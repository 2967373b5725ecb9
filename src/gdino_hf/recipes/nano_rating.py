"""Rate a gdino-nano: COCO metrics on the everyday and on the wild photographs.

    python -m gdino_hf.recipes.nano_rating runs/nano --everyday everyday --wild wild

The folder is a run of a recipe, one of its checkpoints, or an exported model. A run is rated by its newest checkpoint,
and a checkpoint by its averaged weights. Everyday photographs are asked for all names of their file. A wild photograph
is asked for the names of its own set only, which its file lists as `info.set_names`: other names may be in the picture
without a box.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from .. import NANO
from ..evaluation.coco_results import average_precision
from ..evaluation.ground_truth import coco_ground_truth
from ..evaluation.predict import predict
from ..inference.optimize import optimize_for_inference
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from ..training.ema import EMA_FILE
from ..training.saving import last_checkpoint

logger = logging.getLogger(__name__)

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def load_checkpoint(folder: str | Path) -> GDinoForObjectDetection:
    """Load the model of a run, of a checkpoint with its averaged weights, or of an export.

    Args:
        folder: A run's folder, a checkpoint's folder, or a folder that `save_pretrained` wrote.

    Returns:
        The model in eval mode.
    """
    path = last_checkpoint(Path(folder)) or Path(folder)
    model = GDinoForObjectDetection.from_pretrained(path)
    averaged = path / EMA_FILE
    if averaged.is_file():
        # Frozen weights have no average.
        model.load_state_dict(load_file(averaged), strict=False)
    return model.eval()


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that tell a model and its processor, for the commands that measure one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run, of a checkpoint or of a model; nano for the embedded one")
    parser.add_argument(
        "--processor", help="folder of the processor (default: the model's or its run's, else the embedded model's)"
    )
    return parser


def told_model(options: argparse.Namespace) -> tuple[GDinoForObjectDetection, GDinoProcessor]:
    """Load the model, in eval mode, and the processor that the options of `model_parser` tell."""
    model = load_checkpoint(NANO if options.model == "nano" else options.model)
    folder = options.processor or processor_folder(options.model)
    if options.processor is None and options.model != "nano" and folder == Path(NANO):
        logger.warning("%s has no processor; the embedded model's is used.", options.model)
    return model, GDinoProcessor.from_pretrained(folder)


def processor_folder(model: str | Path) -> Path:
    """Return the folder of a model's processor: its own, that of its run, or else the embedded model's.

    Args:
        model: "nano", or a folder as for `load_checkpoint`.
    """
    own = [] if model == "nano" else [Path(model), Path(model).parent]
    return next((folder for folder in own if (folder / "processor_config.json").is_file()), Path(NANO))


def detect_by_set(
    model: Any,
    processor: Any,
    annotations: str | Path,
    batch_size: int = 8,
    limit: int | None = None,
    nms_threshold: float | None = None,
) -> list[dict[str, Any]]:
    """Detect in every photograph of a COCO file the names of the set that it comes from.

    Args:
        model: A GDinoForObjectDetection.
        processor: The model's processor.
        annotations: COCO json file whose images have a "source". Its info.set_names lists the names of each source;
            without it, every photograph is asked for all names.
        batch_size: Number of photographs per forward pass.
        limit: Number of photographs per set, from the first; None for all.
        nms_threshold: As in `gdino_hf.evaluation.predict.predict`.

    Returns:
        Detections in COCO's results format.

    Raises:
        ValueError: An image's source has no list of names.
    """
    content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    set_names = content.get("info", {}).get("set_names") or {}
    truth = coco_ground_truth(annotations)
    sources = {entry["id"]: entry.get("source") for entry in content["images"]} if set_names else {}
    rows_of: dict[Any, list[Any]] = {}
    for row in truth.rows:
        rows_of.setdefault(sources.get(row["image_id"]), []).append(row)
    category_of = dict(zip(truth.labels, truth.category_ids, strict=True))
    found = []
    for source, rows in rows_of.items():
        labels = truth.labels if not set_names else set_names.get(source)
        if not labels:
            raise ValueError(f"{annotations} lists no names for the set {source!r}; add them to info.set_names.")
        predictions = predict(
            model,
            processor,
            rows,
            labels,
            batch_size=batch_size,
            nms_threshold=nms_threshold,
            limit=limit,
            progress=f"rate {source or 'all'}",
        )
        found += [
            {
                "image_id": image["image_id"],
                "category_id": category_of[labels[label]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for image in predictions.images
            for (x1, y1, x2, y2), label, score in zip(
                image["boxes"].tolist(), image["labels"].tolist(), image["scores"].tolist(), strict=True
            )
        ]
    return found


def rate(model: Any, processor: Any, sets: dict[str, Path], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Compute COCO's metrics on several files.

    Args:
        model: A GDinoForObjectDetection.
        processor: The model's processor.
        sets: COCO json file by title.
        limit: Number of photographs per set, from the first; None for all.

    Returns:
        Metrics by title. A name without a box in the file does not count.
    """
    rated = {}
    for title, path in sets.items():
        metrics = average_precision(path, detect_by_set(model, processor, path, limit=limit))
        rated[title] = {name: round(metrics[name], 4) for name in FIGURES}
    return rated


def main(arguments: Sequence[str] | None = None) -> None:
    """Rate one model and print its metrics as json."""
    parser = model_parser(__doc__)
    parser.add_argument("--everyday", help="folder with val.json and images/, asked for all of its names")
    parser.add_argument("--wild", help="folder with val.json and images/, asked for the names of each picture's set")
    parser.add_argument("--limit", type=int, help="photographs per set, for a quick look")
    options = parser.parse_args(arguments)
    sets = {
        title: Path(folder) / "val.json"
        for title, folder in (("everyday/val", options.everyday), ("wild/val", options.wild))
        if folder
    }
    if not sets:
        parser.error("give --everyday, --wild or both")
    model, processor = told_model(options)
    optimize_for_inference(model)
    print(json.dumps(rate(model, processor, sets, options.limit), indent=2))


if __name__ == "__main__":
    main()
