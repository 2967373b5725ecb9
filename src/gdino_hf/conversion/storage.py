"""Write checkpoints one tensor at a time; the target is written completely or not at all."""

from __future__ import annotations

import errno
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
# Files of an earlier model that would be left beside the new one.
_STALE = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "conversion.*")
Progress = Callable[[Sequence[Step]], Iterable[Step]]


def write_shards(folder: Path, steps: Sequence[Step], read: Reader, max_shard_size: int, progress: Progress) -> None:
    """Write model.safetensors, or shards and their index, with one tensor in memory at a time.

    Args:
        folder: Folder to write to.
        steps: The planned tensors.
        read: Reads tensors of the source.
        max_shard_size: Largest size of a shard in bytes; a larger tensor gets a shard of its own.
        progress: Wraps the sequence of steps, for a progress bar.
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
    """Write one safetensors file tensor by tensor; the library's own writer needs all of them in memory.

    Args:
        path: File to write.
        steps: The planned tensors.
        read: Reads tensors of the source.
        progress: Wraps the sequence of steps, for a progress bar.
    """
    # Larger elements first, so that every tensor is aligned to its element size.
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
    """Write a .pth file, in which copies of a tied tensor share its storage; the model is in memory once.

    Args:
        path: File to write.
        steps: The planned tensors, by the key to write.
        read: Reads tensors of the source.
        wrapper: Key of the dictionary in the file that holds the tensors; None writes a bare state dict.
        progress: Wraps the sequence of steps, for a progress bar.

    Raises:
        OSError: The disk is full.
    """
    made: dict[tuple[tuple[str, ...], torch.dtype], Tensor] = {}
    tensors: dict[Step, Tensor] = {}
    for step in progress(list(steps.values())):
        same = (step.sources, step.dtype)
        tied = step.rule in ("rename", "copy") and bool(step.sources)
        if not tied or same not in made:
            # Cloned, because torch.save would store the whole memory-mapped file behind a view.
            tensor = step.build(read).clone(memory_format=torch.contiguous_format)
            made.update({same: tensor} if tied else {})
        else:
            tensor = made[same]
        tensors[step] = tensor
    state = {key: tensors[step] for key, step in steps.items()}
    try:
        torch.save(state if wrapper is None else {wrapper: state}, path)
    # On a full disk, torch.save only mentions positions in the file.
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _size(step: Step) -> int:
    """Return the size of a planned tensor in bytes."""
    return prod(step.shape) * step.dtype.itemsize


def check_target(target: Path, source: Path, is_file: bool, overwrite: bool) -> None:
    """Refuse a target that is the source, already holds a model, or is a folder instead of a file or vice versa.

    Args:
        target: File or folder to write.
        source: File or folder that is read.
        is_file: Whether the target is a file.
        overwrite: Whether an existing model may be replaced.

    Raises:
        ConversionError: The target cannot be used.
    """
    if target.resolve() == source.resolve():
        raise ConversionError(f"{target} is the source itself; choose another target.")
    if target.is_dir() if is_file else target.is_file():
        kind = ("folder", "a .pth file") if is_file else ("file", "a folder")
        raise ConversionError(f"{target} is a {kind[0]}; name {kind[1]} to write.")
    taken = target.is_file() or (target.is_dir() and any(_weights_in(target)))
    if taken and not overwrite:
        raise ConversionError(
            f"{target} already holds a model; choose another target, or give --overwrite to replace it."
        )


def _weights_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder that belong to a saved model."""
    yield from folder.glob("*.safetensors")
    yield from folder.glob("pytorch_model*.bin")
    yield from folder.glob("config.json")


@contextmanager
def staged(target: Path, is_file: bool = False) -> Iterator[Path]:
    """Provide a temporary folder beside the target, whose contents move to the target if the `with` block succeeds.

    Args:
        target: The folder to create or fill, or the file to write.
        is_file: Whether the target is a file; the contents are then moved to the folder around it.

    Yields:
        The temporary folder.

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
            # mkdtemp makes private folders; the target gets the permissions of any folder the user creates.
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)
            os.replace(folder, target)
    except OSError as error:
        raise ConversionError(f"{target} cannot be written ({error}); choose another target.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
