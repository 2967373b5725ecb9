"""`export`: a model and its processor to a whole folder in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..detection.exported_folder import DOCUMENT, is_export
from ..detection.loading import load_pair
from ..error_text import reason
from ..model.text_prompt import Prompt, build_prompt, parse_labels, shorten
from ..whole_files import whole_folder
from .folder_card import card
from .folder_document import document, file_entry, to_json
from .graph_formats import OPSET, RUNTIMES, STATIC, check_packages, write_graph
from .graphs import plan_graphs

FORMATS = tuple(RUNTIMES)
VARIANTS = ("whole", "split", "baked")
INT8_FORMATS = ("onnx", "openvino")


def export(
    model: Any,
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",
    variant: str | None = None,
    labels: str | Sequence[str] | None = None,
    processor: Any = None,
    int8: bool = False,
    calibration: Any = None,
    tell: Callable[[str], Any] | None = None,
) -> Path:
    """Write a model as a folder that runs without PyTorch.

    Args:
        model: "nano", Hub id, folder, or a `GDinoForObjectDetection` that is not optimized, which is put in evaluation
            mode and on the CPU.
        out: The folder. An earlier export there is replaced as a whole; a folder that holds anything else is refused.
        format: "onnx", "openvino", "executorch" or "torch-export".
        variant: "whole": one graph from pixels and tokens to boxes. "split": a graph for the text and one for the
            image, so that a prompt is encoded once. "baked": the features of `labels` are constants, and there is no
            text encoder. None is "baked" if there are labels, or else "whole".
        labels: What a baked model finds, as label text or a list; they must fit one prompt.
        processor: The model's processor; None loads it from where the model is.
        int8: Whether weights are int8, in the formats "onnx" and "openvino". Layers whose weights move too many boxes
            on the calibration pictures stay in float.
        calibration: Folder or list of pictures like those that the model will see, of which up to 16 are used; None
            for the three photographs of demo/examples.
        tell: Function that is called with a line of progress before each step.

    Returns:
        The folder.

    Raises:
        ValueError: An argument cannot be used, a package is missing, or the graph cannot be exported.
        OSError: The folder cannot be written.
    """
    tell = tell or (lambda line: None)
    variant = _checked(format, variant, labels)
    place = Path(out)
    if place.exists() and not is_export(place) and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place} is or holds something else, which an export would replace; choose another folder.")
    check_packages(format)
    pictures = _checked_int8(format, int8, calibration, tell)
    model, processor = _loaded(model, processor)
    prompt = _baked_prompt(labels, model, processor) if labels is not None else None
    fixed_size = _fixed_size(processor.image_processor.size) if format in STATIC else None
    plans = plan_graphs(model, variant, prompt, fixed_size)
    with whole_folder(Path(out)) as folder:
        # Tokenizer and settings of the processor, and the configuration, from which `Detector` rebuilds the processor.
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        content = document(
            model_format=format,
            variant=variant,
            runtime=RUNTIMES[format],
            opset=OPSET if format == "onnx" else None,
            plans=plans,
            processor=processor,
            config=model.config,
            prompt=prompt,
            static=format in STATIC,
        )
        for plan in plans:
            tell(f"tracing the graph {plan.role} and writing it as {format}")
            try:
                files = write_graph(plan, format, folder)
            # Exporters raise exceptions of many types.
            except Exception as error:
                raise ValueError(f"The graph {plan.role} cannot be exported as {format} ({reason(error)}).") from error
            content["files"] |= {role: file_entry(path) for role, path in files.items()}
        (folder / DOCUMENT).write_text(to_json(content), encoding="utf-8")
        if pictures:
            int8_weights_in(folder, content, pictures, tell)
        (folder / "README.md").write_text(card(content), encoding="utf-8")
    return Path(out)


def _checked_int8(model_format: str, int8: bool, calibration: Any, tell: Callable[[str], Any]) -> list[Any]:
    """Return the calibration pictures, none without int8, before minutes are spent on tracing."""
    if not int8:
        if calibration is not None:
            raise ValueError("Calibration pictures are for int8; ask for int8 too, or leave them out.")
        return []
    if model_format not in INT8_FORMATS:
        raise ValueError(f"int8 is for the formats {' and '.join(INT8_FORMATS)}, not for {model_format}.")
    check_packages("int8")
    from .int8_choice import calibration_pictures

    return calibration_pictures(calibration, tell)


def int8_weights_in(folder: Path, content: dict[str, Any], pictures: Sequence[Any], tell: Callable[[str], Any]) -> None:
    """Replace the float graphs of a whole folder by int8 ones and describe them in its document.

    Args:
        folder: The folder.
        content: What its document holds, which is changed.
        pictures: Calibration pictures.
        tell: Function that is called with a line of progress before each step.

    Raises:
        ValueError: Too few boxes stay in place.
    """
    from .int8_choice import to_int8

    entry, replaced = to_int8(folder, content, pictures, tell)
    names = {path.name for path in replaced}
    for role, stated in list(content["files"].items()):
        if stated["name"] in names:
            content["files"][role] = file_entry(folder / stated["name"])
        else:  # weights in a second file, which are now inside the first
            (folder / stated["name"]).unlink()
            del content["files"][role]
    content["precision"], content["int8"] = "int8", entry
    measured = entry["calibration"]
    content["figures"] |= {
        f"boxes within 2 pixels of float, on {measured['pictures']} calibration pictures": (
            f"{measured['boxes_within_2_pixels']:.2f} of {measured['boxes']}"
        ),
        "layers with int8 weights": entry["layers"],
        "layers left in float by measurement": len(entry["float_layers"]["by measurement"]),
    }
    (folder / DOCUMENT).write_text(to_json(content), encoding="utf-8")


def _checked(model_format: str, variant: str | None, labels: Any) -> str:
    """Return the variant, or raise if the arguments do not fit together."""
    if model_format not in FORMATS:
        raise ValueError(f"There is no format {shorten(model_format)}; choose {', '.join(FORMATS)}.")
    chosen = variant or ("whole" if labels is None else "baked")
    if chosen not in VARIANTS:
        raise ValueError(f"There is no variant {shorten(chosen)}; choose {', '.join(VARIANTS)}.")
    if chosen == "baked" and labels is None:
        raise ValueError("The variant baked needs the labels that it finds; give labels.")
    if chosen != "baked" and labels is not None:
        raise ValueError(f"Labels are for the variant baked, not for {chosen}; leave them out.")
    if chosen == "split" and model_format == "executorch":
        raise ValueError(
            "ExecuTorch's files have fixed sizes and are made whole or baked, not split; choose one of these."
        )
    return chosen


def _fixed_size(size: Mapping[str, int]) -> tuple[int, int]:
    """Return the (height, width) of the pictures of a graph of fixed sizes: the processor's own, or its widest."""
    short = size.get("height") or size.get("shortest_edge")
    long = size.get("width") or size.get("longest_edge") or short
    if short is None or long is None:
        raise ValueError(f"The processor's size {dict(size)} does not say one size; give it height and width.")
    return int(short), int(long)


