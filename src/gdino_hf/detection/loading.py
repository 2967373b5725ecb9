"""A model and its processor from a name, a folder or objects, refused in one sentence if they cannot be used."""

from __future__ import annotations

import copy
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from ..error_text import reason
from .exported_folder import DOCUMENT, ExportError, is_export

DTYPES = ("float32", "bfloat16", "float16", "int8")
"""Data types of the computation; int8 multiplies 8-bit integers where that is faster, on a CPU with AVX-512 VNNI."""

NANO_FOLDER = Path(__file__).parents[1] / "checkpoints" / "gdino-nano"

_MODEL_TYPE = "gdino"
_CONFIG = "config.json"
_HUB_SECONDS = 5.0
_GRAPHS = (".onnx", ".xml", ".pte", ".pt2")


class LoadingError(ValueError):
    """A model that cannot be loaded.

    Args:
        model: Hub id, folder or "nano".
        why: The reason, as a part of a sentence.
    """

    def __init__(self, model: str | Path, why: str) -> None:
        super().__init__(f"{model} cannot be loaded ({why}); give a Hub id, a folder with its files, or nano.")
        self.why = why


def load_pair(model: str | Path, dtype: str = "float32", check: Callable[[Any], None] | None = None) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        model: Hub id, folder or "nano".
        dtype: One of `DTYPES`.
        check: Function that is called with the processor before the weights are read or downloaded, to look at labels.

    Returns:
        The model on the CPU in eval mode, and the processor. For a folder that `gdino export` wrote, the model is an
        `ExportedModel`.

    Raises:
        LoadingError: The model cannot be loaded; the message says why. What `check` raises is passed on.
        ExportError: The folder is an exported one and damaged, or what runs it is missing or too old.
    """
    from ..model.load_errors import plain_load_errors
    from ..model.modeling_gdino import GDinoForObjectDetection
    from ..model.processing_gdino import GDinoProcessor

    where = str(NANO_FOLDER if str(model) == "nano" else model)
    try:
        local = local_option(where)
        with plain_load_errors(where):
            config = _read_config(where, local)
        processor = fitted(GDinoProcessor.from_pretrained(where, **local), config)
        _check_tokenizer(processor.tokenizer, config)
    # Loaders raise exceptions of any type on damaged or unreachable checkpoints.
    except Exception as error:
        raise LoadingError(model, reason(error)) from error
    if check is not None:
        check(processor)
    if is_export(where):
        return _load_exported(where, dtype, processor), processor
    try:
        loaded, loading = GDinoForObjectDetection.from_pretrained(
            where, config=config, dtype="float32" if dtype == "int8" else dtype, output_loading_info=True, **local
        )
        check_weights(loading["missing_keys"])
    except Exception as error:
        torn = [path.name for suffix in _GRAPHS for path in sorted(Path(where).glob(f"*{suffix}"))]
        why = f"it has {torn[0]} of an exported model, but no {DOCUMENT}; copy the whole folder" if torn else None
        raise LoadingError(model, why or reason(error)) from error
    return loaded.eval(), processor


def _load_exported(where: str, dtype: str, processor: Any) -> Any:
    from .exported_model import ExportedModel

    if dtype != "float32":
        raise ExportError(f"{where} is an exported model, which keeps its dtype; leave {dtype} out.")
    return ExportedModel(where, processor.tokenizer)


def fitted(processor: Any, config: Any) -> Any:
    """Return a processor whose prompt length fits the model; labels that exceed one prompt go into further prompts.

    Args:
        processor: A GDinoProcessor, which is not changed.
        config: The model's configuration.
    """
    processor = copy.copy(processor)
    processor.max_text_len = min(processor.max_text_len, config.max_text_len)
    return processor


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device on which tensors can be made.

    Args:
        name: "auto" (the first GPU, or the CPU), "cpu", "cuda", "cuda:1", ...

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = reason(error).split(". ")[0]
        raise ValueError(f"device {name} cannot be used here ({why}); device cpu always can.") from error
    return device


def check_int8_place(device: torch.device, optimize: bool) -> None:
    """Raise if int8 cannot run here, before a model is loaded or downloaded.

    Args:
        device: Device of the model.
        optimize: Whether the model is going to be optimized.

    Raises:
        ValueError: int8 is not for this device, this processor or models that are not optimized.
    """
    from ..inference.int8_linear import check_int8

    if device.type != "cpu" or not optimize:
        raise ValueError("int8 is for optimized models on a CPU; choose float32, bfloat16 or float16.")
    try:
        check_int8(device, torch.float32)
    except ValueError as error:
        raise ValueError(f"int8 cannot be used ({reason(error)}).") from error


def local_option(where: str) -> dict[str, bool]:
    """Return the option of `from_pretrained` that keeps loaders from the Hub if it does not answer.

    The Hub is asked once here: loaders would try six times for each of their files.

    Args:
        where: Hub id or folder.
    """
    return {"local_files_only": not Path(where).exists() and not _hub_answers()}


def _hub_answers() -> bool:
    """Return whether the Hub can be reached; behind a proxy, assume so and leave errors to the loaders."""
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


def check_place(where: str, local: dict[str, bool]) -> None:
    """Refuse a folder that is not there, and an id whose files cannot be had.

    Args:
        where: Hub id or folder.
        local: What `local_option` returned for it.

    Raises:
        ValueError: There is no such folder and no such id within reach.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(where).exists():
        return
    try:
        validate_repo_id(where)
    except HFValidationError as error:
        raise ValueError("there is no such folder") from error
    if local["local_files_only"] and not isinstance(try_to_load_from_cache(where, _CONFIG), str):
        raise ValueError(
            "there is no such folder, it was not downloaded before, and the Hub cannot be reached or is switched off "
            "by HF_HUB_OFFLINE"
        )


