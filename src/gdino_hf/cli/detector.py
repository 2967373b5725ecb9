"""A model and its processor behind one call, as the verbs use them."""

from __future__ import annotations

import argparse
import socket
import urllib.parse
import urllib.request
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError
from .inputs import is_url, read_url

_MODEL_TYPE = "gdino"
_CONFIG = "config.json"
_HUB_SECONDS = 5.0


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare --dtype of a verb that detects."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="of the computation; int8: float32 with 8-bit products where they pay, on a CPU with AVX-512 VNNI "
        "(default: %(default)s)",
    )


def read_image(source: str) -> Any:
    """Read one image as an upright RGB PIL picture.

    Args:
        source: Path or http(s) address.

    Returns:
        The picture, turned as its EXIF orientation says.

    Raises:
        OSError: It cannot be reached.
        ValueError: It is not an image.
    """
    from gdino_hf.model.image_processing_gdino import load_image

    data = read_url(source) if is_url(source) else Path(source).read_bytes()
    if not data:
        raise ValueError("there is nothing in it, 0 bytes; get the picture again")
    return load_image(data)


class Detector:
    """Detects the same labels in one picture after the other.

    Args:
        model: Hub id, folder or "nano".
        labels: What to look for.
        negative_labels: What competes but is left out of the results.
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
            # Asked once here: loaders ask a Hub that does not answer six times for each of their files.
            local = {"local_files_only": not Path(where).exists() and not _hub_answers()}
            config = _read_config(where, local)
            self.processor = GDinoProcessor.from_pretrained(where, **local)
            _check_tokenizer(self.processor.tokenizer)
            # Labels beyond what the model reads at once go to further prompts.
            self.processor.max_text_len = min(self.processor.max_text_len, config.max_text_len)
            # The tokenizer is read in no time: it judges the labels before the weights are loaded or downloaded.
            self._prepare(None)
            weights = "float32" if dtype == "int8" else dtype
            self.model, loading = GDinoForObjectDetection.from_pretrained(
                where, config=config, dtype=weights, output_loading_info=True, **local
            )
            _check_weights(loading["missing_keys"])
            self.model.to(self.device).eval()
        except UsageError:
            raise
        # Loaders raise whatever a damaged or unreachable checkpoint leads them to.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UsageError(
                f"--model {model} cannot be loaded ({reason}); give a Hub id, a folder with its files, or nano"
            ) from error
        # float16 on a CPU is for those who want its very numbers: nothing computes it faster.
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
        """Detect in one picture.

        Args:
            image: An upright RGB PIL picture.
            threshold: Lowest score of a detection, 0..1.
            text_threshold: Lowest score of a token, 0..1.
            nms_threshold: Overlap above which the lesser of two boxes of one label goes; None keeps both.

        Returns:
            "scores" (N,), "labels" (N,) indices, "text_labels" (N strings) and "boxes" (N, 4) xyxy in pixels, the
            highest score first.

        Raises:
            ValueError: The processor refuses the picture or the labels.
        """
        import torch

        inputs = self._prepare(image).to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        return self.processor.post_process_grounded_object_detection(
            outputs,
            inputs,
            threshold=threshold,
            text_threshold=text_threshold,
            target_sizes=[(image.height, image.width)],
            nms_threshold=nms_threshold,
        )[0]

    def _prepare(self, image: Any) -> Any:
        """Inputs of the model for a picture, or for the labels alone."""
        try:
            # One list per image: with labels that end in a period, a flat list could mean one prompt per image.
            return self.processor(images=image, text=[self.labels], negative_labels=self.negative_labels or None)
        except (TypeError, ValueError) as error:
            if image is None:
                raise UsageError(str(error).rstrip(".")) from error
            raise


def _check_int8(device: Any, optimize: bool) -> None:
    """Refuse what no model could be optimized for, before one is loaded or downloaded."""
    import torch

    from gdino_hf.inference.int8_linear import check_int8

    if device.type != "cpu" or not optimize:
        raise UsageError("--dtype int8 is for optimized models on a CPU; choose float32, bfloat16 or float16")
    try:
        check_int8(device, torch.float32)
    except ValueError as error:
        raise UsageError(f"--dtype int8 cannot be had ({str(error).rstrip('.')})") from error


def _hub_answers() -> bool:
    """Whether there is anything at the Hub's address; behind a proxy that is for the loaders to find out."""
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
    """The model's configuration; other architectures, which would load as random weights, are refused."""
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
    config, _ = GDinoConfig.get_config_dict(where, **local)
    if not config:
        raise ValueError("there is no config.json in it")
    if config.get("model_type") != _MODEL_TYPE:
        raise ValueError(f"its model_type is {config.get('model_type')!r}, not one of Grounding DINO")
    return GDinoConfig.from_dict(config)


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuse the empty tokenizer that is made where the files of the real one are missing."""
    from gdino_hf.model.text_prompt import special_token_ids

    try:
        special_token_ids(tokenizer)
    except ValueError as error:
        raise ValueError("its tokenizer knows no words; tokenizer.json or vocab.txt is missing") from error


def _check_weights(missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights, in whose place the model has random ones."""
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
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise UsageError(f"--device {name} cannot be used here ({reason}); --device cpu always can") from error
    return device
