"""Read checkpoints one tensor at a time: .pth files, safetensors files, and folders of either."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gdino_hf.model.weight_files import check_keys
from gdino_hf.model.weight_places import INDEX_FILES, check_links, shard_names

from ..error_text import reason
from .conversion_error import ConversionError
from .layouts import LAYOUTS

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by the names that safetensors files use."""

_FURTHER_WRAPPERS = ("model_state_dict", "ema_state_dict")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_ZIP_MAGIC = b"PK\x03\x04"
_DAMAGED = "is truncated or damaged; fetch it again and compare its size with the original's"


class Checkpoint:
    """An open checkpoint: names, shapes and dtypes of its tensors, whose values are read on request.

    Attributes:
        path: The file or folder.
        shapes: Shape of each tensor, in the file's order.
        dtypes: Storage dtype of each tensor.
        wrapper: Key of the pickled dictionary that held the tensors; None if the file is a bare state dict.
        others: Other keys of that dictionary, such as the one of the optimizer state.
        config: Contents of the folder's config.json; None if there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.wrapper: str | None = None
        self.others: list[str] = []
        self.config: dict[str, Any] | None = None
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._open_files = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._readers.clear()
        self._open_files.close()

    def read(self, key: str) -> Tensor:
        """Return one tensor as stored."""
        return self._readers[key]()

    def reader(self, key: str) -> Callable[[], Tensor]:
        """Return the function that reads one tensor."""
        return self._readers[key]

    def add(self, key: str, tensor: Tensor) -> None:
        """Add a tensor that is already in memory."""
        self.add_reader(key, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def add_reader(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, reader: Callable[[], Tensor]) -> None:
        """Add a tensor that a function reads or computes."""
        self.shapes[key], self.dtypes[key], self._readers[key] = shape, dtype, reader

    def replace(self, key: str, reader: Callable[[], Tensor]) -> None:
        """Read a tensor from elsewhere, with its shape and dtype unchanged."""
        dtype = self.dtypes[key]
        self._readers[key] = lambda: reader().to(dtype)

    def keep_open(self, other: Checkpoint) -> None:
        """Close another checkpoint together with this one, which reads from it."""
        self._open_files.enter_context(other)

    def add_safetensors(self, path: Path) -> None:
        """Add the tensors of a safetensors file, which stay on disk until they are read.

        Raises:
            ConversionError: The file is damaged.
        """
        try:
            file = self._open_files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} {_DAMAGED} ({reason(error)}).") from error
        for key in file.keys():  # noqa: SIM118 the file is not a dictionary
            view = file.get_slice(key)
            if view.get_dtype() not in DTYPES:
                raise ConversionError(
                    f"{key} of {path} is stored as {view.get_dtype()}, which is none of {', '.join(DTYPES)}; save the "
                    "weights in one of them."
                )
            self.shapes[key], self.dtypes[key] = tuple(view.get_shape()), DTYPES[view.get_dtype()]
            self._readers[key] = partial(file.get_tensor, key)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any layout.

    Args:
        path: A .pth or .pt file, a .safetensors file, or a folder with model.safetensors or pytorch_model.bin, in one
            file or in shards.

    Returns:
        The checkpoint, to be used in a `with` block, which closes its files.

    Raises:
        ConversionError: There is no checkpoint at the path, it is damaged, or reading it could run code.
    """
    if not path.exists():
        raise ConversionError(f"There is no file or folder {path}; check the path, or give the Hub id of a repository.")
    checkpoint = Checkpoint(path)
    files = [path]
    if path.is_dir():
        checkpoint.config = read_json(path / "config.json") if (path / "config.json").is_file() else None
        files = _weight_files(path)
    try:
        for file in files:
            if file.suffix == ".safetensors":
                checkpoint.add_safetensors(file)
            else:
                _add_pickle(checkpoint, file)
        _named(check_keys, checkpoint.shapes, path)
    except BaseException:
        checkpoint.__exit__()
        raise
    return checkpoint


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a model folder: the shards that the index names, or the one file."""
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return [folder / shard for shard in _named(shard_names, folder / name)]
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            _named(check_links, folder, [name])
            return [folder / name]
    raise ConversionError(f"{folder} holds none of {', '.join(_WEIGHT_FILES)}; give the folder with a model's weights.")


def _named(check: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns; its ValueError becomes a ConversionError."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        ConversionError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ConversionError(f"{path} nests its values too deeply to be read; fetch it again.") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} {_DAMAGED} ({reason(error)}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not an object; fetch it again.")
    return content


def _add_pickle(checkpoint: Checkpoint, path: Path) -> None:
    """Add the tensors of a .pth file, wrapped in a dictionary or bare."""
    content = _load_pickle(path)
    wrapper = _wrapper(content, path)
    state = content if wrapper is None else content[wrapper]
    for key, value in state.items():
        if not isinstance(key, str):
            raise ConversionError(
                f"{path} names a tensor {key!r}, a {type(key).__name__}, not text; save a model's own state dict."
            )
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{key!r} of {path} is a {type(value).__name__}, not a tensor; save the state dict alone and give that."
            )
        if value.dtype not in DTYPES.values() or value.layout is not torch.strided:
            raise ConversionError(
                f"{key!r} of {path} is a tensor of {value.dtype} in the layout {value.layout}; save the weights as "
                f"dense tensors of {', '.join(DTYPES)}."
            )
        checkpoint.add(key, value.detach())
    if wrapper is not None:
        checkpoint.wrapper = wrapper
        checkpoint.others += [str(name) for name in content if name != wrapper]


def _wrapper(content: Any, path: Path) -> str | None:
    """Return the key under which a file holds its tensors, or None if it is a bare state dict."""
    usual = dict.fromkeys([*(layout.wrapper for layout in LAYOUTS.values()), *_FURTHER_WRAPPERS])
    held = [name for name, value in content.items() if _has_tensors(value)] if isinstance(content, dict) else []
    first = next((name for name in usual if name in held), None)
    if first is not None or _has_tensors(content):
        return first
    if not held:
        raise ConversionError(
            f"{path} holds no tensors, neither bare nor under a key such as {', '.join(map(repr, usual))}; give a "
            "checkpoint with weights, or save its state dict alone."
        )
    if len(held) > 1 or not isinstance(held[0], str):
        raise ConversionError(
            f"{path} holds tensors under {' and '.join(map(repr, held[:4]))}, and none of these is known to be the "
            "model; save its state dict alone and give that."
        )
    return held[0]


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())


def _load_pickle(path: Path) -> Any:
    """Load a pickle with `weights_only`, so that no code in the file can run."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be read ({error.strerror}); check the file and its permissions."
        ) from error
    zipped = zipfile.is_zipfile(path)
    if not magic or (magic == _ZIP_MAGIC and not zipped):
        raise ConversionError(f"{path} {_DAMAGED}.")
    try:
        # Open-GroundingDino stores its command-line options with the weights; a Namespace of plain values runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the Python object {wanted[1]}" if wanted else "more than tensors and plain values"
        raise ConversionError(
            f"{path} needs {what} to be read, which could run any program, so it is refused; if you trust the file, "
            "load it with the code it came from and save its state dict alone."
        ) from error
    # Unpicklers raise errors of any kind for files that are none of theirs, such as text.
    except Exception as error:
        raise ConversionError(f"{path} {_DAMAGED} ({reason(error)}).") from error