def _loaded(model: Any, processor: Any) -> tuple[Any, Any]:
    from ..model.modeling_gdino import GDinoForObjectDetection
    from ..model.processing_gdino import GDinoProcessor

    if isinstance(model, (str, os.PathLike)):
        loaded, own = load_pair(str(model))
        if not isinstance(loaded, GDinoForObjectDetection):
            raise ValueError(f"{model} is an exported model already; give the model that it was exported from.")
        return loaded, own if processor is None else processor
    if not isinstance(model, GDinoForObjectDetection):
        raise TypeError(f"export takes a Hub id, a folder, 'nano' or a model, got {type(model).__name__}.")
    if model._optimized:
        raise ValueError("The model is optimized for this CPU and cannot be traced; export it before optimizing it.")
    if processor is None:
        processor = GDinoProcessor.from_pretrained(model.name_or_path)
    return model.eval().float().cpu(), processor


def _baked_prompt(labels: str | Sequence[str], model: Any, processor: Any) -> Prompt:
    limit = min(processor.max_text_len, model.config.max_text_len)
    prompt = build_prompt(parse_labels(labels), processor.tokenizer, limit)
    if len(prompt.chunks) > 1:
        raise ValueError(
            f"The {len(prompt.labels)} labels take {len(prompt.chunks)} prompts of {limit} tokens but a baked model "
            "has one; give fewer labels, or export the variant split."
        )
    return prompt
