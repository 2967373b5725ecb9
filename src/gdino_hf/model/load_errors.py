"""What `from_pretrained` raises for a model folder that cannot be used: OSError or ValueError, with the cause."""

import copy
import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .printable import printable
from .weight_files import all_zero, not_finite

logger = logging.getLogger(__name__)

# The device's memory and missing packages are not the folder's fault.
_NOT_OF_THE_FOLDER = (torch.OutOfMemoryError, MemoryError, ImportError)
# Nor are arguments that do not exist and a default device that holds no numbers: parts of transformers' messages.
_OF_THE_CALLER = ("unexpected keyword", "meta device context manager")
_LONGEST_CAUSE = 300


class ModelFolderError(ValueError):
    """A model's folder cannot be used.

    Args:
        where: Folder or Hub id.
        cause: What is wrong with it, without a period.
        remedy: What to do about it, without a period.
    """

    def __init__(self, where: str, cause: str, remedy: str) -> None:
        cause = printable(cause)
        super().__init__(f"{printable(where)} cannot be loaded ({cause}); {remedy}.")
        self.without_name = cause
        """The cause alone, for messages that name the folder themselves."""


class HeadMismatchError(ValueError):
    """The heads in a checkpoint are not those that its configuration describes.

    Args:
        fields: Configuration fields with the values that the tensors show.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)
        self.shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        super().__init__(f"The weights have other heads than config.json describes; give from_pretrained {self.shown}.")


@contextmanager
def plain_load_errors(where: str) -> Iterator[None]:
    """Turn whatever a damaged model folder raises into a ValueError that names the folder and the cause.

    Args:
        where: Folder or Hub id, for the message.

    Raises:
        OSError: As raised inside; so are ImportError, TypeError for unknown arguments, errors of memory, and
            RuntimeError under a default device "meta".
        ValueError: For any other exception; those raised inside with one line of text are passed on.
    """
    try:
        yield
    except _NOT_OF_THE_FOLDER:
        raise
    except Exception as error:
        text = str(error)
        is_sentence = type(error) is ValueError and 0 < len(text) <= _LONGEST_CAUSE and printable(text) == text
        plain = "\n".join(map(printable, text.split("\n")))
        if isinstance(error, OSError) and plain != text:
            # transformers' messages name the folder as it is.
            raise OSError(plain) from error
        passed_on = isinstance(error, OSError) or is_sentence
        passed_on = passed_on or any(part in text for part in _OF_THE_CALLER)
        if passed_on or isinstance(error, (ModelFolderError, HeadMismatchError)):
            raise
        damaged = _damaged_json(Path(where))
        cause = f"{damaged} is not valid JSON" if damaged else failure_cause(error)
        raise ModelFolderError(where, cause, "fetch its files again, or correct the one that is named") from error


def _damaged_json(folder: Path) -> str | None:
    """Return the name of a file in a folder that should hold JSON but does not."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return path.name
    return None


def failure_cause(error: BaseException) -> str:
    """Return the sentence of a message that says what is wrong, or the exception's type if it has none."""
    if isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"its weights need {wanted[1] if wanted else 'more than tensors'}, which could run any program"
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"the key {error.args[0]!r} is missing"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    # Messages such as "Validation error for field 'x':" announce the cause, which follows.
    while len(lines) > 1 and lines[0].endswith(":"):
        lines.pop(0)
    if not lines:
        return type(error).__name__
    if type(error) is Exception:
        # Only the tokenizers library raises the base class itself.
        lines[0] = f"tokenizer.json: {lines[0]}"
    elif isinstance(error, (TypeError, AttributeError, IndexError)):
        lines[0] = f"one of its JSON files has a value of the wrong kind: {lines[0]}"
    elif isinstance(error, ArithmeticError):
        lines[0] = f"one of the sizes in config.json cannot be used: {lines[0]}"
    cause = lines[0].removeprefix("TypeError: ").removeprefix("ValueError: ")
    # What follows may list hundreds of accepted names.
    return (cause if len(cause) <= _LONGEST_CAUSE else cause.partition(". ")[0])[:_LONGEST_CAUSE].rstrip(".")


def with_fields(options: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `from_pretrained` with some configuration fields changed.

    Args:
        options: The keyword arguments, with or without a configuration object, which is not changed.
        fields: The fields to set.
    """
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        return {**options, **fields}
    config = copy.deepcopy(config)
    # In this order: sharing the encoder's head needs a shared decoder head.
    for name in sorted(fields, reverse=True):
        setattr(config, name, fields[name])
    return {**options, "config": config}


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse weights that are NaN, infinite or all zero, with which a model finds nothing or everything.

    Args:
        model: A model that was loaded.
        where: Folder or Hub id, for the message.

    Raises:
        ValueError: A weight or stored buffer holds NaN or infinity, or most matrices hold zeros only.
    """
    names = not_finite(model)
    if names:
        raise ModelFolderError(
            where,
            f"{len(names)} of its tensors hold NaN or infinity, for instance {names[0]}",
            "fetch the weights again, or take a checkpoint from before the training diverged",
        )
    zeros, number = all_zero(model)
    # New models have some, such as those that begin without moving any box.
    if zeros > number / 2:
        raise ModelFolderError(
            where,
            f"{zeros} of its {number} matrices hold zeros only, as files do that a download left unfinished",
            "fetch the weights again",
        )
