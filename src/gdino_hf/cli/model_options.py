"""Options that choose a model and how it computes, and the detector that they stand for."""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import UsageError


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the option --dtype."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="data type of the computation; int8 computes in float32 with 8-bit matrix products where they are faster, "
        "on a CPU with AVX-512 VNNI (default: %(default)s)",
    )


def load_detector(
    model: str,
    labels: Any = (),
    *,
    device: str = "auto",
    dtype: str = "float32",
    optimize: bool = True,
) -> Any:
    """Load the model that the command line names.

    Args:
        model: Hub id, folder or "nano".
        labels: What `check_labels` checks before the weights are read or downloaded: a list of labels, a
            `gdino_hf.Vocabulary`, or nothing.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16" or, on a CPU, "int8".
        optimize: Whether to call `optimize_for_inference` on a CPU.

    Returns:
        A `gdino_hf.Detector`.

    Raises:
        UsageError: The model, the device, the dtype or a label cannot be used.
    """
    from gdino_hf import Detector
    from gdino_hf.detection.exported_folder import ExportError
    from gdino_hf.detection.loading import LoadingError, check_int8_place, usable_device

    try:
        place = usable_device(device)
    except ValueError as error:
        raise UsageError(f"--{reason(error)}") from error
    if dtype == "int8":
        try:
            check_int8_place(place, optimize)
        except ValueError as error:
            raise UsageError(f"--dtype {reason(error)}") from error
    check = partial(check_labels, labels=labels) if labels else None
    try:
        detector = Detector(model, device=device, dtype=dtype, optimize=optimize, check=check)
        if labels and detector.labels is not None:
            _check_baked(detector, labels)
        return detector
    except UsageError:
        raise
    except ExportError as error:
        raise UsageError(f"--model {reason(error)}") from error
    # Moving a model to a device and optimizing it raise exceptions of many types.
    except Exception as error:
        why = error.why if isinstance(error, LoadingError) else reason(error)
        raise UsageError(
            f"--model {model} cannot be loaded ({why}); give a Hub id, a folder with its files, or nano"
        ) from error


def _check_baked(detector: Any, labels: Any) -> None:
    """Check labels with an exported model that has others baked in, perhaps."""
    from gdino_hf.model.label_faults import LabelWarning

    # `check_labels` printed what is odd about them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabelWarning)
        try:
            detector.search(labels)
        except ValueError as error:
            raise UsageError(reason(error)) from error


def check_labels(processor: Any, labels: Any) -> None:
    """Check that labels can be used with a model, and print on stderr what is odd about them.

    Args:
        processor: The model's processor.
        labels: A list of labels or a `gdino_hf.Vocabulary`.

    Raises:
        UsageError: A label cannot be used.
    """
    from gdino_hf import Vocabulary
    from gdino_hf.model.label_faults import label_remarks
    from gdino_hf.model.text_prompt import build_prompt

    build = labels.prompt if isinstance(labels, Vocabulary) else partial(build_prompt, labels)
    try:
        prompt = build(processor.tokenizer, processor.max_text_len)
    except (TypeError, ValueError) as error:
        raise UsageError(reason(error)) from error
    for remark in label_remarks(prompt, processor.tokenizer):
        print(f"warning: {printable(remark)}", file=sys.stderr)
