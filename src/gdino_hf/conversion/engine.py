"""Convert one checkpoint: from any layout to ours, and from ours to any."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.load_errors import failure_cause
from gdino_hf.model.weight_files import fitting_heads, single_numbers

from ..error_text import CONFIG_ERRORS, reason
from . import companions
from .adapters import has_adapters, merge
from .architecture import stored_shapes
from .checkpoint import Checkpoint, open_checkpoint
from .conversion_error import ConversionError
from .infer import check_preset, infer_config
from .key_map import KeyMap
from .layout_facts import facts_of_config, facts_of_source
from .layouts import LAYOUTS, TRANSFORMERS, Layout, find_layout
from .peers import peer_config
from .plan import Step, plan_from_ours, plan_to_ours, reader_in_ours, shapes_in_ours
from .record import KEPT, RECORD, Report, read_record
from .storage import Progress, check_target, staged, write_pickle, write_safetensors, write_shards

GIGABYTE = 10**9
_MODEL_TYPES = ("gdino", "grounding-dino", "mm-grounding-dino")
_NANO = Path(__file__).resolve().parents[1] / "checkpoints" / "gdino-nano"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "README.md"]


@dataclass(frozen=True)
class Options:
    """Options of a conversion.

    Attributes:
        preset: Name of the preset whose sizes the checkpoint must have; None accepts any.
        tokenizer: Folder, vocab.txt or Hub id; None takes the source's own, otherwise the published one from the Hub.
        overrides: Configuration fields to set, nested as in config.json.
        licence: Licence of the weights, for the model card; None takes the one that the source names, otherwise that of
            the layout's published weights.
        max_shard_size: Largest size of one safetensors file in bytes.
        overwrite: Whether to replace a model that the target holds.
        base: Path or Hub id of the model that a file of low-rank adapters belongs to; None takes the one it names.
        progress: Wraps the sequence of tensors to write, for a progress bar.
    """

    preset: str | None = None
    tokenizer: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    max_shard_size: int = GIGABYTE
    overwrite: bool = False
    base: str | None = None
    progress: Progress = iter


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str | None = None,
    to: str | None = None,
    options: Options | None = None,
) -> Report:
    """Convert one checkpoint; the target is written completely or not at all.

    Args:
        source: A .pth or .safetensors file, a model's folder, or a Hub id.
        target: The folder to write, or the .pth file if `to` names a layout of single files.
        layout: Name of the layout that the source must have; None accepts any.
        to: Name of the layout to convert to, a key of `LAYOUTS`; None converts to ours.
        options: Further options; None takes the defaults.

    Returns:
        The report, which says what happened to every tensor.

    Raises:
        ConversionError: The source or the target cannot be used; the message names key or file and the remedy.
    """
    options = options or Options()
    try:
        return _convert(str(source), Path(target).expanduser(), layout, to, options)
    except ConversionError:
        raise
    # Files can be damaged in more ways than are foreseen, and each raises another exception somewhere.
    except Exception as error:
        raise ConversionError(
            f"{source} cannot be converted ({failure_cause(error)}); fetch it again, or convert it as it was published."
        ) from error


def _convert(source: str, target: Path, layout: str | None, to: str | None, options: Options) -> Report:
    path = _local(source)
    check_target(target, path, to is not None and LAYOUTS[to].is_file, options.overwrite)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path))
        merged = has_adapters(checkpoint.shapes)
        if merged:
            checkpoint = stack.enter_context(merge(checkpoint, options.base, _open_base, source))
        found, prefix = find_layout(checkpoint.shapes, source)
        if found is TRANSFORMERS:
            _make_scalars(checkpoint)
        if to is None:
            if layout is not None and found.name != layout:
                raise ConversionError(
                    f"{source} is in the {found.name} layout, not {layout}; use `gdino convert`, which recognizes it."
                )
            return _to_ours(checkpoint, found, prefix, source, target, options, merged)
        if found is not TRANSFORMERS:
            raise ConversionError(
                f"{source} is in the {found.name} layout, and only models in our or transformers' layout can be "
                f"converted to {to}; convert it to ours first, without --to-{to}."
            )
        return _from_ours(checkpoint, LAYOUTS[to], source, target, options)


def _make_scalars(checkpoint: Checkpoint) -> None:
    """Read the numbers of class heads as scalars, as transformers stores them, where a file has vectors of length 1."""
    for key in single_numbers(checkpoint.shapes):
        checkpoint.add_reader(key, (), checkpoint.dtypes[key], partial(_first, checkpoint.reader(key)))


def _first(reader: Callable[[], Tensor]) -> Tensor:
    return reader().reshape(())


def _open_base(base: str) -> Checkpoint:
    """Open the model that low-rank adapters belong to."""
    return open_checkpoint(_NANO if base == "nano" else _local(base))


def _to_ours(
    checkpoint: Checkpoint, layout: Layout, prefix: str, source: str, target: Path, options: Options, merged: bool
) -> Report:
    """Convert a checkpoint of any layout to ours, or one of ours that adapters were merged into."""
    names = {layout.spelled(key.removeprefix(prefix)): key for key in checkpoint.shapes}
    shapes = {key: checkpoint.shapes[name] for key, name in names.items()}
    dtypes = {key: checkpoint.dtypes[name] for key, name in names.items()}

    def read(key: str) -> Any:
        return checkpoint.read(names[key])

    config, assumed = _config(checkpoint, layout, shapes, read, source, options, merged)
    key_map = KeyMap(layout, facts_of_config(config))
    plan = plan_to_ours(key_map, shapes, dtypes, stored_shapes(config), read, source)
    report = Report(
        source=source,
        target=str(target),
        origin=layout.name,
        destination="gdino",
        plan=plan,
        wrapper=checkpoint.wrapper,
        prefix=prefix,
        keys=[name for key, name in names.items() if key not in plan.dropped],
        others=checkpoint.others,
        peer_config=checkpoint.config if layout is TRANSFORMERS else None,
        assumed=assumed,
    )
    if merged:
        report.notes["adapters"] = f"merged into the model of {checkpoint.path}"
    tokenizer = _tokenizer(checkpoint.path, config, report, options)
    ids = companions.delimiter_ids(tokenizer) if tokenizer is not None else None
    if ids is not None and layout is not TRANSFORMERS:
        config.special_token_ids = ids
    with staged(target) as folder:
        write_shards(folder, plan.steps, read, options.max_shard_size, options.progress)
        if plan.kept:
            write_safetensors(folder / KEPT, [_aside(key, shapes[key], dtypes[key]) for key in plan.kept], read)
        config.architectures = ["GDinoForObjectDetection"]
        config.save_pretrained(folder)
        _finish(folder, tokenizer, config, layout, report, checkpoint.path, options)
        report.write(folder / RECORD)
    return report


def _from_ours(checkpoint: Checkpoint, layout: Layout, source: str, target: Path, options: Options) -> Report:
    """Convert a model in our or transformers' layout to another layout."""
    config, assumed = _read_config(checkpoint, source)
    if options.preset is not None:
        check_preset(config, options.preset, TRANSFORMERS, source)
    # Models saved by transformers may hold tensors that our layout lacks; for our own models this plan changes nothing.
    facts = facts_of_config(config)
    expected = stored_shapes(config)
    tidy = plan_to_ours(
        KeyMap(TRANSFORMERS, facts), checkpoint.shapes, checkpoint.dtypes, expected, checkpoint.read, source
    )
    ours = {step.key: step for step in tidy.steps}
    record = read_record(checkpoint.path, layout.name) if checkpoint.path.is_dir() else None
    if record is None and layout.is_file and config.class_head not in layout.class_heads:
        raise ConversionError(
            f"{layout.title}'s own code has no class head {config.class_head!r} and would leave out its bias; "
            f"{_others(layout, config.class_head)}."
        )
    plan = plan_from_ours(
        KeyMap(layout, facts),
        {key: step.shape for key, step in ours.items()},
        {key: step.dtype for key, step in ours.items()},
        record.keys if record else None,
        layout.name,
    )
    plan.dropped.update(tidy.dropped)
    plan.dropped.update(tidy.kept)
    report = Report(source, str(target), _model_type(checkpoint), layout.name, plan, assumed=assumed)

    def read(key: str) -> Any:
        return ours[key].make(checkpoint.read)

    if record is not None and record.kept is not None:
        for key in record.kept.shapes:
            plan.steps.append(_kept(key, record.kept))
        report.notes["restored"] = f"{len(record.kept.shapes)} tensors of {KEPT}"
        order = {key: place for place, key in enumerate(record.keys)}
        plan.steps.sort(key=lambda step: order.get(step.key, len(order)))
    if not layout.is_file:
        theirs = record.config if record and record.config else peer_config(config)
        tokenizer = _tokenizer(checkpoint.path, config, report, options)
        with staged(target) as folder:
            write_shards(folder, plan.steps, read, options.max_shard_size, options.progress)
            (folder / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _finish(folder, tokenizer, config, layout, report, checkpoint.path, options)
            report.write(folder / RECORD)
        return report
    wrapper = record.wrapper if record else layout.wrapper
    full_keys = record.full_keys if record else {}
    prefix = record.prefix if record else ""
    with staged(target, is_file=True) as folder:
        named = {full_keys.get(step.key, prefix + step.key): step for step in plan.steps}
        write_pickle(folder / target.name, named, read, wrapper, options.progress)
        report.write(folder / f"{target.stem}.{RECORD}")
    return report


def _others(layout: Layout, class_head: str) -> str:
    """Suggest the layouts whose code has a class head."""
    able = [other.name for other in LAYOUTS.values() if class_head in other.class_heads and other is not layout]
    return f"give {' or '.join(f'--to-{name}' for name in able)}" if able else "keep the model as it is"


def _config(
    checkpoint: Checkpoint,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    read: Any,
    source: str,
    options: Options,
    merged: bool,
) -> tuple[GDinoConfig, list[str]]:
    """Return the configuration, checked against the user's preset, and the assumptions it rests on."""
    assumed: list[str] = []
    if layout is TRANSFORMERS:
        if _model_type(checkpoint) == "gdino" and not merged:
            raise ConversionError(
                f"{source} is already in our layout; give {' or '.join(f'--to-{name}' for name in LAYOUTS)}."
            )
        config, assumed = _read_config(checkpoint, source)
    else:
        facts = facts_of_source(layout, shapes, read)
        key_map = KeyMap(layout, facts)
        config, assumed = infer_config(
            shapes_in_ours(key_map, shapes),
            layout,
            facts,
            source,
            read=reader_in_ours(key_map, read),
            given=options.overrides,
        )
        # Without this, weights stored in half precision would also be computed in half precision, which is slow on a
        # CPU.
        config.dtype = "float32"
    if options.overrides:
        try:
            config = GDinoConfig.from_dict(_merged(config.to_dict(), options.overrides))
        except CONFIG_ERRORS as error:
            raise ConversionError(f"--config cannot be used ({reason(error)}).") from error
    if options.preset is not None:
        check_preset(config, options.preset, layout, source)
    return config, assumed


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested dictionary with some entries changed."""
    nested = {
        key: _merged(base[key], value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **changes, **nested}


def _model_type(checkpoint: Checkpoint) -> str:
    return str((checkpoint.config or {}).get("model_type"))


def _read_config(checkpoint: Checkpoint, source: str) -> tuple[GDinoConfig, list[str]]:
    """Read the configuration of a model folder in our or transformers' layout, with the heads that the tensors show.

    Returns:
        The configuration, and a sentence if the folder's own describes other heads.
    """
    if checkpoint.config is None:
        raise ConversionError(f"{source} has no config.json beside its weights; give the complete folder of the model.")
    model_type = _model_type(checkpoint)
    if model_type not in _MODEL_TYPES:
        raise ConversionError(
            f"{source} is a model of type {model_type!r}; give one of type {', '.join(map(repr, _MODEL_TYPES))}."
        )
    try:
        config = GDinoConfig.from_dict(checkpoint.config)
        heads = {
            key: checkpoint.read(key) for key in checkpoint.shapes if key.startswith(("bbox_embed.", "class_embed."))
        }
        fields = fitting_heads(checkpoint.shapes, heads, config)
        if not fields:
            return config, []
        shown = ", ".join(f"{name} is {value!r}" for name, value in fields.items())
        changed = GDinoConfig.from_dict({**config.to_dict(), **fields})
        return changed, [f"{shown}, as the tensors of the heads show, though config.json says otherwise"]
    except CONFIG_ERRORS as error:
        raise ConversionError(
            f"{checkpoint.path / 'config.json'} cannot be used ({reason(error)}); correct the file."
        ) from error


def _local(source: str) -> Path:
    """Return the path of a file or folder; files of a Hub id are downloaded first."""
    path = Path(source).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(source):
        return path
    from huggingface_hub import snapshot_download

    local = not companions.reachable(source)
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES, local_files_only=local))
    # The Hub's client has no common base class for its errors and those of the network.
    except Exception as error:
        raise ConversionError(
            f"There is no file or folder {source}, and the Hub has no such repository or cannot be reached; check the "
            "name or the connection."
        ) from error


def _aside(key: str, shape: tuple[int, ...], dtype: Any) -> Step:
    """Plan to store a tensor of the source beside the model."""
    return Step(key, (key,), "keep", shape, dtype, lambda read: read(key))


def _kept(key: str, kept: Checkpoint) -> Step:
    """Plan to write back a tensor that was stored beside the model."""
    return Step(key, (), "keep", kept.shapes[key], kept.dtypes[key], lambda read: kept.read(key))


def _tokenizer(folder: Path, config: GDinoConfig, report: Report, options: Options) -> Any:
    """Return the tokenizer to save; without one that can be loaded or was asked for, warn and return None."""
    own = str(folder) if companions.has_tokenizer(folder) else None
    wanted = options.tokenizer or own or companions.PUBLISHED_TOKENIZER
    try:
        tokenizer = companions.fitting_tokenizer(wanted, config)
    except ConversionError as error:
        if options.tokenizer is not None:
            raise
        report.warnings.append(f"No tokenizer is saved beside the weights: {error}")
        report.notes["tokenizer"] = "none"
        return None
    report.notes["tokenizer"] = wanted
    return tokenizer


def _finish(
    folder: Path, tokenizer: Any, config: GDinoConfig, layout: Layout, report: Report, source: Path, options: Options
) -> None:
    """Write the files beside the weights: processor and model card."""
    for_transformers = report.destination == TRANSFORMERS.name
    companions.save_processor(
        folder, tokenizer, companions.image_processor_of(source), for_transformers, config.max_text_len
    )
    weights = (
        [source] if source.is_file() else sorted([*source.glob("*.safetensors"), *source.glob("pytorch_model*.bin")])
    )
    hashes = {path.name: _sha256(path) for path in weights if path.name != KEPT}
    report.notes.update({f"sha256 of {name}": digest for name, digest in hashes.items()})
    companions.write_card(
        folder,
        name=Path(report.target).name,
        config=config,
        destination=report.destination,
        source=report.source if _HUB_ID.fullmatch(report.source) else source.name,
        hashes=hashes,
        title=layout.title,
        url=layout.source_url,
        licence=options.licence or companions.licence_of(source) or layout.licence,
        kept=bool(report.plan.kept) and report.destination == "gdino",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