def _read_config(where: str, local: dict[str, bool]) -> Any:
    """Read the model's configuration, and refuse other architectures, which would load with random weights."""
    from ..model.configuration_gdino import GDinoConfig

    check_place(where, local)
    folder = Path(where)
    if folder.is_file():
        raise ValueError("it is a file; give the folder it is in")
    if folder.exists() and not (folder / _CONFIG).is_file():
        if (folder / "model" / _CONFIG).is_file():
            raise ValueError(f"the model of this run is in {folder / 'model'}")
        if (folder / "adapter_config.json").is_file():
            raise ValueError("it holds adapters alone; merge them into their model by `gdino convert`")
    config, _ = GDinoConfig.get_config_dict(where, **local)
    if not config:
        raise ValueError("there is no config.json in it")
    if config.get("model_type") != _MODEL_TYPE:
        raise ValueError(f"its model_type is {config.get('model_type')!r}, not one of Grounding DINO")
    return GDinoConfig.from_dict(config)


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer without words, which transformers makes if files are missing, and one of another model."""
    from ..model.text_prompt import special_token_ids

    try:
        ids = special_token_ids(tokenizer)
    except ValueError as error:
        raise ValueError("its tokenizer knows no words; tokenizer.json or vocab.txt is missing") from error
    embedded = getattr(config.text_config, "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if embedded is not None and largest >= embedded:
        raise ValueError(
            f"its tokenizer numbers words up to {largest}, but the text encoder has {embedded} of them; they do "
            "not belong together"
        )
    strange = [token for token in ids if token not in config.special_token_ids]
    if strange:
        raise ValueError(
            f"its tokenizer separates labels by the tokens {', '.join(map(str, ids))}, but config.json says "
            f"special_token_ids {', '.join(map(str, config.special_token_ids))}; they do not belong together"
        )


def check_weights(missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights, which would stay random.

    Args:
        missing: Names of the weights that its files lack.

    Raises:
        ValueError: There are any.
    """
    if missing:
        number = f"{len(missing)} weight{'s' * (len(missing) != 1)}"
        raise ValueError(f"its files lack {number}, for instance {min(missing)}")
