"""Checks of a model folder's weight files: how much they hold, and which heads they belong to."""

import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .configuration_gdino import GDinoConfig
from .printable import printable
from .weight_places import INDEX_FILES, check_links, check_shard_indices, shard_names

_HEAD = re.compile(r"^(?P<decoder>model\.decoder\.)?(?P<name>bbox|class)_embed\.(?P<layer>\d+)\.(?P<rest>.+)$")
_CLASS_TENSOR = re.compile(r"(?:^|\.)(?:class_embed\.\d+|encoder_output_class_embed)\.(?P<rest>bias|log_temperature)$")
_SCALE = re.compile(r"(scales?|absmax|SCB|zero_points?|zeros)$|_scale(_inv)?$|scale_inv$", re.IGNORECASE)
_WIDE_FLOATS = ("float64", "float32", "float16", "bfloat16")
_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# A model may lack some weights in its files, such as new heads, but not most of them.
_MOST_MISSING, _SMALL = 2, 10_000_000
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_LONGEST_KEY, _SHOWN = 500, 80


def check_keys(keys: Iterable[str], path: str | Path) -> None:
    """Refuse tensors whose names a terminal would act on, or that fill it; no model has such names.

    Args:
        keys: Names of the tensors of a file.
        path: The file, for the message.

    Raises:
        ValueError: A name is empty, too long, or holds control characters.
    """
    for key in keys:
        if not 0 < len(key) <= _LONGEST_KEY or printable(key) != key:
            raise ValueError(
                f"{printable(path)} holds a tensor named '{printable(key, _SHOWN)}'; names have 1 to {_LONGEST_KEY} "
                "printable characters, so fetch the file again."
            )


def check_weight_files(folder: Path) -> None:
    """Open the weight files that a folder's model is loaded from, without reading their values.

    Args:
        folder: A model's folder.

    Raises:
        ValueError: An index or a weight file is damaged, or an index or a link leads to a file outside the folder.
    """
    check_shard_indices(folder)
    check_links(folder, (path.name for pattern in _WEIGHTS for path in folder.glob(pattern)))
    for name in ("model.safetensors", INDEX_FILES[0], "pytorch_model.bin", INDEX_FILES[1]):
        path = folder / name
        if path.is_file():
            stored_shapes([folder / shard for shard in shard_names(path)] if path.suffix == ".json" else [path])
            return


