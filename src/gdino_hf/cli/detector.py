"""A model and its processor behind one call, for all subcommands."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import UsageError
from .inputs import is_url

_MODEL_TYPE = "gdino"
_CONFIG = "config.json"
_HUB_SECONDS = 5.0


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the option --dtype."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="data type of the computation; int8 computes in float32 with 8-bit matrix products where they are faster, "
        "on a CPU with AVX-512 VNNI (default: %(default)s)",
    )


def read_image(source: str) -> Any:
    """Read one image as an upright RGB PIL picture.

    Args:
        source: Path or http(s) URL.

    Returns:
        The picture, turned by its EXIF orientation.

    Raises:
        ValueError: The address cannot be reached, or the source is missing, not an image, damaged or beyond a limit.
    """
    from gdino_hf.model.picture_pixels import load_image
    from gdino_hf.model.remote_pictures import fetched

    return load_image(fetched(source) if is_url(source) else Path(source))


class Detector:
    """Detects the same labels in one picture after another.

    Args:
        model: Hub id, folder or "nano".
        labels: What to look for.
        negative_labels: Labels that compete for boxes but are left out of the results.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16" or, on a CPU, "int8".
        optimize: Whether to call `optimize_for_inference` on a CPU.

    Raises:
        UsageError: The model, the device or a label cannot be used.
    """

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        *,
        negative_labels: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "float32",
        optimize: bool = True,
    ) -> None:
        from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor

        self.labels = list(labels)
        self.negative_labels = list(negative_labels)
        self.device = _device(device)
        if dtype == "int8":
            _check_int8(self.device, optimize)
        where = NANO if model == "nano" else model
        try:
            # Ask once here whether the Hub answers: loaders would try six times for each of their files.
            local = {"local_files_only": not Path(where).exists() and not _hub_answers()}
            config = _read_config(where, local)
            self.processor = GDinoProcessor.from_pretrained(where, **local)
            _check_tokenizer(self.processor.tokenizer, config)
            # Labels that exceed the model's prompt length go into further prompts.
            self.processor.max_text_len = min(self.processor.max_text_len, config.max_text_len)
            # The tokenizer loads quickly: check the labels with it before the weights are loaded or downloaded.
            self._prompt = self.check_labels(self.labels, self.negative_labels)
            # The prompt's inputs by the number of pictures in a batch.
            self._text: dict[int, Any] = {}
            weights = "float32" if dtype == "int8" else dtype
            self.model, loading = GDinoForObjectDetection.from_pretrained(
                where, config=config, dtype=weights, output_loading_info=True, **local
            )
            _check_weights(loading["missing_keys"])
            self.model.to(self.device).eval()
        except UsageError:
            raise
        # Loaders raise exceptions of any type on damaged or unreachable checkpoints.
        except Exception as error:
            raise UsageError(
                f"--model {model} cannot be loaded ({reason(error)}); give a Hub id, a folder with its files, or nano"
            ) from error
        # float16 is no faster on a CPU, so it is requested for its exact results: do not optimize.
        self.optimized = optimize and self.device.type == "cpu" and dtype != "float16"
        if self.optimized:
            self.model.optimize_for_inference(int8=True if dtype == "int8" else None)

    def __call__(
        self,
        image: Any,
        *,
        threshold: float,
        text_threshold: float,
        nms_threshold: float | None = None,
    ) -> dict[str, Any]:
        """Detect objects in one picture.

        Args:
            image: An upright RGB PIL picture.
            threshold: Score that detections must exceed, 0..1.
            text_threshold: Lowest score of a label's best token, 0..1.
            nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; None keeps
                both.

        Returns:
            "scores" (N,), "labels" (N,) label indices, "text_labels" (N strings) and "boxes" (N, 4) xyxy in pixels,
            highest score first.

        Raises:
            ValueError: The processor refuses the picture or the labels.
        """
        prepared = [self.prepare(image)]
        found = self.detect(prepared, threshold=threshold, text_threshold=text_threshold, nms_threshold=nms_threshold)
        return found[0]

    def prepare(self, image: Any) -> Any:
        """Return the model's inputs for one picture, in memory that is quickly copied to a GPU; in any thread.

        Args:
            image: An upright RGB PIL picture.

        Raises:
            ValueError: The processor refuses the picture.
        """
        from gdino_hf.detection.prepared_images import prepare_image

        return prepare_image(self.processor, image, self.device)

    def detect(
        self, prepared: Sequence[Any], *, threshold: float, text_threshold: float, nms_threshold: float | None = None
    ) -> list[dict[str, Any]]:
        """Detect objects in a batch of pictures.

        Args:
            prepared: What `prepare` returned for each picture; smaller pictures are padded to the largest.
            threshold: As in a call, like `text_threshold` and `nms_threshold`.
            text_threshold: Lowest score of a label's best token, 0..1.
            nms_threshold: IoU in 0..1, or None.

        Returns:
            For each picture, what a call returns.

        Raises:
            ValueError: The labels do not fit the model.
        """
        import torch

        from gdino_hf.inference.workers import only_blocks
        from gdino_hf.model.prompt_groups import forward_in_groups

        # On a busy machine, splitting the many small operations over threads costs more than it gains.
        with torch.inference_mode(), only_blocks():
            inputs = self._with_text(prepared)
            outputs = forward_in_groups(self.model, inputs)
            return self.processor.post_process_grounded_object_detection(
                outputs,
                inputs,
                threshold=threshold,
                text_threshold=text_threshold,
                target_sizes=inputs.original_sizes,
                nms_threshold=nms_threshold,
            )

    def _with_text(self, prepared: Sequence[Any]) -> Any:
        """Join pictures and the prompt to the inputs of one forward, on the model's device."""
        from gdino_hf.detection.prepared_images import join_images

        if len(prepared) not in self._text:
            self._text[len(prepared)] = self.processor(text=[self._prompt] * len(prepared)).to(self.device)
        text, inputs = self._text[len(prepared)], join_images(prepared, self.device)
        inputs.update(text)
        inputs.prompts = text.prompts
        return inputs

    def check_labels(self, labels: Sequence[str], negative_labels: Sequence[str] = ()) -> Any:
        """Build the prompt of some labels, and print on stderr what is odd about them.

        Args:
            labels: What to look for.
            negative_labels: Labels that compete for boxes but are left out of the results.

        Returns:
            The prompt, for the processor's `text`.

        Raises:
            UsageError: A label cannot be used.
        """
        from gdino_hf.model.label_faults import label_remarks
        from gdino_hf.model.text_prompt import build_prompt

        tokenizer, most = self.processor.tokenizer, self.processor.max_text_len
        try:
            prompt = build_prompt(labels, tokenizer, most, negative_labels)
        except (TypeError, ValueError) as error:
            raise UsageError(reason(error)) from error
        for remark in label_remarks(prompt, tokenizer):
            print(f"warning: {printable(remark)}", file=sys.stderr)
        return prompt


