"""Writing tensors one at a time, and all of a target or none of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import DTYPES
from .conversion_error import ConversionError
from .plan import Reader, Step

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_STALE = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "conversion.*")
Progress = Callable[[Sequence[Step]], Iterable[Step]]


def write_shards(folder: Path, steps: Sequence[Step], read: Reader, max_shard_size: int, progress: Progress) -> None:
    """Write model.safetensors, or shards and their index; memory holds one tensor at a time.

    Args:
        folder: Where to.
        steps: The tensors.
        read: Reads what they are made of.
        max_shard_size: Bytes of a shard; a larger tensor has a shard of its own.
        progress: Wraps the steps while they are written.
    """
    shards: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if shards[-1] and filled + _size(step) > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(step)
        filled += _size(step)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], read, progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, read, progress)
        weight_map.update({step.key: name for step in shard})
    index = {"metadata": {"total_size": sum(map(_size, steps))}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, steps: Sequence[Step], read: Reader, progress: Progress = iter) -> None:
    """Write one safetensors file, a tensor at a time: the library's own writer wants all of them in memory.

    Args:
        path: The file.
        steps: The tensors.
        read: Reads what they are made of.
        progress: Wraps the steps while they are written.
    """
    # Larger element sizes first, so that every tensor starts at a multiple of its own.
    ordered = sorted(steps, key=lambda step: (-step.dtype.itemsize, step.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for step in ordered:
        end = offset + _size(step)
        header[step.key] = {"dtype": _NAMES[step.dtype], "shape": list(step.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for step in progress(ordered):
            file.write(step.build(read).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_pickle(
    path: Path, steps: Mapping[str, Step], read: Reader, wrapper: str | None, progress: Progress = iter
) -> None:
    """Write a .pth file; memory holds the model once, and copies of a tied tensor share its storage.

    Args:
        path: The file.
        steps: The tensors, by the key to write.
        read: Reads what they are made of.
        wrapper: Entry of the file that holds them; None leaves them bare.
        progress: Wraps the steps while they are made.
    """
    made: dict[tuple[tuple[str, ...], torch.dtype], Tensor] = {}
    tensors: dict[Step, Tensor] = {}
    for step in progress(list(steps.values())):
        same = (step.sources, step.dtype)
        tied = step.rule in ("rename", "copy") and bool(step.sources)
        if not tied or same not in made:
            # A view of a file would be saved with all of the file behind it.
            tensor = step.build(read).clone(memory_format=torch.contiguous_format)
            made.update({same: tensor} if tied else {})
        else:
            tensor = made[same]
        tensors[step] = tensor
    state = {key: tensors[step] for key, step in steps.items()}
    torch.save(state if wrapper is None else {wrapper: state}, path)


def _size(step: Step) -> int:
    return prod(step.shape) * step.dtype.itemsize


def check_target(target: Path, source: Path, is_file: bool, overwrite: bool) -> None:
    """Refuse a target that is the source, holds a model already or is of the wrong kind.

    Args:
        target: A file or folder to write.
        source: The file or folder that is read.
        is_file: Whether a file is to be written.
        overwrite: Whether to replace what is there.

    Raises:
        ConversionError: It is; the message says what to do.
    """
    if target.resolve() == source.resolve():
        raise ConversionError(f"{target} is the source itself; name another target.")
    if target.is_dir() if is_file else target.is_file():
        kind = ("folder", "a .pth file") if is_file else ("file", "a folder")
        raise ConversionError(f"{target} is a {kind[0]}; name {kind[1]} to write.")
    taken = target.is_file() or (target.is_dir() and any(_weights_in(target)))
    if taken and not overwrite:
        raise ConversionError(
            f"{target} holds a model already; name another target, or give --overwrite to replace it."
        )


def _weights_in(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.safetensors")
    yield from folder.glob("pytorch_model*.bin")
    yield from folder.glob("config.json")


@contextmanager
def staged(target: Path, is_file: bool = False) -> Iterator[Path]:
    """A temporary folder beside the target, whose contents become the target's when the block ends well.

    Args:
        target: The folder to make or to fill, or a file.
        is_file: Whether it is a file; what is written to the temporary folder then comes to lie beside it.

    Yields:
        The folder to write to.

    Raises:
        ConversionError: The target cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConversionError(f"{target} cannot be written ({error}); choose another target.") from error
    try:
        yield folder
        if is_file or target.is_dir():
            destination = target.parent if is_file else target
            for path in [] if is_file else [path for pattern in _STALE for path in target.glob(pattern)]:
                path.unlink()
            for path in folder.iterdir():
                os.replace(path, destination / path.name)
        else:
            # Temporary folders are private; the target is to be as open as any folder the user makes.
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)
            os.replace(folder, target)
    except OSError as error:
        raise ConversionError(f"{target} cannot be written ({error}); choose another target.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
