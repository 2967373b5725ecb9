"""What `from_pretrained` raises for a model folder that cannot be used: OSError or ValueError, with the cause."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .weight_files import not_finite

logger = logging.getLogger(__name__)

_DOCUMENTED = (OSError, ValueError, TypeError, ImportError)
# The device's memory is not the file's fault.
_NOT_OF_THE_FILE = (torch.OutOfMemoryError, MemoryError)


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
        OSError: As raised inside; so are TypeError and ImportError.
        ValueError: As raised inside, or for any other exception.
    """
    try:
        yield
    except (*_DOCUMENTED, *_NOT_OF_THE_FILE):
        raise
    except Exception as error:
        raise ValueError(f"{where} cannot be loaded ({_cause(error)}); fetch its files again.") from error


def _cause(error: BaseException) -> str:
    """Return the lines of a message that say what is wrong, joined, or the exception's type if it has none."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"the key {error.args[0]!r} is missing"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    # Messages such as "Error(s) in loading state_dict for X:" announce the cause, which follows.
    while len(lines) > 1 and lines[0].endswith(":"):
        lines.pop(0)
    return lines[0].rstrip(".") if lines else type(error).__name__


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
    """Refuse weights that are NaN or infinite, with which a model finds nothing or everything.

    Args:
        model: A model that was loaded.
        where: Folder or Hub id, for the message.

    Raises:
        ValueError: A weight or stored buffer holds NaN or infinity.
    """
    names = not_finite(model)
    if names:
        raise ValueError(
            f"{where} cannot be used: {len(names)} of its tensors hold NaN or infinity, for instance {names[0]}; fetch "
            "the weights again, or take a checkpoint from before the training diverged."
        )