def stored_shapes(files: Sequence[str | Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in weight files, without reading their values.

    Args:
        files: Safetensors or PyTorch files; GGUF files are left out.

    Returns:
        Shapes by key.

    Raises:
        ValueError: A file is damaged, or holds something other than tensors by printable names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if Path(path).suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or damaged ({error}); fetch it again.") from error
        elif Path(path).suffix == ".bin":
            shapes |= {key: tuple(tensor.shape) for key, tensor in _pickled_tensors(path, "meta").items()}
        elif Path(path).suffix != ".gguf":
            raise ValueError(f"{path} is not a file of weights, which end in .safetensors or .bin; fetch it again.")
        check_keys(shapes, path)
    return shapes


def _pickled_tensors(path: str | Path, device: str) -> dict[str, Tensor]:
    """Read a PyTorch file without running code in it."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} is not a file that torch.save wrote; fetch it again.") from error
        raise ValueError(
            f"{path} needs {wanted[1]} to be read, which could run any program, so it is refused; take weights as "
            "safetensors."
        ) from error
    # Unpicklers raise errors of any kind for files that are none of theirs, such as text.
    except Exception as error:
        raise ValueError(f"{path} is truncated or damaged, or torch.save did not write it; fetch it again.") from error
    named = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
    other = next((repr(key) for key, value in content.items() if not isinstance(value, Tensor)), None) if named else ""
    if other is not None:
        what = f"{other}, which is no tensor" if other else f"a {type(content).__name__} instead of tensors by name"
        raise ValueError(f"{path} holds {what}; save a model's own state dict, or convert the file by `gdino convert`.")
    return dict(content)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that have another shape than the configuration describes.

    Args:
        shapes: Shapes of the stored tensors.
        expected: Shapes of the model's tensors, under their names in files and in memory.

    Raises:
        ValueError: A shape differs; the message names the first.
    """
    vectors = single_numbers(shapes)
    other = [key for key in shapes if expected.get(key, shapes[key]) != shapes[key] and key not in vectors]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(
            f"The files hold {other[0]} of shape {shapes[other[0]]}, but config.json describes {expected[other[0]]}"
            f"{more}; take the config.json that belongs to the weights."
        )


def stored_dtypes(files: Sequence[str | Path]) -> dict[str, str]:
    """Return the data types of all tensors in weight files, without reading their values.

    Args:
        files: Safetensors or PyTorch files; others are left out.

    Returns:
        Names of torch's data types, such as "float16", by key.
    """
    dtypes: dict[str, str] = {}
    for path in files:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            dtypes |= {key: _DTYPE_NAMES.get(name, name) for key, name in names.items()}
        elif Path(path).suffix == ".bin":
            dtypes |= {key: dtype_name(tensor) for key, tensor in _pickled_tensors(path, "meta").items()}
    return dtypes


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's data type, such as "float16"."""
    return str(tensor.dtype).removeprefix("torch.")


def check_dtypes(dtypes: Mapping[str, str], expected: Mapping[str, Tensor]) -> None:
    """Refuse quantized weights, which would be read as if their integers were the weights.

    Args:
        dtypes: Names of the data types of the stored tensors.
        expected: The model's tensors, under their names in files and in memory.

    Raises:
        ValueError: A weight is stored in 8 bits or as integers; the message names the first.
    """
    floats = {key for key, tensor in expected.items() if tensor.is_floating_point()}
    wrong = [
        key
        for key, dtype in dtypes.items()
        if dtype not in _WIDE_FLOATS and (key in floats or key.removeprefix("model.") in floats)
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        scales = next((key for key in dtypes if _SCALE.search(key)), None)
        how = f"with scales ({scales}) that are not read here" if scales else "without the scales that they need"
        raise ValueError(
            f"The files hold {wrong[0]}{more} as {dtypes[wrong[0]]}, quantized weights {how}; take the model in "
            "float32, float16 or bfloat16."
        )


def check_amount(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration that describes far more weights than the files hold, before memory is taken for them.

    Args:
        model: The model, whose weights may be on the meta device.
        shapes: Shapes of the stored tensors.

    Raises:
        ValueError: The model has more than twice as many weights as the files.
    """
    stored = sum(math.prod(shape) for shape in shapes.values())
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if shapes and wanted > _MOST_MISSING * stored + _SMALL:
        raise ValueError(
            f"config.json describes a model of {wanted:,} weights, but the files hold {stored:,}; take the config.json "
            "that belongs to the weights."
        )


def fitting_heads(
    shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, Tensor], config: GDinoConfig, exact: bool = True
) -> dict[str, Any]:
    """Find the configuration fields of the heads that the stored tensors contradict.

    Args:
        shapes: Shapes of the stored tensors.
        heads: The stored tensors of box and class heads, as `head_tensors` returns them.
        config: The configuration that came with them.
        exact: False lets the configuration describe heads, or a bias of theirs, that the tensors lack.

    Returns:
        The fields with the values that the tensors show; empty if the configuration describes them.

    Raises:
        ValueError: The configuration describes class heads with a bias, but the tensors have none.
    """
    fields: dict[str, Any] = {}
    found = {match["rest"] for key in shapes if (match := _CLASS_TENSOR.search(key))}
    kind = "cosine" if "log_temperature" in found else "scaled_bias" if "bias" in found else "dot"
    detector = any(key.startswith("bbox_embed.") for key in shapes)
    if exact and kind == "dot" and detector and config.class_head != "dot":
        raise ValueError(
            f"config.json says class_head {config.class_head!r}, whose bias (class_embed.0.bias) the weights lack; "
            "give from_pretrained class_head='dot' if they are a Grounding DINO's, or ignore_mismatched_sizes=True to "
            "train a new one."
        )
    if found and kind != config.class_head:
        fields["class_head"] = kind
    for name, field in (("bbox", "decoder_bbox_embed_share"), ("class", "decoder_cls_embed_share")):
        layers = {int(match["layer"]) for key in shapes if (match := _own_head(key)) and match["name"] == name}
        each = layers >= set(range(config.decoder_layers)) and config.decoder_layers > 1
        if getattr(config, field) and each and ("class_head" in fields or _differ(heads, name)):
            fields[field] = False
        elif exact and not getattr(config, field) and layers == {0} and config.decoder_layers > 1:
            fields[field] = True
    if fields.get("decoder_bbox_embed_share") is False and config.two_stage_bbox_embed_share:
        fields["two_stage_bbox_embed_share"] = False
    return fields


def _own_head(key: str) -> re.Match[str] | None:
    """Match the key of a head that is not a copy under the decoder."""
    match = _HEAD.match(key)
    return match if match and not match["decoder"] else None


def _differ(heads: Mapping[str, Tensor], name: str) -> bool:
    """Whether the heads of two decoder layers hold different values."""
    for key, tensor in heads.items():
        match = _own_head(key)
        if match and match["name"] == name:
            first = heads.get(f"{name}_embed.0.{match['rest']}")
            if first is not None and (first.shape != tensor.shape or not torch.equal(first, tensor)):
                return True
    return False


def head_tensors(state_dict: Mapping[str, Tensor] | None, files: Sequence[str | Path] | None) -> dict[str, Tensor]:
    """Read the box and class heads, and their copies under the decoder.

    Args:
        state_dict: The weights by name, or None if they are in files.
        files: Weight files; only safetensors files are read.

    Returns:
        The tensors by key.
    """
    heads = {key: tensor for key, tensor in (state_dict or {}).items() if _HEAD.match(key)}
    for path in files or ():
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                heads |= {key: file.get_tensor(key) for key in file.keys() if _HEAD.match(key)}  # noqa: SIM118
    return heads


def differing_copies(
    state_dict: Mapping[str, Tensor] | None, files: Sequence[str | Path] | None, config: GDinoConfig
) -> list[str]:
    """Find copies of shared heads, under the decoder or for every layer, whose values differ from the original.

    Args:
        state_dict: The weights by name, or None if they are in files.
        files: Weight files; only safetensors files are read.
        config: The model's configuration, which says whether the layers share their heads.

    Returns:
        Names of the copies that differ from the head used here, such as "model.decoder.bbox_embed.1".
    """
    heads = head_tensors(state_dict, files)
    shared = {"bbox": config.decoder_bbox_embed_share, "class": config.decoder_cls_embed_share}
    differing = set()
    for key, tensor in heads.items():
        match = _HEAD.match(key)
        assert match is not None
        name, layer = match["name"], match["layer"]
        head = heads.get(f"{name}_embed.{0 if shared[name] else layer}.{match['rest']}")
        if head is not None and not torch.equal(head.reshape(tensor.shape), tensor):
            differing.add(f"{match['decoder'] or ''}{name}_embed.{layer}")
    return sorted(differing)


def single_numbers(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the keys of class head tensors that hold one number as a vector of length 1 instead of a scalar."""
    return [key for key, shape in shapes.items() if shape == (1,) and _CLASS_TENSOR.search(key)]


def read_all(files: Sequence[str | Path]) -> dict[str, Tensor]:
    """Read all tensors of weight files, memory-mapped where the format allows it."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            tensors |= _pickled_tensors(path, "cpu")
    return tensors


def not_finite(model: nn.Module) -> list[str]:
    """Return the names of a model's weights and stored buffers that hold NaN or infinity.

    Args:
        model: The model; weights on the meta device (offloaded to disk) and 8-bit ones are left out.
    """
    return [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta and not is_finite(tensor)
    ]


def all_zero(model: nn.Module) -> tuple[int, int]:
    """Return how many of a model's matrices hold zeros only, and how many there are; none on the meta device counts.

    Args:
        model: The model.
    """
    matrices = [tensor for tensor in model.parameters() if tensor.ndim > 1 and not tensor.is_meta]
    return sum(not bool(tensor.any()) for tensor in matrices), len(matrices)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a floating-point tensor are finite."""
    # One sum is fast and needs no second tensor; it may overflow in half precision though all numbers are finite.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