def _check_int8(device: Any, optimize: bool) -> None:
    """Raise if int8 cannot run here, before a model is loaded or downloaded."""
    import torch

    from gdino_hf.inference.int8_linear import check_int8

    if device.type != "cpu" or not optimize:
        raise UsageError("--dtype int8 is for optimized models on a CPU; choose float32, bfloat16 or float16")
    try:
        check_int8(device, torch.float32)
    except ValueError as error:
        raise UsageError(f"--dtype int8 cannot be used ({reason(error)})") from error


def _hub_answers() -> bool:
    """Return whether the Hub can be reached; behind a proxy, assume so and leave errors to the loaders."""
    import urllib.request

    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode():
        return False
    if urllib.request.getproxies():
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=_HUB_SECONDS).close()
    except OSError:
        return False
    return True


def _read_config(where: str, local: dict[str, bool]) -> Any:
    """Read the model's configuration, and refuse other architectures, which would load with random weights."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from gdino_hf import GDinoConfig

    if not Path(where).exists():
        try:
            validate_repo_id(where)
        except HFValidationError as error:
            raise ValueError("there is no such folder") from error
        if local["local_files_only"] and not isinstance(try_to_load_from_cache(where, _CONFIG), str):
            raise ValueError(
                "there is no such folder, it was not downloaded before, and the Hub cannot be reached or is switched "
                "off by HF_HUB_OFFLINE"
            )
    elif not (Path(where) / _CONFIG).is_file() and (Path(where) / "model" / _CONFIG).is_file():
        raise ValueError(f"the model of this run is in {Path(where) / 'model'}")
    elif not (Path(where) / _CONFIG).is_file() and (Path(where) / "adapter_config.json").is_file():
        raise ValueError("it holds adapters alone; merge them into their model by `gdino convert`")
    config, _ = GDinoConfig.get_config_dict(where, **local)
    if not config:
        raise ValueError("there is no config.json in it")
    if config.get("model_type") != _MODEL_TYPE:
        raise ValueError(f"its model_type is {config.get('model_type')!r}, not one of Grounding DINO")
    return GDinoConfig.from_dict(config)


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer without words, which transformers makes if files are missing, and one with too many."""
    from gdino_hf.model.text_prompt import special_token_ids

    try:
        special_token_ids(tokenizer)
    except ValueError as error:
        raise ValueError("its tokenizer knows no words; tokenizer.json or vocab.txt is missing") from error
    embedded = getattr(config.text_config, "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if embedded is not None and largest >= embedded:
        raise ValueError(
            f"its tokenizer has a word of the number {largest}, but the text encoder knows {embedded}; they do "
            "not belong together"
        )


def _check_weights(missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights, which would stay random."""
    if missing:
        number = f"{len(missing)} weight{'s' * (len(missing) != 1)}"
        raise ValueError(f"its files lack {number}, for instance {min(missing)}")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = reason(error).split(". ")[0]
        raise UsageError(f"--device {name} cannot be used here ({why}); --device cpu always can") from error
    return device
